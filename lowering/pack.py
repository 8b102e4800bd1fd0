"""The QDQ form as a torch module whose weights are packed: ``graphq.runtime`` modules in the place of their reads."""

from collections.abc import Callable
from typing import Any, Final, cast

import torch
from torch import Tensor, fx, nn

from graphq import edit
from graphq.runtime.modules import Int8Linear, PackedWeight
from graphq.source import KEY
from graphq.state import tensor_of
from graphq.views import Dequantize, GroupedLinear, Linear, Op, Param, Quantize, Weighted, ops_of, view

_INT8: Final = ("int8", "int8/asym", "int8/half", "int8/by_sign")


def pack(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the QDQ form with packed weights, and with the integer product for int8 linears on int8 inputs.

    Scales, zero points and float tensors are shared with ``gm``.
    """
    packed = fx.GraphModule(_shallow(gm), _copy_graph(gm))
    packed.meta = dict(gm.meta)
    for node, original in zip(packed.graph.nodes, gm.graph.nodes, strict=True):
        node.meta = dict(original.meta)
    shared: dict[str, Op] = {}
    for op in ops_of(packed):
        if isinstance(op, Linear) and _is_int8(op):
            _integer_linear(packed, op)
    for op in ops_of(packed):
        if isinstance(op, Dequantize) and isinstance(op.codes, Param) and op.node.users:
            _packed_weight(packed, op, shared)
    edit.drop_unused(packed)
    packed.graph.lint()
    packed.recompile()
    return packed


def _shallow(gm: fx.GraphModule) -> nn.Module:
    """A module tree of its own that holds the same tensors."""
    root = nn.Module()
    for name, tensor in [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]:
        owner: nn.Module = root
        path, _, leaf = name.rpartition(".")
        for segment in path.split(".") if path else ():
            if segment not in owner._modules:
                owner.add_module(segment, nn.Module())
            owner = cast(nn.Module, owner._modules[segment])
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor)
    return root


def _copy_graph(gm: fx.GraphModule) -> fx.Graph:
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        copied[node] = graph.node_copy(node, copied.__getitem__)
    return graph


def _is_int8(op: Linear) -> bool:
    weight, x = op.weight, op.input
    return (
        isinstance(weight, Dequantize)
        and isinstance(weight.codes, Param)
        and weight.format in _INT8
        and list(weight.block) in ([1, -1], [-1, -1])
        and isinstance(x, Dequantize)
        and x.format in _INT8
        and isinstance(x.codes, Quantize)
        and (op.bias is None or isinstance(op.bias, Param))
    )


def _integer_linear(gm: fx.GraphModule, op: Linear) -> None:
    weight, x = cast(Dequantize, op.weight), cast(Dequantize, op.input)
    codes, scale, zero_point = (_tensor(gm, part) for part in (weight.codes, weight.scale, weight.zero_point))
    assert codes is not None and scale is not None
    bias = _tensor(gm, op.bias)
    module = Int8Linear(codes.shape, list(weight.block)[0] == 1, zero_point is None, bias is not None, op.val.dtype)
    module.hold(codes, scale, zero_point, bias)
    path = _module_path(gm, cast(Param, weight.codes).fqn.removesuffix(".weight"))
    _call(gm, op, path, module, (x.codes, x.scale, x.zero_point))


def _packed_weight(gm: fx.GraphModule, op: Dequantize, shared: dict[str, Op]) -> None:
    fqn = cast(Param, op.codes).fqn
    if fqn in shared:
        edit.bypass(gm, op, shared[fqn])
        return
    codes, scale, zero_point = (_tensor(gm, part) for part in (op.codes, op.scale, op.zero_point))
    assert codes is not None and scale is not None
    module = PackedWeight(op.format, list(op.block), codes.shape, _row_axes(op), op.val.dtype).hold(codes, scale, zero_point)
    shared[fqn] = _call(gm, op, _module_path(gm, fqn.removesuffix(".weight")), module, ())


def _row_axes(op: Dequantize) -> tuple[int, ...]:
    """The axes of a weight whose indices get rows of their own: experts, then output channels."""
    pending = list(op.users)
    while pending:
        user = pending.pop()
        if isinstance(user, Weighted):
            return (*user.own_axes, user.out_axis)
        pending.extend(user.users)  # parts of a stack are joined before they are used
    return (0,)


def _module_path(gm: fx.GraphModule, wanted: str) -> str:
    """Where a module for this layer goes: in the place of the plain module that holds its tensors."""
    path = wanted or "root"
    return path


def _call(gm: fx.GraphModule, op: Op, path: str, module: nn.Module, args: tuple[Any, ...]) -> Op:
    """``op`` becomes a call of ``module``, which takes the place of the tensors held at ``path``."""
    before: Callable[..., Any] = gm.graph.inserting_before
    existing = gm.get_submodule(path) if _exists(gm, path) else None
    for name, child in existing.named_children() if existing is not None else ():
        module.add_module(name, child)
    if existing is not None:
        for name, tensor in [*existing.named_parameters(recurse=False), *existing.named_buffers(recurse=False)]:
            if not hasattr(module, name):
                module.register_buffer(name, tensor)
    gm.add_submodule(path, module)
    with before(op.node):
        node = gm.graph.call_module(path, tuple(a.node if isinstance(a, Op) else a for a in args))
    node.meta = dict(op.node.meta)
    op.node.replace_all_uses_with(node)
    gm.graph.erase_node(op.node)
    return view(node)


def _exists(gm: fx.GraphModule, path: str) -> bool:
    try:
        gm.get_submodule(path)
    except AttributeError:
        return False
    return True


def _tensor(gm: fx.GraphModule, op: Op | None) -> Tensor | None:
    return tensor_of(gm, cast(Param, op).fqn) if op is not None else None


__all__ = ["KEY", "GroupedLinear", "pack", "torch"]
