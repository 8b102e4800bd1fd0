"""What a user gives becomes every input of the graph, or an error that names the input."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from graphq.capture.source import BATCH, PAST, SEQUENCE, TOTAL, CachePair, Source, TensorInput
from graphq.data.batches import complete, complete_all, first_batches
from graphq.errors import SpecError
from graphq.spec.rules import Run

IMAGES = Source(
    inputs=(
        TensorInput("x", torch.float32, (BATCH, 3)),
        TensorInput("y", torch.float16, (BATCH, SEQUENCE, 2)),
    ),
    outputs=("output",),
    output_kind="tensor",
    dtype=torch.float32,
)
LM = Source(
    inputs=(
        TensorInput("input_ids", torch.int64, (BATCH, SEQUENCE)),
        TensorInput("attention_mask", torch.int64, (BATCH, TOTAL)),
        TensorInput("position_ids", torch.int64, (BATCH, SEQUENCE)),
        TensorInput("token_type_ids", torch.int64, (BATCH, SEQUENCE)),
        TensorInput("past_key_values.0.key", torch.float32, (BATCH, 2, PAST, 4)),
        TensorInput("past_key_values.0.value", torch.float32, (BATCH, 2, PAST, 4)),
    ),
    outputs=("logits", "present.0.key", "present.0.value"),
    output_kind="dict",
    dtype=torch.float32,
    caches=tuple(CachePair(f"past_key_values.0.{part}", f"present.0.{part}") for part in ("key", "value")),
)
X, Y = torch.ones(2, 3), torch.ones(2, 5, 2)
IDS = torch.tensor([[4, 5, 6], [7, 8, 9]])


def test_every_form_of_a_batch():
    for batch in ((X, Y), [X, Y], {"x": X, "y": Y}, {"y": Y, "x": X}):
        x, y = complete(IMAGES, batch)
        assert x is X
        assert (y.dtype, y.shape) == (torch.float16, Y.shape)  # another float is converted
    (ids, *_) = complete(LM, IDS)
    assert ids is IDS


def test_what_is_left_out_of_a_language_models_inputs():
    ids, mask, positions, types, key, value = complete(LM, IDS.int())
    assert (ids.dtype, ids.tolist()) == (torch.int64, IDS.tolist())
    assert mask.tolist() == [[1, 1, 1]] * 2
    assert positions.tolist() == [[0, 1, 2]] * 2
    assert types.tolist() == [[0, 0, 0]] * 2
    assert key.shape == value.shape == (2, 2, 0, 4)
    assert all(t.dtype == torch.int64 for t in (mask, positions, types))


def test_positions_follow_the_mask():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    past = torch.zeros(2, 2, 2, 4)
    given = {"input_ids": IDS, "attention_mask": mask, "past_key_values.0.key": past, "past_key_values.0.value": past}
    assert complete(LM, given)[2].tolist() == [[0, 1, 2], [2, 3, 4]]
    padded = {"input_ids": IDS, "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    assert complete(LM, padded)[2].tolist() == [[1, 0, 1], [0, 1, 2]]
    own = torch.tensor([[9, 9, 9], [8, 8, 8]])
    assert complete(LM, {"input_ids": IDS, "position_ids": own})[2] is own


def test_a_past_lengthens_the_mask():
    past = torch.zeros(2, 2, 4, 4)
    given = {"input_ids": IDS, "past_key_values.0.key": past, "past_key_values.0.value": past}
    _, mask, positions, *_ = complete(LM, given)
    assert mask.shape == (2, 7)
    assert positions.tolist() == [[4, 5, 6]] * 2


def test_the_other_caches_of_an_empty_one_are_empty():
    empty = torch.zeros(2, 2, 0, 4)
    *_, key, value = complete(LM, {"input_ids": IDS, "past_key_values.0.key": empty})
    assert key.shape == value.shape == (2, 2, 0, 4)


PAST_TWO = torch.zeros(2, 2, 2, 4)
STATES = Source(  # of a fixed size: zeros are a state like any other
    inputs=(
        TensorInput("x", torch.float32, (BATCH, 3)),
        TensorInput("state.a", torch.float32, (BATCH, 5)),
        TensorInput("state.b", torch.float32, (BATCH, 5)),
    ),
    outputs=("y", "next.a", "next.b"),
    output_kind="dict",
    dtype=torch.float32,
    caches=(CachePair("state.a", "next.a"), CachePair("state.b", "next.b")),
)
WRONG: list[tuple[Source, Any, str]] = [
    (IMAGES, "hello", "a str is not a batch; give a tensor, a tuple or a dict of tensors"),
    (IMAGES, None, "a NoneType is not a batch; give a tensor, a tuple or a dict of tensors"),
    (IMAGES, np.ones((2, 3)), "a ndarray is not a batch; give a tensor, a tuple or a dict of tensors"),
    (IMAGES, (), "empty; the model takes x, y"),
    (IMAGES, {}, "empty; the model takes x, y"),
    (IMAGES, (X, Y, X), "3 tensors, the model takes 2: x, y"),
    (IMAGES, {"x": X, "z": Y}, "the model has no input z; it takes x, y"),
    (IMAGES, {"x": X, 3: Y}, "the model has no input 3; it takes x, y"),
    (IMAGES, {"x": [1.0], "y": Y}, "x is a list, not a tensor"),
    (IMAGES, X, "y is missing; the model takes x, y"),
    (IMAGES, {"y": Y}, "x is missing; the model takes x, y"),
    (IMAGES, (X.long(), Y), "x is torch.int64, the model takes torch.float32"),
    (IMAGES, (X[:, :2], Y), "x has shape (2, 2), expected (batch = 2, 3)"),
    (IMAGES, (X[0], Y), "x has shape (3,), expected (batch, 3)"),
    (IMAGES, (X, torch.ones(4, 5, 2)), "y has shape (4, 5, 2), expected (batch = 2, sequence, 2)"),
    (LM, IDS.float(), "input_ids is torch.float32, the model takes torch.int64"),
    (LM, IDS[0], "input_ids has shape (3,), expected (batch, sequence)"),
    (LM, {"attention_mask": IDS}, "input_ids is missing; the model takes " + ", ".join(i.name for i in LM.inputs)),
    (
        LM,
        {"input_ids": IDS, "attention_mask": torch.ones(2, 4, dtype=torch.int64)},
        "attention_mask covers 4 tokens, past_sequence + sequence are 0 + 3",
    ),
    (
        LM,
        {"input_ids": IDS, "past_key_values.0.key": PAST_TWO, "past_key_values.0.value": torch.zeros(2, 2, 3, 4)},
        "past_key_values.0.value has shape (2, 2, 3, 4), expected (batch = 2, 2, past_sequence = 2, 4)",
    ),
    (
        LM,
        {"input_ids": IDS, "past_key_values.0.key": PAST_TWO},
        "the cache lacks past_key_values.0.value; give all of it, or none",
    ),
    (
        LM,
        {"input_ids": IDS, "past_key_values.0.value": PAST_TWO},
        "the cache lacks past_key_values.0.key; give all of it, or none",
    ),
    (STATES, (X, torch.ones(2, 5)), "the cache lacks state.b; give all of it, or none"),
    (
        LM,
        {"input_ids": IDS, "position_ids": IDS[:, :2]},
        "position_ids has shape (2, 2), expected (batch = 2, sequence = 3)",
    ),
]


@pytest.mark.parametrize(("source", "batch", "problem"), WRONG)
def test_wrong_batches(source, batch, problem):
    with pytest.raises(SpecError) as caught:
        complete(source, batch)
    assert caught.value.problems == (f"inputs: {problem}",)
    with pytest.raises(SpecError) as caught:
        complete(source, batch, "calibration: batch 3")
    assert caught.value.problems == (f"calibration: batch 3: {problem}",)


def test_the_caller_keeps_what_was_given():
    given = {"input_ids": IDS}
    complete(LM, given)
    assert given == {"input_ids": IDS}


def test_many_batches_are_numbered():
    assert [x[0].shape[0] for x in complete_all(LM, [IDS, IDS[:1]])] == [2, 1]
    seen = complete_all(LM, (batch for batch in (IDS, IDS.float())))
    assert next(seen)[0] is IDS  # one at a time
    with pytest.raises(SpecError, match=r"^calibration: batch 1: input_ids is torch.float32"):
        next(seen)


@pytest.mark.parametrize("given", [IDS, {"input_ids": IDS}, "text", b"text", 3, None])
def test_what_is_not_many_batches(given):
    with pytest.raises(SpecError) as caught:
        list(complete_all(LM, given))
    words = f"calibration: a {type(given).__name__}; give a list of tensors, tuples or dicts"
    assert caught.value.problems == (words,)


def test_as_many_batches_as_the_spec_asks_for():
    batches = [(torch.full((1,), float(i)),) for i in range(3)]
    assert list(first_batches(iter(batches), Run())) == batches
    assert list(first_batches(iter(batches), Run(batches=2))) == batches[:2]
    assert list(first_batches(iter(batches), Run(batches=3))) == batches
    with pytest.raises(SpecError, match=r"^calibration: 3 batches given; the spec asks for 4$"):
        list(first_batches(iter(batches), Run(batches=4)))


def test_an_error_of_the_users_own_code_names_the_batch() -> None:
    def batches():
        yield X, Y
        raise FileNotFoundError("no second image\nof that name")

    read = complete_all(IMAGES, batches())
    next(read)
    with pytest.raises(SpecError) as error:
        next(read)
    assert str(error.value) == "calibration: batch 1 cannot be read: FileNotFoundError: no second image"
    assert isinstance(error.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize(
    ("batch", "problem"),
    [
        (IDS.to_sparse(), "input_ids is a tensor of layout sparse_coo, the model takes dense ones"),
        (
            torch.nested.nested_tensor([IDS[0], IDS[1, :2]], layout=torch.jagged),
            "input_ids is a tensor of layout nested, the model takes",
        ),
        (IDS.to("meta"), "input_ids is on meta, it holds no data"),
        (IDS[:, :0], "input_ids has shape (2, 0): sequence is 0"),
        (IDS[:0], "input_ids has shape (0, 3): batch is 0"),
    ],
)
def test_batches_that_hold_nothing_to_calibrate_on(batch: torch.Tensor, problem: str):
    read = complete_all(LM, [IDS, batch])
    assert next(read)[0] is IDS  # its cache is empty
    with pytest.raises(SpecError) as caught:
        next(read)
    assert str(caught.value).startswith(f"calibration: batch 1: {problem}")


def test_the_mask_of_a_batch_is_checked():
    source = dataclasses.replace(LM, mask="attention_mask")
    with pytest.raises(SpecError, match=r"^calibration: batch 0: attention_mask holds 2; "):
        list(complete_all(source, [{"input_ids": IDS, "attention_mask": torch.full((2, 3), 2)}]))


BOUNDED = dataclasses.replace(IMAGES, ranges=((BATCH, 1, 3), (SEQUENCE, 4, 6)))


@pytest.mark.parametrize(
    ("x", "y", "problem"),
    [
        (torch.ones(4, 3), None, "x has shape (4, 3); batch is at most 3 in this graph"),
        (X, torch.ones(2, 7, 2), "y has shape (2, 7, 2); sequence is at most 6 in this graph"),
        (X, torch.ones(2, 3, 2), "y has shape (2, 3, 2); sequence is at least 4 in this graph"),
        (X, torch.ones(2, 0, 2), "y has shape (2, 0, 2); sequence is at least 4 in this graph"),
    ],
)
def test_sizes_out_of_range(x: torch.Tensor, y: torch.Tensor | None, problem: str):
    for size in (4, 6):
        complete(BOUNDED, (X, torch.ones(2, size, 2)))
    complete(BOUNDED, (torch.ones(3, 3), torch.ones(3, 5, 2)))
    complete(BOUNDED, (torch.ones(0, 3), torch.ones(0, 5, 2)))  # many graphs run on none
    complete(
        dataclasses.replace(IMAGES, ranges=((BATCH, 1, 1 << 20),)), (torch.ones(1 << 21, 3), torch.ones(1 << 21, 1, 2))
    )
    with pytest.raises(SpecError) as caught:
        complete(BOUNDED, {"x": x} if y is None else {"x": x, "y": y})
    assert str(caught.value) == f"inputs: {problem}"


FIXED = dataclasses.replace(LM, ranges=((BATCH, 1, 8), (PAST, 4, 4), (SEQUENCE, 3, 3)))


def test_a_cache_of_fixed_length_is_hidden_until_it_is_written():
    _, mask, positions, _, key, value = complete(FIXED, IDS)
    assert mask.tolist() == [[0, 0, 0, 0, 1, 1, 1]] * 2
    assert positions.tolist() == [[0, 1, 2]] * 2
    assert key.shape == value.shape == (2, 2, 4, 4)
    assert not key.any()
    past = torch.ones(2, 2, 4, 4)
    given = {"input_ids": IDS, "past_key_values.0.key": past, "past_key_values.0.value": past}
    assert complete(FIXED, given)[1].tolist() == [[1] * 7] * 2
    own = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    assert complete(FIXED, {"input_ids": IDS, "attention_mask": own})[1] is own
    with pytest.raises(SpecError, match=r"^inputs: input_ids has shape \(2, 2\); sequence is 3 in this graph$"):
        complete(FIXED, IDS[:, :2])
    with pytest.raises(SpecError, match=r"^inputs: the cache lacks past_key_values.0.value; give all of it, or none$"):
        complete(FIXED, {"input_ids": IDS, "past_key_values.0.key": past})


NESTED = dataclasses.replace(
    IMAGES, inputs=tuple(TensorInput(name, torch.float32, (BATCH, 3)) for name in ("x", "f.0", "f.1.a", "f.1.b"))
)


def test_nested_inputs():
    for batch in (
        (X, [X, {"a": X, "b": X}]),
        {"x": X, "f": (X, {"a": X, "b": X})},
        {"x": X, "f.0": X, "f.1": {"a": X, "b": X}},
    ):
        assert len(complete(NESTED, batch)) == 4
    for batch, problem in (
        ((X, [X, {"a": X}]), "f.1.b is missing; the model takes x, f.0, f.1.a, f.1.b"),
        ((X, [X], X), "3 tensors, the model takes 2: x, f"),
        ((X, [X, 3]), "the model has no input f.1; it takes x, f.0, f.1.a, f.1.b"),
        ({"x": [X]}, "x is a list, not a tensor"),
    ):
        with pytest.raises(SpecError) as caught:
            complete(NESTED, batch)
        assert str(caught.value) == f"inputs: {problem}"
