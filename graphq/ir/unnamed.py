"""Parameters that are multiplied with an activation, but that no rule can name: computed weights, and ops that are no
layers here.
"""

from collections.abc import Sequence
from typing import Any, Final, cast

from torch import fx
from torch._ops import OpOverload

from graphq.capture.source import source_of
from graphq.ir.index import GraphIndex
from graphq.ir.layers import layer_path, sites
from graphq.ir.products import FORMS, from_inputs, is_moved, is_weight, matrix_of, readers_of
from graphq.ir.views import Op, Param, Weighted, ops_of, view
from graphq.spec.match import Layer, Unnamed

_FACTORS: Final = frozenset(
    f"aten.{name}"
    for name in (
        *("matmul", "mm", "bmm", "mv", "addmm", "addmv", "baddbmm", "addbmm", "einsum", "tensordot", "inner"),
        *("lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"),
        *("conv_tbc", "convolution", "bilinear", "_trilinear", "_embedding_bag", "_grouped_mm"),
        "scaled_dot_product_attention",
    )
)
_ADDED: Final = {
    **dict.fromkeys(("aten.addmm", "aten.addmv", "aten.baddbmm", "aten.addbmm"), "self"),
    **{f"aten.{kind}{cell}": "hx" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu") for cell in ("", "_cell")},
    "aten.scaled_dot_product_attention": "attn_mask",
}
_FROM_LEFT: Final = ("aten.matmul", "aten.mm", "aten.bmm", "aten.linear")


def unnamed(gm: fx.GraphModule) -> tuple[Unnamed, ...]:
    """Each such parameter, in graph order."""
    named = {site.param.fqn for site in sites(gm)}
    index = GraphIndex(gm)
    computed = from_inputs(gm)
    parts = _parameters_in(gm, computed)
    source = source_of(gm)
    found: dict[str, Unnamed] = {}
    for op in ops_of(gm):
        factors = _factors(op)
        if computed.isdisjoint(factors):
            continue
        for node in factors:
            read = [node]
            if node in computed and isinstance(op, Weighted) and node is op.weight_op.node:
                read = _moved(op.weight_op).node.all_input_nodes  # a weight that an activation has a part in
            for param in (param for part in read for param in parts.get(part, ())):
                if param.fqn not in named:
                    path = layer_path(param.fqn)
                    shape = tuple(int(size) for size in param.val.shape)
                    layer = Layer(path, "linear", shape, source.block_of(path))
                    reason = _reason(index, op, view(node), param, node in computed)
                    found.setdefault(path, Unnamed(layer, f"{reason}; no rule can name it"))
    return tuple(found.values())


def _moved(op: Op) -> Op:
    """What ``op`` only moves."""
    while is_moved(op):
        op = view(op.node.all_input_nodes[0])
    return op


def _name(op: Op) -> str:
    """The op's name without its overload; empty for what is no op of torch's."""
    target = op.node.target
    return ".".join(str(target).split(".")[:2]) if isinstance(target, OpOverload) else ""


def _factors(op: Op) -> list[fx.Node]:
    """What an op multiplies: of all it reads, not what it only adds, or begins with. Nothing for other ops."""
    if isinstance(op, Weighted):
        return [op.input_op.node, op.weight_op.node]
    if _name(op) not in _FACTORS:
        return []
    added = _ADDED.get(_name(op))
    begun = op.argument(added) if added is not None else ()
    left_out = cast(Sequence[Any], begun) if isinstance(begun, list | tuple) else (begun,)
    return [node for node in op.node.all_input_nodes if node not in left_out]


def _parameters_in(gm: fx.GraphModule, computed: set[fx.Node]) -> dict[fx.Node, tuple[Param, ...]]:
    """The parameters of two or more axes that each node is made of, for nodes that no activation has a part in."""
    found: dict[fx.Node, tuple[Param, ...]] = {}
    for op in ops_of(gm):
        if isinstance(op, Param):
            found[op.node] = (op,) if is_weight(gm, op) and op.val.dim() >= 2 else ()
        elif op.node not in computed:
            read = (param for node in op.node.all_input_nodes for param in found.get(node, ()))
            found[op.node] = tuple(dict.fromkeys(read))
    return found


def _reason(index: GraphIndex, op: Op, factor: Op, param: Param, is_computed: bool) -> str:
    """What multiplies by a parameter, and why ``fold-weights`` and ``raise-linear`` leave that."""
    how, rank = f"multiplied by {_name(op)}", param.val.dim()
    others = [node for node in op.node.all_input_nodes if node is not factor.node]
    if matrix_of(factor) is None:
        how += f" behind {_name(_moved(factor)) or 'what computes with it'}"
        how += ", which the input has a part in" if is_computed else ""
    elif op.node.target not in FORMS:
        pass
    elif _name(op) in _FROM_LEFT and op.node.args[0] is factor.node:
        how += " from the left"
    elif rank != 2:
        how += f" as a tensor of {rank} axes"
    elif others and view(others[-1]).val.dim() < 2:
        how += " with a vector"
    elif len(readers_of(index.reads(param.fqn))) > 1:
        how += " and read elsewhere, too"
    return how
