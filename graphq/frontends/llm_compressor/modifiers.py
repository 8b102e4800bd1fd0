"""Modifiers of llm-compressor 0.14, each as rules or an algorithm in graphq's words.

https://github.com/vllm-project/llm-compressor, src/llmcompressor/modifiers. What changes numbers is translated, or
refused by name; what steers llm-compressor's own run is noted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, final

from graphq.frontends.document import Section, nearest, show
from graphq.frontends.llm_compressor.args import filled, order_word, read_args
from graphq.frontends.llm_compressor.mappings import awq_mappings, smooth_mappings
from graphq.frontends.llm_compressor.observer import number, observer_word
from graphq.frontends.llm_compressor.presets import Observers, is_preset, read_preset
from graphq.frontends.llm_compressor.schemes import (
    SCHEME,
    Groups,
    add_targets,
    read_groups,
    read_ignore,
    read_scheme,
)
from graphq.frontends.llm_compressor.transforms import folds
from graphq.spec.attention import AttentionOperands
from graphq.spec.match import Match
from graphq.spec.plan import Plan
from graphq.spec.quant import Quant
from graphq.spec.rules import Algorithm, Rule

Scalar = str | int | float | bool | None

_BASE: Final = ("requires_calibration_data", "index", "group", "start", "end", "update")
_MIXIN: Final = (
    *("config_groups", "targets", "ignore", "scheme", "kv_cache_scheme", "weight_observer", "input_observer"),
    *("output_observer", "observer", "bypass_divisibility_checks"),
)
# Fields of the releases of 2024, which none of today's have.
_EARLIER: Final[Mapping[str, str]] = {
    **dict.fromkeys(("sequential_update", "true_sequential", "sequential_targets"), "blocks are calibrated in order"),
    **dict.fromkeys(("disable_quantization_observer_epoch", "num_calibration_steps"), "it is for training"),
}
_SCHEMES: Final = ("scheme", "config_groups", "kv_cache_scheme")
_REFUSED: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        (
            *("SparseGPTModifier", "WandaPruningModifier", "MagnitudePruningModifier", "ConstantPruningModifier"),
            "REAPPruningModifier",
        ),
        "pruning is not supported",
    ),
    "QuIPModifier": "rotations of single layers at run time are not supported; SpinQuantModifier rotates a model",
    "LogarithmicEqualizationModifier": "logarithmic equalization is not supported; write SmoothQuantModifier",
}


@final
@dataclass(frozen=True)
class Modifier:
    """One modifier: the rules of its targets, those of its ``ignore``, the KV cache's format, its algorithm, and
    how what attention reads is quantized.

    ``rounds``: whether the algorithm is for the layers of its own targets. ``actorders``: the orders of columns that
    its groups ask for, and where they do. ``adopts``: it rounds what a modifier before it plans, and plans nothing.
    """

    section: Section
    name: str
    rules: tuple[Rule, ...] = ()
    ignored: tuple[Rule, ...] = ()
    cache: Quant | None = None
    algorithm: Algorithm | None = None
    attention: AttentionOperands | None = None
    rounds: bool = False
    quantizes: bool = False
    actorders: tuple[tuple[Section, str], ...] = ()
    adopts: bool = False

    @property
    def has_plans(self) -> bool:
        """Whether it quantizes any layer, and does not just say that layers stay float."""
        return any(isinstance(rule.decision, Plan) for rule in self.rules)


def read_modifier(name: str, section: Section, *, behind: bool = False) -> Modifier | None:
    """The modifier of this class. What is wrong with it is reported. ``behind``: one before it quantizes."""
    if name in _REFUSED:
        section.report(_REFUSED[name])
        return None
    if name not in _READERS:
        section.report(f"unknown modifier{nearest(name, (*_READERS, *_REFUSED))}")
        return None
    fields, read = _READERS[name]
    is_awq_with_scheme = name == "AWQModifier" and any(section.values.get(key) is not None for key in _MIXIN)
    earlier = ("quantize", *_EARLIER) if name in ("QuantizationModifier", "GPTQModifier") else ()
    known = (*fields, *_BASE, *_MIXIN * (name in _ROUNDING or is_awq_with_scheme), *earlier)
    section.only(known)
    for key in _BASE:
        if section.values.get(key) is not None:
            section.unused(key, "it is llm-compressor's own bookkeeping")
    for key in earlier:
        if key in _EARLIER and key in section.values:
            section.unused(key, f"a field of earlier releases; {_EARLIER[key]}")
    if section.values.get("quantize") not in (None, True):
        section.report(
            "a field of earlier releases, True where it quantizes; write scheme or config_groups", "quantize"
        )
    options, match = read(section)
    before = len(section.document.problems)
    found = _Scheme()
    if is_awq_with_scheme:
        section.document.notes.append(
            f"{section.document.prefix(section.at)}read with a QuantizationModifier behind it, as earlier releases have"
            " it; llm-compressor 0.14 refuses its scheme and targets"
        )
    adopts = behind and name == "GPTQModifier" and all(section.values.get(key) is None for key in _SCHEMES)
    if adopts:
        found = _read_adopted(section)
    elif name in _ROUNDING or is_awq_with_scheme:
        found = _read_scheme(section, name)
    if name == "GPTQModifier":
        _order(section, options, found.groups)
    if len(section.document.problems) > before:
        return None
    algorithm = None
    if name != "QuantizationModifier":
        source = section.document.origin(section.at, name)
        into = folds(_NAMES[name], match)
        algorithm = section.made(lambda: Algorithm(_NAMES[name], tuple(options.items()), source, match, into))
    return Modifier(
        section,
        name,
        found.groups.rules(),
        found.ignored,
        found.cache,
        algorithm,
        found.groups.attention,
        rounds=name in ("GPTQModifier", "AutoRoundModifier") or is_awq_with_scheme,
        quantizes=name in _ROUNDING or is_awq_with_scheme,
        actorders=() if name == "GPTQModifier" else tuple(found.groups.actorders),
        adopts=adopts,
    )


@final
@dataclass
class _Scheme:
    groups: Groups = field(default_factory=Groups)
    ignored: tuple[Rule, ...] = ()
    cache: Quant | None = None


def _read_adopted(section: Section) -> _Scheme:
    """What a GPTQModifier says that rounds what another one plans: the layers that it leaves to that one."""
    given = filled(section)
    for key in _MIXIN:
        if key == "targets" and given.values.get(key) not in (None, "Linear", ["Linear"]):
            given.report("a GPTQModifier of some layers needs their scheme; write it", key)
        elif key not in ("ignore", "targets") and key in given.values:
            given.unused(key, "it has no scheme; that of the modifier before it holds")
    return _Scheme(ignored=read_ignore(given, "GPTQModifier."))


def _read_scheme(section: Section, name: str) -> _Scheme:
    """What the fields that all quantizing modifiers share say."""
    given = filled(section)
    found = _Scheme(ignored=read_ignore(given, f"{name}."))
    found.cache = read_args(given.section("kv_cache_scheme"), "kv_cache_scheme")
    observers = _read_observers(given)
    if "bypass_divisibility_checks" in given.values:
        given.boolean("bypass_divisibility_checks")
        given.unused("bypass_divisibility_checks", "a last group may be shorter than the others here")
    scheme, is_grouped = given.values.get("scheme"), "config_groups" in given.values
    if scheme is not None and is_grouped:
        given.report("stands beside config_groups; write one of them", "scheme")
    elif is_grouped:
        groups = given.section("config_groups")
        if groups is not None:
            read_groups(groups, f"{name}.config_groups", observers, found.groups)
        if "targets" in given.values:
            given.unused("targets", "the groups have their own")
    elif isinstance(scheme, str):
        add_targets(given, "targets", f"{name}.scheme", read_preset(given, scheme, "scheme", observers), found.groups)
    elif scheme is not None:
        _read_scheme_mapping(given, name, observers, found.groups)
    elif found.cache is None and "kv_cache_scheme" not in given.values:
        given.report("quantizes nothing; write scheme or config_groups")
    return found


def _read_scheme_mapping(given: Section, name: str, observers: Observers, groups: Groups) -> None:
    """``scheme`` as presets with their targets, or as one scheme, which is documented and which the code refuses."""
    scheme = given.section("scheme")
    if scheme is None:
        return
    if not scheme.values:
        given.report("is empty: it quantizes nothing", "scheme")
        return
    if all(is_preset(key) for key in scheme.values):
        for key in scheme.values:
            decision = read_preset(scheme, key, key, observers)
            add_targets(scheme, key, f"{name}.scheme.{key}", decision, groups)
        if "targets" in given.values:
            given.unused("targets", "the presets have their own")
        return
    for key in scheme.values:
        if key not in SCHEME:
            scheme.report(f"neither a preset nor a key of a scheme{nearest(key, SCHEME)}", key)
    decision = read_scheme(scheme, observers, groups)
    given.document.notes.append(
        f"{given.document.prefix(scheme.at)}read as one scheme, as documented; llm-compressor's code takes"
        " presets alone"
    )
    add_targets(given, "targets", f"{name}.scheme", decision, groups)


def _read_observers(given: Section) -> Observers:
    words = {key: observer_word(given, f"{key}_observer") for key in ("weight", "input", "output")}
    if words["output"] is not None:
        given.unused("output_observer", "outputs are not quantized")
    weight, act = words["weight"], words["input"]
    both = given.section("observer")
    if both is not None:
        both.only(("weights", "input", "output"))
        if any(words.values()):
            given.document.notes.append(
                f"{given.document.prefix(both.at)}stands above weight_observer and input_observer, as documented;"
                " llm-compressor's code refuses both"
            )
        weight = observer_word(both, "weights") or weight
        act = observer_word(both, "input") or act
        if observer_word(both, "output") is not None:
            both.unused("output", "outputs are not quantized")
    return Observers(weight, act)


def _order(section: Section, options: dict[str, Scalar], groups: Groups) -> None:
    """The order of GPTQ's columns: that of the modifier, which those of the groups may not contradict."""
    options["act_order"] = "static"
    value = section.values.get("actorder")
    if "actorder" not in section.values:
        return
    if value is None or value is False:
        options["act_order"] = "none"
        for weights, word in groups.actorders:
            weights.report(f"{word} is not the actorder of the modifier, null; write one of them", "actorder")
    else:
        order_word(section, "actorder", value)


def _quantization(section: Section) -> tuple[dict[str, Scalar], tuple[Match, ...]]:
    return {}, ()


def _gptq(section: Section) -> tuple[dict[str, Scalar], tuple[Match, ...]]:
    options: dict[str, Scalar] = {"act_order": "static", "scales": "plan"}
    if "block_size" in section.values:
        options["block_size"] = section.integer("block_size")
    if "dampening_frac" in section.values:
        options["dampening"] = number(section, "dampening_frac")
    if "offload_hessians" in section.values:
        section.unused("offload_hessians", "it changes no number")
    if "batched_quantization" in section.values:
        section.unused("batched_quantization", "it changes no number")
    return options, ()


def _awq(section: Section) -> tuple[dict[str, Scalar], tuple[Match, ...]]:
    duo = section.values.get("duo_scaling", True)
    if duo not in (True, False, "both") or (duo in (0, 1) and not isinstance(duo, bool)):
        section.report(f"{show(duo)} is not true, false or both", "duo_scaling")
    options: dict[str, Scalar] = {"duo": None if duo == "both" else duo is True, "clip": False}
    if "n_grid" in section.values:
        options["n_grid"] = section.integer("n_grid")
    if "offload_device" in section.values:
        section.unused("offload_device", "it changes no number")
    return options, awq_mappings(filled(section))


def _smooth_quant(section: Section) -> tuple[dict[str, Scalar], tuple[Match, ...]]:
    options: dict[str, Scalar] = {"statistic": "range"}
    if "smoothing_strength" in section.values:
        options["alpha"] = number(section, "smoothing_strength")
    given = filled(section)
    for key in ("num_calibration_steps", "calibration_function"):
        if key in given.values:
            given.unused(key, "llm-compressor does not use it either")
    algorithm = given.text("algorithm")
    if algorithm == "log_equalization":
        given.report("logarithmic equalization is not supported; write smoothquant", "algorithm")
    elif algorithm not in (None, "smoothquant"):
        given.report(f"{show(algorithm)} is not smoothquant", "algorithm")
    if given.values.get("ignore"):
        given.report("leaving out norms is not supported; write mappings with the layers that are smoothed", "ignore")
    return options, smooth_mappings(given)


_KINDS: Final = {"hadamard": "hadamard", "random-hadamard": "random_hadamard", "random-matrix": "orthogonal"}


def _spin_quant(section: Section) -> tuple[dict[str, Scalar], tuple[Match, ...]]:
    given = filled(section)
    names = ["R1", "R2"]
    if "rotations" in given.values:
        names = [str(name).upper() for name in given.items("rotations", ", such as [R1, R2]")]
        for index, name in enumerate(names):
            if name not in ("R1", "R2", "R3", "R4"):
                given.report(f"{show(given.items('rotations')[index])} is not R1, R2, R3 or R4", "rotations", index)
        if not names and isinstance(given.values["rotations"], list):
            given.report("is empty: it rotates nothing", "rotations")
    word = given.text("transform_type") if "transform_type" in given.values else "hadamard"
    if word is not None and word not in _KINDS:
        given.report(f"{show(word)} is not a transform{nearest(word, _KINDS)}", "transform_type")
    options: dict[str, Scalar] = {"kind": _KINDS.get(word or "")}
    for name, is_default in (("R1", True), ("R2", True), ("R3", False), ("R4", False)):
        if (name in names) is not is_default:
            options[name.lower()] = name in names
    size = given.integer("transform_block_size")
    if size is not None:
        options["block_size"] = size
        if {"R2", "R3"} & set(names):
            given.document.notes.append(
                f"{given.document.prefix((*given.at, 'transform_block_size'))}heads are rotated whole"
            )
    for key in ("randomize", "learnable"):
        if given.boolean(key):
            given.report("is not supported, nor by llm-compressor", key)
    if given.text("precision") not in (None, "float64", "torch.float64"):
        given.report(f"{show(given.values['precision'])} is not supported; rotations are of float64", "precision")
    for key in ("mappings", "norm_mappings"):
        if key in given.values:
            given.report("is not supported: what is rotated is read from the graph", key)
    if "transform_config" in given.values:
        given.report("is not supported; write rotations", "transform_config")
    return options, ()


def _auto_round(section: Section) -> tuple[dict[str, Scalar], tuple[Match, ...]]:
    options: dict[str, Scalar] = {}
    given = filled(section)
    if (steps := given.integer("iters")) is not None:
        options["steps"] = steps
    if "lr" in given.values:
        options["lr"] = number(given, "lr")
    if (size := given.integer("batch_size")) is not None:
        options["batch_size"] = size
    for key in ("enable_torch_compile", "device_ids", "disable_opt_rtn"):
        if key in given.values:
            given.unused(key, "it steers llm-compressor's own run")
    return options, ()


_NAMES: Final[Mapping[str, str]] = {
    "GPTQModifier": "gptq",
    "AutoRoundModifier": "auto-round",
    "AWQModifier": "awq",
    "SmoothQuantModifier": "smooth-quant",
    "SpinQuantModifier": "rotate",
}
_ROUNDING: Final = ("QuantizationModifier", "GPTQModifier", "AutoRoundModifier")
_Reader = Callable[[Section], tuple[dict[str, Scalar], tuple[Match, ...]]]
_READERS: Final[Mapping[str, tuple[tuple[str, ...], _Reader]]] = {
    "QuantizationModifier": ((), _quantization),
    "GPTQModifier": (
        ("block_size", "dampening_frac", "actorder", "offload_hessians", "batched_quantization"),
        _gptq,
    ),
    "AWQModifier": (("mappings", "offload_device", "duo_scaling", "n_grid"), _awq),
    "SmoothQuantModifier": (
        *(
            ("smoothing_strength", "mappings", "ignore", "num_calibration_steps", "calibration_function", "algorithm"),
            _smooth_quant,
        ),
    ),
    "SpinQuantModifier": (
        (
            *("rotations", "transform_type", "randomize", "learnable", "precision", "transform_block_size"),
            *("mappings", "norm_mappings", "transform_config"),
        ),
        _spin_quant,
    ),
    "AutoRoundModifier": (
        ("iters", "enable_torch_compile", "batch_size", "lr", "device_ids", "disable_opt_rtn"),
        _auto_round,
    ),
}
