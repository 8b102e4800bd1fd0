"""Observers of llm-compressor 0.14 as range methods, and back.

Weights: ``minmax``, ``static_minmax`` and ``memoryless_minmax`` are one, and so are ``mse`` and ``memoryless_mse``.
Static activations: ``minmax`` is the moving average of the batches' extremes, ``static_minmax`` their extremes,
``memoryless_minmax`` those of the last batch.
"""

import math
from collections.abc import Callable, Mapping
from typing import Final

from graphq.errors import SpecError
from graphq.frontends.document import Plain, Section, nearest, show
from graphq.spec.quant import MinMax, MovingAverage, Mse, Quant, RangeMethod

_MIN_MAX: Final = ("memoryless_minmax", "static_minmax", "minmax")
_MSE: Final = ("memoryless_mse", "mse")
_REFUSED: Final[Mapping[str, str]] = {
    "imatrix_mse": "weighs errors by the inputs",
    "nvfp4_expanded_mse": "searches beyond the extremes",
    "fouroversix": "searches beyond the extremes",
    "nvfp4_expanded_imatrix": "searches beyond the extremes and weighs errors by the inputs",
}
OBSERVERS: Final = (*_MIN_MAX, *_MSE, *_REFUSED)
_RENAMED: Final = {"memoryless": "memoryless_minmax"}  # as the releases of 2024 have it
_OPTIONS: Final = ("averaging_constant", "maxshrink", "patience", "grid", "norm", "expand")
_UNUSED: Final = ("chunk_size", "triton_error_buffer", "enable_compile")


def number(section: Section, key: str) -> float | None:
    """The number at ``key``; None where it is missing or wrong."""
    value = section.values.get(key)
    if type(value) in (int, float) and isinstance(value, int | float) and math.isfinite(value):
        return value
    if key in section.values:
        section.report(f"{show(value)} is not a number", key)
    return None


def observer_word(section: Section, key: str, *at: str) -> str | None:
    """The observer that the text at ``key`` names, spelled as llm-compressor registers it."""
    word = section.text(key)
    if word is None:
        return None
    name = word.lower().replace("-", "_")
    name = _RENAMED.get(name, name)
    if name not in OBSERVERS:
        section.report(f"{show(word)} is not an observer{nearest(name, OBSERVERS)}", key)
        return None
    if name in _REFUSED:
        section.report(f"the observer {name}, which {_REFUSED[name]}, is not supported", key)
        return None
    return name


def read_method(given: Section, role: str, dynamic: bool, override: str | None = None) -> RangeMethod | None:
    """The method of the section's ``observer`` and ``observer_kwargs``; None where they are wrong."""
    own = observer_word(given, "observer")
    kwargs = given.section("observer_kwargs") or Section(given.document, {}, (*given.at, "observer_kwargs"))
    kwargs.only((*_OPTIONS, *_UNUSED))
    if dynamic:
        for key in ("observer", "observer_kwargs"):
            if given.values.get(key):
                given.unused(key, "scales that are found at run time are those of the extremes")
        return MinMax()
    name = override or own or ("memoryless_minmax" if role == "weights" else "minmax")
    values = {key: number(kwargs, key) for key in _OPTIONS if key in kwargs.values}
    found, used = _method(given, name, role, values)
    for key in kwargs.values:
        if key in _UNUSED or (key in _OPTIONS and key not in used):
            kwargs.unused(key, "the observer has no use for it" if key in _OPTIONS else "it changes no number")
    return None if None in values.values() else kwargs.made(found)


def method_of(name: str, role: str) -> RangeMethod:
    """The method of an observer with its default options."""
    if name in _MSE:
        return Mse()
    if role == "weights" or name == "static_minmax":
        return MinMax()
    return MovingAverage(1.0) if name == "memoryless_minmax" else MovingAverage()


def _method(
    given: Section, name: str, role: str, values: Mapping[str, float | None]
) -> tuple[Callable[[], RangeMethod], tuple[str, ...]]:
    """What makes the method, and the options that it takes."""
    constant = values.get("averaging_constant")
    if name in _MSE:
        if role != "weights" and name == "memoryless_mse":
            given.report("memoryless_mse sees the last batch alone; write mse", "observer")
        elif role != "weights":
            given.unused("observer", "graphq fits one range to all batches, llm-compressor averages those of batches")
        if values.get("expand") not in (None, 1):
            given.report("a search beyond the extremes is not supported; write 1", "observer_kwargs", "expand")
        return lambda: _mse(values), ("maxshrink", "patience", "grid", "norm", "expand")
    if role != "weights" and name == "minmax" and constant is not None:
        return lambda: MovingAverage(float(constant)), ("averaging_constant",)
    return lambda: method_of(name, role), ()


def _mse(values: Mapping[str, float | None]) -> Mse:
    default = Mse()
    whole: dict[str, int] = {}
    for key, least in (("grid", default.grid), ("patience", default.patience)):
        value = values.get(key)
        if value is not None and value != int(value):
            raise SpecError(f"{key}: {value} is not a whole number")
        whole[key] = least if value is None else int(value)
    shrink, norm = values.get("maxshrink"), values.get("norm")
    return Mse(
        default.shrink if shrink is None else float(shrink),
        whole["grid"],
        default.norm if norm is None else float(norm),
        whole["patience"],
    )


def write_method(quant: Quant, role: str) -> dict[str, Plain]:
    """The ``observer`` and ``observer_kwargs`` of a method, where they are not the default. Raises ``SpecError``."""
    match quant.method:
        case MinMax():
            return {} if role == "weights" else {"observer": "static_minmax"}
        case MovingAverage(constant) if role != "weights":
            kwargs: dict[str, Plain] = {} if constant == MovingAverage().constant else {"averaging_constant": constant}
            return {"observer": "minmax", **({"observer_kwargs": kwargs} if kwargs else {})}
        case Mse() as mse:
            given = {"maxshrink": mse.shrink, "grid": mse.grid, "norm": mse.norm, "patience": mse.patience}
            default = {"maxshrink": 0.2, "grid": 100, "norm": 2.4, "patience": 5}
            differing: dict[str, Plain] = {key: value for key, value in given.items() if value != default[key]}
            return {"observer": "mse", **({"observer_kwargs": differing} if differing else {})}
        case other:
            raise SpecError(f"{quant}: llm-compressor has no observer like {other}")
