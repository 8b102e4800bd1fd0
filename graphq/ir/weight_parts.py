"""Weights that are quantized as one, their codes and scales, and how these are made when they are read."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphq import numerics
from graphq.deferred import Deferred, Stacked
from graphq.errors import GraphError
from graphq.ir.layers import PLAN, Site
from graphq.ir.stored_codes import QuantizedWeight, kept_codes
from graphq.ir.views import Op
from graphq.numerics import Scales
from graphq.numerics.ranges import weight_scales
from graphq.numerics.source_arithmetic import source_codes, source_global_scale, source_scales
from graphq.spec.formats import Int, Nvfp4, SourceFormat
from graphq.spec.plan import weight_quants
from graphq.spec.quant import Mse, Quant
from graphq.state import defer, deferred_of, held_tensor


@final
@dataclass(frozen=True)
class WeightPart:
    """The members of a stack that have one plan, or a whole weight. ``quant`` is None for those that stay float.

    ``scales``: those that do not follow from the weight alone. ``least``: what none of them may be below, in their
    shape. ``own_axes``: those whose indices are weights of their own (experts). ``source_dtype``: that of the model's
    weights where it came from, in which a quant's arithmetic may be. ``scale_dtype``: that which scales are stored in.
    ``amax``: the largest magnitudes that follow from several weights.
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
    amax: Callable[[], Tensor] | None = None

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
    return _finished(part, _rounded(part, w, scales))


def _rounded(part: WeightPart, w: Tensor | None = None, scales: Scales | None = None) -> QuantizedWeight:
    """``quantize_weight``, but for the scales of blocks of zeros, which follow from the other blocks."""
    assert part.quant is not None
    format, block = part.quant.format, part.block
    if part.quant.arithmetic == "source":
        assert isinstance(format, SourceFormat)
        scales = scales or part.scales or source_scales(part.w, part.source_dtype, format, block, part.quant.method)
        scales = numerics.rounded_scales(scales, format, part.scale_dtype)
        if w is None:
            return QuantizedWeight(source_codes(part.w, part.source_dtype, scales, format, block), scales, block)
        return QuantizedWeight(numerics.quantize(w, scales, format, block), scales, block)
    w = part.w if w is None else w
    scales = part.limited(scales or part.scales or _searched(part, w))
    codes = numerics.quantize(w, scales, format, block)
    return QuantizedWeight(codes, scales, block)


def _searched(part: WeightPart, w: Tensor) -> Scales:
    """Scales by the quant's method. A search that ends by all blocks of a weight is one for each expert."""
    assert part.quant is not None
    method = part.quant.method
    each = w.split(1) if part.own_axes and isinstance(method, Mse) else (w,)
    found = [weight_scales(one, part.quant.format, part.block, method) for one in each]
    return _joined(found)


def _joined(parts: Sequence[Scales], upper: bool = True) -> Scales:
    """The scales of weights or rows one after the other; without ``upper`` the global scale is that of all of them."""
    if len(parts) == 1:
        return parts[0]
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    globals_ = [part.global_scale for part in parts if part.global_scale is not None]
    joined = torch.cat(globals_) if globals_ and upper else next(iter(globals_), None)
    return Scales(torch.cat([part.scale for part in parts]), torch.cat(zeros) if zeros else None, joined)


def _finished(part: WeightPart, made: QuantizedWeight) -> QuantizedWeight:
    assert part.quant is not None
    if part.quant.arithmetic == "source":
        return made
    format, block = part.quant.format, part.block
    scales = numerics.scales_of_zeros(made.codes, made.scales, format, block, part.own_axes, part.least)
    return QuantizedWeight(made.codes, part.limited(scales), block)


def check_finite(w: Tensor, site: Site, members: Sequence[int] | None = None) -> None:
    """Raises ``GraphError`` naming the layer, or the first expert, whose weight holds NaN or Inf.

    ``members``: the experts that ``w`` is of, if not all.
    """
    if not torch.isfinite(w).all():
        own = site.fqns if members is None else [site.fqns[member] for member in members]
        wrong = [fqn for i, fqn in enumerate(own) if not torch.isfinite(w[i] if site.is_stack else w).all()]
        raise GraphError(f"{wrong[0]}: the weight holds NaN or Inf")


def report_noise(record: Callable[[str, float], None], site: Site, part: WeightPart, made: QuantizedWeight) -> None:
    """Each layer's signal to quantization noise ratio is recorded."""
    assert part.quant is not None
    approximation = numerics.dequantize(made.codes, made.scales, part.quant.format, made.block)
    for position, member in enumerate(part.members):
        pick = position if site.is_stack else ...
        record(site.fqns[member], numerics.sqnr_db(part.w[pick], approximation[pick]))


def fused_scales(
    w: Tensor, quant: Quant, block: list[int], own_axes: Sequence[int], amax: Tensor, source_dtype: torch.dtype
) -> Scales:
    """The scales of an nvfp4 weight under the global one of those that share ``amax``: one number, or one an expert."""
    shape = [amax.numel() if axis in own_axes else 1 for axis in range(w.dim())]
    if quant.arithmetic == "source":
        assert isinstance(quant.format, Nvfp4)
        whole = source_global_scale(amax, source_dtype).view(shape)
        return source_scales(w, source_dtype, quant.format, block, quant.method, whole)
    return numerics.choose_scale(w, quant.format, block, numerics.nvfp4_global_scale(amax).view(shape))


# -- made when they are read


class Latest:
    """The weight that was made last: its codes and its scales are read one after the other, and made once."""

    def __init__(self) -> None:
        self.key: object = None
        self.made: QuantizedWeight | None = None


@final
@dataclass(frozen=True, eq=False)
class DeferredPart:
    """A part whose weight is deferred, and who is told its noise when it is made."""

    site: Site
    part: WeightPart
    record: Callable[[str, float], None] | None
    latest: Latest = field(repr=False)

    def made(self, index: int | None = None) -> QuantizedWeight:
        """The part as codes, or its expert at ``index``. Raises ``GraphError`` for NaN and Inf."""
        if self.latest.key != (self, index) or self.latest.made is None:
            self.latest.key = self.latest.made = None  # freed before the next is made
            self.latest.made = self._make(index)
            self.latest.key = (self, index)
        return self.latest.made

    def _make(self, index: int | None) -> QuantizedWeight:
        part = self.part
        deferred = deferred_of(part.w)
        assert deferred is not None
        if self.site.is_stack and index is None:
            each = [self._make(i) for i in range(len(part.members))]
            scales = _joined([made.scales for made in each])
            return QuantizedWeight(torch.cat([made.codes for made in each]), scales, part.block)
        if index is not None:
            part = replace(part, members=(part.members[index],))
            deferred = Stacked((deferred.member(index),))
        return self._quantized(part, deferred, index)

    def _quantized(self, part: WeightPart, deferred: Deferred, index: int | None) -> QuantizedWeight:
        assert part.quant is not None
        if part.scales is None and part.least is None:
            kept = kept_codes(deferred, part.quant, part.block, part.scale_dtype)
            if kept is not None:
                if self.record is not None:
                    self.record(self.site.fqns[part.members[0]], math.inf)
                return kept
        multiple = part.block[0]
        by_rows = multiple > 0 and part.scales is None and part.least is None and not isinstance(part.quant.method, Mse)
        each: list[QuantizedWeight] = []
        noise = numerics.Noise()
        for w in deferred.pieces(multiple) if by_rows else [deferred.read()]:
            own = replace(part, w=w)
            check_finite(w, self.site, own.members)
            if part.amax is not None:
                amax = part.amax() if index is None else part.amax()[index : index + 1]
                own = replace(
                    own, scales=fused_scales(w, part.quant, part.block, part.own_axes, amax, part.source_dtype)
                )
            made = _rounded(own)
            if self.record is not None:
                noise.add(w, numerics.dequantize(made.codes, made.scales, part.quant.format, made.block))
            each.append(made)
        if self.record is not None:
            self.record(self.site.fqns[part.members[0]], noise.sqnr_db())
        scales = _joined([made.scales for made in each], upper=not isinstance(part.quant.format, Nvfp4))
        codes = each[0].codes if len(each) == 1 else torch.cat([made.codes for made in each])
        return _finished(part, QuantizedWeight(codes, scales, part.block))


@final
@dataclass(frozen=True)
class _Output(Deferred):
    """A part's codes (0), scales (1), zero points (2) or global scales (3), or those of one of its experts."""

    of: DeferredPart
    number: int
    shape: tuple[int, ...]
    index: int | None = None

    def read(self) -> Tensor:
        made = self.of.made(self.index)
        found = (made.codes, *made.scales)[self.number]
        assert found is not None
        return found if self.index is None else found[0]

    def member(self, index: int) -> Deferred:
        return replace(self, index=index, shape=self.shape[1:])


def deferred_codes(of: DeferredPart, mode: FakeTensorMode) -> QuantizedWeight:
    """The codes and scales of a part, which are made when they are read."""
    part = of.part
    assert part.quant is not None
    shape, format = part.w.shape, part.quant.format
    with mode:
        scales = numerics.empty_scales(shape, part.block, format, part.own_axes, part.w.dtype)
        codes = torch.empty(shape, dtype=numerics.code_dtype(format))
    found = [
        None if fake is None else defer(fake, _Output(of, number, tuple(fake.shape)))
        for number, fake in enumerate((codes, *scales))
    ]
    assert found[0] is not None
    assert found[1] is not None
    return QuantizedWeight(found[0], Scales(found[1], *found[2:]), part.block)


@final
class FusedExtremes:
    """The largest magnitude of each nvfp4 weight and of those that read the same input; of a stack, one for each
    expert. A group is read when it is first asked for.
    """

    def __init__(self, gm: fx.GraphModule, layers: Iterable[Site]) -> None:
        groups: dict[Op, dict[str, tuple[Site, Tensor]]] = {}
        for site in layers:
            if any(q is not None and isinstance(q.format, Nvfp4) for q in weight_quants(site.op.node.meta.get(PLAN))):
                own = groups.setdefault(site.op.input_op, {})
                own[site.param.fqn] = (site, held_tensor(gm, site.param.fqn))
        self._groups = {fqn: group for group in groups.values() for fqn in group}
        self._found: dict[str, Tensor] = {}

    def of(self, fqn: str, members: Sequence[int]) -> Callable[[], Tensor]:
        """What gives those of a weight, or of the experts ``members`` of a stack."""

        def read() -> Tensor:
            amax = self._amax(fqn)
            return amax[list(members)] if amax.numel() > 1 else amax

        return read

    def _amax(self, fqn: str) -> Tensor:
        if fqn not in self._found:
            group = self._groups[fqn]
            own = {name: _largest(w, site) for name, (site, w) in group.items()}
            group.clear()  # float weights are not kept
            for name, amax in own.items():
                self._found[name] = torch.stack([o for o in own.values() if o.shape == amax.shape]).amax(0)
        return self._found[fqn]


def _largest(w: Tensor, site: Site) -> Tensor:
    deferred = deferred_of(w)
    if deferred is None:
        check_finite(w, site)
        return w.detach().abs().flatten(1).amax(1) if site.is_stack else w.detach().abs().amax().view(1)
    members = [deferred.member(i) for i in range(len(site.fqns))] if site.is_stack else [deferred]
    return torch.stack([torch.stack([p.abs().amax() for p in one.pieces()]).amax() for one in members])
