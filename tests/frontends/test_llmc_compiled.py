"""Every LLMC example, explained and compiled as it is written, on small Llamas with as many blocks as it names."""

import copy
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import fx

import graphq
from graphq import compiler, explanation
from graphq.checks import refusals
from graphq.errors import SpecError
from graphq.frontends import load_spec, write_spec
from tests.models import random_inputs, tiny

CONFIGS = Path(__file__).parents[2] / "examples" / "configs" / "llmc"
DOCUMENTED = ("mix_bits_1_down_proj", "mix_bits_2_blocks", "mix_bits_3_w4a4_w8a8", "mix_bits_4_everything")
SIX = ("stdlib_llama_blocks", "stdlib_llama_everything", "stdlib_llama_w4_mixed")
BLOCKS = {str(name): 32 for name in DOCUMENTED} | {str(name): 6 for name in SIX}
# Layers by plan; what stays float besides the embedding and the head.
PLANS = {
    "mix_bits_1_down_proj": {"int4/asym/g128 x float": 192, "int8/asym/g128 x float": 32},
    "mix_bits_2_blocks": {"int4/asym/g128 x float": 184, "float": 32, "int8/asym/g128 x float": 8},
    "mix_bits_3_w4a4_w8a8": {
        "int4/asym/channel x int4/asym/token/dynamic": 192,
        "int8/asym/channel x int8/asym/token/dynamic": 32,
    },
    "mix_bits_4_everything": {
        "int4/asym/channel x int4/asym/token/dynamic": 211,
        "int8/asym/channel x int8/asym/token/dynamic": 4,
        "float": 6,
        "int6/asym/channel x int6/asym/token/dynamic": 1,
        "int4/asym/channel x float": 2,
    },
    "awq_w4a16_clip": {"int4/asym/g128 x float": 12, "float": 2},
    "fp4_w4a16": {"float4_e2m1/g32 x float": 12, "float6_e3m2/g32 x float": 2},
    "fp8_blocks": {"float8_e4m3fn/128x128 x float8_e4m3fn/g128/dynamic": 14},
    "fp8_w8a8": {"float8_e4m3fn/channel x float8_e4m3fn/token/dynamic": 13, "float": 1},
    "gptq_w4a16": {"int4/g128 x float": 14},
    "hqq_w4a16": {"int4/asym/g64/hqq x float": 14},
    "kvcache_int4": {"int8/channel x float": 14},
    "osplus_w8a8": {"int8/channel x int8/token/dynamic": 14},
    "quarot_w4a4": {"int4/asym/channel/mse0.8:100:2.4:80 x int4/asym/token/dynamic": 14},
    "smooth_quant_w8a8": {"int8/channel x int8/token/dynamic": 14},
    "stdlib_llama_blocks": {"int4/asym/g128 x float": 34, "int8/asym/g128 x float": 2, "float": 6},
    "stdlib_llama_everything": {
        "int4/asym/channel x int4/asym/token/dynamic": 34,
        "int8/asym/channel x int8/asym/token/dynamic": 1,
        "float": 4,
        "int6/asym/channel x int6/asym/token/dynamic": 1,
        "int4/asym/channel x float": 2,
    },
    "stdlib_llama_w4_mixed": {"int4/asym/g128 x float": 34, "int8/asym/g128 x float": 2, "float": 6},
    "w4a4": {"int4/channel x int4/token/dynamic": 12, "float": 2},
    "w8a8_per_token": {"int8/channel x int8/token/dynamic": 14},
    "w8a8_static": {"int8/channel x int8/tensor": 14},
    "w8a8_static_hist": {
        "float": 7,
        "int8/channel x int8/tensor/histogram": 6,
        "int8/channel x int8/asym/tensor/ema": 1,
    },
}
REFUSED = {
    "osplus_w8a8": "quant.method (line 4): graphq has no algorithm osplus; near is smooth-quant",
}


@cache
def _captured(blocks: int) -> fx.GraphModule:
    return compiler.capture(tiny("llama", num_hidden_layers=blocks))


def on_blocks(blocks: int, monkeypatch: pytest.MonkeyPatch) -> fx.GraphModule:
    """The Llama that ``compile`` and ``explain`` see from now on, whatever model they are given."""
    gm = _captured(blocks)

    def capture(*_: object, **__: object) -> fx.GraphModule:
        return copy.deepcopy(gm)

    monkeypatch.setattr(compiler, "_captured", capture)
    monkeypatch.setattr(explanation, "capture", capture)
    return gm


def test_every_example_is_here():
    others = {"deepseek_w4a8_ascend"}  # of another model, which examples/deploy_ascend.py makes
    assert sorted(PLANS) == sorted({path.stem for path in CONFIGS.glob("*.yaml")} - others)


def check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gm = on_blocks(BLOCKS.get(name, 2), monkeypatch)
    path = CONFIGS / f"{name}.yaml"
    explained = graphq.explain("a model", path)
    plans = {r.layer.fqn: r.plan if r.weight else "float" for r in explained.layers if r.layer.block is not None}
    assert Counter(plans.values()) == PLANS[name]
    assert set(load_spec(path).notes) <= set(explained.notes)
    batches = [random_inputs(gm, 1, 16, seed=seed) for seed in range(2)]
    if name in REFUSED:
        (refused,) = refusals(load_spec(path))
        assert refused.startswith(REFUSED[name])
        assert f"compile refuses: {refused}" in explained.notes
        with pytest.raises(SpecError):
            graphq.compile("a model", path, calibration=batches)
        return
    compiled = graphq.compile("a model", path, calibration=batches)
    assert {r.layer.fqn: r.plan for r in compiled.report.layers} == {r.layer.fqn: r.plan for r in explained.layers}
    (logits, *_), (expected, *_) = (graph(*random_inputs(graph, 1, 5, seed=9)) for graph in (compiled.graph, gm))
    assert torch.isfinite(logits).all()
    assert not torch.equal(logits, expected)
    again = graphq.compile("a model", write_spec(load_spec(path), "llmc"), calibration=batches)
    state, same = compiled.graph.state_dict(), again.graph.state_dict()
    assert state.keys() == same.keys()
    assert all(
        torch.equal(same[fqn].flatten().view(torch.uint8), t.flatten().view(torch.uint8)) for fqn, t in state.items()
    )


QUICK = ("fp8_w8a8", "hqq_w4a16", "kvcache_int4", "osplus_w8a8")


@pytest.mark.parametrize("name", QUICK)
def test_examples_without_data(name, monkeypatch):
    check(name, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PLANS if name not in QUICK])
def test_examples(name, monkeypatch):
    """The four of the documentation with AWQ, too, as they ask for it."""
    check(name, monkeypatch)
