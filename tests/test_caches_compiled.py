"""A cache and attention's operands through compile and explain: what is planned, noted and refused."""

from typing import Any

import pytest
import torch

import graphq
from graphq.capture.source import source_of
from graphq.errors import SpecError
from graphq.explanation import explain
from tests.models import MLP, tiny

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(2))
W8 = {"graphq": 1, "weight": "int8/channel"}


def one() -> Any:
    return tiny("llama", num_hidden_layers=1)


def refusal(model: Any, spec: dict[str, Any], **options: Any) -> str:
    with pytest.raises(SpecError) as caught:
        graphq.compile(model, spec, **options)
    return str(caught.value)


def test_refused() -> None:
    assert refusal(one(), W8 | {"cache": "int8/tensor"}) == (
        "calibration: none given, but the scales of the cache (int8/tensor) are static"
    )
    assert refusal(one(), W8 | {"attention": {"q": "int8/head"}}) == (
        "calibration: none given, but the scales of attention (q int8/head) are static"
    )
    assert refusal(one(), W8 | {"cache": "int8/token/dynamic"}, cache=False) == (
        "cache: int8/token/dynamic: this model has no key/value cache; leave it out of the spec"
    )
    assert refusal(MLP(), W8 | {"attention": {"p": "int8/tensor"}}, inputs=torch.ones(2, 8)) == (
        "attention: p int8/tensor: no attention of this model is one op; leave it out of the spec"
    )
    for part in ({"cache": "int8/tensor"}, {"attention": {"q": "int8/tensor"}}):
        placed = W8 | {"input": "uint8/tensor", "profile": "ort-cpu"} | part
        assert "the profile ort-cpu quantizes tensors of the whole graph, and not beside it; leave one" in refusal(
            one(), placed, calibration=[IDS]
        )


@pytest.mark.parametrize(
    ("quant", "problem"),
    [
        ("int16/tensor", "a cache holds integers of up to 8 bits, or floats such as float8_e4m3fn"),
        ("mxfp8_e4m3/dynamic", "a cache holds integers of up to 8 bits, or floats such as float8_e4m3fn"),
        ("int8/channel/dynamic", "a channel has one scale for all tokens, from calibration; leave out dynamic"),
        ("int8/g32", "one scale per group exists only at run time; write int8/g32/dynamic"),
        ("int8/16x16", "blocks are those of weights; write tensor, head, channel, token or g<size>"),
        (
            "int8/head/mse0.8:100:2.4:80",
            "mse0.8:100:2.4:80 gives one scale per tensor; heads and channels take minmax or ema",
        ),
        ("int8/tensor/ssz", "ssz is for layers"),
        ("int8/tensor/source", "source is the arithmetic of weights; leave it out"),
    ],
)
def test_what_no_cache_can_hold(quant: str, problem: str) -> None:
    assert refusal(MLP(), W8 | {"cache": quant}, inputs=torch.ones(2, 8)) == f"cache: {quant}: {problem}"


def test_explained_and_compiled_alike() -> None:
    spec = W8 | {"cache": "int8/channel", "attention": {"q": "int8/head", "k": "int8/head", "p": "uint8/tensor"}}
    said, made = explain(one(), spec), graphq.compile(one(), spec, calibration=[IDS])
    model: Any = made
    assert said.caches == made.report.caches
    line = "cache: int8/channel: 2 of keys and values (model.layers.0.self_attn.key to model.layers.0.self_attn.value)"
    assert f"{line}, 64 bytes a token for 256" in str(said)
    note = "attention: q int8/head, k int8/head, p uint8/tensor: of model.layers.0.self_attn"
    assert note in said.notes
    assert note in made.report.notes
    assert made.report.to_json()["caches"] == [plan.to_json() for plan in made.report.caches]
    assert {name for name in made.graph.state_dict() if "self_attn" in name and "proj" not in name} == {
        f"model.layers.0.self_attn.{name}_scale" for name in ("key", "value", "query", "probability")
    } | {"model.layers.0.self_attn.probability_zero_point"}
    with torch.no_grad():
        past = model(IDS[:, :4]).past_key_values
        step, whole = model(IDS[:, 4:], past_key_values=past).logits, model(IDS).logits[:, 4:]
    # Attention over other numbers of queries sums in another order.
    assert (step - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_a_spec_of_nothing_but_a_cache() -> None:
    spec = {"graphq": 1, "rules": [{"match": "blocks", "float": True}], "cache": "int8/token/dynamic"}
    made = graphq.compile(one(), spec)
    assert not any("NOTHING IS QUANTIZED" in note for note in made.report.notes)
    assert {i.dtype for i in source_of(made.graph).inputs if i.is_cache and i.name.endswith("key")} == {torch.int8}


def test_with_algorithms_block_by_block() -> None:
    """Blocks that are calibrated one after the other see keys and values as they will be read back."""
    spec = {"graphq": 1, "weight": "int4/g32", "cache": "int8/head", "algorithms": ["gptq"]}
    made: Any = graphq.compile(tiny("llama"), spec, calibration=[IDS, IDS.flip(0)])
    caches = [i for i in source_of(made.graph).inputs if i.is_cache]
    assert [i.dtype for i in caches] == [torch.int8] * 4
    assert [tuple(made.graph.state_dict()[f"model.layers.{i}.self_attn.key_scale"].shape) for i in (0, 1)] == [
        (1, 2, 1, 1)
    ] * 2
    past: dict[str, Any] = {}
    step: Any = None
    with torch.no_grad():
        whole = made(IDS).logits
        for part in IDS.split(2, 1):
            step = made(part, **past)
            past = {"past_key_values": step.past_key_values}
    assert (step.logits - whole[:, -1:]).abs().max() <= 1e-5 * whole.abs().max()
