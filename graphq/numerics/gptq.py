"""Rounding with error feedback: GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1).

Columns are rounded one after the other; what rounding one column adds to the layer's output on the calibration data is
taken back by the columns that are not rounded yet, as the inverse of the Hessian H = E[x xT] of the squared output
error says. Scales are those of the blocks of the columns in their own places, found beforehand. All functions take a
leading axis of independent problems: experts, or the groups of a convolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from graphq.numerics.codes import round_scaled
from graphq.spec.formats import Format

ESCALATION: Final = 10.0
MOST_DAMPENING: Final = 1.0


@final
@dataclass(frozen=True)
class Rows:
    """Rows ``first`` to ``last`` of the stacked weights, and how they are rounded.

    ``scale`` [B, n, K]: each element's own, effective scale (``graphq.numerics.scales.effective_scale``);
    ``zero_point`` alike, or None.
    """

    first: int
    last: int
    format: Format
    scale: Tensor
    zero_point: Tensor | None


def factor(hessian: Tensor, dampening: float) -> tuple[Tensor, Tensor]:
    """The upper factor U [B, K, K] of the inverse of the dampened Hessian, H^-1 = UT U, and the dampening [B] it took.

    ``dampening`` times the mean of H's diagonal is added to the diagonal; ten times more, up to the mean itself, while
    H is not positive definite. Where that does not help, U is the identity, with which GPTQ rounds to nearest, and the
    dampening is infinite. Columns that no input reaches, with a diagonal of 0, neither give nor take errors.
    """
    h = hessian.double()
    diagonal = h.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    h = h + torch.diag_embed(dead.to(h.dtype))
    mean = h.diagonal(dim1=-2, dim2=-1).mean(-1)
    eye = torch.eye(h.shape[-1], dtype=h.dtype, device=h.device)
    upper = eye.expand_as(h).clone()
    taken = torch.full(h.shape[:1], torch.inf, dtype=h.dtype, device=h.device)
    share = dampening
    while share <= MOST_DAMPENING * (1 + 1e-9) and taken.isinf().any():
        # H = R RT with R upper, by the Cholesky factor of H turned by half a turn; then U = R^-1.
        turned = (h + (share * mean)[:, None, None] * eye).flip(-1, -2)
        low, info = torch.linalg.cholesky_ex(turned)
        good = (info == 0) & taken.isinf() & low.isfinite().all(-1).all(-1)
        if good.any():
            inverse = torch.linalg.solve_triangular(low[good], eye.expand(int(good.sum()), -1, -1), upper=False)
            upper[good] = inverse.flip(-1, -2)
            taken[good] = share
        share = max(share, 1e-4) * ESCALATION
    return upper.float(), taken


def order_of(hessian: Tensor) -> Tensor:
    """The columns [B, K] by falling diagonal of the Hessian (the ``act-order`` of the authors' code)."""
    return hessian.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)


def compensate(
    w: Tensor, hessian: Tensor, rows: Sequence[Rows], *, dampening: float, act_order: bool, block_size: int
) -> tuple[Tensor, Tensor]:
    """``w`` [B, N, K] as it is when each column is rounded, which gives its codes, and the dampening taken [B].

    ``hessian`` [B, K, K]. Columns that no input reaches round to nearest.
    """
    order = order_of(hessian) if act_order else None
    columns = w.float().transpose(1, 2).contiguous()  # [B, K, N]: a column's rows lie together
    h = hessian
    parts = [(r, _as_columns(r.scale), None if r.zero_point is None else _as_columns(r.zero_point)) for r in rows]
    if order is not None:
        columns = _picked(columns, order)
        h = torch.stack([one[o][:, o] for one, o in zip(hessian, order, strict=True)])
        parts = [(r, _picked(s, order), None if z is None else _picked(z, order)) for r, s, z in parts]
    upper, taken = factor(h, dampening)
    count = columns.shape[1]
    for start in range(0, count, block_size):
        end = min(start + block_size, count)
        _round_block(columns, upper, parts, start, end)
    if order is not None:
        columns = torch.empty_like(columns).scatter_(1, order[..., None].expand_as(columns), columns)
    return columns.transpose(1, 2), taken


def _as_columns(x: Tensor) -> Tensor:
    return x.float().transpose(1, 2).contiguous()


def _picked(columns: Tensor, order: Tensor) -> Tensor:
    return columns.gather(1, order[..., None].expand(-1, -1, columns.shape[-1]))


def _round_block(
    columns: Tensor, upper: Tensor, parts: Sequence[tuple[Rows, Tensor, Tensor | None]], start: int, end: int
) -> None:
    """Columns ``start`` to ``end`` become what is rounded; the later ones take their errors back."""
    errors = torch.empty_like(columns[:, start:end])
    block = columns[:, start:end]
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    for i in range(end - start):
        w = block[:, i]
        error = errors[:, i]
        for part, scale, zero_point in parts:
            own, s = w[:, part.first : part.last], scale[:, start + i]
            z = None if zero_point is None else zero_point[:, start + i]
            q = round_scaled(own / s, z, part.format)
            q = q.mul_(s) if z is None else q.sub_(z).mul_(s)
            torch.sub(own, q, out=error[:, part.first : part.last])
        error.div_(diagonal[:, start + i, None])
        if i + 1 < end - start:
            weights = upper[:, start + i, start + i + 1 : end]
            block[:, i + 1 :].baddbmm_(weights[..., None], error[:, None, :], alpha=-1)
    if end < columns.shape[1]:
        columns[:, end:].baddbmm_(upper[:, start:end, end:].transpose(1, 2), errors, alpha=-1)
