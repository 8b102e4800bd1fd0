"""A reader of Ascend checkpoints, and their arithmetic on an NPU, from the format's description alone.

It shares no code with graphq: files are read by safetensors and json, nibbles and exponents are taken apart here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


@dataclass(frozen=True)
class Checkpoint:
    tensors: dict[str, Tensor]
    description: dict[str, Any]

    def part(self, layer: str, suffix: str) -> Tensor:
        """A tensor of a layer, whose tag is that of the layer's weight."""
        name = f"{layer}.{suffix}"
        assert self.description[name] == self.description[f"{layer}.weight"], name
        return self.tensors[name]

    def layers(self) -> list[str]:
        tagged = [n for n in self.description if n in self.tensors and n.endswith(".weight")]
        return [n.removesuffix(".weight") for n in tagged if self.description[n] != "FLOAT"]


def read(directory: Path) -> Checkpoint:
    """The tensors of all files, as the index lists them where there is one, and the description."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    for index in directory.glob("*.index.json"):
        where = json.loads(index.read_text())["weight_map"]
        assert where.keys() == tensors.keys()
    description = json.loads((directory / "quant_model_description.json").read_text())
    assert {name for name in description if name in tensors} == tensors.keys()
    return Checkpoint(tensors, description)


def nibbles(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high half of each byte."""
    wide = packed.to(torch.int32) & 0xFF
    return wide & 15, wide >> 4


def signed(nibble: Tensor) -> Tensor:
    return torch.where(nibble > 7, nibble - 16, nibble)


def rows(packed: Tensor) -> Tensor:
    """int4 of [N / 2, K]: the low nibble is the even output."""
    low, high = map(signed, nibbles(packed))
    return torch.stack([low, high], 1).reshape(-1, packed.shape[1])


def columns(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Nibbles of [N, K / 2], from the even input to the odd one, unsigned and signed."""
    found = torch.stack(nibbles(packed), -1).reshape(packed.shape[0], -1)
    return found, signed(found)


def codes(made: Checkpoint, layer: str) -> Tensor:
    """Integers, or numbers of a floating-point format, [N, K] in float64."""
    tag, weight = made.description[f"{layer}.weight"], made.part(layer, "weight")
    if tag in ("W4A8_MXFP", "W4A4_MXFP4", "W4A16_MXFP4"):
        return E2M1[columns(weight)[0].long()].double()
    if tag == "W4A16" and made.part(layer, "weight_scale").shape[1] == 1:
        return columns(weight)[1].double()
    if tag in ("W4A8_DYNAMIC", "W4A16"):
        return rows(weight).double()
    return weight.double()


def dequantized(made: Checkpoint, layer: str) -> Tensor:
    """The weight [N, K] in float64."""
    q, scale = codes(made, layer), made.part(layer, "weight_scale")
    if scale.dtype == torch.uint8:
        s = torch.pow(2.0, scale.double() - 127)
        return q * s.repeat_interleave(32, 1)[:, : q.shape[1]]
    s, offset = scale.double(), 0.0
    if f"{layer}.weight_scale_second" in made.tensors:
        second = made.part(layer, "weight_scale_second").double()
        return q * (second * s).repeat_interleave(q.shape[1] // second.shape[1], 1)
    offset = made.part(layer, "weight_offset").double()
    times = q.shape[1] // s.shape[1]
    return (q - offset.repeat_interleave(times, 1)) * s.repeat_interleave(times, 1)


def by_token(x: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of activations, a scale for each row."""
    s = x.abs().amax(-1, keepdim=True) / largest
    return torch.clamp(torch.round(x / s), -largest - 1, largest), s


def static_w8a8(made: Checkpoint, layer: str, x: Tensor) -> Tensor:
    """(q_x q_w^T + quant_bias) * deq_scale; a deq_scale of int64 holds the bits of a float32."""
    deq = made.part(layer, "deq_scale")
    if deq.dtype == torch.int64:
        deq = deq.to(torch.int32).view(torch.float32)
    scale, offset = made.part(layer, "input_scale"), made.part(layer, "input_offset")
    q = torch.clamp(torch.round(x / scale + offset), -128, 127)
    bias = made.part(layer, "quant_bias")
    assert bias.dtype == torch.int32
    return (q.double() @ codes(made, layer).T + bias.double()) * deq.double()


def split_w4a8(made: Checkpoint, layer: str, x: Tensor, rank: int = 0, ranks: int = 1) -> Tensor:
    """What one of ``ranks`` gives: each int8 activation as 16 * high + low + 8, of int4 numbers, and scale_bias.

    A rank of a layer with sixteen sums has its share of inputs and of sums, and the outputs of all ranks are summed.
    """
    q, s = by_token(x, 127)
    q, w, bias = q.to(torch.int32), codes(made, layer), made.part(layer, "scale_bias").double()
    high, low = torch.div(q, 16, rounding_mode="floor"), (q & 15) - 8
    assert torch.equal(16 * high + low + 8, q)
    assert all(-8 <= int(half.min()) <= int(half.max()) <= 7 for half in (high, low))
    part = slice(None)
    if bias.shape[1] > 1:
        part = slice(rank * w.shape[1] // ranks, (rank + 1) * w.shape[1] // ranks)
        bias = bias[:, rank * 16 // ranks : (rank + 1) * 16 // ranks]
    scale = made.part(layer, "weight_scale").double().T
    a, b = ((half[:, part].double() @ w[:, part].T) * scale for half in (high, low))
    return s.double() * (16 * a + b + bias.sum(1))
