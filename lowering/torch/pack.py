"""The QDQ form as a torch module whose weights are packed: ``graphq.runtime`` modules in the place of their reads."""

from collections.abc import Mapping
from typing import Final, cast

import torch
from torch import Tensor, fx

from graphq.ir import edit
from graphq.ir.edit import copy_graph
from graphq.ir.views import Cast, Dequantize, GroupedLinear, Linear, Op, Param, TransposedLinear, Weighted, ops_of
from graphq.lowering.stored import hold_stored, stored
from graphq.lowering.torch.fuse_attention import fuse_attention
from graphq.lowering.torch.fuse_conv import FuseConv
from graphq.lowering.torch.fuse_linear import FuseLinear
from graphq.lowering.torch.fuse_quantization import fuse_quantization
from graphq.lowering.torch.fuse_rotary import fuse_rotary
from graphq.lowering.torch.merge_equal import merge_equal
from graphq.lowering.torch.move_codes import MoveCodes
from graphq.numerics import Scales
from graphq.runtime.experts import PackedExperts
from graphq.runtime.kernels import is_integer
from graphq.runtime.layers import INT8
from graphq.runtime.linear import PackedLinear
from graphq.runtime.modules import Int8Linear, PackedWeight, hold_linear, hold_weight
from graphq.spec.formats import code_bits, parse_format
from graphq.state import same_tensors, tensor_of

_PASSED: Final = (torch.ops.aten.cat.default, torch.ops.aten.index_select.default, Cast.target)


def pack(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the QDQ form with packed weights, and with the integer product for int8 linears on int8 inputs.

    Scales, zero points and float tensors are shared with ``gm``, and packed codes among weights that share their codes;
    but parameters that are stored in a narrower dtype than they are computed in are held as they are stored, and cast
    where they are used.
    """
    packed = copy_graph(gm)
    for step in (MoveCodes(), FuseConv(), FuseLinear()):
        step.run(packed)
    for op in ops_of(packed):
        if isinstance(op, Dequantize) and isinstance(op.codes, Param):
            _integer_linear(packed, op)
    edit.drop_unused(packed)
    first = same_tensors(packed)
    held: dict[object, Tensor] = {}
    for op in ops_of(packed):
        if (
            isinstance(op, Dequantize)
            and isinstance(op.codes, Param)
            and (rows := _row_axes(op)) is not None
            and not _packed_linear(packed, op, first, held)
            and not _packed_experts(packed, op, first, held)
        ):
            _packed_weight(packed, op, rows, first, held)
    merge_equal(packed)
    fuse_quantization(packed)
    fuse_attention(packed)
    fuse_rotary(packed)
    edit.drop_unused(packed)
    hold_stored(packed)
    packed.graph.lint()
    packed.recompile()
    return packed


def _is_int8(op: Op, weight: Dequantize) -> bool:
    """Whether ``op`` is a linear of int8 codes by the int8 codes that ``weight`` reads, by channel or by tensor."""
    return (
        isinstance(op, Linear | TransposedLinear)
        and weight.format in INT8
        and all(b == (1 if axis == op.out_axis else -1) for axis, b in enumerate(weight.block) if b != -1)
        and _has_codes(op)
        and _is_linear(op, weight)
    )


def _is_linear(op: Op, weight: Dequantize) -> bool:
    """Whether ``op`` is a linear by what ``weight`` reads, with a bias of its own or none."""
    if not isinstance(op, Linear | TransposedLinear) or op.weight_op != weight or weight.val.dim() != 2:
        return False
    bias = _bias(op)
    return bias is None or (isinstance(bias, Param) and bias.val.shape == op.val.shape[-1:])


def _has_codes(op: Linear | TransposedLinear | GroupedLinear) -> bool:
    """Whether its input is int8 codes with one scale for each token, or for all."""
    x = op.input_op
    return (
        op.val.dtype != torch.float64  # whose products float32 does not hold
        and isinstance(x, Dequantize)
        and x.format in INT8
        and not isinstance(x.codes, Param)
        and x.block[-1] == -1
    )


def _bias(op: Linear | TransposedLinear) -> Op | None:
    return op.bias if isinstance(op, Linear) else op.self_


def _integer_linear(gm: fx.GraphModule, weight: Dequantize) -> None:
    """Every use of an int8 weight is a call of one integer linear, if all of them can be and are alike."""
    uses = weight.users
    op = uses[0]
    if not isinstance(op, Linear | TransposedLinear) or not all(_is_int8(use, weight) for use in uses):
        return
    if not all(type(use) is type(op) and _bias(cast(Linear, use)) == _bias(op) for use in uses):
        return
    codes, (scale, zero_point, _) = _tensors(gm, weight)
    path = cast(Param, weight.codes).fqn.removesuffix(".weight")
    if not _bias_fits(gm, op, path):
        return
    held = _held_bias(gm, op)
    rows = codes.shape if isinstance(op, Linear) else codes.shape[::-1]
    per_channel = list(weight.block) != [-1, -1]
    transposed = isinstance(op, TransposedLinear)
    bias_dtype = None if held is None or held.dtype == op.val.dtype else held.dtype
    module = Int8Linear(rows, per_channel, zero_point is None, held is not None, op.val.dtype, transposed, bias_dtype)
    edit.put_module(gm, path, hold_linear(module, codes, scale, zero_point, held))
    for use in uses:
        x = cast(Dequantize, cast(Linear, use).input_op)
        edit.call_module(gm, use, path, (x.codes, x.scale, x.zero_point))


def _bias_fits(gm: fx.GraphModule, op: Linear | TransposedLinear, path: str) -> bool:
    """Whether the layer at ``path`` has no other tensor of the name that the bias would get."""
    bias = _bias(op)
    return not isinstance(bias, Param) or bias.fqn == f"{path}.bias" or not edit.has_tensor(gm, f"{path}.bias")


def _held_bias(gm: fx.GraphModule, op: Linear | TransposedLinear) -> Tensor | None:
    bias = _bias(op)
    return stored(gm, bias.fqn) if isinstance(bias, Param) else None


def _packed_linear(
    gm: fx.GraphModule, weight: Dequantize, first: Mapping[str, str], held: dict[object, Tensor]
) -> bool:
    """Every use of a weight is a call of one linear on its packed codes, if all are linears and have the same bias.

    Int8 inputs reach it as codes where the weight's are integers. Gives whether it is so.
    """
    uses = weight.users
    op = uses[0]
    fqn = cast(Param, weight.codes).fqn
    path = fqn.removesuffix(".weight")
    if not isinstance(op, Linear | TransposedLinear) or not _bias_fits(gm, op, path):
        return False
    if not all(
        _is_linear(use, weight) and type(use) is type(op) and _bias(cast(Linear, use)) == _bias(op) for use in uses
    ):
        return False
    codes, scales = _tensors(gm, weight)
    bias, dtype = _held_bias(gm, op), op.val.dtype
    takes_codes = is_integer(parse_format(weight.format)) and all(_has_codes(cast(Linear, use)) for use in uses)
    bias_dtype = None if bias is None or bias.dtype == dtype else bias.dtype
    form = (weight.format, list(weight.block), codes.shape, (op.out_axis,), dtype, bias is not None, bias_dtype)
    module = hold_weight(PackedLinear(*form, takes_codes), codes, scales)
    module.weight = held.setdefault((first.get(fqn, fqn), weight.format, (op.out_axis,)), module.weight)
    if bias is not None:
        module.register_buffer("bias", bias)
    edit.put_module(gm, path, module)
    for use in uses:
        x = cast(Linear, use).input_op
        read = (x.codes, x.scale, x.zero_point) if takes_codes and isinstance(x, Dequantize) else (x,)
        edit.call_module(gm, use, path, read)
    return True


def _packed_experts(
    gm: fx.GraphModule, weight: Dequantize, first: Mapping[str, str], held: dict[object, Tensor]
) -> bool:
    """As ``_packed_linear``, of a stack of experts' weights."""
    uses, fqn = weight.users, cast(Param, weight.codes).fqn
    if not all(isinstance(use, GroupedLinear) and use.weight_op == weight for use in uses):
        return False
    takes_codes = is_integer(parse_format(weight.format)) and all(_has_codes(cast(GroupedLinear, use)) for use in uses)
    codes, scales = _tensors(gm, weight)
    form = (weight.format, list(weight.block), codes.shape, (0, 1), uses[0].val.dtype, takes_codes)
    module = hold_weight(PackedExperts(*form), codes, scales)
    module.weight = held.setdefault((first.get(fqn, fqn), weight.format, (0, 1)), module.weight)
    edit.put_module(gm, path := fqn.removesuffix(".weight"), module)
    for use in uses:
        x, offsets = cast(GroupedLinear, use).input_op, cast(GroupedLinear, use).offsets
        read = (x.codes, offsets, x.scale, x.zero_point) if takes_codes and isinstance(x, Dequantize) else (x, offsets)
        edit.call_module(gm, use, path, read)
    return True


def _packed_weight(
    gm: fx.GraphModule, op: Dequantize, rows: tuple[int, ...], first: Mapping[str, str], held: dict[object, Tensor]
) -> None:
    """The read of a weight's codes is a call of a packed weight.

    ``first``: of names with the same codes the first; ``held``: codes packed before, by that and how they are packed.
    """
    fqn = cast(Param, op.codes).fqn
    path = fqn.removesuffix(".weight")
    codes, scales = _tensors(gm, op)
    module = hold_weight(PackedWeight(op.format, list(op.block), codes.shape, rows, op.val.dtype), codes, scales)
    module.weight = held.setdefault((first.get(fqn, fqn), op.format, rows), module.weight)
    edit.put_module(gm, path, module)
    edit.call_module(gm, op, path, ())


def _tensors(gm: fx.GraphModule, op: Dequantize) -> tuple[Tensor, Scales]:
    scale, zero_point, global_scale = (
        None if part is None else tensor_of(gm, cast(Param, part).fqn)
        for part in (op.scale, op.zero_point, op.global_scale)
    )
    assert scale is not None
    return tensor_of(gm, cast(Param, op.codes).fqn), Scales(scale, zero_point, global_scale)


def _row_axes(op: Dequantize) -> tuple[int, ...] | None:
    """The axes of a weight whose indices get rows of their own: experts, then output channels. None for what is no
    weight: a bias, or a tensor that is added or multiplied; and for codes of 16 bits, which bytes do not pack.
    """
    if code_bits(parse_format(op.format)) > 8:
        return None
    pending: list[Op] = [op]
    while pending:
        read = pending.pop()
        for user in read.users:
            if isinstance(user, Weighted) and user.weight_op == read:
                return (*user.own_axes, user.out_axis)
            if user.node.target in _PASSED:  # parts of a stack are joined before they are used
                pending.append(user)
    return None
