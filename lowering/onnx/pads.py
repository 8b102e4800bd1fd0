"""Zeros padded in front of convolutions, which ONNX's convolutions pad themselves, at each end as much as is asked for.

A quantizer gives the zero point for 0, and that is read as 0 again, so the same holds through a pair of them. What ONNX
Runtime 1.31 finds between a convolution and the quantizers in front of it takes the convolution to float.
"""

from typing import Final

import onnx_ir as ir

_CONSTANT: Final = ("", "constant")


def fold_pads(model: ir.Model) -> int:
    """Every convolution pads the zeros that a Pad adds to what it alone reads; the number of such pads."""
    count = 0
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        while node.op_type == "Conv" and node.domain == "" and _fold(node):
            count += 1
    return count


def _fold(conv: ir.Node) -> bool:
    found = _pad_of(conv)
    if found is None:
        return False
    pad, between = found
    pads, x = _zeros_of(pad), pad.inputs[0]
    if pads is None or x is None:
        return False
    if "auto_pad" in conv.attributes and conv.attributes["auto_pad"].as_string() != "NOTSET":
        return False
    rank = len(pads) // 2
    if any(p < 0 for p in pads) or any(pads[axis] or pads[rank + axis] for axis in (0, 1)):
        return False
    had = list(conv.attributes["pads"].as_ints()) if "pads" in conv.attributes else [0] * (2 * (rank - 2))
    added = [*pads[2:rank], *pads[rank + 2 :]]
    conv.attributes["pads"] = ir.AttrInt64s("pads", [a + b for a, b in zip(had, added, strict=True)])
    pad.outputs[0].replace_all_uses_with(x)
    for node in between:
        node.outputs[0].shape = x.shape
    assert pad.graph is not None, "it is read"
    pad.graph.remove(pad, safe=True)
    return True


def _pad_of(conv: ir.Node) -> tuple[ir.Node, list[ir.Node]] | None:
    """The Pad that gives the input of ``conv``, which nothing else reads, and the quantizers between them, in order."""
    between: list[ir.Node] = []
    value, reader = conv.inputs[0], conv
    while value is not None and (node := value.producer()) is not None:
        if value.is_graph_output() or {(use.node, use.idx) for use in value.uses()} != {(reader, 0)}:
            return None
        kinds = [node.op_type, *(one.op_type for one in between)]
        if kinds[0] == "Pad" and kinds[1:] in ([], ["QuantizeLinear", "DequantizeLinear"]):
            return node, between
        if kinds not in (["DequantizeLinear"], ["QuantizeLinear", "DequantizeLinear"]) or not _has_one_scale(node):
            return None
        between.insert(0, node)
        value, reader = node.inputs[0], node
    return None


def _zeros_of(pad: ir.Node) -> list[int] | None:
    """How many zeros are added in front of each axis, then behind each; None where that is unknown or they are none."""
    x, counts = pad.inputs[0], _known(pad, 1)
    mode = pad.attributes["mode"].as_string() if "mode" in pad.attributes else ""
    if x is None or x.shape is None or counts is None or mode not in _CONSTANT:
        return None
    value, axes = _known(pad, 2), _known(pad, 3)
    if value is None or any(value) or axes is None:
        return None
    rank = len(x.shape)
    places = [int(axis) % rank for axis in axes] or list(range(rank))
    pads = [0] * (2 * rank)
    for i, axis in enumerate(places):
        pads[axis], pads[rank + axis] = int(counts[i]), int(counts[len(places) + i])
    return pads


def _known(node: ir.Node, position: int) -> list[float] | None:
    """The elements of a constant input, none where it is left out; None where it is computed."""
    value = node.inputs[position] if position < len(node.inputs) else None
    if value is None:
        return []
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy().reshape(-1).tolist()


def _has_one_scale(node: ir.Node) -> bool:
    scale = node.inputs[1]
    return scale is not None and scale.shape is not None and all(size == 1 for size in scale.shape)
