"""What an Ascend checkpoint, or vLLM-Ascend, cannot hold of a spec, before any weight is read.

Source: vLLM-Ascend (August 2026), ``quantization/modelslim_config.py``: the parts of a fused layer have one tag, and
the experts of a layer that of the first of them.
"""

from collections.abc import Mapping
from typing import Final

from torch import fx

from graphq.lowering.checkpoints.ascend.caches import cache_problem
from graphq.lowering.checkpoints.ascend.roles import is_row_parallel
from graphq.lowering.checkpoints.ascend.tags import (
    FLOAT,
    Consumer,
    Layout,
    Prefill,
    Wanted,
    file_problems,
    group_size_of,
    layer_problem,
    tag_of,
)
from graphq.lowering.checkpoints.preflight import algorithm_problems, fused_problems, layer_problems, planned
from graphq.spec.plan import Decision, KeepFloat, Plan
from graphq.spec.rules import Resolved, Spec

_FUSED: Final = "{first}, with which vLLM-Ascend fuses it: {decision}; plan them alike, or say consumer=any"


def preflight(
    gm: fx.GraphModule,
    resolved: Mapping[str, Resolved],
    spec: Spec,
    consumer: Consumer = "vllm-ascend",
    layout: Layout = "v1",
    prefill: Prefill = "static",
    tp: int = 1,
) -> list[str]:
    """A line for each layer and algorithm that ``consumer`` would not load, with what it loads instead."""
    found, wanted = planned(gm, resolved), Wanted(consumer, layout, prefill, tp)
    rows = {fqn for site in found.sites for fqn in site.fqns if is_row_parallel(site.op.input_op)}

    def unloaded(one: Resolved, plan: Plan) -> str | None:
        assert plan.weight is not None
        shape, is_row = one.layer.shape, one.layer.fqn in rows
        return layer_problem(one.layer.kind, plan.weight, plan.input, shape, is_row, wanted)

    plans = {fqn: one.decision for fqn, one in resolved.items() if isinstance(one.decision, Plan)}
    weights = {fqn: (plan.weight, plan.input) for fqn, plan in plans.items() if plan.weight is not None}
    lines = [*layer_problems(found, unloaded), *algorithm_problems(gm, spec, resolved), *file_problems(weights, wanted)]

    reason = None if spec.cache is None else cache_problem(spec.cache)
    lines += [f"cache: {spec.cache}: {reason}"] if reason else []
    lines += [f"attention: {spec.attention}: checkpoints hold scales of caches alone"] if spec.attention else []

    def stored(decision: Decision) -> tuple[str, int]:
        if isinstance(decision, KeepFloat) or decision.weight is None:
            return FLOAT, 0
        return str(tag_of(decision.weight, decision.input, wanted)), group_size_of(decision.weight)

    return [*lines, *fused_problems(found, stored, _FUSED)] if consumer == "vllm-ascend" else lines
