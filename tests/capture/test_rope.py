"""Rotary frequencies that depend on the length of the text."""

from typing import Any

import pytest
import torch

from graphq.capture.hugging_face import capture_pretrained
from graphq.capture.rope import frequencies_held, growing_frequencies
from graphq.capture.source import TOTAL, source_of
from graphq.data.batches import complete
from graphq.errors import SpecError
from tests.family_models import FAMILIES, text
from tests.models import tiny

BY_NAME = {one.name: one for one in FAMILIES}


@pytest.fixture(scope="module")
def dynamic() -> Any:
    return BY_NAME["llama-dynamic-rope"].build()


def test_frequencies_that_grow_bound_the_text(dynamic: Any) -> None:
    gm = capture_pretrained(dynamic, check=True)
    source = source_of(gm)
    assert source.bounds[TOTAL] == (1, 128)
    assert f"{TOTAL} is 1 to 128: rotary frequencies grow with longer texts (rope_type dynamic)" in source.notes
    assert dynamic.model.rotary_emb.rope_type == "dynamic", "the model is left as it was"
    for length in (5, 128):
        ids = text(1, length)
        with torch.no_grad():
            torch.testing.assert_close(gm(*complete(source, ids))[0], dynamic(ids).logits, atol=1e-5, rtol=1e-5)
    with pytest.raises(SpecError, match=r"inputs: 129 tokens; past_sequence \+ sequence is at most 128 in this graph"):
        complete(source, text(1, 129))


def test_models_without_such_frequencies() -> None:
    assert growing_frequencies(tiny("llama")) is None
    assert growing_frequencies(torch.nn.Linear(2, 2)) is None


def test_they_are_restored_after_an_error(dynamic: Any) -> None:
    with pytest.raises(ValueError, match="own"), frequencies_held(dynamic):
        assert dynamic.model.rotary_emb.rope_type == "default"
        raise ValueError("own")
    assert dynamic.model.rotary_emb.rope_type == "dynamic"


@pytest.mark.parametrize("length", [64, 65])
def test_longrope_chooses_its_table_by_the_text(length: int) -> None:
    """Both tables are in the graph: of 64 tokens the short one is used, of more the long one."""
    model = BY_NAME["phi3-longrope"].build()
    gm = capture_pretrained(model)
    ids = text(1, length)
    with torch.no_grad():
        wanted, found = model(ids).logits, gm(*complete(source_of(gm), ids))[0]
        model.model.rotary_emb.long_inv_freq.copy_(model.model.rotary_emb.original_inv_freq)
        short = model(ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert torch.equal(wanted, short) == (length <= 64)
