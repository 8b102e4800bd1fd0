"""A QDQ model taken apart at its activations' codes, so that a consumer computes each op from the same inputs."""

from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_OUT: Final = ".given"


@final
@dataclass(frozen=True)
class Part:
    """An activation's codes; the ops that give them, and the name of what quantizes; their scale."""

    tensor: str
    op: str
    name: str
    scale: float


def take_apart(model: onnx.ModelProto, most_axes: int = 5) -> tuple[onnx.ModelProto, list[Part]]:
    """The model whose every QuantizeLinear of something computed gives an output of the graph, ``<tensor>.given``, and
    whose readers read an input ``<tensor>.read`` in its place, both dequantized. Outputs of the model itself are gone.
    Tensors of more axes than ``most_axes``, which a consumer may not quantize by themselves, stay inside.

    Shapes are those that inference finds, all of them integers. Scales are initializers.
    """
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    graph = model.graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.input, *graph.output)}
    maker = {name: node for node in graph.node for name in node.output}
    inputs = {value.name for value in graph.input}
    nodes: list[Any] = []
    made = onnx.GraphProto()
    parts: list[Part] = []
    for node in graph.node:
        x = node.input[0] if node.input else ""
        sizes = [dim.dim_value for dim in shapes[x].shape.dim] if x in shapes else []
        if node.op_type != "QuantizeLinear" or x in inputs or x in held or len(sizes) > most_axes:
            nodes.append(node)
            continue
        (codes,), grid = node.output, list(node.input[1:])
        nodes += [
            helper.make_node("QuantizeLinear", [x, *grid], [f"{codes}.codes"], name=f"{node.name}.cut"),
            helper.make_node("DequantizeLinear", [f"{codes}.codes", *grid], [codes + _OUT], name=f"{codes}.out"),
            helper.make_node("QuantizeLinear", [f"{codes}.read", *grid], [codes], name=f"{codes}.in"),
        ]
        made.input.append(helper.make_tensor_value_info(f"{codes}.read", TensorProto.FLOAT, sizes))
        made.output.append(helper.make_tensor_value_info(codes + _OUT, TensorProto.FLOAT, sizes))
        scale = float(numpy_helper.to_array(held[grid[0]]).reshape(()))
        parts.append(Part(codes, _chain(maker, x), node.name, scale))
    made.input.extend(graph.input)
    made.initializer.extend(graph.initializer)
    made.node.extend(nodes)
    made.name = graph.name
    apart = helper.make_model(made, opset_imports=model.opset_import, ir_version=model.ir_version)
    return apart, parts


def _chain(maker: dict[str, Any], x: str) -> str:
    """The ops that compute ``x`` from dequantized tensors, such as ``Conv+Relu``."""
    kinds: list[str] = []
    while x in maker and maker[x].op_type not in ("DequantizeLinear", "QuantizeLinear"):
        kinds.append(maker[x].op_type)
        x = next(iter(maker[x].input), "")
    return "+".join(reversed(kinds)) or "Convert"


def activations(model: onnx.ModelProto, parts: list[Part], given: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """What each part's tensor holds, dequantized, where the model is computed as it is written: by ONNX Runtime on the
    CPU without optimizations.
    """
    import onnxruntime

    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    grids = {node.output[0]: list(node.input[1:]) for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for part in parts:
        name = part.tensor + _OUT
        whole.graph.node.append(helper.make_node("DequantizeLinear", [part.tensor, *grids[part.tensor]], [name]))
        whole.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [part.tensor + _OUT for part in parts]
    found: Any = session.run(names, {one.name: given[one.name] for one in session.get_inputs()})
    return dict(zip((part.tensor for part in parts), found, strict=True))


def feeds(parts: list[Part], held: dict[str, np.ndarray[Any, Any]], given: dict[str, Any]) -> dict[str, Any]:
    """The inputs of the model taken apart: those of the model, and what it computes."""
    return given | {f"{part.tensor}.read": held[part.tensor] for part in parts}


def on_grids(model: onnx.ModelProto, given: dict[str, Any]) -> dict[str, Any]:
    """The model's inputs as what quantizes them first reads them. A number in the middle between two codes is one of
    them for one consumer and the other for another, and a convolution of many such pixels is some steps off.
    """
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found = dict(given)
    for node in reversed(model.graph.node):
        if node.op_type == "QuantizeLinear" and node.input[0] in given:
            scale, zero_point = (held[name] for name in node.input[1:3])
            limits = np.iinfo(zero_point.dtype)
            codes = np.clip(np.rint(given[node.input[0]] / scale) + zero_point, limits.min, limits.max)
            found[node.input[0]] = ((codes - zero_point) * scale).astype(np.float32)
    return found


def steps(
    parts: list[Part], held: dict[str, np.ndarray[Any, Any]], found: dict[str, np.ndarray[Any, Any]]
) -> dict[Part, float]:
    """How far each part's result is from the model's own, at most, in steps of its grid."""
    return {
        part: float(np.abs(found[part.tensor + _OUT].astype(np.float64) - held[part.tensor]).max() / part.scale)
        for part in parts
    }
