"""LLMC's methods and what stands under ``special``, in graphq's words and back.

Options that LLMC documents and that change numbers are translated, or refused by name; those that steer its own run are
noted. A method that graphq lacks keeps its name and options, which ``compile`` refuses.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from graphq.frontends.document import MAX_DEPTH, Document, Plain, Section, nearest, show, spell
from graphq.frontends.llmc.tensor import read_hqq
from graphq.spec.folds import EVERYWHERE, NORMS, Folds
from graphq.spec.quant import Hqq
from graphq.spec.rules import Algorithm

Scalar = str | int | float | bool | None

_OWN_RUN: Final = ("save_scale", "scale_path", "save_clip", "clip_path", "save_mem", "awq_bs", "chunk_num")
_COMMON: Final = (
    *("true_sequential", "weight_clip", "search_clip_init", "clip_version", "clip_sym", "save_clip", "clip_path"),
    *("save_scale", "scale_path", "online_rotate", "fp32_had", "do_gqa_trans"),
)
_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "RTN": (),
    "Awq": ("trans", "trans_version", "awq_bs", "save_mem"),
    "GPTQ": ("static_groups", "actorder", "percdamp", "blocksize", "owq", "n_outs", "chunk_num"),
    "SmoothQuant": ("alpha",),
    "OsPlus": ("use_shift",),
    "OmniQuant": (
        *("deactive_amp", "wd", "epochs", "aug_loss", "lwc", "let", "lwc_lr", "let_lr", "use_shift", "alpha"),
        *("load_clip", "search_scale_init", "smooth_up_down"),
    ),
    "Quarot": ("rotate_mode",),
    "HQQ": ("axis", "lp_norm", "beta", "kappa", "iters"),
    "SpQR": ("actorder", "percdamp", "blocksize", "relative_threshold", "simplified_outliers", "scale", "zero"),
    "QUIK": ("fp_relative", "fp_features", "fp_threshold", "last_fc_bit"),
    "LlmInt8": ("threshold",),
    "DGQ": (),
    "AdaDim": (),
    "NormTweaking": ("deactive_amp", "epochs", "ntweak_lr", "gamma"),
    "TesseraQ": (
        *("lr", "iterations", "wd", "batch_size", "optimize_scale", "scale_lr", "thresholds", "load_transform"),
        *("reduce_memory", "deactive_amp", "aug_loss"),
    ),
}
METHODS: Final = tuple(_OPTIONS)
_ROTATIONS: Final = {"hadamard": "random_hadamard", "random": "orthogonal"}


def read_method(quant: Section, method: str | None) -> tuple[tuple[Algorithm, ...], Hqq | None]:
    """The algorithm that ``method`` names, with its options; none for RTN and HQQ, which is a range of the weights."""
    special = quant.section("special") or Section(quant.document, {}, (*quant.at, "special"))
    if method is None:
        return (), None
    if method == "RTN":
        for option, value in _scalars("", dict(special.values)):
            if value not in (False, None):
                special.report("RTN has no options", option)
        return (), None
    for key in special.values:
        if key not in (*_COMMON, *_OPTIONS[method]):
            special.report(f"{method} has no such option{nearest(key, (*_OPTIONS[method], *_COMMON))}", key)
    source = quant.document.origin((*quant.at, "method"), spell((*quant.at, "method")))
    if method == "HQQ":
        _read_common(special, method, quant)
        return (), _hqq(special)
    if method in _TRANSLATED:
        name, translate = _TRANSLATED[method]
        found = translate(special, quant)
        _read_common(special, method, quant)
        folds = _folds(method)
        algorithm = special.made(lambda: Algorithm(name, tuple(found.items()), source, folds=folds))
    else:
        options = tuple(_scalars("", dict(special.values)))
        algorithm = special.made(lambda: Algorithm(method.lower(), options, source))
    return () if algorithm is None else (algorithm,), None


def _folds(method: str) -> Folds:
    return NORMS if method == "SmoothQuant" else EVERYWHERE


def _read_common(special: Section, method: str, quant: Section) -> None:
    for key in _OWN_RUN:
        if key in special.values:
            special.unused(key, "it steers LLMC's own run")
    if special.boolean("true_sequential") is not None:
        special.unused("true_sequential", "graphq calibrates a block at once")
    if special.boolean("do_gqa_trans") is not None:
        special.unused("do_gqa_trans", "graphq scales through repeated heads")
    if "fp32_had" in special.values and (method == "Quarot" or not special.values.get("online_rotate")):
        special.unused("fp32_had", "products are made in the dtype that the model is captured in")
    if special.boolean("search_clip_init"):
        special.report("is not supported", "search_clip_init")
    if method != "Quarot" and special.boolean("online_rotate"):
        special.report(
            f"LLMC rotates the model before, by a config of Quarot; in the native form one spec has both: algorithms:"
            f" [{{rotate: {{r4: true}}}}, {_TRANSLATED[method][0] if method in _TRANSLATED else 'rtn'}]",
            "online_rotate",
        )
    if special.boolean("weight_clip") and method != "Awq":
        special.report(f"is not supported with {method}", "weight_clip")
    _read_clip_version(special, quant)
    if special.boolean("clip_sym") is not None:
        special.unused("clip_sym", "weights are clipped as their format is symmetric")


def _read_clip_version(special: Section, quant: Section) -> None:
    """Notes v2, whose ranges are those of v1."""
    version = special.text("clip_version")
    weight = quant.values.get("weight")
    if version not in (None, "v1", "v2"):
        special.report(f"{show(version)} is not v1 or v2", "clip_version")
    elif version == "v2" and isinstance(weight, dict) and weight.get("calib_algo") != "learnable":
        special.report("v2 needs calib_algo: learnable of weight, in LLMC, too; write v1", "clip_version")
    elif version == "v2":
        special.unused("clip_version", "v2 keeps as factors the ranges that v1 clips weights to; they are the same")


def _awq(special: Section, _: Section) -> dict[str, Scalar]:
    if special.boolean("trans") is False:
        special.report("Awq without its scales is not supported", "trans")
    version = special.text("trans_version") or "v2"
    if version not in ("v1", "v2"):
        special.report(f"{show(version)} is not v1 or v2", "trans_version")
    return {"duo": version == "v1", "clip": special.boolean("weight_clip") or False}


def _gptq(special: Section, quant: Section) -> dict[str, Scalar]:
    act_order, static = special.boolean("actorder"), special.boolean("static_groups")
    weight = quant.values.get("weight")
    grouped = isinstance(weight, dict) and weight.get("granularity") == "per_group"
    if act_order and static is False and grouped:
        special.note(
            "groups are of columns side by side here; LLMC's are of columns in their new order, which no checkpoint of"
            " its own holds",
            "static_groups",
        )
    elif static is False and grouped:
        special.unused("static_groups", "a group's range is that of the weights as they were")
    if special.boolean("owq"):
        special.report("is not supported", "owq")
    if "n_outs" in special.values:
        special.unused("n_outs", "an option of owq")
    block_size, dampening = special.integer("blocksize"), _number(special, "percdamp")
    return {
        "act_order": "static" if act_order else "none",
        "scales": "plan",
        "block_size": 128 if block_size is None else block_size,
        "dampening": 0.01 if dampening is None else dampening,
    }


def _smooth_quant(special: Section, _: Section) -> dict[str, Scalar]:
    alpha = _number(special, "alpha")
    return {} if alpha is None else {"alpha": alpha}


def _quarot(special: Section, _: Section) -> dict[str, Scalar]:
    mode, online = special.text("rotate_mode", required=True), special.boolean("online_rotate") or False
    if mode is not None and mode not in _ROTATIONS:
        special.report(f"{show(mode)} is not hadamard or random", "rotate_mode")
    if online:
        special.note("values are rotated in each head, by weights alone; LLMC mixes heads, too", "online_rotate")
    kind = _ROTATIONS.get(mode or "", "random_hadamard")
    return {"r1": True, "r2": online, "r3": False, "r4": online, "kind": kind}


def _hqq(special: Section) -> Hqq:
    axis = special.integer("axis")
    if axis == 0:
        special.report("groups along the output axis are not supported; write 1", "axis")
    elif axis not in (None, 1):
        special.report(f"{axis} is not 0 or 1", "axis")
    return read_hqq(special)


def _number(section: Section, key: str) -> float | None:
    value = section.values.get(key)
    if key in section.values and type(value) not in (int, float):
        section.report(f"{show(value)} is not a number", key)
        return None
    return value if isinstance(value, int | float) else None


_TRANSLATED: Final[Mapping[str, tuple[str, Callable[[Section, Section], dict[str, Scalar]]]]] = {
    "Awq": ("awq", _awq),
    "GPTQ": ("gptq", _gptq),
    "SmoothQuant": ("smooth-quant", _smooth_quant),
    "Quarot": ("rotate", _quarot),
}


def _scalars(prefix: str, value: Plain) -> Iterator[tuple[str, Scalar]]:
    """The single values in ``value``, named by their path: ``scale.bit``, ``n_outs.0``."""
    match value:
        case dict():
            for key, item in value.items():
                yield from _scalars(f"{prefix}.{key}" if prefix else key, item)
        case list():
            for index, item in enumerate(value):
                yield from _scalars(f"{prefix}.{index}", item)
        case _:
            yield prefix, value


def write_method(algorithms: Sequence[Algorithm]) -> tuple[str, dict[str, Plain], list[str]]:
    """The method and what stands under ``special``; and a line for each thing that LLMC cannot say."""
    asked = [algorithm for algorithm in algorithms if algorithm != Algorithm("rtn")]
    if not asked:
        return "RTN", {}, []
    problems = [f"{a.name}: match: LLMC's methods are for all layers" for a in asked if a.match]
    if len(asked) > 1:
        names = " and ".join(a.name for a in asked)
        return "RTN", {}, [f"algorithms: {names}: an LLMC config has one method", *problems]
    (algorithm,) = asked
    methods = {name: method for method, (name, _) in _TRANSLATED.items()}
    lacking = {m.lower(): m for m in METHODS if m not in (*_TRANSLATED, "RTN", "HQQ")}
    if algorithm.name in methods:
        method = methods[algorithm.name]
        if algorithm.folds != _folds(method):
            problems.append(f"{algorithm.name}: folds: {algorithm.folds}: LLMC's {method} folds into {_folds(method)}")
        wanted = _DEFAULTS[method] | dict(algorithm.options)
        special = _special(method, wanted, algorithm)
        got = _DEFAULTS[method] | _TRANSLATED[method][1](Section(Document(), special), Section(Document(), {}))
        for option, value in wanted.items():
            if option not in got or type(got[option]) is not type(value) or got[option] != value:
                problems.append(f"{algorithm.name}: {option}: {show(value)}: LLMC's {method} has no such setting")
        return method, special, problems
    if algorithm.name in lacking:
        method = lacking[algorithm.name]
        special = _nested(algorithm.options)
        if tuple(_scalars("", special)) != algorithm.options or not {*special} <= {*_COMMON, *_OPTIONS[method]}:
            problems.append(f"{algorithm.name}: LLMC's {method} has no such options")
        return method, special, problems
    return "RTN", {}, [f"{algorithm.name}: LLMC has no such method", *problems]


# What holds in graphq where an option is left out.
_DEFAULTS: Final[Mapping[str, dict[str, Scalar]]] = {
    "Awq": {"duo": None, "clip": True},
    "GPTQ": {"act_order": "static", "scales": "search", "block_size": 128, "dampening": 0.01},
    "SmoothQuant": {"alpha": 0.5},
    "Quarot": {"r1": True, "r2": True, "r3": False, "r4": False, "kind": "random_hadamard"},
}


def _special(method: str, wanted: Mapping[str, Scalar], algorithm: Algorithm) -> dict[str, Plain]:
    """The options that come closest; what they do not mean is found by reading them."""
    match method:
        case "Awq":
            version = "v1" if wanted["duo"] else "v2"
            return {"trans": True, "trans_version": version, "weight_clip": wanted["clip"] is True}
        case "GPTQ":
            return {
                "actorder": wanted["act_order"] == "static",
                "static_groups": True,
                "percdamp": wanted["dampening"],
                "blocksize": wanted["block_size"],
                "true_sequential": False,
            }
        case "SmoothQuant":
            return {"alpha": wanted["alpha"]} if "alpha" in dict(algorithm.options) else {}
        case _:
            mode = "random" if wanted["kind"] == "orthogonal" else "hadamard"
            return {"rotate_mode": mode, "online_rotate": wanted["r4"] is True}


def _nested(options: Sequence[tuple[str, Scalar]]) -> dict[str, Plain]:
    """The mapping whose ``_scalars`` these are, where there is one."""
    tree: dict[str, Plain] = {}
    for name, value in options:
        *sections, key = name.split(".")
        if len(sections) > MAX_DEPTH - 4:  # no document is so deep: these are dots of a key
            return {}
        inner = tree
        for section in sections:
            below = inner.setdefault(section, {})
            if not isinstance(below, dict):
                return {}
            inner = below
        inner[key] = value
    return {key: _lists(value) for key, value in tree.items()}


def _lists(value: Plain) -> Plain:
    if not isinstance(value, dict):
        return value
    items = [_lists(item) for item in value.values()]
    numbered = list(value) == [str(i) for i in range(len(value))]
    return items if numbered and items else dict(zip(value, items, strict=True))
