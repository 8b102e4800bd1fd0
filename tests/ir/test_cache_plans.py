"""What becomes of each cache of a model, in words and bytes, and what is told of latents and windows."""

from dataclasses import replace

import pytest
from torch import fx

from graphq.capture.source import KEY, source_of
from graphq.ir.cache_plans import lines_of, notes_of, plan_caches, problems_of
from graphq.ir.caches import Cache, caches
from graphq.spec.quant import parse_quant
from tests.models import captured


@pytest.mark.parametrize(
    ("family", "quant", "nbytes"),
    [
        ("llama", "int8/tensor", [32, 32, 32, 32]),
        ("llama", "int8/channel", [32, 32, 32, 32]),
        ("llama", "int8/token/dynamic", [36, 36, 36, 36]),
        ("llama", "int8/asym/token/dynamic", [38, 38, 38, 38]),
        ("llama", "int8/asym/tensor/dynamic", [35, 35, 35, 35]),
        ("llama", "int4/g8/dynamic", [40, 40, 40, 40]),
        ("deepseek", "int8/token/dynamic", [18, 10, 18, 10]),  # latents, and the rotary part of keys
    ],
)
def test_bytes_of_a_token(family: str, quant: str, nbytes: list[int]) -> None:
    found = plan_caches(captured(family), parse_quant(quant))
    assert [plan.nbytes for plan in found] == nbytes
    roles = ["state", "state"] if family == "deepseek" else ["key", "value"]
    assert [plan.name for plan in found] == [f"model.layers.{i}.self_attn.{role}" for i in (0, 1) for role in roles]
    assert found[0].float_nbytes == 4 * (16 if family == "deepseek" else 32)


def test_nothing_is_planned_where_nothing_is_asked_for() -> None:
    assert plan_caches(captured("llama"), None) == ()
    assert problems_of((), None) == []


def test_lines() -> None:
    quant = parse_quant("int8/token/dynamic")
    gm = with_a_cache_that_is_scaled()
    plans = plan_caches(gm, quant)
    span = "model.layers.0.self_attn.value to model.layers.1.self_attn.value"
    assert lines_of(plans) == [
        f"cache: int8/token/dynamic: 3 of keys and values ({span}), 108 bytes a token for 384",
        "cache: past_key_values.0.key stays float: the model does more with it than to append to it",
    ]
    assert problems_of(plans, quant) == []
    assert problems_of(plans[:1], quant) == [
        "cache: int8/token/dynamic: past_key_values.0.key: the model does more with it than to append to it"
    ]
    assert plans[0].to_json() == {
        "cache": "past_key_values.0.key",
        "quant": None,
        "reason": "the model does more with it than to append to it",
        "bytes": 128,
        "float_bytes": 128,
    }
    assert plans[1].to_json()["quant"] == "int8/token/dynamic"


def with_a_cache_that_is_scaled() -> fx.GraphModule:
    import torch

    gm = captured("llama")
    past = next(n for n in gm.graph.nodes if n.name == "past_key_values_0_key")
    cat = next(n for n in past.users if "cat" in str(n.target))
    with gm.graph.inserting_before(cat):
        scaled = gm.graph.call_function(torch.ops.aten.mul.Tensor, (past, 1.0))
        scaled.meta = dict(past.meta)
        cat.replace_input_with(past, scaled)
    return gm


def test_a_model_without_a_cache() -> None:
    gm = captured("bert")
    quant = parse_quant("int8/tensor")
    assert plan_caches(gm, quant) == ()
    assert problems_of((), quant) == ["cache: int8/tensor: this model has no key/value cache; leave it out of the spec"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral", "gpt_oss", "bloom"])
def test_keys_and_values_of_every_family(family: str) -> None:
    """Also where attention is written out (gpt_oss, bloom): its softmax tells them apart."""
    found = [cache for cache in caches(captured(family)) if isinstance(cache, Cache)]
    assert [cache.role for cache in found] == ["key", "value"] * 2
    assert len({cache.path for cache in found}) == 2


def test_notes() -> None:
    quant = parse_quant("int8/token/dynamic")
    deepseek, gemma3, llama = map(captured, ("deepseek", "gemma3", "llama"))
    (latent,) = notes_of(source_of(deepseek), plan_caches(deepseek, quant))
    assert latent.startswith(
        "cache: what is cached, and quantized, are no keys and values that attention reads as they are"
    )
    (window,) = notes_of(source_of(gemma3), plan_caches(gemma3, quant))
    assert window.startswith("cache: layers that slide a window cache all positions here")
    assert notes_of(source_of(llama), plan_caches(llama, quant)) == []
    llama.meta[KEY] = replace(source_of(llama), config=None)
    assert notes_of(source_of(llama), plan_caches(llama, quant)) == []
