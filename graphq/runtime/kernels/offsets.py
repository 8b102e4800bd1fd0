"""Where the rows of each expert lie, in a tensor in which those of one follow those of another."""

from torch import Tensor

from graphq.errors import PassError


def bounds(offsets: Tensor, experts: int, rows: int) -> list[tuple[int, int]]:
    """The first row of each expert and the one after its last. Raises ``PassError`` for offsets that do not cut
    ``rows`` rows into as many parts, one after the other.
    """
    ends: list[int] = offsets.tolist()
    if offsets.dim() != 1 or len(ends) != experts:
        raise PassError(f"{offsets.numel()} offsets for {experts} experts")
    starts = [0, *ends[:-1]]
    if any(not first <= last <= rows for first, last in zip(starts, ends, strict=True)):
        raise PassError(f"offsets {ends} do not divide {rows} rows")
    return list(zip(starts, ends, strict=True))
