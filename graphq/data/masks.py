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

from graphq.capture.source import BATCH, PAST, TOTAL, Source, TensorInput
from graphq.capture.token_axes import problem_of, token_axes
from graphq.errors import SpecError


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
            axes = token_axes(source.inputs, declared.name)
            validity = [
                Validity(_of_input(wanted, declared, axes[wanted.name], mask, x)) if wanted.name in axes else ALL
                for wanted, x in zip(source.inputs, batch, strict=True)
            ]
    return MaskedBatch(batch, validity)


def check_mask(source: Source, batch: tuple[Tensor, ...], where: str) -> None:
    """Raises ``SpecError``, beginning with ``where``, if the batch's mask does not say of each token if it counts.

    A mask of zeros alone leaves nothing to calibrate on; one that is added to scores has zeros where tokens count.
    """
    names = [wanted.name for wanted in source.inputs]
    if source.mask not in names:
        return
    mask = batch[names.index(source.mask)]
    if problem := problem_of(mask):
        raise SpecError(f"{where}: {source.mask} {problem}")
    if not mask.any():
        raise SpecError(f"{where}: {source.mask} is 0 everywhere; it is 1 where a token counts")


def _of_input(wanted: TensorInput, declared: TensorInput, axis: int, mask: Tensor, x: Tensor) -> Tensor | None:
    """The mask ``[batch, n]`` in the shape of an input whose tokens are along ``axis``; None for one without batch."""
    columns = mask
    if wanted.shape[:1] != (BATCH,):
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
