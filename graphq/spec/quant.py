"""How one tensor is quantized: format, granularity, and where its scales come from.

Text form of a ``Quant``: ``<format>[/<granularity>][/dynamic | /<method>][/source]``; ``parse_quant`` and ``str`` are
inverses. ``source``: scales and codes are computed in the dtype of the source's weights.
Granularities: ``tensor``, ``channel``, ``token``, ``g<N>`` (groups of N), ``<R>x<C>`` (blocks of R rows by C columns).
Formats that come with a granularity, the mx formats and nvfp4, are written without one. Methods: ``ema[<c>]``,
``percentile[<p>]``, ``histogram``, ``entropy``, ``mse[<shrink>:<grid>:<norm>:<patience>]``, ``ofmr[_absolute]``,
``ssz[<steps>]``, ``hqq[<norm>:<beta>:<growth>:<steps>]``; none is written for min-max.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, assert_never, final, get_args

from graphq.errors import SpecError
from graphq.spec.formats import MX_BLOCK, NVFP4_BLOCK, Float, Format, Int, Mx, Nvfp4, TwoLevel, find_format

MAX_GROUP_SIZE: Final = 10**9 - 1  # what the text form writes, in nine digits


@final
@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@final
@dataclass(frozen=True)
class PerChannel:
    """One scale for each output channel of a weight."""


@final
@dataclass(frozen=True)
class PerToken:
    """One scale for each vector along the last axis of an activation, computed at run time."""


def _check_size(size: object, name: str = "group_size") -> None:
    if type(size) is not int or not 0 < size <= MAX_GROUP_SIZE:
        raise SpecError(f"{name}: {size!r} is not a positive integer")


@final
@dataclass(frozen=True)
class PerGroup:
    """One scale for each ``size`` neighbours along the input axis; the last group may be short."""

    size: int

    def __post_init__(self) -> None:
        _check_size(self.size)


@final
@dataclass(frozen=True)
class PerBlock:
    """One scale for each block of ``rows`` output channels by ``columns`` inputs of a weight; the last may be short."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        _check_size(self.rows, "block rows")
        _check_size(self.columns, "block columns")


Granularity = PerTensor | PerChannel | PerToken | PerGroup | PerBlock


def granularity_name(granularity: Granularity) -> Literal["tensor", "channel", "token", "group", "block"]:
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
        case _:
            assert_never(granularity)


def _check_share(name: str, value: object, above: float, up_to: float) -> None:
    if not (isinstance(value, float | int) and not isinstance(value, bool) and above < value <= up_to):
        raise SpecError(f"{name}: {value!r} is not a number above {above:g} and up to {up_to:g}")


@final
@dataclass(frozen=True)
class MinMax:
    """The range from the smallest to the largest element seen."""

    def __str__(self) -> str:
        return "minmax"


@final
@dataclass(frozen=True)
class MovingAverage:
    """The exponential moving average of the batches' extremes: old * (1 - constant) + new * constant."""

    constant: float = 0.01

    def __post_init__(self) -> None:
        _check_share("ema", self.constant, 0, 1)

    def __str__(self) -> str:
        return f"ema{_number(self.constant, 0.01)}"


@final
@dataclass(frozen=True)
class Percentile:
    """The range that leaves out (100 - percent) % of the elements: all of them by magnitude, half of them at each end
    for asymmetric formats.
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        _check_share("percentile", self.percent, 50, 100)

    def __str__(self) -> str:
        return f"percentile{_number(self.percent, 99.99)}"


@final
@dataclass(frozen=True)
class Histogram:
    """The range whose mean squared quantization error on a histogram of the elements is the least."""

    def __str__(self) -> str:
        return "histogram"


@final
@dataclass(frozen=True)
class Entropy:
    """The range for which the Kullback-Leibler divergence of the quantized distribution is the least."""

    def __str__(self) -> str:
        return "entropy"


@final
@dataclass(frozen=True)
class Mse:
    """The extremes shrunk by 1, 1 - 1/grid, ... down to 1 - shrink, where sum |x - x_q|^norm is the least.

    The search ends when no scale was improved ``patience`` times in turn (llm-compressor's ``memoryless_mse``).
    """

    shrink: float = 0.2
    grid: int = 100
    norm: float = 2.4
    patience: int = 5

    def __post_init__(self) -> None:
        _check_share("mse shrink", self.shrink, 0, 1)
        _check_share("mse norm", self.norm, 0, 100)
        _check_size(self.grid, "mse grid")
        _check_size(self.patience, "mse patience")

    def __str__(self) -> str:
        if self == Mse():
            return "mse"
        return f"mse{_text(self.shrink)}:{self.grid}:{_text(self.norm)}:{self.patience}"


@final
@dataclass(frozen=True)
class Ofmr:
    """The power of two among eleven whose error in the layer's own output is the least, as AMCT's ``ofmr``.

    The eleven lie around the one that min-max gives; ``relative=False``: from 2^-5 to 2^5, as AMCT has it, whatever
    the magnitude of the tensor.
    """

    relative: bool = True

    def __str__(self) -> str:
        return "ofmr" if self.relative else "ofmr_absolute"


@final
@dataclass(frozen=True)
class Ssz:
    """Scale and codes fitted to each other in turn by least squares, up to ``steps`` times (msModelSlim's ``ssz``)."""

    steps: int = 50

    def __post_init__(self) -> None:
        _check_size(self.steps, "ssz steps")

    def __str__(self) -> str:
        return f"ssz{_number(self.steps, 50)}"


@final
@dataclass(frozen=True)
class Hqq:
    """Zero point and scale where sum |x - x_q|^norm is small, by ``steps`` half-quadratic steps for each.

    ``beta``, the weight of the quadratic part, grows by the factor ``growth`` at each step (``graphq.numerics.hqq``).
    """

    norm: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    steps: int = 20

    def __post_init__(self) -> None:
        _check_share("hqq norm", self.norm, 0, 1)
        _check_share("hqq beta", self.beta, 0, 1e6)
        _check_share("hqq growth", self.growth, 0, 10)
        _check_size(self.steps, "hqq steps")

    def __str__(self) -> str:
        if self == Hqq():
            return "hqq"
        return f"hqq{_text(self.norm)}:{_text(self.beta)}:{_text(self.growth)}:{self.steps}"


RangeMethod = MinMax | MovingAverage | Percentile | Histogram | Entropy | Mse | Ofmr | Ssz | Hqq


def _text(value: float) -> str:
    return repr(int(value)) if value == int(value) else repr(value)


def _number(value: float, default: float) -> str:
    return "" if value == default else _text(value)


Arithmetic = Literal["float32", "source"]


@final
@dataclass(frozen=True)
class Quant:
    """How one tensor is quantized. ``dynamic``: the scale is computed at run time, from the tensor itself.

    An nvfp4 activation that is not dynamic has its global scale from calibration and those of its blocks from run time.

    ``arithmetic``: ``source`` rounds a symmetric integer weight, its scales and its quotients to the dtype that the
    source records, as msModelSlim does (``graphq.numerics.source_arithmetic``).
    """

    format: Format
    granularity: Granularity
    dynamic: bool = False
    method: RangeMethod = MinMax()
    arithmetic: Arithmetic = "float32"

    def __post_init__(self) -> None:
        if self.arithmetic not in get_args(Arithmetic):
            raise SpecError(f"arithmetic: {self.arithmetic!r} is not one of {', '.join(get_args(Arithmetic))}")
        if self.arithmetic == "source":
            if not isinstance(self.format, Int) or not self.format.symmetric or self.format.divisor != "max":
                raise SpecError(f"{self}: source is the arithmetic of symmetric integers, such as int8; leave it out")
            if self.dynamic or not isinstance(self.method, MinMax | Ssz):
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
        if isinstance(self.method, Hqq) and isinstance(self.format, Float) and self.format.scale == "pow2":
            raise SpecError(f"{self}: hqq fits scales that may be any number; those of {self.format} are powers of two")
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


def own_granularity(format: Format) -> PerGroup | None:
    """The granularity that belongs to the format, for those that have one."""
    match format:
        case Mx():
            return PerGroup(MX_BLOCK)
        case Nvfp4():
            return PerGroup(NVFP4_BLOCK)
        case _:
            return None


_GRANULARITY: Final = re.compile(r"(?P<word>tensor|channel|token)|g(?P<size>\d{1,9})|(?P<r>\d{1,9})x(?P<c>\d{1,9})")
_NUMBER: Final = r"\d{1,9}(?:\.\d{1,17})?(?:e-\d{1,2})?"
_METHODS: Final[tuple[tuple[str, Callable[[re.Match[str]], RangeMethod]], ...]] = (
    (rf"ema({_NUMBER})?", lambda m: MovingAverage(float(m[1])) if m[1] else MovingAverage()),
    (rf"percentile({_NUMBER})?", lambda m: Percentile(float(m[1])) if m[1] else Percentile()),
    (r"histogram", lambda m: Histogram()),
    (r"entropy", lambda m: Entropy()),
    (
        rf"mse(?:({_NUMBER}):(\d{{1,9}}):({_NUMBER}):(\d{{1,9}}))?",
        lambda m: Mse(float(m[1]), int(m[2]), float(m[3]), int(m[4])) if m[1] else Mse(),
    ),
    (r"ofmr(_absolute)?", lambda m: Ofmr(relative=m[1] is None)),
    (r"ssz(\d{1,9})?", lambda m: Ssz(int(m[1])) if m[1] else Ssz()),
    (
        rf"hqq(?:({_NUMBER}):({_NUMBER}):({_NUMBER}):(\d{{1,9}}))?",
        lambda m: Hqq(float(m[1]), float(m[2]), float(m[3]), int(m[4])) if m[1] else Hqq(),
    ),
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
        case _:
            return PerGroup(int(found["size"])) if found["size"] else PerBlock(int(found["r"]), int(found["c"]))


def _parse_method(text: str) -> RangeMethod | None:
    for pattern, made in _METHODS:
        if (found := re.fullmatch(pattern, text)) is not None:
            return made(found)
    return None


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
    elif len(parts) > 1 and (chosen := _parse_method(parts[-1])) is not None:
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
