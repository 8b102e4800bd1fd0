"""The ops that lose most by eight bits, found on calibration data, run in sixteen bits or in float.

What a grid contributes to the outputs' error is measured with that grid alone rounded: errors of several are nearly
uncorrelated, and their powers add (the assumption of mixed precision by sensitivity: Dong et al., HAWQ-V2, arXiv
1911.03852, equation 6). Grids are raised in that order, and how many of them is found by halving, each trial measured
whole.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor, fx, nn

from graphq import numerics
from graphq.capture.source import source_of
from graphq.data.masks import MaskedBatch
from graphq.errors import SpecError
from graphq.ir import edit
from graphq.ir.grids import NOTHING, Placement, Raised, place
from graphq.ir.integer_units import takes_weight
from graphq.ir.layers import PLAN
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.units import WITH_WEIGHT, Unit
from graphq.ir.views import Op
from graphq.numerics import Scales
from graphq.observers.grids import GridObserver
from graphq.passes.calibrate import Calibrate, run_batch
from graphq.passes.observe import observers
from graphq.passes.place_quantizers import PlaceQuantizers, name_numbers, put_observers
from graphq.passes.quantize_activations import scales_of_grids
from graphq.report import ActivationsReport, FallbackReport
from graphq.spec.activations import ActivationRule
from graphq.spec.fallback import Fallback
from graphq.spec.formats import Int, same_codes
from graphq.spec.plan import Plan
from graphq.spec.profile import Profile
from graphq.spec.quant import Quant

MEASURED: Final = 8  # batches


def reference_outputs(gm: fx.GraphModule, batches: Iterable[tuple[Any, ...]]) -> list[MaskedBatch]:
    """What the graph gives for the first batches, as many as a fallback is measured on: its outputs of floats that are
    no caches, with what of them is valid.
    """
    places = _measured(gm)
    found: list[MaskedBatch] = []
    with torch.inference_mode():
        for number, batch in zip(range(MEASURED), batches, strict=False):
            whole = run_batch(gm, batch, number, FallBack.name)
            found.append(MaskedBatch([whole[i] for i in places], [whole.validity[i] for i in places]))
    return found


def _measured(gm: fx.GraphModule) -> list[int]:
    """Which outputs are floats and no caches."""
    source = source_of(gm)
    kept = {pair.present for pair in source.caches}
    given = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    vals = [node.meta.get("val") if isinstance(node, fx.Node) else None for node in given]
    return [
        i
        for i, (name, val) in enumerate(zip(source.outputs, vals, strict=True))
        if name not in kept and isinstance(val, Tensor) and val.is_floating_point()
    ]


@final
@dataclass(frozen=True)
class FallBack(Pass):
    """Quantizers stand as ``PlaceQuantizers`` puts them, but for the tensors whose rounding harms the outputs most:
    these are in 16 bits with all ops that read or give them, or these ops stay float.

    wanted: what the float model gives (``reference_outputs``); without it, what the graph does as it is found. note:
    is told which ops, what it is good for, and where the floor is not met. placed: see ``PlaceQuantizers``. Raises
    ``SpecError`` where the model gives no floats to measure.
    """

    profile: Profile
    rules: tuple[ActivationRule, ...]
    fallback: Fallback
    wanted: Sequence[MaskedBatch] | None = None
    note: Callable[[str], None] | None = None
    placed: Callable[[ActivationsReport], None] | None = None
    name: ClassVar[str] = "fall-back"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        if not _measured(gm):
            raise SpecError("fallback: the model gives no floats but caches: there is nothing to measure it by")
        batches = list(batches or ())
        changes = name_numbers(gm, place(gm, self.profile, self.rules), self.name)
        gm.recompile()
        wanted = reference_outputs(gm, batches) if self.wanted is None else self.wanted
        search = _Search(gm, self.profile, self.rules, batches, wanted)
        chosen, report = search.run(self.fallback)
        for line in _lines(report, self.fallback, self.profile, chosen):
            if self.note is not None:
                self.note(line)
        hand_on = self.placed
        placed = None if hand_on is None else lambda found: hand_on(replace(found, fallback=report))
        placing = PlaceQuantizers(self.profile, self.rules, self.note, _raised(chosen, search.base.found), placed)
        return changes + placing.run(gm, batches)


@final
@dataclass(frozen=True)
class _Step:
    """The tensors of a grid, by the names of their nodes; the ops that read or give them; and the type that both have
    instead, None: float.
    """

    tensors: frozenset[str]
    units: tuple[Unit, ...]
    format: Int | None


def _raised(steps: Sequence[_Step], base: Placement) -> Raised:
    """What is decided by steps together: all other ops give what they gave in ``base``."""
    tensors: dict[str, Int] = {}
    floats: set[str] = set()
    for step in steps:
        if step.format is None:
            floats |= {unit.first.node.name for unit in step.units}
        else:
            tensors |= dict.fromkeys(step.tensors, step.format)
    changed = {unit for step in steps for unit in step.units}
    formats = {one.x: one.grid.quant.format for one in base.quantizers if not one.again}
    outputs = [output for unit, _ in base.integer if unit not in changed for output in unit.outputs]
    given = {x.node.name: format for x in outputs if isinstance(format := formats.get(x), Int)}
    return Raised(tensors, given if steps else {}, frozenset(floats))


@final
class _Search:
    """The search for one graph, which is left alone."""

    def __init__(
        self,
        gm: fx.GraphModule,
        profile: Profile,
        rules: tuple[ActivationRule, ...],
        batches: Sequence[tuple[Any, ...]],
        wanted: Sequence[MaskedBatch],
    ) -> None:
        self.gm, self.profile, self.rules = gm, profile, rules
        self.batches, self.wanted = batches, wanted
        self.places = _measured(gm)
        self.base = _Rounded(gm, profile, rules, NOTHING, batches)

    def run(self, fallback: Fallback) -> tuple[list[_Step], FallbackReport]:
        """The grids that are raised, and what is to be said of them."""
        base = self.base
        targets = [list(one) for one in self.wanted]
        weights, before = self._noise(base, (), targets), self._noise(base, None, targets)
        tried = {0: before}
        steps = self._ranked(fallback.max_ops)

        def noise_with(count: int) -> float:
            if count not in tried:
                made = _Rounded(self.gm, self.profile, self.rules, _raised(steps[:count], base.found), self.batches)
                tried[count] = self._noise(made, None, targets)
            return tried[count]

        count, floor = len(steps), fallback.min_sqnr
        if floor is not None:
            count = _fewest(len(steps), lambda n: numerics.decibels(noise_with(n)) >= floor)
        after = noise_with(count)
        named: dict[Unit, str] = {}
        for step in sorted(steps[:count], key=lambda one: one.format is None):  # float counts where both are decided
            named |= dict.fromkeys(self._computing(step.units), str(step.format or "float"))
        ratios = {  # by the number of ops
            len({unit for step in steps[:n] for unit in self._computing(step.units)}): numerics.decibels(noise)
            for n, noise in sorted(tried.items())
        }
        report = FallbackReport(
            ops=tuple((unit.name, named[unit]) for unit, _ in base.found.integer if unit in named),
            before=numerics.decibels(before),
            after=numerics.decibels(after),
            weights=numerics.decibels(weights),
            batches=len(self.wanted),
            tried=tuple(ratios.items()),
            floor=fallback.min_sqnr,
        )
        return steps[:count], report

    def _computing(self, units: Iterable[Unit]) -> list[Unit]:
        """Those that count: what only moves elements follows."""
        return [unit for unit in units if self.profile.ops[unit.kind].output != "same"]

    def _ranked(self, max_ops: int | None) -> list[_Step]:
        """The grids by the error that each alone adds to the outputs, the largest first; those that fit into
        ``max_ops`` together.
        """
        unrounded = [self._outputs(self.base, (), batch) for batch in self.batches[:MEASURED]]
        found: list[tuple[float, _Step]] = []
        for number, step in _steps(self.base.found, self.profile).items():
            noise = self._noise(self.base, {number}, unrounded)
            if noise > 0:
                found.append((noise, step))
        found.sort(key=lambda one: -one[0])  # stable: of equal ones the first in the graph
        chosen: list[_Step] = []
        ops: set[Unit] = set()
        for _, step in found:
            together = ops | set(self._computing(step.units))
            if max_ops is None or len(together) <= max_ops:
                chosen.append(step)
                ops = together
        return chosen

    def _outputs(self, rounded: "_Rounded", grids: Collection[int] | None, batch: tuple[Any, ...]) -> list[Tensor]:
        outputs = rounded.outputs(batch, grids)
        return [outputs[i] for i in self.places]

    def _noise(self, rounded: "_Rounded", grids: Collection[int] | None, against: Sequence[Sequence[Tensor]]) -> float:
        """The power of what outputs differ by from ``against``, over that of the float model's; the largest of all
        outputs. Counted are valid elements that are finite in the float model.
        """
        signal, noise = (torch.zeros(len(self.places), dtype=torch.float64) for _ in range(2))
        for batch, wanted, other in zip(self.batches, self.wanted, against, strict=False):
            outputs = self._outputs(rounded, grids, batch)
            for i, (y, float_y, to) in enumerate(zip(outputs, wanted, other, strict=True)):
                counts = wanted.validity[i].full(float_y) & float_y.isfinite()
                signal[i] += float_y[counts].double().square().sum()
                noise[i] += (y[counts].double() - to[counts].double()).square().sum().nan_to_num(torch.inf)
        found = torch.where(signal > 0, noise / signal, torch.where(noise > 0, torch.inf, 0.0))
        return float(found.max())


def _fewest(most: int, is_enough: Callable[[int], bool]) -> int:
    """The fewest that are enough, where more are never worse; ``most`` where none are. None at all are tried first."""
    if most == 0 or is_enough(0):
        return 0
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle + 1, high)
    return low


def _steps(found: Placement, profile: Profile) -> dict[int, _Step]:
    """By grid what raising it means, of those that are not in 16 bits."""
    wide = next((one for one in profile.activations if isinstance(one, Int) and one.bits > 8), None)
    tensors: dict[int, dict[Op, None]] = {}
    for one in found.quantizers:
        if not (isinstance(one.grid.quant.format, Int) and one.grid.quant.format.bits > 8):
            tensors.setdefault(one.grid.number, {})[one.x] = None
    made: dict[int, _Step] = {}
    for number, members in tensors.items():
        units = tuple(
            unit
            for unit, _ in found.integer
            if any(x in members for _, x in unit.edges)
            or (profile.ops[unit.kind].output != "optional" and any(output in members for output in unit.outputs))
        )
        if not units:  # a norm's gain, which has no type of 16 bits
            continue
        format = wide if wide is not None and all(_takes(profile, unit, members, wide) for unit in units) else None
        made[number] = _Step(frozenset(x.node.name for x in members), units, format)
    return made


def _takes(profile: Profile, unit: Unit, members: Mapping[Op, None], wide: Int) -> bool:
    """Whether the consumer runs a unit in integers with these of its tensors in the wide type."""
    rule, plan = profile.ops[unit.kind], unit.first.node.meta.get(PLAN)
    weight = plan.weight if isinstance(plan, Plan) and unit.kind in WITH_WEIGHT else None
    rows = (*rule.types, *rule.also) if rule.output == "same" else rule.types
    gives = any(output in members for output in unit.outputs)
    return any(
        (weight is None or row.weight is None or takes_weight(row.weight, weight))
        and all(same_codes(row.input(i), wide) for i, (_, x) in enumerate(unit.edges) if x in members)
        and (not gives or same_codes(row.output, wide))
        for row in rows
    )


@final
class _Rounded:
    """A copy of a graph, with quantizers placed and calibrated, in which tensors are rounded where they would be."""

    def __init__(
        self,
        gm: fx.GraphModule,
        profile: Profile,
        rules: tuple[ActivationRule, ...],
        raised: Raised,
        batches: Sequence[tuple[Any, ...]],
    ) -> None:
        self.gm = edit.copy_graph(gm)
        self.found = place(self.gm, profile, rules, raised)
        self.roundings: list[tuple[int, _Rounding]] = []
        if put_observers(self.gm, self.found, FallBack.name):
            Calibrate().run(self.gm, batches)
            scales = scales_of_grids(self.gm)
            for op, one in observers(self.gm):
                if isinstance(one, GridObserver):
                    made = _Rounding(scales[one.grid.number].scales(), one.grid.quant)
                    self.gm.set_submodule(str(op.node.target), made)
                    self.roundings.append((one.grid.number, made))
        self.gm.recompile()

    def outputs(self, batch: tuple[Any, ...], grids: Collection[int] | None) -> Sequence[Any]:
        """What the graph gives with these grids rounded; None: all."""
        for number, one in self.roundings:
            one.on = grids is None or number in grids
        with torch.inference_mode():
            return self.gm(*batch)


@final
class _Rounding(nn.Module):
    """What an observer's tensor is read as once it is quantized, where it is ``on``."""

    def __init__(self, scales: Scales, quant: Quant) -> None:
        super().__init__()
        self.scales, self.quant, self.on = scales, quant, True

    def forward(self, x: Tensor, *terms: Tensor) -> Tensor:  # those that an observer sees beside a sum
        if not self.on:
            return x
        block = numerics.activation_block(self.quant.granularity, x.dim())
        return numerics.fake_quantize(x, self.scales, self.quant.format, block)


def _lines(report: FallbackReport, fallback: Fallback, profile: Profile, chosen: Sequence[_Step]) -> Iterable[str]:
    """What the user should know."""
    by_type: dict[str, list[str]] = {}
    for name, instead in report.ops:
        by_type.setdefault(instead, []).append(name)
    for instead, names in by_type.items():
        why = ""
        if instead == "float":
            kinds = dict.fromkeys(unit.kind for step in chosen if step.format is None for unit in step.units)
            has_wide = any(isinstance(one, Int) and one.bits > 8 for one in profile.activations)
            why = f", for {profile.name} has no 16-bit types" + (f" for {', '.join(kinds)}" if has_wide else "")
        run = "op runs" if len(names) == 1 else "ops run"
        yield f"fallback: {len(names)} {run} in {instead}{why}: {', '.join(names)}"
    reached = f"{report.before:.1f} dB before, {report.after:.1f} dB after" if report.ops else f"{report.after:.1f} dB"
    alone = f"{report.weights:.1f} dB with weights rounded alone"
    yield f"fallback: SQNR of the outputs on calibration data: {reached}, {alone}"
    if not report.is_met:
        limit = "whatever falls back" if fallback.max_ops is None else f"with {fallback.max_ops} ops at most"
        yield f"fallback: the floor of {fallback.min_sqnr:g} dB is not met {limit}"
