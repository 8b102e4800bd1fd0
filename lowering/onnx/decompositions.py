"""Graphs that torch's exporter translates op by op skip its decompositions, which trace a graph a second time.

That trace is the longest part of ``torch.onnx.export``: of a language model two thirds (torch 2.13). Most graphs come
out of it as they went in, but for other names of values: their ops have translations, and none works in place.
"""

import contextlib
from collections.abc import Container, Generator
from typing import Any, Final, cast

import torch
from torch import fx
from torch._ops import OpOverload

aten: Final = torch.ops.aten


@contextlib.contextmanager
def lean_decompositions() -> Generator[None]:
    """Inside, exports decompose only graphs with an op that ``spell_translated`` does not know."""
    from torch.onnx._internal.exporter import _decomp, _fx_passes

    passes, implemented = cast(Any, _fx_passes), cast(Any, _decomp).get_onnx_implemented_overloads
    decompose = passes.decompose_with_registry

    def decompose_if_needed(program: Any, registry: Any) -> Any:
        known = spell_translated(program.graph, set(implemented(registry)))
        return program if known else decompose(program, registry)

    passes.decompose_with_registry = decompose_if_needed
    try:
        yield
    finally:
        passes.decompose_with_registry = decompose


def spell_translated(graph: fx.Graph, translated: Container[object]) -> bool:
    """Whether ``graph`` now holds ops alone that are ``translated`` as they are, spelled as decompositions spell them:
    sizes of reshapes are numbers or the nodes that hold them. False: the graph is left as it was.
    """
    sizes: dict[object, fx.Node] = {}  # the first node that holds a symbolic size
    spelled: dict[fx.Node, tuple[OpOverload, tuple[Any, ...], dict[str, Any]]] = {}
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), torch.SymInt):
            sizes.setdefault(node.meta["val"].node.expr, node)
        if node.op != "call_function":
            continue
        match node.target:
            case aten.__and__.Tensor:
                spelled[node] = aten.bitwise_and.Tensor, node.args, {}
            case aten.adaptive_avg_pool2d.default if list(node.args[1]) == [1, 1]:
                spelled[node] = aten.mean.dim, (node.args[0], [-1, -2], True), {}
            case aten.reshape.default | aten.flatten.using_ints:
                made = node.meta["val"].shape
                given = node.args[1] if node.target is aten.reshape.default else [-1] * len(made)
                shape = [_spelled(size, seen, sizes) for size, seen in zip(given, made, strict=True)]
                if shape.count(-1) > 1:
                    return False
                spelled[node] = aten.reshape.default, (node.args[0], shape), {}
            case aten.to.dtype if node.args[1] != node.args[0].meta["val"].dtype:
                spelled[node] = aten._to_copy.default, node.args[:1], {"dtype": node.args[1]}
            case aten._assert_tensor_metadata.default:
                pass  # of a cast: what its operand is, which the exporter leaves out
            case target if target not in translated or _is_taken_apart(target):
                return False
            case _:
                pass
    for node, (target, args, kwargs) in spelled.items():
        node.target, node.args, node.kwargs = target, args, kwargs
    return True


def _spelled(given: int | fx.Node, size: int | torch.SymInt, sizes: dict[object, fx.Node]) -> int | fx.Node:
    """A size of a reshape, which is ``given`` or to be inferred, -1 where no node holds it."""
    if given != -1:
        return given
    if isinstance(size, int) or size.node.expr.is_number:
        return int(size)
    return sizes.get(size.node.expr, -1)


def _is_taken_apart(op: object) -> bool:
    """Whether ``run_decompositions`` decomposes ``op`` whatever its table says: a composite op that may alias."""
    from torch._export import utils

    is_composite = isinstance(op, OpOverload) and op._can_decompose()  # pyright: ignore[reportPrivateUsage]
    return is_composite and not cast(Any, utils)._is_preservable_cia_op(op)
