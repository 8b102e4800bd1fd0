"""What capture records: which block a layer is in, which graphs are language models."""

import copy

import pytest
import torch
from torch import fx, nn

from graphq.capture.source import KEY, TOTAL, Source, TensorInput, source_of
from graphq.errors import PassError

IDS = TensorInput("input_ids", torch.int64, ("batch", "sequence"))
SOURCE = Source((IDS,), ("logits",), "dict", torch.bfloat16, blocks=("model.layers", "h"))


def test_block_of() -> None:
    blocks = {
        "model.layers.0.mlp.up_proj": 0,
        "model.layers.12.mlp": 12,
        "model.layers.3": 3,
        "h.1.attn": 1,
        "model.layers": None,
        "model.layers.first.mlp": None,
        "model.layers2.0.mlp": None,
        "other.model.layers.0.mlp": None,
        "lm_head": None,
    }
    assert {fqn: SOURCE.block_of(fqn) for fqn in blocks} == blocks


def test_is_causal_lm() -> None:
    def source(*inputs: TensorInput, outputs: tuple[str, ...] = ("logits",)) -> Source:
        return Source(inputs, outputs, "dict", torch.float32)

    assert source(IDS).is_causal_lm
    assert not source(IDS, outputs=("last_hidden_state", "logits")).is_causal_lm
    assert not source(IDS, outputs=()).is_causal_lm
    assert not source(TensorInput("pixels", torch.float32, ("batch", 3))).is_causal_lm
    assert not source().is_causal_lm


def test_is_cache() -> None:
    assert TensorInput("past_key_values.0.key", torch.float32, ("batch", 2, "past_sequence", 8)).is_cache
    assert not IDS.is_cache
    assert not TensorInput("attention_mask", torch.int64, ("batch", TOTAL)).is_cache


def test_source_of() -> None:
    gm = fx.symbolic_trace(nn.ReLU())
    with pytest.raises(PassError, match=r"not made by graphq.capture"):
        source_of(gm)
    gm.meta[KEY] = SOURCE
    assert source_of(gm) is SOURCE
    assert source_of(copy.deepcopy(gm)) == SOURCE
