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

from graphq.capture.source import source_of
from graphq.ir import edit
from graphq.ir.layers import weight_param
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.streams import residual_streams, shared
from graphq.ir.vectors import ATTENTION, PRODUCTS, SHAPE_ONLY, carried, moved, place, width
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
        return (self._rotate_keys(gm) if self.r3 else 0) + (self._rotate_inputs(gm) if self.r4 else 0)

    def _say(self, what: str, reasons: Iterable[str]) -> None:
        for reason in reasons:
            if self.note is not None:
                self.note(f"rotate: {what}: {reason}")  # by the algorithm that specs name

    def _rotate_keys(self, gm: fx.GraphModule) -> int:
        """Queries and keys are multiplied by one matrix, where they are made: before the cache and repeated heads.

        Returns the number of products put in.
        """
        attentions = [op for op in ops_of(gm) if op.node.target == ATTENTION]
        if not attentions:
            self._say("r3", ["no scaled_dot_product_attention is found"])
        count, hadamard = 0, cache(partial(rotation, kind="hadamard", seed=0))
        for op in attentions:
            size = width(view(op.argument("query"))) or 0
            operands = [_producers(view(op.argument(name)), size) for name in ("query", "key")]
            h = hadamard(size)
            reasons = [reason for moves, made in operands for reason in _unrotatable_reads(gm, op, moves, made)]
            reasons += [no_matrix(size)] if h is None else []
            self._say("r3", (f"{place(op)}: {reason}" for reason in reasons))
            if h is None or reasons:
                continue
            for moves, made in operands:
                for source in made:
                    if not isinstance(source, Input):
                        readers = [user for user in source.users if user in moves or user == op]
                        product = multiplied(gm, source, h, edit.following(source), self.name)
                        for reader in readers:
                            edit.redirect(reader, source, product, self.name)
                        count += 1
                for move in moves:
                    _reshape(gm, move, self.name)
            _reshape_behind(gm, op, self.name)
        return count

    def _rotate_inputs(self, gm: fx.GraphModule) -> int:
        """Linears that write to a residual stream what an activation gave read it rotated, and so are their weights.

        Returns the number of products put in and of weights changed.
        """
        order = {node: i for i, node in enumerate(gm.graph.nodes)}
        products: dict[Op, Op] = {}
        changes: dict[str, list[Change]] = {}
        hadamard = cache(partial(rotation, kind="hadamard", seed=0))
        for stream in residual_streams(gm):
            for op in sorted(stream.writers, key=lambda op: order[op.node]):
                x, param = op.input_op, weight_param(op)
                if not _is_activation(x) or x in stream.members:
                    continue
                channels = width(x) or 0
                size = self.block_size or channels
                h = hadamard(size)
                if param is None:
                    self._say("r4", [f"{place(op)}: its weight is computed"])
                elif (why := shared(gm, param.fqn, {op.node})) is not None:
                    self._say("r4", [why])
                elif channels % size:
                    self._say("r4", [f"{place(op)}: its {channels} inputs are no multiple of {size}"])
                elif h is None:
                    self._say("r4", [f"{place(op)}: {no_matrix(size)}"])
                else:
                    if x not in products:
                        products[x] = multiplied(gm, x, h, op, self.name)
                    edit.redirect(op, x, products[x], self.name)
                    change = partial(rotate_axis, axis=op.in_axis, rotation=h)
                    changes.setdefault(param.fqn, []).append(change)
        for fqn, steps in changes.items():
            edit.set_param(gm, fqn, partial(in_float64, steps=tuple(steps)), by=self.name)
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
        sources = carried(op, size) if op.node.target == aten.cat.default else [moved(op, size)]
        if sources and all(source is not None and width(source) == size for source in sources):
            moves[op] = None
            pending += cast(list[Op], sources)
        else:
            made[op] = None
    return moves, made


def _unrotatable_reads(gm: fx.GraphModule, attention: Op, moves: Iterable[Op], made: Iterable[Op]) -> list[str]:
    """What else reads rotated vectors, and what gives some that are not: anything but a cache, which comes back."""
    found: list[str] = []
    returned = set[Op]()
    for op in moves:
        for user in op.users:
            if user.node.op == "output":
                returned.add(op)
            elif user not in moves and user != attention and user.node.target not in SHAPE_ONLY:
                found.append(f"{place(user)}: {user.node.target} reads it, too")
    value = view(attention.argument("value"))
    if value in moves or value in made:
        found.append("its values are its queries or keys")
    return found + not_caches(gm, [op for op in made if isinstance(op, Input)], returned)


def _is_activation(x: Op) -> bool:
    """Whether neither a layer nor an attention nor the caller made ``x``: then some activation did."""
    if not isinstance(x.val, Tensor) or not x.val.is_floating_point():
        return False
    while (source := moved(x, 1)) is not None:
        x = source
    return not isinstance(x, Weighted | Input | Param) and x.node.target not in (ATTENTION, *PRODUCTS)


def multiplied(gm: fx.GraphModule, x: Op, h: Rotation, before: Op, by: str) -> Op:
    """``x`` times the Hadamard matrix, made orthogonal, in blocks of its size; times its factors where it is large."""
    size, channels, dtype = h.size, cast(int, width(x)), x.val.dtype
    put = partial(edit.insert, gm, before, by=by, like=x)
    if size > _LARGE:
        left, right = (_constant(gm, part.to(dtype), by) for part in (h.left.T.contiguous(), h.right))
        blocks = put(aten.unflatten.int, x, -1, [channels // size, h.left.shape[0], h.right.shape[0]])
        product = put(aten.matmul.default, left, put(aten.matmul.default, blocks, right))
        return put(aten.flatten.using_ints, product, -3, -1)
    held = _constant(gm, h.matrix().to(dtype), by)
    if size == channels:
        return put(aten.matmul.default, x, held)
    blocks = put(aten.unflatten.int, x, -1, [channels // size, size])
    return put(aten.flatten.using_ints, put(aten.matmul.default, blocks, held), -2, -1)


def _constant(gm: fx.GraphModule, matrix: Tensor, by: str) -> Op:
    """The node that reads this matrix, the same for all who need it."""
    name = f"hadamard_{matrix.shape[0]}"
    while edit.has_tensor(gm, name):
        own = tensor_of(gm, name)
        nodes = gm.graph.find_nodes(op="get_attr", target=name)
        if nodes and own.dtype == matrix.dtype and torch.equal(own, matrix):
            return view(nodes[0])
        name += "_"
    first = next(op for op in ops_of(gm) if not isinstance(op, Input | Param))
    return edit.add_tensor(gm, first, name, matrix, by=by)


def no_matrix(size: int) -> str:
    """The reason for a size that has no matrix here."""
    return f"graphq knows no Hadamard matrix of size {size}"


def not_caches(gm: fx.GraphModule, inputs: Iterable[Op], outputs: Iterable[Op], is_cached: bool = True) -> list[str]:
    """What of these the graph is given, or gives, that is no cache: a cache comes back in the basis it was given in."""
    source = source_of(gm)
    places = dict(zip(gm.graph.find_nodes(op="placeholder"), source.inputs, strict=True))
    results = cast(Sequence[fx.Node], gm.graph.output_node().args[0])
    given = {places[op.node].name for op in inputs}
    nodes = {op.node for op in outputs}
    returned = {name for node, name in zip(results, source.outputs, strict=True) if node in nodes}
    caches = {declared.name for declared in source.inputs if declared.is_cache and is_cached}
    pairs = {name: name.replace("past_key_values.", "present.") for name in given & caches}
    pairs = {name: back for name, back in pairs.items() if back in returned}
    return [f"{name}: the caller gives it" for name in sorted(given - set(pairs))] + [
        f"{name}: the caller gets it" for name in sorted(returned - set(pairs.values()))
    ]
