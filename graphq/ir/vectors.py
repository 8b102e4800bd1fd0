"""What single ops do to vectors along the last axis: sum and scale them, move them, take a part of them."""

import operator
from collections.abc import Iterator, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from graphq.ir.layers import layer_path, weight_param
from graphq.ir.views import Cast, Op, Param, Weighted, view
from graphq.state import tensor_of

aten = torch.ops.aten
COPIES: Final = (
    *(aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default),
    *(aten.lift_fresh_copy.default, aten._to_copy.default, aten.to.dtype),
)
DROPOUTS: Final = (aten.dropout.default, aten.feature_dropout.default)
RESHAPES: Final = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default),
    *(aten.flatten.using_ints, aten.unflatten.int),
)
_ALONG: Final = (aten.select.int, aten.slice.Tensor, aten.index_select.default)  # (x, dim, ...)
_PLACES: Final = (aten.unsqueeze.default, aten.transpose.int, aten.permute.default, aten.expand.default)
_REDUCTIONS: Final = (aten.sum.dim_IntList, aten.mean.dim)
SUMS: Final = (aten.add.Tensor, aten.sub.Tensor)
_SCALINGS: Final = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
PRODUCTS: Final = (aten.matmul.default, aten.bmm.default, aten.mm.default)
_ZEROS: Final = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
SHAPE_ONLY: Final = (
    *(aten.sym_size.int, aten.zeros_like.default, aten.new_zeros.default, aten.empty_like.default),
    *(aten.new_empty.default, aten.ones_like.default, aten.new_ones.default),
)
SPLITS: Final = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
ATTENTION: Final = aten.scaled_dot_product_attention.default
LAYER_NORM: Final = aten.layer_norm.default
NORMS: Final = (LAYER_NORM, aten.rms_norm.default)


def place(op: Op) -> str:
    """Where an op stands, for people: its layer or module, or else its own name."""
    if isinstance(op, Param):
        return op.fqn
    if isinstance(op, Weighted) and (param := weight_param(op)) is not None:
        return layer_path(param.fqn)
    stack = op.node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path or op.node.name


def constant(gm: fx.GraphModule, op: Op) -> Tensor | None:
    """What a parameter, or a sum or product of one and a number (Gemma's ``1 + weight``), holds; None for the rest."""
    if isinstance(op, Param):
        return tensor_of(gm, op.fqn).detach()
    if isinstance(op, Cast) and op.dtype is not None:
        found = constant(gm, op.self_)
        return None if found is None else found.to(op.dtype)
    if op.node.target in (aten.add.Tensor, aten.mul.Tensor) and not op.node.kwargs:
        x, number = op.node.args
        found = constant(gm, view(x)) if isinstance(x, fx.Node) and isinstance(number, int | float) else None
        return None if found is None else cast(Any, op.node.target)(found, number)
    return None


def carried(op: Op, size: int) -> list[Op] | None:
    """The inputs whose vectors the output's are sums or multiples of, whatever the basis; None for other ops.

    Vectors are ``size`` numbers of the last axis.
    """
    args: list[Any] = [view(a) if isinstance(a, fx.Node) else a for a in op.node.args]
    target = op.node.target
    if not isinstance(op.val, Tensor) or not op.val.is_floating_point() or op.val.dim() == 0:
        return None
    if target in _ZEROS:
        return []
    x = args[0] if args else None
    rank, last = (x.val.dim(), x.val.dim() - 1) if isinstance(x, Op) and isinstance(x.val, Tensor) else (0, -1)
    found: list[Any] | None = None
    if target in (*COPIES, *RESHAPES, *NORMS, aten.neg.default) or (target in DROPOUTS and args[2] is False):
        found = [x]
    elif target in _ALONG:
        found = [x] if _positive(op.argument("dim"), rank) != last else None
    elif target in _REDUCTIONS:
        dims = op.argument("dim")
        found = [x] if dims and all(_positive(d, rank) != last for d in dims) else None
    elif target == aten.unsqueeze.default:
        found = [x] if _positive(args[1], rank + 1) != rank else None
    elif target == aten.transpose.int:
        found = [x] if last not in (_positive(args[1], rank), _positive(args[2], rank)) else None
    elif target == aten.permute.default:
        found = [x] if _positive(args[1][-1], rank) == last else None
    elif target == aten.expand.default:
        found = [x] if isinstance(x, Op) and width(x) == width(op) else None
    elif target == aten.index.Tensor:
        found = [x] if len(args[1]) < rank or args[1][last] is None else None
    elif target == aten.cat.default:
        parts = [view(part) for part in args[0]]
        found = parts if _positive(op.argument("dim"), op.val.dim()) != op.val.dim() - 1 else None
    elif target in (aten.index_add.default, aten.index_put.default):
        found = _scattered(op, args, last)
    elif target in SUMS:
        found = args if all(isinstance(a, Op) and width(a) == width(op) for a in args) else None
    elif target in _SCALINGS:
        vectors = [a for a in args if not _is_row_scalar(a)]
        found = vectors if len(vectors) == 1 and (vectors[0] is x or "mul" in str(target)) else None
    elif target == ATTENTION:
        found = [view(op.argument("value"))]
    elif target in PRODUCTS:
        found = [args[1]] if args[1].val.dim() > 1 else None
    if found is None or not all(_holds(part, size) for part in [*found, op]):
        return None
    return found


def moved(op: Op, size: int) -> Op | None:
    """What ``op`` gives other places of, or fewer or more of, vectors as they are; None for other ops."""
    if op.node.target not in (*COPIES, *RESHAPES, *_ALONG, *_PLACES, *DROPOUTS, aten.index.Tensor):
        return None
    sources = carried(op, size)
    return None if sources is None else sources[0]


def _scattered(op: Op, args: Sequence[Any], last: int) -> list[Any] | None:
    """The rows that are written to and those that are written, of an op that leaves the last axis whole."""
    if op.node.target == aten.index_add.default:
        return [args[0], args[3]] if _positive(args[1], last + 1) != last else None
    return [args[0], args[2]] if len(args[1]) <= last and width(args[2]) == width(op) else None


def _positive(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def width(op: Op) -> int | None:
    """The size of the last axis; None where it is not known, or there is none."""
    size = op.val.shape[-1] if isinstance(op.val, Tensor) and op.val.dim() else None
    return size if isinstance(size, int) else None


def _holds(op: Op, size: int) -> bool:
    last = width(op)
    return last is not None and last % size == 0 and op.val.is_floating_point()


def _is_row_scalar(value: Any) -> bool:
    """Whether this is one number for all of the last axis."""
    if isinstance(value, Op):
        return isinstance(value.val, Tensor) and (value.val.dim() == 0 or width(value) == 1)
    return True


def gain_of(gm: fx.GraphModule, op: Op) -> tuple[Op, Op, Tensor] | None:
    """The vectors, the constant op and what it holds, of a product of vectors and a constant one."""
    if op.node.target == aten.mul.Tensor and all(isinstance(a, fx.Node) for a in op.node.args):
        left, right = (view(cast(fx.Node, a)) for a in op.node.args)
        for x, factor in ((left, right), (right, left)):
            held = constant(gm, factor)
            if held is not None and held.numel() == width(op) == held.shape[-1] and width(x) == width(op):
                return x, factor, held
    return None


def is_square(op: Op, x: Op) -> bool:
    """Whether ``op`` squares ``x`` entry by entry."""
    return (op.node.target == aten.pow.Tensor_Scalar and op.node.args == (x.node, 2)) or (
        op.node.target == aten.mul.Tensor and op.node.args == (x.node, x.node)
    )


def is_mean_of_rows(op: Op) -> bool:
    """Whether ``op`` takes the mean along the last axis alone."""
    if op.node.target != aten.mean.dim:
        return False
    return [_positive(d, view(op.node.all_input_nodes[0]).val.dim()) for d in op.argument("dim")] == [
        view(op.node.all_input_nodes[0]).val.dim() - 1
    ]


def is_normalized(x: Op) -> bool:
    """Whether ``x`` is vectors times a number for each, which comes from the mean of their squares."""
    while x.node.target in COPIES:
        x = view(x.node.all_input_nodes[0])
    if x.node.target not in _SCALINGS:
        return False
    for factor in (view(node) for node in x.node.all_input_nodes if width(view(node)) == 1):
        while not is_mean_of_rows(factor) and len(factor.node.all_input_nodes) == 1:
            factor = view(factor.node.all_input_nodes[0])
        if is_mean_of_rows(factor):
            square = view(factor.node.all_input_nodes[0])
            return any(is_square(square, view(node)) for node in square.node.all_input_nodes)
    return False


def cut_of(op: Op) -> tuple[Op, int, int] | None:
    """What ``op`` is a part of the last axis of, from where on, and how much; None for other ops."""
    if op.node.target == operator.getitem:
        node, index = cast(tuple[fx.Node, int], op.node.args)
        if node.target not in SPLITS:
            return None
        whole, dim = view(cast(fx.Node, node.args[0])), view(node).argument("dim")
        sizes = [piece.shape[-1] for piece in cast(Sequence[Tensor], node.meta["val"])]
    elif op.node.target == aten.slice.Tensor:
        whole, dim, index = view(cast(fx.Node, op.node.args[0])), op.argument("dim"), 1
        start = op.argument("start")
        if op.argument("step") != 1 or not isinstance(start, int):
            return None
        sizes = [_positive(start, width(whole) or 0), width(op)]
    else:
        return None
    if _positive(dim, whole.val.dim()) != whole.val.dim() - 1 or not all(isinstance(size, int) for size in sizes):
        return None
    return whole, sum(cast(list[int], sizes[:index])), cast(int, sizes[index])


def times_read(op: Op, x: Op) -> int:
    """How many of the arguments of ``op`` are ``x``."""
    count = 0

    def see(node: fx.Node) -> fx.Node:
        nonlocal count
        count += node == x.node
        return node

    map_arg((op.node.args, op.node.kwargs), see)
    return count


def params_of(op: Op) -> Iterator[Param]:
    """The parameters that ``op`` is computed from."""
    if isinstance(op, Param):
        yield op
    for node in op.node.all_input_nodes:
        yield from params_of(view(node))


def op_name(op: Op) -> str:
    """The op that the node calls, as it is printed."""
    return str(op.node.target).removesuffix(".default")
