"""A graph of one token is held to what its model makes of a text at once."""

from typing import Any

import pytest
from torch import Tensor, fx

from graphq.capture.hugging_face import capture_pretrained
from graphq.capture.language_models import run_of
from graphq.capture.source import source_of
from graphq.capture.text_proof import prove_text
from graphq.errors import GraphError
from tests.family_models import FAMILIES


@pytest.fixture(scope="module")
def recurrence() -> Any:
    """Mamba: states alone, by a loop over tokens."""
    return next(one for one in FAMILIES if one.name == "mamba").build()


@pytest.fixture(scope="module")
def step(recurrence: Any) -> fx.GraphModule:
    return capture_pretrained(recurrence)


def by_blocks(model: Any, change: float = 0.1) -> Any:
    """The model, which gives something else from the ninth token of a text on."""

    def run(**given: Any) -> Any:
        found = run_of(model)(**given)
        found.logits[:, 8:] += change * found.logits.abs().max()
        return found

    return run


def test_a_graph_that_reads_as_its_model_does(step: fx.GraphModule, recurrence: Any) -> None:
    assert prove_text(step, recurrence, run_of(recurrence)) == ()


@pytest.mark.parametrize("name", ["sliding_window", "attention_window_size", "block_size", "mamba_chunk_size"])
def test_the_text_is_longer_than_a_block(
    step: fx.GraphModule, recurrence: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recurrence.config, name, 8, raising=False)
    with pytest.raises(GraphError) as caught:
        prove_text(step, recurrence, by_blocks(recurrence))
    assert str(caught.value) == (
        "MambaForCausalLM: a text of 11 tokens, read one by one, differs by 0.1 of its largest logit from the same read at"
        " once: the model's step computes something else than its text; declare the length of all texts with"
        ' shapes={"sequence": ...} and cache=False'
    )
    assert prove_text(step, recurrence, by_blocks(recurrence, 5e-4)) == ()  # other sums of the same numbers


def test_a_block_of_many_tokens_is_not_read_through(
    step: fx.GraphModule, recurrence: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recurrence.config, "chunk_size", 256, raising=False)
    lengths: list[int] = []

    def run(**given: Any) -> Any:
        lengths.append(given["input_ids"].shape[1])
        return run_of(recurrence)(**given)

    assert prove_text(step, recurrence, run) == ()
    assert lengths == [6]


def test_padding_that_changes_a_text_is_a_note(
    step: fx.GraphModule, recurrence: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, own = source_of(step), step.forward
    padded: list[bool] = []

    def forward(*given: Tensor) -> tuple[Tensor, ...]:
        padded.append(not given[source.names.index("attention_mask")].all())
        found = list(own(*given))
        if any(padded):
            found[source.outputs.index("logits")] = found[source.outputs.index("logits")] * 2
        return tuple(found)

    monkeypatch.setattr(step, "forward", forward)
    (note,) = prove_text(step, recurrence, run_of(recurrence))
    assert note == (
        "capture: behind padding a text differs by 1 of its largest logit from the same without;"
        " read texts of one length together"
    )


def test_half_precision_is_a_note(step: fx.GraphModule, recurrence: Any) -> None:
    """Logits of 16 bits differ by their rounding: here from those of the graph, which are of 32."""

    def run(**given: Any) -> Any:
        found = run_of(recurrence)(**given)
        found.logits = found.logits.bfloat16()
        return found

    (note,) = prove_text(step, recurrence, run)
    assert note.endswith("from the same read at once: the rounding of torch.bfloat16, or more")


def test_a_text_that_the_model_cannot_read_is_a_note(step: fx.GraphModule, recurrence: Any) -> None:
    def fails(**given: Any) -> Any:
        raise ValueError("no\nsuch length")

    assert prove_text(step, recurrence, fails) == ("capture: not compared on a text of 6 tokens: the model fails: no",)


def test_the_proof_is_made_at_capture(recurrence: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphq.capture.hugging_face.prove_text", lambda *_: ("seen",))
    assert "seen" in source_of(capture_pretrained(recurrence, check=True)).notes
    assert "seen" not in source_of(capture_pretrained(recurrence)).notes
