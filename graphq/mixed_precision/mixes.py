"""Mixes within a budget: where a search begins, and the best of what it measures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import fx

from graphq.mixed_precision.costs import OptionLayers, nodes_of
from graphq.mixed_precision.divergence import Divergence
from graphq.mixed_precision.exchange import Measured, Mix, improved
from graphq.mixed_precision.knapsack import Front, pareto_front
from graphq.mixed_precision.layer_groups import Group
from graphq.mixed_precision.options import FLOAT


@final
@dataclass(frozen=True)
class Trial:
    """A mix that was measured: where it came from, its size, and its loss."""

    origin: str
    size: float
    loss: float


def total_size(sizes: Sequence[Sequence[int]], mix: Mix) -> int:
    """Of all groups."""
    return sum(own[choice] for own, choice in zip(sizes, mix, strict=True))


def best_within(
    gm: fx.GraphModule,
    groups: Sequence[Group],
    held: OptionLayers,
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

    nodes = nodes_of(gm, groups)

    def measure(mix: Mix) -> float:
        chosen = {
            node: held.of(name)
            for at, choice in enumerate(mix)
            if (name := groups[at].options[choice]) != FLOAT
            for node in nodes[at]
        }
        loss = whole.of(chosen)
        trials.append(Trial(starts.get(mix, "exchange"), total_size(sizes, mix), loss))
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
            if total_size(sizes, mix) <= most:
                found[f"uniform {name}"] = mix
    places = range(len(groups))
    for origin, order in (("head first", places), ("tail first", reversed(places))):
        found[origin] = filled(sizes, list(order), most)
    return found


def filled(sizes: Sequence[Sequence[int]], order: Sequence[int], most: float) -> Mix:
    """The smallest choices, and then in this order for each group the largest for which there is room."""
    mix = [min(range(len(own)), key=own.__getitem__) for own in sizes]
    room = most - total_size(sizes, tuple(mix))
    for at in order:
        own = sizes[at]
        fits = [c for c in range(len(own)) if own[c] - own[mix[at]] <= room]
        best = max(fits, key=own.__getitem__)
        room -= own[best] - own[mix[at]]
        mix[at] = best
    return tuple(mix)
