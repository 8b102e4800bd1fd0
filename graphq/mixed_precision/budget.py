"""Budgets as text: ``4.5bits``, ``600MB``, ``123456B``, ``1.2x-latency``."""

import re
from dataclasses import dataclass
from typing import Final, Literal, final

from graphq.errors import SpecError

_UNITS: Final = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@final
@dataclass(frozen=True)
class Budget:
    """What the layers that are searched may take: ``bits`` for each of their weights on average, scales and zero points
    included; ``bytes`` in all, as ``explain`` counts them; or a ``latency``, as a multiple of the fastest choice's.
    """

    kind: Literal["bits", "bytes", "latency"]
    value: float

    def __str__(self) -> str:
        match self.kind:
            case "bits":
                return f"{self.value:g}bits"
            case "bytes":
                return f"{self.value:.0f}B"
            case "latency":
                return f"{self.value:g}x-latency"


def parse_budget(text: str) -> Budget:
    """The budget that ``text`` writes. Raises ``SpecError``."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(bits|x-latency|[KMG]i?B|B)", text.strip())
    if found is None:
        raise SpecError(f"budget: {text!r} is none: write 4.5bits, 600MB, 123456B or 1.2x-latency")
    value, unit = float(found[1]), found[2]
    if value == 0:
        raise SpecError(f"budget: {text} is nothing")
    if unit == "bits":
        return Budget("bits", value)
    if unit == "x-latency":
        if value < 1:
            raise SpecError(f"budget: {text}: the fastest choice has 1x-latency; nothing is faster")
        return Budget("latency", value)
    return Budget("bytes", value * _UNITS[unit])
