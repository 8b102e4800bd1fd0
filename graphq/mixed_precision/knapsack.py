"""The multiple-choice knapsack problem, solved exactly by dynamic programming over the Pareto front.

Of each group one choice is taken; sizes and losses add up. A partial solution that another one beats in both can be in
no best whole, so that only the others are kept (Nemhauser and Ullmann, Management Science 15(9), 1969). Sizes are whole
numbers: layers of one shape have one size for a choice, and the front of many layers stays short.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from graphq.errors import SpecError

MAX_STATES: Final = 4_000_000


@final
@dataclass(frozen=True)
class Front:
    """All solutions that no other beats, by rising size and falling loss.

    sizes: int64 ``[n]``; losses: float64 ``[n]``; steps: for each group the choice, and the place in the front of the
    groups before it, of each of its partial solutions.
    """

    sizes: np.ndarray
    losses: np.ndarray
    steps: tuple[tuple[np.ndarray, np.ndarray], ...]

    def __len__(self) -> int:
        return len(self.sizes)

    def choices(self, at: int) -> tuple[int, ...]:
        """The choice of each group in the solution at this place."""
        found: list[int] = []
        for chosen, before in reversed(self.steps):
            found.append(int(chosen[at]))
            at = int(before[at])
        return tuple(reversed(found))

    def within(self, size: float) -> int | None:
        """The place of the best solution of at most this size; None where none is as small."""
        at = int(np.searchsorted(self.sizes, size, side="right")) - 1
        return at if at >= 0 else None


def pareto_front(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], most: float = np.inf) -> Front:
    """The front of all combinations whose size is at most ``most``; ``sizes[g][c]``, ``losses[g][c]`` of a choice.

    Of solutions of one size and one loss, that of the earlier choices in the later groups stands. Raises ``SpecError``
    where the front has more than ``MAX_STATES`` places, which sizes without a common measure bring about.
    """
    least = [min(own) for own in sizes]
    rest = sum(least)  # what the groups still to come take at least
    front_sizes, front_losses = np.zeros(1, np.int64), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    for own_sizes, own_losses, own_least in zip(sizes, losses, least, strict=True):
        rest -= own_least
        count = len(front_sizes)
        all_sizes = np.concatenate([front_sizes + size for size in own_sizes])
        all_losses = np.concatenate([front_losses + loss for loss in own_losses])
        order = np.lexsort((all_losses, all_sizes))
        order = order[all_sizes[order] + rest <= most]
        ordered = all_losses[order]
        below = np.minimum.accumulate(np.concatenate([[np.inf], ordered[:-1]])) if len(order) else ordered
        order = order[ordered < below]
        if len(order) > MAX_STATES:
            raise SpecError(f"search: {len(order):,} sizes are possible; give fewer options, or of one group size")
        front_sizes, front_losses = all_sizes[order], all_losses[order]
        steps.append(((order // count).astype(np.int16), (order % count).astype(np.int32)))
    return Front(front_sizes, front_losses, tuple(steps))
