"""How tensors are quantized, as data: formats, granularities, a layer's plan. Illegal states cannot be written.

Text form of a ``Quant``: ``int<bits>[/asym][/half|by_sign]/<tensor|channel|token|g<N>>[/dynamic]``; ``parse_quant`` and
``str`` are inverses.
"""

import re
from dataclasses import dataclass
from typing import Final, Literal, assert_never, final

from graphq.errors import SpecError

Divisor = Literal["max", "half", "by_sign"]
MIN_BITS: Final = 2
MAX_WEIGHT_BITS: Final = 8
ACTIVATION_BITS: Final = (4, 6, 8, 16)
MAX_GROUP_SIZE: Final = 10**9 - 1  # what the text form writes, in nine digits


@final
@dataclass(frozen=True)
class Int:
    """Two's-complement integer codes from -2^(bits-1) to 2^(bits-1)-1, asymmetric ones with a zero point in that range.

    ``divisor`` gives a symmetric scale: absmax / (2^(bits-1)-1) for ``max``, absmax / ((2^bits-1)/2) for ``half`` (as
    compressed-tensors does), and AMCT's sign-dependent rule for ``by_sign`` (2^(bits-1) where the extreme is negative).
    """

    bits: int
    symmetric: bool = True
    divisor: Divisor = "max"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not (MIN_BITS <= self.bits <= 8 or self.bits == 16):  # bool is an int too
            raise SpecError(f"bits: {self.bits!r} is not one of 2 to 8 or 16")
        if type(self.symmetric) is not bool:
            raise SpecError(f"symmetric: {self.symmetric!r} is not true or false")
        if self.divisor not in ("max", "half", "by_sign"):
            raise SpecError(f"divisor: {self.divisor!r} is not one of max, half, by_sign")
        if self.divisor != "max" and not self.symmetric:
            raise SpecError(f"divisor: {self.divisor} is a rule for symmetric scales; this format is asymmetric")

    def __str__(self) -> str:
        parts = [f"int{self.bits}"]
        if not self.symmetric:
            parts.append("asym")
        if self.divisor != "max":
            parts.append(self.divisor)
        return "/".join(parts)


Format = Int  # a union once float formats exist; every ``match`` on it ends in ``assert_never``


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


@final
@dataclass(frozen=True)
class PerGroup:
    """One scale for each ``size`` neighbours along the input axis; the last group may be short."""

    size: int

    def __post_init__(self) -> None:
        if type(self.size) is not int or not 0 < self.size <= MAX_GROUP_SIZE:
            raise SpecError(f"group_size: {self.size!r} is not a positive integer")


Granularity = PerTensor | PerChannel | PerToken | PerGroup


def granularity_name(granularity: Granularity) -> Literal["tensor", "channel", "token", "group"]:
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
        case _:
            assert_never(granularity)


@final
@dataclass(frozen=True)
class Quant:
    """How one tensor is quantized. ``dynamic``: the scale is computed at run time, from the tensor itself."""

    format: Format
    granularity: Granularity
    dynamic: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.granularity, PerToken) and not self.dynamic:
            raise SpecError(f"{self}: one scale per token exists only at run time; write {self}/dynamic")

    def __str__(self) -> str:
        match self.granularity:
            case PerGroup(size):
                granularity = f"g{size}"
            case other:
                granularity = granularity_name(other)
        return f"{self.format}/{granularity}" + ("/dynamic" if self.dynamic else "")


_QUANT: Final = re.compile(
    r"int(?P<bits>\d{1,3})(?P<asym>/asym)?(/(?P<divisor>half|by_sign))?"
    r"/((?P<word>tensor|channel|token)|g(?P<size>\d{1,9}))(?P<dynamic>/dynamic)?"
)


def parse_quant(text: str) -> Quant:
    """The ``Quant`` that ``text`` writes, such as ``int4/asym/g128``. Raises ``SpecError`` for another text."""
    found = _QUANT.fullmatch(text)
    if not found:
        raise SpecError(
            f"{text!r} is not a format; write int<bits>[/asym][/half|by_sign]/<tensor|channel|token|g<size>>[/dynamic],"
            " such as int4/asym/g128 or int8/token/dynamic"
        )
    granularity: Granularity
    match found["word"]:
        case "tensor":
            granularity = PerTensor()
        case "channel":
            granularity = PerChannel()
        case "token":
            granularity = PerToken()
        case _:
            granularity = PerGroup(int(found["size"]))
    divisor: Divisor = "max"
    if found["divisor"] == "half":
        divisor = "half"
    elif found["divisor"] == "by_sign":
        divisor = "by_sign"
    return Quant(Int(int(found["bits"]), not found["asym"], divisor), granularity, bool(found["dynamic"]))


@final
@dataclass(frozen=True)
class Plan:
    """How one layer is quantized: its weight, its input activation, or both. At least one is given."""

    weight: Quant | None = None
    input: Quant | None = None

    def __post_init__(self) -> None:
        if self.weight is None and self.input is None:
            raise SpecError("a plan quantizes a weight or an input; to keep a layer float, write a keep-float rule")
        if self.weight is not None:
            if self.weight.dynamic:
                raise SpecError(f"weight: {self.weight} is dynamic; a weight's scale is known when it is compiled")
            if self.weight.format.bits > MAX_WEIGHT_BITS:
                raise SpecError(f"weight: {self.weight} has {self.weight.format.bits} bits; weights hold 2 to 8")
        if self.input is not None:
            if isinstance(self.input.granularity, PerChannel | PerGroup):
                raise SpecError(f"input: {self.input}: activations have one scale per tensor or per token")
            if self.input.format.bits not in ACTIVATION_BITS:
                raise SpecError(
                    f"input: {self.input} has {self.input.format.bits} bits; activations hold 4, 6, 8 or 16"
                )

    def __str__(self) -> str:
        return ", ".join(
            f"{role} {quant}" for role, quant in (("weight", self.weight), ("input", self.input)) if quant is not None
        )


@final
@dataclass(frozen=True)
class KeepFloat:
    """The layer stays float, for this reason."""

    reason: str

    def __str__(self) -> str:
        return f"float ({self.reason})"


Decision = Plan | KeepFloat


@final
@dataclass(frozen=True)
class PerExpert:
    """The decisions for a stack of experts, one for each."""

    decisions: tuple[Decision, ...]

    def __str__(self) -> str:
        counts = {str(d): self.decisions.count(d) for d in dict.fromkeys(self.decisions)}
        return "; ".join(f"{count} x {text}" for text, count in counts.items())
