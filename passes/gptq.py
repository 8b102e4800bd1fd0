"""Weights as codes, by rounding with error feedback (Frantar et al., GPTQ, arXiv 2210.17323)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, fx

from graphq import numerics
from graphq.ir import edit
from graphq.ir.matrices import as_matrices, as_weight, input_key
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import GroupedLinear, Param, Recurrence, Weighted
from graphq.ir.weight_parts import QuantizedWeight, WeightPart, quantize_weight
from graphq.numerics import gptq
from graphq.numerics.ranges import searched_scales
from graphq.numerics.scales import effective_scale
from graphq.observers.observer import ObserverRequest
from graphq.observers.statistics import HessianObserver, hessians, required_statistic
from graphq.passes.annotate import annotated
from graphq.passes.quantize_weights import (
    PlannedWeight,
    beyond_match,
    planned_reads,
    planned_weights,
    replace_weight,
    with_weights,
)


@final
@dataclass(frozen=True)
class GPTQ(Pass):
    """Every planned weight of the layers ``only`` (None: of all) is codes, rounded column by column.

    Layers that read the same activation share its Hessian and its factor, and are rounded as one matrix. Embeddings
    and the weights of states in recurrences are left alone.

    block_size: columns that are rounded before the others take up their error; it changes the speed alone.
    act_order: ``static`` rounds the columns of the largest activations first, with the scales of their own groups
        (compressed-tensors' ``weight``); ``none`` keeps their order.
    dampening: what is added to the Hessian's diagonal, in means of it; ten times more where it is not definite.
    scales: ``plan`` takes the range that the format's own method gives, ``search`` the one whose error, weighted by the
        activations' second moments, is least, where the method is min-max.
    min_samples: an expert that fewer tokens reached is rounded to nearest, which is noted.
    """

    only: frozenset[str] | None = None
    block_size: int = 128
    act_order: Literal["static", "none"] = "static"
    dampening: float = 0.01
    scales: Literal["search", "plan"] = "search"
    min_samples: int = 32
    record: Callable[[str, float], None] | None = None
    note: Callable[[str], None] | None = None
    name: ClassVar[str] = "gptq"
    requires: ClassVar = (annotated, with_weights)

    def observer_requests(self, gm: fx.GraphModule) -> Iterator[ObserverRequest]:
        """One Hessian for each activation that layers read alike."""
        yield from hessians(gm, [op for reads in planned_reads(gm, self.only) for op in _uses(reads)])

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        groups: dict[object, list[PlannedWeight]] = {}
        for layer in planned_weights(gm, self.only):
            uses = _uses(layer.reads)
            if uses:
                groups.setdefault(tuple(input_key(op) for op in uses), []).append(layer)
            elif self.note is not None and isinstance(layer.site.op, Recurrence):
                self.note(f"{layer.site.path}: rounded to nearest: the states that it multiplies are not observed")
        count = 0
        for layers in groups.values():
            if self.note is not None:
                for line in beyond_match(layers, self.only, self.name):
                    self.note(line)
            hessian, counts = self._hessian(gm, layers[0])
            made = self._round(layers, hessian, counts)
            for layer, codes in zip(layers, made, strict=True):
                replace_weight(gm, layer, codes, self.name, self.record)
                count += 1
        if count:
            edit.drop_unused(gm)
        return count

    def _hessian(self, gm: fx.GraphModule, layer: PlannedWeight) -> tuple[Tensor, Tensor]:
        """The mean of x xT over all uses of a layer, and how many vectors there were."""
        seen = [required_statistic(gm, op, HessianObserver, self.name) for op in _uses(layer.reads)]
        distinct = list({id(s): s for s in seen if isinstance(s, HessianObserver)}.values())
        sums, counts = sum(s.sums for s in distinct), sum(s.counts for s in distinct)
        assert isinstance(sums, Tensor)
        assert isinstance(counts, Tensor)
        return sums / counts.clamp(min=1)[:, None, None], counts

    def _round(
        self, layers: Sequence[PlannedWeight], hessian: Tensor, counts: Tensor
    ) -> list[list[QuantizedWeight | None]]:
        """The codes of the parts of each layer. Parts that are of the same members are rounded as one matrix."""
        made: list[list[QuantizedWeight | None]] = [[None] * len(layer.parts) for layer in layers]
        stacks: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for i, layer in enumerate(layers):
            for j, part in enumerate(layer.parts):
                if part.quant is not None:
                    stacks.setdefault(part.members, []).append((i, j))
        for members, places in stacks.items():
            is_stack = isinstance(layers[0].site.op, GroupedLinear)
            h, n = (hessian[list(members)], counts[list(members)]) if is_stack else (hessian, counts)
            few = n < self.min_samples if is_stack else n < 1
            self._note_few_tokens(layers, places, members, n, few)
            pieces = [_Piece(layers[i], layers[i].parts[j], h, self.scales == "search") for i, j in places]
            stacked = torch.cat([piece.w for piece in pieces], 1)
            rows: list[gptq.Rows] = []
            first = 0
            for piece in pieces:
                rows.append(piece.rows(first))
                first += piece.w.shape[1]
            found, damped = gptq.compensate(
                stacked,
                h,
                rows,
                dampening=self.dampening,
                act_order=self.act_order == "static",
                block_size=self.block_size,
            )
            found = torch.where(few[:, None, None], stacked.float(), found)
            self._note_dampening(layers, places, damped)
            for (i, j), piece, own in zip(places, pieces, rows, strict=True):
                made[i][j] = piece.codes(found[:, own.first : own.last])
        return made

    def _note_few_tokens(
        self,
        layers: Sequence[PlannedWeight],
        places: Sequence[tuple[int, int]],
        members: Sequence[int],
        counts: Tensor,
        few: Tensor,
    ) -> None:
        if self.note is None:
            return
        for i, _ in places:
            for position in few.nonzero().flatten().tolist():
                fqns = layers[i].site.fqns
                fqn = fqns[members[position]] if layers[i].site.is_stack else fqns[0]
                self.note(f"{fqn}: rounded to nearest: {int(counts[position])} tokens reached it in calibration")

    def _note_dampening(
        self, layers: Sequence[PlannedWeight], places: Sequence[tuple[int, int]], damped: Tensor
    ) -> None:
        if self.note is None or not bool((damped > self.dampening * 1.001).any()):
            return
        for i, _ in places:
            self.note(
                f"{layers[i].site.path}: its Hessian is not positive definite: dampening {float(damped.max()):g}"
                f" instead of {self.dampening:g}"
            )


@final
class _Piece:
    """A part of a layer as rows of a matrix, with its scales."""

    def __init__(self, layer: PlannedWeight, part: WeightPart, hessian: Tensor, search: bool) -> None:
        assert part.quant is not None
        self.op = layer.site.op
        self.part = part
        self.quant = part.quant
        self.w = as_matrices(part.w, self.op)
        scales = part.scales
        if scales is None and search:
            importance = hessian.diagonal(dim1=-2, dim2=-1)[:, None, :].expand(self.w.shape)
            weights = as_weight(importance, self.op, part.w)
            scales = searched_scales(part.w, weights, self.quant.format, part.block, self.quant.method)
        self.scales = part.limited(scales) if scales else quantize_weight(part).scales

    def rows(self, first: int) -> gptq.Rows:
        quant = self.quant
        scale = numerics.expand_scale(
            effective_scale(self.scales, quant.format, torch.float32), self.part.w, self.part.block
        ).expand(self.part.w.shape)
        zero = self.scales.zero_point
        if zero is not None:
            zero = numerics.expand_scale(zero, self.part.w, self.part.block).expand(self.part.w.shape)
        return gptq.Rows(
            first,
            first + self.w.shape[1],
            quant.format,
            as_matrices(scale, self.op),
            None if zero is None else as_matrices(zero, self.op),
        )

    def codes(self, w: Tensor) -> QuantizedWeight:
        whole = as_weight(w, self.op, self.part.w)
        return quantize_weight(self.part, whole.contiguous(), self.scales)


def _uses(reads: Sequence[Param]) -> list[Weighted]:
    """The ops that multiply an input by a layer's weight; none where one of them does something else."""
    ops = [user for read in reads for user in read.users]
    products = [op for op in ops if isinstance(op, Weighted) and op.is_product]
    return products if len(products) == len(ops) else []
