"""Recurrent layers as linears of their inputs and recurrences of their states, so that each weight is a layer.

``torch.nn.LSTM``, ``GRU`` and ``RNN`` compute W_ih x + b_ih for all steps before the first (their documentation has the
equations); only W_hh h + b_hh waits for the state. Cells are one step of that.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, cast, final

import torch
from torch import fx

from graphq.ir import edit
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Linear, Op, Recurrence, ops_of, view
from graphq.runtime.ops import GATES

aten = torch.ops.aten
_KINDS: Final[Mapping[object, str]] = {
    aten.lstm.input: "lstm",
    aten.gru.input: "gru",
    aten.rnn_tanh.input: "rnn_tanh",
    aten.rnn_relu.input: "rnn_relu",
}
_CELLS: Final[Mapping[object, str]] = {
    aten.lstm_cell.default: "lstm",
    aten.gru_cell.default: "gru",
    aten.rnn_tanh_cell.default: "rnn_tanh",
    aten.rnn_relu_cell.default: "rnn_relu",
}


@final
@dataclass(frozen=True)
class RaiseRecurrent(Pass):
    """Each direction of each layer of an LSTM, GRU or RNN is a linear and a ``graphq::recurrence``; so is a cell.

    LSTMs with projections stay, and what drops elements between layers at random.
    """

    name: ClassVar[str] = "raise-recurrent"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = 0
        for op in ops_of(gm):
            if op.node.target in _KINDS and _has_equal_parts(op):
                self._raise(gm, op, _KINDS[op.node.target])
            elif op.node.target in _CELLS:
                self._raise_cell(gm, op, _CELLS[op.node.target])
            else:
                continue
            count += 1
        if count:
            edit.drop_unused(gm)
        return count

    def _raise(self, gm: fx.GraphModule, op: Op, kind: str) -> None:
        batch_first, directions = bool(op.argument("batch_first")), 2 if op.argument("bidirectional") else 1
        given = op.argument("hx")
        states = [view(node) for node in (given if isinstance(given, list | tuple) else [given])]
        x = view(op.argument("input"))
        x = self._insert(gm, op, aten.transpose.int, x, 0, 1) if batch_first else x
        last: list[list[Op]] = [[] for _ in states]
        number = 0
        parts = _parts(op)
        for _ in range(int(op.argument("num_layers"))):
            outputs: list[Op] = []
            for direction in range(directions):
                first = [self._first(gm, op, state, number) for state in states]
                output, *after = self._step(gm, op, kind, x, next(parts), first, reverse=direction == 1)
                outputs.append(output)
                for held, state in zip(last, after, strict=False):
                    held.append(state)
                number += 1
            x = outputs[0] if directions == 1 else self._insert(gm, op, aten.cat.default, outputs, -1)
        y = self._insert(gm, op, aten.transpose.int, x, 0, 1) if batch_first else x
        for reader in op.users:
            index = int(cast(Any, reader.node.args[1]))
            new = y if index == 0 else self._insert(gm, op, aten.stack.default, last[index - 1], 0)
            edit.bypass(gm, reader, new)

    def _first(self, gm: fx.GraphModule, op: Op, state: Op, number: int) -> Op:
        """The state that a direction of a layer begins with: zeros of their own, or one of those that are given."""
        if state.node.target is aten.zeros.default:
            sizes = list(cast(Any, state.node.args[0]))[1:]
            return edit.insert(gm, op, aten.zeros.default, sizes, by=self.name, options=state.node.kwargs)
        return self._insert(gm, op, aten.select.int, state, 0, number)

    def _raise_cell(self, gm: fx.GraphModule, op: Op, kind: str) -> None:
        """The step of a cell, as a sequence of one."""
        given = op.argument("hx")
        states = [view(node) for node in (given if isinstance(given, list | tuple) else [given])]
        names = ("w_ih", "w_hh", "b_ih", "b_hh")
        weights = tuple(None if op.argument(name) is None else view(op.argument(name)) for name in names)
        x = self._insert(gm, op, aten.unsqueeze.default, view(op.argument("input")), 0)
        _, *after = self._step(gm, op, kind, x, weights, states, reverse=False)
        if kind != "lstm":
            edit.bypass(gm, op, after[0])
            return
        for reader in op.users:
            edit.bypass(gm, reader, after[int(cast(Any, reader.node.args[1]))])

    def _step(
        self,
        gm: fx.GraphModule,
        op: Op,
        kind: str,
        x: Op,
        weights: Sequence[Op | None],
        states: Sequence[Op],
        reverse: bool,
    ) -> tuple[Op, ...]:
        """One direction of one layer of ``x[time, batch, in]``: its output, and its states after the last step."""
        w_ih, w_hh, b_ih, b_hh = weights
        gates = self._insert(gm, op, Linear.target, x, w_ih, *(() if b_ih is None else (b_ih,)))
        cell = states[1] if kind == "lstm" else None
        made = self._insert(gm, op, Recurrence.target, gates, w_hh, b_hh, states[0], cell, kind, reverse)
        return edit.items(gm, made, 1 + len(states), by=self.name)

    def _insert(self, gm: fx.GraphModule, op: Op, target: Any, *args: Any) -> Op:
        return edit.insert(gm, op, target, *args, by=self.name)


def _has_equal_parts(op: Op) -> bool:
    """Whether each layer and direction has as many weights as an LSTM without projection, and none is dropped."""
    per_part = 4 if op.argument("has_biases") else 2
    count = int(op.argument("num_layers")) * (2 if op.argument("bidirectional") else 1) * per_part
    drops = bool(op.argument("train")) and float(op.argument("dropout")) > 0
    return len(op.argument("params")) == count and not drops


def _parts(op: Op) -> Iterator[tuple[Op | None, ...]]:
    """W_ih, W_hh, b_ih and b_hh of each layer and direction, in order."""
    params = [view(node) for node in op.argument("params")]
    step = 4 if op.argument("has_biases") else 2
    for first in range(0, len(params), step):
        yield (*params[first : first + step], *[None] * (4 - step))


assert set(_KINDS.values()) == set(_CELLS.values()) == set(GATES), "each kind has its gates"
