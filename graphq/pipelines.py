"""Which passes compile a model by a spec, in order: written out here, by hand."""

from collections.abc import Mapping
from typing import Final

from graphq.algorithms import PassContext, preparations, quantization
from graphq.ir.pipeline import Pass
from graphq.lowering.profiles import profile_named
from graphq.passes.annotate import Annotate
from graphq.passes.decompose import Decompose
from graphq.passes.fold_batch_norm import FoldBatchNorm
from graphq.passes.fold_weights import FoldWeights
from graphq.passes.raise_grouped_linear import RaiseGroupedLinear
from graphq.passes.raise_linear import RaiseLinear
from graphq.passes.raise_recurrent import RaiseRecurrent
from graphq.passes.remove_no_ops import RemoveNoOps
from graphq.passes.round_to_stored import RoundToStored
from graphq.passes.split_gate_up import SplitGateUp
from graphq.spec.match import Layer
from graphq.spec.plan import Plan
from graphq.spec.profile import Profile
from graphq.spec.rules import Spec

_SILENT: Final = PassContext()


def canonical_passes() -> list[Pass]:
    """What brings every capture into one form, before any decision."""
    return [RemoveNoOps(), RaiseRecurrent(), FoldWeights(), RaiseLinear(), RaiseGroupedLinear(), SplitGateUp()]


def passes_for(
    spec: Spec, layers: Mapping[str, Layer] | None = None, context: PassContext = _SILENT, blocks: bool = False
) -> list[Pass]:
    """The whole pipeline for a spec and a model of these layers, in order. ``blocks``: block by block."""
    profile = placed_for(spec)
    return [
        *canonical_passes(),
        *([] if profile is None else [FoldBatchNorm(), Decompose(profile)]),
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
