"""Caches of more than keys and values: states of convolutions and recurrences, keys of an index."""

from typing import Any

import pytest
import torch
from torch import Tensor

from graphq.capture.caches import caches_of
from graphq.capture.hugging_face import capture_pretrained
from graphq.capture.language_models import run_of
from graphq.capture.source import BATCH, PAST, source_of
from graphq.errors import GraphError
from graphq.runtime.model import CompiledModel
from tests.family_models import FAMILIES, text

BY_NAME = {one.name: one for one in FAMILIES}
CONV = "past_key_values.0.conv_state"


@pytest.fixture(scope="module")
def short_convolutions() -> Any:
    """LFM2: a block with the state of a convolution, one with attention."""
    return BY_NAME["lfm2"].build()


@pytest.fixture(scope="module")
def compiled(short_convolutions: Any) -> CompiledModel:
    return CompiledModel(capture_pretrained(short_convolutions, check=True))


@pytest.fixture(scope="module")
def recurrence() -> Any:
    """Mamba: states alone, by a loop over tokens."""
    return BY_NAME["mamba"].build()


def test_states_stand_beside_keys_and_values(compiled: CompiledModel) -> None:
    source = compiled.source
    assert [(one.name, one.shape) for one in source.inputs[-3:]] == [
        (CONV, (BATCH, 64, 3)),
        ("past_key_values.1.key", (BATCH, 2, PAST, 16)),
        ("past_key_values.1.value", (BATCH, 2, PAST, 16)),
    ]
    assert source.outputs == ("logits", "present.0.conv_state", "present.1.key", "present.1.value")
    assert (source.caches[0].past, source.caches[0].present) == (CONV, "present.0.conv_state")
    assert source.has_states
    assert source.fixed == {}


def test_a_layer_without_a_cache_and_plain_ones() -> None:
    """Only keys and values of all layers, from the first on, are no states."""
    plain = source_of(capture_pretrained(BY_NAME["qwen3"].build()))
    assert not plain.has_states


def test_a_text_and_its_parts_give_the_same(compiled: CompiledModel, short_convolutions: Any) -> None:
    ids = text(2, 9)
    with torch.no_grad():
        wanted = short_convolutions(input_ids=ids).logits
        whole = compiled(ids)
        first = compiled(ids[:, :4])
        rest = compiled(ids[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(whole.logits, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), wanted, atol=1e-5, rtol=1e-5)
    assert rest.past_key_values.get_seq_length() == 9
    assert compiled(ids, use_cache=False).past_key_values is None


def test_states_of_tokens_that_are_padding(compiled: CompiledModel, short_convolutions: Any) -> None:
    ids, mask = text(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        wanted = short_convolutions(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        found = compiled(ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask == 1], wanted[mask == 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_generation_equals_the_models(compiled: CompiledModel, short_convolutions: Any, how: dict[str, Any]) -> None:
    ids, mask = text(2, 5), torch.ones(2, 5, dtype=torch.long)
    mask[0, 0] = 0
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        **how,
    }
    assert torch.equal(compiled.generate(ids, **options), short_convolutions.generate(ids, **options))


def test_a_loop_over_tokens_is_captured_for_one(recurrence: Any) -> None:
    compiled = CompiledModel(capture_pretrained(recurrence, check=True))
    source = compiled.source
    assert source.fixed == {"sequence": 1}
    assert [note.partition(":")[0] + ":" + note.split(":")[1] for note in source.notes if "token by token" in note] == [
        "texts are read token by token: backbone.layers.0.mixer (MambaMixer) is a loop over tokens"
    ]
    ids = text(2, 7)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids).logits, recurrence(ids).logits, atol=1e-5, rtol=1e-5)
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
    }
    assert torch.equal(compiled.generate(ids, **options), recurrence.generate(ids, **options))


def test_padding_leaves_states_of_a_step_alone(recurrence: Any) -> None:
    compiled = CompiledModel(capture_pretrained(recurrence, check=True))
    ids, mask = text(1, 5), torch.tensor([[0, 0, 1, 1, 1]])
    with torch.no_grad():
        padded, alone = compiled(ids, attention_mask=mask), compiled(ids[:, 2:])
    for name in compiled.source.presents:
        torch.testing.assert_close(padded[name], alone[name], msg=name)


@pytest.mark.parametrize("window", [8, pytest.param(None, marks=pytest.mark.slow)])
def test_masks_cover_what_the_first_layer_with_keys_holds(window: int | None) -> None:
    """MiniMax asks its first layer, which keeps no keys, how long the text is: padding and windows went wrong."""
    model = BY_NAME["minimax"].build()
    model.config.sliding_window = window
    compiled = CompiledModel(capture_pretrained(model, check=True))
    ids, mask = text(2, 19), torch.ones(2, 19, dtype=torch.long)
    mask[0, :4] = 0
    with torch.no_grad():
        whole, alone = model(ids).logits, model(ids[:1, 4:]).logits
        padded = compiled(ids, attention_mask=mask).logits
        torch.testing.assert_close(compiled(ids).logits, whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded[:1, 4:], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded[1], whole[1], atol=1e-5, rtol=1e-5)


def test_without_a_cache_a_loop_is_refused_by_its_name(recurrence: Any) -> None:
    with pytest.raises(GraphError, match=r"backbone\.layers\.0\.mixer \(MambaMixer\) is a loop over tokens") as refused:
        capture_pretrained(recurrence, cache=False)
    assert 'shapes={"sequence": ...}' in str(refused.value)


def test_a_model_takes_caches_of_its_own_class_alone(short_convolutions: Any) -> None:
    """As xLSTM does, which looks for its states in the plain cache that it is given."""

    def run(**given: Any) -> Any:
        if "past_key_values" in given:
            raise AttributeError("'DynamicCache' object has no attribute 'rnn_state'")
        return run_of(short_convolutions)(**given)

    assert [one.wanted.name for one in caches_of(short_convolutions, run).held] == [
        CONV,
        "past_key_values.1.key",
        "past_key_values.1.value",
    ]


def test_a_model_that_fails_with_any_cache_is_refused(short_convolutions: Any) -> None:
    def run(**given: Any) -> Any:
        raise AttributeError("no\nsuch thing")

    with pytest.raises(GraphError) as caught:
        caches_of(short_convolutions, run)
    assert str(caught.value) == (
        "Lfm2ForCausalLM cannot be called with a cache (no); pass cache=False to compile it without one"
    )


def test_a_cache_of_another_kind_is_refused(short_convolutions: Any) -> None:
    class Own:
        def __init__(self) -> None:
            self.layers = [self]
            self.compressed: Tensor = torch.zeros(1, 3)

    def run(**given: Any) -> Any:
        found = run_of(short_convolutions)(**given)
        found.past_key_values = Own()
        return found

    with pytest.raises(GraphError, match=r"Lfm2ForCausalLM: its cache holds 0\.compressed of shape \(1, 3\)"):
        caches_of(short_convolutions, run)


def test_a_state_is_not_taken_back(compiled: CompiledModel) -> None:
    state = compiled(text(1, 3)).past_key_values
    with pytest.raises(Exception, match="cannot be taken back"):
        state.crop(-1)
    with pytest.raises(TypeError, match="keeps states beside keys and values"):
        compiled(text(1, 3), cache="static", max_length=9)
