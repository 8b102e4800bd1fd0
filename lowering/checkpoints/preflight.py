"""What no checkpoint of linears can hold of a spec, and which layers servers fuse, before any weight is read."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final, final

from torch import fx

from graphq.ir.fused import fused_layers
from graphq.ir.layers import TURNED, Site, sites
from graphq.ir.vectors import is_layer_norm
from graphq.ir.views import TransposedLinear, ops_of
from graphq.lowering.legalize import where
from graphq.spec.plan import Decision, Plan
from graphq.spec.rules import Resolved, Spec

_HELD: Final = ("linear", "expert", "embedding")


@final
@dataclass(frozen=True)
class Planned:
    """The layers of a graph and what becomes of each."""

    sites: tuple[Site, ...]
    resolved: Mapping[str, Resolved]
    turned: frozenset[str] = frozenset()

    @cached_property
    def transposed(self) -> frozenset[str]:
        """The layers whose weight is stored as [inputs, outputs], in the graph or (``turned``) in the source."""
        return frozenset(
            fqn
            for site in self.sites
            if isinstance(site.op, TransposedLinear) or site.param.fqn in self.turned
            for fqn in site.fqns
        )


def planned(gm: fx.GraphModule, resolved: Mapping[str, Resolved]) -> Planned:
    """The layers of ``gm``."""
    return Planned(tuple(sites(gm)), resolved, gm.meta.get(TURNED, frozenset()))


def layer_problems(found: Planned, problem: Callable[[Resolved, Plan], str | None]) -> Iterator[str]:
    """A line for each quantized layer that no checkpoint holds, or that ``problem`` has a reason against."""
    for fqn, one in found.resolved.items():
        if isinstance(one.decision, Plan):
            by = f" ({one.rule.source})" if one.rule is not None and one.rule.source else ""
            reason = _unheld(one, one.decision, fqn in found.transposed) or problem(one, one.decision)
            if reason:
                yield f"{fqn}: {reason}{by}"


def _unheld(one: Resolved, plan: Plan, is_transposed: bool) -> str | None:
    if plan.weight is None:
        return f"{plan}: only its input is quantized; a checkpoint holds quantized weights"
    if plan.output is not None or plan.placed:
        return f"{plan}: a checkpoint quantizes weights and inputs of linears; leave out outputs and profiles"
    if one.layer.kind not in _HELD or is_transposed:
        what = "linear whose weight is stored as [inputs, outputs]" if is_transposed else one.layer.kind
        return f"a {what} has no place among quantized linears; keep it float"
    return None


def algorithm_problems(gm: fx.GraphModule, spec: Spec, resolved: Mapping[str, Resolved]) -> Iterator[str]:
    """A line for each algorithm that leaves behind what the architecture has no place for."""
    for algorithm in spec.algorithms:
        at = f"{algorithm.source}: " if algorithm.source else ""
        options = dict(algorithm.options)
        match algorithm.name:
            case "correct-bias":
                bare = [f for f, one in resolved.items() if isinstance(one.decision, Plan) and not one.layer.bias]
                if bare:
                    shown = ", ".join(bare[:2]) + (f" and {len(bare) - 2} more" if len(bare) > 2 else "")
                    yield f"{at}correct-bias: {shown}: the architecture has no bias to put it in; leave it out"
            case _ if options.get("where") in ("multiply", "fold-or-multiply"):
                yield f"{at}{algorithm.name}: where: {options['where']}: the architecture has no factors; write fold"
            case "rotate" if options.get("r3") or options.get("r4"):
                online = " and ".join(name for name in ("r3", "r4") if options.get(name))
                yield f"{at}rotate: {online}: rotations at run time are not written; leave them out"
            case "rotate" if options.get("r1", True) and (norms := layer_norms(gm)):
                yield f"{at}rotate: r1: {norms[0]}: a rotated layer norm has no mean to subtract; write r1: false"
            case _:
                pass


def layer_norms(gm: fx.GraphModule) -> list[str]:
    """The modules of layer norms, which rotation turns into RMS norms: another architecture."""
    return [where(op) for op in ops_of(gm) if is_layer_norm(op)]


def fused_problems(found: Planned, stored: Callable[[Decision], Hashable], rule: str) -> Iterator[str]:
    """A line for each fused layer whose parts are ``stored`` unlike one another. ``rule``: who fuses, and what to do
    instead, with {first} for the part that the others are to be like.
    """
    layers = {fqn: one.layer for fqn, one in found.resolved.items()}
    for first, *others in fused_layers(found.sites, layers):
        mine = found.resolved[first].decision
        for other in others:
            decision = found.resolved[other].decision
            if stored(decision) != stored(mine):
                yield f"{other}: {decision}, but {rule.format(first=first, decision=mine)}"
                break
