"""A static cache gives what a dynamic one gives, in memory that is there from the start."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import graphq
from graphq.errors import SpecError
from graphq.runtime.key_value_cache import StaticCache
from graphq.runtime.model import CompiledModel
from tests import models
from tests.models import DECODERS, MLP, capture, tiny

FAMILIES = [f if f in ("llama", "gemma3") else pytest.param(f, marks=pytest.mark.slow) for f in DECODERS]
HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


def tokens(batch: int, sequence: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, (batch, sequence), generator=torch.Generator().manual_seed(seed))


def model_of(family: str = "llama") -> CompiledModel:
    return CompiledModel(models._captured(family)).eval()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_the_same_tokens(family: str, how: str) -> None:
    """With rows of other lengths, beyond gemma3's window of 4."""
    ids = tokens(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = ids[0, :2] = 0
    found: list[Tensor] = []
    for cache in ("dynamic", "static"):
        torch.manual_seed(0)
        options = {"max_new_tokens": 9, "min_new_tokens": 9, "pad_token_id": 0, **HOW[how]}
        found.append(model_of(family).generate(ids, attention_mask=mask, cache=cache, **options))
    assert torch.equal(found[0], found[1])
    assert found[0].shape[1] == 14


@pytest.mark.parametrize("options", [{"max_length": 9}, {"max_new_tokens": 4}, {}])
def test_has_room_for_all_that_may_come(options: dict[str, Any]) -> None:
    expected = model_of().generate(tokens(1, 5), pad_token_id=0, **options)
    assert torch.equal(model_of().generate(tokens(1, 5), pad_token_id=0, cache="static", **options), expected)
    assert torch.equal(model_of().generate(input_ids=tokens(1, 5), pad_token_id=0, cache="static", **options), expected)


def test_steps_write_where_the_tokens_stay() -> None:
    model, ids = model_of(), tokens(2, 7)
    with torch.no_grad():
        dynamic, static = model(ids[:, :3]), model(ids[:, :3], cache="static", max_length=7)
        cache = static.past_key_values
        assert isinstance(cache, StaticCache)
        places = [memory.data_ptr() for memory in cache._memory.values()]
        assert len(set(places)) == 4
        for i in range(3, 7):
            dynamic = model(ids[:, i : i + 1], past_key_values=dynamic.past_key_values)
            static = model(ids[:, i : i + 1], past_key_values=cache)
            assert static.past_key_values is cache
            assert dynamic.keys() == static.keys()
            assert all(torch.equal(dynamic[name], static[name]) for name in dynamic)
            assert [static[f"present.{n}.{p}"].data_ptr() for n in (0, 1) for p in ("key", "value")] == places
        assert cache.get_seq_length() == 7
        held = [memory.clone() for memory in cache._memory.values()]
        with pytest.raises(SpecError, match=r"^cache: 8 tokens; it was made for max_length=7$"):
            model(ids[:, :1], past_key_values=cache)
    assert all(torch.equal(a, b) for a, b in zip(held, cache._memory.values(), strict=True))
    assert cache.get_seq_length() == 7


def test_the_first_call_may_be_too_long() -> None:
    with torch.no_grad(), pytest.raises(SpecError, match="cache: 3 tokens; it was made for max_length=2"):
        model_of()(tokens(1, 3), cache="static", max_length=2)


def test_in_and_out_of_inference_mode() -> None:
    model, ids = model_of(), tokens(1, 6)
    with torch.inference_mode():
        cache = model(ids[:, :4], cache="static", max_length=6).past_key_values
    with torch.no_grad():
        model(ids[:, 4:5], past_key_values=cache)
        expected = model(ids).logits[:, -1]
    with torch.inference_mode():
        found = model(ids[:, 5:], past_key_values=cache).logits[:, -1]
    # Attention over one query and over six sums in another order.
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_is_not_its_memory_is_copied_into_it() -> None:
    """Other rows, as a search over beams keeps them; fewer tokens; another batch."""
    model, ids = model_of(), tokens(2, 6)
    for change in (
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.reorder_cache(torch.tensor([1])),
        lambda cache: cache.crop(-2),
    ):
        found: list[Tensor] = []
        for options in ({}, {"cache": "static", "max_length": 6}):
            with torch.no_grad():
                cache = model(ids[:, :4], **options).past_key_values
                change(cache)
                rows = cache.layers[0].keys.shape[0]
                for i in (4, 5):
                    logits = model(ids[:rows, i : i + 1], past_key_values=cache).logits
            found.append(logits)
        assert torch.equal(found[0], found[1])


def test_parts_of_its_memory_may_be_what_is_copied() -> None:
    cache = StaticCache(5)
    whole = cache.append(0, torch.empty(1, 2, 0, 3), torch.arange(24.0).view(1, 2, 4, 3), -2)
    expected = torch.cat([whole[:, :, 1:], torch.zeros(1, 2, 1, 3)], 2)
    assert torch.equal(cache.append(0, whole[:, :, 1:], torch.zeros(1, 2, 1, 3), -2), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cache": "static"}, TypeError, "needs max_length"),
        ({"cache": "static", "max_length": 0}, TypeError, "needs max_length"),
        ({"cache": "paged", "max_length": 9}, TypeError, "cache is 'paged'"),
        ({"cache": "static", "max_length": 9, "past_key_values": DynamicCache()}, TypeError, "got a cache twice"),
    ],
)
def test_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model_of()(tokens(1, 3), **options)
    with pytest.raises(SpecError, match="generate: cache is 'paged'"):
        model_of().generate(tokens(1, 3), cache="paged")  # pyright: ignore[reportArgumentType]


def test_models_without_a_cache_have_none() -> None:
    compiled = graphq.compile(tiny("llama", num_hidden_layers=1), {"graphq": 1, "weight": "int8/channel"}, cache=False)
    with pytest.raises(TypeError, match="captured without a cache"):
        compiled(tokens(1, 3), cache="static", max_length=9)
    with pytest.raises(TypeError, match="cache"):
        CompiledModel(capture(MLP(), torch.ones(3, 8)))(torch.ones(3, 8), cache="static", max_length=9)


def test_a_graph_that_does_more_with_its_cache_is_refused() -> None:
    gm = models.captured("llama")
    past = next(n for n in gm.graph.nodes if n.name == "past_key_values_0_key")
    cat = next(n for n in past.users if "cat" in str(n.target))
    with gm.graph.inserting_before(cat):
        cat.replace_input_with(past, gm.graph.call_function(torch.ops.aten.mul.Tensor, (past, 1.0)))
    gm.recompile()
    with pytest.raises(SpecError, match="does more with its cache than to append"):
        CompiledModel(gm)(tokens(1, 3), cache="static", max_length=9)


def test_pairs_in_a_list_are_no_cache_to_append_to() -> None:
    model, ids = model_of(), tokens(1, 4)
    with torch.no_grad():
        first = model(ids[:, :3])
        pairs = [(layer.keys, layer.values) for layer in first.past_key_values.layers]
        found = model(ids[:, 3:], past_key_values=pairs).logits
        assert torch.equal(found, model(ids[:, 3:], past_key_values=first.past_key_values).logits)


class Holder(nn.Module):
    """A module that takes an input called ``cache``, which is no key/value cache."""

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        return x + cache


def test_an_input_of_that_name_is_an_input() -> None:
    x = torch.ones(3, 8)
    assert torch.equal(CompiledModel(capture(Holder(), x, x))(x=x, cache=x), x + x)
