"""The algorithms that a spec can ask for, as passes in their places. The order is written out here, by hand."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast, final

from graphq.ir.pipeline import Pass
from graphq.passes.auto_round import AutoRound
from graphq.passes.awq import AWQ
from graphq.passes.blockwise import Blockwise
from graphq.passes.calibrate import Calibrate
from graphq.passes.correct_bias import CorrectBias
from graphq.passes.equalize import Equalize
from graphq.passes.fold_batch_norm import FoldBatchNorm
from graphq.passes.fold_norms import FoldNorms
from graphq.passes.gptq import GPTQ
from graphq.passes.observe import NeedsStatistics, Observe
from graphq.passes.observe_means import ObserveMeans
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.rotate import Rotate
from graphq.passes.smooth_quant import SmoothQuant
from graphq.passes.stop_observing import StopObserving
from graphq.passes.untie import Untie
from graphq.spec.folds import EVERYWHERE
from graphq.spec.match import Layer, nearest_layer, unmatched_hint
from graphq.spec.rules import Algorithm, Spec

Value = str | int | float | bool | None
Check = Callable[[Any], bool]


@final
@dataclass(frozen=True)
class Option:
    """An option of an algorithm: what it may be, in words, and whether a value is that."""

    words: str
    allows: Check


def _one_of(*words: str) -> Option:
    return Option(f"one of {', '.join(words)}", lambda value: value in words)


def _whole(low: int, high: int = 1 << 30) -> Option:
    return Option(f"a whole number from {low}", lambda value: type(value) is int and low <= value <= high)


def _number(low: float, high: float, words: str) -> Option:
    return Option(words, lambda value: type(value) in (int, float) and low <= value <= high)


_FLAG: Final = Option("true or false", lambda value: type(value) is bool)
_WHERE: Final = _one_of("fold", "fold-or-multiply", "multiply")
_SHARE: Final = _number(0, 1, "a number from 0 to 1")

# Every algorithm, with its options. Defaults stand in the passes.
OPTIONS: Final[Mapping[str, Mapping[str, Option]]] = {
    "rtn": {},
    "fold-batch-norm": {},
    "rotate": {
        **dict.fromkeys(("r1", "r2", "r3", "r4"), _FLAG),
        "kind": _one_of("hadamard", "random_hadamard", "orthogonal"),
        "block_size": Option("a whole number from 1, or null", lambda v: v is None or (type(v) is int and v >= 1)),
    },
    "equalize": {"rounds": _whole(1)},
    "smooth-quant": {
        "alpha": Option("a number from 0 to 1, or search", lambda v: v == "search" or _SHARE.allows(v)),
        "statistic": _one_of("magnitude", "range"),
        "where": _WHERE,
    },
    "awq": {
        "n_grid": _whole(1),
        "duo": Option("true, false, or null for both", lambda v: v is None or type(v) is bool),
        "power": Option("2 or 4", lambda v: type(v) is int and v in (2, 4)),
        "clip": _FLAG,
        "where": _WHERE,
    },
    "gptq": {
        "block_size": _whole(1),
        "act_order": _one_of("static", "none"),
        "dampening": Option("a number above 0, up to 1", lambda v: _SHARE.allows(v) and v > 0),
        "scales": _one_of("search", "plan"),
        "min_samples": _whole(0),
    },
    "auto-round": {
        "steps": _whole(1),
        "lr": Option("a number above 0, up to 1", lambda v: _SHARE.allows(v) and v > 0),
        "batch_size": _whole(1),
    },
    "correct-bias": {},
}
WHOLE: Final = ("rtn", "fold-batch-norm", "rotate", "correct-bias")  # of the whole model, not of single layers
ROUNDING: Final = ("gptq", "auto-round")
DATA: Final = ("smooth-quant", "awq", "gptq", "auto-round", "correct-bias")


def problems(spec: Spec) -> list[str]:
    """A line for each algorithm and option that there is not."""
    found: list[str] = []
    for algorithm in spec.algorithms:
        where = f"{algorithm.source}: " if algorithm.source else ""
        known = OPTIONS.get(algorithm.name)
        if known is None:
            found.append(f"{where}graphq has no algorithm {algorithm.name}; there are {', '.join(OPTIONS)}")
            continue
        if algorithm.match and algorithm.name in WHOLE:
            found.append(f"{where}{algorithm.name} is for the whole model; leave out its match")
        if algorithm.folds != EVERYWHERE and "where" not in known:
            found.append(f"{where}{algorithm.name} has no choice of what to fold into; leave out folds")
        elif algorithm.folds != EVERYWHERE and dict(algorithm.options).get("where", "fold") != "fold":
            found.append(f"{where}{algorithm.name}: folds: where is not fold, so that layers need no source")
        for name, value in algorithm.options:
            option = known.get(name)
            if option is None:
                there = f"; there are {', '.join(known)}" if known else ""
                found.append(f"{where}{algorithm.name} has no option {name}{there}")
            elif not option.allows(value):
                found.append(f"{where}{algorithm.name}: {name}: {value!r} is not {option.words}")
    return found


def unmatched(spec: Spec, layers: Mapping[str, Layer], modules: Iterable[str]) -> list[str]:
    """A line for each match of an algorithm that no layer of the model has, and for each pattern of what it folds into
    that none of its ``modules`` with weights has.
    """
    names = {*modules, *layers}
    found: list[str] = []
    for algorithm in spec.algorithms:
        where = f"{algorithm.source}: " if algorithm.source else ""
        for match in algorithm.match:
            if not any(match.matches(layer) for layer in layers.values()):
                hint = unmatched_hint(match, layers)
                found.append(f"{where}{algorithm.name}: {match} matches no layer{hint}")
        for pattern in algorithm.folds.include:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                near = nearest_layer(pattern.strip("*."), names)
                hint = "" if near is None else f"; did you mean {near}?"
                found.append(f"{where}{algorithm.name}: folds: {pattern} matches no norm and no layer{hint}")
    return found


def scope(algorithm: Algorithm, layers: Mapping[str, Layer]) -> frozenset[str] | None:
    """The layers that an algorithm is for; None for all."""
    if not algorithm.match:
        return None
    return frozenset(fqn for fqn, layer in layers.items() if any(match.matches(layer) for match in algorithm.match))


@final
@dataclass(frozen=True)
class PassContext:
    """Whom passes tell: ``record`` each layer's error, ``note`` what the report should say; and the seed of what they
    draw.
    """

    record: Callable[[str, float], None] | None = None
    note: Callable[[str], None] | None = None
    seed: int = 0


def preparations(spec: Spec, context: PassContext) -> list[Pass]:
    """The passes over the whole graph that come before any decision."""
    passes: list[Pass] = []
    for algorithm in spec.algorithms:
        if algorithm.name == "fold-batch-norm":
            passes.append(FoldBatchNorm())
        elif algorithm.name == "rotate":
            passes += [
                Untie(),
                FoldNorms(context.note),
                Rotate(seed=context.seed, note=context.note, **_options(algorithm)),
            ]
    return passes


def quantization(spec: Spec, layers: Mapping[str, Layer], context: PassContext, blocks: bool) -> list[Pass]:
    """The passes from decisions to the QDQ form. ``blocks``: block by block, which needs calibration."""
    passes: list[Pass] = []
    calibrated: list[tuple[Algorithm, frozenset[str] | None]] = []
    for algorithm in spec.algorithms:
        own = scope(algorithm, layers)
        if algorithm.name == "equalize":
            passes.append(Equalize(own, note=context.note, **_options(algorithm)))
        elif algorithm.name in ("smooth-quant", "awq", *ROUNDING):
            calibrated.append((algorithm, own))
    means = any(a.name == "correct-bias" for a in spec.algorithms)
    one_by_one = spec.pipeline == "independent" and len(calibrated) > 1
    walks = [[one] for one in calibrated] if one_by_one else [calibrated]
    for number, walk in enumerate(walks):
        is_last = number == len(walks) - 1
        later = [own for other in walks[number + 1 :] for _, own in other]
        inner = _walk(walk, calibrated, context, means, is_last, _finished(walk, later, layers))
        passes += [Blockwise(tuple(inner), spec.prefix)] if blocks else inner
    if blocks:  # what several parts share was left to the whole
        passes += [Observe(), Calibrate(), QuantizeWeights(context.record), QuantizeActivations()]
    return passes


def _walk(
    walk: Iterable[tuple[Algorithm, frozenset[str] | None]],
    every: Iterable[tuple[Algorithm, frozenset[str] | None]],
    context: PassContext,
    means: bool,
    is_last: bool,
    finished: frozenset[str],
) -> list[Pass]:
    """The passes over one part of a model, in one walk over the parts. ``finished``: the layers that no later walk
    changes, whose weights are quantized now.
    """
    unclipped = _union([own for algorithm, own in every if algorithm.name in ROUNDING])
    passes: list[Pass] = []
    rounding: list[Pass] = []
    need_statistics: list[NeedsStatistics] = []  # those of them that need statistics
    for algorithm, own in walk:
        options = _options(algorithm)
        match algorithm.name:
            case "smooth-quant":
                step: Pass = SmoothQuant(own, folds=algorithm.folds, note=context.note, **options)
            case "awq":
                clip = options.pop("clip", True) and unclipped is not None
                unclipped_layers = unclipped or frozenset()
                step = AWQ(
                    own, clip=clip, unclipped=unclipped_layers, folds=algorithm.folds, note=context.note, **options
                )
            case "auto-round":
                rounding.append(AutoRound(own, seed=context.seed, record=context.record, note=context.note, **options))
                continue
            case _:
                gptq = GPTQ(own, record=context.record, note=context.note, **options)
                rounding.append(gptq)
                need_statistics.append(gptq)
                continue
        passes += [Observe((cast(NeedsStatistics, step),), ranges=False), Calibrate(), step, StopObserving()]
    if is_last:
        passes.append(Observe(tuple(need_statistics)))
        passes += [ObserveMeans()] if means else []
        passes += [Calibrate(), *rounding, QuantizeWeights(context.record)]
        passes += [CorrectBias(context.note)] if means else []
        passes.append(QuantizeActivations())
    elif rounding:
        passes += [Observe(tuple(need_statistics), ranges=False), Calibrate(), *rounding, StopObserving()]
    elif finished:
        passes.append(QuantizeWeights(context.record, finished))
    return passes


def _finished(
    walk: Iterable[tuple[Algorithm, frozenset[str] | None]],
    later: list[frozenset[str] | None],
    layers: Mapping[str, Layer],
) -> frozenset[str]:
    """The layers of a walk that no later one has."""
    own = _union([own for _, own in walk])
    taken = _union(later)
    return (frozenset(layers) if own is None else own) - (frozenset(layers) if taken is None else taken)


def _union(scopes: list[frozenset[str] | None]) -> frozenset[str] | None:
    """All layers of these scopes; None where one of them has all."""
    return None if None in scopes else frozenset[str]().union(*(s for s in scopes if s is not None))


def _options(algorithm: Algorithm) -> dict[str, Any]:
    return dict(algorithm.options)
