"""Chains that one kernel computes: from codes through a product, and what follows it, to codes again."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, cast, final

import torch
from torch import Tensor, fx

from graphq.ir import edit
from graphq.ir.layers import BY, LAYER, PLAN
from graphq.ir.views import Dequantize, Op, Param, Quantize
from graphq.runtime.fused_layers import FusedLayer, hold_fused
from graphq.runtime.fusions import CODES, Fusion
from graphq.state import tensor_of

aten = torch.ops.aten
_BY_NAME: Final = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.hardswish.default: "hardswish",
    aten.tanh.default: "tanh",
}
_BOUNDS: Final = {aten.hardtanh.default: ("min_val", "max_val"), aten.clamp.default: ("min", "max")}


@final
@dataclass(frozen=True)
class Chain:
    """One call of a fused layer: what it is, its arguments, and the op whose value it gives."""

    fusion: Fusion
    arguments: tuple[Op | None, ...]
    last: Op


def is_static(op: Dequantize | Quantize) -> bool:
    """Whether it takes codes of 8 bits to float32, or float32 to such codes, by one scale that the model holds."""
    x, scale = op.x if isinstance(op, Quantize) else op, op.scale
    is_single = isinstance(scale, Param) and scale.val.numel() == 1 and all(size == -1 for size in op.block)
    return is_single and op.format in CODES and op.global_scale is None and x.val.dtype == torch.float32


def grid(op: Dequantize | Quantize) -> tuple[Op, Op | None]:
    """Scale and zero point, as arguments of a fused layer."""
    return op.scale, op.zero_point


def is_same_grid(a: Dequantize | Quantize, b: Dequantize | Quantize) -> bool:
    """Whether codes of one are codes of the other."""
    held = [None if part is None else cast(Param, part).fqn for one in (a, b) for part in grid(one)]
    return a.format == b.format and held[:2] == held[2:]


def activation_of(op: Op) -> tuple[str, list[float]] | None:
    """The name and the numbers of an activation, as ``FusedLayer`` has them; None for another op."""
    target = cast(Any, op.node.target)
    if target in _BY_NAME:
        return _BY_NAME[target], []
    if target == aten.gelu.default:
        return {"none": "gelu", "tanh": "gelu_tanh"}[op.argument("approximate")], []
    if target == aten.leaky_relu.default:
        return "leaky_relu", [float(op.argument("negative_slope"))]
    if target == aten.relu6.default:
        return "clamp", [0.0, 6.0]
    if target in _BOUNDS:
        bounds = [op.argument(name) for name in _BOUNDS[target]]
        known = all(isinstance(bound, int | float) and math.isfinite(bound) for bound in bounds)
        return ("clamp", [float(bound) for bound in bounds]) if known and bounds[0] <= bounds[1] else None
    return None


def activated(x: Op, names: Collection[str]) -> tuple[Op, str, list[float]]:
    """The activation of ``x``, one of ``names``, with its name and numbers, if nothing else reads ``x``; else ``x``."""
    reader = only_reader(x)
    found = None if reader is None else activation_of(reader)
    if reader is None or found is None or found[0] not in names:
        return x, "none", []
    return reader, *found


def only_reader(x: Op) -> Op | None:
    """What reads a value, if one op alone does."""
    users = x.users
    return users[0] if len(users) == 1 else None


def quantization_of(x: Op) -> Quantize | None:
    """What quantizes a value that nothing else reads."""
    reader = only_reader(x)
    return reader if isinstance(reader, Quantize) and is_static(reader) else None


def fuse(gm: fx.GraphModule, weight: Op, chain_of: Callable[[Op, Dequantize], Chain | None], by: str) -> int:
    """Every use of a weight is a call of one fused layer, if all of them can be and are alike; how many there are.

    The weight: int8 codes, symmetric, by output channel or by tensor, that nothing else reads.
    """
    if not isinstance(weight, Dequantize) or not isinstance(weight.codes, Param) or weight.format not in CODES:
        return 0
    codes = weight.codes
    by_channel = [1, *[-1] * (len(weight.block) - 1)]
    is_single = len(codes.users) == len(gm.graph.find_nodes(op="get_attr", target=codes.fqn)) == 1
    has_scales = isinstance(weight.scale, Param) and list(weight.block) in (by_channel, [-1] * len(by_channel))
    if not is_single or not has_scales or weight.zero_point is not None or weight.val.dtype != torch.float32:
        return 0
    uses = weight.users
    first = chain_of(uses[0], weight)
    if first is None or not all((chain := chain_of(use, weight)) and chain.fusion == first.fusion for use in uses):
        return 0
    path = codes.fqn.removesuffix(".weight")
    scale = tensor_of(gm, cast(Param, weight.scale).fqn)
    edit.put_module(gm, path, hold_fused(FusedLayer(**vars(first.fusion)), tensor_of(gm, codes.fqn), scale))
    for use in uses:
        chain = chain_of(use, weight)  # once more: it may read what the call before gives
        assert chain is not None, "no call changes what another is"
        made, meta = edit.call_module(gm, chain.last, path, chain.arguments), use.node.meta
        made.node.meta |= {key: meta[key] for key in ("nn_module_stack", "stack_trace", LAYER, PLAN) if key in meta}
        made.node.meta[BY] = (*meta.get(BY, ()), by)
    return len(uses)


def shape_of(x: Op) -> list[Any]:
    """The sizes of a tensor, some of them symbols."""
    return list(cast(Tensor, x.val).shape)
