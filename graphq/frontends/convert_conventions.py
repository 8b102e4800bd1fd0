"""The conventions of each dialect's tool, and a spec with them in place of its own.

How an integer's scale is divided, how a zero point is added, how a shared exponent is found, and the options of an
algorithm that a tool has fixed. Bits, symmetry, granularity, group sizes, element formats, which algorithm and which
layers are no conventions: they are left as they are, for the writer to hold or to refuse.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, final

from graphq.frontends.llmc.run import TARGETS
from graphq.frontends.llmc.tensor import mse
from graphq.frontends.modelslim.write import SAVERS
from graphq.spec.algorithms import Value, defaults
from graphq.spec.folds import EVERYWHERE, NORMS, Folds
from graphq.spec.formats import (
    Divisor,
    ExponentRule,
    Float,
    FloatScale,
    Format,
    Int,
    Mx,
    MxElement,
    has_source_arithmetic,
    is_asymmetric,
)
from graphq.spec.plan import Plan
from graphq.spec.quant import (
    MinMax,
    MovingAverage,
    Mse,
    Ofmr,
    PerChannel,
    PerToken,
    Quant,
    Ssz,
)
from graphq.spec.rules import Algorithm, Order, Prefix, Run, Spec

_ANY: Final[tuple[Value, ...]] = ()


@final
@dataclass(frozen=True)
class Conventions:
    """What a tool does its own way.

    ``options``: by algorithm, those that it has, with the values that they may have, the first in place of others;
    none for any value. What it has no option for is as graphq has it by default. ``always``: those that are written.
    ``folds``: what an algorithm for all layers folds into, where that is not everything; None where a config says it.
    ``prefixes``: those that it has with an algorithm, and without one. ``averages``: whether the extremes of integer
    inputs may be averaged over batches. ``source_arithmetic``: which weights are computed in the model's dtype:
    symmetric integers with a scale for each ``channel``, or ``all`` that are by min-max.
    """

    tool: str
    text: str
    divisor: Divisor
    joint: bool
    exponents: Mapping[MxElement, ExponentRule]
    options: Mapping[str, Mapping[str, tuple[Value, ...]]]
    run: tuple[str, ...]
    targets: tuple[str, ...] = ()
    orders: tuple[Order, ...] = ("sequential", "independent")
    prefixes: tuple[tuple[Prefix, ...], tuple[Prefix, ...]] = (("quantized", "float"), ("quantized", "float"))
    always: tuple[str, ...] = ()
    folds: tuple[tuple[str, Folds], ...] | None = ()
    averages: bool = True
    source_arithmetic: Literal["", "channel", "all"] = ""
    own_mse: bool = False
    own_hifloat8: bool = False


CONVENTIONS: Final[Mapping[str, Conventions]] = {
    "llm-compressor": Conventions(
        "llm-compressor",
        "a recipe",
        "half",
        True,
        {"float8_e4m3fn": "even", "float4_e2m1": "even"},
        {
            "gptq": {**dict.fromkeys(("act_order", "block_size", "dampening"), _ANY), "scales": ("plan",)},
            "auto-round": dict.fromkeys(("steps", "lr", "batch_size"), _ANY),
            "awq": {"duo": _ANY, "n_grid": _ANY, "power": (2,), "clip": (False,), "where": ("fold",)},
            "smooth-quant": {"alpha": _ANY, "statistic": ("range",), "where": ("fold",)},
            "rotate": dict.fromkeys(("r1", "r2", "r3", "r4", "kind", "block_size"), _ANY),
        },
        ("model", "calibration", "samples", "sequence_length"),
        folds=(("smooth-quant", NORMS),),
        source_arithmetic="all",
    ),
    "llmc": Conventions(
        "LLMC",
        "an LLMC config",
        "max",
        False,
        {},
        {
            "gptq": {**dict.fromkeys(("act_order", "block_size", "dampening"), _ANY), "scales": ("plan",)},
            "awq": {"duo": (False, True), "clip": (False, True)},
            "smooth-quant": {"alpha": _ANY},
            "rotate": {
                **dict.fromkeys(("r1", "r2", "r3", "r4", "block_size"), _ANY),
                "kind": ("random_hadamard", "orthogonal"),
            },
        },
        ("model", "target", "calibration", "samples", "sequence_length", "seed"),
        tuple(dict.fromkeys(TARGETS.values())),
        ("sequential",),
        (("quantized", "float"), ("quantized",)),
        folds=(("smooth-quant", NORMS),),
        own_mse=True,
    ),
    "modelslim": Conventions(
        "msModelSlim",
        "an msModelSlim config",
        "max",
        True,
        {"float8_e4m3fn": "ascend", "float4_e2m1": "ascend"},
        {
            "gptq": {"act_order": ("none",), "scales": ("plan",), "block_size": _ANY, "dampening": _ANY},
            "auto-round": {"steps": _ANY},
            "awq": {"n_grid": _ANY, "duo": (False,), "clip": (False,)},
            "smooth-quant": {"alpha": _ANY},
            "rotate": dict.fromkeys(("r1", "r2", "r3", "r4", "block_size"), _ANY),
        },
        ("target", "calibration"),
        tuple(SAVERS.values()),
        prefixes=(("quantized",), ("quantized",)),
        always=("steps",),
        folds=None,
        averages=False,
        source_arithmetic="channel",
    ),
    "amct": Conventions(
        "AMCT",
        "an AMCT config",
        "by_sign",
        True,
        {"float8_e4m3fn": "ocp", "float4_e2m1": "amct"},
        {
            "gptq": {"scales": ("plan",)},
            "awq": {"n_grid": _ANY, "duo": (False,), "power": (4,), "clip": (False,), "where": ("multiply",)},
            "smooth-quant": {"alpha": _ANY, "where": ("multiply",)},
        },
        ("batches",),
        (),
        ("sequential",),
        (("float",), ("quantized",)),
        always=("n_grid", "alpha"),
        averages=False,
        own_hifloat8=True,
    ),
}
_DIVISORS: Final[Mapping[Divisor, str]] = {
    "max": "divides the extreme by 2^(bits-1) - 1",
    "half": "divides the extreme by (2^bits - 1) / 2",
    "by_sign": "divides a negative extreme by 2^(bits-1)",
}
_FIXED: Final[Mapping[tuple[str, str, Value], str]] = {
    ("awq", "clip", False): "AWQ does not clip",
    ("awq", "duo", False): "AWQ looks at inputs alone",
    ("awq", "power", 2): "AWQ measures squared errors",
    ("awq", "power", 4): "AWQ measures errors to the fourth power",
    ("awq", "where", "multiply"): "AWQ multiplies inputs at run time",
    ("awq", "where", "fold"): "AWQ folds factors into what stands in front",
    ("gptq", "scales", "plan"): "GPTQ takes the range's scales, and searches none",
    ("gptq", "act_order", "none"): "GPTQ leaves columns in their order",
    ("smooth-quant", "statistic", "range"): "SmoothQuant measures from smallest to largest",
    ("smooth-quant", "where", "multiply"): "SmoothQuant multiplies inputs at run time",
    ("smooth-quant", "where", "fold"): "SmoothQuant folds factors into what stands in front",
}


def adapted(spec: Spec, dialect: str) -> tuple[Spec, tuple[str, ...]]:
    """The spec with the conventions of the dialect's tool, and a line for each thing that changed."""
    own = CONVENTIONS[dialect]
    notes: list[str] = []
    rules = tuple(
        dataclasses.replace(rule, decision=_plan(rule.decision, own, notes))
        if isinstance(rule.decision, Plan)
        else rule
        for rule in spec.rules
    )
    algorithms = tuple(_algorithm(one, own, notes) for one in spec.algorithms)
    prefixes = own.prefixes[0 if any(one.name != "rtn" for one in algorithms) else 1]
    prefix, pipeline = spec.prefix, spec.pipeline
    if prefix not in prefixes:
        prefix = prefixes[0]
        notes.append(f"prefix {spec.prefix} -> {prefix}: {_calibrates(own, prefix)}")
    if pipeline not in own.orders:
        pipeline = own.orders[0]
        notes.append(f"pipeline {spec.pipeline} -> {pipeline}: {own.tool} goes from block to block")
    cache = None if spec.cache is None else _quant(spec.cache, own, notes)
    run = _run(spec.run, own, notes)
    changed = dataclasses.replace(
        spec, rules=rules, algorithms=algorithms, prefix=prefix, pipeline=pipeline, cache=cache, run=run
    )
    return changed, tuple(dict.fromkeys(notes))


def _calibrates(own: Conventions, prefix: Prefix) -> str:
    if prefix == "float":
        return f"{own.tool} calibrates every block on what float ones give"
    return f"{own.tool} calibrates each block on what those in front of it give by then"


def _plan(plan: Plan, own: Conventions, notes: list[str]) -> Plan:
    weight, input = plan.weight, plan.input
    return Plan(
        None if weight is None else _weight(weight, own, notes),
        None if input is None else _quant(input, own, notes),
    )


def _weight(quant: Quant, own: Conventions, notes: list[str]) -> Quant:
    """The weight's own convention, the arithmetic, after those of every tensor."""
    is_slims = isinstance(quant.method, Ssz) or isinstance(quant.format, Mx)  # msModelSlim's alone
    if quant.arithmetic == "source" and (not own.source_arithmetic or (is_slims and own.source_arithmetic == "all")):
        plain = dataclasses.replace(quant, arithmetic="float32")
        notes.append(f"{quant} -> {plain}: graphq computes {own.tool}'s weights in float32")
        return _quant(plain, own, notes)
    made = _quant(quant, own, notes)
    is_source = _is_in_source(made, own)
    if is_source == (made.arithmetic == "source"):
        return made
    other = dataclasses.replace(made, arithmetic="source" if is_source else "float32")
    how = "weights in the model's dtype" if is_source else "such weights in float32"
    notes.append(f"{made} -> {other}: {own.tool} computes {how}")
    return other


def _is_in_source(quant: Quant, own: Conventions) -> bool:
    """Whether the tool computes such weights in the model's dtype."""
    if own.source_arithmetic == "all":
        return quant.method == MinMax() and has_source_arithmetic(quant.format)
    has_source = has_source_arithmetic(quant.format) and isinstance(quant.method, MinMax | Ssz)
    is_own = isinstance(quant.granularity, PerChannel) or isinstance(quant.format, Mx)
    return own.source_arithmetic == "channel" and has_source and is_own and not is_asymmetric(quant.format)


def _quant(quant: Quant, own: Conventions, notes: list[str]) -> Quant:
    format, why = _format(quant, own)
    made = dataclasses.replace(quant, format=format)
    if own.own_mse and isinstance(quant.method, Mse):
        tried = quant.method
        made = dataclasses.replace(made, method=mse(tried.shrink, tried.grid))
        if made.method != tried:
            tries = f"{own.tool}'s mse has the norm 2.4 and tries every candidate"
            why = f"{why}; {tries}" if format != quant.format else tries
    if not own.averages and isinstance(quant.method, MovingAverage) and isinstance(format, Int):
        made = dataclasses.replace(made, method=MinMax())
        averages = f"{own.tool} takes the extremes of all batches"
        why = f"{why}; {averages}" if format != quant.format else averages
    if made != quant:
        notes.append(f"{quant} -> {made}: {why}")
    return made


def _format(quant: Quant, own: Conventions) -> tuple[Format, str]:
    """The tool's own format, and how it rounds."""
    match quant.format:
        case Int(symmetric=True) as format:
            exact = dataclasses.replace(format, divisor=own.divisor, power_of_two=False)
            return exact, f"{own.tool} {_DIVISORS[own.divisor]}"
        case Int() as format:
            how = "quotient and zero point together" if own.joint else "the quotient, then adds the zero point"
            return dataclasses.replace(format, joint=own.joint, power_of_two=False), f"{own.tool} rounds {how}"
        case Mx(element) as format if element in own.exponents:
            rule = own.exponents[element]
            return Mx(element, rule), f"{own.tool} finds shared exponents by the rule {rule}"
        case Float("hifloat8") as format if own.own_hifloat8 and quant.dynamic and not isinstance(quant.method, Ofmr):
            scale: FloatScale = "to15" if isinstance(quant.granularity, PerToken) else "unit"
            how = "takes a token's extreme to 15" if scale == "to15" else "casts inputs without a scale"
            return dataclasses.replace(format, scale=scale), f"{own.tool} {how}"
        case Float(layout) as format if layout != "hifloat8" or own.own_hifloat8:
            return Float(layout), f"{own.tool} takes the extreme to the format's largest value"
        case other:
            return other, ""


def _algorithm(asked: Algorithm, own: Conventions, notes: list[str]) -> Algorithm:
    has = own.options.get(asked.name)
    if has is None:  # the writer says so
        return asked
    usual, given = defaults(asked.name), dict(asked.options)
    options: dict[str, Value] = {}
    for name in dict.fromkeys((*given, *has)):
        value = given[name] if name in given else _scalar(usual.get(name))
        allowed = has.get(name)
        if allowed is None:
            wanted = _scalar(usual.get(name))
            if name in usual and value != wanted:
                notes.append(f"{asked.name}: {name} {_word(value)} -> {_word(wanted)}: {own.tool} has no such option")
            elif name not in usual:
                options[name] = value  # the writer refuses it
            continue
        wanted = value if not allowed or value in allowed else allowed[0]
        if wanted != value or type(wanted) is not type(value):
            why = _FIXED.get((asked.name, name, wanted), f"{name} is {_word(wanted)}")
            if len(allowed) > 1:
                why = f"{asked.name} has no {name} {_word(value)}"
            notes.append(f"{asked.name}: {name} {_word(value)} -> {_word(wanted)}: {own.tool}'s {why}")
        if allowed or name in own.always or (name in given and (name not in usual or wanted != _scalar(usual[name]))):
            options[name] = wanted
    folds = asked.folds
    if own.folds is not None:
        by_mappings = own.tool == "llm-compressor" and asked.match
        folds = EVERYWHERE if by_mappings else dict(own.folds).get(asked.name, EVERYWHERE)
    if folds != asked.folds:
        notes.append(f"{asked.name}: folds {asked.folds} -> {folds}: {own.tool} does not choose")
    return dataclasses.replace(asked, options=tuple(options.items()), folds=folds)


def _scalar(value: object) -> Value:
    return value if isinstance(value, str | int | float) else None


def _word(value: Value) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _run(run: Run, own: Conventions, notes: list[str]) -> Run:
    """What the tool's config can say of the run."""
    lost: dict[str, Any] = {}
    for field in dataclasses.fields(run):
        name, value = field.name, getattr(run, field.name)
        if value in ("", None) or (name in own.run and (name != "target" or value in own.targets)):
            continue
        lost[name] = field.default
        notes.append(f"run.{name} {value}: left out: {own.text} does not say it")
    return dataclasses.replace(run, **lost)
