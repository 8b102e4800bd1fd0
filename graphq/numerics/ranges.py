"""Weight ranges that are searched for: percentile, squared error, least squares; half-quadratic ones are in ``hqq``.

A weight is at hand as a whole, so each block's scale is found by trying. All are free of loops over blocks.
"""

from collections.abc import Callable, Sequence
from typing import Final, assert_never

import torch
from torch import Tensor

from graphq.errors import PassError
from graphq.numerics.blocks import block_extremes, block_sum, expand_scale, scale_shape, split_blocks
from graphq.numerics.codes import fake_quantize
from graphq.numerics.hqq import hqq_scales
from graphq.numerics.scales import Scales, choose_scale, code_range, computed, scale_from_extremes
from graphq.spec.formats import Float, Format, Int
from graphq.spec.quant import Entropy, Histogram, Hqq, MinMax, MovingAverage, Mse, Ofmr, Percentile, RangeMethod, Ssz

_HALVES: Final = [2.0**-step for step in range(5)]  # the scales that AMD Quark's PowerOfTwoMethod.MinMSE tries
_SEARCH: Final = Mse(norm=2.0, grid=20, shrink=0.6, patience=20)  # 1, 0.95, ... 0.45


def weight_scales(w: Tensor, format: Format, block: Sequence[int], method: RangeMethod) -> Scales:
    """The scales of a weight's blocks by ``method``. Raises ``PassError`` for those that need more than the weight."""
    match method:
        case MinMax():
            return choose_scale(w, format, block)
        case Mse():
            return Scales(*scale_from_extremes(*mse_extremes(w, format, block, method), format))
        case Percentile(percent):
            symmetric = not isinstance(format, Int) or format.symmetric
            return Scales(*scale_from_extremes(*percentile_extremes(w, block, percent, symmetric), format))
        case Ssz(steps):
            assert isinstance(format, Int)
            return Scales(ssz_scale(w, format, block, steps))
        case Hqq():
            assert isinstance(format, Int | Float)
            return hqq_scales(w, format, block, method)
        case Ofmr():
            raise PassError("ofmr measures the layer's output, which needs calibration")
        case MovingAverage() | Histogram() | Entropy():
            raise PassError(f"{method} is for activations, seen batch by batch")
        case _:
            assert_never(method)


def searched_scales(
    w: Tensor, importance: Tensor, format: Format, block: Sequence[int], method: RangeMethod
) -> Scales | None:
    """The scales of the blocks of ``w`` for which sum importance * (w - w_q)^2 is least, of extremes shrunk in steps.

    ``importance``: broadcast to ``w``, such as each input's mean square. None for other methods than min-max, and for
    formats whose scales do not follow from extremes.
    """
    if not isinstance(method, MinMax) or not isinstance(format, Int | Float):
        return None
    return Scales(*scale_from_extremes(*mse_extremes(w, format, block, _SEARCH, importance), format))


def _error(w: Tensor, scales: Scales, format: Format, block: Sequence[int], f: Callable[[Tensor], Tensor]) -> Tensor:
    back = fake_quantize(w, scales, format, block)
    return block_sum(f(back.sub_(w).abs_()), block)


def mse_extremes(
    w: Tensor, format: Format, block: Sequence[int], method: Mse, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each block's extremes, shrunk to where sum importance |w - w_q|^norm is least; of equal ones the widest.

    As llm-compressor's ``memoryless_mse`` observer: candidates 1 - i / grid, given up for all blocks when no block was
    improved ``patience`` times in turn. Of scales that are powers of two, the extremes and four halvings of them.
    """

    def power(e: Tensor) -> Tensor:
        e = e.square_() if method.norm == 2 else e.pow_(method.norm)
        return e if importance is None else e.mul_(importance)

    w = computed(w)
    low, high = block_extremes(w, block)
    best = torch.full(low.shape, torch.inf, dtype=w.dtype, device=w.device)
    best_low, best_high = low.clone(), high.clone()
    waited = 0
    shares = [1 - step / method.grid for step in range(int(method.shrink * method.grid))]
    if isinstance(format, Int) and format.power_of_two:  # halving the range alone gives another scale
        shares = _HALVES
    for share in shares:
        tried_low, tried_high = low * share, high * share
        scales = Scales(*scale_from_extremes(tried_low, tried_high, format))
        error = _error(w, scales, format, block, power)
        better = error < best
        if better.any():
            best = torch.where(better, error, best)
            best_low, best_high = torch.where(better, tried_low, best_low), torch.where(better, tried_high, best_high)
            waited = 0
        else:
            waited += 1
            if waited >= method.patience:
                break
    return best_low, best_high


def percentile_extremes(w: Tensor, block: Sequence[int], percent: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The range of each block that leaves out (100 - percent) % of its elements, rounded down to whole elements:
    of the largest magnitudes, or half of them at each end.
    """
    if any(1 < b < size for size, b in zip(w.shape, block, strict=True)):
        raise PassError("percentile: blocks of a few elements have no percentiles; one scale per tensor or channel has")
    shape = scale_shape(w.shape, block)
    if w.numel() == 0:
        return w.new_zeros(shape), w.new_zeros(shape)
    split, inner = split_blocks(computed(w), block)
    kept = [axis for axis in range(split.dim()) if axis not in inner]
    rows = split.permute(*kept, *inner).reshape(*[split.shape[axis] for axis in kept], -1)
    size = rows.shape[-1]
    outside = int((100.0 - percent) / 100.0 * size + 1e-9)
    if symmetric:
        top = rows.abs().kthvalue(size - outside).values.view(shape)
        return -top, top
    half = outside // 2
    return rows.kthvalue(half + 1).values.view(shape), rows.kthvalue(size - half).values.view(shape)


def ssz_scale(w: Tensor, format: Int, block: Sequence[int], steps: int) -> Tensor:
    """The scale of each block after up to ``steps`` rounds of least squares, each block's best one by squared error.

    Codes are fitted to the scale by rounding, then the scale to the codes: sum(w q) / sum(q^2). Neither makes the
    squared error larger, and the search ends when no code changes.
    """
    w = computed(w)
    lowest, highest = code_range(format)
    scale = choose_scale(w, format, block).scale
    best = scale
    least = torch.full_like(scale, torch.inf)
    before: Tensor | None = None
    for _ in range(steps):
        q = torch.round(w / expand_scale(scale, w, block)).clamp_(lowest, highest)
        error = block_sum((q * expand_scale(scale, w, block)).sub_(w).square_(), block)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
        if before is not None and torch.equal(q, before):
            break
        before = q
        fitted = block_sum(w * q, block) / block_sum(q.square(), block)
        scale = torch.where(fitted.isfinite() & (fitted > 0), fitted, scale)
    return best
