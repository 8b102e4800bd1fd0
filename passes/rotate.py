"""Rotations of the residual stream (R1) and of the values of attention heads (R2), in weights.

QuaRot (arXiv:2404.00456, section 4) and SpinQuant (arXiv:2405.16406, section 3). A model's function is the same in
another basis, in which no channel stands out: R1 x -> x Q along the residual stream, with W -> Q^T W for what writes to
it and W -> W Q for what reads it; R2 the same for the values of each head. ``rotate_online`` has R3 and R4.

A layer norm takes the mean off x, and no Q leaves that alone. Where every norm of a stream is one, what writes to the
stream is centred, and the layer norms become RMS norms (SliceGPT, arXiv:2401.15024, section 3.1).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final, final

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphq.ir import edit
from graphq.ir.effect_table import effect
from graphq.ir.effects import ReadsShape
from graphq.ir.index import GraphIndex
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.streams import Stream, residual_streams, value_streams
from graphq.ir.vectors import is_layer_norm, place
from graphq.ir.views import Op, view
from graphq.numerics.hadamard import RotationKind, centre_axis, rotate_axis, rotation
from graphq.passes.quantize_weights import with_weights
from graphq.passes.rotate_online import Change, in_float64, no_matrix, not_caches

aten = torch.ops.aten
_HALVES: Final = (torch.float16, torch.bfloat16)


@final
@dataclass(frozen=True)
class Rotate(Pass):
    """Residual streams (``r1``) and values of heads (``r2``) are in another basis; the model's function is the same.

    Cached values are in the new basis, too: a cache is the graph's own. Norms must be folded and heads untied before
    (``FoldNorms``, ``Untie``).

    kind, seed: of the matrices. A size that has no Hadamard matrix is refused: ``orthogonal`` has every size.
    block_size: R1 rotates blocks of this size; heads are rotated whole.
    note: is told what stays as it is, and why.
    """

    r1: bool = True
    r2: bool = True
    kind: RotationKind = "random_hadamard"
    block_size: int | None = None
    seed: int = 0
    note: Callable[[str], None] | None = None
    name: ClassVar[str] = "rotate"
    requires = (with_weights,)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        changes: dict[str, list[Change]] = {}
        index = GraphIndex(gm)
        norms = self._rotate_residual(index, residual_streams(index), changes) if self.r1 else []
        if self.r2:
            self._rotate_values(index, changes)
        for fqn, steps in changes.items():
            change = partial(in_float64, steps=tuple(steps))
            edit.set_param(gm, fqn, change, by=self.name, reads=index.reads(fqn))
        for norm in norms:
            self._take_square_mean(gm, norm)
        if norms:
            edit.drop_unused(gm)
        return len(changes) + len(norms)

    def _note_skipped(self, what: str, reasons: Iterable[str]) -> None:
        for reason in reasons:
            if self.note is not None:
                self.note(f"{self.name}: {what}: {reason}")

    def _rotate_residual(
        self, index: GraphIndex, streams: Sequence[Stream], changes: dict[str, list[Change]]
    ) -> list[Op]:
        """The layer norms that now read centred values."""
        norms: list[Op] = []
        if not streams:
            self._note_skipped("r1", ["no linear reads a sum of computed values"])
        for number, stream in enumerate(streams):
            size = self.block_size or stream.size
            q = rotation(size, self.kind, self.seed + number) if stream.size % size == 0 else None
            reasons = [
                *stream.blocks,
                *not_caches(index, stream.inputs, stream.outputs, is_cached=False),
                *_read_off_centre(stream),
            ]
            if stream.size % size:
                reasons.append(f"its {stream.size} channels are no multiple of {size}")
            elif q is None:
                reasons.append(no_matrix(size) + "; kind orthogonal, or another block_size, has one")
            self._note_skipped("r1", reasons)
            if q is None or reasons:
                continue
            for axis in stream.axes:
                steps = changes.setdefault(axis.fqn, [])
                if axis.writes and stream.norms:
                    steps.append(partial(centre_axis, axis=axis.axis))
                steps.append(partial(rotate_axis, axis=axis.axis, rotation=q, part=axis.part))
            norms += stream.norms
        return norms

    def _rotate_values(self, index: GraphIndex, changes: dict[str, list[Change]]) -> None:
        streams = value_streams(index)
        if not streams:
            self._note_skipped("r2", ["no attention is found"])
        for number, stream in enumerate(streams, start=1):
            q = rotation(stream.size, self.kind, self.seed + (number << 16))
            reasons = [*stream.blocks, *not_caches(index, stream.inputs, stream.outputs)]
            reasons += [f"{place(norm)}: a layer norm reads the values" for norm in stream.norms]
            if not reasons and not (stream.writers and stream.readers):
                reasons.append(f"{place(stream.members[-1])}: no linear makes or reads the values")
            if q is None:
                reasons.append(no_matrix(stream.size) + "; kind orthogonal has one")
            self._note_skipped("r2", reasons)
            if q is not None and not reasons:
                for axis in stream.axes:
                    change = partial(rotate_axis, axis=axis.axis, rotation=q, part=axis.part)
                    changes.setdefault(axis.fqn, []).append(change)

    def _take_square_mean(self, gm: fx.GraphModule, norm: Op) -> None:
        """The RMS norm in the place of a layer norm of centred values, in float32 at least."""
        x, eps, dtype = view(norm.argument("input")), norm.argument("eps"), norm.val.dtype
        put = partial(edit.insert, gm, norm, by=self.name, like=norm)
        wide = put(aten.to.dtype, x, torch.float32) if dtype in _HALVES else x
        mean = put(aten.mean.dim, put(aten.pow.Tensor_Scalar, wide, 2), [-1], True)
        made = put(aten.mul.Tensor, wide, put(aten.rsqrt.default, put(aten.add.Tensor, mean, eps)))
        made = put(aten.to.dtype, made, dtype) if dtype in _HALVES else made
        if not all(statically_known_true(a == b) for a, b in zip(made.val.stride(), norm.val.stride(), strict=True)):
            made = put(aten.contiguous.default, made)  # as a layer norm's output is, for the views behind it
        edit.bypass(gm, norm, made)


def _read_off_centre(stream: Stream) -> list[str]:
    """What reads a stream of layer norms by something else, and would miss the mean that centring takes off."""
    if not stream.norms:
        return []
    found = [f"{axis.fqn}: only a part of it writes" for axis in stream.axes if axis.writes and axis.part is not None]
    normed, members = set[Op](), set(stream.members)
    for op in stream.members:
        sources = [view(node) for node in op.node.all_input_nodes if view(node) in members]
        if is_layer_norm(op) or (sources and all(source in normed for source in sources)):
            normed.add(op)
            continue
        others = [user for user in op.users if user not in members and not isinstance(effect(user), ReadsShape)]
        found += [f"{place(user)}: it reads the stream without a layer norm" for user in others]
    return found
