"""qconfigs of msModelSlim (``act`` and ``weight``, each of dtype, scope, symmetric, method, ext) as plans, and back.

Integers round as msModelSlim does: absmax / (2^(bits-1) - 1) for symmetric ranges, ``joint`` for asymmetric ones. The
exponents of mx blocks follow its rule, ``ascend``. Symmetric integer weights with a scale for each channel are computed
in the dtype of the model's weights, as its own files show; groups and asymmetric weights, which it has by gptq alone,
in float32.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, assert_never, final

from graphq.errors import SpecError
from graphq.frontends.document import Plain, Section, nearest, show
from graphq.spec.formats import Float, Int, Mx, Nvfp4, TwoLevel
from graphq.spec.plan import Plan
from graphq.spec.quant import Histogram, MinMax, PerChannel, PerGroup, PerTensor, PerToken, Quant, Ssz

Role = Literal["act", "weight"]
Scalar = str | int | float | bool | None
# The algorithm that rounds weights, with its options; msModelSlim has it as a weight's method.
Rounding = tuple[str, tuple[tuple[str, Scalar], ...]]

PD_MIX: Final = (
    "static scales to decode and dynamic ones to prefill are calibrated as static ones; the target ascend writes both"
    " with its option prefill=dynamic"
)
_STATIC: Final = ("per_tensor", "pd_mix")
_DTYPES: Final = ("int8", "int4", "mxfp8", "mxfp4", "fp8_e4m3", "float")
_SCOPES: Final[Mapping[Role, Mapping[str, tuple[str, ...]]]] = {
    "act": {
        "int8": ("per_tensor", "per_token", "pd_mix"),
        "int4": ("per_token",),
        "fp8_e4m3": ("per_token",),
        **dict.fromkeys(("mxfp8", "mxfp4"), ("per_block",)),
    },
    "weight": {
        **dict.fromkeys(("int8", "int4"), ("per_channel", "per_group")),
        "fp8_e4m3": ("per_channel",),
        **dict.fromkeys(("mxfp8", "mxfp4"), ("per_block",)),
    },
}
_METHODS: Final[Mapping[Role, tuple[str, ...]]] = {
    "act": ("minmax", "histogram", "none"),
    "weight": ("minmax", "ssz", "gptq", "autoround"),
}
_EXT: Final[Mapping[tuple[Role, str], tuple[str, ...]]] = {
    ("act", "minmax"): ("aggregation_type", "axes", "scale_dtype"),
    ("weight", "minmax"): ("group_size", "axes"),
    ("weight", "ssz"): ("step", "group_size"),
    ("weight", "gptq"): ("percdamp", "block_size", "group_size"),
    ("weight", "autoround"): ("scale_dtype", "group_size"),
}
STORED: Final = "scales are float32 until a target stores them"
LACKING: Final = {
    "dual_scale": "mxfp4 blocks under a second scale are not supported; write per_block",
    "per_head": "attention's own inputs are not quantized; write per_token",
    "mse_round": "a search for the shared exponent is not supported; write minmax",
    "ceil_x": "its exponent rule is not supported; write minmax",
    "fouroversix": "two full scales in one tensor are not supported; write minmax",
    "dualscale": "mxfp4 blocks under a second scale are not supported; write minmax with scope per_block",
}
# (act, weight) -> the type that msModelSlim saves. "asym" stands for weights that may be asymmetric, too.
_PAIRS: Final[Mapping[tuple[str, str], str]] = {
    ("int8 per_tensor", "int8 per_channel"): "W8A8",
    ("int8 pd_mix", "int8 per_channel"): "W8A8_MIX",
    ("int8 per_token", "int8 per_channel"): "W8A8_DYNAMIC",
    ("int8 per_token", "int8 per_group asym"): "W8A8_DYNAMIC",
    ("float", "int8 per_channel asym"): "W8A16",
    ("float", "int8 per_group asym"): "W8A16",
    ("float", "int4 per_channel asym"): "W4A16",
    ("float", "int4 per_group asym"): "W4A16",
    ("int8 per_token", "int4 per_channel"): "W4A8_DYNAMIC",
    ("int8 per_token", "int4 per_group"): "W4A8_DYNAMIC",
    ("int4 per_token", "int4 per_channel asym"): "W4A4_DYNAMIC",
    ("int4 per_token", "int4 per_group asym"): "W4A4_DYNAMIC",
    ("fp8_e4m3 per_token", "fp8_e4m3 per_channel"): "WFP8AFP8_DYNAMIC",
    ("mxfp8 per_block", "mxfp8 per_block"): "W8A8_MXFP8",
    ("mxfp8 per_block", "mxfp4 per_block"): "W4A8_MXFP",
    ("mxfp4 per_block", "mxfp4 per_block"): "W4A4_MXFP4",
}


@final
@dataclass(frozen=True)
class Side:
    """One tensor's qconfig. ``step``: of ssz."""

    dtype: str
    scope: str
    symmetric: bool = True
    method: str = "minmax"
    group_size: int | None = None
    step: int | None = None

    def __str__(self) -> str:
        return f"{self.dtype} {self.scope}" + ("" if self.symmetric else " asym")


@final
@dataclass(frozen=True)
class Qconfig:
    """What a qconfig says of a layer: its plan, and how its weight is rounded where that is an algorithm."""

    plan: Plan
    rounding: Rounding | None = None


def read_number(section: Section, key: str) -> float | None:
    """A number; also one that YAML 1.1 reads as a string, such as ``1e-5``."""
    value = section.values.get(key)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if value is None or type(value) in (int, float):
        return value if isinstance(value, int | float) else None
    section.report(f"{show(value)} is not a number", key)
    return None


def read_qconfig(section: Section, autoround: Rounding | None = None) -> Qconfig | None:
    """The plan of a layer. ``autoround``: the algorithm that rounds the weights of an autoround_quant."""
    section.only(("act", "weight"))
    act, weight = section.section("act"), section.section("weight", required=True)
    input = None if act is None else read_side(act, "act")
    side = None if weight is None else read_side(weight, "weight", autoround)
    if side is None or weight is None or (act is not None and input is None):
        return None
    plan = section.made(lambda: plan_of(input, side))
    if plan is None:
        return None
    for why in beyond(input, side):
        section.document.notes.append(section.document.prefix(section.at) + why)
    return Qconfig(plan, _read_rounding(weight, side, autoround))


def plan_of(act: Side | None, weight: Side) -> Plan:
    """The plan of these sides. Raises ``SpecError`` for a pair that msModelSlim has no type for."""
    given = "float" if act is None or act.dtype == "float" else str(Side(act.dtype, act.scope))
    if (given, str(weight)) not in _PAIRS and (given, f"{Side(weight.dtype, weight.scope)} asym") not in _PAIRS:
        weights = [key[1].replace(" asym", "") for key in _PAIRS if key[0] == given]
        raise SpecError(
            f"msModelSlim has no {weight} weights with {act or 'float'} activations; with these it has"
            f" {', '.join(weights)}"
        )
    two_levels = given == "int8 per_token" and (weight.dtype, weight.scope) == ("int4", "per_group")
    return Plan(
        Quant(TwoLevel("int4"), PerGroup(weight.group_size or 0)) if two_levels else _quant(weight, "weight"),
        None if act is None or act.dtype == "float" else _quant(act, "act"),
    )


def beyond(act: Side | None, weight: Side) -> Sequence[str]:
    """What of a pair is read here, and is not in msModelSlim's v1 itself."""
    found: list[str] = []
    if act is not None and act.scope == "pd_mix":
        found.append(PD_MIX)
    is_int = weight.dtype in ("int8", "int4")
    is_float = act is None or act.dtype == "float"
    if is_float and weight.dtype == "int4":
        found.append("msModelSlim's v1 has no W4A16 itself, its v0 has")
    if not is_float and act is not None and (act.dtype, str(weight)) == ("int8", "int4 per_group"):
        found.append("msModelSlim's v1 has no W4A8 in groups itself; read as v0's, int4 over int8")
    elif is_int and weight.method == "minmax" and (weight.scope == "per_group" or not weight.symmetric):
        found.append("msModelSlim's v1 has groups and asymmetric weights by gptq alone, not by minmax")
    return found


def _quant(side: Side, role: Role) -> Quant:
    is_dynamic = role == "act" and side.scope not in _STATIC
    match side.dtype:
        case "int8" | "int4":
            format = Int(int(side.dtype[3:]), side.symmetric, joint=not side.symmetric)
        case "fp8_e4m3":
            format = Float("float8_e4m3fn")
        case _:
            format = Mx("float8_e4m3fn" if side.dtype == "mxfp8" else "float4_e2m1", "ascend")
            return Quant(format, PerGroup(32), is_dynamic, arithmetic="float32" if role == "act" else "source")
    granularity = {"per_token": PerToken(), "per_channel": PerChannel()}.get(side.scope)
    if side.scope in _STATIC:
        granularity = PerTensor()
    method = Histogram() if side.method == "histogram" else MinMax()
    if side.method == "ssz":
        method = Ssz() if side.step is None else Ssz(side.step)
    own = role == "weight" and side.symmetric and side.scope == "per_channel"
    arithmetic = "source" if own else "float32"
    return Quant(format, granularity or PerGroup(side.group_size or 0), is_dynamic, method, arithmetic)


def read_side(section: Section, role: Role, autoround: Rounding | None = None) -> Side | None:
    """One tensor's qconfig."""
    section.only(("dtype", "scope", "symmetric", "method", "ext"))
    dtype = _word(section, "dtype", [one for one in _DTYPES if role == "act" or one != "float"])
    if dtype == "float":
        scope, method = section.text("scope") or "per_tensor", section.text("method") or "none"
        if method != "none":
            section.report(f"{show(method)} finds ranges, and float has none; write none", "method")
        return Side(dtype, scope)
    scope = _word(section, "scope", () if dtype is None else _SCOPES[role][dtype], f"{role} {dtype}")
    method = _word(section, "method", _METHODS[role] if role == "weight" else ("minmax", "histogram"))
    is_int = dtype in ("int8", "int4")
    symmetric = section.boolean("symmetric", required=is_int)
    if dtype is None or scope is None or method is None or (is_int and symmetric is None):
        return None
    if scope == "pd_mix" and symmetric:
        section.report("pd_mix is asymmetric in msModelSlim; write false", "symmetric")
        return None
    if symmetric is False and (not is_int or (role == "act" and scope not in _STATIC)):
        section.report(f"{dtype} {scope} of {role} is symmetric in msModelSlim; write true", "symmetric")
        return None
    side = Side(dtype, scope, symmetric is not False, method)
    problem = _method_problem(side, role, autoround)
    if problem is not None:
        section.report(problem, "method")
        return None
    return _read_ext(section, side, role)


def _method_problem(side: Side, role: Role, autoround: Rounding | None) -> str | None:
    is_int = side.dtype in ("int8", "int4")
    if side.method == "histogram" and side.scope != "per_tensor":
        return f"histogram is for scope per_tensor, whose range is not found at run time; {side} takes minmax"
    if side.method == "ssz" and str(side) not in ("int8 per_channel", "int4 per_channel"):
        return f"ssz is for symmetric integers with scope per_channel, not for {side}"
    if side.method in ("gptq", "autoround") and not is_int:
        return f"{side.method} is for int8 and int4, not for {side.dtype}"
    if role == "weight" and autoround is None and side.method == "autoround":
        return "autoround is part of the processor autoround_quant alone"
    if role == "weight" and autoround is not None and side.method != "autoround":
        return f"{side.method} is not part of autoround_quant; write autoround, or a linear_quant"
    return None


def _read_ext(section: Section, side: Side, role: Role) -> Side | None:
    ext = section.section("ext") or Section(section.document, {}, (*section.at, "ext"))
    ext.only(_EXT.get((role, side.method), ()))
    if ext.text("aggregation_type") not in (None, "max"):
        ext.report("only max, the extremes of all batches, is supported", "aggregation_type")
    if "axes" in ext.values:
        if side.scope != "per_block":
            ext.unused("axes", f"scope is {side.scope}")
        elif ext.values["axes"] in (-1, [-1]):
            ext.unused("axes", "blocks lie along the inputs")
        else:
            ext.report("blocks lie along the inputs; write -1", "axes")
    if role == "act" and "scale_dtype" in ext.values:
        ext.unused("scale_dtype", STORED)
    size: int | None = None
    if side.scope == "per_group":
        size = ext.integer("group_size", required=side.method != "gptq")
        size = 128 if size is None and "group_size" not in ext.values else size
        if size is not None and ext.made(lambda: PerGroup(size), "group_size") is None:
            return None
    elif "group_size" in ext.values:
        ext.unused("group_size", f"scope is {side.scope}")
    step = ext.integer("step") if side.method == "ssz" else None
    if step is not None and ext.made(lambda: Ssz(step), "step") is None:
        return None
    if side.scope == "per_group" and size is None:
        return None
    return Side(side.dtype, side.scope, side.symmetric, side.method, size, step)


def _read_rounding(section: Section, side: Side, autoround: Rounding | None) -> Rounding | None:
    ext = section.section("ext") or Section(section.document, {}, (*section.at, "ext"))
    if side.method == "autoround":
        if "scale_dtype" in ext.values:
            ext.unused("scale_dtype", STORED)
        return autoround
    if side.method != "gptq":
        return None
    options: list[tuple[str, Scalar]] = [("act_order", "none"), ("scales", "plan")]
    if (damping := read_number(ext, "percdamp")) is not None:
        if not 0 < damping <= 1:
            ext.report(f"{damping} is not a number above 0, up to 1", "percdamp")
        options.append(("dampening", damping))
    if (block_size := ext.integer("block_size")) is not None:
        if block_size < 1:
            ext.report(f"{block_size} is not a whole number from 1", "block_size")
        options.append(("block_size", block_size))
    return ("gptq", tuple(options))


def _word(section: Section, key: str, words: Sequence[str], what: str = "") -> str | None:
    """The word at ``key``, one of ``words``."""
    text = section.text(key, required=True)
    if text is None or text in words or not words:
        return text if words else None
    if text in LACKING:
        section.report(f"{text}: {LACKING[text]}", key)
    else:
        has = f"{what} has " if what else "there are " if len(words) > 1 else "there is "
        section.report(f"{show(text)}: {has}{', '.join(words)}{nearest(text, words)}", key)
    return None


def side_of(quant: Quant, role: Role) -> Side:
    """The side that ``_quant`` makes this quant of. Raises ``SpecError`` for one that msModelSlim has not."""
    wrong = SpecError(f"{quant}: msModelSlim has no such {'weights' if role == 'weight' else 'activations'}")
    size: int | None = None
    match quant.granularity:
        case PerTensor():
            scope = "per_tensor"
        case PerChannel():
            scope = "per_channel"
        case PerToken():
            scope = "per_token"
        case PerGroup(size):
            scope = "per_group"
        case _:
            raise wrong
    symmetric, step = True, None
    match quant.format:
        case Int(bits, symmetric, power_of_two=False):
            dtype = f"int{bits}"
        case Float():
            dtype = "fp8_e4m3"
        case Mx():
            dtype, scope, size = ("mxfp8" if quant.format.element == "float8_e4m3fn" else "mxfp4"), "per_block", None
        case TwoLevel():
            dtype = "int4"
        case Int() | Nvfp4():
            raise wrong
        case _:
            assert_never(quant.format)
    method = "histogram" if quant.method == Histogram() else "minmax"
    if isinstance(quant.method, Ssz):
        method, step = "ssz", None if quant.method.steps == Ssz().steps else quant.method.steps
    side = Side(dtype, scope, symmetric, method, size, step)
    of_two = isinstance(quant.format, TwoLevel) and quant.format.element == "int4"
    if scope not in _SCOPES[role].get(dtype, ()):
        raise wrong
    made = quant if of_two else _quant(side, role)
    if dataclasses.replace(made, arithmetic=quant.arithmetic) == quant != made:
        raise SpecError(f"{quant}: msModelSlim computes such weights in the model's dtype; write {made}")
    if made != quant:
        raise wrong
    return side


def write_qconfig(plan: Plan, rounding: Rounding | None) -> dict[str, Plain]:
    """The qconfig that ``read_qconfig`` reads as these. Raises ``SpecError`` for what msModelSlim has not."""
    if plan.weight is None:
        raise SpecError(f"{plan}: msModelSlim quantizes no activations without their weights")
    weight = side_of(plan.weight, "weight")
    act = None if plan.input is None else side_of(plan.input, "act")
    if plan_of(act, weight) != plan:
        raise SpecError(f"{plan}: msModelSlim has no such pair; its int4 groups under int8 activations are over_int8")
    method, ext = weight.method, dict[str, Plain]()
    if weight.step is not None:
        ext["step"] = weight.step
    if weight.group_size is not None:
        ext["group_size"] = weight.group_size
    if rounding is not None:
        name, options = rounding
        if weight.method != "minmax":
            raise SpecError(f"{plan}: msModelSlim takes {weight.method} or {name} for a weight, not both")
        method = "gptq" if name == "gptq" else "autoround"
        ext |= write_gptq(options) if name == "gptq" else {}
    values: dict[str, Plain] = {} if act is None else {"act": _written(act, act.method, {})}
    values["weight"] = _written(weight, method, ext)
    return values


def write_gptq(options: Sequence[tuple[str, Scalar]]) -> dict[str, Plain]:
    """What ext says for gptq with these options. Raises ``SpecError`` for those that msModelSlim has not."""
    found: dict[str, Plain] = {}
    given = {"act_order": "static", "scales": "search", **dict(options)}
    for name, value in given.items():
        match name, value:
            case ("act_order", "none") | ("scales", "plan"):
                pass
            case ("dampening", _):
                found["percdamp"] = value
            case ("block_size", _):
                found["block_size"] = value
            case _:
                raise SpecError(f"gptq: msModelSlim has no {name} {value}; its gptq is act_order none, scales plan")
    return found


def _written(side: Side, method: str, ext: dict[str, Plain]) -> dict[str, Plain]:
    values: dict[str, Plain] = {"scope": side.scope, "dtype": side.dtype, "symmetric": side.symmetric, "method": method}
    if ext:
        values["ext"] = ext
    return values
