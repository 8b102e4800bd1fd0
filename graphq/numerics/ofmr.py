"""AMCT's OFMR: of eleven powers of two, the scale whose error in the layer's own output is the least.

A candidate's loss is the mean squared error of the output over a batch, summed in float64 and taken to float32, added
over the batches. A weight's is measured with the float input, for each output channel where channels have scales of
their own; an activation's with the float weight. Of equal losses the smallest scale wins; a loss of NaN counts as
infinite.
"""

from typing import Final

import torch
from torch import Tensor

from graphq.numerics.scales import scale_from_extremes
from graphq.spec.formats import Format

AROUND: Final = 5


def candidates(low: Tensor, high: Tensor, format: Format, relative: bool) -> Tensor:
    """The eleven exponents ``[11, *blocks]`` to try for blocks that span ``low`` to ``high``, smallest first.

    From -5 to 5, or so many around the smallest power of two that leaves nothing above the format's full scale.
    """
    steps = torch.arange(-AROUND, AROUND + 1, device=low.device).view(-1, *[1] * low.dim())
    if not relative:
        return steps.expand(-1, *low.shape)
    scale, _ = scale_from_extremes(low, high, format)
    fraction, exponent = torch.frexp(scale)
    return exponent - (fraction == 0.5).int() + steps


def loss(error: Tensor, axis: int | None) -> Tensor:
    """The mean square of an output's error, a number, or one for each index of ``axis``; float32."""
    square = error.double().square_()
    if axis is None:
        return (square.sum() / square.numel()).float()
    others = [a for a in range(error.dim()) if a != axis % error.dim()]
    return (square.sum(others) / square.numel() if others else square).float()


def best(losses: Tensor) -> Tensor:
    """The index of the least loss along the first axis: the first of equal ones, which is the smallest scale."""
    return torch.where(losses.isnan(), torch.inf, losses).argmin(0)
