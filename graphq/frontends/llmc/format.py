"""LLMC's words for number formats: ``bit``, ``symmetric``, ``quant_type``, ``use_qtorch``; in both directions.

Without ``use_qtorch`` LLMC fits an exponent's bias to the largest magnitude, which is a scale that takes it to the
format's largest value. It knows neither NaN nor infinity: e4m3 and e5m2 then have larger numbers than float8 has.
"""

from dataclasses import dataclass
from typing import Final, Literal, final

from graphq.frontends.document import Plain, Section, nearest, show
from graphq.spec.formats import MIN_BITS, Float, FloatLayout, Format, Int
from graphq.spec.plan import ACTIVATION_BITS, MAX_WEIGHT_BITS
from graphq.spec.quant import RangeMethod

Role = Literal["weight", "act", "kvcache"]
Kind = Literal["int-quant", "float-quant"]

BITS: Final[dict[Role, tuple[int, ...]]] = {
    "weight": tuple(range(MIN_BITS, MAX_WEIGHT_BITS + 1)),
    "act": ACTIVATION_BITS,
    "kvcache": tuple(range(MIN_BITS, MAX_WEIGHT_BITS + 1)),
}
TWO_LEVELS_BIT: Final = 48  # what LLMC calls int4 inside int8
_KINDS: Final[dict[str, Kind]] = {  # the documentation writes float_quant
    "int-quant": "int-quant",
    "int_quant": "int-quant",
    "float-quant": "float-quant",
    "float_quant": "float-quant",
}
_FLOATS: Final[dict[str, tuple[FloatLayout, float]]] = {
    "e4m3": ("float8_e4m3fn", 448.0),
    "e5m2": ("float8_e5m2", 57344.0),
    "e3m2": ("float6_e3m2", 28.0),
    "e2m3": ("float6_e2m3", 7.5),
    "e2m1": ("float4_e2m1", 6.0),
    "e1m2": ("float4_e1m2", 1.75),
}
_WITH_QTORCH: Final = ("e4m3", "e5m2", "e3m2", "e2m1")  # LLMC has ranges of these
_WITH_NAN: Final = ("e4m3", "e5m2")


@final
@dataclass(frozen=True)
class Around:
    """What a config says of all its tensors: the method, ``quant.quant_type``, and the weights' range under HQQ."""

    method: str | None = None
    kind: Kind | None = None
    weight_range: RangeMethod | None = None


def read_kind(section: Section) -> Kind | None:
    """The ``quant_type`` of a section."""
    word = section.text("quant_type")
    if word is not None and word not in _KINDS:
        section.report(f"{show(word)} is not supported; write int-quant or float-quant", "quant_type")
    return None if word is None else _KINDS.get(word)


def read_format(section: Section, role: Role, around: Around) -> Int | Float | None:
    """The format that ``bit`` and the keys beside it mean."""
    kind = read_kind(section) or around.kind
    if isinstance(section.values.get("bit"), str):
        return _read_float(section, kind)
    bits, symmetric = section.integer("bit", required=True), section.boolean("symmetric", required=True)
    for key in ("use_qtorch", "float_range"):
        if section.values.get(key) not in (False, None, {}, []):
            section.report("an option of float formats, such as bit: e4m3", key)
    if bits is not None and kind == "float-quant":
        section.report(f"{bits} is no float format; write e4m3, or quant_type: int-quant here", "bit")
        return None
    if bits is not None and bits not in BITS[role]:
        section.report(f"{_lacking(bits)} is not supported; {role} takes {either(BITS[role])}", "bit")
        return None
    if bits is None or symmetric is None:
        return None
    if "int_range" in section.values:
        whole = [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if symmetric else [0, 2**bits - 1]
        if section.values["int_range"] != whole:
            section.report(f"only the whole range is supported: {whole}", "int_range")
    return Int(bits, symmetric)


def _lacking(bits: int) -> str:
    return (
        f"{TWO_LEVELS_BIT} (int4 inside int8, whose groups' scales LLMC rounds to integers)"
        if bits == TWO_LEVELS_BIT
        else str(bits)
    )


def _read_float(section: Section, kind: Kind | None) -> Float | None:
    word = section.text("bit") or ""
    if kind == "int-quant":
        section.report(f"{show(word)} is a float format; write quant_type: float-quant, or a number", "bit")
        return None
    if word not in _FLOATS:
        section.report(f"{show(word)} is not one of {', '.join(_FLOATS)}{nearest(word, _FLOATS)}", "bit")
        return None
    layout, largest = _FLOATS[word]
    if section.boolean("symmetric") is False:
        section.unused("symmetric", "float formats have no zero point, in LLMC neither")
    if "int_range" in section.values:
        section.unused("int_range", "the format is no integer")
    qtorch = section.boolean("use_qtorch")
    if qtorch and word not in _WITH_QTORCH:
        section.report(f"LLMC has no range of {word} for qtorch; leave it out", "use_qtorch")
        return None
    if not qtorch and word in _WITH_NAN:
        section.report(
            f"without use_qtorch, LLMC's {word} has other values than {layout}; write use_qtorch: True", "bit"
        )
        return None
    if "float_range" in section.values:
        if not qtorch:
            section.unused("float_range", "an option of use_qtorch")
        elif section.values["float_range"] != [-largest, largest]:
            section.report(f"only the format's own range is supported: [{-largest:g}, {largest:g}]", "float_range")
    return Float(layout)


def write_format(format: Format) -> dict[str, Plain] | str:
    """The keys that ``read_format`` reads the format from; or why there are none."""
    match format:
        case Int(bits, symmetric, "max", signed=True, joint=False, power_of_two=False):
            return {"bit": bits, "symmetric": symmetric}
        case Float(layout, "max"):
            for word, (known, _) in _FLOATS.items():
                if known == layout:
                    keys: dict[str, Plain] = {"quant_type": "float-quant", "bit": word, "symmetric": True}
                    return keys | ({"use_qtorch": True} if word in _WITH_QTORCH else {})
        case _:
            pass
    return f"LLMC has no {format}"


def either(words: "tuple[str | int, ...] | list[str]") -> str:
    """``a, b or c``."""
    return " or ".join(filter(None, (", ".join(map(str, words[:-1])), str(words[-1]))))
