"""ONNX files for lint: what they call written out, the shapes that follow, and what no consumer could read refused.

ONNX: the IR specification (graphs in topological order, names made once, functions).
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from graphq.errors import TargetError

_BLOCKED: Final = 21  # the opset of quantizers with blocks
_HIGHEST: Final = 2**31 - 1  # what onnx's schemas are asked for


def load(path: Path, checked: bool = True) -> Any:
    """The ``ModelProto`` of a file, its weights left where they are.

    Raises ``TargetError`` for what is no ONNX file or, if it is ``checked``, for one that nothing could read.
    """
    import onnx

    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError:
        raise
    except Exception as error:  # protobuf's own, which is not ours to import
        raise TargetError(f"{path}: is no ONNX model") from error
    if not model.HasField("graph"):
        raise TargetError(f"{path}: is no ONNX model: it has no graph")
    if any(isinstance(name, bytes) for name in _names(model.graph)):  # protobuf's way with what it cannot decode
        raise TargetError(f"{path}: is no ONNX model: a name in it is not UTF-8")
    if model.functions:
        model = _written_out(model, path)
    for problem in _broken(model) if checked else ():
        raise TargetError(f"{path}: {problem}")
    return _with_shapes(model)


def _with_shapes(model: Any) -> Any:
    """The model with the shapes that follow from its inputs'; what cannot be inferred stays unknown."""
    import onnx

    with suppress(onnx.shape_inference.InferenceError, ValueError):  # ValueError: beyond 2 GiB
        return onnx.shape_inference.infer_shapes(model)
    return model


def _written_out(model: Any, path: Path) -> Any:
    """The model with its functions inline, those of another opset converted where ONNX can do that."""
    import onnx
    import onnx.inliner

    try:
        with suppress(RuntimeError):  # of a version that cannot be converted, or types that are unknown
            return onnx.inliner.inline_local_functions(_with_shapes(model), convert_version=True)
        return onnx.inliner.inline_local_functions(model)
    except (onnx.checker.ValidationError, RuntimeError) as error:
        raise TargetError(f"{path}: its functions cannot be written out: {error}") from error


def default_opset(model: Any) -> int:
    """The opset of ONNX's own ops; 0 where the file names none."""
    return next((i.version for i in model.opset_import if i.domain in ("", "ai.onnx")), 0)


def _names(graph: Any) -> Iterator[str | bytes]:
    yield from (one.name for one in (*graph.input, *graph.output, *graph.initializer, *graph.value_info))
    for node in graph.node:
        yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
        yield from (attribute.name for attribute in node.attribute)


def captured(node: Any) -> Iterator[str]:
    """The names that the graphs in a node's attributes read of the graph around them."""
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            made = {one.name for one in (*graph.input, *graph.initializer)}
            made.update(output for inner in graph.node for output in inner.output)
            read = [name for inner in graph.node for name in (*inner.input, *captured(inner))]
            read += [one.name for one in graph.output]
            yield from dict.fromkeys(name for name in read if name and name not in made)


def _broken(model: Any) -> Iterator[str]:
    """A node with other operands or attributes than its op has; a tensor that nothing makes in time, or that two do."""
    graph, opset = model.graph, default_opset(model)
    if not 0 <= opset <= _HIGHEST:
        yield f"{opset} is no opset"
        return
    made = {one.name for one in (*graph.input, *graph.initializer)}
    made.update(one.values.name for one in graph.sparse_initializer)
    for node in graph.node:
        name = node.name or next(filter(None, node.output), node.op_type)
        yield from (f"{name}: {problem}" for problem in _misspelled(node, opset))
        for read in filter(None, (*node.input, *captured(node))):
            if read not in made:
                yield f"{name}: nothing in front of it makes {read}"
        for output in filter(None, node.output):
            if output in made:
                yield f"{name}: {output} is made twice"
            made.add(output)
    for output in graph.output:
        if output.name not in made:
            yield f"nothing makes the output {output.name}"


def _misspelled(node: Any, opset: int) -> Iterator[str]:
    """What of a node contradicts the schema of its op, where that is one of ONNX's own."""
    import onnx

    if node.domain == "com.microsoft" and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        opset = _BLOCKED  # whose operands ONNX Runtime's own have
    elif node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type, opset):
        return
    schema = onnx.defs.get_schema(node.op_type, opset)
    for word, held, least, most in (
        ("inputs", node.input, schema.min_input, schema.max_input),
        ("outputs", node.output, schema.min_output, schema.max_output),
    ):
        if not least <= len(held) <= most:
            yield f"{node.op_type} has {least}{f' to {most}' if most > least else ''} {word}, this one {len(held)}"
        elif word == "inputs" and not all(held[:least]):
            yield f"{node.op_type} needs the first {least} of its inputs"
    for attribute in node.attribute:
        known: Any = schema.attributes.get(attribute.name)
        if known is not None and attribute.type != int(known.type.value) and not attribute.ref_attr_name:
            yield f"its {attribute.name} is {onnx.AttributeProto.AttributeType.Name(attribute.type)}"
