"""Experts' fused ``gate_up_proj`` as two layers, ``gate_proj`` and ``up_proj``, that rules can name apart."""

import operator
from dataclasses import dataclass
from typing import ClassVar, Final, cast, final

import torch
from torch import fx

from graphq import edit
from graphq.pipeline import Batches, Pass
from graphq.runtime import ops
from graphq.state import tensor_of
from graphq.views import GroupedLinear, Op, Param, Split, ops_of, view

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
        edit.drop_unused(gm)
        return count

    def _split(self, gm: fx.GraphModule, op: GroupedLinear, fused: Param, halves: tuple[list[Op], list[Op]]) -> None:
        rows = tensor_of(gm, fused.fqn).detach().chunk(2, 1)
        for name, own, outputs in zip(_HALVES, rows, halves, strict=True):
            held = torch.nn.Parameter(own, requires_grad=False)
            weight = edit.add_tensor(gm, op, fused.fqn.removesuffix(_FUSED) + name, held, by=self.name)
            made = edit.insert(gm, op, ops.grouped_linear, op.x, weight, op.offsets, by=self.name)
            for output in outputs:
                edit.bypass(gm, output, made)


def _taken(gm: fx.GraphModule, fused: Param) -> bool:
    return any(edit.has_tensor(gm, fused.fqn.removesuffix(_FUSED) + name) for name in _HALVES)


def _halves(op: GroupedLinear) -> tuple[list[Op], list[Op]] | None:
    """The readers of the first and of the second half of the output, if all it is read for is these halves."""
    width = op.val.shape[-1]
    halves: tuple[list[Op], list[Op]] = ([], [])
    for user in op.users:
        match user:
            case Split(_, int(size), -1 | 1) if size * 2 == width:
                for item in user.node.users:
                    if item.target is not operator.getitem:
                        return None
                    halves[cast(int, item.args[1])].append(view(item))
            case _:
                return None
    return halves if halves[0] and halves[1] else None
