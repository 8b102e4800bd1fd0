"""``graphq.search``: the spec that loses least within a budget, or the cheapest that loses no more than it may."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast, final

import torch
from torch import Tensor, fx, nn

from graphq import compiler
from graphq.capture.source import source_of
from graphq.compiler import Compiled, Inputs
from graphq.data.batches import complete_all
from graphq.data.evaluate import perplexity
from graphq.errors import SpecError
from graphq.ir.layers import layers, sites
from graphq.mixed_precision.budget import Budget, parse_budget
from graphq.mixed_precision.divergence import Divergence
from graphq.mixed_precision.exchange import Measured, Mix, improved
from graphq.mixed_precision.knapsack import Front, pareto_front
from graphq.mixed_precision.latency import layer_latency
from graphq.mixed_precision.layer_groups import Group, layer_groups
from graphq.mixed_precision.options import FLOAT, Option, read_options
from graphq.mixed_precision.quantized import QuantizedLayers, quantized
from graphq.mixed_precision.rules import compact_rules
from graphq.mixed_precision.scores import Scores, scores_of
from graphq.mixed_precision.sensitivity import SENSITIVITIES, Sensitivity, layer_costs
from graphq.spec.match import Blocks, Layer
from graphq.spec.plan import Decision, KeepFloat
from graphq.spec.rules import Rule, Spec

EXCHANGES: Final = 16
_NANO: Final = 1e-9
_SHOWN: Final = 1000  # places of a front in JSON


@final
@dataclass(frozen=True)
class Trial:
    """A mix that was measured: where it came from, its size, and its loss."""

    origin: str
    size: float
    loss: float


@final
@dataclass(frozen=True)
class Found:
    """What a search found. chosen: the option of each group, by its place. costs, sizes: of each group by each of its
    options: the predicted loss, and the bytes or nanoseconds. trials: what was measured end to end, in order.
    """

    spec: Spec
    layers: Mapping[str, Layer]
    groups: tuple[Group, ...]
    chosen: Mix
    costs: tuple[tuple[float, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    trials: tuple[Trial, ...]
    front: Front

    @property
    def size(self) -> int:
        """Of the chosen mix, in bytes or nanoseconds."""
        return _total(self.sizes, self.chosen)

    def to_json(self) -> dict[str, Any]:
        """Plain data: ``groups``, each with ``layers``, the chosen ``option``, and ``size`` and ``loss`` of each of its
        ``options``; ``trials`` with ``origin``, ``size``, ``loss``, null where that is no number; ``front``, the size
        and predicted loss of the best mixes, at most a thousand of them.
        """
        groups = [
            {
                "layers": [layer.fqn for layer in group.layers],
                "option": group.options[choice],
                "options": {name: {"size": s, "loss": c} for name, s, c in zip(group.options, size, cost, strict=True)},
            }
            for group, choice, cost, size in zip(self.groups, self.chosen, self.costs, self.sizes, strict=True)
        ]
        trials = [
            {"origin": one.origin, "size": one.size, "loss": one.loss if math.isfinite(one.loss) else None}
            for one in self.trials
        ]
        step = -(-len(self.front) // _SHOWN)
        front = [[int(s), float(c)] for s, c in zip(self.front.sizes[::step], self.front.losses[::step], strict=True)]
        return {"groups": groups, "trials": trials, "front": front}

    def lines(self) -> list[str]:
        """The chosen options as text: a line for each group, then one for each mix that was measured."""
        width = max(len(group.name) for group in self.groups)
        lines = [
            f"{group.name:{width}}  {group.options[choice]}"
            for group, choice in zip(self.groups, self.chosen, strict=True)
        ]
        return [*lines, *(f"measured: {one.origin}: size {one.size:,.0f}, loss {one.loss:.6g}" for one in self.trials)]


def search(
    model: nn.Module | str | os.PathLike[str],
    options: str | Iterable[str | Spec | Mapping[str, Any]],
    budget: str | Budget | None = None,
    **how: Any,
) -> Spec:
    """The spec that gives each layer one of ``options`` so that the model loses least within ``budget``; see ``find``,
    whose ``spec`` this is.
    """
    return find(model, options, budget, **how).spec


def find(
    model: nn.Module | str | os.PathLike[str],
    options: str | Iterable[str | Spec | Mapping[str, Any]],
    budget: str | Budget | None = None,
    *,
    calibration: Iterable[object],
    max_drop: float | str | None = None,
    evaluate: Callable[[Compiled], float] | Tensor | None = None,
    higher_is_better: bool = False,
    sensitivity: Sensitivity = "gradient",
    exchanges: int = EXCHANGES,
    rows: int = 1,
    scores: str | os.PathLike[str] | None = None,
    seed: int = 0,
    inputs: Inputs | None = None,
    dtype: torch.dtype | None = None,
    cache: bool = True,
    mask: str | None = None,
    shapes: Mapping[str, int] | None = None,
) -> Found:
    """Search for the best mix of ``options`` over the layers of ``model``, which is taken as ``compile`` takes it.

    options: two or more of: a preset's name, a weight's text form with or without an input's (``int3/asym/g64``,
        ``int4/g128 x int8/token/dynamic``), ``float``, a spec. All have the same algorithms, which join the result;
        they do not run while it is searched for.
    budget: ``4.5bits`` (of a searched weight on average, scales included), ``600MB`` or ``123456B`` (of the searched
        layers, as ``explain`` counts them), ``1.2x-latency`` (of the searched layers' products on ``rows`` rows on this
        machine, relative to the fastest choice). Layers that runtimes fuse, and tied ones, get one option.
    calibration: batches, as ``compile`` takes them: what sensitivities and mixes are measured on.
    max_drop: in place of a budget, or beside it: the smallest mix that loses no more than this share (0.005, or
        ``0.5%``) of what the float model has. It is measured by ``evaluate``: a function of a compiled model, or
        windows of tokens ``[n, length]``, which are not those of the calibration, for their perplexity.
        ``higher_is_better``: of the function.
    sensitivity: see ``graphq.mixed_precision.sensitivity``.
    exchanges: how many neighbours of the predicted best are measured end to end, at most.
    scores: a JSON file that keeps the sensitivities: a search that is run again measures only what is new.

    Raises ``SpecError``, also where no mix is as small, or none loses as little.
    """
    chosen_from = read_options(options)
    limit = parse_budget(budget) if isinstance(budget, str) else budget
    drop = _share(max_drop)
    if limit is None and drop is None:
        raise SpecError("search: neither a budget nor max_drop is given")
    if drop is not None and evaluate is None:
        raise SpecError("evaluate: max_drop needs a function of a compiled model, or windows of tokens")
    if sensitivity not in SENSITIVITIES:
        raise SpecError(f"sensitivity: {sensitivity!r} is not one of {', '.join(SENSITIVITIES)}")
    gm = compiler.capture(model, inputs, dtype, cache=cache, mask=mask, shapes=shapes)
    batches = list(complete_all(source_of(gm), calibration))
    if not batches:
        raise SpecError("calibration: no batches; a search needs at least one")
    groups = layer_groups(gm, chosen_from)
    sizes = _sizes(gm, groups, limit, rows)
    held = _quantized_layers(gm, groups, chosen_from, batches)
    costs = _costs(gm, groups, chosen_from, held, batches, sensitivity, seed, scores)
    most = _most(limit, groups, sizes)
    front = pareto_front(sizes, costs, most)
    named = layers(gm)
    base = next(option.spec for option in chosen_from if option.name != FLOAT)

    def spec_for(mix: Mix, notes: tuple[str, ...] = ()) -> Spec:
        return replace(base, rules=compact_rules(_decisions(groups, mix), named), notes=notes, dialect="native")

    if drop is None:
        mix, trials = _within(gm, groups, held, sizes, costs, most, front, batches, exchanges)
    else:

        def measured(spec: Spec) -> float:
            made = compiler.compile(
                model,
                spec,
                inputs=inputs,
                calibration=batches,
                dtype=dtype,
                cache=cache,
                mask=mask,
                shapes=shapes,
                seed=seed,
            )
            return perplexity(made, evaluate) if isinstance(evaluate, Tensor) else float(cast(Any, evaluate)(made))

        sign = -1.0 if higher_is_better and not isinstance(evaluate, Tensor) else 1.0
        mix, trials = _cheapest(front, drop, sign, measured, spec_for)
    size = _total(sizes, mix)
    used = _used(size, groups, limit)
    note = f"search: {limit or f'max_drop {drop:.3g}'}: {used}; {len(trials)} mixes measured"
    found = spec_for(mix, (note,))
    return Found(found, named, tuple(groups), mix, costs, sizes, tuple(trials), front)


def _share(max_drop: float | str | None) -> float | None:
    if max_drop is None:
        return None
    try:
        share = float(max_drop.removesuffix("%")) / 100 if str(max_drop).endswith("%") else float(max_drop)  # type: ignore[union-attr]
    except (TypeError, ValueError) as error:
        raise SpecError(f"max_drop: {max_drop!r} is no share: write 0.005 or 0.5%") from error
    if not 0 <= share < 10:
        raise SpecError(f"max_drop: {max_drop} is not from 0 to 1000%")
    return share


def _sizes(gm: fx.GraphModule, groups: Sequence[Group], limit: Budget | None, rows: int) -> tuple[tuple[int, ...], ...]:
    """Bytes, or for a budget of latency nanoseconds, of each group by each of its options."""
    if limit is None or limit.kind != "latency":
        held = compiler.stored_bits(gm)
        return tuple(tuple(group.nbytes(i, held) for i in range(len(group.options))) for group in groups)
    known: dict[tuple[tuple[int, ...], Decision], int] = {}
    found: list[tuple[int, ...]] = []
    for group in groups:
        own: list[int] = []
        for decisions in group.decisions:
            total = 0
            for layer in group.layers:
                key = (layer.shape, decisions[layer.fqn])
                if key not in known:
                    known[key] = round(layer_latency(layer, decisions[layer.fqn], rows) / _NANO)
                total += known[key]
            own.append(total)
        found.append(tuple(own))
    return tuple(found)


def _most(limit: Budget | None, groups: Sequence[Group], sizes: Sequence[Sequence[int]]) -> float:
    """The size that a mix may have. Raises ``SpecError`` where none is as small."""
    if limit is None:
        return float("inf")
    numel = sum(group.numel for group in groups)
    least = sum(min(own) for own in sizes)
    most = {"bits": limit.value * numel / 8, "bytes": limit.value, "latency": limit.value * least}[limit.kind]
    if least > most:
        raise SpecError(f"budget: {limit}: the smallest mix takes {least:,} bytes, {8 * least / numel:.3f} bits each")
    return most


def _quantized_layers(
    gm: fx.GraphModule, groups: Sequence[Group], options: Sequence[Option], batches: Sequence[tuple[Any, ...]]
) -> dict[str, QuantizedLayers]:
    """Of each option that quantizes, by its name."""
    return {
        option.name: QuantizedLayers(gm, quantized(gm, _uniform(groups, option.name), batches))
        for option in options
        if option.name != FLOAT
    }


def _costs(
    gm: fx.GraphModule,
    groups: Sequence[Group],
    options: Sequence[Option],
    held: Mapping[str, QuantizedLayers],
    batches: Sequence[tuple[Any, ...]],
    kind: Sensitivity,
    seed: int,
    path: str | os.PathLike[str] | None,
) -> tuple[tuple[float, ...], ...]:
    """The predicted loss of each group by each of its options."""
    scores = Scores(None if path is None else Path(path), scores_of(gm, batches, kind, seed) if path else "")
    missing = [option for option in scores.missing(options) if option.name != FLOAT]
    if missing and kind == "divergence":
        whole = Divergence(gm, batches)
        nodes = _nodes_of(gm, groups)
        for option in missing:
            found: dict[str, float] = {}
            for at, group in enumerate(groups):
                loss = whole.of(dict.fromkeys(nodes[at], held[option.name]))
                found |= dict.fromkeys(group.paths, loss / len(group.paths))
            scores.put(option, found)
    elif missing and kind != "divergence":
        by_option = layer_costs(gm, {option.name: held[option.name] for option in missing}, batches, kind, seed)
        for option in missing:
            scores.put(option, by_option[option.name])
    by_name = {option.name: option for option in options}
    known = {name: {} if name == FLOAT else scores.of_option(option) for name, option in by_name.items()}
    return tuple(
        tuple(sum(known[name].get(path, 0.0) for path in group.paths) for name in group.options) for group in groups
    )


def _nodes_of(gm: fx.GraphModule, groups: Sequence[Group]) -> list[list[str]]:
    """The nodes of each group's layers."""
    nodes: dict[str, list[str]] = {}
    for site in sites(gm):
        nodes.setdefault(site.path, []).append(site.op.node.name)
    return [[node for path in group.paths for node in nodes[path]] for group in groups]


def _uniform(groups: Sequence[Group], name: str) -> dict[str, Decision]:
    """Each layer as this option decides, where it differs from an earlier one; else as that one does."""
    found: dict[str, Decision] = {}
    for group in groups:
        found |= group.decisions[group.options.index(name)] if name in group.options else group.decisions[0]
    return found


def _decisions(groups: Sequence[Group], mix: Mix) -> dict[str, Decision]:
    found: dict[str, Decision] = {}
    for group, choice in zip(groups, mix, strict=True):
        found |= group.decisions[choice]
    return found


def _total(sizes: Sequence[Sequence[int]], mix: Mix) -> int:
    return sum(own[choice] for own, choice in zip(sizes, mix, strict=True))


def _used(size: int, groups: Sequence[Group], limit: Budget | None) -> str:
    if limit is not None and limit.kind == "latency":
        return f"{size / 1e6:.3f} ms"
    return f"{size:,} bytes, {8 * size / sum(group.numel for group in groups):.3f} bits a weight"


def _within(
    gm: fx.GraphModule,
    groups: Sequence[Group],
    held: Mapping[str, QuantizedLayers],
    sizes: tuple[tuple[int, ...], ...],
    costs: tuple[tuple[float, ...], ...],
    most: float,
    front: Front,
    batches: Sequence[tuple[Any, ...]],
    exchanges: int,
) -> tuple[Mix, list[Trial]]:
    """The best mix of at most this size among those that were measured, and these."""
    predicted = front.choices(len(front) - 1)
    if exchanges == 0:
        return predicted, []
    whole = Divergence(gm, batches)
    trials: list[Trial] = []
    starts = {predicted: "predicted"}
    for origin, mix in _heuristics(groups, sizes, costs, most).items():
        starts.setdefault(mix, origin)

    nodes = _nodes_of(gm, groups)

    def measure(mix: Mix) -> float:
        chosen = {
            node: held[name]
            for at, choice in enumerate(mix)
            if (name := groups[at].options[choice]) != FLOAT
            for node in nodes[at]
        }
        loss = whole.of(chosen)
        trials.append(Trial(starts.get(mix, "exchange"), _total(sizes, mix), loss))
        return loss

    measured = Measured(measure)
    best = min(starts, key=measured.of)
    return improved(best, sizes, costs, most, measured, exchanges), trials


def _heuristics(
    groups: Sequence[Group], sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], most: float
) -> dict[str, Mix]:
    """Mixes that sensitivities have no part in, or another one: with errors that add up in amplitude; one option for
    all layers; the largest options for the first layers, and for the last.
    """
    found: dict[str, Mix] = {}
    rooted = pareto_front(sizes, [[cost**0.5 for cost in own] for own in costs], most)
    found["amplitudes"] = rooted.choices(len(rooted) - 1)
    names = list(dict.fromkeys(name for group in groups for name in group.options))
    for name in names:
        if all(name in group.options for group in groups):
            mix = tuple(group.options.index(name) for group in groups)
            if _total(sizes, mix) <= most:
                found[f"uniform {name}"] = mix
    places = range(len(groups))
    for origin, order in (("head first", places), ("tail first", reversed(places))):
        found[origin] = filled(sizes, list(order), most)
    return found


def filled(sizes: Sequence[Sequence[int]], order: Sequence[int], most: float) -> Mix:
    """The smallest choices, and then in this order for each group the largest for which there is room."""
    mix = [min(range(len(own)), key=own.__getitem__) for own in sizes]
    room = most - _total(sizes, tuple(mix))
    for at in order:
        own = sizes[at]
        fits = [c for c in range(len(own)) if own[c] - own[mix[at]] <= room]
        best = max(fits, key=own.__getitem__)
        room -= own[best] - own[mix[at]]
        mix[at] = best
    return tuple(mix)


def _cheapest(
    front: Front, drop: float, sign: float, measured: Callable[[Spec], float], spec_for: Callable[[Mix], Spec]
) -> tuple[Mix, list[Trial]]:
    """The first mix of the front that loses no more than it may, by halving, as if the loss fell along the front.

    What is returned was measured to hold. Raises ``SpecError`` where the largest does not.
    """
    bound = measured(Spec((Rule(Blocks(), KeepFloat("measured as it is")),)))
    trials = [Trial("float", 0, bound)]

    def holds(at: int) -> bool:
        value = measured(spec_for(front.choices(at)))
        trials.append(Trial("front", float(front.sizes[at]), value))
        return sign * (value - bound) <= drop * abs(bound)

    high = len(front) - 1
    if not holds(high):
        raise SpecError(
            f"max_drop: the largest mix has {trials[-1].loss:.6g}, the float model {bound:.6g}: more than"
            f" {drop:.3%} lost; give a finer option, or float"
        )
    low = -1  # does not hold
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return front.choices(high), trials
