"""Scales and zero points by half-quadratic steps, which leave the outliers of the error to themselves.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs, 2023): the least
sum |w - s (q - z)|^p over z is split by an auxiliary e into two problems, solved in turn with a beta that grows:

    e = shrink(w - s (q - z)),  shrink(x) = sign(x) max(|x| - |x|^(p - 1) / beta, 0)
    z = mean(q - (w - e) / s)

What differs here. Zero points are integers, as every format needs. Rounded, that z is min-max's own in nearly every
block, so the second step fits s, too: w - e by least squares as s (q - z). Then z is rounded, and as many steps fit s
alone: s = sum((w - e) v) / sum(v^2) for v = q - z; formats without a zero point have these alone. Errors are shrunk in
units of the scale, so that the scales of 2 w are twice those of w. And a block takes the result of a step of the last
kind only where that has the least sum |w - w_q|^p so far, min-max to begin with.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from graphq.numerics.blocks import block_sum, expand_scale
from graphq.numerics.codes import code_values, quantize
from graphq.numerics.scales import Scales, choose_scale, code_dtype, code_range, computed
from graphq.spec.formats import Float, Int
from graphq.spec.quant import Hqq

_AT_A_TIME: Final = 1 << 18  # elements: what a processor's cache holds of a few float32 tensors


def hqq_scales(w: Tensor, format: Int | Float, block: Sequence[int], method: Hqq) -> Scales:
    """The scales, and the zero points of asymmetric formats, of the blocks of ``w``; none worse than min-max."""
    found = [_of_rows(computed(rows), format, block, method) for rows in _split(w, block)]
    scale = torch.cat([part.scale for part in found])
    zeros = [part.zero_point for part in found if part.zero_point is not None]
    return Scales(scale, torch.cat(zeros) if zeros else None)


def _split(w: Tensor, block: Sequence[int]) -> Sequence[Tensor]:
    """Whole blocks of rows, of about ``_AT_A_TIME`` elements where blocks do not take all rows."""
    if block[0] < 0 or w.numel() <= _AT_A_TIME:
        return [w]
    rows = max(1, _AT_A_TIME * w.shape[0] // w.numel())
    return w.split(-(-rows // block[0]) * block[0])


def _of_rows(w: Tensor, format: Int | Float, block: Sequence[int], method: Hqq) -> Scales:
    best = choose_scale(w, format, block)
    least = _loss(_errors(w, best, format, block)[0], block, method)
    scale, zero_point, _ = best
    if isinstance(format, Int) and zero_point is not None:
        scale, zero_point = _fit(w, scale, zero_point, format, block, method)
    for beta in [*_betas(method), None]:
        error, v = _errors(w, Scales(scale, zero_point), format, block)
        loss = _loss(error, block, method)
        better = loss < least
        least = torch.where(better, loss, least)
        zeros = best.zero_point
        if zeros is not None and zero_point is not None:
            zeros = torch.where(better, zero_point, zeros)
        best = Scales(torch.where(better, scale, best.scale), zeros)
        if beta is not None:
            step = expand_scale(scale, w, block)
            kept = w - shrink(error / step, method.norm, beta) * step
            scale = _usable(block_sum(kept * v, block) / block_sum(v.square(), block), scale)
    return best


def _betas(method: Hqq) -> list[float]:
    return [method.beta * method.growth**step for step in range(method.steps)]


def shrink(x: Tensor, norm: float, beta: float) -> Tensor:
    """sign(x) max(|x| - |x|^(norm - 1) / beta, 0): generalized soft-thresholding."""
    size = x.abs()
    return (size - size.pow(norm - 1) / beta).clamp_(min=0).mul_(x.sign())


def _errors(w: Tensor, scales: Scales, format: Int | Float, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    """``w`` less what its codes stand for, and what these stand for in units of the scale."""
    v = code_values(quantize(w, scales, format, block), format, w.dtype)
    if scales.zero_point is not None:
        v -= expand_scale(scales.zero_point.to(w.dtype), w, block)
    return w - v * expand_scale(scales.scale, w, block), v


def _loss(error: Tensor, block: Sequence[int], method: Hqq) -> Tensor:
    return block_sum(error.abs().pow_(method.norm), block)


def _usable(fitted: Tensor, before: Tensor) -> Tensor:
    return torch.where(fitted >= torch.finfo(fitted.dtype).tiny, fitted, before)  # not where all codes are 0: 0 / 0


def _fit(
    w: Tensor, scale: Tensor, zero_point: Tensor, format: Int, block: Sequence[int], method: Hqq
) -> tuple[Tensor, Tensor]:
    """Scale and zero point after the half-quadratic steps for both, the zero point rounded to a code."""
    lowest, highest = code_range(format)
    z = zero_point.to(w.dtype)
    count = block_sum(torch.ones_like(w), block)
    for beta in _betas(method):
        step, beside = expand_scale(scale, w, block), expand_scale(z, w, block)
        y = w / step
        q = (y + beside).round_().clamp_(lowest, highest)
        kept = (y - shrink(y - (q - beside), method.norm, beta)) * step
        mean_q, mean_kept = (block_sum(x, block) / count for x in (q, kept))
        q0 = q - expand_scale(mean_q, w, block)
        scale = _usable(block_sum(kept * q0, block) / block_sum(q0.square(), block), scale)
        z = mean_q - mean_kept / scale
    return scale, z.round().clamp(lowest, highest).to(code_dtype(format))
