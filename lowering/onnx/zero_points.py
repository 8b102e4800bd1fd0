"""Every QuantizeLinear and DequantizeLinear has a zero point that is an initializer: compilers of NPUs read no others.

A zero point is of the codes' type and of the scale's shape, as the operators' specification has it; those of zeros are
shared: ``zero_points.int8`` is a scalar, ``zero_points.int4.48x4`` one for each of 48 by 4 blocks. Two axes share none:
OpenVINO 2026.4 computes in float all convolutions whose zero points a ConvTranspose reads, too, where the model also
holds 16-bit tensors.
"""

from collections.abc import Container, Iterator
from typing import Final

import onnx_ir as ir
import torch

from graphq.errors import PassError

_SCALED: Final = ("QuantizeLinear", "DequantizeLinear")
_FIRST_CONSTANT: Final = {"QuantizeLinear": 1, "DequantizeLinear": 1, "MatMulInteger": 2}


def complete(model: ir.Model, held: Container[str] = ()) -> None:
    """All scales and zero points that are known are initializers, and every quantizer has a zero point.

    ``held``: the names of those initializers that are tensors of the graph, and keep them.
    """
    for node in list(_nodes(model)):
        if node.op_type in _FIRST_CONSTANT and node.domain == "":
            _hold(model.graph, node, held)
        if node.op_type in _SCALED and (len(node.inputs) < 3 or node.inputs[2] is None):
            node.resize_inputs(3)
            node.replace_input_with(2, _zeros(model.graph, node))


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from ir.traversal.RecursiveGraphIterator(model.graph)


def _hold(graph: ir.Graph, node: ir.Node, held: Container[str]) -> None:
    """Constants among the parameters of ``node`` are initializers, named after what they are."""
    for i in range(_FIRST_CONSTANT[node.op_type], len(node.inputs)):
        value = node.inputs[i]
        if value is None or str(value.name) in held:
            continue
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None:
            made = initializer(graph, tensor, "scales" if i < 2 else "zero_points", _axis(node))
            node.replace_input_with(i, made)


def _zeros(graph: ir.Graph, node: ir.Node) -> ir.Value:
    codes, scale = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0], node.inputs[1]
    if codes is None or codes.dtype is None:
        raise PassError(f"onnx: {node.name}: the type of its codes is not known")
    zeros = torch.zeros(_shape(node, scale), dtype=torch.uint8).numpy().astype(codes.dtype.numpy())
    return initializer(graph, ir.tensor(zeros, dtype=codes.dtype), "zero_points", _axis(node))


def _axis(node: ir.Node) -> int | None:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else None


def _shape(node: ir.Node, scale: ir.Value | None) -> list[int]:
    """The shape of a quantizer's scale; of a computed one that which its axis and blocks ask for."""
    if scale is not None and scale.const_value is not None:
        return [int(str(size)) for size in scale.const_value.shape]
    codes = node.inputs[0]
    if codes is None or codes.shape is None or not codes.shape.is_static():
        raise PassError(f"onnx: {node.name}: the shape of its scale is not known")
    sizes = [int(str(size)) for size in codes.shape]
    if "axis" not in node.attributes:
        return []
    axis = node.attributes["axis"].as_int()
    block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
    return [-(-size // block) if i == axis else size for i, size in enumerate(sizes)] if block else [sizes[axis]]


def initializer(graph: ir.Graph, tensor: ir.TensorProtocol, role: str, axis: int | None = None) -> ir.Value:
    """An initializer with these elements: the one that there is, or a new one, named after role, type and shape.

    One of several elements is shared by nodes that have them along the same axis.
    """
    array = tensor.numpy()
    stem = name = ".".join(
        [role, tensor.dtype.name.lower(), *(["x".join(map(str, array.shape))] if array.shape else [])]
    )
    number = 0
    while (held := graph.initializers.get(name)) is not None and not _is_same(held, tensor, axis):
        number += 1
        name = f"{stem}_{number}"
    if held is None:
        held = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        held.const_value = ir.tensor(array, dtype=tensor.dtype, name=name)
        graph.register_initializer(held)
    return held


def _is_same(held: ir.Value, tensor: ir.TensorProtocol, axis: int | None) -> bool:
    known = held.const_value
    if known is None or (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
        return False
    if tensor.shape.rank() and axis is not None and any(_axis(use.node) != axis for use in held.uses()):
        return False
    return known.tobytes() == tensor.tobytes()
