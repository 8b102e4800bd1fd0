"""generate: the tokens that transformers' own generate gives on the source, and those of the QDQ form."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import graphq
from graphq.capture.hugging_face import capture_pretrained
from graphq.capture.source import source_of
from graphq.errors import GraphqError
from graphq.runtime.model import CompiledModel
from tests import models
from tests.compiled import compile_captured
from tests.models import DECODERS, tiny

# What each family adds: gemma3 a sliding window, gpt2 and opt positions of their own, the others experts.
FAMILIES = [f if f in ("llama", "gemma3", "gpt2") else pytest.param(f, marks=pytest.mark.slow) for f in DECODERS]
HOW: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20, "temperature": 1.3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "penalty": {"repetition_penalty": 1.5},
}
NEW = 9  # longer than gemma3's window, together with the prompt


def tokens(batch: int, sequence: int) -> Tensor:
    return torch.randint(3, 100, (batch, sequence), generator=torch.Generator().manual_seed(0))


def generate(model: Any, **options: Any) -> Any:
    """Exactly ``NEW`` tokens, with the same random numbers each time."""
    torch.manual_seed(0)
    return model.generate(**options, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_the_source(family: str, how: str) -> None:
    """Nothing is quantized: the logits equal those of the source to the last bits."""
    model = CompiledModel(models._captured(family))
    ids = tokens(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # padded on the left
    ids[0, :2] = 0
    options = {**HOW[how], "return_dict_in_generate": True, "output_logits": True}
    expected = generate(tiny(family), input_ids=ids, attention_mask=mask, **options)
    found = generate(model, input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert found.sequences.shape[1] == 5 + NEW
    for ours, theirs in zip(found.logits, expected.logits, strict=True):
        # The last bits differ where the source keeps a shorter cache or fuses its masks.
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_a_single_token_and_a_batch_of_one() -> None:
    model = CompiledModel(models._captured("llama"))
    assert torch.equal(generate(model, input_ids=tokens(1, 1)), generate(tiny("llama"), input_ids=tokens(1, 1)))


def test_the_sources_generation_config_holds() -> None:
    source = tiny("llama", num_hidden_layers=1)
    source.generation_config.max_new_tokens = 4
    source.generation_config.eos_token_id = None
    source.generation_config.pad_token_id = 0
    model = CompiledModel(capture_pretrained(source))
    expected = source.generate(tokens(1, 3))
    assert expected.shape == (1, 7)
    assert torch.equal(model.generate(tokens(1, 3)), expected)
    # It stops where the source stops.
    stop = int(expected[0, 4])
    source.generation_config.eos_token_id = stop
    again = CompiledModel(capture_pretrained(source)).generate(tokens(1, 3))
    assert again.tolist() == expected[:, :5].tolist()


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        ("llama", {"match": "down_proj#1", "weight": "int8/channel"}),
        ("llama", {"match": "blocks", "weight": "int4/asym/g32"}),
        pytest.param("mixtral", {"match": "blocks", "weight": "int3/g32"}, marks=pytest.mark.slow),
    ],
)
def test_the_tokens_of_the_qdq_form(family: str, rule: dict[str, str]) -> None:
    compiled = compile_captured(family, {"graphq": 1, "rules": [rule]})
    ids = tokens(2, 5)
    expected = generate(CompiledModel(compiled.graph), input_ids=ids)
    assert torch.equal(generate(compiled, input_ids=ids), expected)
    assert expected.shape == (2, 5 + NEW)


def test_generation_changes_no_tensor() -> None:
    gm = copy.deepcopy(models._captured("llama"))
    model = CompiledModel(gm)
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    generate(model, input_ids=tokens(2, 4))
    assert {k: v.shape for k, v in gm.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())


def test_a_model_without_a_cache_does_not_generate() -> None:
    spec = {"graphq": 1, "weight": "int8/channel"}
    compiled = graphq.compile(tiny("gpt2", n_layer=1), spec, cache=False)
    assert not [i for i in source_of(compiled.graph).inputs if i.is_cache]
    with pytest.raises(GraphqError, match="captured with its key/value cache"):
        compiled.generate(tokens(1, 3))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_without_the_cache_all_tokens_are_read_again(family: str) -> None:
    ids = tokens(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    for options in ({}, {"num_beams": 2}):
        options |= {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        expected = generate(tiny(family), **options)
        assert torch.equal(generate(CompiledModel(models._captured(family)), **options), expected)


def test_the_sources_generation_config_may_leave_the_cache_out() -> None:
    source = tiny("llama", num_hidden_layers=1)
    source.generation_config.use_cache = False
    ids = tokens(2, 4)
    assert torch.equal(
        generate(CompiledModel(capture_pretrained(source)), input_ids=ids), generate(source, input_ids=ids)
    )


@pytest.mark.parametrize(("kind", "named"), [("static", "a StaticCache"), ("offloaded", "an offloaded DynamicCache")])
def test_caches_that_the_graph_cannot_fill_are_refused(kind: str, named: str) -> None:
    model, ids = CompiledModel(models._captured("llama")), tokens(2, 4)
    with pytest.raises(GraphqError, match=f"^generate: {named} cannot hold .*; leave cache_implementation and"):
        generate(model, input_ids=ids, cache_implementation=kind)
    found = generate(model, input_ids=ids, cache_implementation="dynamic")
    assert torch.equal(found, generate(tiny("llama"), input_ids=ids))
