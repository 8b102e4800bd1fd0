"""A graph as text, one line a node: dtype, shape, ``@fqn`` for parameters, and the plan of a layer as a comment."""

import operator
import re
from typing import Any, cast

import torch
from torch import Tensor, fx

from graphq.layers import LAYER, PLAN
from graphq.source import source_of
from graphq.views import Weighted, view

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


def dump(gm: fx.GraphModule) -> str:
    """The graph as text. Parameters stand as ``@fqn`` where they are used; numbers of nodes are their order."""
    names: dict[fx.Node, str] = {}
    dimensions = _dimension_names(gm)
    lines: list[str] = []
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            names[node] = f"@{node.target}"
            continue
        if node.op == "placeholder":
            names[node] = f"%{node.name}"
            lines.append(f"%{node.name}: {_type(node, dimensions)} = input")
        elif node.op == "output":
            lines.append(f"return {_argument(node.args[0], names)}")
        else:
            names[node] = f"%{len(lines)}"
            parts = [_argument(a, names) for a in node.args] + [f"{k}={_argument(v, names)}" for k, v in node.kwargs.items()]
            line = f"{names[node]}: {_type(node, dimensions)} = {_target(node)}({', '.join(parts)})"
            if isinstance(view(node), Weighted) and PLAN in node.meta:
                line += f"  # {node.meta[LAYER]}: {node.meta[PLAN]}"
            lines.append(line)
    return "\n".join(lines) + "\n"


def _target(node: fx.Node) -> str:
    if node.op == "call_module":
        return f"@{node.target}"
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return cast(Any, node.target).__name__ if node.target is not operator.getitem else "item"


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(v, names) for v in cast(list[Any], value))}]"
    if isinstance(value, torch.dtype):
        return _DTYPES.get(value, str(value))
    return repr(value) if isinstance(value, str) else str(value)


def _dimension_names(gm: fx.GraphModule) -> dict[str, str]:
    found: dict[str, str] = {}
    declared = source_of(gm).inputs
    for node, wanted in zip((n for n in gm.graph.nodes if n.op == "placeholder"), declared, strict=True):
        for size, name in zip(node.meta["val"].shape, wanted.shape, strict=True):
            if isinstance(name, str):
                found.setdefault(str(size), name)
    return found


def _type(node: fx.Node, dimensions: dict[str, str]) -> str:
    val = node.meta.get("val")
    if isinstance(val, Tensor):
        sizes = ", ".join(_size(size, dimensions) for size in val.shape)
        return f"{_DTYPES.get(val.dtype, str(val.dtype))}[{sizes}]"
    if isinstance(val, list | tuple):
        return f"({', '.join(_DTYPES.get(v.dtype, '?') for v in cast(list[Any], val))})"
    return "int" if isinstance(val, torch.SymInt | int) else type(val).__name__


def _size(size: Any, dimensions: dict[str, str]) -> str:
    text = str(size)
    for symbol, name in dimensions.items():
        if symbol.isidentifier():
            text = re.sub(rf"\b{symbol}\b", name, text)
    return text
