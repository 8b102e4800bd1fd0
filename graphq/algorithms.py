"""The algorithms that a spec can ask for, as passes in their places. The order is written out here, by hand."""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, assert_never, final

from torch import Tensor

from graphq.data.masks import MaskedBatch
from graphq.ir.choices import Choices
from graphq.ir.pipeline import Pass
from graphq.passes.auto_round import AutoRound
from graphq.passes.awq import AWQ
from graphq.passes.blockwise import Blockwise
from graphq.passes.cache_codes import CacheCodes
from graphq.passes.calibrate import Calibrate
from graphq.passes.correct_bias import CorrectBias
from graphq.passes.equalize import Equalize
from graphq.passes.fall_back import FallBack
from graphq.passes.fold_batch_norm import FoldBatchNorm
from graphq.passes.fold_norms import FoldNorms
from graphq.passes.gptq import GPTQ
from graphq.passes.observe import NeedsStatistics, Observe
from graphq.passes.observe_means import ObserveMeans
from graphq.passes.place_quantizers import PlaceQuantizers
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.passes.quantize_attention import QuantizeAttention
from graphq.passes.quantize_biases import QuantizeBiases
from graphq.passes.quantize_cache import QuantizeCache
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.rotate import Rotate
from graphq.passes.rotate_online import RotateOnline
from graphq.passes.round_to_stored import RoundToStored
from graphq.passes.smooth_quant import SmoothQuant
from graphq.passes.stop_observing import StopObserving
from graphq.passes.untie import Untie
from graphq.report import ActivationsReport
from graphq.spec.algorithms import ALGORITHMS, Stage
from graphq.spec.folds import EVERYWHERE, Folds
from graphq.spec.match import Layer
from graphq.spec.profile import Profile
from graphq.spec.rules import Algorithm, Spec
from graphq.spec.unmatched import nearest_layer, unmatched_hint

Layers = frozenset[str] | None  # by FQN; None for all


@final
@dataclass(frozen=True)
class PassContext:
    """Whom passes tell: ``record`` each layer's error, ``note`` what the report should say, ``placed`` what runs in
    which types; the seed of what they draw; what is ``wanted``, the float model's outputs; and ``chosen``, where they
    keep what they chose.
    """

    record: Callable[[str, float], None] | None = None
    note: Callable[[str], None] | None = None
    seed: int = 0
    placed: Callable[[ActivationsReport], None] | None = None
    wanted: Sequence[MaskedBatch] | None = None
    chosen: dict[str, Tensor] | None = None


@final
@dataclass(frozen=True)
class Request:
    """An algorithm as a spec asks for it of one model.

    layers: those it is for. rounded: those whose codes an algorithm of the spec chooses. number: its place in the spec.
    """

    name: str
    layers: Layers = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    folds: Folds = EVERYWHERE
    rounded: Layers = frozenset()
    context: PassContext = PassContext()
    number: int = 0

    @property
    def stage(self) -> Stage:
        return ALGORITHMS[self.name].stage

    @property
    def choices(self) -> Choices | None:
        """Where its passes keep what they chose."""
        chosen = self.context.chosen
        return None if chosen is None else Choices(f"{self.number} {self.name}", chosen)

    def make(self) -> list[Pass]:
        """The passes that are the algorithm, in order. Raises ``KeyError`` for a name that there is not."""
        return PASSES[self.name](self)


def _rotate(it: Request) -> list[Pass]:
    note, options = it.context.note, dict(it.options)
    online = {key: options.pop(key) for key in ("r3", "r4") if key in options}
    passes: list[Pass] = [Untie(), FoldNorms(note), Rotate(seed=it.context.seed, note=note, **options)]
    if any(online.values()):
        passes.append(RotateOnline(block_size=options.get("block_size"), note=note, **online))
    return passes


def _awq(it: Request) -> list[Pass]:
    options = dict(it.options)
    clip = options.pop("clip", True) and it.rounded is not None
    unclipped = it.rounded or frozenset()
    told: dict[str, Any] = {"note": it.context.note, "choices": it.choices}
    return [AWQ(it.layers, clip=clip, unclipped=unclipped, folds=it.folds, **told, **options)]


# What makes each algorithm of graphq.spec.algorithms.
PASSES: Final[Mapping[str, Callable[[Request], list[Pass]]]] = {
    "rtn": lambda it: [],
    "fold-batch-norm": lambda it: [FoldBatchNorm()],
    "rotate": _rotate,
    "equalize": lambda it: [Equalize(it.layers, note=it.context.note, **it.options)],
    "smooth-quant": lambda it: [
        SmoothQuant(it.layers, folds=it.folds, note=it.context.note, choices=it.choices, **it.options)
    ],
    "awq": _awq,
    "gptq": lambda it: [GPTQ(it.layers, record=it.context.record, note=it.context.note, **it.options)],
    "auto-round": lambda it: [
        AutoRound(it.layers, seed=it.context.seed, record=it.context.record, note=it.context.note, **it.options)
    ],
    "correct-bias": lambda it: [CorrectBias(it.context.note, it.choices)],
}


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


def columns_in_order(spec: Spec, layers: Mapping[str, Layer]) -> frozenset[str]:
    """The layers whose columns GPTQ, if it rounds them, takes in the order of their activations."""
    asked = [a for a in spec.algorithms if a.name == "gptq" and dict(a.options).get("act_order", "static") == "static"]
    return frozenset(
        fqn
        for algorithm in asked
        for fqn, layer in layers.items()
        if not algorithm.match or any(match.matches(layer) for match in algorithm.match)
    )


def preparations(spec: Spec, context: PassContext) -> list[Pass]:
    """The passes over the whole graph that come before any decision."""
    requests = _requests(spec, {}, context)
    return [step for request in requests if request.stage == "prepare" for step in request.make()]


def quantization(
    spec: Spec, layers: Mapping[str, Layer], context: PassContext, blocks: bool, profile: Profile | None = None
) -> list[Pass]:
    """The passes from decisions to the QDQ form. ``blocks``: block by block, which needs calibration. ``profile``:
    where quantizers of activations stand, if not at the inputs of layers alone.
    """
    passes: list[Pass] = []
    calibrated: list[Request] = []
    corrections: dict[str, list[Pass]] = {}
    for request in _requests(spec, layers, context):
        match stage := request.stage:
            case "equalize":
                passes += [*request.make(), RoundToStored()]
            case "smooth" | "round":
                calibrated.append(request)
            case "correct":
                corrections[request.name] = [*request.make(), RoundToStored()]
            case "prepare" | "default":
                pass
            case _:
                assert_never(stage)
    independent = spec.pipeline == "independent" and len(calibrated) > 1
    states: list[Pass] = [QuantizeCache(spec.cache, context.note)] if spec.cache is not None else []
    states += [QuantizeAttention(spec.attention, context.note)] if spec.attention is not None else []
    correcting = [step for made in corrections.values() for step in made]
    walks = [[request] for request in calibrated] if independent else [calibrated]
    for number, walk in enumerate(walks):
        if number == len(walks) - 1:
            inner = _last_walk(walk, correcting, states, context)
        else:
            later = [request for other in walks[number + 1 :] for request in other]
            inner = _walk(walk, _layers_finished(walk, later, layers), context)
        passes += [Blockwise(tuple(inner), spec.prefix)] if blocks else inner
    if blocks:  # what several parts share was left to the whole
        passes += _last_walk([], correcting, states, context)
    passes += [CacheCodes()] if spec.cache is not None else []
    if profile is not None:
        placing: Pass = PlaceQuantizers(profile, spec.activations, context.note, placed=context.placed)
        if spec.fallback is not None:
            wanted, note, placed = context.wanted, context.note, context.placed
            placing = FallBack(profile, spec.activations, spec.fallback, wanted, note, placed)
        passes += [placing, Calibrate(context.note), QuantizeActivations(context.note)]
        passes.append(QuantizeBiases(profile, context.note))
    return passes


def _requests(spec: Spec, layers: Mapping[str, Layer], context: PassContext) -> list[Request]:
    """The algorithms of the spec, each once for the layers that its matches have."""
    scopes: list[tuple[Algorithm, Layers]] = []
    for algorithm in spec.algorithms:
        matched = (fqn for fqn, layer in layers.items() if any(match.matches(layer) for match in algorithm.match))
        scopes.append((algorithm, frozenset(matched) if algorithm.match else None))
    rounded = _union([scope for algorithm, scope in scopes if ALGORITHMS[algorithm.name].stage == "round"])
    return [
        Request(algorithm.name, scope, dict(algorithm.options), algorithm.folds, rounded, context, number)
        for number, (algorithm, scope) in enumerate(scopes)
    ]


def _walk(walk: Iterable[Request], finished: frozenset[str], context: PassContext) -> list[Pass]:
    """The passes over one part of a model in a walk before the last. ``finished``: the layers that no later walk
    changes, whose weights are quantized now.
    """
    passes, rounding = _smoothing(walk, context)
    if rounding:
        return [*passes, _observe(rounding, ranges=False), Calibrate(context.note), *rounding, StopObserving()]
    return [*passes, QuantizeWeights(context.record, finished)] if finished else passes


def _last_walk(
    walk: Iterable[Request], corrections: Sequence[Pass], states: Sequence[Pass], context: PassContext
) -> list[Pass]:
    """The passes over one part of a model in the last walk, to its QDQ form. ``states``: those that quantize caches."""
    passes, rounding = _smoothing(walk, context)
    passes.append(_observe([*rounding, *states]))
    passes += [ObserveMeans()] if corrections else []
    passes += [Calibrate(context.note), *rounding, QuantizeWeights(context.record), *corrections, *states]
    return [*passes, QuantizeActivations(context.note)]


def _smoothing(walk: Iterable[Request], context: PassContext) -> tuple[list[Pass], list[Pass]]:
    """The passes that smooth, each on data of its own, and those that round."""
    smoothing: list[Pass] = []
    rounding: list[Pass] = []
    for request in walk:
        made = request.make()
        if request.stage == "round":
            rounding += made
        else:
            smoothing += [
                *(_observe(made, ranges=False), Calibrate(context.note), *made),
                *(RoundToStored(), StopObserving()),
            ]
    return smoothing, rounding


def _observe(passes: Iterable[Pass], ranges: bool = True) -> Observe:
    return Observe(tuple(step for step in passes if isinstance(step, NeedsStatistics)), ranges)


def _layers_finished(walk: Iterable[Request], later: Iterable[Request], layers: Mapping[str, Layer]) -> frozenset[str]:
    """The layers of a walk that no later one has."""
    own, others = (_union([request.layers for request in requests]) for requests in (walk, later))
    return (frozenset(layers) if own is None else own) - (frozenset(layers) if others is None else others)


def _union(scopes: Sequence[Layers]) -> Layers:
    """All layers of these scopes; None where one of them has all."""
    return None if None in scopes else frozenset[str]().union(*(scope for scope in scopes if scope is not None))
