"""What a compressed-tensors checkpoint, or who loads it, cannot hold of a spec, before any weight is read.

Source: vLLM's ``CompressedTensorsConfig``, which has one scheme for the parts of a fused layer, and the table of
``docs/targets.md``, which says what was seen to load.
"""

from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import fx

from graphq.capture.source import source_of
from graphq.ir.layers import Site, sites
from graphq.ir.views import Op, TransposedLinear
from graphq.lowering.checkpoints.compressed_tensors.settings import Consumer, consumer_problem, problem
from graphq.spec.match import Layer
from graphq.spec.plan import Decision, KeepFloat, Plan
from graphq.spec.quant import Quant
from graphq.spec.rules import Resolved, Spec

_HELD: Final = ("linear", "expert", "embedding")


def preflight(
    gm: fx.GraphModule, resolved: Mapping[str, Resolved], spec: Spec, consumer: Consumer = "vllm"
) -> list[str]:
    """A line for each layer and algorithm that ``consumer`` would not load, with what it loads instead."""
    found = list(sites(gm))
    transposed = {site.path for site in found if isinstance(site.op, TransposedLinear)}
    dtype = source_of(gm).dtype
    lines: list[str] = []
    for fqn, one in resolved.items():
        if isinstance(one.decision, Plan):
            by = f" ({one.rule.source})" if one.rule is not None and one.rule.source else ""
            reason = _layer_problem(one.layer, one.decision, fqn in transposed, dtype, consumer)
            lines += [f"{fqn}: {reason}{by}"] if reason else []
    lines += _algorithm_problems(spec, resolved)
    if consumer == "vllm":
        lines += _fused_problems(found, resolved)
    return lines


def _layer_problem(layer: Layer, plan: Plan, is_transposed: bool, dtype: torch.dtype, consumer: Consumer) -> str | None:
    if plan.weight is None:
        return f"{plan}: only its input is quantized; a checkpoint holds quantized weights"
    if plan.output is not None or plan.placed:
        return f"{plan}: a checkpoint quantizes weights and inputs of linears; leave out outputs and profiles"
    if layer.kind not in _HELD or is_transposed:
        what = "linear whose weight is stored as [inputs, outputs]" if is_transposed else layer.kind
        return f"a {what} has no place among quantized linears; keep it float"
    return problem(plan.weight, plan.input) or consumer_problem(
        layer.kind, plan.weight, plan.input, layer.shape, dtype, consumer
    )


def _algorithm_problems(spec: Spec, resolved: Mapping[str, Resolved]) -> Iterator[str]:
    for algorithm in spec.algorithms:
        where = f"{algorithm.source}: " if algorithm.source else ""
        options = dict(algorithm.options)
        match algorithm.name:
            case "correct-bias":
                bare = [f for f, one in resolved.items() if isinstance(one.decision, Plan) and not one.layer.bias]
                if bare:
                    shown = ", ".join(bare[:2]) + (f" and {len(bare) - 2} more" if len(bare) > 2 else "")
                    yield f"{where}correct-bias: {shown}: the architecture has no bias to put it in; leave it out"
            case _ if options.get("where") in ("multiply", "fold-or-multiply"):
                yield f"{where}{algorithm.name}: where: {options['where']}: the architecture has no factors; write fold"
            case "rotate" if options.get("r3") or options.get("r4"):
                online = " and ".join(name for name in ("r3", "r4") if options.get(name))
                yield f"{where}rotate: {online}: rotations at run time are not written; leave them out"
            case _:
                pass


def _fused_problems(found: list[Site], resolved: Mapping[str, Resolved]) -> Iterator[str]:
    """Linears that share an input and a module, and all experts of a module, are one layer to a server."""
    fused: dict[tuple[Op | None, str], list[str]] = {}
    for site in found:
        for fqn in site.fqns:
            if resolved[fqn].layer.named_only == "router":
                continue
            parts = fqn.split(".")
            module = ".".join(parts[:-2] if site.is_stack else parts[:-1])
            key = (None if site.is_stack else site.op.input_op, module)
            fused.setdefault(key, []).append(fqn)
    for members in fused.values():
        first, *others = dict.fromkeys(members)
        mine = resolved[first].decision
        for other in others:
            if _stored(resolved[other].decision) != _stored(mine):
                yield (
                    f"{other}: {resolved[other].decision}, but {first}, with which vLLM fuses it: {mine}; plan them"
                    " alike, or say consumer=transformers"
                )
                break


def _stored(decision: Decision) -> tuple[Quant | None, ...]:
    """What a file says of a layer: not where its scales came from."""
    if isinstance(decision, KeepFloat):
        return ()
    given = (decision.weight, decision.input)
    return tuple(None if q is None else Quant(q.format, q.granularity, q.dynamic) for q in given)
