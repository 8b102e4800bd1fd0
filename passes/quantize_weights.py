"""Weights as codes, by round-to-nearest."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor, fx

from graphq import numerics
from graphq.capture.source import SHARED, source_of
from graphq.errors import GraphError, PassError
from graphq.ir import edit
from graphq.ir.biases import Biased, bias_of
from graphq.ir.layers import PLAN, Site, sites
from graphq.ir.matrices import scale_block
from graphq.ir.pipeline import Batches, Invariant, Pass
from graphq.ir.views import Dequantize, Op, Param, ops_of
from graphq.numerics import Scales
from graphq.numerics.ranges import weight_scales
from graphq.numerics.source_arithmetic import source_codes, source_scales
from graphq.passes.annotate import annotated
from graphq.passes.observe import observer_on, weight_observer_on
from graphq.spec.formats import Int, Nvfp4
from graphq.spec.plan import input_quants, weight_quants
from graphq.spec.quant import Ofmr, PerChannel, PerTensor, Quant
from graphq.state import nbytes, release_freed, remove_tensor, same_tensors, tensor_of


@final
@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as codes. The scales have the codes' rank; ``block`` as in ``graphq.numerics.blocks``."""

    codes: Tensor
    scales: Scales
    block: list[int]


def _dataless(gm: fx.GraphModule) -> str | None:
    return None if edit.has_data(gm) else "the model was captured without its weights"


_AT_A_TIME: Final = 1 << 28  # bytes of float weights


with_weights = Invariant("weights", _dataless)


@final
@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Every planned weight is read through ``graphq::dequantize``, and no float copy of it is left.

    A weight that is tied to another and planned alike shares its codes and scales. A stack of experts has one
    ``dequantize`` for each distinct plan. nvfp4 layers that read the same activation, which
    runtimes fuse (q, k and v; gate and up), share their global scale. ``record`` is told each layer's signal to
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
        for layer in planned_weights(gm, self.only):
            fqn = layer.site.param.fqn
            key = (first.get(fqn, fqn), *((part.quant, tuple(part.block)) for part in layer.parts))
            parts, made = held.get(key, ((), []))
            if len(parts) != len(layer.parts) or not all(map(_have_same_scales, parts, layer.parts)):
                made = [None if part.quant is None else quantize_weight(part) for part in layer.parts]
                if fqn in tied:
                    held.setdefault(key, (layer.parts, made))
            replace_weight(gm, layer, made, self.name, self.record)
            count += 1
            freed += sum(nbytes(part.w) for part in layer.parts)
            if freed > _AT_A_TIME:
                freed = 0
                release_freed()
        if count:
            edit.drop_unused(gm)
            release_freed()
        return count


@final
@dataclass(frozen=True)
class WeightPart:
    """The members of a stack that have one plan, or a whole weight. ``quant`` is None for those that stay float.

    ``scales``: those that do not follow from the weight alone. ``least``: what none of them may be below, in their
    shape. ``own_axes``: those whose indices are weights of their own (experts). ``source_dtype``: that of the model's
    weights where it came from, in which a quant's arithmetic may be. ``scale_dtype``: that which scales are stored in.
    """

    members: tuple[int, ...]
    quant: Quant | None
    w: Tensor
    block: list[int]
    scales: Scales | None
    own_axes: tuple[int, ...] = ()
    least: Tensor | None = None
    source_dtype: torch.dtype = torch.float32
    scale_dtype: torch.dtype = torch.float32

    def limited(self, scales: Scales) -> Scales:
        """``scales``, none below ``least``, and as they will be stored."""
        assert self.quant is not None
        if self.least is not None:
            assert isinstance(self.quant.format, Int)
            scales = numerics.at_least(scales, self.least, self.quant.format)
        return numerics.rounded_scales(scales, self.quant.format, self.scale_dtype)


def quantize_weight(part: WeightPart, w: Tensor | None = None, scales: Scales | None = None) -> QuantizedWeight:
    """A planned part's weight, or ``w`` in its place, rounded to nearest: with ``scales``, those of the part, or those
    that the quant's method gives each block. Blocks of zeros have scales that leave their bias alone.

    The arithmetic is the quant's, and float32 for a ``w`` that an algorithm made: it has rounded so before.
    """
    assert part.quant is not None
    format, block = part.quant.format, part.block
    if part.quant.arithmetic == "source":
        scales = scales or source_scales(part.w, part.source_dtype, format, block, part.quant.method)
        scales = numerics.rounded_scales(scales, format, part.scale_dtype)
        if w is None:
            return QuantizedWeight(source_codes(part.w, part.source_dtype, scales, format, block), scales, block)
        return QuantizedWeight(numerics.quantize(w, scales, format, block), scales, block)
    w = part.w if w is None else w
    scales = part.limited(scales or part.scales or weight_scales(w, format, block, part.quant.method))
    codes = numerics.quantize(w, scales, format, block)
    scales = numerics.scales_of_zeros(codes, scales, format, block, part.own_axes, part.least)
    return QuantizedWeight(codes, part.limited(scales), block)


@final
@dataclass(frozen=True)
class PlannedWeight:
    """A weight that is to be quantized: its first use, the nodes that read it, and its parts."""

    site: Site
    reads: tuple[Param, ...]
    parts: tuple[WeightPart, ...]


def planned_weights(gm: fx.GraphModule, only: frozenset[str] | None = None) -> Iterator[PlannedWeight]:
    """The weights with a plan that are held as floats, in graph order; ``only``: those of these layers.

    A parameter that other parts of a model hold, too, is left to the whole.
    """
    layers = _layers(gm)
    reads = _reads(gm)
    amax = _fused_extremes(gm, layers.values())
    for fqn, site in layers.items():
        if _is_planned(site, only):
            w = tensor_of(gm, fqn).detach()
            check_finite(w, site)
            quants = weight_quants(site.op.node.meta.get(PLAN))
            yield PlannedWeight(site, tuple(reads[fqn]), tuple(_parts(gm, site, quants, w, amax.get(fqn))))


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
    gm: fx.GraphModule, site: Site, quants: Sequence[Quant | None], w: Tensor, amax: Tensor | None
) -> Iterator[WeightPart]:
    plans: dict[Quant | None, list[int]] = {}
    for index, quant in enumerate(quants):
        plans.setdefault(quant, []).append(index)
    op = site.op
    for quant, members in plans.items():
        part = w if len(plans) == 1 else w[members]  # a copy: only stacks have several plans
        if quant is None:
            yield WeightPart(tuple(members), None, part, [], None)
            continue
        block = scale_block(op, quant.granularity)
        own = amax if amax is None or len(plans) == 1 else amax[members]
        scales = _given_scales(gm, site, quant, part, block, own)
        least = _least_scales(gm, site, quant, part)
        source = source_of(gm)
        own_axes = tuple(op.own_axes)
        yield WeightPart(tuple(members), quant, part, block, scales, own_axes, least, source.dtype, source.scales)


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
            kept = torch.nn.Parameter(part.w, requires_grad=False)
            parts.append(edit.add_tensor(gm, first, f"{path}.weight", kept, by, site.op, of=site.param.fqn))
            continue
        parts.append(hold_codes(gm, first, path, part.quant, codes, part.w.dtype, site.op, by))
        if record is not None:
            _report(record, site, part, codes)
    whole = parts[0] if len(parts) == 1 else _join(gm, first, site, [p.members for p in layer.parts], parts, by)
    for read in layer.reads:
        edit.bypass(gm, read, whole)


def _report(record: Callable[[str, float], None], site: Site, part: WeightPart, made: QuantizedWeight) -> None:
    assert part.quant is not None
    approximation = numerics.dequantize(made.codes, made.scales, part.quant.format, made.block)
    for position, member in enumerate(part.members):
        pick = position if site.is_stack else ...
        record(site.fqns[member], numerics.sqnr_db(part.w[pick], approximation[pick]))


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


def _fused_extremes(gm: fx.GraphModule, layers: Iterable[Site]) -> dict[str, Tensor]:
    """The largest magnitude of each nvfp4 weight and of those that read the same input, by the weight's name; of a
    stack, one for each expert.
    """
    groups: dict[Op, list[Site]] = {}
    for site in layers:
        if any(q is not None and isinstance(q.format, Nvfp4) for q in weight_quants(site.op.node.meta.get(PLAN))):
            groups.setdefault(site.op.input_op, []).append(site)
    found: dict[str, Tensor] = {}
    for fused in groups.values():
        own: list[Tensor] = []
        for site in fused:
            w = tensor_of(gm, site.param.fqn).detach()
            check_finite(w, site)
            own.append(w.abs().flatten(1).amax(1) if site.is_stack else w.abs().amax().view(1))
        for site, amax in zip(fused, own, strict=True):
            found[site.param.fqn] = torch.stack([o for o in own if o.shape == amax.shape]).amax(0)
    return found


def _given_scales(
    gm: fx.GraphModule, site: Site, quant: Quant, w: Tensor, block: list[int], amax: Tensor | None
) -> Scales | None:
    """The scales that do not follow from the weight alone: those under a shared global one, or from calibration."""
    if isinstance(quant.format, Nvfp4):
        assert amax is not None
        shape = [amax.numel() if axis in site.op.own_axes else 1 for axis in range(w.dim())]
        return numerics.choose_scale(w, quant.format, block, numerics.nvfp4_global_scale(amax).view(shape))
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


def check_finite(w: Tensor, site: Site) -> None:
    """Raises ``GraphError`` naming the layer, or the first expert, whose weight holds NaN or Inf."""
    if not torch.isfinite(w).all():
        wrong = [fqn for i, fqn in enumerate(site.fqns) if not torch.isfinite(w[i] if site.is_stack else w).all()]
        raise GraphError(f"{wrong[0]}: the weight holds NaN or Inf")


def _join(gm: fx.GraphModule, before: Op, site: Site, plans: Sequence[Sequence[int]], parts: list[Op], by: str) -> Op:
    """The experts of all parts in their own order."""
    joined = edit.insert(gm, before, torch.ops.aten.cat.default, parts, 0, by=by, like=site.op)
    order = [expert for members in plans for expert in members]
    if order == sorted(order):
        return joined
    place = torch.tensor([order.index(expert) for expert in range(len(order))])
    index = edit.add_tensor(gm, before, f"{site.path}.expert_order", place, by=by, like=site.op)
    return edit.insert(gm, before, torch.ops.aten.index_select.default, joined, 0, index, by=by, like=site.op)
