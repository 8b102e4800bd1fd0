"""What a batch's mask says of each input: its last columns of new tokens, its first of a cache, nothing of the rest."""

from typing import Any

import pytest
import torch
from torch import Tensor

from graphq.capture.source import BATCH, PAST, SEQUENCE, TOTAL, Source, TensorInput
from graphq.data.masks import ALL, MaskedBatch, Validity, check_mask, masked_batch
from graphq.errors import SpecError

IDS = TensorInput("input_ids", torch.int64, (BATCH, SEQUENCE))
MASK = TensorInput("attention_mask", torch.int64, (BATCH, TOTAL))
KEY = TensorInput("past_key_values.0.key", torch.float32, (BATCH, 2, PAST, 3))
EMBEDS = TensorInput("features", torch.float32, (BATCH, SEQUENCE, 4))
CLASS = TensorInput("class", torch.int64, (BATCH,))
SHARED = TensorInput("table", torch.float32, (5, 4))
LM = Source((IDS, MASK, KEY, EMBEDS, CLASS, SHARED), ("logits",), "dict", torch.float32, mask="attention_mask")


def inputs(mask: Tensor, sequence: int) -> tuple[Tensor, ...]:
    n, past = mask.shape[0], mask.shape[1] - sequence
    return (
        torch.zeros(n, sequence, dtype=torch.int64),
        mask,
        torch.zeros(n, 2, past, 3),
        torch.zeros(n, sequence, 4),
        torch.zeros(n, dtype=torch.int64),
        torch.zeros(5, 4),
    )


def masks(batch: MaskedBatch) -> list[Tensor | None]:
    return [one.mask for one in batch.validity]


def test_tokens_and_caches() -> None:
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    given = inputs(mask, 3)
    found = masked_batch(LM, given)
    assert all(x is y for x, y in zip(found, given, strict=True))
    ids, itself, key, embeds, label, table = masks(found)
    assert itself is label is table is None
    assert ids is not None
    assert key is not None
    assert embeds is not None
    assert ids.tolist() == [[True, True, False], [True, True, True]]
    assert torch.equal(key, torch.tensor([[False, True], [True, True]]).view(2, 1, 2, 1).expand(2, 2, 2, 3))
    assert torch.equal(embeds, ids.unsqueeze(-1).expand(2, 3, 4))
    assert not found.is_trivial
    assert masked_batch(LM, found) is found


def test_without_a_cache_every_column_is_a_new_token() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    ids, _, key, *_ = masks(masked_batch(LM, inputs(mask, 3)))
    assert ids is not None
    assert torch.equal(ids, mask.bool())
    assert key is not None
    assert key.numel() == 0


def test_a_mask_of_ones_says_nothing() -> None:
    found = masked_batch(LM, inputs(torch.ones(2, 5, dtype=torch.int64), 3))
    assert found.is_trivial
    assert all(one is ALL for one in found.validity)


def test_a_source_without_a_mask() -> None:
    source = Source(LM.inputs, ("logits",), "dict", torch.float32)
    assert masked_batch(source, inputs(torch.zeros(2, 5, dtype=torch.int64), 3)).is_trivial


def test_bool_and_float_masks() -> None:
    for dtype in (torch.bool, torch.float32):
        mask = torch.tensor([[1, 0, 1]]).to(dtype)
        ids = masks(masked_batch(LM, inputs(mask, 3)))[0]
        assert ids is not None
        assert torch.equal(ids, mask.bool())


def fixed(name: str, dtype: torch.dtype, *shape: int) -> TensorInput:
    return TensorInput(name, dtype, (BATCH, *shape))


def test_a_batch_of_a_fixed_length() -> None:
    mask = torch.tensor([[1, 1, 0]])
    declared = (fixed("x", torch.float32, 3, 2), fixed("mask", torch.int64, 3))
    source = Source(declared, ("output",), "tensor", torch.float32, mask="mask")
    x, _ = masks(masked_batch(source, (torch.zeros(1, 3, 2), mask)))
    assert x is not None
    assert x.tolist() == [[[True, True], [True, True], [False, False]]]


def test_features_of_which_tokens_are_the_last_axis() -> None:
    declared = (fixed("x", torch.float32, 2, 3), fixed("mask", torch.int64, 3))
    source = Source(declared, ("output",), "tensor", torch.float32, mask="mask")
    x, _ = masks(masked_batch(source, (torch.zeros(1, 2, 3), torch.tensor([[1, 1, 0]]))))
    assert x is not None
    assert x.tolist() == [[[True, True, False]] * 2]


nan = float("nan")


@pytest.mark.parametrize(
    ("mask", "problem"),
    [
        ([[0.0, 0.0, -1e9]], "holds -1e+09; a mask is 1 where"),
        ([[1.0, nan, 0.0]], "holds nan; a mask is 1 where"),
        ([[1, 1, 2]], "holds 2; a mask is 1 where a token counts and 0 elsewhere, and is not one to add to scores"),
        ([[1, -1, 0]], "holds -1; a mask is 1 where"),
        ([[0.5, 1.0, 1.0]], "holds 0.5; a mask is 1 where"),
        ([[0.0, 0.0, 0.0]], "is 0 everywhere; it is 1 where a token counts"),  # one to add that leaves out nothing
    ],
)
def test_numbers_that_are_no_mask(mask: list[Any], problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_mask(LM, inputs(torch.tensor(mask), 3), "calibration: batch 2")
    assert str(caught.value).startswith(f"calibration: batch 2: attention_mask {problem}")


def test_numbers_that_are_a_mask() -> None:
    for mask in (torch.tensor([[1, 0, 1]]), torch.tensor([[True, False, True]]), torch.tensor([[1.0, 0.0, 1.0]])):
        check_mask(LM, inputs(mask, 3), "calibration: batch 0")
    unmasked = Source(LM.inputs, ("logits",), "dict", torch.float32)
    check_mask(unmasked, inputs(torch.tensor([[7, 7, 7]]), 3), "calibration: batch 0")


def test_full() -> None:
    x = torch.zeros(2, 3)
    assert Validity().full(x).tolist() == [[True] * 3] * 2
    mask = torch.tensor([[True, False, True]] * 2)
    assert Validity(mask).full(x) is mask
    assert Validity(stops=("a mean",)).is_trivial is False
