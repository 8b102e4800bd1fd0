"""msModelSlim's arithmetic is that of the model's own dtype: by compile, whatever that computes in, and in place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import graphq
from graphq import numerics
from graphq.frontends import load_spec, print_spec
from graphq.spec.formats import Int
from tests.models import tiny

CONFIG = """\
apiversion: modelslim_v1
spec:
  process:
    - type: linear_quant
      qconfig:
        act:    {scope: per_token,   dtype: int8, symmetric: true, method: minmax}
        weight: {scope: per_channel, dtype: int8, symmetric: true, method: minmax}
      include: ["*self_attn*"]
    - type: linear_quant
      qconfig:
        act:    {scope: per_token,   dtype: int8, symmetric: true, method: minmax}
        weight: {scope: per_channel, dtype: int4, symmetric: true, method: minmax}
      include: ["*mlp*"]
"""


def theirs(w: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Codes and scales by torch's ops in the dtype of ``w``."""
    scale = w.abs().amax(1, keepdim=True) / float(largest)
    return (w / scale).round().clamp(-largest - 1, largest).to(torch.int8), scale.float()


def test_the_convention_is_part_of_the_spec() -> None:
    spec = load_spec(CONFIG)
    text = print_spec(spec)
    assert "int8/channel/source" in text
    assert "int4/channel/source" in text
    again = load_spec(text)
    assert print_spec(again) == text
    assert [rule.decision for rule in again.rules] == [rule.decision for rule in spec.rules]


@pytest.mark.parametrize(
    ("dtype", "captured_in"),
    [(torch.bfloat16, None), (torch.bfloat16, torch.float32), (torch.float16, None), (torch.float32, None)],
)
def test_compiled_from_a_directory(dtype: torch.dtype, captured_in: torch.dtype | None, tmp_path: Path) -> None:
    tiny("llama", num_hidden_layers=1).to(dtype).save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    made = graphq.compile(tmp_path, CONFIG, dtype=captured_in)
    state = made.graph.state_dict()
    differ = 0
    for name, codes in state.items():
        layer, _, role = name.rpartition(".")
        if role == "weight" and codes.dtype == torch.int8:
            bits = 8 if "self_attn" in name else 4
            wanted, scale = theirs(held[name], 2 ** (bits - 1) - 1)
            assert torch.equal(codes, wanted), name
            assert torch.equal(state[f"{layer}.weight_scale"], scale), name
            plain = numerics.choose_scale(held[name], Int(bits), [1, -1])
            differ += int((codes != numerics.quantize(held[name], plain, Int(bits), [1, -1])).sum())
    assert bool(differ) == (dtype != torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_place(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model: Any = nn.Sequential(nn.Linear(64, 32)).to(dtype)
    w = model[0].weight.detach().clone()
    spec = {"graphq": 1, "rules": [{"match": "kind:linear", "weight": "int8/channel/source"}]}
    graphq.quantize(model, load_spec(spec))
    model(torch.zeros(1, 64, dtype=dtype))
    wanted, scale = theirs(w, 127)
    layer: Any = model[0]
    assert torch.equal(layer.quantized_weight, wanted)
    assert torch.equal(layer.scale_w.float(), scale)
