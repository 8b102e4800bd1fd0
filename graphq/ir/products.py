"""Products of an activation and a stored matrix, however the source writes them: ``x @ w.T``, ``einsum``, ``addmm``.

A matrix is followed from its parameter through what only moves its axes, repeats or copies it, or casts it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast, final

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphq.ir.effect_table import effect
from graphq.ir.effects import ReadsShape
from graphq.ir.layers import weight_param
from graphq.ir.views import Cast, Op, Param, Weighted, ops_of, view
from graphq.state import held_tensor

aten = torch.ops.aten
_MOVES: Final = frozenset(
    (
        *(aten.t.default, aten.numpy_T.default, aten.mT.default, aten.matrix_H.default, aten.adjoint.default),
        *(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default, aten.permute.default, aten.mH.default),
        *(aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist, aten.unsqueeze.default),
    )
)
_COPIES: Final = frozenset((aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default))


@final
@dataclass(frozen=True)
class Matrix:
    """What a parameter becomes on its way to an op. ``axes``: for each axis, which of the parameter's it is; None where
    the matrix is repeated. ``casts``: in the order they are done.
    """

    param: Param
    axes: tuple[int | None, ...]
    casts: tuple[Cast, ...] = ()


def matrix_of(op: Op) -> Matrix | None:
    """The parameter that ``op`` is, moved and cast; None for what is computed otherwise."""
    if isinstance(op, Param):
        return Matrix(op, tuple(range(op.val.dim())))
    if not is_moved(op):
        return None
    found = matrix_of(view(op.node.all_input_nodes[0]))
    if found is None:
        return None
    if isinstance(op, Cast):
        return Matrix(found.param, found.axes, (*found.casts, op))
    if op.node.target in _COPIES:
        return found
    if op.node.target is aten.expand.default:
        old = view(op.node.all_input_nodes[0]).val.shape
        new = op.val.dim() - len(old)
        kept = (axis if _same(a, b) else None for axis, a, b in zip(found.axes, old, op.val.shape[new:], strict=True))
        return Matrix(found.param, (*[None] * new, *kept), found.casts)
    # Which axis went where shows in a tensor whose sizes all differ, and none of them is that of a new axis.
    sizes = range(2, 2 + len(found.axes))
    moved = cast(Any, op.node.target)(torch.empty(*sizes, device="meta"), *op.node.args[1:], **op.node.kwargs).shape
    return Matrix(found.param, tuple(None if size == 1 else found.axes[size - 2] for size in moved), found.casts)


def is_moved(op: Op) -> bool:
    """Whether ``op`` gives the elements of its input: other axes, repetitions, or a cast."""
    target = op.node.target
    return isinstance(op, Cast) or target in _MOVES or target in _COPIES or target is aten.expand.default


def readers_of(reads: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that read a parameter, which ``reads`` all are, behind what only moves it."""
    found = set[fx.Node]()
    pending = [user for read in reads for user in view(read).users]
    while pending:
        op = pending.pop()
        if is_moved(op):
            pending.extend(op.users)
        else:
            found.add(op.node)
    return found


@final
@dataclass(frozen=True)
class Product:
    """``op`` is ``beta * bias + alpha * (x @ w)``, where ``w[K, N]`` is the matrix of a parameter of two axes.

    ``is_rows``: the parameter is stored as ``[N, K]``, as a linear's is, and not as ``[K, N]``.
    """

    op: Op
    x: Op
    matrix: Matrix
    is_rows: bool
    bias: Op | None
    beta: Any
    alpha: Any


@final
@dataclass(frozen=True)
class _Form:
    """Operands of an op that is a product ``x @ w``: the axes of ``w`` that are summed over and kept."""

    x: Op
    w: Op
    summed: int
    kept: int
    bias: Op | None = None


def products(gm: fx.GraphModule) -> list[Product]:
    """The products of an activation's last axis and a stored matrix that are no layers yet, in graph order."""
    computed = from_inputs(gm)
    found = (_product(gm, op) for op in ops_of(gm))
    return [product for product in found if product is not None and product.x.node in computed]


def from_inputs(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes that depend on what inputs hold, and not on their sizes alone."""
    found = set[fx.Node]()
    for node in gm.graph.nodes:
        is_size = isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)
        if node.op == "placeholder" or (not is_size and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def reads_inputs(node: fx.Node) -> bool:
    """Whether a node holds anything of the graph's inputs but their sizes."""
    pending, seen = [node], {node}
    while pending:
        one = pending.pop()
        if one.op == "placeholder":
            return True
        if not isinstance(effect(view(one)), ReadsShape):
            new = [read for read in one.all_input_nodes if read not in seen]
            seen.update(new)
            pending += new
    return False


def _product(gm: fx.GraphModule, op: Op) -> Product | None:
    form = _form(op)
    if form is None or (isinstance(op, Weighted) and weight_param(op) is not None):
        return None
    matrix = matrix_of(form.w)
    if matrix is None or matrix.param.val.dim() != 2 or form.x.val.dim() < 2 or not is_weight(gm, matrix.param):
        return None
    axes = matrix.axes
    others = [axis for i, axis in enumerate(axes) if i not in (form.summed % len(axes), form.kept % len(axes))]
    if {axes[form.summed], axes[form.kept]} != {0, 1} or any(axis is not None for axis in others):
        return None
    shape = (*form.x.val.shape[:-1], form.w.val.shape[form.kept])
    if len(shape) != op.val.dim() or not all(map(_same, shape, op.val.shape)):
        return None  # the matrix is repeated for more vectors than there are
    beta, alpha = (op.argument(name) for name in ("beta", "alpha")) if op.node.target in _SCALED else (1, 1)
    return Product(op, form.x, matrix, axes[form.kept] == 0, form.bias, beta, alpha)


def _same(a: Any, b: Any) -> bool:
    return statically_known_true(a == b)


def is_weight(gm: fx.GraphModule, param: Param) -> bool:
    """Whether it is a parameter of real numbers, and no buffer."""
    tensor = held_tensor(gm, param.fqn)
    return isinstance(tensor, nn.Parameter) and tensor.is_floating_point()


def _of(first: str, second: str, summed: int = -2, kept: int = -1, bias: str = "") -> Callable[[Op], _Form | None]:
    def read(op: Op) -> _Form | None:
        added = op.argument(bias) if bias else None
        bias_op = None if added is None else view(added)
        return _Form(view(op.argument(first)), view(op.argument(second)), summed, kept, bias_op)

    return read


def _tensordot(op: Op) -> _Form | None:
    x, w = view(op.argument("self")), view(op.argument("other"))
    over, of_w = cast(Sequence[int], op.argument("dims_self")), cast(Sequence[int], op.argument("dims_other"))
    if len(over) != 1 or over[0] not in (-1, x.val.dim() - 1) or w.val.dim() != 2:
        return None
    return _Form(x, w, of_w[0] % 2, 1 - of_w[0] % 2)


def _einsum(op: Op) -> _Form | None:
    """``...k,nk->...n`` with any letters, and with the operands in either order."""
    operands = [view(node) for node in cast(Sequence[fx.Node], op.argument("tensors"))]
    terms, _, out = str(op.argument("equation")).replace(" ", "").partition("->")
    names = terms.split(",")
    if len(operands) != 2 or len(names) != 2:
        return None
    for x, w in ((0, 1), (1, 0)):
        rest, summed, kept = names[x][:-1], names[x][-1:], out[-1:]
        is_matrix = len(names[w]) == 2 and set(names[w]) == {summed, kept} and summed != kept
        if is_matrix and out == rest + kept and not {summed, kept} & set(rest):
            return _Form(operands[x], operands[w], names[w].index(summed), names[w].index(kept))
    return None


_FORMS: Final[dict[object, Callable[[Op], _Form | None]]] = {
    aten.matmul.default: _of("self", "other"),
    aten.mm.default: _of("self", "mat2"),
    aten.bmm.default: _of("self", "mat2"),
    aten.linear.default: _of("input", "weight", summed=-1, kept=-2, bias="bias"),
    aten.addmm.default: _of("mat1", "mat2", bias="self"),
    aten.baddbmm.default: _of("batch1", "batch2", bias="self"),
    aten.inner.default: _of("self", "other", summed=-1, kept=-2),
    aten.tensordot.default: _tensordot,
    aten.einsum.default: _einsum,
}
FORMS: Final = frozenset(_FORMS)
_SCALED: Final = (aten.addmm.default, aten.baddbmm.default)


def _form(op: Op) -> _Form | None:
    read = _FORMS.get(op.node.target) if op.node.op == "call_function" else None
    if read is None:
        return None
    form = read(op)
    return None if form is None or form.w.val.dim() < 2 else form
