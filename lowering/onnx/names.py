"""The names in an ONNX model: inputs and outputs under the source's, tensors under the layers', nodes under their
layers' and ops', each name used once.

ONNX gives every tensor of a graph one name of its own: an output that is also an input, a held tensor or another output
is read through an Identity.
"""

import ast
from collections import Counter
from typing import Any, Final

from torch import fx

from graphq.artifacts import manifest
from graphq.capture.source import Source, source_of
from graphq.errors import TargetError


def check_names(gm: fx.GraphModule) -> None:
    """Raises ``TargetError`` for names of inputs and outputs that ONNX cannot hold."""
    source = source_of(gm)
    if not all(source.outputs):
        raise TargetError("onnx: an output has no name; ONNX tells outputs by their names")
    for name in sorted({i.name for i in source.inputs} & set(source.outputs)):
        raise TargetError(f"onnx: {name} is the name of an input and of an output, ONNX has one tensor of a name")
    quantized = manifest.named_tensors(manifest.quantized_tensors(gm)).keys()
    for name in sorted(quantized & ({i.name for i in source.inputs} | set(source.outputs))):
        raise TargetError(f"onnx: {name} is the name of a quantized tensor and of an input or output")


def restore_names(model: Any, gm: fx.GraphModule) -> None:
    """Inputs and held tensors of a fresh export have their own names again, where they are outputs, too; other values
    have names that are free. ``onnx_form`` has seen to it that no held tensor has the name of an input or output.
    """
    source = source_of(gm)
    for value, declared in zip(model.graph.inputs, source.inputs, strict=True):
        value.name = declared.name
    returned = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    for value, node in zip(model.graph.outputs, returned, strict=True):
        if node.op == "get_attr":
            _rename(model, value, str(node.target))
    free_names(model)


def _rename(model: Any, value: Any, name: str) -> None:
    for key in [key for key, held in model.graph.initializers.items() if held is value]:
        del model.graph.initializers[key]
    value.name = name
    model.graph.initializers[name] = value


def _held(model: Any) -> set[str]:
    return {str(name) for name in model.graph.initializers}


def _free(name: str, taken: set[str]) -> str:
    number, free = 0, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def free_names(model: Any) -> None:
    """No value that is computed on the way has the name of an input, an output, a held tensor or of another."""
    import onnx_ir as ir

    outputs = {id(value) for value in model.graph.outputs}
    ends = [*model.graph.inputs, *model.graph.outputs]
    taken = {str(value.name) for value in ends} | _held(model)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for value in node.outputs:
            if id(value) not in outputs and value.name != "":
                value.name = _free(str(value.name or "value"), taken)
                taken.add(value.name)


def name_outputs(model: Any, source: Source) -> None:
    """Every output is a value of its own, under the source's name. The last change to a model before it is written."""
    import onnx_ir as ir

    graph = model.graph
    for name in source.outputs:  # of one that is a constant
        if name in graph.initializers:
            value = graph.initializers.pop(name)
            value.name = f"constants.{name}"
            graph.register_initializer(value)
    seen = {id(value) for value in (*graph.inputs, *graph.initializers.values())}
    for i, (value, name) in enumerate(zip(list(graph.outputs), source.outputs, strict=True)):
        if id(value) in seen:
            read = ir.node("Identity", [value])
            read.outputs[0].dtype, read.outputs[0].shape = value.dtype, value.shape
            graph.append(read)
            value = graph.outputs[i] = read.outputs[0]
        value.name = name
        seen.add(id(value))
    free_names(model)


_SCOPES: Final = "pkg.torch.onnx.name_scopes"


def layer_of(node: Any) -> str:
    """The path of the module that a node was exported from, empty where it is none's or not known."""
    scopes = node.metadata_props.get(_SCOPES)
    return str(ast.literal_eval(scopes)[-2]) if scopes and len(ast.literal_eval(scopes)) > 1 else ""


def name_nodes(model: Any) -> None:
    """Every node has a name of its own: its layer's, or that of the tensor it dequantizes, and its op's."""
    import onnx_ir as ir

    seen: Counter[str] = Counter()
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        path = layer_of(node)
        first = node.inputs[0] if node.inputs else None
        if node.op_type == "DequantizeLinear" and first is not None and first.name in model.graph.initializers:
            path = str(first.name)
        name = f"{path}/{node.op_type}" if path else node.op_type
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name] - 1}"
