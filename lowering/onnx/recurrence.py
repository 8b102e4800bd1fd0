"""Recurrent layers as ONNX's LSTM, GRU and RNN: their weights are ``[1, gates, in]``, the gates in another order."""

from collections.abc import Collection, Mapping
from itertools import count
from typing import Any, Final, cast, final

import onnxscript
import torch
from torch import Tensor, fx, nn

from graphq.ir import edit
from graphq.ir.op_kinds import kind_of
from graphq.ir.views import Dequantize, Linear, Op, Param, Quantize, Recurrence, ops_of
from graphq.lowering.legalize import where
from graphq.runtime.ops import GATES
from graphq.state import put_tensor, same_tensors, tensor_of

_BY: Final = "onnx-form"
# Which of torch's gates ONNX has first, and so on (i f g o as i o f c; r z n as z r h).
_ORDER: Final[Mapping[str, tuple[int, ...]]] = {
    "lstm": (0, 3, 1, 2),
    "gru": (1, 0, 2),
    "rnn_tanh": (0,),
    "rnn_relu": (0,),
}
_library = torch.library.Library("graphq", "FRAGMENT")
_library.define(
    "onnx_recurrence(Tensor x, Tensor w, Tensor r, Tensor? b, Tensor hidden, Tensor? cell, str kind, bool reverse)"
    " -> (Tensor output, Tensor hidden, Tensor cell)"
)


def _onnx_recurrence_fake(
    x: Tensor, w: Tensor, r: Tensor, b: Tensor | None, hidden: Tensor, cell: Tensor | None, kind: str, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    output = x.new_empty(*x.shape[:2], hidden.shape[-1])
    return output, torch.empty_like(hidden), torch.empty_like(hidden)


torch.library.register_fake("graphq::onnx_recurrence", _onnx_recurrence_fake, lib=_library)
onnx_recurrence = torch.ops.graphq.onnx_recurrence.default  # exists in traces alone: ONNX has the kernel
op18: Any = onnxscript.opset18


def hold_floats(gm: fx.GraphModule, kinds: Collection[str]) -> tuple[str, ...]:
    """The weights of recurrences of these ``kinds`` are floats, which their codes stand for, where activations are
    quantized anywhere in the graph; the layers that they are of.
    """
    if not any(isinstance(op, Quantize) for op in ops_of(gm)):
        return ()
    layers: dict[str, None] = {}
    made: dict[Op, Op] = {}
    for op in ops_of(gm):
        if not isinstance(op, Recurrence) or kind_of(op) not in kinds:
            continue
        for reader in (op.gates, op):
            weight = reader.weight if isinstance(reader, Linear | Recurrence) else None
            if not isinstance(weight, Dequantize) or not isinstance(weight.codes, Param):
                continue
            if weight not in made:
                name = f"{weight.codes.fqn}_float"
                made[weight] = edit.add_tensor(gm, weight, name, _decoded(gm, weight), by=_BY)
            layers[where(reader)] = None
            edit.redirect(reader, weight, made[weight], by=_BY)
    edit.drop_unused(gm)
    return tuple(layers)


def _decoded(gm: fx.GraphModule, weight: Dequantize) -> Tensor:
    held = [
        tensor_of(gm, part.fqn) if isinstance(part, Param) else None
        for part in (weight.codes, weight.scale, weight.zero_point, weight.global_scale)
    ]
    return Dequantize.target(*held, weight.format, list(weight.block), weight.dtype)


def spell_recurrences(gm: fx.GraphModule) -> None:
    """Every recurrence is an ``onnx_recurrence``, with the linear that gives its gates in it."""
    spelling = _Spelling(gm)
    for op in ops_of(gm):
        if isinstance(op, Recurrence):
            spelling.spell(op)
    edit.drop_unused(gm)


@final
class _Spelling:
    """Weights in ONNX's order, each made once."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self._first = same_tensors(gm)
        self._held: dict[tuple[str, str], Tensor] = {}  # tied weights stay one
        self._made: dict[Op, Op] = {}

    def spell(self, op: Recurrence) -> None:
        linear = op.gates if isinstance(op.gates, Linear) and op.gates.users == [op] else None
        if linear is None:  # ONNX multiplies gates, too: by one
            size = int(op.gates.val.shape[-1])
            name = next(n for i in count() if not edit.has_tensor(self.gm, n := f"constants.identity_{i}"))
            ones = torch.eye(size, dtype=op.gates.val.dtype)
            x, w, b_ih = op.gates, edit.add_tensor(self.gm, op, name, ones, by=_BY), None
        else:
            x, w, b_ih = linear.input, linear.weight, linear.bias
        weights = [self._ordered(weight, op) for weight in (w, op.weight)]
        bias = self._bias(op, b_ih)
        edit.replace(self.gm, op, onnx_recurrence, x, *weights, bias, op.hidden, op.cell, op.kind, op.reverse, by=_BY)

    def _ordered(self, weight: Op, op: Recurrence) -> Op:
        """``weight`` as ONNX has it: as it is held, where only recurrences read it, else computed."""
        if weight in self._made:
            return self._made[weight]
        parts = (weight.codes, weight.scale, weight.zero_point) if isinstance(weight, Dequantize) else (weight,)
        own = [part for part in parts if isinstance(part, Param)]
        whole_rows = not isinstance(weight, Dequantize) or weight.block[0] in (-1, 1)
        if len(own) < len([p for p in parts if p is not None]) or not whole_rows or not _is_own(weight, own, op.kind):
            index = edit.add_tensor(self.gm, op, self._free(f"{op.node.name}_order"), _rows(op), by=_BY)
            picked = edit.insert(self.gm, op, torch.ops.aten.index_select.default, weight, 0, index, by=_BY)
            return edit.insert(self.gm, op, torch.ops.aten.unsqueeze.default, picked, 0, by=_BY)
        for part in own:
            tensor = tensor_of(self.gm, part.fqn)
            key = (self._first.get(part.fqn, part.fqn), op.kind)
            if key not in self._held:
                self._held[key] = (tensor[_rows(op)] if len(tensor) > 1 else tensor)[None].contiguous()
            held = self._held[key]
            put_tensor(self.gm, part.fqn, nn.Parameter(held, False) if isinstance(tensor, nn.Parameter) else held)
            part.node.meta["val"] = edit.fake_mode_of(self.gm).from_tensor(held.detach(), static_shapes=True)
        made = weight
        if isinstance(weight, Dequantize):
            block = [-1, *weight.block]
            rest = (weight.scale, weight.zero_point, weight.global_scale, weight.format, block, weight.dtype)
            made = edit.insert(self.gm, weight, Dequantize.target, weight.codes, *rest, by=_BY)
        self._made[weight] = made
        return made

    def _bias(self, op: Recurrence, b_ih: Op | None) -> Op | None:
        """Both biases, one behind the other: ``[1, 2 * gates]``."""
        given = (b_ih, op.bias)
        if given == (None, None):
            return None
        rows = _rows(op)
        if all(part is None or isinstance(part, Param) for part in given):
            held = [part.fqn for part in given if isinstance(part, Param)]
            empty = torch.zeros_like(tensor_of(self.gm, held[0]).detach())
            tensors = [empty if p is None else tensor_of(self.gm, cast(Param, p).fqn).detach()[rows] for p in given]
            whole = nn.Parameter(torch.cat(tensors)[None], requires_grad=False)
            name = self._free(held[0].replace("bias_ih", "bias") if "bias_ih" in held[0] else f"{held[0]}_both")
            return edit.add_tensor(self.gm, op, name, whole, by=_BY, of=held[0])
        index = edit.add_tensor(self.gm, op, self._free(f"{op.node.name}_order"), rows, by=_BY)
        zeros = torch.zeros(len(rows), dtype=op.hidden.val.dtype)
        parts: list[Op] = []
        for part in given:
            part = part or edit.add_tensor(self.gm, op, self._free(f"{op.node.name}_no_bias"), zeros, by=_BY)
            parts.append(edit.insert(self.gm, op, torch.ops.aten.index_select.default, part, 0, index, by=_BY))
        whole_op = edit.insert(self.gm, op, torch.ops.aten.cat.default, parts, 0, by=_BY)
        return edit.insert(self.gm, op, torch.ops.aten.unsqueeze.default, whole_op, 0, by=_BY)

    def _free(self, name: str) -> str:
        candidates = (f"{name}{'_' * i}" for i in count())
        return next(c for c in candidates if not edit.has_tensor(self.gm, c))


def _rows(op: Recurrence) -> Tensor:
    """Which of torch's rows stands at each place in ONNX."""
    size = int(op.hidden.val.shape[-1])
    return torch.arange(GATES[op.kind] * size).view(-1, size)[list(_ORDER[op.kind])].flatten()


def _is_own(weight: Op, held: list[Param], kind: str) -> bool:
    """Whether ``weight``, and what it is ``held`` as, has no readers but recurrences of this kind."""
    if any(part != weight and part.users != [weight] for part in held):
        return False
    for user in weight.users:
        reader = user.users[0] if isinstance(user, Linear) and len(user.users) == 1 else user
        if not isinstance(reader, Recurrence) or reader.kind != kind:
            return False
        is_weight = reader.gates == user and user.input_op != weight if isinstance(user, Linear) else True
        if not is_weight or weight in (reader.hidden, reader.cell):
            return False
    return True


def recurrence(
    x: Any, w: Any, r: Any, b: Any, hidden: Any, cell: Any, kind: str, reverse: bool
) -> tuple[Any, Any, Any]:
    """The translation of ``onnx_recurrence``."""
    axis = op18.Constant(value_ints=[0])
    first = op18.Unsqueeze(hidden, axis)
    given = {"hidden_size": int(hidden.shape[-1]), "direction": "reverse" if reverse else "forward"}
    if kind == "lstm":
        y, last, last_cell = op18.LSTM(x, w, r, b, None, first, op18.Unsqueeze(cell, axis), **given)
        return _rest(y), op18.Squeeze(last, axis), op18.Squeeze(last_cell, axis)
    if kind == "gru":
        y, last = op18.GRU(x, w, r, b, None, first, linear_before_reset=1, **given)
    else:
        y, last = op18.RNN(x, w, r, b, None, first, activations=["Relu" if kind == "rnn_relu" else "Tanh"], **given)
    last = op18.Squeeze(last, axis)
    return _rest(y), last, last


def _rest(y: Any) -> Any:
    """The states after each step without the axis of directions."""
    return op18.Squeeze(y, op18.Constant(value_ints=[1]))
