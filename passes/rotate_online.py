"""Rotations at run time: of queries and keys (R3), and of the inputs of linears that end an MLP (R4).

SpinQuant (arXiv:2405.16406, section 3.1, figure 1); QuaRot (arXiv:2404.00456, section 4). R3: q and k are multiplied by
H behind the rotary embedding, which cancels in their product. R4: x -> x H in front of the linear, with W -> W H. Each
is a plain matmul with a constant Hadamard matrix, in blocks where it is smaller than what it rotates.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar, Final, cast, final

import torch
from torch import Tensor, fx

from graphq.ir import edit
from graphq.ir.effect_table import effect
from graphq.ir.effects import (
    Attends,
    Carried,
    Contracts,
    Joins,
    ReadsShape,
)
from graphq.ir.index import GraphIndex
from graphq.ir.layers import weight_param
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.streams import residual_streams
from graphq.ir.vectors import carried, moved, place, width
from graphq.ir.views import Input, Op, Param, Weighted, ops_of, view
from graphq.numerics.hadamard import Rotation, rotate_axis, rotation
from graphq.passes.quantize_weights import with_weights
from graphq.state import tensor_of

aten = torch.ops.aten
Change = Callable[[Tensor], Tensor]
_LARGE: Final = 256  # from here on two small products are cheaper than one


@final
@dataclass(frozen=True)
class RotateOnline(Pass):
    """Queries and keys (``r3``), and what ends an MLP (``r4``), are rotated; the model's function is the same.

    Cached keys are in the new basis, too: a cache is the graph's own.

    block_size: R4 rotates blocks of this size; heads are rotated whole.
    note: is told what stays as it is, and why.
    """

    r3: bool = False
    r4: bool = False
    block_size: int | None = None
    note: Callable[[str], None] | None = None
    name: ClassVar[str] = "rotate-online"
    requires = (with_weights,)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = self._rotate_keys(GraphIndex(gm)) if self.r3 else 0
        return count + (self._rotate_inputs(GraphIndex(gm)) if self.r4 else 0)

    def _note_skipped(self, what: str, reasons: Iterable[str]) -> None:
        for reason in reasons:
            if self.note is not None:
                self.note(f"rotate: {what}: {reason}")  # by the algorithm that specs name

    def _rotate_keys(self, index: GraphIndex) -> int:
        """Queries and keys are multiplied by one matrix, where they are made: before the cache and repeated heads.

        Returns the number of products put in.
        """
        gm, matrices = index.gm, Matrices(index, self.name)
        attentions = [op for op in ops_of(gm) if isinstance(effect(op), Attends)]
        if not attentions:
            self._note_skipped("r3", ["no scaled_dot_product_attention is found"])
        count, hadamard = 0, cache(partial(rotation, kind="hadamard", seed=0))
        for op in attentions:
            size = width(view(op.argument("query"))) or 0
            operands = [_producers(view(op.argument(name)), size) for name in ("query", "key")]
            h = hadamard(size)
            reasons = [reason for moves, made in operands for reason in _unrotatable_reads(index, op, moves, made)]
            reasons += [no_matrix(size)] if h is None else []
            self._note_skipped("r3", (f"{place(op)}: {reason}" for reason in reasons))
            if h is None or reasons:
                continue
            for moves, made in operands:
                for source in made:
                    if not isinstance(source, Input):
                        readers = [user for user in source.users if user in moves or user == op]
                        product = insert_rotation(matrices, source, h, edit.following(source))
                        for reader in readers:
                            edit.redirect(reader, source, product, self.name)
                        count += 1
                for move in moves:
                    _reshape(gm, move, self.name)
            _reshape_behind(gm, op, self.name)
        return count

    def _rotate_inputs(self, index: GraphIndex) -> int:
        """Linears that write to a residual stream what an activation gave read it rotated, and so are their weights.

        Returns the number of products put in and of weights changed.
        """
        gm, matrices = index.gm, Matrices(index, self.name)
        products: dict[Op, Op] = {}
        changes: dict[str, list[Change]] = {}
        hadamard = cache(partial(rotation, kind="hadamard", seed=0))
        for stream in residual_streams(index):
            for op in sorted(stream.writers, key=lambda op: op.node):  # in graph order
                x, param = op.input_op, weight_param(op)
                if not _is_activation(x) or x in stream.members:
                    continue
                channels = width(x) or 0
                size = self.block_size or channels
                h = hadamard(size)
                if param is None:
                    self._note_skipped("r4", [f"{place(op)}: its weight is computed"])
                elif (why := index.why_shared(param.fqn, {op.node})) is not None:
                    self._note_skipped("r4", [why])
                elif channels % size:
                    self._note_skipped("r4", [f"{place(op)}: its {channels} inputs are no multiple of {size}"])
                elif h is None:
                    self._note_skipped("r4", [f"{place(op)}: {no_matrix(size)}"])
                else:
                    if x not in products:
                        products[x] = insert_rotation(matrices, x, h, op)
                    edit.redirect(op, x, products[x], self.name)
                    change = partial(rotate_axis, axis=op.in_axis, rotation=h)
                    changes.setdefault(param.fqn, []).append(change)
        for fqn, steps in changes.items():
            change = partial(in_float64, steps=tuple(steps))
            edit.set_param(gm, fqn, change, by=self.name, reads=index.reads(fqn))
        return len(products) + len(changes)


def in_float64(w: Tensor, steps: Sequence[Change]) -> Tensor:
    """The tensor after these changes, computed in float64 and rounded once."""
    made = w.double()
    for step in steps:
        made = step(made)
    return made.to(w.dtype)


def _reshape(gm: fx.GraphModule, op: Op, by: str) -> None:
    """A view is a reshape: a product may leave the rows that it is of in memory in another order."""
    if op.node.target in (aten.view.default, aten._unsafe_view.default):
        edit.replace(gm, op, aten.reshape.default, view(op.node.all_input_nodes[0]), op.argument("size"), by=by)


def _reshape_behind(gm: fx.GraphModule, op: Op, by: str) -> None:
    """The views of what ``op`` gives, wherever it is moved to, are reshapes."""
    for user in op.users:
        if moved(user, 1) == op:
            _reshape_behind(gm, user, by)
            _reshape(gm, user, by)


def _producers(x: Op, size: int) -> tuple[dict[Op, None], dict[Op, None]]:
    """The moves and concatenations of vectors of ``size`` that give ``x``, and the ops that make these vectors."""
    moves, made = dict[Op, None](), dict[Op, None]()
    pending = [x]
    while pending:
        op = pending.pop()
        found = carried(op, size) if isinstance(effect(op), Joins) else None
        source = moved(op, size)
        sources = found.value if isinstance(found, Carried) else [source] if source is not None else []
        if sources and all(width(source) == size for source in sources):
            moves[op] = None
            pending += sources
        else:
            made[op] = None
    return moves, made


def _unrotatable_reads(index: GraphIndex, attention: Op, moves: Iterable[Op], made: Iterable[Op]) -> list[str]:
    """What else reads rotated vectors, and what gives some that are not: anything but a cache, which comes back."""
    found: list[str] = []
    returned = set[Op]()
    for op in moves:
        for user in op.users:
            if user.node.op == "output":
                returned.add(op)
            elif user not in moves and user != attention and not isinstance(effect(user), ReadsShape):
                found.append(f"{place(user)}: {user.node.target} reads it, too")
    value = view(attention.argument("value"))
    if value in moves or value in made:
        found.append("its values are its queries or keys")
    return found + not_caches(index, [op for op in made if isinstance(op, Input)], returned)


def _is_activation(x: Op) -> bool:
    """Whether neither a layer nor an attention nor the caller made ``x``: then some activation did."""
    if not isinstance(x.val, Tensor) or not x.val.is_floating_point():
        return False
    while (source := moved(x, 1)) is not None:
        x = source
    return not isinstance(x, Weighted | Input | Param) and not isinstance(effect(x), Attends | Contracts)


@final
class Matrices:
    """The matrices that a graph's products read, each held once."""

    def __init__(self, index: GraphIndex, by: str) -> None:
        self.index, self.by = index, by
        self._made: dict[str, Op] = {}

    def read(self, matrix: Tensor) -> Op:
        """The node that is this matrix."""
        gm, name = self.index.gm, f"hadamard_{matrix.shape[0]}"
        while edit.has_tensor(gm, name):
            own = tensor_of(gm, name)
            if own.dtype == matrix.dtype and torch.equal(own, matrix):
                found = [*map(view, self.index.reads(name)), *([self._made[name]] if name in self._made else [])]
                if found:
                    return found[0]
            name += "_"
        first = next(op for op in ops_of(gm) if not isinstance(op, Input | Param))
        self._made[name] = edit.add_tensor(gm, first, name, matrix, by=self.by)
        return self._made[name]


def insert_rotation(matrices: Matrices, x: Op, h: Rotation, before: Op) -> Op:
    """``x`` times the Hadamard matrix, made orthogonal, in blocks of its size; times its factors where it is large."""
    size, channels, dtype = h.size, cast(int, width(x)), x.val.dtype
    put = partial(edit.insert, matrices.index.gm, before, by=matrices.by, like=x)
    if size > _LARGE:
        left, right = (matrices.read(part.to(dtype)) for part in (h.left.T.contiguous(), h.right))
        blocks = put(aten.unflatten.int, x, -1, [channels // size, h.left.shape[0], h.right.shape[0]])
        product = put(aten.matmul.default, left, put(aten.matmul.default, blocks, right))
        return put(aten.flatten.using_ints, product, -3, -1)
    held = matrices.read(h.matrix().to(dtype))
    if size == channels:
        return put(aten.matmul.default, x, held)
    blocks = put(aten.unflatten.int, x, -1, [channels // size, size])
    return put(aten.flatten.using_ints, put(aten.matmul.default, blocks, held), -2, -1)


def no_matrix(size: int) -> str:
    """The reason for a size that has no matrix here."""
    return f"graphq knows no Hadamard matrix of size {size}"


def not_caches(index: GraphIndex, inputs: Iterable[Op], outputs: Iterable[Op], is_cached: bool = True) -> list[str]:
    """What of these the graph is given, or gives, that is no cache: a cache comes back in the basis it was given in."""
    given, returned = {op.node for op in inputs}, {op.node for op in outputs}
    pairs = {present: past for present, past in index.caches.items() if is_cached and present in returned}
    pairs = {present: past for present, past in pairs.items() if past in given}
    back = given.difference(pairs.values())
    return [f"{name}: the caller gives it" for name in sorted(index.input_names[node] for node in back)] + [
        f"{name}: the caller gets it"
        for name in sorted(name for node in returned - set(pairs) for name in index.output_names[node])
    ]
