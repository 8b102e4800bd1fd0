"""A graph as text, one line a node: dtype, shape, ``@fqn`` for parameters, and the plan of a layer as a comment."""

import operator
import re
from collections.abc import Callable
from typing import Any, Final, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from graphq.capture.source import source_of
from graphq.ir.layers import LAYER, PLAN
from graphq.ir.views import Weighted, view

_DTYPES: Final = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e8m0fnu: "e8m0",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint16: "u16",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def dump(gm: fx.GraphModule) -> str:
    """The graph as text. Parameters stand as ``@fqn`` where they are used; numbers of nodes are their order."""
    names: dict[fx.Node, str] = {}
    size_text = _size_printer(gm)
    lines: list[str] = []
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            names[node] = f"@{node.target}"
        elif node.op == "placeholder":
            names[node] = f"%{node.name}"
            lines.append(f"%{node.name}: {_type(node.meta.get('val'), size_text)} = input")
        elif node.op == "output":
            lines.append(f"return {_argument(node.args[0], names)}")
        else:
            names[node] = f"%{len(lines)}"
            arguments = [_argument(a, names) for a in node.args]
            arguments += [f"{k}={_argument(v, names)}" for k, v in node.kwargs.items()]
            call = f"{_target(node)}({', '.join(arguments)})"
            line = f"{names[node]}: {_type(node.meta.get('val'), size_text)} = {call}"
            if isinstance(view(node), Weighted) and PLAN in node.meta:
                line += f"  # {node.meta[LAYER]}: {node.meta[PLAN]}"
            lines.append(line)
    return "\n".join(lines) + "\n"


def _target(node: fx.Node) -> str:
    if node.op == "call_module":
        return f"@{node.target}"
    if isinstance(node.target, OpOverload):
        return str(node.target).removesuffix(".default")
    return "item" if node.target is operator.getitem else str(getattr(node.target, "__name__", node.target))


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(v, names) for v in cast(list[Any], value))}]"
    if isinstance(value, torch.dtype):
        return _DTYPES.get(value, str(value))
    return repr(value) if isinstance(value, str) else str(value)


def _type(val: Any, size_text: Callable[[Any], str]) -> str:
    if isinstance(val, Tensor):
        return f"{_DTYPES.get(val.dtype, str(val.dtype))}[{', '.join(size_text(size) for size in val.shape)}]"
    if isinstance(val, list | tuple):  # the shapes stand where the items are taken
        parts = (_DTYPES.get(v.dtype, str(v.dtype)) if isinstance(v, Tensor) else "int" for v in cast(list[Any], val))
        return f"({', '.join(parts)})"
    return "int" if isinstance(val, torch.SymInt | int) else type(val).__name__


def _size_printer(gm: fx.GraphModule) -> Callable[[Any], str]:
    """Prints a size in the names that the inputs' dimensions have, in the place of export's symbols."""
    found: dict[str, str] = {}
    inputs = (node for node in gm.graph.nodes if node.op == "placeholder")
    for node, declared in zip(inputs, source_of(gm).inputs, strict=True):
        val = node.meta["val"]
        sizes = val.shape if isinstance(val, Tensor) else ()  # a part of a graph may take a number
        for size, name in zip(sizes, declared.shape, strict=True):
            if isinstance(name, str):
                found.setdefault(str(size), name)
    return lambda size: re.sub(r"[^\W\d]\w*", lambda symbol: found.get(symbol[0], symbol[0]), str(size))
