"""Where the range of a tensor comes from that its scale has to hold, and the text form of each method.

``minmax`` (which a ``Quant`` leaves out), ``ema[<c>]``, ``percentile[<p>]``, ``histogram``, ``entropy``,
``mse[<shrink>:<grid>:<norm>:<patience>]``, ``ofmr[_absolute]``, ``ssz[<steps>]`` and
``hqq[<norm>:<beta>:<growth>:<steps>]``.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, final

from graphq.spec.numbers import check_share, check_size, number_text, suffix


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
        check_share("ema", self.constant, 0, 1)

    def __str__(self) -> str:
        return f"ema{suffix(self.constant, 0.01)}"


@final
@dataclass(frozen=True)
class Percentile:
    """The range that leaves out (100 - percent) % of the elements: all of them by magnitude, half of them at each end
    for asymmetric formats.
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        check_share("percentile", self.percent, 50, 100)

    def __str__(self) -> str:
        return f"percentile{suffix(self.percent, 99.99)}"


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
        check_share("mse shrink", self.shrink, 0, 1)
        check_share("mse norm", self.norm, 0, 100)
        check_size(self.grid, "mse grid")
        check_size(self.patience, "mse patience")

    def __str__(self) -> str:
        if self == Mse():
            return "mse"
        return f"mse{number_text(self.shrink)}:{self.grid}:{number_text(self.norm)}:{self.patience}"


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
        check_size(self.steps, "ssz steps")

    def __str__(self) -> str:
        return f"ssz{suffix(self.steps, 50)}"


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
        check_share("hqq norm", self.norm, 0, 1)
        check_share("hqq beta", self.beta, 0, 1e6)
        check_share("hqq growth", self.growth, 0, 10)
        check_size(self.steps, "hqq steps")

    def __str__(self) -> str:
        if self == Hqq():
            return "hqq"
        return f"hqq{number_text(self.norm)}:{number_text(self.beta)}:{number_text(self.growth)}:{self.steps}"


RangeMethod = MinMax | MovingAverage | Percentile | Histogram | Entropy | Mse | Ofmr | Ssz | Hqq

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


def parse_range_method(text: str) -> RangeMethod | None:
    """The method that ``text`` writes; None for another text, ``minmax`` among them."""
    for pattern, made in _METHODS:
        if (found := re.fullmatch(pattern, text)) is not None:
            return made(found)
    return None
