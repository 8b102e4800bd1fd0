"""Masks that are constant along axes: rows of a value that are valid or invalid as a whole."""

from collections.abc import Sequence

import torch
from torch import Tensor


def row_mask(mask: Tensor, axes: Sequence[int]) -> Tensor | None:
    """The mask, of size 1 along ``axes``; None where it is not constant along them."""
    if not mask.dim() or not mask.numel():
        return mask
    low, high = mask.amin(tuple(axes), keepdim=True), mask.amax(tuple(axes), keepdim=True)
    return low if torch.equal(low, high) else None


def fits(row: Tensor, made: Tensor) -> bool:
    """Whether the row of each index is a row of what was written into."""
    return all(size in (1, other) for size, other in zip(row.shape, made.shape, strict=True))


def fitted(row: Tensor, shape: torch.Size) -> Tensor:
    """The row in this shape, without the axes that are gone there."""
    return row.expand(shape) if row.dim() == len(shape) else row.reshape(shape)


def padded(mask: Tensor, pads: Sequence[int], is_constant: bool) -> Tensor | None:
    """The mask with more elements, valid but for those of rows that are invalid as a whole.

    ``pads``: how many before and behind, for each axis from the last. None where the new elements are no constants
    (``is_constant``) but those of rows that are valid in part.
    """
    for axis, (before, behind) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        row = row_mask(mask, (-1 - axis,))
        if row is not None:
            size = mask.shape[-1 - axis] + before + behind
            mask = row.expand([*row.shape[: row.dim() - 1 - axis], size, *row.shape[row.dim() - axis :]])
        elif not is_constant:
            return None
        else:
            mask = torch.nn.functional.pad(mask, [0] * 2 * axis + [before, behind], value=True)
    return mask
