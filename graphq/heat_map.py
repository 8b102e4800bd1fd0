"""A model's layers as a map: a row for each repeated block, a column for each role in it, what the layers there hold.

The numbers are those of a report's rows as plain data, which manifests of artifacts hold, too.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, final

_BLOCK: Final = re.compile(r"(?P<block>(?:[^.]+\.)*?[^.]+\.\d+)\.(?P<role>.+)")
_INDEX: Final = re.compile(r"(?<![^.])\d+(?![^.])")


@final
@dataclass(frozen=True)
class Cell:
    """The layers of one role in one block: how many, what their weights take and took, and the lowest ratio of signal
    to quantization noise among them, None where none is known. plans: those that they have.
    """

    layers: int = 0
    elements: int = 0
    nbytes: int = 0
    float_nbytes: int = 0
    sqnr_db: float | None = None
    plans: tuple[str, ...] = ()

    @property
    def bits(self) -> float:
        """For each element of the weights on average, scales and zero points included."""
        return 8 * self.nbytes / max(self.elements, 1)

    @property
    def is_float(self) -> bool:
        """Whether none of the layers is quantized."""
        return set(self.plans) <= {"float"}


@final
@dataclass(frozen=True)
class HeatMap:
    """The cells that there are, by the places of their rows and columns, both in the model's order."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: Mapping[tuple[int, int], Cell]


def place_of(layer: str) -> tuple[str, str]:
    """The block of a layer and its role there: ``model.layers.3``, ``mlp.up_proj``. Numbers in a role are ``*``. A
    layer outside of numbered blocks has what holds it for a block.
    """
    found = _BLOCK.fullmatch(layer)
    if found is not None:
        return found["block"], _INDEX.sub("*", found["role"])
    parent, _, name = layer.rpartition(".")
    return parent or "model", name


def plan_of(row: Mapping[str, Any]) -> str:
    """How a layer is quantized, in the text form."""
    weight, given = (None if row[key] is None else row[key]["text"] for key in ("weight", "input"))
    if weight is None and given is None:
        return "float"
    return f"{weight or 'float'} x {given or 'float'}" if given is not None else str(weight)


def heat_map(rows: Iterable[Mapping[str, Any]]) -> HeatMap:
    """The map of a report's rows."""
    names: tuple[dict[str, int], dict[str, int]] = ({}, {})
    cells: dict[tuple[int, int], Cell] = {}
    for row in rows:
        block, role = place_of(row["layer"])
        place = (names[0].setdefault(block, len(names[0])), names[1].setdefault(role, len(names[1])))
        cells[place] = _with(cells.get(place, Cell()), row)
    return HeatMap(tuple(names[0]), tuple(names[1]), cells)


def _with(cell: Cell, row: Mapping[str, Any]) -> Cell:
    ratios = [one for one in (cell.sqnr_db, row.get("sqnr_db")) if one is not None]
    return replace(
        cell,
        layers=cell.layers + 1,
        elements=cell.elements + math.prod(row.get("shape") or [0]),
        nbytes=cell.nbytes + row["bytes"],
        float_nbytes=cell.float_nbytes + row.get("float_bytes", row["bytes"]),
        sqnr_db=min(ratios, default=None),
        plans=tuple(dict.fromkeys((*cell.plans, plan_of(row)))),
    )
