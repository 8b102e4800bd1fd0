"""Experts' fused ``gate_up_proj`` as two layers, ``gate_proj`` and ``up_proj``, that rules can name apart."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, cast, final

import torch
from torch import Tensor, fx

from graphq.ir import edit
from graphq.ir.layers import MADE_OF
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import GroupedLinear, Op, Param, Split, ops_of, view
from graphq.runtime import ops
from graphq.state import as_parameter, deferred_of, held_tensor

aten = torch.ops.aten
_FUSED: Final = "gate_up_proj"
_HALVES: Final = ("gate_proj", "up_proj")


@final
@dataclass(frozen=True)
class SplitGateUp(Pass):
    """A grouped linear by ``gate_up_proj`` whose output is only cut in half is one grouped linear for each half.

    The halves are views of the fused parameter's rows: gate first, as the name says.
    """

    name: ClassVar[str] = "split-gate-up"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = 0
        for op in ops_of(gm):
            match op:
                case GroupedLinear(_, Param() as fused, _) if fused.fqn.rpartition(".")[2] == _FUSED:
                    halves = _halves(op)
                    if halves is not None and len(fused.users) == 1 and not _taken(gm, fused):
                        self._split(gm, op, fused, halves)
                        count += 1
                case _:
                    pass
        if count:
            edit.drop_unused(gm)
        return count

    def _split(self, gm: fx.GraphModule, op: GroupedLinear, fused: Param, halves: tuple[list[Op], list[Op]]) -> None:
        rows = _rows(gm, held_tensor(gm, fused.fqn))
        for name, own, outputs in zip(_HALVES, rows, halves, strict=True):
            held = as_parameter(own)
            weight = edit.add_tensor(gm, op, fused.fqn.removesuffix(_FUSED) + name, held, by=self.name)
            gm.meta[MADE_OF] = {**gm.meta.get(MADE_OF, {}), fused.fqn.removesuffix(_FUSED) + name: (fused.fqn,)}
            made = edit.insert(gm, op, ops.grouped_linear, op.x, weight, op.offsets, by=self.name)
            for output in outputs:
                edit.bypass(gm, output, made)


def _rows(gm: fx.GraphModule, w: Tensor) -> Sequence[Tensor]:
    """The upper and the lower half of each expert's rows."""
    deferred = deferred_of(w)
    if deferred is None:
        return w.detach().chunk(2, 1)
    half = -(-deferred.shape[1] // 2)
    parts = (deferred.narrowed(1, 0, half), deferred.narrowed(1, half, deferred.shape[1] - half))
    return [edit.deferred_tensor(gm, part, w.dtype) for part in parts]


def _taken(gm: fx.GraphModule, fused: Param) -> bool:
    return any(edit.has_tensor(gm, fused.fqn.removesuffix(_FUSED) + name) for name in _HALVES)


def _halves(op: GroupedLinear) -> tuple[list[Op], list[Op]] | None:
    """The readers of the first and of the second half of the output, if all it is read for is these halves."""
    halves: tuple[list[Op], list[Op]] = ([], [])
    for user in op.users:
        if not _cuts_in_half(user, op.val.shape[-1]):
            return None
        for item in user.node.users:
            if item.target is not operator.getitem:
                return None
            halves[cast(int, item.args[1])].append(view(item))
    return halves if halves[0] and halves[1] else None


def _cuts_in_half(op: Op, width: int) -> bool:
    """Whether ``op`` gives the two halves of the last axis of its input ``[T, width]``."""
    half = width // 2
    if isinstance(op, Split):
        return op.split_size == half and op.dim in (-1, 1) and width % 2 == 0
    if op.node.target not in (aten.chunk.default, aten.split_with_sizes.default):
        return False
    _, parts, *dim = cast(list[Any], list(op.node.args))
    return parts in (2, [half, half]) and dim in ([-1], [1]) and width % 2 == 0
