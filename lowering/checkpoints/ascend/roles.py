"""Which layers are row-parallel: those that a server splits along their inputs among its ranks, and sums.

Read from the graph: what such a layer reads is made, element by element, from outputs of other layers of its block,
which are split along their outputs. Norms, embeddings and residual sums are whole on every rank (Megatron-LM,
arXiv:1909.08053, section 3).
"""

from collections.abc import Iterator

from torch import fx

from graphq.ir.effect_table import effect
from graphq.ir.effects import (
    Attends,
    Contracts,
    Gathers,
    LooksUp,
    MixesAxis,
    Moves,
    Normalizes,
    Opaque,
    Pads,
    ReadsShape,
    Reduces,
    Scatters,
)
from graphq.ir.views import Dequantize, Input, Op, Param, Quantize, Weighted, view
from graphq.lowering.checkpoints.layers import weight_uses
from graphq.lowering.experts import expert_linears


def row_parallel(form: fx.GraphModule) -> frozenset[str]:
    """The names of the quantized layers of a checkpoint's form that are row-parallel."""
    split: dict[Op, bool] = {}
    found: set[str] = set()
    for _, weight, x in weight_uses(form):
        if x not in split:
            split[x] = is_row_parallel(x)
        if split[x]:
            found.add(str(weight.codes.node.target).removesuffix(".weight"))
    return frozenset(found)


def is_row_parallel(x: Op) -> bool:
    """Whether a layer that reads ``x`` is split along its inputs."""
    layers = 0
    pending, seen = [x], {x}
    while pending:
        op = pending.pop()
        if isinstance(op, Input | Param):
            continue
        if op.node.target is expert_linears or (isinstance(op, Weighted) and not isinstance(effect(op), LooksUp)):
            layers += 1
            continue
        if isinstance(effect(op), Normalizes | Reduces | MixesAxis | LooksUp):
            return False
        for behind in map(view, _behind(op)):
            if behind not in seen:
                seen.add(behind)
                pending.append(behind)
    return layers > 0


def _behind(op: Op) -> Iterator[fx.Node]:
    """What the elements of a row come from."""
    match effect(op):
        case _ if isinstance(op, Dequantize | Quantize):
            yield op.node.all_input_nodes[0]
        case Attends():
            yield op.argument("value")
        case Contracts():
            yield from op.node.all_input_nodes[1:]
        case Gathers() | Moves() | Pads():
            yield op.node.all_input_nodes[0]
        case Scatters(source=source):
            yield op.node.all_input_nodes[0] if source is None else op.argument(source)
        case Opaque():
            yield from op.node.all_input_nodes[:1]
        case ReadsShape():
            pass
        case _:
            yield from op.node.all_input_nodes
