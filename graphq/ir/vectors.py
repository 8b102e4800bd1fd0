"""What single ops do to vectors along the last axis: sum and scale them, move them, take a part of them."""

import operator
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from graphq.ir.effect_table import axes_of, effect
from graphq.ir.effects import (
    Adds,
    AddsProduct,
    Attends,
    Carried,
    Contracts,
    Convolves,
    Copies,
    Elementwise,
    Gathers,
    Homogeneous,
    Joins,
    LooksUp,
    MixesAxis,
    Moves,
    Normalizes,
    Observes,
    Opaque,
    Pads,
    Pools,
    Projects,
    ReadsShape,
    Reduces,
    Scales,
    Scatters,
    Stopped,
)
from graphq.ir.layers import layer_path, weight_param
from graphq.ir.views import Cast, Op, Param, Weighted, view
from graphq.state import tensor_of

aten = torch.ops.aten


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


def carried(op: Op, size: int) -> Carried[list[Op]] | Stopped:
    """The operands whose vectors the output's are sums or multiples of, whatever the basis.

    Vectors are ``size`` numbers of the last axis.
    """
    stopped = Stopped(f"{op_name(op)} reads the stream")
    if not isinstance(op.val, Tensor) or not op.val.is_floating_point() or op.val.dim() == 0:
        return stopped
    args: list[Any] = [view(a) if isinstance(a, fx.Node) else a for a in op.node.args]
    found = _sources(op, args)
    holds = found is not None and all(isinstance(part, Op) and _holds(part, size) for part in [*found, op])
    return Carried(cast(list[Op], found)) if holds else stopped


def _sources(op: Op, args: list[Any]) -> list[Any] | None:
    """The operands that an op carries where all of them hold vectors; None for ops that carry none."""
    x: Any = args[0] if args else None
    last = x.val.dim() - 1 if isinstance(x, Op) and isinstance(x.val, Tensor) else -1
    match effect(op):
        case ReadsShape(0.0):
            return []
        case Copies() | Homogeneous(linear=True) | Normalizes(over="row"):
            return [x]
        case Moves(how):
            return [x] if isinstance(x, Op) and _keeps_last_axis(op, x, how) else None
        case Reduces("linear"):
            return [x] if last not in axes_of(op) else None
        case Gathers("slices"):
            return [x] if last not in indexed_axes(op) else None
        case Scatters("slices", str(name)):
            source = view(op.argument(name))
            return [x, source] if last not in indexed_axes(op) and width(source) == width(op) else None
        case Joins():
            tensors = [view(tensor) for tensor in op.argument("tensors")]
            return tensors if int(op.argument("dim")) % op.val.dim() != op.val.dim() - 1 else None
        case Adds():
            return args if all(isinstance(a, Op) and width(a) == width(op) for a in args) else None
        case Scales(divides):
            vectors = [a for a in args if not _is_row_scalar(a)]
            return vectors if len(vectors) == 1 and (vectors[0] is x or not divides) else None
        case Attends():
            return [view(op.argument("value"))]
        case Contracts():
            return [args[1]] if args[1].val.dim() > 1 else None
        case (
            Homogeneous() | Reduces() | Gathers() | Scatters() | Normalizes() | ReadsShape() | Elementwise() | Pads()
        ) | (MixesAxis() | Pools() | AddsProduct() | Projects() | Convolves() | LooksUp() | Observes() | Opaque()):
            return None


def _keeps_last_axis(op: Op, x: Op, how: str) -> bool:
    """Whether what is moved are parts of the last axis, of any size that divides it before and after."""
    match how:
        case "reshape":
            return True
        case "permute":
            sizes = range(2, 2 + x.val.dim())  # all different
            made = cast(Any, op.node.target)(torch.empty(*sizes, device="meta"), *op.node.args[1:], **op.node.kwargs)
            return made.shape[-1] == sizes[-1]
        case "pick":
            return x.val.dim() - 1 not in axes_of(op)
        case "repeat":
            return width(x) == width(op)
        case _:
            return False


def indexed_axes(op: Op) -> tuple[int, ...]:
    """The axes of the first argument that an op picks, or writes, along by indices, counted from 0."""
    rank = view(op.node.all_input_nodes[0]).val.dim()
    if op.node.target not in (aten.index.Tensor, aten.index_put.default):
        return (int(op.argument("dim")) % rank,)
    found: list[int] = []
    axis = 0
    for index in cast(list[fx.Node | None], op.argument("indices")):
        val: Tensor | None = None if index is None else index.meta["val"]
        is_mask = val is not None and val.dtype in (torch.bool, torch.uint8)
        covered = range(axis, axis + (val.dim() if val is not None and is_mask else 1))
        found += [] if val is None else covered
        axis = covered.stop
    return tuple(found)


def moved(op: Op, size: int) -> Op | None:
    """What ``op`` gives other places of, or fewer or more of, vectors as they are; None for other ops."""
    match effect(op), carried(op, size):
        case ((Copies() | Moves() | Gathers()), Carried([source, *_])):
            return source
        case _:
            return None


def _positive(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim


def width(op: Op) -> int | None:
    """The size of the last axis; None where it is not known, or there is none."""
    size = op.val.shape[-1] if isinstance(op.val, Tensor) and op.val.dim() else None
    return size if isinstance(size, int) else None


def is_layer_norm(op: Op) -> bool:
    """Whether ``op`` takes the mean of each row off, and divides by the deviation."""
    found = effect(op)
    return isinstance(found, Normalizes) and found.over == "row" and found.centres


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
    return op.node.target == aten.mean.dim and axes_of(op) == (view(op.node.all_input_nodes[0]).val.dim() - 1,)


def is_normalized(x: Op) -> bool:
    """Whether ``x`` is vectors times a number for each, which comes from the mean of their squares."""
    while isinstance(effect(x), Copies):
        x = view(x.node.all_input_nodes[0])
    if not isinstance(effect(x), Scales):
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
        if effect(view(node)) != Moves("split"):
            return None
        whole, dim = view(cast(fx.Node, node.args[0])), view(node).argument("dim")
        pieces = cast(Sequence[Tensor], node.meta["val"])
        if pieces[0].dim() != whole.val.dim():  # an unbind
            return None
        sizes = [piece.shape[-1] for piece in pieces]
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
