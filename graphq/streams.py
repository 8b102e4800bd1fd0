"""Streams: all values and parameters of a graph that one change of basis of their last axis must reach together.

A residual stream is one: what embeddings and linears write, residual adds sum, norms scale row by row, and linears
read. The values of an attention's heads are another. Followed along the edges alone, both ways, from any value in it.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast, final

import torch
from torch import Tensor, fx

from graphq.layers import layer_path, weight_param
from graphq.state import tensor_of
from graphq.views import Cast, Embedding, GroupedLinear, Input, Linear, Op, Param, TransposedLinear, Weighted, ops_of, view

aten = torch.ops.aten
_COPIES: Final = (
    *(aten.alias.default, aten.detach.default, aten.clone.default, aten.contiguous.default),
    *(aten.lift_fresh_copy.default, aten._to_copy.default, aten.to.dtype),
)
_DROPOUTS: Final = (aten.dropout.default, aten.feature_dropout.default)
_RESHAPES: Final = (
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default),
    *(aten.flatten.using_ints, aten.unflatten.int),
)
_ALONG: Final = (aten.select.int, aten.slice.Tensor, aten.index_select.default)  # (x, dim, ...)
_PLACES: Final = (aten.unsqueeze.default, aten.transpose.int, aten.permute.default, aten.expand.default)
_REDUCTIONS: Final = (aten.sum.dim_IntList, aten.mean.dim)
_SUMS: Final = (aten.add.Tensor, aten.sub.Tensor)
_SCALINGS: Final = (aten.mul.Tensor, aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar)
PRODUCTS: Final = (aten.matmul.default, aten.bmm.default, aten.mm.default)
_ZEROS: Final = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
SHAPE_ONLY: Final = (
    *(aten.sym_size.int, aten.zeros_like.default, aten.new_zeros.default, aten.empty_like.default),
    *(aten.new_empty.default, aten.ones_like.default, aten.new_ones.default),
)
_SPLITS: Final = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
ATTENTION: Final = aten.scaled_dot_product_attention.default
LAYER_NORM: Final = aten.layer_norm.default
NORMS: Final = (LAYER_NORM, aten.rms_norm.default)
Part = tuple[int, int, int]  # (period, offset, length)


@final
@dataclass(frozen=True)
class Axis:
    """An axis of a parameter that carries a stream; of each ``period`` numbers along it only some, if ``part`` is set.

    ``writes``: whether the stream comes from the parameter, and is not read by it.
    """

    fqn: str
    axis: int
    writes: bool
    part: Part | None = None


@final
@dataclass(frozen=True)
class Stream:
    """A closed stream of vectors of ``size`` numbers. ``blocks``: the reasons why no change of basis leaves it alone."""

    size: int
    members: tuple[Op, ...]  # in graph order
    axes: tuple[Axis, ...]
    writers: tuple[Weighted, ...]
    readers: tuple[Weighted, ...]
    norms: tuple[Op, ...]  # layer norms, which no rotation leaves alone
    joins: tuple[Op, ...]  # sums of two computed values: residual adds
    inputs: tuple[Input, ...]
    outputs: tuple[Op, ...]
    blocks: tuple[str, ...]


def trace(gm: fx.GraphModule, seed: Op, size: int) -> Stream:
    """The stream that ``seed`` is in; every last axis in it is a multiple of ``size``."""
    walk = _Walk(gm, size)
    walk.join(seed)
    walk.close()
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    members = sorted(walk.members, key=lambda op: order[op.node])
    axes = dict.fromkeys(axis for uses in walk.uses.values() for found in uses.values() for axis in found)
    return Stream(
        size,
        tuple(members),
        tuple(axes),
        tuple(walk.writers),
        tuple(walk.readers),
        *(tuple(op for op in members if op in chosen) for chosen in (walk.norms, walk.joins)),
        tuple(walk.inputs),
        tuple(walk.outputs),
        tuple(walk.blocks),
    )


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
    match op:
        case Param():
            return tensor_of(gm, op.fqn).detach()
        case Cast(inner, torch.dtype() as dtype):
            found = constant(gm, inner)
            return None if found is None else found.to(dtype)
        case Op(node=fx.Node(target=aten.add.Tensor | aten.mul.Tensor as target, args=(fx.Node() as x, number))):
            found = constant(gm, view(x))
            if found is not None and isinstance(number, int | float) and not op.node.kwargs:
                return cast(Any, target)(found, number)
    return None


def carried(op: Op, size: int) -> list[Op] | None:
    """The inputs whose vectors the output's are sums or multiples of, whatever the basis; None for other ops.

    Vectors are ``size`` numbers of the last axis.
    """
    args = [view(a) if isinstance(a, fx.Node) else a for a in op.node.args]
    target = op.node.target
    if not isinstance(op.val, Tensor) or not op.val.is_floating_point() or op.val.dim() == 0:
        return None
    if target in _ZEROS:
        return []
    x = args[0] if args else None
    rank, last = (x.val.dim(), x.val.dim() - 1) if isinstance(x, Op) and isinstance(x.val, Tensor) else (0, -1)
    found: list[Any] | None = None
    if target in (*_COPIES, *_RESHAPES, *NORMS, aten.neg.default) or (target in _DROPOUTS and args[2] is False):
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
        found = [x] if width(x) == width(op) else None
    elif target == aten.index.Tensor:
        found = [x] if len(args[1]) < rank or args[1][last] is None else None
    elif target == aten.cat.default:
        parts = [view(part) for part in args[0]]
        found = parts if _positive(op.argument("dim"), op.val.dim()) != op.val.dim() - 1 else None
    elif target in (aten.index_add.default, aten.index_put.default):
        found = _scattered(op, args, last)
    elif target in _SUMS:
        found = args if all(isinstance(a, Op) and width(a) == width(op) for a in args) else None
    elif target in _SCALINGS:
        vectors = [a for a in args if not _is_row_scalar(a)]
        found = vectors if len(vectors) == 1 and (vectors[0] is x or "mul" in str(target)) else None
    elif target == ATTENTION:
        found = [view(op.argument("value"))]
    elif target in PRODUCTS:
        found = [args[1]]
    if found is None or not all(_holds(part, size) for part in [*found, op]):
        return None
    return found


def moved(op: Op, size: int) -> Op | None:
    """What ``op`` gives other places of, or fewer or more of, vectors as they are; None for other ops."""
    if op.node.target not in (*_COPIES, *_RESHAPES, *_ALONG, *_PLACES, *_DROPOUTS, aten.index.Tensor):
        return None
    sources = carried(op, size)
    return None if sources is None else sources[0]


def residual_streams(gm: fx.GraphModule) -> list[Stream]:
    """The streams that linears read, and in which computed values are summed."""
    found: list[Stream] = []
    seen = set[Op]()
    for op in ops_of(gm):
        if isinstance(op, Linear | TransposedLinear | GroupedLinear) and op.input_op not in seen:
            size = width(op.input_op)
            if size is not None and size > 1:
                stream = trace(gm, op.input_op, size)
                seen.update(stream.members)
                found += [stream] if stream.joins else []
    return found


def value_streams(gm: fx.GraphModule) -> list[Stream]:
    """The streams of the values of attentions: those that a product with a softmax, or a fused one, sums."""
    found: list[Stream] = []
    seen = set[Op]()
    for op in ops_of(gm):
        if op.node.target == ATTENTION or (op.node.target in PRODUCTS and _is_of_softmax(op)):
            size = width(op)
            if op not in seen and size is not None and size > 1:
                found.append(trace(gm, op, size))
                seen.update(found[-1].members)
    return found


def _is_of_softmax(op: Op) -> bool:
    seen = view(cast(fx.Node, op.node.args[0]))
    while seen.node.target in (*_COPIES, *_DROPOUTS, *_RESHAPES, aten.expand.default):
        seen = view(seen.node.all_input_nodes[0])
    return seen.node.target in (aten.softmax.int, aten._softmax.default)


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
    while x.node.target in _COPIES:
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


def reads_of(param: Op) -> list[tuple[Op, Op]]:
    """The ops that read a parameter, casts seen through, each with what it reads."""
    found: list[tuple[Op, Op]] = []
    for user in param.users:
        found += reads_of(user) if isinstance(user, Cast) else [(user, param)]
    return found


def tied_to(gm: fx.GraphModule, fqn: str) -> str | None:
    """Another name of the same numbers, if there is one."""
    own = _numbers(tensor_of(gm, fqn))
    state = gm.state_dict(keep_vars=True)
    return next((name for name, t in state.items() if name != fqn and t.numel() and _numbers(t) == own), None)


def _numbers(t: Tensor) -> tuple[Any, ...]:
    return t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), t.stride()


def shared(gm: fx.GraphModule, fqn: str, users: set[fx.Node]) -> str | None:
    """Why the parameter may not change for the sake of these users alone; None if it may."""
    for node in gm.graph.find_nodes(op="get_attr", target=fqn):
        for user, _ in reads_of(view(node)):
            if user.node not in users:
                return f"{fqn}: {place(user)} reads it, too"
    other = tied_to(gm, fqn)
    return None if other is None else f"{fqn}: it is tied to {other}"


@final
class _Walk:
    """What is found on the way; every op is met once as a value, and once for each value it reads."""

    def __init__(self, gm: fx.GraphModule, size: int) -> None:
        self.gm, self.size = gm, size
        self.members: dict[Op, None] = {}
        self.pending: list[Op] = []
        self.uses: dict[str, dict[fx.Node, dict[Axis, None]]] = {}
        self.writers: dict[Weighted, None] = {}
        self.readers: dict[Weighted, None] = {}
        self.norms, self.joins = set[Op](), set[Op]()
        self.inputs: list[Input] = []
        self.outputs: list[Op] = []
        self.blocks: dict[str, None] = {}

    def block(self, op: Op, why: str) -> None:
        self.blocks[f"{place(op)}: {why}"] = None

    def join(self, op: Op) -> None:
        if op not in self.members:
            self.members[op] = None
            self.pending.append(op)

    def close(self) -> None:
        while self.pending:
            op = self.pending.pop()
            self.produced(op)
            for user in op.users:
                self.read(op, user)
        for fqn, uses in self.uses.items():
            why = shared(self.gm, fqn, set(uses))
            if why is not None:
                self.blocks[why] = None
            elif len({frozenset(axes) for axes in uses.values()}) > 1:
                self.blocks[f"{fqn}: it is read in several ways"] = None

    def touch(self, user: Op, param: Op | None, axis: int, writes: bool, part: Part | None = None) -> None:
        """The parameter's axis carries the stream where ``user`` reads it."""
        if isinstance(param, Param):
            self.uses.setdefault(param.fqn, {}).setdefault(user.node, {})[Axis(param.fqn, axis, writes, part)] = None
        else:
            self.block(user, "its weight or bias is computed")

    def produced(self, op: Op) -> None:
        sources = carried(op, self.size)
        if sources is not None:
            if op.node.target in NORMS:
                self.norm(op)
            elif op.node.target in _SUMS and not any(isinstance(part, Param) for part in sources):
                self.joins.add(op)
            for source in sources:
                self.join(source)
        elif isinstance(op, Weighted):
            self.written(op)
        elif isinstance(op, Input):
            self.inputs.append(op)
        elif isinstance(op, Param):
            pass  # its readers say how it is used
        elif (cut := cut_of(op)) is not None:
            self.cut(op, *cut)
        elif (gain := gain_of(self.gm, op)) is not None:
            self.scaled(*gain)
        else:
            self.block(op, f"{_name(op)} makes what the stream holds")

    def read(self, x: Op, user: Op) -> None:
        sources = carried(user, self.size)
        other = [n for n in user.node.all_input_nodes if n == x.node] if sources is None or x not in sources else []
        if user.node.op == "output":
            self.outputs.append(x)
        elif user.node.target in SHAPE_ONLY or isinstance(user.val, torch.SymInt):
            pass
        elif is_square(user, x):
            if not user.users or not all(is_mean_of_rows(mean) for mean in user.users):
                self.block(user, "squares of the stream are read apart from their mean")
        elif sources is not None and not other and _times_read(user, x) == sources.count(x):
            if isinstance(x, Param):
                self.touch(user, x, x.val.dim() - 1, writes=True)
            self.join(user)
        elif isinstance(user, Linear | TransposedLinear | GroupedLinear) and user.input_op == x:
            if _times_read(user, x) > 1:
                self.block(user, "it multiplies the stream by itself")
            self.readers[user] = None
            self.touch(user, weight_param(user), user.in_axis, writes=False)
        elif (gain := gain_of(self.gm, user)) is not None and gain[0] == x:
            self.scaled(*gain)
            self.join(user)
        else:
            self.block(user, f"{_name(user)} reads the stream")

    def scaled(self, x: Op, factor: Op, held: Tensor) -> None:
        """One gain for all channels leaves vectors their direction; several do not."""
        if not (held == held.flatten()[0]).all():
            self.block(next(_params(factor)), "its gain differs from channel to channel")
        self.join(x)

    def norm(self, op: Op) -> None:
        names = {"weight": 1, "bias": 0} if op.node.target == LAYER_NORM else {"weight": 1}
        if op.node.target == LAYER_NORM:
            self.norms.add(op)
        for name, neutral in names.items():
            given = op.argument(name)
            held = None if given is None else constant(self.gm, view(given))
            if given is not None and (held is None or not (held == neutral).all()):
                self.block(view(given), "it is not folded into the layers that read the norm")
        if op.argument("normalized_shape") != [self.size]:
            self.block(op, "it is not of the width of the stream")

    def written(self, op: Weighted, part: Part | None = None) -> None:
        if isinstance(op, Embedding):
            self.writers[op] = None
            self.touch(op, weight_param(op), 1, True, part)
        elif isinstance(op, Linear | TransposedLinear | GroupedLinear):
            self.writers[op] = None
            self.touch(op, weight_param(op), op.out_axis, True, part)
            bias = None if isinstance(op, GroupedLinear) else op.self_ if isinstance(op, TransposedLinear) else op.bias
            if bias is not None:
                if bias.val.dim() != 1 or width(bias) != width(op):
                    self.block(op, "its bias is not one number for each of its outputs")
                self.touch(op, bias, 0, True, part)
        else:
            self.block(op, f"{_name(op)} makes what the stream holds")

    def cut(self, op: Op, whole: Op, offset: int, length: int) -> None:
        """The stream is a part of the last axis of what a linear gives; nothing else reads this part."""
        period = cast(int, width(whole))
        for other in (item for user in whole.users for item in _pieces(user)):
            where = cut_of(other)
            if where == (whole, offset, length):
                self.join(other)
            elif other.node.target not in SHAPE_ONLY and (
                where is None or (where[1] < offset + length and offset < where[1] + where[2])
            ):
                self.block(other, f"{_name(other)} reads the stream")
        while not isinstance(whole, Weighted):
            sources = carried(whole, period)
            if sources is None or len(sources) != 1 or whole.node.target in (ATTENTION, *PRODUCTS, *NORMS):
                self.block(whole, f"{_name(whole)} makes what the stream holds")
                return
            (whole,), before = sources, whole
            if any(user != before and user.node.target not in SHAPE_ONLY for user in whole.users):
                self.block(whole, "it is read apart from the stream")
        self.written(whole, (period, offset, length))


def cut_of(op: Op) -> tuple[Op, int, int] | None:
    """What ``op`` is a part of the last axis of, from where on, and how much; None for other ops."""
    match op.node:
        case fx.Node(target=operator.getitem, args=(fx.Node(target=split) as node, int() as index)):
            if split not in _SPLITS or not isinstance(node.args[0], fx.Node):
                return None
            pieces = cast(Sequence[Tensor], node.meta["val"])
            whole, dim = view(node.args[0]), view(node).argument("dim")
            sizes = [piece.shape[-1] for piece in pieces]
        case fx.Node(target=aten.slice.Tensor, args=(fx.Node() as node, *_)):
            whole, dim, index = view(node), op.argument("dim"), 1
            if op.argument("step") != 1 or not isinstance(op.argument("start"), int) or not isinstance(width(op), int):
                return None
            start = _positive(op.argument("start"), width(whole) or 0)
            sizes = [start, width(op)]
        case _:
            return None
    if _positive(dim, whole.val.dim()) != whole.val.dim() - 1 or not all(isinstance(size, int) for size in sizes):
        return None
    return whole, sum(cast(list[int], sizes[:index])), cast(int, sizes[index])


def _pieces(op: Op) -> list[Op]:
    """The items of a split; any other op itself."""
    return op.users if op.node.target in _SPLITS else [op]


def _times_read(op: Op, x: Op) -> int:
    count = 0

    def see(node: fx.Node) -> fx.Node:
        nonlocal count
        count += node == x.node
        return node

    fx.node.map_arg((op.node.args, op.node.kwargs), see)
    return count


def _params(op: Op) -> Any:
    if isinstance(op, Param):
        yield op
    for node in op.node.all_input_nodes:
        yield from _params(view(node))


def _name(op: Op) -> str:
    return str(op.node.target).removesuffix(".default")
