"""Every layer's decision, from the spec's rules, on the nodes that use its weight."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, assert_never, final

from torch import fx

from graphq.errors import SpecError
from graphq.ir.layers import LAYER, PLAN, layers, sites
from graphq.ir.pipeline import Batches, Invariant, Pass
from graphq.ir.unnamed import unnamed
from graphq.spec.activations import is_tensor_quant
from graphq.spec.match import Blocks, Layer, Unnamed
from graphq.spec.plan import Decision, KeepFloat, PerExpert, Plan
from graphq.spec.quant import Ofmr, PerGroup, PerToken
from graphq.spec.rules import Resolved, Spec, resolve


def decide(gm: fx.GraphModule, spec: Spec) -> tuple[dict[str, Resolved], tuple[str, ...]]:
    """The decision for every layer by FQN, and lines for the report.

    Raises ``SpecError`` for rules that match nothing and for plans that a layer of its kind cannot have.
    """
    return decide_on(layers(gm), spec, unnamed(gm))


def decide_on(
    found: Mapping[str, Layer], spec: Spec, others: Sequence[Unnamed] = ()
) -> tuple[dict[str, Resolved], tuple[str, ...]]:
    """The same for layers, and for parameters that are none, that were found otherwise than in a graph."""
    resolved, notes = resolve(spec, found, others)
    resolved, kept = _without_convolutions(resolved)
    problems = [problem for one in resolved.values() if (problem := _impossible(one)) is not None]
    if problems:
        raise SpecError(problems)
    resolved, more = _without_states(resolved)
    return resolved, (*notes, *kept, *more)


def _without_convolutions(resolved: Mapping[str, Resolved]) -> tuple[dict[str, Resolved], list[str]]:
    """The decisions without those on depthwise convolutions along tokens, those of recurrent blocks, that a rule on all
    blocks meets beside linears and that cannot have its plan: they stay float, with a line for each.
    """
    beside = {one.rule for one in resolved.values() if one.layer.kind in ("linear", "expert")}
    found: dict[str, Resolved] = {}
    notes: list[str] = []
    for fqn, one in resolved.items():
        of_all = one.rule is not None and isinstance(one.rule.match, Blocks) and one.rule in beside
        depthwise = one.layer.kind == "conv1d" and one.layer.shape[1] == 1
        if of_all and depthwise and (problem := _impossible(replace(one, rule=None))):
            one = replace(one, decision=KeepFloat(problem.partition(": ")[2].partition("; ")[0]))
            notes.append(f"{problem.partition('; ')[0]}; it stays float")
        found[fqn] = one
    return found, notes


def _without_states(resolved: Mapping[str, Resolved]) -> tuple[dict[str, Resolved], list[str]]:
    """The decisions without those on states inside of recurrences, which stay float; and a line for each of these."""
    found: dict[str, Resolved] = {}
    notes: list[str] = []
    for fqn, one in resolved.items():
        plan = one.decision
        if isinstance(plan, Plan) and plan.input is not None and one.layer.reads_state:
            kept = KeepFloat("its input is the state inside of a recurrence, which stays float")
            one = replace(one, decision=kept if plan.weight is None else replace(plan, input=None))
            notes.append(f"{fqn}: input {plan.input}: its input is the state inside of a recurrence, which stays float")
        found[fqn] = one
    return found, notes


def _impossible(found: Resolved) -> str | None:
    layer, plan = found.layer, found.decision
    if not isinstance(plan, Plan):
        return None
    where = f"{found.rule.source}: " if found.rule and found.rule.source else ""
    reason = _reason(layer, plan)
    return f"{where}{layer.fqn}: {reason}" if reason else None


def _reason(layer: Layer, plan: Plan) -> str | None:
    if 0 in layer.shape:
        return f"{plan}: a weight of shape {list(layer.shape)} has no elements to quantize; keep it float"
    for role, quant in (("weight", plan.weight), ("input", plan.input)):
        if quant is not None and isinstance(quant.method, Ofmr) and layer.kind in ("embedding", "expert"):
            return f"{role} {quant}: ofmr measures a layer's own output, which an {layer.kind} here does not have"
        if quant is not None and isinstance(quant.method, Ofmr) and layer.reads_state:
            return f"{role} {quant}: ofmr measures a layer's own output, which is inside of a recurrence"
    match layer.kind:
        case "embedding":
            if plan.input is not None:
                return f"input {plan.input}: an embedding reads token ids, which are not quantized; leave out its input"
        case "conv1d" | "conv2d" | "conv3d" | "conv_transpose1d" | "conv_transpose2d" | "conv_transpose3d":
            if plan.input is not None and isinstance(plan.input.granularity, PerToken | PerGroup):
                return f"input {plan.input}: a convolution's input has no token vectors; use one scale per tensor"
            if plan.weight is not None and isinstance(plan.weight.granularity, PerGroup) and layer.shape[1] == 1:
                return f"weight {plan.weight}: a depthwise convolution has one input per channel; use channel"
        case "linear" | "expert" | "recurrent":
            pass
        case _:
            assert_never(layer.kind)
    return None


def _unannotated(gm: fx.GraphModule) -> str | None:
    for site in sites(gm):
        if PLAN not in site.op.node.meta:
            return f"{site.path} has no decision"
    return None


annotated = Invariant("a decision for every layer", _unannotated)


@final
@dataclass(frozen=True)
class Annotate(Pass):
    """Every use of a layer carries the layer's FQN and its decision (a stack of experts: one decision for each).

    ``placed``: quantizers of activations are placed over the whole graph, those of such layers' inputs among them.
    """

    spec: Spec
    placed: bool = False
    name: ClassVar[str] = "annotate"
    ensures: ClassVar[tuple[Invariant, ...]] = (annotated,)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        resolved, _ = decide(gm, self.spec)
        count = 0
        for site in sites(gm):
            decisions = tuple(resolved[fqn].decision for fqn in site.fqns)
            if self.placed and not site.is_stack:
                decisions = tuple(_placed(decision) for decision in decisions)
            meta = {LAYER: site.path, PLAN: PerExpert(decisions) if site.is_stack else decisions[0]}
            if any(site.op.node.meta.get(key) != value for key, value in meta.items()):
                site.op.node.meta |= meta
                count += 1
        return count


def _placed(decision: Decision) -> Decision:
    """A decision whose static input is one of the tensors of the whole graph."""
    if not isinstance(decision, Plan) or (decision.input is not None and not is_tensor_quant(decision.input)):
        return decision
    return replace(decision, placed=True)
