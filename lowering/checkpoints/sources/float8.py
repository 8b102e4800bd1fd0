"""Checkpoints of transformers' fp8: DeepSeek-V3's and MiniMax-M2's, float8 codes with a scale for each block.

Source: transformers 5.23, ``integrations/finegrained_fp8.py``; DeepSeek-V3's ``inference/kernel.py``: blocks are cut
off at the edges of a weight. ``weight_scale_inv`` is multiplied by, whatever it is called.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from graphq import numerics
from graphq.artifacts.headers import StoredTensor
from graphq.errors import TargetError
from graphq.ir.stored_codes import StoredWeight
from graphq.lowering.checkpoints.sources.checkpoint import (
    FLOATS,
    CodedMatrix,
    QuantizedCheckpoint,
    by_layer,
    dtype_of,
    expect,
    floats_of,
    in_files,
)
from graphq.numerics import Scales
from graphq.spec.formats import Float
from graphq.spec.quant import PerBlock, PerGroup, PerTensor, PerToken, Quant

_SCALES: Final = ("weight_scale_inv", "weight_scale")
_FORMAT: Final = Float("float8_e4m3fn")


def read(directory: Path, config: Mapping[str, Any], held: Mapping[str, StoredTensor]) -> QuantizedCheckpoint:
    """The checkpoint. Raises ``TargetError`` naming the file, the key or the tensor that is wrong."""
    settings: dict[str, Any] = config["quantization_config"]
    file = directory / "config.json"
    if settings.get("fmt", "e4m3") != "e4m3":
        raise TargetError(f"{file}: quantization_config: fmt: {settings['fmt']!r:.40}: is no format that is read")
    size: object = settings.get("weight_block_size")
    match size:
        case None:
            quant = Quant(_FORMAT, PerTensor())
        case [int() as rows, int() as columns] if rows > 0 and columns > 0:
            quant = Quant(_FORMAT, PerBlock(rows, columns))
        case _:
            raise TargetError(f"{file}: quantization_config: weight_block_size: {size!r:.40} is not [rows, columns]")
    given = _input(file, settings, quant)
    dtype = dtype_of(config, held)
    weights: dict[str, StoredWeight] = {}
    tensors: dict[str, CodedMatrix] = {}
    parts: set[str] = set()
    for layer, named in by_layer(held).items():
        scale = next((suffix for suffix in _SCALES if suffix in named), None)
        if scale is None:
            continue
        own = {suffix: part for suffix, part in named.items() if suffix in ("weight", scale, "input_scale")}
        wanted = ("weight", *(["input_scale"] * (not given.dynamic)))
        if missing := [part for part in wanted if part not in own]:
            raise TargetError(f"{directory}: {layer}: fp8: has no {missing[0]}")
        codes = own["weight"]
        if len(codes.shape) != 2:
            raise TargetError(f"{directory / codes.file}: {layer}.weight: {list(codes.shape)}: is no matrix")
        block = numerics.weight_block(quant.granularity, 2, 0, 1)
        shapes = [tuple(numerics.scale_shape(codes.shape, block)), *([(), (1,)] if size is None else [])]
        expect(directory, layer, own, "weight", ("F8_E4M3",), [codes.shape])
        expect(directory, layer, own, scale, (*FLOATS, "F8_E8M0"), shapes)
        expect(directory, layer, own, "input_scale", FLOATS, [(), (1,)])
        parts |= {f"{layer}.{suffix}" for suffix in own}
        nbytes = sum(part.nbytes for part in own.values())
        read_parts = in_files(directory, layer, own)
        weights[layer] = StoredWeight(layer, "fp8", dtype, quant, given, read_parts, _decode, _input_scales, nbytes)
        tensors[f"{layer}.weight"] = CodedMatrix(weights[layer], (codes.shape[0], codes.shape[1]))
    blocks = "" if size is None else f", blocks of {size[0]}x{size[1]}"
    others = floats_of(directory, held, parts)
    return QuantizedCheckpoint(
        directory, f"fp8{blocks}", config, dtype, weights, others | tensors, held, frozenset(parts)
    )


def _input(file: Path, settings: Mapping[str, Any], weight: Quant) -> Quant:
    match settings.get("activation_scheme", "dynamic"):
        case "static":
            return Quant(_FORMAT, PerTensor())
        case "dynamic":
            blocks = weight.granularity
            return Quant(_FORMAT, PerGroup(blocks.columns) if isinstance(blocks, PerBlock) else PerToken(), True)
        case other:
            raise TargetError(f"{file}: quantization_config: activation_scheme: {other!r:.40} is not dynamic or static")


def _decode(parts: Mapping[str, Tensor], quant: Quant) -> tuple[Tensor, Scales]:
    scale = next(parts[suffix] for suffix in _SCALES if suffix in parts).to(torch.float32)
    return parts["weight"].view(torch.uint8), Scales(scale.reshape(1, 1) if scale.dim() < 2 else scale)


def _input_scales(parts: Mapping[str, Tensor]) -> Scales | None:
    return Scales(parts["input_scale"].float().reshape(())) if "input_scale" in parts else None
