"""The QDQ form as ONNX spells it, still as a graph: scales by axis or block, one weight an expert, no Conv1D layout.

Its codes, scales and zero points are those that the ONNX file holds, under the same names.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Final, final

import torch
from torch import Tensor, fx

from graphq.capture.source import KEY, PAST, SEQUENCE, TOTAL, source_of
from graphq.ir import edit
from graphq.ir.edit import copy_graph
from graphq.ir.views import Dequantize, Input, Param, Quantize, TransposedLinear, ops_of, view
from graphq.lowering.experts import split_experts
from graphq.lowering.onnx.attention import spell_attention
from graphq.lowering.onnx.bags import spell_bags
from graphq.lowering.onnx.caches import spell_caches
from graphq.lowering.onnx.recurrence import hold_floats, spell_recurrences
from graphq.lowering.stored import hold_stored
from graphq.state import put_tensor, same_tensors, tensor_of

_BY: Final = "onnx-form"


@final
@dataclass(frozen=True)
class OnnxBlock:
    """Where ONNX wants a tensor's scales: per tensor (no axis), per ``axis``, or in blocks of ``size`` along it."""

    axis: int | None
    size: int | None


def onnx_block(block: Sequence[int], shape: Sequence[int]) -> OnnxBlock:
    """The ONNX form of a block: per tensor, per axis where one axis alone is cut, else blocked along one axis."""
    cut = [axis for axis, (b, size) in enumerate(zip(block, shape, strict=True)) if 0 < b < size]
    if not cut:
        return OnnxBlock(None, None)
    partial = [axis for axis in cut if block[axis] > 1]
    if not partial and len(cut) == 1:
        return OnnxBlock(cut[0], None)
    if partial:
        return OnnxBlock(partial[-1], block[partial[-1]])
    whole = [axis for axis in range(len(block)) if axis not in cut]
    axis = whole[-1] if whole else len(block) - 1
    return OnnxBlock(axis, shape[axis] if whole else 1)


def onnx_scale(scale: Tensor, block: Sequence[int], shape: Sequence[int]) -> Tensor:
    """A scale or zero point in the shape that ``onnx_block`` asks for: scalar, 1-D, or blocked along one axis."""
    form = onnx_block(block, shape)
    if form.axis is None:
        return scale.reshape(())
    if form.size is None:
        return scale.reshape(-1)
    sizes = [scale.shape[axis] if axis == form.axis else size for axis, size in enumerate(shape)]
    for axis, (size, b) in enumerate(zip(shape, block, strict=True)):
        if axis != form.axis and 1 < b < size:
            scale = scale.repeat_interleave(b, axis).narrow(axis, 0, size)
    return scale.expand(sizes).contiguous()


def _beside(upper: Tensor, form: OnnxBlock) -> Tensor:
    """Scales of channels or of the tensor in a shape that broadcasts over scales of groups in this form."""
    if form.size is not None:
        return upper
    return upper.reshape(-1) if form.axis is not None and upper.numel() > 1 else upper.reshape(())


def onnx_form(
    gm: fx.GraphModule, cache: bool = True, floats: Collection[str] = (), note: Callable[[str], None] | None = None
) -> fx.GraphModule:
    """A copy of the QDQ form ``gm`` in ONNX's terms; ``cache=False``: without the key/value cache. ``floats``: kinds of
    recurrences whose weights are held as floats beside quantized activations; ``note`` is told of which layers.
    """
    made = copy_graph(gm)
    if (layers := hold_floats(made, floats)) and note is not None:
        note(f"onnx: {', '.join(layers)}: written as the floats that their codes stand for, which alone are read there")
    split_experts(made)
    spell_recurrences(made)
    spell_attention(made)
    spell_bags(made)
    spell_caches(made)
    for op in ops_of(made):
        if isinstance(op, TransposedLinear) and isinstance(op.mat2, Dequantize):
            _store_rows(made, op, op.mat2)
    first = same_tensors(made)
    spelled: dict[object, Tensor] = {}  # the scales of tied weights stay one
    for op in ops_of(made):
        if isinstance(op, Dequantize) and isinstance(op.codes, Param):
            shape = tensor_of(made, op.codes.fqn).shape
            for part in (op.scale, op.zero_point, op.global_scale):
                if isinstance(part, Param):
                    key = (first.get(part.fqn, part.fqn), tuple(op.block), shape)
                    if key not in spelled:
                        like = onnx_block(list(op.block), shape) if part == op.global_scale else None
                        held = tensor_of(made, part.fqn)
                        spelled[key] = _beside(held, like) if like else onnx_scale(held, list(op.block), shape)
                    set_tensor(made, part, spelled[key])
        elif isinstance(op, Quantize) and isinstance(op.scale, Param):
            for part in (op.scale, op.zero_point):
                if isinstance(part, Param) and part.val.numel() == 1:
                    set_tensor(made, part, tensor_of(made, part.fqn).reshape(()))
    if not cache:
        _drop_cache(made)
    hold_stored(made)
    _name_apart(made)
    made.graph.lint()
    made.recompile()
    return made


def with_bytes(gm: fx.GraphModule) -> fx.GraphModule:
    """The ONNX form ``gm`` with bytes for mx formats' powers of two, a dtype that torch's exporter does not know."""
    made = copy_graph(gm)
    for op in ops_of(made):
        if isinstance(op, Param) and op.val.dtype == torch.float8_e8m0fnu:
            set_tensor(made, op, tensor_of(gm, op.fqn).view(torch.uint8))
    made.recompile()
    return made


def _name_apart(gm: fx.GraphModule) -> None:
    """No tensor has the name of an input or output, which ONNX would take for one value: theirs stay."""
    source = source_of(gm)
    taken = {*(i.name for i in source.inputs), *source.outputs}
    names: dict[str, str] = {}
    for op in ops_of(gm):
        if not isinstance(op, Param) or op.fqn not in taken:
            continue
        if op.fqn not in names:
            candidates = (f"constants.{op.fqn}{'_' * i}" for i in count())
            free = next(name for name in candidates if name not in taken and not edit.has_tensor(gm, name))
            put_tensor(gm, free, tensor_of(gm, op.fqn))
            names[op.fqn] = free
        op.node.target = names[op.fqn]
    edit.drop_unused(gm)


def set_tensor(gm: fx.GraphModule, op: Param, tensor: Tensor) -> None:
    """``op`` reads ``tensor``, under the name that it has."""
    put_tensor(gm, op.fqn, tensor)
    op.node.meta["val"] = edit.fake_mode_of(gm).from_tensor(tensor, static_shapes=True)


def _store_rows(gm: fx.GraphModule, op: TransposedLinear, weight: Dequantize) -> None:
    """A ``[K, N]`` weight is stored as the rows ``[N, K]`` of every other linear, and transposed when it is read."""
    for part in (weight.codes, weight.scale, weight.zero_point, weight.global_scale):
        if isinstance(part, Param):
            set_tensor(gm, part, tensor_of(gm, part.fqn).t().contiguous())
    arguments = (
        weight.codes,
        weight.scale,
        weight.zero_point,
        weight.global_scale,
        weight.format,
        list(weight.block)[::-1],
        weight.dtype,
    )
    rows = edit.insert(gm, weight, Dequantize.target, *arguments, by=_BY)
    edit.bypass(gm, weight, edit.insert(gm, view(rows.node.next), torch.ops.aten.t.default, rows, by=_BY))


def _drop_cache(gm: fx.GraphModule) -> None:
    """Caches are empty constants of the batch's size, and are not given back."""
    source = source_of(gm)
    inputs = [op for op in ops_of(gm) if isinstance(op, Input)]
    first = view(inputs[-1].node.next)
    batch = edit.insert(gm, first, torch.ops.aten.sym_size.int, inputs[0], 0, by=_BY)
    for op, declared in zip(inputs, source.inputs, strict=True):
        if declared.name in source.pasts:
            sizes = [batch.node if d == "batch" else 0 if d == PAST else d for d in declared.shape]
            with gm.graph.inserting_before(first.node):
                empty = gm.graph.call_function(torch.ops.aten.full.default, (sizes, 0.0), {"dtype": declared.dtype})
            empty.meta = dict(op.node.meta)
            edit.bypass(gm, op, view(empty))
    output = next(n for n in gm.graph.nodes if n.op == "output")
    kept = [i for i, name in enumerate(source.outputs) if name not in source.presents]
    output.args = (tuple(output.args[0][i] for i in kept),)
    edit.drop_unused(gm)
    gm.meta[KEY] = replace(
        source,
        inputs=tuple(
            replace(i, shape=tuple(SEQUENCE if d == TOTAL else d for d in i.shape))
            for i in source.inputs
            if i.name not in source.pasts
        ),
        caches=(),
        outputs=tuple(source.outputs[i] for i in kept),
        ranges=tuple(r for r in source.ranges if r[0] != PAST),
    )
