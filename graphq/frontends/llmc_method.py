"""LLMC's methods and what stands under ``special``, in graphq's words.

Options that LLMC documents and that change numbers are translated, or refused by name; those that steer its own run are
noted. A method that graphq lacks keeps its name, which ``compile`` refuses.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from graphq.frontends.document import Plain, Section, nearest, show
from graphq.spec import Algorithm

Scalar = str | int | float | bool | None

_OWN_RUN: Final = ("save_scale", "scale_path", "save_clip", "clip_path", "save_mem", "awq_bs", "chunk_num")
_COMMON: Final = (
    *("true_sequential", "weight_clip", "search_clip_init", "clip_version", "clip_sym", "save_clip", "clip_path"),
    *("save_scale", "scale_path", "online_rotate", "fp32_had", "do_gqa_trans"),
)
_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "Awq": (*_COMMON, "trans", "trans_version", "awq_bs", "save_mem"),
    "GPTQ": (*_COMMON, "static_groups", "actorder", "percdamp", "blocksize", "owq", "n_outs", "chunk_num"),
    "SmoothQuant": (*_COMMON, "alpha"),
}


def read_method(quant: Section, method: str | None) -> tuple[Algorithm, ...]:
    """The algorithm that ``method`` names, with its options; none for RTN."""
    special = quant.section("special") or Section(quant.document, {}, (*quant.at, "special"))
    if method is None:
        return ()
    if method == "RTN":
        for option, value in _scalars("", dict(special.values)):
            if value not in (False, None):
                special.report("RTN has no options", option)
        return ()
    source = quant.document.origin(("quant", "method"), "quant.method")
    if method not in _OPTIONS:
        options = tuple(_scalars("", dict(special.values)))
        lacking = quant.made(lambda: Algorithm(method.lower(), options, source), "special")
        return () if lacking is None else (lacking,)
    for key in special.values:
        if key not in _OPTIONS[method]:
            special.report(f"{method} has no such option{nearest(key, _OPTIONS[method])}", key)
    name, translate = _TRANSLATED[method]
    found = translate(special)
    _read_common(special, method)
    algorithm = special.made(lambda: Algorithm(name, tuple(found.items()), source))
    return () if algorithm is None else (algorithm,)


def _read_common(special: Section, method: str) -> None:
    for key in _OWN_RUN:
        if key in special.values:
            special.unused(key, "it steers LLMC's own run")
    if special.boolean("true_sequential") is not None:
        special.unused("true_sequential", "graphq calibrates a block at once")
    if special.boolean("do_gqa_trans") is not None:
        special.unused("do_gqa_trans", "graphq scales through repeated heads")
    for key in ("search_clip_init", "online_rotate", "fp32_had"):
        if special.boolean(key):
            special.report("is not supported", key)
    if special.boolean("weight_clip") and method != "Awq":
        special.report(f"is not supported with {method}", "weight_clip")
    if special.text("clip_version") not in (None, "v1"):
        special.report(f"{show(special.values['clip_version'])} is not supported; write v1", "clip_version")
    if special.boolean("clip_sym") is not None:
        special.unused("clip_sym", "weights are clipped as their format is symmetric")


def _awq(special: Section) -> dict[str, Scalar]:
    if special.boolean("trans") is False:
        special.report("Awq without its scales is not supported", "trans")
    version = special.text("trans_version") or "v2"
    if version not in ("v1", "v2"):
        special.report(f"{show(version)} is not v1 or v2", "trans_version")
    return {"duo": version == "v1", "clip": special.boolean("weight_clip") or False}


def _gptq(special: Section) -> dict[str, Scalar]:
    act_order, static = special.boolean("actorder"), special.boolean("static_groups")
    if act_order and static is False:
        special.report("with actorder, graphq's groups are static; write True", "static_groups")
    elif static is False:
        special.unused("static_groups", "a group's range is that of the weights as they were")
    if special.boolean("owq"):
        special.report("is not supported", "owq")
    if "n_outs" in special.values:
        special.unused("n_outs", "an option of owq")
    found: dict[str, Scalar] = {"act_order": "static" if act_order else "none", "scales": "plan"}
    if (block_size := special.integer("blocksize")) is not None:
        found["block_size"] = block_size
    if (dampening := _number(special, "percdamp")) is not None:
        found["dampening"] = dampening
    return found


def _smooth_quant(special: Section) -> dict[str, Scalar]:
    alpha = _number(special, "alpha")
    return {} if alpha is None else {"alpha": alpha}


def _number(section: Section, key: str) -> float | None:
    value = section.values.get(key)
    if key in section.values and type(value) not in (int, float):
        section.report(f"{show(value)} is not a number", key)
        return None
    return value if isinstance(value, int | float) else None


_TRANSLATED: Final[Mapping[str, tuple[str, Callable[[Section], dict[str, Scalar]]]]] = {
    "Awq": ("awq", _awq),
    "GPTQ": ("gptq", _gptq),
    "SmoothQuant": ("smooth-quant", _smooth_quant),
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
