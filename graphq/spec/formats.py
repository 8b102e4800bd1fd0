"""Number formats: what a code means, and how a scale follows from what it has to hold. Illegal ones cannot be written.

Text forms, which ``parse_format`` and ``str`` take to each other:

- ``int<bits>[/asym[/joint]|/half|/by_sign]``, ``uint8``, ``uint16`` ``[/joint]``: integers; but for ``/half`` and
  ``/by_sign`` each ``[/pow2]``;
- ``float8_e4m3fn``, ``float8_e5m2``, ``float6_e2m3``, ``float6_e3m2``, ``float4_e2m1``, ``float4_e1m2``, each
  ``[/pow2]``, and ``hifloat8[/to15|/unit|/pow2]``: floating-point numbers with a scale;
- ``mxfp8_e4m3``, ``mxfp8_e5m2``, ``mxfp6_e2m3``, ``mxfp6_e3m2``, ``mxfp4``, ``mxint8``, each ``[/<exponent rule>]``:
  blocks of 32 with a shared exponent (OCP Microscaling Formats 1.0);
- ``nvfp4``: blocks of 16 with a float8 scale, under a float32 one;
- ``int4/over_int8``, ``float4_e2m1/over_float8``: codes of groups over codes of channels.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, assert_never, final, get_args

from graphq.errors import SpecError

Divisor = Literal["max", "half", "by_sign"]
FloatLayout = Literal[
    "float8_e4m3fn", "float8_e5m2", "hifloat8", "float6_e2m3", "float6_e3m2", "float4_e2m1", "float4_e1m2"
]
FloatScale = Literal["max", "to15", "unit", "pow2"]
MxElement = Literal["float8_e4m3fn", "float8_e5m2", "float6_e2m3", "float6_e3m2", "float4_e2m1", "int8"]
ExponentRule = Literal["ocp", "even", "amct", "amct_llm", "nearest", "ceil", "ascend"]
MIN_BITS: Final = 2
INT_BITS: Final = (*range(MIN_BITS, 9), 16)
BIAS_BITS: Final = 32  # of symmetric codes at the scale of products, which no spec asks for
MX_BLOCK: Final = 32
NVFP4_BLOCK: Final = 16


@final
@dataclass(frozen=True)
class Int:
    """Two's-complement integer codes from -2^(bits-1) to 2^(bits-1)-1, asymmetric ones with a zero point in that range.

    ``divisor`` gives a symmetric scale: absmax / (2^(bits-1)-1) for ``max``, absmax / ((2^bits-1)/2) for ``half`` (as
    compressed-tensors does), and AMCT's rule for ``by_sign``: by 2^(bits-1) where the extreme is negative, else as
    ``max``, and 1 where that is below 2^-23.
    Unsigned codes, of 8 or 16 bits, go from 0 to 2^bits-1 and are asymmetric. ``joint``: the zero point is added before
    rounding, round(x / scale + zero_point), as AMCT, msModelSlim and compressed-tensors do; ONNX adds it afterwards,
    and so does graphq. The two differ for halves where the zero point is odd. ``power_of_two``: a scale is the smallest
    power of two that is not below the one that the range gives, so that nothing in the range is clipped.
    """

    bits: int
    symmetric: bool = True
    divisor: Divisor = "max"
    signed: bool = True
    joint: bool = False
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (*INT_BITS, BIAS_BITS):  # bool is an int too
            raise SpecError(f"bits: {self.bits!r} is not one of 2 to 8 or 16")
        if type(self.symmetric) is not bool:
            raise SpecError(f"symmetric: {self.symmetric!r} is not true or false")
        if self.divisor not in get_args(Divisor):
            raise SpecError(f"divisor: {self.divisor!r} is not one of max, half, by_sign")
        if self.divisor != "max" and not self.symmetric:
            raise SpecError(f"divisor: {self.divisor} is a rule for symmetric scales; this format is asymmetric")
        if self.bits == BIAS_BITS and not (self.symmetric and self.divisor == "max" and self.signed):
            raise SpecError("bits: 32 are those of a bias, whose codes are signed and symmetric")
        if self.joint and self.symmetric:
            raise SpecError("joint: says how a zero point is added; this format is symmetric")
        if type(self.power_of_two) is not bool:
            raise SpecError(f"power_of_two: {self.power_of_two!r} is not true or false")
        if self.power_of_two and (self.divisor != "max" or self.bits == BIAS_BITS):
            rule = f"{self.divisor} is" if self.divisor != "max" else "those of a bias are"
            raise SpecError(f"pow2: scales are powers of two; {rule} a rule for others")
        if not self.signed and (self.symmetric or self.bits not in (8, 16)):
            raise SpecError(f"unsigned: uint{self.bits} is not one of uint8 and uint16, which are asymmetric")

    def __str__(self) -> str:
        parts = [f"{'' if self.signed else 'u'}int{self.bits}"]
        if self.signed and not self.symmetric:
            parts.append("asym")
        if self.joint:
            parts.append("joint")
        if self.divisor != "max":
            parts.append(self.divisor)
        if self.power_of_two:
            parts.append("pow2")
        return "/".join(parts)


@final
@dataclass(frozen=True)
class Float:
    """Floating-point codes of a layout, with a scale that takes the largest magnitude to the layout's full scale.

    Full scale is the largest finite value (448, 57344, 7.5, 28, 6, 1.75), and for hifloat8 16, up to which its
    significand has four bits. ``scale``: ``to15`` takes the largest magnitude to 15 instead, ``unit`` makes every scale
    1 (both hifloat8 alone, whose codes span 2^-22 to 2^15), ``pow2`` takes the smallest power of two that leaves
    nothing above full scale.
    """

    layout: FloatLayout
    scale: FloatScale = "max"

    def __post_init__(self) -> None:
        if self.layout not in get_args(FloatLayout):
            raise SpecError(f"layout: {self.layout!r} is not one of {', '.join(get_args(FloatLayout))}")
        if self.scale not in get_args(FloatScale):
            raise SpecError(f"scale: {self.scale!r} is not one of {', '.join(get_args(FloatScale))}")
        if self.scale in ("to15", "unit") and self.layout != "hifloat8":
            raise SpecError(f"scale: {self.scale} is a convention of hifloat8, not of {self.layout}")

    def __str__(self) -> str:
        return self.layout if self.scale == "max" else f"{self.layout}/{self.scale}"


_MX_NAMES: Final[dict[MxElement, str]] = {
    "float8_e4m3fn": "mxfp8_e4m3",
    "float8_e5m2": "mxfp8_e5m2",
    "float6_e2m3": "mxfp6_e2m3",
    "float6_e3m2": "mxfp6_e3m2",
    "float4_e2m1": "mxfp4",
    "int8": "mxint8",
}


@final
@dataclass(frozen=True)
class Mx:
    """Elements that share an exponent, an E8M0 scale, over blocks of 32 along the input axis.

    The exponent follows from the largest magnitude of a block by ``rule``, which also says how halves are rounded
    (to even, except for ``amct_llm``, ``nearest`` and ``ascend``: away from zero); ``graphq.numerics.mx`` has the
    rules. ``int8``: from -127 to 127, in units of 2^-6.
    """

    element: MxElement
    rule: ExponentRule = "ocp"

    def __post_init__(self) -> None:
        if self.element not in get_args(MxElement):
            raise SpecError(f"element: {self.element!r} is not one of {', '.join(get_args(MxElement))}")
        if self.rule not in get_args(ExponentRule):
            raise SpecError(f"exponent rule: {self.rule!r} is not one of {', '.join(get_args(ExponentRule))}")

    def __str__(self) -> str:
        name = _MX_NAMES[self.element]
        return name if self.rule == "ocp" else f"{name}/{self.rule}"


@final
@dataclass(frozen=True)
class Nvfp4:
    """float4_e2m1 codes with a float8_e4m3fn scale over blocks of 16, divided by one float32 scale for the tensor."""

    def __str__(self) -> str:
        return "nvfp4"


@final
@dataclass(frozen=True)
class TwoLevel:
    """Codes of groups over the codes of whole channels: ``int4`` over int8, ``float4_e2m1`` over float8_e4m3fn.

    A channel is quantized to 8 bits first, and these codes' values by groups to 4 bits; a value is code times group
    scale times channel scale.
    """

    element: Literal["int4", "float4_e2m1"]

    def __post_init__(self) -> None:
        if self.element not in ("int4", "float4_e2m1"):
            raise SpecError(f"element: {self.element!r} is not one of int4, float4_e2m1")

    def __str__(self) -> str:
        return f"{self.element}/over_{'int8' if self.element == 'int4' else 'float8'}"


Format = Int | Float | Mx | Nvfp4 | TwoLevel  # every ``match`` on it ends in ``assert_never``
SourceFormat = Int | Float | Mx | Nvfp4  # those of which ``has_source_arithmetic`` may be true


def element_name(format: Format) -> str:
    """The format of one code: ``int4``, ``uint8``, ``float8_e4m3fn``, ..."""
    match format:
        case Int():
            return f"{'' if format.signed else 'u'}int{format.bits}"
        case Float():
            return format.layout
        case Mx() | TwoLevel():
            return format.element
        case Nvfp4():
            return "float4_e2m1"
        case _:
            assert_never(format)


def code_bits(format: Format) -> int:
    """Bits of one code: 2 to 8, 16, or a bias's 32."""
    found = re.search(r"\d+", element_name(format))
    assert found is not None
    return int(found[0])


def has_source_arithmetic(format: Format) -> bool:
    """Whether msModelSlim or compressed-tensors computes such weights in the dtype of the model: with their divisors,
    zero points that are added before rounding, and float scales that take the extreme to the largest value. The scales
    of compressed-tensors' mx formats are the same either way.
    """
    match format:
        case Int(bits, True, "max" | "half" as divisor) if bits <= 8:
            return format == Int(bits, divisor=divisor)
        case Int(bits, False) if bits <= 8:
            return format == Int(bits, False, joint=True)
        case Float("float8_e4m3fn" | "float4_e2m1", "max") | Mx(rule="ascend") | Nvfp4():
            return True
        case _:
            return False


def is_asymmetric(format: Format) -> bool:
    """Whether codes have a zero point."""
    return isinstance(format, Int) and not format.symmetric


def has_global_scale(format: Format) -> bool:
    """Whether there is a second scale, over those of blocks."""
    return isinstance(format, Nvfp4 | TwoLevel)


def codes_of(format: Format) -> Format:
    """The format of the same codes with no rule of its own for scales, as profiles' tables name it."""
    return Int(format.bits, format.symmetric, signed=format.signed) if isinstance(format, Int) else format


def same_codes(one: Format, other: Format) -> bool:
    """Whether codes of one mean the same as those of the other, given scale and zero point."""
    return codes_of(one) == codes_of(other)


def with_codes(format: Format, codes: Format) -> Format:
    """The codes of ``codes``, with scales that are powers of two where those of ``format`` are; ``format`` itself where
    it has these codes.
    """
    if same_codes(format, codes) or not isinstance(format, Int) or not isinstance(codes, Int):
        return format if same_codes(format, codes) else codes
    return Int(codes.bits, codes.symmetric, signed=codes.signed, power_of_two=format.power_of_two)


_INT: Final = re.compile(
    r"int(?P<bits>\d{1,3})(?P<asym>/asym)?(?P<joint>/joint)?(/(?P<divisor>half|by_sign))?(?P<pow2>/pow2)?"
)
NAMED_FORMATS: Final[dict[str, Format]] = {  # all but signed integers
    str(format): format
    for format in (
        *(
            Int(bits, symmetric=False, signed=False, joint=joint, power_of_two=power_of_two)
            for bits in (8, 16)
            for joint in (False, True)
            for power_of_two in (False, True)
        ),
        *(Float(layout, scale) for layout in get_args(FloatLayout) for scale in ("max", "pow2")),
        Float("hifloat8", "to15"),
        Float("hifloat8", "unit"),
        *(Mx(element, rule) for element in get_args(MxElement) for rule in get_args(ExponentRule)),
        Nvfp4(),
        TwoLevel("int4"),
        TwoLevel("float4_e2m1"),
    )
}


@cache
def find_format(text: str) -> Format | None:
    """The format whose ``str`` is ``text``, None if it is the text of none. Raises ``SpecError`` for ``int9``."""
    if text.startswith(("uint8/asym", "uint16/asym")):  # which they are anyhow
        text = text.replace("/asym", "", 1)
    if text in NAMED_FORMATS:
        return NAMED_FORMATS[text]
    found = _INT.fullmatch(text)
    if not found:
        return None
    divisor: Divisor = "max"
    if found["divisor"] == "half":
        divisor = "half"
    elif found["divisor"] == "by_sign":
        divisor = "by_sign"
    joint, power_of_two = bool(found["joint"]), bool(found["pow2"])
    return Int(int(found["bits"]), not found["asym"], divisor, joint=joint, power_of_two=power_of_two)


def parse_format(text: str) -> Format:
    """The format whose ``str`` is ``text``. Raises ``SpecError`` for another text."""
    found = find_format(text)
    if found is None:
        names = ", ".join(name for name in NAMED_FORMATS if "/" not in name or "/over_" in name)
        raise SpecError(
            f"{text!r} is not a format; write int<bits>[/asym[/joint]|/half|/by_sign][/pow2], or one of {names}"
        )
    return found
