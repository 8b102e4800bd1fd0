"""What became of each layer: plan, deciding rule, size, error; and for float layers the reason."""

import dataclasses
import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from graphq import numerics, packing
from graphq.figures import plot_rows
from graphq.ir.cache_plans import CachePlan, lines_of
from graphq.ir.grids import Placement
from graphq.phases import Phase
from graphq.spec.folds import EVERYWHERE
from graphq.spec.formats import Format, Int, code_bits, element_name, is_asymmetric
from graphq.spec.match import Layer, Unnamed
from graphq.spec.plan import Plan
from graphq.spec.quant import Granularity, PerBlock, PerGroup, Quant, granularity_name
from graphq.spec.rules import Algorithm, Resolved, Spec


def quant_json(quant: Quant | None) -> dict[str, Any] | None:
    """A ``Quant`` as plain data; None for float."""
    if quant is None:
        return None
    format = quant.format
    return {
        "format": _format_name(format),
        "symmetric": not is_asymmetric(format),
        "granularity": granularity_name(quant.granularity),
        "group_size": quant.granularity.size if isinstance(quant.granularity, PerGroup) else None,
        "dynamic": quant.dynamic,
        "divisor": format.divisor if isinstance(format, Int) and format.symmetric else None,
        "block": _sides(quant.granularity),
        "method": str(quant.method),
        "text": str(quant),
    }


def _sides(granularity: Granularity) -> list[int] | None:
    return [granularity.rows, granularity.columns] if isinstance(granularity, PerBlock) else None


def _format_name(format: Format) -> str:
    """The format without its options, as a table names it."""
    return element_name(format) if isinstance(format, Int) else str(format)


@final
@dataclass(frozen=True)
class LayerReport:
    """One layer. ``nbytes``: its stored weight, scales and zero points included; ``float_nbytes``: as it was.

    ``sqnr_db``: signal to quantization noise ratio of the weight in decibels, None where it was not measured.
    ``group``: the name of the spec's group that it is in. ``in_order``: GPTQ rounds its columns by their activations.
    """

    layer: Layer
    weight: Quant | None
    input: Quant | None
    rule: str
    source: str
    reason: str
    nbytes: int
    float_nbytes: int
    sqnr_db: float | None = None
    group: str = ""
    in_order: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain data: ``layer``, ``weight``, ``input`` (null: float), ``rule``, ``source`` and what else is known.

        JSON has no infinite numbers: ``sqnr_db`` is null, too, where a weight is represented exactly.
        """
        return {
            "layer": self.layer.fqn,
            "weight": quant_json(self.weight),
            "input": quant_json(self.input),
            "rule": self.rule,
            "source": self.source,
            "line": _line(self.source),
            "reason": self.reason,
            "kind": self.layer.kind,
            "shape": list(self.layer.shape),
            "bytes": self.nbytes,
            "float_bytes": self.float_nbytes,
            "sqnr_db": None if self.sqnr_db is None else _finite(self.sqnr_db),
            **({"group": self.group} if self.group else {}),
            **({"in_order": True} if self.in_order else {}),
        }

    @property
    def decided_by(self) -> str:
        """The rule that decided, and where it stands in the spec."""
        return " ".join(part for part in (self.source, f"({self.rule})" if self.rule else "") if part)

    @property
    def plan(self) -> str:
        """The plan in words."""
        if self.weight is None and self.input is None:
            return f"float ({self.reason})"
        return f"{self.weight or 'float'} x {self.input or 'float'}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


@final
@dataclass(frozen=True)
class OpReport:
    """An op that computes floats from data, or a chain that runs as one, by the name of its layer or its module.

    ``types``: those that it runs in, such as ``uint8 x int8/channel -> uint8``; empty: in float, for this ``reason``.
    """

    name: str
    kind: str
    types: str
    reason: str = ""


@final
@dataclass(frozen=True)
class FallbackReport:
    """What a fallback did, and how good that is.

    ops: the name of each op that it took out of eight bits, and what it runs in: ``uint16`` or ``float``. before,
    after: the signal to quantization noise ratio of the worst output against the float model, in decibels, on
    ``batches`` calibration batches; weights: with weights rounded alone. tried: how many ops had fallen back in each
    trial, with its ratio. floor: what was asked for.
    """

    ops: tuple[tuple[str, str], ...]
    before: float
    after: float
    weights: float
    batches: int
    tried: tuple[tuple[int, float], ...]
    floor: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether what was asked for is reached, if anything was."""
        return self.floor is None or self.after >= self.floor

    def to_json(self) -> dict[str, Any]:
        """Plain data; ratios are null where nothing differs."""
        return {
            "ops": [{"op": name, "type": instead} for name, instead in self.ops],
            "sqnr_db": {name: _finite(getattr(self, name)) for name in ("before", "after", "weights")},
            "batches": self.batches,
            "tried": [{"ops": count, "sqnr_db": _finite(ratio)} for count, ratio in self.tried],
            "min_sqnr": self.floor,
            "met": self.is_met,
        }


@final
@dataclass(frozen=True)
class ActivationsReport:
    """What a profile made of the tensors between layers: the ops in integers and in float, and how many tensors have
    which type.
    """

    profile: str
    ops: tuple[OpReport, ...]
    tensors: Mapping[str, int]
    fallback: FallbackReport | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data: ``profile``, ``ops`` (``types`` null: in float), ``tensors`` by type, ``fallback`` (null: none
        was asked for).
        """
        return {
            "profile": self.profile,
            "ops": [
                {"op": op.name, "kind": op.kind, "types": op.types or None, "reason": op.reason} for op in self.ops
            ],
            "tensors": dict(self.tensors),
            "fallback": None if self.fallback is None else self.fallback.to_json(),
        }


def activations_report(found: Placement, profile: str) -> ActivationsReport:
    """What a placement for a profile says of each op."""
    ops = [OpReport(unit.name, unit.kind, str(types)) for unit, types in found.integer]
    ops += [OpReport(unit.name, unit.kind, "", reason) for unit, reason in found.why_float.items()]
    return ActivationsReport(profile, tuple(ops), found.tensors())


def _finite(ratio: float) -> float | None:
    return ratio if math.isfinite(ratio) else None


@final
@dataclass(frozen=True)
class Report:
    """All layers that a rule can name, in graph order, and what else the user should know.

    ``settings``: what the spec says beside its rules, by name. ``parameters``: those that are multiplied with an
    activation and are no layer that a rule can name; they stay float. ``activations``: what became of the tensors
    between layers, where quantizers were placed by a profile. ``caches``: of the caches, where they are asked for.
    ``kernels``: what computes a layer of the packed torch
    module on this machine, and why it is not something faster; known when that module has been made. ``phases``: what
    the compile took, and each artifact since; no part of what is compared or written.
    """

    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict[str, str])
    parameters: tuple[LayerReport, ...] = ()
    activations: ActivationsReport | None = None
    kernels: Mapping[str, str] = field(default_factory=dict[str, str])
    phases: tuple[Phase, ...] = field(default=(), compare=False)
    caches: tuple[CachePlan, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain data: ``layers``, ``activations``, null where a profile placed nothing, and ``caches``, where the spec
        asks for them.
        """
        activations = None if self.activations is None else self.activations.to_json()
        caches = {"caches": [cache.to_json() for cache in self.caches]} if self.caches else {}
        return {"layers": self.rows(), "activations": activations, **caches}

    def with_sqnr(self, sqnr: Mapping[str, float]) -> "Report":
        """The report with these ratios of layers, which were not known when it was made."""
        layers = (dataclasses.replace(one, sqnr_db=sqnr.get(one.layer.fqn, one.sqnr_db)) for one in self.layers)
        return dataclasses.replace(self, layers=tuple(layers))

    def rows(self) -> list[dict[str, Any]]:
        """One object for each layer, then one for each of the ``parameters``, whose ``kind`` is ``parameter``."""
        dialect = self.settings.get("dialect", "")
        rows = [layer.to_json() for layer in self.layers]
        rows += [parameter.to_json() | {"kind": "parameter"} for parameter in self.parameters]
        return [row | {"dialect": dialect} for row in rows]

    def plot(self) -> Any:
        """A matplotlib ``Figure`` of bits, errors and bytes by block and role; notebooks show it. Raises
        ``GraphqError`` where matplotlib is not installed.
        """
        return plot_rows(self.rows())

    def table(self) -> list[tuple[str, ...]]:
        """Layers and parameters as rows of text, a header first; a column in which nothing stands is left out."""
        rows = [("layer", "weight", "input", "rule", "bytes", "SQNR dB", "why float", "kernel")]
        rows += [
            (
                found.layer.fqn,
                str(found.weight or "float"),
                str(found.input or "float"),
                found.decided_by,
                str(found.nbytes),
                "" if found.sqnr_db is None else f"{found.sqnr_db:.1f}",
                found.reason,
                self.kernels.get(found.layer.fqn, ""),
            )
            for found in (*self.layers, *self.parameters)
        ]
        kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
        return [tuple(row[i] for i in kept) for row in rows]

    def phase_lines(self) -> list[str]:
        """The phases as lines of text, the sum first; what takes less than a hundredth of it is left out."""
        total = sum(phase.seconds for phase in self.phases)
        shown = [Phase("in all", total, max((p.peak_nbytes or 0 for p in self.phases), default=0) or None)]
        shown += [phase for phase in self.phases if phase.seconds >= total / 100]
        rows = [
            (p.name, f"{p.seconds:.1f} s", "" if p.peak_nbytes is None else f"{p.peak_nbytes / 1e9:.2f} GB at most")
            for p in shown
        ]
        return _aligned(rows)

    def __str__(self) -> str:
        return "\n".join([*_aligned(self.table()), *lines_of(self.caches), *(f"note: {note}" for note in self.notes)])


def _line(source: str) -> int | None:
    """The line of the spec's file that a rule's source names."""
    found = re.search(r"\(line (\d+)\)$", source)
    return int(found[1]) if found else None


def make_report(
    resolved: Mapping[str, Resolved],
    notes: Iterable[str],
    float_bits: int,
    sqnr: Mapping[str, float] | None = None,
    settings: Mapping[str, str] | None = None,
    stored_bits: Mapping[str, int] | None = None,
    unnamed: Iterable[Unnamed] = (),
    activations: ActivationsReport | None = None,
    in_order: Container[str] = (),
) -> Report:
    """The report on decisions, and on weights that no rule can name; ``float_bits`` is the width of the source's dtype,
    ``sqnr`` what was measured.

    ``stored_bits``: the width that a layer's weight is stored in where it stays float, if that is another.
    ``in_order``: the layers whose columns are rounded in the order of their activations.
    """
    layers: list[LayerReport] = []
    for fqn, found in resolved.items():
        plan = found.decision if isinstance(found.decision, Plan) else None
        elements = math.prod(found.layer.shape)
        float_nbytes = elements * float_bits // 8
        kept_nbytes = elements * (stored_bits or {}).get(fqn, float_bits) // 8
        layers.append(
            LayerReport(
                layer=found.layer,
                weight=plan.weight if plan else None,
                input=plan.input if plan else None,
                rule=str(found.rule.match) if found.rule else "",
                source=found.rule.source if found.rule else "",
                reason="" if isinstance(found.decision, Plan) else found.decision.reason,
                nbytes=stored_nbytes(found.layer, plan.weight) if plan and plan.weight else kept_nbytes,
                float_nbytes=float_nbytes,
                sqnr_db=(sqnr or {}).get(fqn),
                group=found.rule.group if found.rule and plan else "",
                in_order=plan is not None and plan.weight is not None and fqn in in_order,
            )
        )
    parameters: list[LayerReport] = []
    for other in unnamed:
        size = math.prod(other.layer.shape) * float_bits // 8
        parameters.append(LayerReport(other.layer, None, None, "", "", other.reason, size, size))
    return Report(tuple(layers), tuple(notes), settings or {}, tuple(parameters), activations)


def spec_settings(spec: Spec) -> dict[str, str]:
    """What a spec says beside its rules, by name, in words."""
    found = {
        "dialect": spec.dialect,
        "algorithms": ", ".join(map(algorithm_text, spec.algorithms)) or "rtn",
        "pipeline": spec.pipeline,
        "prefix": spec.prefix,
        "cache": "float" if spec.cache is None else str(spec.cache),
    }
    found |= {"attention": str(spec.attention)} if spec.attention is not None else {}
    found |= {"profile": spec.profile} if spec.profile else {}
    found |= {"activations": "; ".join(map(str, spec.activations))} if spec.activations else {}
    found |= {"fallback": str(spec.fallback)} if spec.fallback else {}
    run = {name: value for name, value in dataclasses.asdict(spec.run).items() if value not in ("", None)}
    return found | {name: str(value) for name, value in run.items()}


def algorithm_text(algorithm: Algorithm) -> str:
    """An algorithm with its options, the layers it is for, and what it folds into, in words."""
    options = ", ".join(f"{name}={value}" for name, value in algorithm.options)
    where = " or ".join(map(str, algorithm.match))
    into = "" if algorithm.folds == EVERYWHERE else f" into {algorithm.folds}"
    return algorithm.name + (f"({options})" if options else "") + (f" for {where}" if where else "") + into


@final
@dataclass(frozen=True)
class Difference:
    """What differs between two reports on one model: pairs of layers, and settings with both values."""

    layers: tuple[tuple[LayerReport, LayerReport], ...]
    settings: tuple[tuple[str, str, str], ...]
    same: int

    def to_json(self) -> dict[str, Any]:
        """``layers``: name, plan and rule before and after; ``settings``: name, before, after; ``same``: a count."""
        return {
            "layers": [{"layer": a.layer.fqn, "before": a.to_json(), "after": b.to_json()} for a, b in self.layers],
            "settings": [{"name": name, "before": a, "after": b} for name, a, b in self.settings],
            "same": self.same,
        }

    def __str__(self) -> str:
        lines = [f"{name}: {before} -> {after}" for name, before, after in self.settings]
        if self.layers:
            rows = [("layer", "before", "", "after", "rule before", "rule after")]
            rows += [(a.layer.fqn, a.plan, "->", b.plan, a.decided_by, b.decided_by) for a, b in self.layers]
            lines += _aligned(rows)
        lines.append(f"{len(self.layers)} layers differ, {self.same} are planned alike")
        return "\n".join(lines)


def difference(before: Report, after: Report) -> Difference:
    """What differs between two reports on one model. Layers that stay float for another reason do not."""
    pairs = list(zip(before.layers, after.layers, strict=True))
    layers = tuple((a, b) for a, b in pairs if (a.weight, a.input) != (b.weight, b.input))
    names = dict.fromkeys((*before.settings, *after.settings))
    settings = [(name, before.settings.get(name, "none"), after.settings.get(name, "none")) for name in names]
    return Difference(layers, tuple(row for row in settings if row[1] != row[2]), len(pairs) - len(layers))


def stored_nbytes(layer: Layer, quant: Quant) -> int:
    """Bytes of a packed weight: codes by rows of one output channel, scales, zero points of a byte each."""
    rows, columns = layer.shape[0], math.prod(layer.shape[1:])
    block = numerics.weight_block(quant.granularity, len(layer.shape), 0, 1)
    held = numerics.empty_scales(layer.shape, block, quant.format)
    scales = sum(part.numel() * part.itemsize for part in held if part is not None)
    return rows * packing.packed_size(columns, code_bits(quant.format)) + scales
