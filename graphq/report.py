"""What became of each layer: plan, deciding rule, size, error; and for float layers the reason."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

from graphq import numerics, packing
from graphq.formats import Format, Int, code_bits, element_name, is_asymmetric
from graphq.match import Layer
from graphq.plan import Plan
from graphq.quant import Granularity, PerBlock, PerGroup, Quant, granularity_name
from graphq.spec import Resolved


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
            "reason": self.reason,
            "kind": self.layer.kind,
            "shape": list(self.layer.shape),
            "bytes": self.nbytes,
            "float_bytes": self.float_nbytes,
            "sqnr_db": self.sqnr_db if self.sqnr_db is not None and math.isfinite(self.sqnr_db) else None,
        }

    @property
    def plan(self) -> str:
        """The plan in words."""
        if self.weight is None and self.input is None:
            return f"float ({self.reason})"
        return f"{self.weight or 'float'} x {self.input or 'float'}"


@final
@dataclass(frozen=True)
class Report:
    """All layers that a rule can name, in graph order, and what else the user should know."""

    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> list[dict[str, Any]]:
        """One object a layer."""
        return [layer.to_json() for layer in self.layers]

    def table(self) -> list[tuple[str, ...]]:
        """The layers as rows of text, a header first; a column in which nothing stands is left out."""
        rows = [("layer", "weight", "input", "rule", "bytes", "SQNR dB", "why float")]
        rows += [
            (
                found.layer.fqn,
                str(found.weight or "float"),
                str(found.input or "float"),
                " ".join(part for part in (found.source, f"({found.rule})" if found.rule else "") if part),
                str(found.nbytes),
                "" if found.sqnr_db is None else f"{found.sqnr_db:.1f}",
                found.reason,
            )
            for found in self.layers
        ]
        kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
        return [tuple(row[i] for i in kept) for row in rows]

    def __str__(self) -> str:
        rows = self.table()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def make_report(
    resolved: Mapping[str, Resolved], notes: Iterable[str], float_bits: int, sqnr: Mapping[str, float] | None = None
) -> Report:
    """The report on decisions; ``float_bits`` is the width of the source's dtype, ``sqnr`` what was measured."""
    layers: list[LayerReport] = []
    for fqn, found in resolved.items():
        plan = found.decision if isinstance(found.decision, Plan) else None
        elements = 1
        for size in found.layer.shape:
            elements *= size
        float_nbytes = elements * float_bits // 8
        layers.append(
            LayerReport(
                layer=found.layer,
                weight=plan.weight if plan else None,
                input=plan.input if plan else None,
                rule=str(found.rule.match) if found.rule else "",
                source=found.rule.source if found.rule else "",
                reason="" if isinstance(found.decision, Plan) else found.decision.reason,
                nbytes=stored_nbytes(found.layer, plan.weight) if plan and plan.weight else float_nbytes,
                float_nbytes=float_nbytes,
                sqnr_db=(sqnr or {}).get(fqn),
            )
        )
    return Report(tuple(layers), tuple(notes))


def stored_nbytes(layer: Layer, quant: Quant) -> int:
    """Bytes of a packed weight: codes by rows of one output channel, scales, zero points of a byte each."""
    rows, columns = layer.shape[0], math.prod(layer.shape[1:])
    block = numerics.weight_block(quant.granularity, len(layer.shape), 0, 1)
    held = numerics.empty_scales(layer.shape, block, quant.format)
    scales = sum(part.numel() * part.itemsize for part in held if part is not None)
    return rows * packing.packed_size(columns, code_bits(quant.format)) + scales
