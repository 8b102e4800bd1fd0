"""How one tensor is quantized: format, granularity, and where its scales come from.

Text form of a ``Quant``: ``<format>[/<granularity>][/dynamic | /<method>][/source]``; ``parse_quant`` and ``str`` are
inverses. ``source``: scales and codes are computed in the dtype of the source's weights.
Granularities: ``tensor``, ``channel``, ``token``, ``g<N>`` (groups of N), ``<R>x<C>`` (blocks of R rows by C columns),
``head`` (of caches and what attention reads).
Formats that come with a granularity, the mx formats and nvfp4, are written without one. The methods are those of
``graphq.spec.range_methods``; none is written for min-max.
"""

import re
from dataclasses import dataclass, replace
from typing import Final, Literal, assert_never, final, get_args

from graphq.errors import SpecError
from graphq.spec.formats import (
    BIAS_BITS,
    MX_BLOCK,
    NVFP4_BLOCK,
    Float,
    Format,
    Int,
    Mx,
    Nvfp4,
    TwoLevel,
    find_format,
    has_source_arithmetic,
)
from graphq.spec.numbers import MAX_SIZE, check_size
from graphq.spec.range_methods import (
    Entropy,
    Histogram,
    Hqq,
    MinMax,
    MovingAverage,
    Mse,
    Ofmr,
    Percentile,
    RangeMethod,
    Ssz,
    parse_range_method,
)

__all__ = [  # with the range methods, which a Quant is made of
    "MAX_GROUP_SIZE",
    "Arithmetic",
    "Entropy",
    "Granularity",
    "Histogram",
    "Hqq",
    "MinMax",
    "MovingAverage",
    "Mse",
    "Ofmr",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerHead",
    "PerTensor",
    "PerToken",
    "Percentile",
    "Quant",
    "RangeMethod",
    "Ssz",
    "granularity_name",
    "has_powers_of_two",
    "has_source_arithmetic",
    "own_granularity",
    "parse_quant",
    "powers_of_two",
]

MAX_GROUP_SIZE: Final = MAX_SIZE
_MIN_MAX: Final = MinMax()


@final
@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@final
@dataclass(frozen=True)
class PerChannel:
    """One scale for each output channel of a weight, or for each channel of each head of a cache."""


@final
@dataclass(frozen=True)
class PerHead:
    """One scale for each attention head of a cache, or of what attention reads."""


@final
@dataclass(frozen=True)
class PerToken:
    """One scale for each vector along the last axis of an activation, computed at run time."""


@final
@dataclass(frozen=True)
class PerGroup:
    """One scale for each ``size`` neighbours along the input axis; the last group may be short."""

    size: int

    def __post_init__(self) -> None:
        check_size(self.size)


@final
@dataclass(frozen=True)
class PerBlock:
    """One scale for each block of ``rows`` output channels by ``columns`` inputs of a weight; the last may be short."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        check_size(self.rows, "block rows")
        check_size(self.columns, "block columns")


Granularity = PerTensor | PerChannel | PerToken | PerGroup | PerBlock | PerHead


def granularity_name(granularity: Granularity) -> Literal["tensor", "channel", "token", "group", "block", "head"]:
    """The word a table uses for this granularity."""
    match granularity:
        case PerTensor():
            return "tensor"
        case PerChannel():
            return "channel"
        case PerToken():
            return "token"
        case PerGroup():
            return "group"
        case PerBlock():
            return "block"
        case PerHead():
            return "head"
        case _:
            assert_never(granularity)


Arithmetic = Literal["float32", "source"]


@final
@dataclass(frozen=True)
class Quant:
    """How one tensor is quantized. ``dynamic``: the scale is computed at run time, from the tensor itself.

    An nvfp4 activation that is not dynamic has its global scale from calibration and those of its blocks from run time.

    ``arithmetic``: ``source`` rounds a weight, its scales and its quotients to the dtype that the source records, as
    msModelSlim does and compressed-tensors (``graphq.numerics.source_arithmetic``).
    """

    format: Format
    granularity: Granularity
    dynamic: bool = False
    method: RangeMethod = _MIN_MAX
    arithmetic: Arithmetic = "float32"

    def __post_init__(self) -> None:
        if isinstance(self.format, Int) and self.format.bits == BIAS_BITS:
            raise SpecError(f"bits: {BIAS_BITS} are those of biases, which a profile decides on; write 2 to 8 or 16")
        if self.arithmetic not in get_args(Arithmetic):
            raise SpecError(f"arithmetic: {self.arithmetic!r} is not one of {', '.join(get_args(Arithmetic))}")
        if self.arithmetic == "source":
            if not has_source_arithmetic(self.format):
                raise SpecError(
                    f"{self}: source is the arithmetic of int8, int8/half, int8/asym/joint, float8_e4m3fn, nvfp4"
                    " and mx formats by the rule ascend; leave it out"
                )
            is_own_ssz = isinstance(self.method, Ssz) and self.format == Int(getattr(self.format, "bits", 8))
            if self.dynamic or not (self.method == MinMax() or is_own_ssz):
                raise SpecError(f"{self}: source is the arithmetic of weights by min-max or ssz; leave it out")
        own = own_granularity(self.format)
        if own is not None and self.granularity != own:
            raise SpecError(
                f"{self.format} has a scale for each {own.size} inputs, not by {granularity_name(self.granularity)}"
            )
        if isinstance(self.format, TwoLevel) and not isinstance(self.granularity, PerGroup):
            raise SpecError(
                f"{self}: {self.format} has scales of groups over those of channels; write {self.format}/g128"
            )
        if isinstance(self.granularity, PerToken) and not self.dynamic:
            raise SpecError(f"{self}: one scale per token exists only at run time; write {self}/dynamic")
        if self.method == MinMax():
            return
        if self.dynamic:
            raise SpecError(f"{self}: {self.method} takes its range from calibration, not at run time; leave one out")
        is_average = isinstance(self.format, Nvfp4) and isinstance(self.method, MovingAverage)  # of its global scale
        if (own is not None and not is_average) or isinstance(self.format, TwoLevel):
            raise SpecError(f"{self}: {self.format} takes its scales from the extremes; leave out {self.method}")
        if isinstance(self.method, Ssz) and not (isinstance(self.format, Int) and self.format.symmetric):
            raise SpecError(f"{self}: ssz fits the scales of symmetric integers")
        if isinstance(self.method, Hqq | Ssz) and has_powers_of_two(self.format):
            name = "hqq" if isinstance(self.method, Hqq) else "ssz"
            raise SpecError(
                f"{self}: {name} fits scales that may be any number; those of {self.format} are powers of two"
            )
        if isinstance(self.format, Float) and self.format.scale == "unit":
            raise SpecError(f"{self}: the scale of {self.format} is 1; leave out {self.method}")
        if isinstance(self.method, Ofmr) and isinstance(self.format, Int) and not self.format.symmetric:
            raise SpecError(f"{self}: ofmr gives powers of two without a zero point; the format is asymmetric")

    def __str__(self) -> str:
        parts = [str(self.format)]
        match self.granularity:
            case PerGroup(size):
                parts += [f"g{size}"] * (own_granularity(self.format) is None)
            case PerBlock(rows, columns):
                parts.append(f"{rows}x{columns}")
            case other:
                parts.append(granularity_name(other))
        if self.dynamic:
            parts.append("dynamic")
        if self.method != MinMax():
            parts.append(str(self.method))
        if self.arithmetic != "float32":
            parts.append(self.arithmetic)
        return "/".join(parts)


def has_powers_of_two(format: Format) -> bool:
    """Whether the format's own rule for scales gives powers of two."""
    match format:
        case Int():
            return format.power_of_two
        case Float():
            return format.scale == "pow2"
        case Mx():
            return True
        case Nvfp4() | TwoLevel():
            return False
        case _:
            assert_never(format)


def powers_of_two(quant: Quant) -> Quant:
    """The same with scales that are powers of two, of integers; another rule for their scales is left out.

    Raises ``SpecError`` for methods that fit scales which may be any number.
    """
    format = quant.format
    if not isinstance(format, Int) or format.power_of_two:
        return quant
    exact = replace(format, divisor="max", power_of_two=True)
    return replace(quant, format=exact, arithmetic="float32")


def own_granularity(format: Format) -> PerGroup | None:
    """The granularity that belongs to the format, for those that have one."""
    match format:
        case Mx():
            return PerGroup(MX_BLOCK)
        case Nvfp4():
            return PerGroup(NVFP4_BLOCK)
        case _:
            return None


_GRANULARITY: Final = re.compile(
    r"(?P<word>tensor|channel|token|head)|g(?P<size>\d{1,9})|(?P<r>\d{1,9})x(?P<c>\d{1,9})"
)


def _parse_granularity(text: str) -> Granularity | None:
    found = _GRANULARITY.fullmatch(text)
    if found is None:
        return None
    match found["word"]:
        case "tensor":
            return PerTensor()
        case "channel":
            return PerChannel()
        case "token":
            return PerToken()
        case "head":
            return PerHead()
        case _:
            return PerGroup(int(found["size"])) if found["size"] else PerBlock(int(found["r"]), int(found["c"]))


def parse_quant(text: str) -> Quant:
    """The ``Quant`` that ``text`` writes, such as ``int4/asym/g128``. Raises ``SpecError`` for another text."""
    parts = text.split("/")
    method: RangeMethod | None = MinMax()
    arithmetic: Arithmetic = "source" if len(parts) > 1 and parts[-1] == "source" else "float32"
    if arithmetic == "source":
        parts.pop()
    dynamic = len(parts) > 1 and parts[-1] == "dynamic"
    if dynamic:
        parts.pop()
    elif len(parts) > 1 and (chosen := parse_range_method(parts[-1])) is not None:
        method = chosen
        parts.pop()
    granularity = _parse_granularity(parts[-1]) if len(parts) > 1 else None
    if granularity is not None:
        parts.pop()
    format = find_format("/".join(parts))
    if format is None:
        raise SpecError(
            f"{text!r} is not a format; write <format>[/<granularity>][/dynamic or /<method>], such as int4/asym/g128,"
            " int8/token/dynamic, float8_e4m3fn/channel or mxfp4"
        )
    own = own_granularity(format)
    if own is not None:
        if granularity is not None:
            raise SpecError(f"{text!r}: {format} has a scale for each {own.size} inputs; leave out the granularity")
        granularity = own
    if granularity is None:
        raise SpecError(
            f"{text!r} does not say how many scales there are; write {format} with /tensor, /channel, /token, /g<size>"
            " or /<rows>x<columns>"
        )
    return Quant(format, granularity, dynamic, method, arithmetic)
