"""Activation-aware scales and ranges of weights (Lin et al., AWQ, arXiv 2306.00978).

Errors are those of the outputs on all calibration data: an error D [N, K] of a weight, whose inputs have second moments
H [K, K], makes a mean squared output error of tr(D H DT) in sum over the outputs.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from graphq.numerics.blocks import beside_scales, block_extremes, expand_scale
from graphq.numerics.codes import fake_quantize
from graphq.numerics.scales import Scales, scale_from_extremes
from graphq.spec.formats import Format, Int

_SMALLEST: Final = 1e-4
SHARES: Final = tuple(1 - i / 20 for i in range(11))


def factors(activations: Tensor, weights: Tensor | None, ratio: float) -> Tensor:
    """The factors that weights are multiplied by before they are rounded: x^ratio, or x^ratio / w^(1 - ratio).

    ``activations`` [K]: mean magnitudes; ``weights`` [K]: mean magnitudes within their blocks' largest. The factors lie
    evenly around 1: sqrt(max * min) is 1.
    """
    found = activations.clamp(min=0).double() ** ratio
    if weights is not None:
        found = found / (weights.double() ** (1 - ratio) + _SMALLEST)
    found = found.clamp(min=_SMALLEST)
    found = found / (found.max() * found.min()).sqrt()
    return torch.where(found.isfinite() & (found > 0), found, 1.0)


def relative_columns(w: Tensor, block: Sequence[int], in_axis: int) -> Tensor:
    """The mean over all else of each input's weights, as shares of their blocks' largest magnitude: [K]."""
    _, high = block_extremes(w.abs(), block)
    shares = w.abs() / (expand_scale(high, w, block) + 1e-6)
    return shares.movedim(in_axis, -1).flatten(0, -2).mean(0) if w.dim() > 1 else shares


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """tr(D H DT) of ``error`` [B, N, K] with ``hessian`` [B, K, K], for each of the B."""
    return ((error @ hessian.to(error.dtype)) * error).sum((-2, -1))


def clip_steps(w: Tensor, hessian: Tensor, format: Format, block: Sequence[int]) -> Tensor:
    """For each block along the last axis of ``w`` [B, N, K] which of ``SHARES`` of its range has the least output
    error when ``w`` is clamped to it: uint8.

    The block's own second moments weigh its error. ``block`` is [1, 1, size] or [1, 1, -1].
    """
    size = w.shape[2] if block[2] < 0 else min(block[2], w.shape[2])
    low, high = _range(w, format, block)
    least, best = torch.full_like(low, torch.inf), torch.zeros_like(low, dtype=torch.uint8)
    for step, share in enumerate(SHARES):
        tried = _clamped(w, low * share, high * share, block)
        scales = Scales(*scale_from_extremes(*block_extremes(tried, block), format))  # as when it is rounded at last
        error = fake_quantize(tried, scales, format, block) - w
        losses: list[Tensor] = []
        for first in range(0, w.shape[2], size):
            part = error[:, :, first : first + size]
            own = hessian[:, first : first + size, first : first + size].to(part.dtype)
            losses.append(((part @ own) * part).sum(-1))
        loss = torch.stack(losses, -1)
        best = torch.where(loss < least, step, best)
        least = torch.minimum(loss, least)
    return best


def clipped(w: Tensor, steps: Tensor, format: Format, block: Sequence[int]) -> Tensor:
    """``w`` [B, N, K] clamped to the shares of its blocks' ranges that ``clip_steps`` gives."""
    low, high = _range(w, format, block)
    shares = torch.tensor(SHARES, dtype=low.dtype)[steps.long()]
    return _clamped(w, low * shares, high * shares, block)


def _range(w: Tensor, format: Format, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The extremes of each block, of which the larger one is on both sides where the format is symmetric."""
    low, high = block_extremes(w, block)
    if isinstance(format, Int) and not format.symmetric:
        return low, high
    high = torch.maximum(low.abs(), high.abs())
    return -high, high


def _clamped(w: Tensor, low: Tensor, high: Tensor, block: Sequence[int]) -> Tensor:
    x, (bottom, top) = beside_scales(w, (low, high), block)
    assert bottom is not None
    assert top is not None
    return torch.maximum(torch.minimum(x, top), bottom).view(w.shape)
