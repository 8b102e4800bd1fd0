"""Recurrences as their steps, one after the other, in ops that a consumer runs in integers.

The equations are those of ``torch.nn.LSTM``, ``GRU`` and ``RNN``, as ``graphq::recurrence`` computes them. What the
state is multiplied by is then a linear like any other, and the state an activation with a grid of its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, cast, final

import torch
from torch import fx

from graphq.ir import edit
from graphq.ir.layers import RECURRENT
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Linear, Op, Param, Recurrence, ops_of
from graphq.runtime.ops import GATES
from graphq.spec.profile import Profile

aten = torch.ops.aten
_ACTIVATIONS: Final = {"rnn_tanh": aten.tanh.default, "rnn_relu": aten.relu.default}


@final
@dataclass(frozen=True)
class UnrollRecurrent(Pass):
    """Every recurrence of a known number of steps, of not more than ``profile`` wants written out (``Profile.steps``),
    stands as these. Its weights stay layers of the kind recurrent.

    A state that begins with zeros adds nothing to the first step: no product of it is left.
    """

    profile: Profile
    name: ClassVar[str] = "unroll-recurrent"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = 0
        for op in ops_of(gm):
            if not isinstance(op, Recurrence):
                continue
            steps = op.gates.val.shape[0]
            if not isinstance(steps, int) or not 0 < steps <= self.profile.steps:
                continue
            self._keep_kinds(gm, op)
            self._unroll(gm, op, steps)
            count += 1
        if count:
            edit.drop_unused(gm)
        return count

    def _keep_kinds(self, gm: fx.GraphModule, op: Recurrence) -> None:
        """The weights of the recurrence, and of the linear that gives its gates, are recurrent whatever reads them."""
        weights = [op.weight, *([op.gates.weight] if isinstance(op.gates, Linear) else [])]
        names = {weight.fqn for weight in weights if isinstance(weight, Param)}
        gm.meta[RECURRENT] = gm.meta.get(RECURRENT, frozenset[str]()) | names

    def _unroll(self, gm: fx.GraphModule, op: Recurrence, steps: int) -> None:
        def insert(target: Callable[..., Any], *args: Any) -> Op:
            return edit.insert(gm, op, target, *args, by=self.name)

        hidden, cell = (None if state is None or _is_zero(state) else state for state in (op.hidden, op.cell))
        outputs: list[Op] = []
        for step in range(steps)[:: -1 if op.reverse else 1]:
            own = insert(aten.select.int, op.gates, 0, step)
            given = op.bias
            if hidden is not None:
                bias = () if op.bias is None else (op.bias,)
                given = insert(aten.linear.default, hidden, op.weight, *bias)
            hidden, cell = _step(insert, op.kind, own, given, hidden, cell)
            outputs.append(hidden)
        assert hidden is not None, "there is a step"
        for reader in op.users:
            match int(cast(Any, reader.node.args[1])):
                case 0:
                    in_order = outputs[::-1] if op.reverse else outputs
                    rows = [insert(aten.unsqueeze.default, output, 0) for output in in_order]
                    new = insert(aten.cat.default, rows, 0) if len(rows) > 1 else rows[0]
                case 1:
                    new = hidden
                case _:
                    new = cell or hidden
            edit.bypass(gm, reader, new)


def _step(
    insert: Callable[..., Op], kind: str, own: Op, given: Op | None, hidden: Op | None, cell: Op | None
) -> tuple[Op, Op | None]:
    """The state, and an LSTM's cell, after a step of gates ``own + given``: what the input and the state before give.

    A state that is None is zero, gates that are None are not added.
    """

    def parts(gates: Op) -> Sequence[Op]:
        size = int(gates.val.shape[-1]) // GATES[kind]
        return [insert(aten.slice.Tensor, gates, -1, i * size, (i + 1) * size) for i in range(GATES[kind])]

    def added(x: Op, y: Op | None) -> Op:
        return x if y is None else insert(aten.add.Tensor, x, y)

    match kind:
        case "lstm":
            take, forget, new, give = parts(added(own, given))
            taken = insert(aten.mul.Tensor, insert(aten.sigmoid.default, take), insert(aten.tanh.default, new))
            if cell is not None:
                taken = insert(
                    aten.add.Tensor, insert(aten.mul.Tensor, insert(aten.sigmoid.default, forget), cell), taken
                )
            shown = insert(aten.tanh.default, taken)
            return insert(aten.mul.Tensor, insert(aten.sigmoid.default, give), shown), taken
        case "gru":
            r, z, n = parts(own)
            if given is not None:
                r_state, z_state, n_state = parts(given)
                r, z = added(r, r_state), added(z, z_state)
                n = added(n, insert(aten.mul.Tensor, insert(aten.sigmoid.default, r), n_state))
            kept, new = insert(aten.sigmoid.default, z), insert(aten.tanh.default, n)
            if hidden is None:
                return insert(aten.sub.Tensor, new, insert(aten.mul.Tensor, kept, new)), None
            change = insert(aten.sub.Tensor, hidden, new)
            return insert(aten.add.Tensor, new, insert(aten.mul.Tensor, kept, change)), None
        case _:
            return insert(_ACTIVATIONS[kind], added(own, given)), None


def _is_zero(state: Op) -> bool:
    return state.node.target is aten.zeros.default
