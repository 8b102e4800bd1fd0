"""Which passes compile a model by a spec, in order: written out here, by hand."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Final

from torch import fx

from graphq.algorithms import PassContext, preparations, quantization
from graphq.errors import SpecError
from graphq.ir.edit import copy_graph
from graphq.ir.effect_table import effect
from graphq.ir.effects import Attends
from graphq.ir.grids import place
from graphq.ir.op_kinds import kind_of
from graphq.ir.pipeline import Pass, Pipeline
from graphq.ir.units import module_of
from graphq.ir.views import Recurrence, ops_of
from graphq.lowering.profiles import profile_named
from graphq.passes.annotate import Annotate
from graphq.passes.decompose import PARTS, Decompose
from graphq.passes.fold_batch_norm import FoldBatchNorm
from graphq.passes.fold_pads import FoldPads
from graphq.passes.fold_weights import FoldWeights
from graphq.passes.raise_grouped_linear import RaiseGroupedLinear
from graphq.passes.raise_linear import RaiseLinear
from graphq.passes.raise_recurrent import RaiseRecurrent
from graphq.passes.raise_rms_norm import RaiseRmsNorm
from graphq.passes.remove_no_ops import RemoveNoOps
from graphq.passes.round_to_stored import RoundToStored
from graphq.passes.split_gate_up import SplitGateUp
from graphq.passes.unroll_recurrent import UnrollRecurrent
from graphq.report import ActivationsReport, activations_report
from graphq.spec.match import Layer
from graphq.spec.plan import Plan
from graphq.spec.profile import Profile
from graphq.spec.rules import Spec

_SILENT: Final = PassContext()


def canonical_passes() -> list[Pass]:
    """What brings every capture into one form, before any decision."""
    return [
        RemoveNoOps(),
        FoldPads(),
        RaiseRecurrent(),
        FoldWeights(),
        RaiseLinear(),
        RaiseGroupedLinear(),
        SplitGateUp(),
    ]


def forms_for(profile: Profile) -> list[Pass]:
    """What brings a graph into the ops that a consumer has: larger ones where it has those, or else their parts."""
    has_norm = "RMSNormalization" in profile.ops
    return [FoldBatchNorm(), *([RaiseRmsNorm()] if has_norm else []), UnrollRecurrent(profile), Decompose(profile)]


def passes_for(
    spec: Spec, layers: Mapping[str, Layer] | None = None, context: PassContext = _SILENT, blocks: bool = False
) -> list[Pass]:
    """The whole pipeline for a spec and a model of these layers, in order. ``blocks``: block by block."""
    profile = placed_for(spec)
    return [
        *canonical_passes(),
        *([] if profile is None else forms_for(profile)),
        *preparations(spec, context),
        Annotate(spec, placed=profile is not None),
        RoundToStored(),
        *quantization(spec, layers or {}, context, blocks, profile),
    ]


def placed_for(spec: Spec) -> Profile | None:
    """The profile by which quantizers are placed over the whole graph; None where the inputs of layers alone are
    quantized: no profile and no rules for activations are given, or no activation is to be an integer of one scale.
    """
    if spec.activations:
        return profile_named(spec.profile or "generic-int8")
    plans = [rule.decision for rule in spec.rules if isinstance(rule.decision, Plan)]
    static = any(plan.input is not None and not plan.input.dynamic for plan in plans)
    given = any(plan.output is not None for plan in plans)
    return profile_named(spec.profile or "generic-int8") if given or (static and spec.profile) else None


def with_steps(gm: fx.GraphModule, spec: Spec) -> fx.GraphModule:
    """The graph in which recurrences stand as their steps, where the spec's consumer runs these in integers: what can
    be said of a layer of states depends on it. ``gm`` is left alone.
    """
    try:
        profile = placed_for(spec)
    except SpecError:  # no such profile, which compile refuses
        return gm
    if profile is None or not any(isinstance(op, Recurrence) for op in ops_of(gm)):
        return gm
    copied = copy_graph(gm)
    Pipeline([UnrollRecurrent(profile)]).run(copied)
    return copied


def placement(gm: fx.GraphModule, spec: Spec) -> tuple[list[str], ActivationsReport | None]:
    """What the report says of the tensors between layers; ``gm``, which may have no weights, is left alone."""
    try:
        profile = placed_for(spec)
    except SpecError:  # no such profile, which compile refuses
        return [], None
    if profile is None:
        return [], None
    copied = copy_graph(gm)
    Pipeline([*forms_for(profile), Annotate(spec, placed=True)]).run(copied)
    found = place(copied, profile, spec.activations)
    later = [f"fallback: {spec.fallback}: which ops fall back is found on calibration data"] if spec.fallback else []
    return [*found.notes, *found.summary(profile.name), *later], activations_report(found, profile.name)


def fallback_problems(spec: Spec) -> list[str]:
    """A line where a fallback is asked for and nothing is placed that could fall back."""
    try:
        if spec.fallback is None or placed_for(spec) is not None:
            return []
    except SpecError:  # no such profile, which compile refuses
        return []
    return ["fallback: the spec quantizes no activations with static scales between ops; give activations or a profile"]


def cache_problems(spec: Spec) -> list[str]:
    """A line for a cache and for attention's operands that are asked for beside quantizers of the whole graph."""
    asked = [("cache", spec.cache), ("attention", spec.attention)]
    try:
        profile = placed_for(spec)
    except SpecError:  # no such profile, which compile refuses
        return []
    why = (
        "" if profile is None else f"the profile {profile.name} quantizes tensors of the whole graph, and not beside it"
    )
    return [f"{name}: {value}: {why}; leave one of them out" for name, value in asked if value is not None and why]


def attention_problems(gm: fx.GraphModule, spec: Spec) -> tuple[list[str], list[str]]:
    """A line where a spec asks for operands of attention and the model has none as one op; and the note on others."""
    if spec.attention is None:
        return [], []
    whole = [op for op in ops_of(gm) if isinstance(effect(op), Attends)]
    if not whole:
        return [f"attention: {spec.attention}: no attention of this model is one op; leave it out of the spec"], []
    places = f"{module_of(whole[0])} and {len(whole) - 1} more" if len(whole) > 1 else module_of(whole[0])
    return [], [f"attention: {spec.attention}: of {places}"]


def unmatched_activations(gm: fx.GraphModule, spec: Spec) -> tuple[list[str], list[str]]:
    """A line for each rule for activations that no op has: problems of those that quantize, notes of the others."""
    seen = [(kind_of(op), module_of(op)) for op in ops_of(gm) if op.node.op in ("placeholder", "call_function")]
    seen += [(part, module) for kind, module in seen for part in PARTS.get(kind, ())]
    kinds, modules = ({*one} for one in zip(*seen, strict=True))
    problems: list[str] = []
    notes: list[str] = []
    for rule in spec.activations:
        if any(rule.matches(kind, module) for kind, module in seen):
            continue
        missing = [kind for kind in rule.ops if kind not in kinds]
        hint = nearest_of(missing[0], kinds) if missing else nearest_of(rule.module.strip("*."), modules)
        where = f"{rule.source}: " if rule.source else ""
        line = f"{where}{rule}: matches no op of the model{hint}"
        (notes if rule.quant is None else problems).append(line)
    return problems, notes


def nearest_of(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest of ``known``, if one is near."""
    near = difflib.get_close_matches(name, sorted(known), 1)
    return f"; did you mean {near[0]}?" if near else ""
