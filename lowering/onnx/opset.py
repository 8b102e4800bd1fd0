"""The lowest opset that can hold a model, after rewriting what later opsets only spell differently.

torch's exporter writes opset 18. Reductions get their axes as attributes, CastLike becomes Cast, LayerNormalization
and Gelu their own definitions, and even splits get their sizes; then the model takes the lowest opset in which every
node is well formed.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final

import onnx
import onnx_ir as ir
from onnx import defs

from graphq.errors import TargetError
from graphq.lowering.onnx.names import layer_of

LOWEST: Final = 13
HIGHEST: Final = 28  # of onnx 1.23; ONNX Runtime 1.31 reads up to 26
_REDUCTIONS: Final = (
    "ReduceMean",
    "ReduceMax",
    "ReduceMin",
    "ReduceProd",
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSumExp",
    "ReduceSumSquare",
)
_LAYER_NORM: Final = 17
_GELU: Final = 20
RMS_NORM: Final = 23
_AXES_AS_INPUT: Final = 18  # reductions take their axes as an attribute below
_TYPES_SINCE: Final = {  # the first opset that takes an element type
    ir.DataType.INT4: 21,
    ir.DataType.UINT4: 21,
    ir.DataType.INT16: 21,
    ir.DataType.UINT16: 21,
    ir.DataType.FLOAT8E4M3FN: 19,
    ir.DataType.FLOAT8E5M2: 19,
    ir.DataType.FLOAT4E2M1: 23,
    ir.DataType.FLOAT8E8M0: 24,
    ir.DataType.INT2: 25,
    ir.DataType.UINT2: 25,
    ir.DataType.FLOAT6E2M3: 28,
    ir.DataType.FLOAT6E3M2: 28,
}
_ELSEWHERE: Final = (ir.DataType.INT16, ir.DataType.UINT16)  # which other ops than quantizers take in all opsets
_IR_VERSIONS: Final = {  # the version of the file format that has an element type (onnx.proto, enum Version)
    ir.DataType.FLOAT4E2M1: 11,
    ir.DataType.FLOAT8E8M0: 12,
    ir.DataType.INT2: 13,
    ir.DataType.UINT2: 13,
    ir.DataType.FLOAT6E2M3: 14,
    ir.DataType.FLOAT6E3M2: 14,
}
_IR_VERSION: Final = 10


def check_opset(opset: int) -> None:
    """Raises ``TargetError`` for an opset that nothing is written in."""
    if opset > HIGHEST:
        raise TargetError(f"onnx: opset {opset}: the highest is {HIGHEST}")
    if opset < LOWEST:
        raise TargetError(f"onnx: opset {opset}: the lowest is {LOWEST}")


def lower_opset(
    model: ir.Model,
    may_be_empty: Collection[str] = (),
    opset: int | None = None,
    between: tuple[int, int] = (LOWEST, HIGHEST),
) -> int:
    """``model`` in ``opset``, or where that is None in the lowest opset of ``between`` that can hold it; that opset.

    ``may_be_empty``: the names of dimensions whose size can be 0. Raises ``TargetError`` naming the layer for what no
    such opset holds, and for what needs a later one than ``opset``.
    """
    lowest, highest = between
    for node in list(model.graph):
        _rewrite(model.graph, node, may_be_empty)
    nodes = list(_all_nodes(model))
    found = lowest if opset is None else opset
    while opset is None and found < highest and not all(_fits(node, found) for node in nodes):
        found += 1
    asked = f"the highest to be written is {highest}" if opset is None else f"opset {opset} was asked for"
    for node in nodes:
        if not _fits(node, found):
            raise TargetError(f"onnx: {_reason(node, found, asked)}")
    opset = found
    if opset < _GELU:
        for node in list(model.graph):
            if node.op_type == "Gelu":
                _define_gelu(model.graph, node)
    if opset < RMS_NORM:
        for node in list(model.graph):
            if node.op_type == "RMSNormalization":
                _define_rms_norm(model.graph, node)
    if opset < _LAYER_NORM:
        for node in list(model.graph):
            if _is_plain_layer_norm(node):
                _define_layer_norm(model.graph, node)
    if opset < _AXES_AS_INPUT:
        for node in _all_nodes(model):
            _name_axes(node)
    for node in _all_nodes(model):
        node.version = None
        _trim(node, opset)
    model.opset_imports[""] = opset
    model.ir_version = max([_IR_VERSION, *(_IR_VERSIONS.get(kind, 0) for kind in _types(_all_nodes(model)))])
    return opset


def _types(nodes: Iterable[ir.Node]) -> set[ir.DataType]:
    return {v.dtype for node in nodes for v in (*node.inputs, *node.outputs) if v is not None and v.dtype is not None}


def _reason(node: ir.Node, opset: int, asked: str) -> str:
    """Why ``opset`` does not hold a node: its layer, or its name, its op, the type that asks for more, and how much."""
    where = layer_of(node) or node.name or node.op_type
    needed = next((later for later in range(opset, HIGHEST + 1) if _fits(node, later)), None)
    if needed is None:
        return f"{where}: no opset up to {HIGHEST} has {node.op_type} as it is used here"
    kinds = sorted(kind.name for kind in _types([node]) if _TYPES_SINCE.get(kind) == needed)
    of = f" of {kinds[0]}" if kinds else " as it is used here"
    return f"{where}: {node.op_type}{of} needs opset {needed}; {asked}"


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from ir.traversal.RecursiveGraphIterator(model.graph)


def _rewrite(graph: ir.Graph, node: ir.Node, may_be_empty: Collection[str]) -> None:
    match node.op_type:
        case "CastLike":
            kind = node.inputs[1].dtype if node.inputs[1] is not None else None
            if kind is not None:
                cast = ir.node("Cast", [node.inputs[0]], {"to": int(kind)})
                cast.outputs[0].dtype = kind
                _put(graph, node, [cast], cast.outputs[0])
        case "Shape" if node.attributes:
            _slice_shape(graph, node)
        case "Reshape" if "allowzero" in node.attributes and _never_empty(node.outputs[0], may_be_empty):
            del node.attributes["allowzero"]
        case "Split" if "num_outputs" in node.attributes and len(node.inputs) > 1:
            del node.attributes["num_outputs"]  # the sizes are given
        case "Split" if "num_outputs" in node.attributes:
            size = (
                node.inputs[0].shape[_axis(node)]
                if node.inputs[0] is not None and node.inputs[0].shape is not None
                else None
            )
            count = node.attributes["num_outputs"].as_int()
            if isinstance(size, int):
                part = -(-size // count)
                sizes = [part] * (count - 1) + [size - part * (count - 1)]
                made = _constant(graph, node, ir.tensor(sizes, dtype=ir.DataType.INT64))
                node.resize_inputs(2)
                node.replace_input_with(1, made)
                del node.attributes["num_outputs"]
        case _:
            pass


def _constant_axes(node: ir.Node) -> list[int] | None:
    """The axes of a reduction that takes them as a constant input."""
    if node.op_type not in _REDUCTIONS or len(node.inputs) < 2 or node.inputs[1] is None:
        return None
    axes = ir.convenience.get_const_tensor(node.inputs[1])
    return None if axes is None else [int(a) for a in axes.numpy().reshape(-1)]


def _name_axes(node: ir.Node) -> None:
    axes = _constant_axes(node)
    if axes is not None:
        node.attributes["axes"] = ir.AttrInt64s("axes", axes)
        node.resize_inputs(1)


def _never_empty(value: ir.Value, may_be_empty: Collection[str]) -> bool:
    """Whether no size of ``value`` can be 0, which older opsets read as "copy the size of the input"."""
    if value.shape is None:
        return False
    return all(size > 0 if isinstance(size, int) else str(size.value) not in may_be_empty for size in value.shape)


def _slice_shape(graph: ir.Graph, node: ir.Node) -> None:
    """The whole shape, and the part of it that was asked for."""
    last = (1 << 63) - 1
    start = node.attributes["start"].as_int() if "start" in node.attributes else 0
    end = node.attributes["end"].as_int() if "end" in node.attributes else last
    whole = ir.node("Shape", [node.inputs[0]])
    bounds = [_constant(graph, node, ir.tensor([bound], dtype=ir.DataType.INT64)) for bound in (start, end)]
    part = ir.node("Slice", [whole.outputs[0], *bounds])
    whole.outputs[0].dtype = ir.DataType.INT64
    if node.outputs[0].dtype is None:
        node.outputs[0].dtype = ir.DataType.INT64
    _put(graph, node, [whole, part], part.outputs[0])


def _axis(node: ir.Node) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else 0


def _constant(graph: ir.Graph, before: ir.Node, value: ir.TensorProtocol) -> ir.Value:
    made = ir.node("Constant", [], {"value": value})
    made.outputs[0].dtype = value.dtype
    made.outputs[0].shape = ir.Shape([int(str(size)) for size in value.shape])
    made.metadata_props.update(before.metadata_props)
    graph.insert_before(before, made)
    return made.outputs[0]


def _put(graph: ir.Graph, old: ir.Node, new: Sequence[ir.Node], value: ir.Value) -> None:
    """``new`` in the place of ``old``, whose first output ``value`` becomes."""
    output = old.outputs[0]
    if output.dtype is not None:
        value.dtype = output.dtype
    value.shape = output.shape
    for made in new:
        made.metadata_props.update(old.metadata_props)
    graph.insert_before(old, new)
    name = output.name
    ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    value.name = name


def _last_axes(node: ir.Node) -> int | None:
    """The first normalized axis of a LayerNormalization, counted from the end; None where that is unknown."""
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    x = node.inputs[0]
    if axis < 0:
        return axis
    return axis - len(x.shape) if x is not None and x.shape is not None else None


def _define_gelu(graph: ir.Graph, node: ir.Node) -> None:
    """The product of x / 2 and 1 + erf(x / sqrt(2)), or by tanh: the op's definition, which runtimes fuse again."""
    x = node.inputs[0]

    def number(value: float) -> ir.Value:
        return _constant(graph, node, ir.tensor(value, dtype=x.dtype if x is not None else ir.DataType.FLOAT))

    nodes: list[ir.Node] = []

    def put(op: str, *inputs: ir.Value | None) -> ir.Value:
        nodes.append(ir.node(op, list(inputs)))
        made = nodes[-1].outputs[0]
        if node.outputs[0].dtype is not None:
            made.dtype = node.outputs[0].dtype
        made.shape = node.outputs[0].shape
        return made

    if "approximate" in node.attributes and node.attributes["approximate"].as_string() == "tanh":
        cube = put("Mul", put("Mul", put("Mul", x, x), x), number(0.044715))
        inner = put("Tanh", put("Mul", put("Add", x, cube), number(math.sqrt(2 / math.pi))))
    else:
        inner = put("Erf", put("Div", x, number(math.sqrt(2))))
    _put(graph, node, nodes, put("Mul", put("Mul", x, put("Add", inner, number(1.0))), number(0.5)))


def _is_plain_layer_norm(node: ir.Node) -> bool:
    """A LayerNormalization that its definition can replace: only its first output is read."""
    if node.op_type != "LayerNormalization" or _last_axes(node) is None:
        return False
    return not any(output.uses() or output.is_graph_output() for output in node.outputs[1:])


def _define_layer_norm(graph: ir.Graph, node: ir.Node) -> None:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, as the op defines itself, spelled as below opset 17."""
    x, scale = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    axes = list(range(_last_axes(node) or -1, 0))
    attributes = {"axes": axes, "keepdims": 1}
    epsilon = _constant(graph, node, ir.tensor(node.attributes["epsilon"].as_float(), dtype=ir.DataType.FLOAT))
    mean = ir.node("ReduceMean", [x], attributes)
    centered = ir.node("Sub", [x, mean.outputs[0]])
    square = ir.node("Mul", [centered.outputs[0], centered.outputs[0]])
    variance = ir.node("ReduceMean", [square.outputs[0]], attributes)
    shifted = ir.node("Add", [variance.outputs[0], epsilon])
    deviation = ir.node("Sqrt", [shifted.outputs[0]])
    normal = ir.node("Div", [centered.outputs[0], deviation.outputs[0]])
    nodes = [mean, centered, square, variance, shifted, deviation, normal]
    nodes.append(ir.node("Mul", [normal.outputs[0], scale]))
    if bias is not None:
        nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias]))
    _put(graph, node, nodes, nodes[-1].outputs[0])


def _define_rms_norm(graph: ir.Graph, node: ir.Node) -> None:
    """As the op defines itself: x / sqrt(mean(x^2) + epsilon) * scale, which ONNX Runtime makes one op of again."""
    x, scale = node.inputs
    axes = list(range(node.attributes["axis"].as_int(), 0))
    epsilon = _constant(graph, node, ir.tensor(node.attributes["epsilon"].as_float(), dtype=ir.DataType.FLOAT))
    two = _constant(graph, node, ir.tensor(2.0, dtype=ir.DataType.FLOAT))
    square = ir.node("Pow", [x, two])
    over = _constant(graph, node, ir.tensor(axes, dtype=ir.DataType.INT64))
    mean = ir.node("ReduceMean", [square.outputs[0], over], {"keepdims": 1})
    shifted = ir.node("Add", [mean.outputs[0], epsilon])
    root = ir.node("Sqrt", [shifted.outputs[0]])
    normal = ir.node("Div", [x, root.outputs[0]])
    scaled = ir.node("Mul", [normal.outputs[0], scale])
    _put(graph, node, [square, mean, shifted, root, normal, scaled], scaled.outputs[0])


def _fits(node: ir.Node, opset: int) -> bool:
    """Whether the op exists in this opset with the inputs, attributes and types that the node has."""
    if node.domain not in ("", "ai.onnx"):
        return True
    if (opset < _LAYER_NORM and _is_plain_layer_norm(node)) or (opset < _GELU and node.op_type == "Gelu"):
        return True
    if opset < RMS_NORM and node.op_type == "RMSNormalization":
        return True
    try:
        schema = defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        return False
    inputs = len(node.inputs) - (opset < _AXES_AS_INPUT and _constant_axes(node) is not None)
    if schema.deprecated or inputs > schema.max_input or len(node.outputs) > schema.max_output:
        return False
    for name, attribute in node.attributes.items():
        if name not in schema.attributes and not _is_default(node.op_type, name, attribute):
            return False
    quantizes = node.op_type in ("QuantizeLinear", "DequantizeLinear")
    return all(_TYPES_SINCE.get(kind, 0) <= opset or (kind in _ELSEWHERE and not quantizes) for kind in _types([node]))


def _is_default(op_type: str, name: str, attribute: ir.Attr) -> bool:
    """Whether an attribute that older opsets lack has the value that stands for the older meaning."""
    if name in ("allowzero", "block_size", "noop_with_empty_axes", "layout", "antialias"):
        return attribute.as_int() == 0
    if name == "keep_aspect_ratio_policy":
        return attribute.as_string() == "stretch"
    if name == "reduction" and op_type in ("ScatterND", "ScatterElements"):
        return attribute.as_string() == "none"
    return (op_type, name) in (("QuantizeLinear", "saturate"), ("Cast", "saturate"), ("QuantizeLinear", "output_dtype"))


def _trim(node: ir.Node, opset: int) -> None:
    """Attributes that this opset lacks are gone; ``_fits`` has seen that they stand for its only meaning."""
    schema = defs.get_schema(node.op_type, opset, "") if node.domain in ("", "ai.onnx") else None
    if schema is not None:
        for name in [n for n in node.attributes if n not in schema.attributes]:
            del node.attributes[name]
