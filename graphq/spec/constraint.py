"""What a layer must be for a rule to quantize it. A layer that breaks a rule's constraint stays float, and says why.

``parse_constraint`` and ``str`` are inverses; docs/specs.md has the grammar. N are a weight's outputs and K its inputs,
the first and the second axis of ``Layer.shape``.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, cast, final, get_args

from graphq.errors import SpecError
from graphq.spec.match import KINDS, MAX_SIZE, Layer, LayerKind

Axis = Literal["N", "K"]


def _size(layer: Layer, axis: Axis) -> int:
    return layer.shape["NK".index(axis)]


def _check(axis: object, *sizes: object) -> None:
    if axis not in get_args(Axis):
        raise SpecError(f"{axis!r} is not one of N, K")
    for size in sizes:
        if type(size) is not int or not 0 < size <= MAX_SIZE:
            raise SpecError(f"{size!r} is not a whole number from 1 to {MAX_SIZE}")


@final
@dataclass(frozen=True)
class Multiple:
    """The axis is a multiple of ``of``; with ``group``, the number of its groups is, the last of which may be short.

    Text form: ``K % 64``; ``K/32 % 2`` for groups of 32.
    """

    axis: Axis
    of: int
    group: int = 1

    def __post_init__(self) -> None:
        _check(self.axis, self.of, self.group)

    def broken(self, layer: Layer) -> str | None:
        return None if -(-_size(layer, self.axis) // self.group) % self.of == 0 else _is(layer, self.axis)

    def __str__(self) -> str:
        return f"{self.axis}{f'/{self.group}' if self.group > 1 else ''} % {self.of}"


@final
@dataclass(frozen=True)
class AtMost:
    """The axis is not longer than this. Text form: ``N <= 65535``."""

    axis: Axis
    size: int

    def __post_init__(self) -> None:
        _check(self.axis, self.size)

    def broken(self, layer: Layer) -> str | None:
        return None if _size(layer, self.axis) <= self.size else _is(layer, self.axis)

    def __str__(self) -> str:
        return f"{self.axis} <= {self.size}"


@final
@dataclass(frozen=True)
class MoreThan:
    """The axis is longer than this. Text form: ``K > 128``."""

    axis: Axis
    size: int

    def __post_init__(self) -> None:
        _check(self.axis, self.size)

    def broken(self, layer: Layer) -> str | None:
        return None if _size(layer, self.axis) > self.size else _is(layer, self.axis)

    def __str__(self) -> str:
        return f"{self.axis} > {self.size}"


@final
@dataclass(frozen=True)
class OfDtype:
    """The weight has one of these dtypes. Text form: ``dtype float16|bfloat16``."""

    dtypes: tuple[str, ...]

    def __post_init__(self) -> None:
        unknown = [name for name in self.dtypes if name not in ("float64", "float32", "float16", "bfloat16")]
        if unknown or not self.dtypes:
            raise SpecError(f"dtype: {'|'.join(unknown)!r} is not one of float64, float32, float16, bfloat16")

    def broken(self, layer: Layer) -> str | None:
        return None if layer.dtype in self.dtypes else f"the weight is {layer.dtype}"

    def __str__(self) -> str:
        return f"dtype {'|'.join(self.dtypes)}"


@final
@dataclass(frozen=True)
class OfKind:
    """The layer is of one of these kinds, where an expert is a linear. Text form: ``kind linear|conv2d``."""

    kinds: tuple[LayerKind, ...]

    def __post_init__(self) -> None:
        unknown = [name for name in self.kinds if name not in KINDS]
        if unknown or not self.kinds:
            raise SpecError(f"kind: {'|'.join(unknown)!r} is not one of {', '.join(KINDS)}")

    def broken(self, layer: Layer) -> str | None:
        kind = "linear" if layer.kind == "expert" else layer.kind
        return None if kind in self.kinds else f"its kind is {kind}"

    def __str__(self) -> str:
        return f"kind {'|'.join(self.kinds)}"


@final
@dataclass(frozen=True)
class NoBias:
    """The layer adds no bias. Text form: ``no bias``."""

    def broken(self, layer: Layer) -> str | None:
        return "it has one" if layer.bias else None

    def __str__(self) -> str:
        return "no bias"


@final
@dataclass(frozen=True)
class ZeroPadding:
    """A convolution pads with zeros or not at all. Text form: ``zero padding``."""

    def broken(self, layer: Layer) -> str | None:
        return None if layer.padding == "zeros" else f"it pads by {layer.padding}"

    def __str__(self) -> str:
        return "zero padding"


Constraint = Multiple | AtMost | MoreThan | OfDtype | OfKind | NoBias | ZeroPadding


def _is(layer: Layer, axis: Axis) -> str:
    return f"{axis} is {_size(layer, axis)}"


def broken(constraints: tuple[Constraint, ...], layer: Layer) -> str:
    """What of ``constraints`` a layer breaks, as the reason why it stays float; empty if nothing."""
    found = ((constraint, constraint.broken(layer)) for constraint in constraints)
    return "; ".join(f"needs {constraint}: {how}" for constraint, how in found if how is not None)


_FORMS: Final[tuple[tuple[str, Callable[[re.Match[str]], Constraint]], ...]] = (
    (r"([NK])(?:/(\d{1,9}))? % (\d{1,9})", lambda m: Multiple(_axis(m[1]), int(m[3]), int(m[2] or 1))),
    (r"([NK]) <= (\d{1,9})", lambda m: AtMost(_axis(m[1]), int(m[2]))),
    (r"([NK]) > (\d{1,9})", lambda m: MoreThan(_axis(m[1]), int(m[2]))),
    (r"dtype (\S+)", lambda m: OfDtype(tuple(m[1].split("|")))),
    (r"kind (\S+)", lambda m: OfKind(cast(Any, tuple(m[1].split("|"))))),
    (r"no bias", lambda m: NoBias()),
    (r"zero padding", lambda m: ZeroPadding()),
)


def _axis(text: str) -> Axis:
    return "N" if text == "N" else "K"


def parse_constraint(text: str) -> Constraint:
    """The constraint that ``text`` writes, such as ``K % 64``. Raises ``SpecError`` for another text."""
    for pattern, made in _FORMS:
        if (found := re.fullmatch(pattern, text)) is not None:
            return made(found)
    raise SpecError(
        f"{text!r} is not a constraint; write K % 64, K/32 % 2, N <= 65535, K > 128, dtype float16|bfloat16,"
        " kind linear|conv2d, no bias or zero padding"
    )
