"""What attention reads is quantized: queries, keys and values as they enter it, and the weights of its softmax.

softmax(Q(q) @ Q(k)^T * scale + mask) @ Q(v), and with the softmax's weights Q(p) @ Q(v), as attention kernels of 8 bits
compute it (SageAttention, arXiv 2410.02367, section 3; FlashAttention-3, arXiv 2407.08608, section 3.3).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, cast, final

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphq import numerics
from graphq.ir import edit
from graphq.ir.effect_table import effect
from graphq.ir.effects import Attends, Copies, Moves
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.units import module_of
from graphq.ir.views import Dequantize, Op, ops_of, view
from graphq.observers.observer import ObserverRequest
from graphq.passes.decompose import attention_parts
from graphq.passes.quantize_cache import Note, State
from graphq.spec.attention import AttentionOperands
from graphq.spec.quant import Quant

_OPERANDS: Final = {"q": "query", "k": "key", "v": "value"}
_KEPT: Final = (Copies(), Moves("reshape"), Moves("repeat"))


@final
@dataclass(frozen=True)
class QuantizeAttention(Pass):
    """Every attention reads its ``operands`` quantized and dequantized: keys and values before they are repeated over
    the heads of queries. With ``p`` it stands as its parts; the range of a softmax, 0 to 1, needs no calibration.

    Keys and values that are quantized already, as a cache holds them, are left alone. ``note`` is told of operands with
    a static scale of which calibration saw a single number.
    """

    operands: AttentionOperands
    note: Note = None
    name: ClassVar[str] = "quantize-attention"

    def observer_requests(self, gm: fx.GraphModule) -> Iterator[ObserverRequest]:
        """An observer of every query, key and value whose scales are static."""
        seen = set[tuple[Op, Quant]]()
        for op in _attentions(gm):
            for _, state, quant in self._float_ones(op):
                is_known = (state.x, quant) in seen or state.observer(gm, quant) is not None
                if not quant.dynamic and not is_known:
                    seen.add((state.x, quant))
                    yield state.request(quant, op)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        made: dict[tuple[Op, Quant], Op] = {}
        changes = 0
        for op in _attentions(gm):
            for reader, state, quant in list(self._float_ones(op)):
                if (state.x, quant) not in made:
                    after = edit.following(state.x)
                    made[state.x, quant] = state.quantized(gm, quant, after, self.name, self.note)
                edit.redirect(reader, state.x, made[state.x, quant], by=self.name)
                changes += 1
            changes += self.operands.p is not None and self._quantize_weights(gm, op, self.operands.p)
        if changes:
            edit.drop_unused(gm)
        return changes

    def _float_ones(self, op: Op) -> Iterator[tuple[Op, State, Quant]]:
        """The operands of an attention that are to be quantized, and are not: who reads each, what it is, and how."""
        for name, quant in self.operands.given():
            if name in _OPERANDS:
                reader, x = _source(op, view(op.argument(_OPERANDS[name])))
                if not _is_quantized(x):
                    block = numerics.state_block(quant.granularity, quant.dynamic, x.val.dim(), 0, x.val.dim() - 2)
                    yield reader, State(x, module_of(op), _OPERANDS[name], tuple(block)), quant

    def _quantize_weights(self, gm: fx.GraphModule, op: Op, quant: Quant) -> bool:
        product = attention_parts(gm, op, self.name)
        if product is None:  # it drops at random
            return False
        weights = view(cast(fx.Node, product.node.args[0]))
        rank = weights.val.dim()
        block = numerics.state_block(quant.granularity, quant.dynamic, rank, 0, rank - 2)
        state = State(weights, module_of(op), "probability", tuple(block))
        if quant.dynamic:
            read = state.quantized(gm, quant, product, self.name)
        else:
            whole = State(weights, state.path, state.role, (-1,) * rank)
            read = whole.quantized(gm, quant, product, self.name, ends=(0.0, 1.0))
        edit.redirect(product, weights, read, by=self.name)
        edit.bypass(gm, op, product)
        for view_op in ops_of(gm):  # parts lay out what they give otherwise than the whole did
            if view_op.node.target is torch.ops.aten.view.default:
                edit.replace(gm, view_op, torch.ops.aten.reshape.default, *view_op.node.args, by=self.name)
        return True


def _attentions(gm: fx.GraphModule) -> list[Op]:
    return [op for op in ops_of(gm) if isinstance(effect(op), Attends)]


def _source(op: Op, x: Op) -> tuple[Op, Op]:
    """What an operand is before its heads are repeated, and who reads that."""
    reader, best = op, x
    at, read = op, x
    while effect(read) in _KEPT:
        at, read = read, view(read.node.all_input_nodes[0])
        same = read.val.dim() == x.val.dim() and all(
            statically_known_true(a == b)
            for a, b in zip((read.val.shape[0], *read.val.shape[-2:]), (x.val.shape[0], *x.val.shape[-2:]), strict=True)
        )
        if same:
            reader, best = at, read
    return reader, best


def _is_quantized(x: Op) -> bool:
    """Whether it is dequantized, or joined of such and what a cache held."""
    if isinstance(x, Dequantize):
        return True
    if x.node.target is not torch.ops.aten.cat.default:
        return False
    tensors = x.argument("tensors")
    return any(isinstance(view(node), Dequantize) for node in tensors)
