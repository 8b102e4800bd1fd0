"""What each group takes, and is predicted to lose, with each of its options."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, final

from torch import fx

from graphq import compiler
from graphq.ir.layers import sites
from graphq.mixed_precision.budget import Budget
from graphq.mixed_precision.divergence import Divergence
from graphq.mixed_precision.latency import layer_latency
from graphq.mixed_precision.layer_groups import Group
from graphq.mixed_precision.options import FLOAT, Option
from graphq.mixed_precision.quantized import QuantizedLayers, quantized
from graphq.mixed_precision.scores import Scores, scores_of
from graphq.mixed_precision.sensitivity import Sensitivity, layer_costs
from graphq.spec.plan import Decision

_NANO: Final = 1e-9


def group_sizes(
    gm: fx.GraphModule, groups: Sequence[Group], limit: Budget | None, rows: int
) -> tuple[tuple[int, ...], ...]:
    """Bytes, or for a budget of latency nanoseconds, of each group by each of its options."""
    if limit is None or limit.kind != "latency":
        held = compiler.stored_bits(gm)
        return tuple(tuple(group.nbytes(i, held) for i in range(len(group.options))) for group in groups)
    known: dict[tuple[object, ...], int] = {}
    found: list[tuple[int, ...]] = []
    for group in groups:
        own: list[int] = []
        for decisions in group.decisions:
            total = 0
            for layer in group.layers:
                key = (layer.shape, layer.dtype, layer.bias, decisions[layer.fqn])
                if key not in known:
                    known[key] = round(layer_latency(layer, decisions[layer.fqn], rows) / _NANO)
                total += known[key]
            own.append(total)
        found.append(tuple(own))
    return tuple(found)


@final
class OptionLayers:
    """The layers of ``gm`` as an option quantizes all of them, made when they are first asked for."""

    def __init__(self, gm: fx.GraphModule, groups: Sequence[Group], batches: Sequence[tuple[Any, ...]]) -> None:
        self._gm, self._groups, self._batches = gm, groups, batches
        self._made: dict[str, QuantizedLayers] = {}

    def of(self, option: str) -> QuantizedLayers:
        """Those of the option of this name."""
        if option not in self._made:
            whole = quantized(self._gm, _uniform(self._groups, option), self._batches)
            self._made[option] = QuantizedLayers(self._gm, whole)
        return self._made[option]


def group_costs(
    gm: fx.GraphModule,
    groups: Sequence[Group],
    options: Sequence[Option],
    held: OptionLayers,
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
        nodes = nodes_of(gm, groups)
        for option in missing:
            found: dict[str, float] = {}
            for at, group in enumerate(groups):
                loss = whole.of(dict.fromkeys(nodes[at], held.of(option.name)))
                found |= dict.fromkeys(group.paths, loss / len(group.paths))
            scores.put(option, found)
    elif missing and kind != "divergence":
        by_option = layer_costs(gm, {option.name: held.of(option.name) for option in missing}, batches, kind, seed)
        for option in missing:
            scores.put(option, by_option[option.name])
    by_name = {option.name: option for option in options}
    known = {name: {} if name == FLOAT else scores.of_option(option) for name, option in by_name.items()}
    return tuple(
        tuple(sum(known[name].get(path, 0.0) for path in group.paths) for name in group.options) for group in groups
    )


def nodes_of(gm: fx.GraphModule, groups: Sequence[Group]) -> list[list[str]]:
    """The nodes of each group's layers."""
    nodes: dict[str, list[str]] = {}
    for site in sites(gm):
        nodes.setdefault(site.path, []).append(site.op.node.name)
    return [[node for path in group.paths for node in nodes[path]] for group in groups]


def _uniform(groups: Sequence[Group], name: str) -> dict[str, Decision]:
    """Each layer as this option decides."""
    return {fqn: decision for group in groups for fqn, decision in group.decisions[group.choice_of[name]].items()}
