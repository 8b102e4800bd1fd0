"""AMCT's legal combinations, a row each, and what of a layer each needs.

Rows are those that its code takes, and those that only its documentation of ``quantize`` of February 2026 has:
float4_e1m2, MXFP8 x MXFP4, and minmax for HiFloat8, FP8 and MXFP4 weights. Constraints are those of the code, and where
the documentation asks for a stricter alignment, that.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, final

from graphq.spec.constraint import (
    AtMost,
    Constraint,
    MoreThan,
    Multiple,
    NoBias,
    OfDtype,
    OfKind,
    ZeroPadding,
)
from graphq.spec.match import LayerKind

WEIGHTS: Final = (
    *("int8", "int4", "hifloat8", "float8_e4m3fn", "mxfp4_e2m1", "float4_e2m1", "float4_e1m2", "mxfp8_e4m3fn"),
)
INPUTS: Final = ("int8", "int4", "hifloat8", "float8_e4m3fn", "mxfp8_e4m3fn")
ALGORITHMS: Final = ("minmax", "smoothquant", "awq", "gptq", "ofmr", "quantile", "cast", "mxquant")
NO_ALGORITHM: Final = ""
_LONGEST: Final = 65535


@final
@dataclass(frozen=True)
class Combination:
    """One choice for each column of the table. ``inputs``, and what belongs to it, is None for float inputs;
    ``algorithm`` is empty and ``group_size`` None where none is given.
    """

    weights: str
    strategy: str
    symmetric: bool
    group_size: int | None = None
    algorithm: str = "minmax"
    inputs: str | None = None
    input_strategy: str | None = None
    input_symmetric: bool | None = None

    def __str__(self) -> str:
        group = f" of {self.group_size}" * (self.group_size is not None)
        text = f"weights {self.weights} by {self.strategy}{group}{_sign(self.symmetric)}"
        if self.inputs is not None:
            text += f", inputs {self.inputs} by {self.input_strategy}{_sign(self.input_symmetric)}"
        return f"{text}, {f'algorithm {self.algorithm}' if self.algorithm else 'no algorithm'}"


def _sign(symmetric: bool | None) -> str:
    return "" if symmetric is None else " symmetric" if symmetric else " asymmetric"


@final
@dataclass(frozen=True)
class Row:
    """What may stand together. ``group_sizes``: empty for any multiple of 32, where ``strategies`` holds ``group``."""

    inputs: str | None
    weights: str
    algorithms: tuple[str, ...]
    strategies: tuple[str, ...]
    group_sizes: tuple[int, ...]
    input_strategies: tuple[str, ...]
    asymmetric_weights: bool
    asymmetric_inputs: bool
    dtypes: tuple[str, ...]
    kinds: tuple[LayerKind, ...] = ("linear",)
    constraints: tuple[Constraint, ...] = ()
    note: str = ""

    def fits(self, size: int) -> bool:
        """Whether groups may have this size."""
        return size in self.group_sizes if self.group_sizes else size > 0 and size % 32 == 0

    def needs(self, group_size: int | None) -> tuple[Constraint, ...]:
        """What a layer must be for this row."""
        found: list[Constraint] = [OfKind(self.kinds), OfDtype(self.dtypes)]
        if self.inputs is None:
            found += [AtMost("N", _LONGEST), AtMost("K", _LONGEST)]
        if group_size is not None and not self.weights.startswith("mx"):
            found.append(MoreThan("K", group_size))
        if "conv2d" in self.kinds:
            found.append(ZeroPadding())
        return (*found, *self.constraints)

    def closest(self, to: Combination) -> tuple[int, Combination]:
        """The combination of this row that differs from ``to`` in the fewest columns, and in how many."""
        strategy = to.strategy if to.strategy in self.strategies else self.strategies[0]
        size = None
        if strategy == "group":
            size = to.group_size
            if size is None or not self.fits(size):
                allowed = self.group_sizes or (32 * max(1, round(to.group_size / 32)) if to.group_size else 32,)
                size = min(allowed, key=lambda one: abs(one - (to.group_size or one)))
        found = Combination(
            self.weights,
            strategy,
            to.symmetric or not self.asymmetric_weights,
            size,
            to.algorithm if to.algorithm in self.algorithms else self.algorithms[0],
        )
        if self.inputs is not None:
            how = to.input_strategy if to.input_strategy in self.input_strategies else self.input_strategies[0]
            symmetric = to.input_symmetric is not False or not self.asymmetric_inputs
            found = dataclasses.replace(
                found, inputs=self.inputs, input_strategy=how, input_symmetric=symmetric if how else None
            )
        return _distance(found, to), found


def _distance(one: Combination, other: Combination) -> int:
    """In how many columns two differ; what follows from another column (no groups, no inputs) counts once."""
    columns = ["weights", "strategy", "symmetric", "algorithm", "inputs"]
    columns += ["group_size"] * (one.strategy == other.strategy)
    columns += ["input_strategy", "input_symmetric"] * (one.inputs is not None and other.inputs is not None)
    return sum(getattr(one, column) != getattr(other, column) for column in columns)


_ANY: Final = ("float32", "bfloat16", "float16")
_HALF: Final = ("bfloat16", "float16")
_BFLOAT: Final = ("bfloat16",)
_WIDE: Final = ("tensor", "channel")
_ALL: Final = ("tensor", "channel", "group")
_GROUP: Final = ("group",)
_FP4: Final = (32, 64, 128, 256)
_BOTH: Final[tuple[LayerKind, ...]] = ("linear", "conv2d")


def _by(size: int) -> tuple[Constraint, ...]:
    return Multiple("K", size), Multiple("N", size)


_EVEN: Final = (Multiple("K", 2, 32),)
_TOKEN: Final = (Multiple("K", 16), Multiple("N", 8))
_HIF8: Final = ("smoothquant", "quantile", "cast")
_MX: Final = ("mxquant", NO_ALGORITHM)  # the documentation has these without an algorithm

_OLD: Final = "AMCT's documentation of February 2026 has this combination, its code of August 2026 has not"

# inputs, weights, algorithms, strategies of weights, group sizes, strategies of inputs, asymmetric weights and inputs,
# dtypes, kinds
ROWS: Final = (
    Row("int8", "int8", ("minmax", "smoothquant"), _WIDE, (), ("tensor",), False, True, _HALF),
    Row("int8", "int8", ("minmax", "smoothquant"), _WIDE, (), ("token",), False, False, _HALF, constraints=_TOKEN),
    Row(
        *("int8", "int4", ("minmax", "smoothquant"), _WIDE, (), ("tensor",), False, True, ("float16",)),
        constraints=_by(8),
    ),
    Row("hifloat8", "hifloat8", ("ofmr",), _WIDE, (), ("tensor", "token"), False, False, _ANY, _BOTH),
    Row("hifloat8", "hifloat8", _HIF8, _WIDE, (), ("tensor", "token"), False, False, _ANY),
    Row("float8_e4m3fn", "float8_e4m3fn", ("ofmr",), _WIDE, (), ("tensor",), False, False, _ANY, _BOTH),
    Row("mxfp8_e4m3fn", "mxfp8_e4m3fn", _MX, _GROUP, (32,), ("group",), False, False, _BFLOAT, constraints=_EVEN),
    Row(
        *("float8_e4m3fn", "float4_e2m1", ("minmax", "smoothquant"), _GROUP, _FP4, ("tensor",), False, False, _BFLOAT),
        constraints=(Multiple("K", 64), NoBias()),
    ),
    Row(None, "int8", ("minmax", "awq", "gptq"), _ALL, (), (), True, False, _HALF, constraints=_by(32)),
    Row(None, "int4", ("minmax", "awq", "gptq"), _ALL, (), (), True, False, _ANY, constraints=_by(64)),
    Row(None, "hifloat8", ("ofmr", "gptq", "cast", "quantile"), _WIDE, (), (), False, False, _HALF),
    Row(None, "float8_e4m3fn", ("ofmr", "gptq"), _WIDE, (), (), False, False, _HALF),
    Row(None, "mxfp4_e2m1", ("awq", "gptq", "mxquant"), _GROUP, (32,), (), False, False, _HALF, constraints=_by(64)),
    Row(None, "float4_e2m1", ("minmax", "awq", "gptq"), _GROUP, _FP4, (), False, False, _HALF, constraints=_by(64)),
    # of the documentation alone
    Row(None, "hifloat8", ("minmax",), _WIDE, (), (), False, False, _HALF, note=_OLD),
    Row(None, "float8_e4m3fn", ("minmax",), _WIDE, (), (), False, False, _HALF, note=_OLD),
    Row(None, "mxfp4_e2m1", ("minmax",), _GROUP, (32,), (), False, False, _HALF, constraints=_by(64), note=_OLD),
    Row(
        *(None, "float4_e1m2", ("minmax", "awq", "gptq"), _GROUP, _FP4, (), False, False, _HALF),
        constraints=_by(64),
        note=_OLD,
    ),
    Row(
        *("mxfp8_e4m3fn", "mxfp4_e2m1", _MX, _GROUP, (32,), ("group",), False, False, _BFLOAT),
        constraints=(Multiple("K", 64),),
        note=_OLD,
    ),
)


def legal(one: Combination) -> Row | None:
    """The row that holds the combination."""
    return next((row for row in ROWS if row.closest(one)[1] == one), None)


def nearest_legal(one: Combination) -> Combination:
    """The legal combination that differs in the fewest columns; of equals, the one of the first row."""
    return min((row.closest(one) for row in ROWS), key=lambda found: found[0])[1]


def combinations(row: Row, group_size: int | None) -> Iterator[Combination]:
    """All of a row, those with groups in this size."""
    inputs: list[tuple[str | None, str | None, bool | None]] = [(None, None, None)]
    if row.inputs is not None:
        signs = (True, False) if row.asymmetric_inputs else (True,)
        inputs = [(row.inputs, how, symmetric) for how in row.input_strategies for symmetric in signs]
    for strategy in row.strategies:
        size = group_size if strategy == "group" else None
        if strategy == "group" and (size is None or not row.fits(size)):
            continue
        for symmetric in (True, False) if row.asymmetric_weights else (True,):
            for algorithm in row.algorithms:
                for one in inputs:
                    yield Combination(row.weights, strategy, symmetric, size, algorithm, *one)
