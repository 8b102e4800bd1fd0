"""How far a search may go that takes ops out of eight bits: a number of ops, an error of the outputs, or both."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Final, cast, final

from graphq.errors import SpecError

_LARGEST: Final = 300.0  # decibels: more than float64 has


@final
@dataclass(frozen=True)
class Fallback:
    """Ops whose tensors' rounding harms the model's outputs most run in 16 bits, or in float where the profile has no
    such type for them, until ``min_sqnr`` is met, or, without it, as many as ``max_ops``.

    max_ops: at most so many ops. min_sqnr: the signal to quantization noise ratio against the float model that each
    output shall have, in decibels, on calibration data. Raises ``SpecError`` for other values, and where neither is
    given.
    """

    max_ops: int | None = None
    min_sqnr: float | None = None

    def __post_init__(self) -> None:
        if self.max_ops is None and self.min_sqnr is None:
            raise SpecError("it says nothing: give max_ops, min_sqnr, or both")
        if self.max_ops is not None and (type(self.max_ops) is not int or self.max_ops < 1):
            raise SpecError(f"max_ops: {self.max_ops!r} is not a whole number from 1")
        floor = self.min_sqnr
        if floor is not None and (
            isinstance(floor, bool)
            or not isinstance(cast(object, floor), int | float)
            or not (math.isfinite(floor) and 0 < floor <= _LARGEST)
        ):
            raise SpecError(f"min_sqnr: {floor!r} is not a number of decibels above 0 and up to {_LARGEST:g}")

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.given().items())

    def given(self) -> dict[str, int | float]:
        """What is given, by name; whole numbers as such."""
        values = {"max_ops": self.max_ops, "min_sqnr": self.min_sqnr}
        return {n: int(v) if float(v).is_integer() else v for n, v in values.items() if v is not None}


_NAMES: Final = tuple(field.name for field in fields(Fallback))


def fallback_of(given: Fallback | Mapping[str, object]) -> Fallback:
    """The fallback that a mapping writes. Raises ``SpecError``, beginning with ``fallback: ``."""
    if isinstance(given, Fallback):
        return given
    if not isinstance(cast(object, given), Mapping):
        raise SpecError(f"fallback: {given!r} is not a mapping of {' and '.join(_NAMES)}")
    for name in given:
        if name not in _NAMES:
            raise SpecError(f"fallback: {name}: no such key; there are {', '.join(_NAMES)}")
    try:
        return Fallback(**cast(Mapping[str, int], given))
    except SpecError as error:
        raise SpecError([f"fallback: {problem}" for problem in error.problems]) from None


def parse_fallback(texts: Iterable[str]) -> Fallback | None:
    """The fallback that ``name=value`` texts write; None where there are none. Raises ``SpecError``."""
    values: dict[str, object] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise SpecError(f"fallback: {text!r} is not NAME=VALUE, such as max_ops=3 or min_sqnr=30")
        if name in values:
            raise SpecError(f"fallback: {name}: is given twice")
        values[name] = _number(value)
    return fallback_of(values) if values else None


def _number(text: str) -> object:
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text
