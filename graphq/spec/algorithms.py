"""Every algorithm that a spec can name, as data. ``graphq.algorithms`` has the passes, under the same names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, final

from graphq.spec.folds import EVERYWHERE
from graphq.spec.rules import Spec

Value = str | int | float | bool | None
Stage = Literal["default", "prepare", "equalize", "smooth", "round", "correct"]


@final
@dataclass(frozen=True)
class Option:
    """An option of an algorithm.

    default: its value where none is given. words: what it may be, for a message. allows: whether a value is that.
    """

    default: Value
    words: str
    allows: Callable[[Any], bool]


@final
@dataclass(frozen=True)
class Entry:
    """What there is to know of an algorithm without running it.

    stage: ``prepare`` rewrites the float graph before layers have plans. ``equalize`` changes float weights that have
        plans, without data. ``smooth`` moves scales between activations and weights, part by part of the model, on what
        calibration data gives there. ``round`` chooses the codes of weights, likewise. ``correct`` runs behind the
        codes. ``default`` has no pass: what no other algorithm rounds is rounded to nearest.
    needs_data: without calibration data it is refused.
    scope: whether a spec may give it a match, ``layers``, or it is for the whole ``model``.
    in_place: whether a layer by itself is all it needs.
    """

    stage: Stage
    options: Mapping[str, Option]
    needs_data: bool
    scope: Literal["model", "layers"]
    in_place: bool

    @property
    def folds(self) -> bool:
        """Whether it has factors of channels, and a choice of what to fold them into."""
        return "where" in self.options


def _one_of(default: str, *others: str) -> Option:
    words = (default, *others)
    return Option(default, f"one of {', '.join(words)}", lambda value: value in words)


def _whole(default: int, low: int = 1) -> Option:
    return Option(default, f"a whole number from {low}", lambda v: type(v) is int and low <= v <= 1 << 30)


def _flag(default: bool) -> Option:
    return Option(default, "true or false", lambda value: type(value) is bool)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _share(default: float | None) -> Option:
    return Option(default, "a number above 0, up to 1", lambda value: _is_number(value) and 0 < value <= 1)


_WHERE: Final = _one_of("fold", "fold-or-multiply", "multiply")

ALGORITHMS: Final[Mapping[str, Entry]] = {
    "rtn": Entry("default", {}, needs_data=False, scope="model", in_place=True),
    "fold-batch-norm": Entry("prepare", {}, needs_data=False, scope="model", in_place=False),
    "rotate": Entry(
        "prepare",
        {
            "r1": _flag(True),
            "r2": _flag(True),
            "r3": _flag(False),
            "r4": _flag(False),
            "kind": Option(
                "random_hadamard",
                "one of hadamard, random_hadamard, orthogonal",
                lambda value: value in ("hadamard", "random_hadamard", "orthogonal"),
            ),
            "block_size": Option(
                None, "a whole number from 1, or null", lambda v: v is None or (type(v) is int and v >= 1)
            ),
        },
        needs_data=False,
        scope="model",
        in_place=False,
    ),
    "equalize": Entry("equalize", {"rounds": _whole(20)}, needs_data=False, scope="layers", in_place=False),
    "smooth-quant": Entry(
        "smooth",
        {
            "alpha": Option(
                0.5, "a number from 0 to 1, or search", lambda v: v == "search" or (_is_number(v) and 0 <= v <= 1)
            ),
            "statistic": _one_of("magnitude", "range"),
            "where": _WHERE,
        },
        needs_data=True,
        scope="layers",
        in_place=True,
    ),
    "awq": Entry(
        "smooth",
        {
            "n_grid": _whole(20),
            "duo": Option(None, "true, false, or null for both", lambda value: value is None or type(value) is bool),
            "power": Option(2, "2 or 4", lambda value: type(value) is int and value in (2, 4)),
            "clip": _flag(True),
            "where": _WHERE,
        },
        needs_data=True,
        scope="layers",
        in_place=True,
    ),
    "gptq": Entry(
        "round",
        {
            "block_size": _whole(128),
            "act_order": _one_of("static", "none"),
            "dampening": _share(0.01),
            "scales": _one_of("search", "plan"),
            "min_samples": _whole(32, low=0),
        },
        needs_data=True,
        scope="layers",
        in_place=True,
    ),
    "auto-round": Entry(
        "round",
        {"steps": _whole(200), "lr": _share(None), "batch_size": _whole(8)},
        needs_data=True,
        scope="layers",
        in_place=False,
    ),
    "correct-bias": Entry("correct", {}, needs_data=True, scope="model", in_place=False),
}


# Algorithms of other tools that there are not here, and what comes near.
NEAREST: Final[Mapping[str, str]] = {
    "omniquant": "near are auto-round, which learns roundings and ranges, and awq, which searches scales and clipping",
    "osplus": "near is smooth-quant with alpha: search, which scales the same channels and shifts none",
    "tesseraq": "near is auto-round, which learns roundings and ranges, too",
    "normtweaking": "near is correct-bias, which takes out what rounding does to means",
    "spqr": "near is gptq; weights that stand out are not kept float by themselves, but layers are by a rule",
    "quik": "near is rotate with gptq; channels that stand out are not kept float by themselves",
    "llmint8": "near is smooth-quant; channels that stand out are not kept float by themselves",
    "dgq": "near are weights of int4/over_int8, which have two levels of scales",
    "adadim": "near is a rule for each layer; no axis of scales is chosen by itself",
}


def at_stage(stage: Stage) -> tuple[str, ...]:
    """The names of the algorithms that run then."""
    return tuple(name for name, entry in ALGORITHMS.items() if entry.stage == stage)


def defaults(name: str) -> dict[str, Value]:
    """The value of each option that is not given; none for a name that there is not."""
    return {key: option.default for key, option in ALGORITHMS[name].options.items()} if name in ALGORITHMS else {}


def problems(spec: Spec) -> list[str]:
    """A line for each algorithm and option that there is not."""
    found: list[str] = []
    for algorithm in spec.algorithms:
        where = f"{algorithm.source}: " if algorithm.source else ""
        entry = ALGORITHMS.get(algorithm.name)
        if entry is None:
            near = NEAREST.get(algorithm.name, f"there are {', '.join(ALGORITHMS)}")
            found.append(f"{where}graphq has no algorithm {algorithm.name}; {near}")
            continue
        if algorithm.match and entry.scope == "model":
            found.append(f"{where}{algorithm.name} is for the whole model; leave out its match")
        if algorithm.folds != EVERYWHERE and not entry.folds:
            found.append(f"{where}{algorithm.name} has no choice of what to fold into; leave out folds")
        elif algorithm.folds != EVERYWHERE and dict(algorithm.options).get("where", "fold") != "fold":
            found.append(f"{where}{algorithm.name}: folds: where is not fold, so that layers need no source")
        for name, value in algorithm.options:
            option = entry.options.get(name)
            if option is None:
                there = f"; there are {', '.join(entry.options)}" if entry.options else ""
                found.append(f"{where}{algorithm.name} has no option {name}{there}")
            elif not option.allows(value):
                found.append(f"{where}{algorithm.name}: {name}: {value!r} is not {option.words}")
    return found
