"""Weights as codes, by round-to-nearest with min-max scales."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, fx

from graphq import edit, numerics
from graphq.errors import GraphError
from graphq.formats import PerExpert, Plan, Quant
from graphq.layers import PLAN, Site, sites
from graphq.passes.annotate import annotated
from graphq.pipeline import Batches, Invariant, Pass
from graphq.state import remove_tensor, tensor_of
from graphq.views import Dequantize, Op, Param, ops_of


@final
@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as codes. ``scale`` and ``zero_point`` have the codes' rank; ``block`` as in ``graphq.numerics``."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    block: list[int]


def quantize_weight(w: Tensor, quant: Quant, block: list[int]) -> QuantizedWeight:
    """``w`` rounded to nearest, with the scales that span the extremes of each block."""
    scale, zero_point = numerics.choose_scale(w, quant.format, block)
    return QuantizedWeight(numerics.quantize(w, scale, zero_point, quant.format, block), scale, zero_point, block)


def _dataless(gm: fx.GraphModule) -> str | None:
    return None if edit.has_data(gm) else "the model was captured without its weights"


with_weights = Invariant("weights", _dataless)


@final
@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Every planned weight is read through ``graphq::dequantize``, and no float copy of it is left.

    A stack of experts has one ``dequantize`` for each distinct plan. ``record`` is told each layer's signal to
    quantization noise ratio in dB. Weights with NaN or Inf raise ``GraphError``.
    """

    record: Callable[[str, float], None] | None = None
    name: ClassVar[str] = "quantize-weights"
    requires: ClassVar[tuple[Invariant, ...]] = (annotated, with_weights)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        layers: dict[str, Site] = {}
        for site in sites(gm):
            layers.setdefault(site.param.fqn, site)
        reads: dict[str, list[Param]] = {}
        for op in ops_of(gm):
            if isinstance(op, Param):
                reads.setdefault(op.fqn, []).append(op)
        count = 0
        for fqn, site in layers.items():
            quants = _weight_quants(site)
            if any(quant is not None for quant in quants):
                self._quantize(gm, site, quants, reads[fqn])
                count += 1
        edit.drop_unused(gm)
        return count

    def _quantize(self, gm: fx.GraphModule, site: Site, quants: Sequence[Quant | None], reads: Sequence[Param]) -> None:
        w = tensor_of(gm, site.param.fqn).detach()
        _check_finite(w, site)
        first = min((user for read in reads for user in read.users), key=lambda op: op.node)  # in graph order
        remove_tensor(gm, site.param.fqn)
        plans: dict[Quant | None, list[int]] = {}
        for index, quant in enumerate(quants):
            plans.setdefault(quant, []).append(index)
        parts: list[Op] = []
        for number, (quant, members) in enumerate(plans.items()):
            path = site.path if len(plans) == 1 else f"{site.path}.part{number}"
            part = w if len(plans) == 1 else w[members]  # a copy: only stacks have several plans
            if quant is None:
                kept = torch.nn.Parameter(part, requires_grad=False)
                parts.append(edit.add_tensor(gm, first, f"{path}.weight", kept, by=self.name, like=site.op))
                continue
            op = site.op
            block = numerics.weight_block(quant.granularity, w.dim(), op.out_axis, op.in_axis, op.own_axes)
            made = quantize_weight(part, quant, block)
            parts.append(hold_codes(gm, first, path, quant, made, w.dtype, site.op, self.name))
            self._report(site, members, part, made)
        whole = parts[0] if len(parts) == 1 else _join(gm, first, site, list(plans.values()), parts, self.name)
        for read in reads:
            edit.bypass(gm, read, whole)

    def _report(self, site: Site, members: Sequence[int], w: Tensor, made: QuantizedWeight) -> None:
        if self.record is None:
            return
        approximation = numerics.dequantize(made.codes, made.scale, made.zero_point, made.block)
        for position, member in enumerate(members):
            pick = position if site.is_stack else ...
            self.record(site.fqns[member], numerics.sqnr_db(w[pick], approximation[pick]))


def hold_codes(
    gm: fx.GraphModule,
    before: Op,
    path: str,
    quant: Quant,
    made: QuantizedWeight,
    dtype: torch.dtype,
    like: Op,
    by: str,
) -> Op:
    """Codes, scale and zero point as buffers under ``path``, and the op that reads them as a weight of ``dtype``."""
    codes = edit.add_tensor(gm, before, f"{path}.weight", made.codes, by=by, like=like)
    scale = edit.add_tensor(gm, before, f"{path}.weight_scale", made.scale, by=by, like=like)
    zero_point = None
    if made.zero_point is not None:
        zero_point = edit.add_tensor(gm, before, f"{path}.weight_zero_point", made.zero_point, by=by, like=like)
    arguments = (codes, scale, zero_point, None, str(quant.format), made.block, dtype)
    return edit.insert(gm, before, Dequantize.target, *arguments, by=by, like=like)


def _weight_quants(site: Site) -> tuple[Quant | None, ...]:
    decision = site.op.node.meta[PLAN]
    decisions = decision.decisions if isinstance(decision, PerExpert) else (decision,)
    return tuple(d.weight if isinstance(d, Plan) else None for d in decisions)


def _check_finite(w: Tensor, site: Site) -> None:
    if not torch.isfinite(w).all():
        wrong = [fqn for i, fqn in enumerate(site.fqns) if not torch.isfinite(w[i] if site.is_stack else w).all()]
        raise GraphError(f"{wrong[0]}: the weight holds NaN or Inf")


def _join(gm: fx.GraphModule, before: Op, site: Site, plans: list[list[int]], parts: list[Op], by: str) -> Op:
    """The experts of all parts in their own order."""
    joined = edit.insert(gm, before, torch.ops.aten.cat.default, parts, 0, by=by, like=site.op)
    order = [expert for members in plans for expert in members]
    if order == sorted(order):
        return joined
    place = torch.tensor([order.index(expert) for expert in range(len(order))])
    index = edit.add_tensor(gm, before, f"{site.path}.expert_order", place, by=by, like=site.op)
    return edit.insert(gm, before, torch.ops.aten.index_select.default, joined, 0, index, by=by, like=site.op)
