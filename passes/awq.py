"""Weights scaled by what their inputs are worth, and clipped, before they are rounded.

Lin et al., AWQ, arXiv 2306.00978, equations 4 and 5: an input's channels are divided, and its weights multiplied, by
x^ratio, where x is the channel's mean magnitude, or with ``duo`` by x^ratio / w^(1 - ratio); the ratio is searched for.
Where the paper runs the model for each candidate, the error on all data follows here from second moments.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor, fx

from graphq import edit
from graphq.formats import Float, Int
from graphq.layers import PLAN
from graphq.numerics import awq, fake_quantize, weight_block
from graphq.numerics.ranges import weight_scales
from graphq.passes.annotate import annotated
from graphq.passes.labels import Reader, is_own
from graphq.passes.observe import Wanted, weight_quants
from graphq.passes.quantize_weights import with_weights
from graphq.passes.scaled import Group, Where, chosen_layers, groups, names_of, scale
from graphq.passes.statistics import (
    CONVOLUTIONS,
    ChannelObserver,
    HessianObserver,
    as_problems,
    as_weight,
    channels,
    hessians,
    seen_by,
)
from graphq.pipeline import Batches, Pass
from graphq.quant import MinMax, Mse, PerChannel, PerGroup, Quant
from graphq.state import tensor_of
from graphq.views import GroupedLinear, Op, Param, Weighted

RANGE: Final = MinMax()


@final
@dataclass(frozen=True)
class AWQ(Pass):
    """The weights of the layers ``only`` (None: of all with a plan) are scaled, input by input, so that rounding them
    changes their outputs least; the inputs are scaled back where they are made. Then ranges are clipped.

    All readers of an input share its factors; each is judged by its own plan, and those that stay float by none.

    n_grid: how many ratios from 0 to 1 are tried. duo: with the weights' magnitudes, without, or ``None`` for both.
    clip: whether weights are clamped to the range of the least output error: of layers with min-max ranges by channel
        or group that are not in ``unclipped``.
    where: see ``SmoothQuant``.
    """

    only: frozenset[str] | None = None
    n_grid: int = 20
    duo: bool | None = None
    clip: bool = True
    unclipped: frozenset[str] = frozenset()
    where: Where = "fold"
    note: Callable[[str], None] | None = None
    name: ClassVar[str] = "awq"
    requires: ClassVar = (annotated, with_weights)

    def wanted(self, gm: fx.GraphModule) -> Iterator[Wanted]:
        """The mean magnitudes of each channel of the inputs, and their second moments."""
        chosen = chosen_layers(gm, self.only)
        yield from channels(gm, chosen)
        yield from hessians(gm, chosen)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = 0
        scaled: dict[Op, Tensor] = {}  # what the channels of a layer's input were divided by
        moments = {op: self._moments(gm, op) for op in chosen_layers(gm, self.only)}
        for group in list(groups(gm, self.only, self.where, self.note)):
            found = self._search(gm, group, moments)
            if found is not None:
                count += scale(gm, group, found, self.name)
                for reader in group.chosen:
                    scaled[reader.op] = group.at(torch.where(group.moved, found, 1.0), reader.channels)
        if self.clip:
            for op, hessian in moments.items():
                count += self._clip(gm, op, _divided(op, hessian, scaled.get(op)))
        return count

    def _moments(self, gm: fx.GraphModule, op: Weighted) -> Tensor:
        seen = seen_by(gm, op, HessianObserver, self.name)
        assert isinstance(seen, HessianObserver)
        return seen.mean()

    def _search(self, gm: fx.GraphModule, group: Group, moments: dict[Weighted, Tensor]) -> Tensor | None:
        """The factors of the least error; None where none are better than 1."""
        judged = [_Judged(gm, group, reader, moments[reader.op]) for reader in group.chosen]
        judged = [one for one in judged if one.quants]
        if not judged:
            return None
        labels = [one.reader.channels for one in judged]
        activations = group.by_label([one.activations(gm, self.name) for one in judged], labels, "mean")
        weights = group.by_label([one.columns() for one in judged], labels, "mean")
        activations, weights = (torch.where(group.moved, v, 1.0) for v in (activations, weights))
        best, least = None, sum(one.error(torch.ones_like(activations)) for one in judged)
        for duo in (False, True) if self.duo is None else (self.duo,):
            for i in range(self.n_grid + 1):
                tried = awq.factors(activations, weights if duo else None, i / self.n_grid)
                error = sum(one.error(tried) for one in judged)
                if error < least:
                    best, least = tried, error
        return best

    def _clip(self, gm: fx.GraphModule, op: Weighted, hessian: Tensor) -> int:
        quants = set(weight_quants(op.node.meta[PLAN]))
        param = op.weight_op
        if len(quants) != 1 or not isinstance(param, Param) or not is_own(gm, param):
            return 0
        (quant,) = quants
        if quant is None or not _can_clip(quant) or not self.unclipped.isdisjoint(names_of(op)):
            return 0
        size = quant.granularity.size if isinstance(quant.granularity, PerGroup) else -1
        old = tensor_of(gm, param.fqn).detach()
        if isinstance(op, CONVOLUTIONS) and size > 0:
            return 0
        w = as_problems(old.float(), op)
        new = as_weight(awq.clipped(w, hessian, quant.format, [1, 1, size]), op, old).to(old.dtype)
        if torch.equal(new, old):
            return 0
        edit.set_param(gm, param.fqn, lambda _: new.contiguous(), self.name)
        return 1


def _can_clip(quant: Quant) -> bool:
    return (
        isinstance(quant.format, Int | Float)
        and isinstance(quant.granularity, PerChannel | PerGroup)
        and isinstance(quant.method, MinMax)
    )


def _divided(op: Weighted, hessian: Tensor, factors: Tensor | None) -> Tensor:
    """The second moments of an input whose channels were divided by ``factors``."""
    if factors is None:
        return hessian
    per_vector = _per_vector(op, 1 / factors).to(hessian.dtype)
    return hessian * per_vector[..., :, None] * per_vector[..., None, :]


def _per_vector(op: Weighted, values: Tensor) -> Tensor:
    """Values of an input's channels as those of the vectors that a weight multiplies: [B or 1, K]."""
    if isinstance(op, CONVOLUTIONS):
        taps = op.weight_op.val.shape[2:].numel()
        return values.view(int(op.argument("groups")), -1).repeat_interleave(taps, 1)
    return values[None]


@final
class _Judged:
    """A layer that has a say in a group's factors."""

    def __init__(self, gm: fx.GraphModule, group: Group, reader: Reader, hessian: Tensor) -> None:
        self.group = group
        self.reader = reader
        self.op = reader.op
        self.hessian = hessian
        self.w = tensor_of(gm, reader.weight.fqn).detach().float()
        quants = weight_quants(self.op.node.meta[PLAN])
        members: dict[Quant, list[int]] = {}
        for index, quant in enumerate(quants):
            if quant is not None:
                members.setdefault(quant, []).append(index)
        self.quants = members

    def activations(self, gm: fx.GraphModule, by: str) -> Tensor:
        seen = seen_by(gm, self.op, ChannelObserver, by)
        assert isinstance(seen, ChannelObserver)
        return seen.mean

    def columns(self) -> Tensor:
        quant = next(iter(self.quants))
        found = awq.relative_columns(self.w, self._block(quant), self.op.in_axis)
        if isinstance(self.op, CONVOLUTIONS) and int(self.op.argument("groups")) > 1:
            return found.repeat(int(self.op.argument("groups")))
        return found

    def _block(self, quant: Quant) -> list[int]:
        return weight_block(quant.granularity, self.w.dim(), self.op.out_axis, self.op.in_axis, self.op.own_axes)

    def error(self, factors: Tensor) -> float:
        """The squared output error of rounding the weights multiplied by ``factors``, on the inputs divided by them."""
        own = self.group.at(factors, self.reader.weight.labels).float()
        is_stack = isinstance(self.op, GroupedLinear)
        total = 0.0
        for quant, members in self.quants.items():
            pick = members if is_stack else slice(None)
            w, by = self.w[pick], own[pick]
            scaled = w * by
            block = self._block(quant)
            method = quant.method if isinstance(quant.method, Mse) else RANGE
            found = weight_scales(scaled, quant.format, block, method)
            back = fake_quantize(scaled, found, quant.format, block)
            problems = as_problems((back - scaled) / by, self.op)
            total += float(awq.output_error(problems, self.hessian[pick] if is_stack else self.hessian).sum())
        return total
