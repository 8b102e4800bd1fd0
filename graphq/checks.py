"""What ``graphq.compile`` refuses before the work begins."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import torch
from torch import fx, nn

from graphq.capture.unread import check_numbers
from graphq.errors import GraphError, SpecError
from graphq.ir.layers import sites
from graphq.ir.op_kinds import KINDS
from graphq.ir.views import Param, ops_of
from graphq.ir.weight_parts import check_finite
from graphq.lowering.profiles import profile_named
from graphq.pipelines import placed_for
from graphq.spec.algorithms import ALGORITHMS
from graphq.spec.algorithms import problems as algorithm_problems
from graphq.spec.cache import check_cache_quant
from graphq.spec.match import Unnamed
from graphq.spec.plan import KeepFloat, Plan
from graphq.spec.quant import Ofmr
from graphq.spec.rules import SHOWN, Resolved, Spec
from graphq.state import deferred_of, held_tensor

QUANTIZABLE: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def refusals(spec: Spec) -> list[str]:
    """A line for each thing that the spec asks for and ``compile`` cannot do."""
    problems = algorithm_problems(spec)
    if spec.cache is not None:
        try:
            check_cache_quant(spec.cache)
        except SpecError as error:
            problems.append(f"cache: {error}")
    for rule in spec.activations:
        where = f"{rule.source}: " if rule.source else ""
        for kind in rule.ops:
            if kind not in KINDS:
                near = difflib.get_close_matches(kind, KINDS, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                problems.append(f"{where}op: {kind} is no kind of op{hint}")
    if spec.profile:
        try:
            profile_named(spec.profile)
        except SpecError as error:
            problems.append(str(error))
    return problems


def asks_for_nothing(spec: Spec) -> bool:
    """Whether all of the spec's rules keep layers float, and no cache and no attention is asked for."""
    return (
        spec.cache is None
        and spec.attention is None
        and not any(isinstance(rule.decision, Plan) for rule in spec.rules)
    )


def none_quantized(spec: Spec, resolved: Mapping[str, Resolved], unnamed: Sequence[Unnamed]) -> list[str]:
    """Lines on why no layer is quantized, although the spec asks for it; none where one is, or it does not ask."""
    asks = any(isinstance(rule.decision, Plan) for rule in spec.rules)
    if not asks or any(isinstance(found.decision, Plan) for found in resolved.values()):
        return []
    lines = ["the spec asks for quantization, but quantizes no layer of this model"]
    lines += [] if resolved else ["the model has no layer that a rule can name"]
    for fqn, found in resolved.items():
        lines += [f"{fqn}: stays float: {found.decision.reason}"] if isinstance(found.decision, KeepFloat) else []
    lines += [f"{other.layer.fqn}: stays float: {other.reason}" for other in unnamed]
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"{len(lines) - SHOWN:,} more stay float"]


def why_whole(spec: Spec, calibrated: bool, reads: bool) -> str:
    """Why a directory that is compiled by ``spec`` has to be held as a whole; nothing where it has not.

    ``reads``: whether the target reads what is deferred itself, one tensor after the other.
    """
    names = [a.name for a in spec.algorithms]
    by_blocks = any(ALGORITHMS[name].needs_data for name in names)
    if spec.fallback is not None:
        return "fallback: the outputs of the whole model are compared"
    if placed_for(spec) is not None:
        return "quantizers of activations are placed and calibrated over the whole model"
    if calibrated and not by_blocks:
        return "static scales without an algorithm are calibrated on the whole model"
    if (names or calibrated) and not reads:
        return f"{' and '.join(names)}: only a checkpoint (target=) is written block by block"
    return ""


def check_calibration(spec: Spec, resolved: Mapping[str, Resolved], calibration: Iterable[object] | None) -> None:
    """Raises ``SpecError`` where the spec needs data and none is given."""
    names = [a.name for a in spec.algorithms if ALGORITHMS[a.name].needs_data]
    if names and calibration is None:
        raise SpecError(f"calibration: none given, but the spec asks for {' and '.join(names)}")
    static = [
        fqn for fqn, found in resolved.items() if isinstance(found.decision, Plan) and is_calibrated(found.decision)
    ]
    if spec.cache is not None and not spec.cache.dynamic and calibration is None:
        raise SpecError(f"calibration: none given, but the scales of the cache ({spec.cache}) are static")
    fixed = [] if spec.attention is None else [n for n, q in spec.attention.given() if n != "p" and not q.dynamic]
    if fixed and calibration is None:
        raise SpecError(f"calibration: none given, but the scales of attention ({spec.attention}) are static")
    if not static and calibration is None and spec.activations:
        raise SpecError("calibration: none given, but the spec quantizes activations with static scales")
    if static and calibration is None:
        shown = ", ".join(static[:3]) + (f" and {len(static) - 3} more" if len(static) > 3 else "")
        raise SpecError(f"calibration: none given, but {shown} ask for static activation scales")


def is_calibrated(plan: Plan) -> bool:
    """Whether a scale of the layer follows from calibration data."""
    static = plan.output is not None or (plan.input is not None and not plan.input.dynamic)
    return static or (plan.weight is not None and isinstance(plan.weight.method, Ofmr))


def check_tensors(gm: fx.GraphModule, resolved: Mapping[str, Resolved], first: bool = False) -> None:
    """Raises ``GraphError`` for a parameter with NaN or Inf, and for a weight of a dtype that cannot be quantized.

    Buffers may hold them: masks do. The numbers of what is not read yet are checked when it is, or ``first``,
    which reads it once more.
    """
    planned = {
        site.param.fqn: site
        for site in sites(gm)
        if any(isinstance(plan := resolved[fqn].decision, Plan) and plan.weight is not None for fqn in site.fqns)
    }
    for fqn in dict.fromkeys(op.fqn for op in ops_of(gm) if isinstance(op, Param)):
        held = held_tensor(gm, fqn)
        if fqn in planned and held.dtype not in QUANTIZABLE:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in QUANTIZABLE)
            raise GraphError(f"{planned[fqn].fqns[0]}: the weight is {held.dtype}; graphq quantizes {names}")
        if (deferred := deferred_of(held)) is not None:
            for part in deferred.pieces() if first else ():
                if fqn in planned and not planned[fqn].is_stack:
                    check_finite(part, planned[fqn])
                else:
                    check_numbers(fqn, nn.Parameter(part, requires_grad=False))
            continue
        if fqn in planned:
            check_finite(held.detach(), planned[fqn])
        else:
            check_numbers(fqn, held)
