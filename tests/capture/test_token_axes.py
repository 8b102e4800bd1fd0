"""The axis of each input that runs over the tokens of a mask."""

import torch

from graphq.capture.source import BATCH, PAST, SEQUENCE, TOTAL, TensorInput
from graphq.capture.token_axes import has_tokens, problem_of, token_axes

FLOAT, INT, BOOL = torch.float32, torch.int64, torch.bool


def given(name: str, dtype: torch.dtype, *shape: int | str) -> TensorInput:
    return TensorInput(name, dtype, (BATCH, *shape))


def test_a_dynamic_size_is_found_by_its_name() -> None:
    inputs = (
        given("ids", INT, SEQUENCE),
        given("mask", INT, TOTAL),
        given("key", FLOAT, 2, PAST, 3),
        given("features", FLOAT, 4, SEQUENCE),
        given("class", INT),
        given("vector", FLOAT, 6),
        TensorInput("table", FLOAT, (5, 4)),
    )
    assert token_axes(inputs, "mask") == {"ids": 1, "key": 2, "features": 2}
    assert token_axes((given("ids", INT, "n"), given("mask", INT, "n"), given("key", INT, PAST)), "mask") == {"ids": 1}


def test_a_fixed_size_is_found_in_ids_and_features() -> None:
    mask = given("mask", BOOL, 6)
    inputs = (
        given("ids", INT, 6),
        given("features", FLOAT, 6, 8),
        given("channels", FLOAT, 8, 6),
        given("square", FLOAT, 6, 6),
        given("others", INT, 5),
        given("vector", FLOAT, 6),  # as many channels as there are tokens
        given("image", FLOAT, 3, 6, 7),
    )
    assert token_axes((*inputs, mask), "mask") == {"ids": 1, "features": 1, "channels": 2, "square": 1}


def test_a_fixed_size_is_found_elsewhere_where_it_is_in_no_ids_or_features() -> None:
    inputs = (
        given("mask", BOOL, 6),
        given("wave", FLOAT, 6),
        given("heads", FLOAT, 2, 6, 3),
        given("image", FLOAT, 3, 6, 6),  # which of both?
        given("others", INT, 5),
    )
    assert token_axes(inputs, "mask") == {"wave": 1, "heads": 2}


def test_a_mask_of_the_tokens_of_no_input() -> None:
    assert token_axes((given("x", FLOAT, 6, 8), given("mask", INT, 9)), "mask") == {}
    assert token_axes((given("ids", INT, 6),), "ids") == {}
    assert token_axes((TensorInput("x", FLOAT, (6,)), given("mask", INT, 6)), "mask") == {}  # its batch


def test_what_has_the_form_of_tokens() -> None:
    shapes = [((6,), FLOAT), ((6,), INT), ((6, 8), FLOAT), ((6, 8), INT), ((6, 8, 2), FLOAT), ((), INT)]
    assert [has_tokens(given("x", dtype, *shape)) for shape, dtype in shapes] == [False, True, True, True, False, False]


def test_the_numbers_of_a_mask() -> None:
    for fine in (torch.tensor([[0, 1]]), torch.tensor([[True]]), torch.tensor([[0.0, -0.0, 1.0]]), torch.ones(0, 2)):
        assert problem_of(fine) is None
    assert str(problem_of(torch.tensor([[1.0, -1e9]]))).startswith("holds -1e+09; a mask is 1 where a token counts")
    assert str(problem_of(torch.tensor([[float("nan"), 1.0]]))).startswith("holds nan; ")
