"""Biases of linears and convolutions: which tensor a layer adds, and a new one where it adds none."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from graphq.capture.source import SHARED
from graphq.errors import GraphError
from graphq.ir import edit
from graphq.ir.effect_table import channel_axis
from graphq.ir.index import GraphIndex
from graphq.ir.views import (
    Convolution,
    ConvTranspose,
    Linear,
    Op,
    Param,
    TransposedLinear,
    view,
)

Biased = Linear | TransposedLinear | Convolution | ConvTranspose


def bias_of(op: Biased) -> Op | None:
    """What ``op`` adds to its product."""
    return op.self_ if isinstance(op, TransposedLinear) else op.bias


def weight_of(op: Biased) -> Op:
    """What ``op`` multiplies by."""
    return op.mat2 if isinstance(op, TransposedLinear) else op.weight


def channels_of(op: Biased) -> int:
    """The number of output channels."""
    return int(op.val.shape[channel_axis(op)])


def bias_name(weight: str) -> str:
    """``<layer>.bias``; beside a weight that is itself called as a layer is, ``<weight>_bias``."""
    return f"{weight.removesuffix('.weight')}.bias" if weight.endswith(".weight") else f"{weight}_bias"


def why_no_bias(index: GraphIndex, ops: Sequence[Biased]) -> str | None:
    """None where ``ops``, the uses of one layer, can be given another bias, else the reason: what they add is computed,
    or others read it, too. Of tied biases, which are one tensor under several names, each can be another.
    """
    bias = bias_of(ops[0])
    if any(bias_of(op) != bias for op in ops):
        return "its uses have different biases"
    if bias is None:
        return None
    if not isinstance(bias, Param):
        return f"its bias is computed by {bias.node.target}"
    if list(bias.val.shape) != [channels_of(ops[0])]:
        return f"its bias has the shape {list(bias.val.shape)}"
    readers = {user for node in index.reads(bias.fqn) for user in view(node).users}
    if not readers <= set(ops) or bias.fqn in index.gm.meta.get(SHARED, ()):
        return f"{bias.fqn} is read elsewhere, too"
    return None


def set_bias(index: GraphIndex, ops: Sequence[Biased], name: str, bias: Tensor, by: str) -> list[Op]:
    """``ops``, the uses of one layer, add ``bias``, which is held as ``name`` if they had none; the ops after that.

    Raises ``GraphError`` where the model has a tensor of this name.
    """
    gm, old = index.gm, bias_of(ops[0])
    if old is not None:
        assert isinstance(old, Param), "asked before"
        edit.set_param(gm, old.fqn, lambda _: bias, by, index.reads(old.fqn))
        return list(ops)
    if edit.has_tensor(gm, name):
        raise GraphError(f"{name}: the model has a tensor of this name, which {by} gives to a layer's bias; rename it")
    first = min(ops, key=lambda op: op.node)  # in graph order
    held = edit.add_tensor(gm, first, name, nn.Parameter(bias, requires_grad=False), by=by, like=first)
    return [edit.replace(gm, op, cast(Any, op.node.target), *_with_bias(op, held), by=by) for op in ops]


def _with_bias(op: Biased, bias: Op) -> list[Any]:
    """The arguments of ``op`` up to the last that it was given, with this bias."""
    names: list[str] = [argument.name for argument in cast(Any, op.node.target)._schema.arguments]
    last = max([names.index("bias"), len(op.node.args) - 1, *(names.index(name) for name in op.node.kwargs)])
    return [bias.node if name == "bias" else op.argument(name) for name in names[: last + 1]]
