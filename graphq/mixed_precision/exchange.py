"""Steps from a mix to its neighbours, each measured: what costs that are added up do not see of each other."""

from collections.abc import Callable, Iterator, Sequence
from typing import Final, final

import numpy as np

Mix = tuple[int, ...]  # the choice of each group
_CONSIDERED: Final = 512  # neighbours of a mix, those that are predicted best


@final
class Measured:
    """The measured losses of mixes, each once."""

    def __init__(self, measure: Callable[[Mix], float]) -> None:
        self._measure = measure
        self.losses: dict[Mix, float] = {}

    def of(self, mix: Mix) -> float:
        if mix not in self.losses:
            self.losses[mix] = self._measure(mix)
        return self.losses[mix]


def improved(
    mix: Mix,
    sizes: Sequence[Sequence[float]],
    costs: Sequence[Sequence[float]],
    most: float,
    measured: Measured,
    steps: int,
) -> Mix:
    """The best of ``mix`` and what at most ``steps`` measurements of neighbours led to; none is larger than ``most``.

    A neighbour has another choice for one group or for two. Those with the lowest predicted loss are tried first.
    """
    tried = 0
    while tried < steps:
        best = measured.of(mix)
        for neighbour in _neighbours(mix, sizes, costs, most):
            if neighbour in measured.losses:
                continue
            tried += 1
            if measured.of(neighbour) < best:
                mix = neighbour
                break
            if tried == steps:
                return mix
        else:
            return mix
    return mix


def _neighbours(
    mix: Mix, sizes: Sequence[Sequence[float]], costs: Sequence[Sequence[float]], most: float
) -> Iterator[Mix]:
    """The mixes that differ in one or two groups and are not too large, by rising predicted loss."""
    moves = [(g, c) for g, choice in enumerate(mix) for c in range(len(sizes[g])) if c != choice]
    if not moves:
        return
    d_size = np.array([sizes[g][c] - sizes[g][mix[g]] for g, c in moves], np.float64)
    d_cost = np.array([costs[g][c] - costs[g][mix[g]] for g, c in moves], np.float64)
    group = np.array([g for g, _ in moves])
    room = most - sum(own[choice] for own, choice in zip(sizes, mix, strict=True))
    pair_size = d_size[:, None] + d_size[None, :]
    pair_cost = d_cost[:, None] + d_cost[None, :]
    allowed = (pair_size <= room) & (group[:, None] < group[None, :])
    single = d_size <= room
    candidates = [(float(d_cost[i]), (int(i),)) for i in np.nonzero(single)[0]]
    rows, columns = np.nonzero(allowed)
    order = np.argsort(pair_cost[rows, columns], kind="stable")[:_CONSIDERED]
    candidates += [(float(pair_cost[rows[o], columns[o]]), (int(rows[o]), int(columns[o]))) for o in order]
    for _, changed in sorted(candidates):
        new = list(mix)
        for i in changed:
            g, c = moves[i]
            new[g] = c
        yield tuple(new)
