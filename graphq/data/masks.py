"""Which elements of a batch are real: those of tokens that the batch's mask does not leave out.

A source declares one input as its mask, ``[batch, sequence]`` or with the past in front, 0 where a token is padding.
Every other input that runs over tokens is real where the mask is: at its last columns for new tokens, at its first for
those of a cache.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from graphq.capture.source import BATCH, PAST, SEQUENCE, TOTAL, Source, TensorInput


@final
@dataclass(frozen=True, eq=False)
class Validity:
    """``mask``: bool, of a value's shape, True where an element counts; None: all count.

    ``stops``: in words, the ops in front of it beyond which masked tokens cannot be told from others, nor can here.
    """

    mask: Tensor | None = None
    stops: tuple[str, ...] = ()

    @property
    def is_trivial(self) -> bool:
        """Whether there is nothing to say: all elements count, and no masked ones have a part in them."""
        return self.mask is None and not self.stops

    def full(self, x: Tensor) -> Tensor:
        """The mask of ``x``, all True where there is none."""
        return torch.ones_like(x, dtype=torch.bool) if self.mask is None else self.mask


ALL: Final = Validity()


@final
class MaskedBatch(tuple[Any, ...]):
    """What a graph takes, or gives, for a batch; ``validity``: of each value."""

    validity: tuple[Validity, ...]

    def __new__(cls, values: Iterable[Any], validity: Iterable[Validity]) -> "MaskedBatch":
        made = super().__new__(cls, values)
        made.validity = tuple(validity)
        assert len(made.validity) == len(made)
        return made

    @property
    def is_trivial(self) -> bool:
        """Whether all elements of all values count."""
        return all(one.is_trivial for one in self.validity)


def masked_batch(source: Source, batch: tuple[Any, ...]) -> MaskedBatch:
    """A complete batch of the inputs of ``source``, with what its mask says of each; a ``MaskedBatch`` as it is."""
    if isinstance(batch, MaskedBatch):
        return batch
    validity = [ALL] * len(batch)
    place = next((i for i, wanted in enumerate(source.inputs) if wanted.name == source.mask), None)
    if place is not None:
        mask = batch[place] != 0
        if not mask.all():
            declared = source.inputs[place]
            validity = [
                ALL if i == place else Validity(_of_input(wanted, declared, mask, x))
                for i, (wanted, x) in enumerate(zip(source.inputs, batch, strict=True))
            ]
    return MaskedBatch(batch, validity)


def _of_input(wanted: TensorInput, declared: TensorInput, mask: Tensor, x: Tensor) -> Tensor | None:
    """The mask ``[batch, n]`` in the shape of an input; None for an input that does not run over tokens."""
    axis, columns = token_axis(wanted, declared), mask
    if axis is None or wanted.shape[:1] != (BATCH,):
        return None
    count = x.shape[axis]
    match wanted.shape[axis]:
        case size if size == TOTAL or size == declared.shape[1]:
            pass
        case size if size == PAST:
            columns = mask[:, :count]
        case _:
            columns = mask[:, mask.shape[1] - count :]
    shape = [size if i in (0, axis) else 1 for i, size in enumerate(x.shape)]
    return columns.reshape(shape).expand(x.shape).contiguous()


def token_axis(wanted: TensorInput, mask: TensorInput) -> int | None:
    """The axis of an input that runs over tokens, None where there is none.

    It is that of a dynamic size that the mask's columns are made of; where these are a fixed number, the second axis of
    ids ``[batch, n]`` and features ``[batch, n, K]`` of that number.
    """
    if isinstance(mask.shape[1], str):
        sizes = (SEQUENCE, PAST, TOTAL) if mask.shape[1] in (SEQUENCE, TOTAL) else (mask.shape[1],)
        return next((i for i, size in enumerate(wanted.shape) if i and size in sizes), None)
    has_tokens = len(wanted.shape) == 3 or (len(wanted.shape) == 2 and not wanted.dtype.is_floating_point)
    return 1 if has_tokens and wanted.shape[1] == mask.shape[1] else None
