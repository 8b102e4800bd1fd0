"""Weights as codes, by round-to-nearest."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor, fx

from graphq import numerics
from graphq.capture.source import SHARED, source_of
from graphq.deferred import Stacked
from graphq.errors import GraphError, PassError
from graphq.ir import edit
from graphq.ir.biases import Biased, bias_of
from graphq.ir.layers import PLAN, Site, sites
from graphq.ir.matrices import scale_block
from graphq.ir.pipeline import Batches, Invariant, Pass
from graphq.ir.views import Dequantize, Op, Param, ops_of
from graphq.ir.weight_parts import (
    DeferredPart,
    FusedExtremes,
    Latest,
    QuantizedWeight,
    WeightPart,
    check_finite,
    deferred_codes,
    fused_scales,
    quantize_weight,
    report_noise,
)
from graphq.numerics import Scales
from graphq.passes.annotate import annotated
from graphq.passes.observe import observer_on, weight_observer_on
from graphq.spec.formats import Int, Nvfp4
from graphq.spec.plan import input_quants, weight_quants
from graphq.spec.quant import Ofmr, PerChannel, PerTensor, Quant
from graphq.state import (
    as_parameter,
    deferred_of,
    held_tensor,
    nbytes,
    read_tensor,
    release_freed,
    remove_tensor,
    same_tensors,
    tensor_of,
)


def _dataless(gm: fx.GraphModule) -> str | None:
    return None if edit.has_data(gm) else "the model was captured without its weights"


_AT_A_TIME: Final = 1 << 28  # bytes of float weights


with_weights = Invariant("weights", _dataless)


@final
@dataclass(frozen=True)
class PlannedWeight:
    """A weight that is to be quantized: its first use, the nodes that read it, and its parts."""

    site: Site
    reads: tuple[Param, ...]
    parts: tuple[WeightPart, ...]


@final
@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Every planned weight is read through ``graphq::dequantize``, and no float copy of it is left.

    A weight that is tied to another and planned alike shares its codes and scales. A stack of experts has one
    ``dequantize`` for each distinct plan. nvfp4 layers that read the same activation, which
    runtimes fuse (q, k and v; gate and up), share their global scale. Codes and scales of a weight that is deferred are
    deferred, too. ``record`` is told each layer's signal to
    quantization noise ratio in dB; ``only``: the weights of these layers. Weights with NaN or Inf raise ``GraphError``.
    """

    record: Callable[[str, float], None] | None = None
    only: frozenset[str] | None = None
    name: ClassVar[str] = "quantize-weights"
    requires: ClassVar[tuple[Invariant, ...]] = (annotated, with_weights)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = 0
        first = same_tensors(gm)
        tied = {*first, *first.values()}
        # The codes of those that others are tied to, and what they were made of.
        held: dict[tuple[object, ...], tuple[tuple[WeightPart, ...], list[QuantizedWeight | None]]] = {}
        freed = 0
        latest = Latest()
        for layer in planned_weights(gm, self.only, deferred=True):
            fqn = layer.site.param.fqn
            key = (first.get(fqn, fqn), *((part.quant, tuple(part.block)) for part in layer.parts))
            parts, made = held.get(key, ((), []))
            if len(parts) != len(layer.parts) or not all(map(_have_same_scales, parts, layer.parts)):
                made = [self._codes(gm, layer, part, latest) for part in layer.parts]
                if fqn in tied:
                    held.setdefault(key, (layer.parts, made))
            replace_weight(gm, layer, made, self.name, self.record)
            count += 1
            freed += sum(nbytes(part.w) for part in layer.parts if deferred_of(part.w) is None)
            if freed > _AT_A_TIME:
                freed = 0
                release_freed()
        if count:
            edit.drop_unused(gm)
            release_freed()
        return count

    def _codes(
        self, gm: fx.GraphModule, layer: PlannedWeight, part: WeightPart, latest: Latest
    ) -> QuantizedWeight | None:
        if part.quant is None:
            return None
        if deferred_of(part.w) is None:
            return quantize_weight(part)
        return deferred_codes(DeferredPart(layer.site, part, self.record, latest), edit.fake_mode_of(gm))


def planned_weights(
    gm: fx.GraphModule, only: frozenset[str] | None = None, deferred: bool = False, bare: bool = False
) -> Iterator[PlannedWeight]:
    """The weights with a plan that are held as floats, in graph order; ``only``: those of these layers.

    A parameter that other parts of a model hold, too, is left to the whole. With ``deferred`` those that are not read
    yet stay so, as fake tensors. ``bare``: nothing is said of their scales.
    """
    layers = _layers(gm)
    reads = _reads(gm)
    extremes = None if bare else FusedExtremes(gm, layers.values())
    for fqn, site in layers.items():
        if _is_planned(site, only):
            held = held_tensor(gm, fqn)
            w = held if deferred and deferred_of(held) is not None else read_tensor(held).detach()
            if w is not held:
                check_finite(w, site)
            quants = weight_quants(site.op.node.meta.get(PLAN))
            yield PlannedWeight(site, tuple(reads[fqn]), tuple(_parts(gm, site, quants, w, extremes)))


def beyond_match(layers: Iterable[PlannedWeight], only: frozenset[str] | None, by: str) -> Iterator[str]:
    """A line for each stack that ``by`` rounds whole, though ``only`` has some of its planned experts alone."""
    for layer in layers:
        planned = {layer.site.fqns[member] for part in layer.parts if part.quant for member in part.members}
        if layer.site.is_stack and only is not None and not planned <= only:
            count = f"{len(planned & only)} of {len(planned)}"
            yield f"{layer.site.path}: {by} rounds all experts of the stack, of which its match has {count}"


def planned_reads(gm: fx.GraphModule, only: frozenset[str] | None = None) -> Iterator[tuple[Param, ...]]:
    """The nodes that read each weight of ``planned_weights``, whose scales need not be known yet."""
    reads = _reads(gm)
    for fqn, site in _layers(gm).items():
        if _is_planned(site, only):
            yield tuple(reads[fqn])


def _have_same_scales(a: WeightPart, b: WeightPart) -> bool:
    """Whether two parts with the same weight and quant have the same scales: given alike, and limited alike."""
    if a.scales is None and a.amax is not None and b.amax is not None and not torch.equal(a.amax(), b.amax()):
        return False
    pairs = [*zip(a.scales or (None,) * 3, b.scales or (None,) * 3, strict=True), (a.least, b.least)]
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)


def _layers(gm: fx.GraphModule) -> dict[str, Site]:
    """The first use of each weight that this graph alone holds, by the weight's name."""
    layers: dict[str, Site] = {}
    for site in sites(gm):
        if site.param.fqn not in gm.meta.get(SHARED, ()):
            layers.setdefault(site.param.fqn, site)
    return layers


def _reads(gm: fx.GraphModule) -> dict[str, list[Param]]:
    reads: dict[str, list[Param]] = {}
    for op in ops_of(gm):
        if isinstance(op, Param):
            reads.setdefault(op.fqn, []).append(op)
    return reads


def _is_planned(site: Site, only: frozenset[str] | None) -> bool:
    if only is not None and only.isdisjoint(site.fqns):
        return False
    return any(quant is not None for quant in weight_quants(site.op.node.meta.get(PLAN)))


def _parts(
    gm: fx.GraphModule, site: Site, quants: Sequence[Quant | None], w: Tensor, extremes: FusedExtremes | None
) -> Iterator[WeightPart]:
    plans: dict[Quant | None, list[int]] = {}
    for index, quant in enumerate(quants):
        plans.setdefault(quant, []).append(index)
    op = site.op
    for quant, members in plans.items():
        part = w if len(plans) == 1 else _members(gm, w, members)  # a copy: only stacks have several plans
        if quant is None:
            yield WeightPart(tuple(members), None, part, [], None)
            continue
        block = scale_block(op, quant.granularity)
        if extremes is None:
            yield WeightPart(tuple(members), quant, part, block, None, tuple(op.own_axes))
            continue
        amax = extremes.of(site.param.fqn, members) if isinstance(quant.format, Nvfp4) else None
        scales = _given_scales(gm, site, quant, part, block, amax)
        least = _least_scales(gm, site, quant, part)
        source = source_of(gm)
        own_axes = tuple(op.own_axes)
        yield WeightPart(tuple(members), quant, part, block, scales, own_axes, least, source.dtype, source.scales, amax)


def _members(gm: fx.GraphModule, w: Tensor, members: Sequence[int]) -> Tensor:
    deferred = deferred_of(w)
    if deferred is None:
        return w[members]
    parts = Stacked(tuple(deferred.member(member) for member in members))
    return edit.deferred_tensor(gm, parts, w.dtype)


def replace_weight(
    gm: fx.GraphModule,
    layer: PlannedWeight,
    made: Sequence[QuantizedWeight | None],
    by: str,
    record: Callable[[str, float], None] | None = None,
) -> None:
    """The layer reads the codes ``made`` of its parts (None: the part stays float), and its float weight is gone."""
    site = layer.site
    first = min((user for read in layer.reads for user in read.users), key=lambda op: op.node)  # in graph order
    remove_tensor(gm, site.param.fqn)
    parts: list[Op] = []
    for number, (part, codes) in enumerate(zip(layer.parts, made, strict=True)):
        path = site.path if len(layer.parts) == 1 else f"{site.path}.part{number}"
        if codes is None or part.quant is None:
            kept = as_parameter(part.w)
            parts.append(edit.add_tensor(gm, first, f"{path}.weight", kept, by, site.op, of=site.param.fqn))
            continue
        parts.append(hold_codes(gm, first, path, part.quant, codes, part.w.dtype, site.op, by))
        if record is not None and deferred_of(part.w) is None:
            report_noise(record, site, part, codes)
    whole = parts[0] if len(parts) == 1 else _join(gm, first, site, [p.members for p in layer.parts], parts, by)
    for read in layer.reads:
        edit.bypass(gm, read, whole)


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
    """Codes, scales and zero point as buffers under ``path``, and the op that reads them as a weight of ``dtype``.

    Raises ``GraphError`` where the model has tensors of these names.
    """
    for name in ("weight_scale", "weight_zero_point", "weight_global_scale"):  # whichever of them this format has
        if edit.has_tensor(gm, f"{path}.{name}"):
            raise GraphError(
                f"{path}.{name}: the model has a tensor of this name, which graphq gives to the quantized weight of"
                f" {path}; rename it"
            )
    codes = edit.add_tensor(gm, before, f"{path}.weight", made.codes, by=by, like=like)
    scales = [
        None if part is None else edit.add_tensor(gm, before, f"{path}.weight_{name}", part, by=by, like=like)
        for name, part in zip(("scale", "zero_point", "global_scale"), made.scales, strict=True)
    ]
    arguments = (codes, *scales, str(quant.format), made.block, dtype)
    return edit.insert(gm, before, Dequantize.target, *arguments, by=by, like=like)


def _given_scales(
    gm: fx.GraphModule, site: Site, quant: Quant, w: Tensor, block: list[int], amax: Callable[[], Tensor] | None
) -> Scales | None:
    """The scales that do not follow from the weight alone: those under a shared global one, or from calibration. Those
    of a deferred weight that need its numbers are not there yet.
    """
    if amax is not None:
        if deferred_of(w) is not None:
            return None
        return fused_scales(w, quant, block, site.op.own_axes, amax(), source_of(gm).dtype)
    if isinstance(quant.method, Ofmr):
        observer = weight_observer_on(gm, site.op)
        if observer is None or not observer.has_observed:
            raise PassError(f"{site.path}: {quant} was not calibrated")
        return observer.scales()
    return None


def _least_scales(gm: fx.GraphModule, site: Site, quant: Quant, w: Tensor) -> Tensor | None:
    """The smallest scales that leave a runtime room for the layer's bias, where its input has a static integer scale.

    None where there is no such limit, and for the conventions of other tools, whose scales are kept.
    """
    op, format = site.op, quant.format
    (given, *_) = input_quants(op.node.meta.get(PLAN))
    is_own = isinstance(format, Int) and format.divisor == "max" and not format.joint and quant.arithmetic == "float32"
    if not is_own or not isinstance(quant.granularity, PerChannel | PerTensor) or not isinstance(op, Biased):
        return None
    bias = bias_of(op)
    if given is None or given.dynamic or not isinstance(given.format, Int) or not isinstance(bias, Param):
        return None
    observer = observer_on(gm, op.input_op, given)
    if observer is None or not observer.has_observed:
        return None
    least = numerics.least_for_bias(tensor_of(gm, bias.fqn).detach(), observer.scales().scale.flatten())
    shape = numerics.scale_shape(w.shape, scale_block(op, quant.granularity))
    return least.view(shape) if least.numel() == math.prod(shape) else least.amax().view([1] * w.dim())


def _join(gm: fx.GraphModule, before: Op, site: Site, plans: Sequence[Sequence[int]], parts: list[Op], by: str) -> Op:
    """The experts of all parts in their own order."""
    joined = edit.insert(gm, before, torch.ops.aten.cat.default, parts, 0, by=by, like=site.op)
    order = [expert for members in plans for expert in members]
    if order == sorted(order):
        return joined
    place = torch.tensor([order.index(expert) for expert in range(len(order))])
    index = edit.add_tensor(gm, before, f"{site.path}.expert_order", place, by=by, like=site.op)
    return edit.insert(gm, before, torch.ops.aten.index_select.default, joined, 0, index, by=by, like=site.op)
