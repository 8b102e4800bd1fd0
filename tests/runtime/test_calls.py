"""Calls in transformers' style: the caches that a compiled model takes and fills, and how its outputs are read."""

import copy
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer, EncoderDecoderCache

import graphq
from graphq.errors import SpecError
from graphq.runtime.calls import ModelOutput
from graphq.runtime.model import CompiledModel
from tests import models
from tests.models import tiny

IDS = torch.arange(10).reshape(2, 5)
NAMES = [f"past_key_values.{i}.{part}" for i in (0, 1) for part in ("key", "value")]


@pytest.fixture(scope="module")
def llama() -> Any:
    return CompiledModel(models._captured("llama"))


@pytest.fixture(scope="module")
def out(llama: Any) -> ModelOutput:
    return llama(IDS)


@pytest.fixture
def fresh(out: ModelOutput) -> Any:
    return ModelOutput(dict(out))


# -- caches ------------------------------------------------------------------------------------------------------------


def greedy(model: Any, past: Any, steps: int = 6) -> Tensor:
    """The tokens of a loop that gives each new token to the cache of the last call."""
    cur, made = IDS[:, :3], IDS[:, :3]
    with torch.no_grad():
        for _ in range(steps):
            logits = model(input_ids=cur, past_key_values=past, use_cache=True).logits
            cur = logits[:, -1:].argmax(-1)
            made = torch.cat([made, cur], 1)
    return made


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("configured", [False, True])
def test_a_loop_over_one_cache(family: str, configured: bool) -> None:
    """A cache of gemma3's configuration has sliding layers, which the graph's full ones replace."""
    source, model = tiny(family), CompiledModel(models._captured(family))
    ours, theirs = (DynamicCache(config=source.config) if configured else DynamicCache() for _ in range(2))
    assert torch.equal(greedy(model, ours), greedy(source, theirs))
    assert ours.get_seq_length() == theirs.get_seq_length() == 8


def test_the_callers_cache_is_filled_where_it_stands(llama: Any) -> None:
    past, whole = DynamicCache(), llama(IDS)
    first = llama(IDS[:, :3], past_key_values=past)
    layers = list(past.layers)
    assert first.past_key_values is first["past_key_values"] is first[1] is past
    assert all(layers[i].keys is first[f"present.{i}.key"] for i in (0, 1))  # type: ignore[union-attr]
    second = llama(IDS[:, 3:], past_key_values=past, use_cache=False)  # which transformers fills, too
    assert second.past_key_values is None
    assert [a is b for a, b in zip(past.layers, layers, strict=True)] == [True, True]
    for i, layer in enumerate(cast(list[Any], past.layers)):
        for found, part in ((layer.keys, "key"), (layer.values, "value")):
            expected = whole[f"present.{i}.{part}"]
            assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_a_failed_call_leaves_the_cache_alone(llama: Any) -> None:
    past = llama(IDS).past_key_values
    with pytest.raises(SpecError, match="has shape"):
        llama(torch.ones(3, 5).long(), past_key_values=past)
    assert past.get_seq_length() == 5


def test_empty_caches_are_filled_in(llama: Any, out: Any) -> None:
    reset = copy.deepcopy(out.past_key_values)
    reset.reset()
    for past in (None, (), [], False, DynamicCache(), reset, [None, None]):
        assert torch.equal(llama(IDS, past_key_values=past).logits, out.logits)


def test_a_cache_in_which_a_layer_is_missing(llama: Any, out: Any) -> None:
    key = out["present.0.key"]
    half = DynamicCache()
    half.update(key, key, 0)
    lacks = "inputs: the cache lacks past_key_values.1.key, past_key_values.1.value; give all of it, or none"
    for past in ([(key, key)], half, [(key, key), None]):
        with pytest.raises(SpecError) as caught:
            llama(IDS, past_key_values=past)
        assert caught.value.problems == (lacks,)
    assert len(half.layers) == 1
    for name in NAMES:
        with pytest.raises(SpecError, match="the cache lacks ") as caught:
            llama(input_ids=IDS, **{name: key})
        assert all((other in str(caught.value)) == (other != name) for other in NAMES)


def test_calibration_with_a_part_of_a_cache(out: Any) -> None:
    batch = {"input_ids": IDS, NAMES[1]: out["present.0.value"]}
    with pytest.raises(SpecError, match=r"calibration: batch 0: the cache lacks past_key_values\.0\.key, "):
        graphq.compile(
            tiny("llama"), {"graphq": 1, "input": "int8/tensor", "weight": "int8/channel"}, calibration=[batch]
        )


def sliding() -> DynamicCache:
    cache = DynamicCache()
    cache.layers.extend(DynamicSlidingWindowLayer(4) for _ in range(2))
    for i in range(2):
        cache.update(torch.ones(2, 2, 3, 16), torch.ones(2, 2, 3, 16), i)
    return cache


@pytest.mark.parametrize(
    ("past", "kind"),
    [
        (StaticCache(tiny("llama").config, max_cache_len=9), "a StaticCache"),
        (DynamicCache(offloading=True), "an offloaded DynamicCache"),
        (sliding(), "a DynamicCache with a DynamicSlidingWindowLayer"),
    ],
)
def test_other_kinds_of_caches_are_refused(llama: Any, past: Any, kind: str) -> None:
    with pytest.raises(SpecError) as caught:
        llama(IDS, past_key_values=past)
    assert str(caught.value) == (
        f"inputs: past_key_values: {kind} cannot hold this graph's keys and values, which grow with the text;"
        " give a DynamicCache()"
    )


X = torch.ones(2, 2, 1, 16)


@pytest.mark.parametrize(
    ("past", "given"),
    [
        ("x", "a str"),
        (b"x", "a bytes"),
        (3, "a int"),
        (X, "a Tensor"),
        ({0: (X, X)}, "a dict"),
        (EncoderDecoderCache(DynamicCache(), DynamicCache()), "a EncoderDecoderCache"),
        (["x"], "layer 0 is a str"),
        ([(X, X), (X,)], "layer 1 is a tuple"),
        ([(X, X), (X, 3)], "layer 1 is a tuple"),
        ([X], "layer 0 is a Tensor"),
    ],
)
def test_what_is_no_cache(llama: Any, past: Any, given: str) -> None:
    with pytest.raises(TypeError) as caught:
        llama(IDS, past_key_values=past)
    assert str(caught.value) == (
        f"forward(): past_key_values: {given}; give a DynamicCache, or a pair of tensors for each layer"
    )


def test_a_cache_by_name_and_as_a_whole(llama: Any, out: Any) -> None:
    with pytest.raises(TypeError, match=r"got past_key_values\.1\.key twice"):
        llama(IDS, past_key_values=out.past_key_values, **{NAMES[2]: out["present.1.key"]})


def test_a_cache_is_read_in_threes_too(llama: Any, out: Any) -> None:
    past = tuple(out.past_key_values)
    assert len(past[0]) == 3
    assert torch.equal(
        llama(IDS[:, :1], past_key_values=past).logits,
        llama(IDS[:, :1], past_key_values=[pair[:2] for pair in past]).logits,
    )


def test_a_model_without_a_cache_takes_none() -> None:
    model = graphq.compile(tiny("llama", num_hidden_layers=1), {"graphq": 1, "weight": "int8/channel"}, cache=False)
    without = model(IDS, past_key_values=None, use_cache=False)
    assert list(without) == ["logits"]
    for asked in ({"past_key_values": DynamicCache()}, {"use_cache": True}):
        with pytest.raises(TypeError, match="captured without a cache; it takes neither past_key_values nor use_cache"):
            model(IDS, **asked)


# -- outputs -----------------------------------------------------------------------------------------------------------


def test_places_are_those_of_transformers(fresh: Any) -> None:
    assert fresh[1] is fresh[-1] is fresh["past_key_values"] is fresh.past_key_values
    assert fresh[:2] == fresh.to_tuple() == (fresh["logits"], fresh.past_key_values)
    assert isinstance(fresh[1], DynamicCache)
    with pytest.raises(IndexError):
        fresh[2]


def test_a_call_that_returns_a_tuple(llama: Any) -> None:
    past = DynamicCache()
    logits, cache = llama(IDS, return_dict=False, past_key_values=past)
    assert cache is past
    assert logits.shape == (2, 5, 128)
    logits, cache = llama(IDS, return_dict=0)
    assert cache.get_seq_length() == 5
    assert len(llama(IDS, return_dict=False, use_cache=False)) == 1


def test_a_dict_has_the_graphs_names(fresh: Any) -> None:
    names = ["logits", *(name.replace("past_key_values", "present") for name in NAMES)]
    assert list(fresh) == list(dict(fresh)) == list({**fresh}) == names
    assert len(fresh) == 5
    assert "past_key_values" in fresh
    assert "hidden_states" not in fresh
    assert fresh.get("past_key_values") is fresh.past_key_values
    assert fresh.get("present.1.value") is fresh["present.1.value"]
    assert fresh.get("hidden_states", 3) == 3


def test_without_the_cache(llama: Any) -> None:
    for no in (False, 0):
        out = llama(IDS, use_cache=no)
        assert "past_key_values" not in out
        assert out.get("past_key_values", 3) == 3
        assert out.past_key_values is None
        assert len(out.to_tuple()) == 1


def test_outputs_on_demand_are_none(fresh: Any) -> None:
    assert fresh.loss is fresh.hidden_states is fresh.attentions is None
    with pytest.raises(KeyError):
        fresh["loss"]


def test_what_is_set_is_read(fresh: Any) -> None:
    x = torch.ones(1)
    fresh.logits = x
    assert fresh.logits is fresh["logits"] is fresh[0] is x
    fresh["logits"] = x + 1
    assert fresh.logits is fresh["logits"] is fresh[0]
    fresh.loss = x
    assert fresh.loss is fresh["loss"] is x
    fresh.loss = None
    assert fresh.loss is None
    assert "loss" not in fresh
    fresh["loss"] = x
    assert fresh.loss is x


def test_a_cache_that_is_set(fresh: Any) -> None:
    old, mine = fresh.past_key_values, DynamicCache()
    fresh["present.0.key"] = torch.zeros(2, 2, 5, 16)
    assert fresh.past_key_values is not old
    assert not fresh.past_key_values.layers[0].keys.any()
    fresh["past_key_values"] = mine
    assert fresh.past_key_values is fresh["past_key_values"] is fresh[1] is mine
    assert list(fresh) == ["logits"]  # no tensors of another cache
    fresh.past_key_values = None
    assert fresh.past_key_values is None
    assert len(fresh.to_tuple()) == 1
    assert "past_key_values" not in fresh


def test_copies_of_outputs(fresh: Any) -> None:
    for made in (copy.copy(fresh), copy.deepcopy(fresh)):
        assert type(made) is ModelOutput
        assert list(made) == list(fresh)
        assert torch.equal(made.logits, fresh.logits)
        assert torch.equal(made.past_key_values.layers[1].keys, fresh["present.1.key"])
