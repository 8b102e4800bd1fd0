"""What a compressed-tensors checkpoint, or who loads it, cannot hold of a spec, before any weight is read.

Source: vLLM's ``CompressedTensorsConfig``, which has one scheme for the parts of a fused layer, and the table of
``docs/targets.md``, which says what was seen to load.
"""

from collections.abc import Mapping
from typing import Final

from torch import fx

from graphq.capture.source import source_of
from graphq.lowering.checkpoints.compressed_tensors.settings import (
    Consumer,
    cache_problem,
    consumer_problem,
    latent_problem,
    problem,
)
from graphq.lowering.checkpoints.preflight import algorithm_problems, fused_problems, layer_problems, planned
from graphq.spec.plan import Decision, KeepFloat, Plan
from graphq.spec.quant import Quant
from graphq.spec.rules import Resolved, Spec

_FUSED: Final = "{first}, with which vLLM fuses it: {decision}; plan them alike, or say consumer=transformers"


def preflight(
    gm: fx.GraphModule, resolved: Mapping[str, Resolved], spec: Spec, consumer: Consumer = "vllm"
) -> list[str]:
    """A line for each layer and algorithm that ``consumer`` would not load, with what it loads instead."""
    found, dtype = planned(gm, resolved), source_of(gm).dtype

    def unloaded(one: Resolved, plan: Plan) -> str | None:
        assert plan.weight is not None
        return problem(plan.weight, plan.input) or consumer_problem(
            one.layer.kind, plan.weight, plan.input, one.layer.shape, dtype, consumer
        )

    lines = [*layer_problems(found, unloaded), *algorithm_problems(gm, spec, resolved)]
    reason = None if spec.cache is None else cache_problem(spec.cache, consumer) or latent_problem(source_of(gm))
    lines += [f"cache: {spec.cache}: {reason}"] if reason else []
    lines += [f"attention: {spec.attention}: checkpoints hold scales of caches alone"] if spec.attention else []
    return [*lines, *fused_problems(found, _stored, _FUSED)] if consumer == "vllm" else lines


def _stored(decision: Decision) -> tuple[Quant | None, ...]:
    """What a file says of a layer: not where its scales came from."""
    if isinstance(decision, KeepFloat):
        return ()
    given = (decision.weight, decision.input)
    return tuple(None if q is None else Quant(q.format, q.granularity, q.dynamic) for q in given)
