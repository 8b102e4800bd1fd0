"""Which axis of each input runs over the tokens that a mask ``[batch, tokens]`` tells from padding."""

from collections.abc import Sequence

from torch import Tensor

from graphq.capture.source import PAST, SEQUENCE, TOTAL, TensorInput


def token_axes(inputs: Sequence[TensorInput], mask: str) -> dict[str, int]:
    """The axis of tokens of each input that has one, the mask itself not among them.

    It is that of a dynamic size that the mask's columns are made of. Where these are a fixed number, it is the axis of
    that number in ids ``[batch, n]``, in features ``[batch, n, K]``, and, unless K is that number too, in features
    ``[batch, K, n]``. Where no such input has it, it is the only axis of that number of any other input.
    """
    columns = next(one for one in inputs if one.name == mask).shape[1]
    others = [one for one in inputs if one.name != mask]
    if isinstance(columns, str):
        sizes = (SEQUENCE, PAST, TOTAL) if columns in (SEQUENCE, TOTAL) else (columns,)
        return {one.name: axes[0] for one in others if (axes := _axes_of(one, sizes))}
    found = {one.name: _axes_of(one, (columns,)) for one in others}
    usual = {one.name: found[one.name][0] for one in others if has_tokens(one) and found[one.name]}
    return usual or {name: axes[0] for name, axes in found.items() if len(axes) == 1}


def has_tokens(given: TensorInput) -> bool:
    """Whether it has the form of ids ``[batch, n]`` or of features ``[batch, n, K]``."""
    return len(given.shape) == 3 or (len(given.shape) == 2 and not given.dtype.is_floating_point)


def _axes_of(given: TensorInput, sizes: Sequence[int | str]) -> list[int]:
    """Its axes of one of these sizes, but for that of the batch."""
    return [axis for axis, size in enumerate(given.shape) if axis and size in sizes]


def problem_of(mask: Tensor) -> str | None:
    """What is wrong with the numbers of a mask, in words: they are 1 where a token counts, and 0 where it does not."""
    wrong = mask[(mask != 0) & (mask != 1)]
    if not wrong.numel():
        return None
    return (
        f"holds {wrong[0].item():g}; a mask is 1 where a token counts and 0 elsewhere, and is not one to add to scores"
    )
