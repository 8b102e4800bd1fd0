"""What is chosen together: layers that runtimes fuse, and tied ones; with the decisions that each may get."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import networkx as nx
from torch import fx

from graphq.errors import SpecError
from graphq.ir.fused import fused_layers
from graphq.ir.layers import layers, sites
from graphq.mixed_precision.options import Option
from graphq.passes.annotate import decide
from graphq.report import stored_nbytes
from graphq.spec.match import Layer
from graphq.spec.plan import Decision, Plan
from graphq.state import same_tensors

PARTS_SHOWN: Final = 3


@final
@dataclass(frozen=True)
class Group:
    """Layers that get one option. paths: where their weights are held; a stack of experts is one. held: the layers
    whose weight is not also that of another.

    ``options``: the names of those that differ for it, and ``decisions``: what each makes of each layer, by its name.
    ``choice_of``: the place among these of what each option of the search decides, those that decide alike included.
    """

    layers: tuple[Layer, ...]
    paths: tuple[str, ...]
    held: tuple[Layer, ...]
    options: tuple[str, ...]
    decisions: tuple[Mapping[str, Decision], ...]
    choice_of: Mapping[str, int]

    @property
    def name(self) -> str:
        """The layers, the first few where they are many."""
        shown = [layer.fqn for layer in self.layers[:PARTS_SHOWN]]
        first = shown[0]
        stem = first.rpartition(".")[0] + "."
        parts = [first, *(fqn.removeprefix(stem) for fqn in shown[1:])]
        more = [f"{len(self.layers) - PARTS_SHOWN} more"] if len(self.layers) > PARTS_SHOWN else []
        return ", ".join([*parts, *more])

    @property
    def numel(self) -> int:
        """The elements of all weights."""
        return sum(math.prod(layer.shape) for layer in self.held)

    def nbytes(self, choice: int, float_bits: Mapping[str, int]) -> int:
        """What ``explain`` counts for the weights; ``float_bits``: the width of one that stays float."""
        return sum(_nbytes(one, self.decisions[choice][one.fqn], float_bits[one.fqn]) for one in self.held)


def _nbytes(layer: Layer, decision: Decision, float_bits: int) -> int:
    if isinstance(decision, Plan) and decision.weight is not None:
        return stored_nbytes(layer, decision.weight)
    return math.prod(layer.shape) * float_bits // 8


def layer_groups(gm: fx.GraphModule, options: Sequence[Option]) -> list[Group]:
    """The groups of the layers that any option quantizes, in graph order.

    An option that does not quantize a layer leaves it float. Options that decide alike on all of a group's layers are
    one, by the first one's name. Raises ``SpecError`` where no option quantizes any layer.
    """
    found, uses = layers(gm), list(sites(gm))
    by_option = {option.name: decide(gm, option.spec)[0] for option in options}
    searched = {
        fqn for resolved in by_option.values() for fqn, one in resolved.items() if isinstance(one.decision, Plan)
    }
    if not searched:
        raise SpecError("search: no option quantizes any layer of the model")
    first = same_tensors(gm)
    weight_of = {
        fqn: (first.get(site.param.fqn, site.param.fqn), fqn if site.is_stack else "")
        for site in uses
        for fqn in site.fqns
    }
    together = nx.Graph()
    together.add_nodes_from(fqn for fqn in found if fqn in searched)
    by_weight: dict[tuple[str, str], list[str]] = {}
    for fqn in together.nodes:
        by_weight.setdefault(weight_of[fqn], []).append(fqn)
    for members in [*fused_layers(uses, found), *by_weight.values()]:
        together.add_edges_from(itertools.pairwise(fqn for fqn in members if fqn in searched))
    place = {fqn: i for i, fqn in enumerate(found)}
    path_of = {fqn: site.path for site in uses for fqn in site.fqns}
    components: list[list[str]] = [sorted(one, key=place.__getitem__) for one in nx.connected_components(together)]
    groups: list[Group] = []
    for component in sorted(components, key=lambda fqns: place[fqns[0]]):
        choices: dict[tuple[Decision, ...], str] = {}
        choice_of: dict[str, int] = {}
        for name, resolved in by_option.items():
            decided = tuple(resolved[fqn].decision for fqn in component)
            choices.setdefault(decided, name)
            choice_of[name] = list(choices).index(decided)
        held = {weight_of[fqn]: found[fqn] for fqn in reversed(component)}
        groups.append(
            Group(
                layers=tuple(found[fqn] for fqn in component),
                paths=tuple(dict.fromkeys(path_of[fqn] for fqn in component)),
                held=tuple(reversed(held.values())),
                options=tuple(choices.values()),
                decisions=tuple(dict(zip(component, one, strict=True)) for one in choices),
                choice_of=choice_of,
            )
        )
    return groups
