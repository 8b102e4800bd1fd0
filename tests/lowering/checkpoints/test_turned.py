"""Weights that a source stores with inputs first: checkpoints hold them as the source does, or not at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import graphq
from graphq.errors import TargetError
from tests.models import tiny

ATTENTION: dict[str, Any] = {"graphq": 1, "rules": [{"match": "self_attn", "weight": "int8/half/channel"}]}
EVERYTHING: dict[str, Any] = {"graphq": 1, "weight": "int8/half/channel"}


def test_experts_of_gpt_oss_are_quantized_and_stay_as_they_were_in_a_checkpoint(tmp_path: Path) -> None:
    """All experts are layers. A checkpoint has no place for their codes, and for floats the source's own layout."""
    model = tiny("gpt_oss")
    ids = torch.randint(0, 128, (2, 5), generator=torch.Generator().manual_seed(0))
    compiled: Any = graphq.compile(model, EVERYTHING)
    assert sum(row.weight is not None for row in compiled.report.layers) == 24
    with torch.no_grad():
        wanted = model(ids).logits
    assert (compiled(ids)["logits"] - wanted).abs().max() < 0.05 * wanted.abs().max()
    with pytest.raises(TargetError) as caught:
        graphq.compile(model, EVERYTHING, target="compressed-tensors")
    assert (
        "model.layers.0.mlp.experts.0.gate_up_proj: a linear whose weight is stored as [inputs, outputs] has no place"
        " among quantized linears; keep it float (weight)"
    ) in str(caught.value).replace("compressed-tensors: ", "")
    kept = graphq.compile(model, ATTENTION, target="compressed-tensors")
    kept.emit("compressed-tensors", tmp_path / "checkpoint")
    written, own = load_file(tmp_path / "checkpoint" / "model.safetensors"), model.state_dict()
    experts = [name for name in own if "experts" in name]
    assert len(experts) == 8
    assert all(torch.equal(written[name], own[name]) for name in experts)
