"""Experts' fused ``gate_up_proj`` as two layers, ``gate_proj`` and ``up_proj``, that rules can name apart."""

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, Final, cast, final

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
                case GroupedLinear(x, Param() as fused, offsets) if fused.fqn.rpartition(".")[2] == _FUSED:
                    cut = _halves(op)
                    if cut is None or len(fused.users) != 1:
                        continue
                    for half, outputs in enumerate(cut):
                        weight = edit.add_tensor(
                            gm,
                            op,
                            fused.fqn.removesuffix(_FUSED) + _HALVES[half],
                            _rows(gm, fused.fqn, half),
                            by=self.name,
                        )
                        made = edit.insert(gm, op, ops.grouped_linear, x, weight, offsets, by=self.name)
                        for output in outputs:
                            edit.bypass(gm, output, made)
                    count += 1
                case _:
                    pass
        edit.drop_unused(gm)
        return count


def _rows(gm: fx.GraphModule, fqn: str, half: int) -> torch.nn.Parameter:
    fused = tensor_of(gm, fqn).detach()
    size = fused.shape[1] // 2
    return torch.nn.Parameter(fused.narrow(1, half * size, size), requires_grad=False)


def _halves(op: GroupedLinear) -> tuple[list[Op], list[Op]] | None:
    """The readers of the first and of the second half of the output, if all it is read for is these halves."""
    width = cast(Any, op.val).shape[-1]
    readers: tuple[list[Op], list[Op]] = ([], [])
    for user in op.users:
        match user:
            case Split(_, size, -1 | 1) if size * 2 == width:
                for item in user.node.users:
                    if item.target is not operator.getitem or item.args[1] not in (0, 1):
                        return None
                    readers[cast(int, item.args[1])].append(view(item))
            case _:
                return None
    return readers if readers[0] and readers[1] else None
