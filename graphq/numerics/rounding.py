"""Rounding that is learned: AutoRound (Cheng et al., arXiv 2309.05516, equations 3 to 5 and algorithm 1).

A code is round(w / scale + v) + zero_point, with an offset v of each element from -1/2 to 1/2; a block's range is
[alpha low, beta high], with shares of its extremes from 0 to 1. Rounding passes gradients on as they come, clamping
those from inside the range (straight-through); descent takes the gradients' signs alone.
"""

from collections.abc import Sequence
from typing import Final

from jaxtyping import Float
from torch import Tensor

from graphq.numerics.blocks import beside_scales, expand_scale
from graphq.numerics.scales import Scales, code_range, computed, scale_from_extremes
from graphq.spec.formats import Int

OFFSETS: Final = (-0.5, 0.5)
SHARES: Final = (0.01, 1.0)  # a share of 0 leaves no range, whose scale has no gradient to come back by


def ranged(low: Tensor, high: Tensor, format: Int) -> tuple[Tensor, Tensor | None]:
    """``scale_from_extremes`` with gradients; the zero point is in the scale's dtype."""
    scale, codes = scale_from_extremes(low, high, format)
    if codes is None:
        return scale, None
    exact = code_range(format)[0] - low.clamp(max=0) / scale
    return scale, _straight_through(codes.to(scale.dtype), exact)


def rounded(
    w: Float[Tensor, "*shape"],
    v: Float[Tensor, "*shape"],
    scale: Tensor,
    zero_point: Tensor | None,
    format: Int,
    block: Sequence[int],
) -> Float[Tensor, "*shape"]:
    """``dequantize(quantize(offset(w, v, scale)))`` with gradients for ``v``, scale and zero point."""
    x, (s, z) = beside_scales(computed(w), (scale, zero_point), block)
    assert s is not None
    y = (x + v.view(x.shape) * s) / s  # as in ``offset`` and then in ``quantize``
    if z is None:
        q = _straight_through(y.detach().round(), y)
    elif format.joint:
        q = _straight_through((y + z).detach().round(), y + z)
    else:
        q = _straight_through(y.detach().round(), y) + z
    q = q.clamp(*code_range(format))
    return (q * s if z is None else (q - z) * s).view(w.shape)


def offset(
    w: Float[Tensor, "*shape"], v: Float[Tensor, "*shape"], scale: Tensor, block: Sequence[int]
) -> Float[Tensor, "*shape"]:
    """``w + v scale``: what is rounded to nearest in the place of ``w``."""
    return computed(w) + v * expand_scale(scale, w, block)


def extremes_of(scales: Scales, format: Int) -> tuple[Tensor, Tensor]:
    """Extremes of blocks to which these scales and zero points belong, up to rounding."""
    lowest, highest = code_range(format)
    scale, zero_point, _ = scales
    if zero_point is None:
        high = scale * ((highest - lowest) / 2 if format.divisor == "half" else float(highest))
        return -high, high
    zero = zero_point.to(scale.dtype)
    return (lowest - zero) * scale, (highest - zero) * scale


def descended(x: Tensor, gradient: Tensor, rate: float, bounds: tuple[float, float]) -> Tensor:
    """``x`` after one step of signed gradient descent, within its bounds."""
    return (x - rate * gradient.sign()).clamp(*bounds)


def rate_at(step: int, steps: int, lr: float) -> float:
    """The learning rate of step 0, 1, ...: it falls from ``lr`` in a line that ends at 0."""
    return lr * (1 - step / steps)


def _straight_through(value: Tensor, by: Tensor) -> Tensor:
    """``value``, exactly, with the gradient of ``by``."""
    return value.detach() + (by - by.detach())
