"""The layers that a rule can name, read from a graph: whatever multiplies by a weight of its own, and their roles."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, cast, final

import torch
from torch import fx

from graphq.capture.source import source_of
from graphq.ir.views import (
    LOOKUPS,
    Cast,
    Convolution,
    ConvTranspose,
    Embedding,
    EmbeddingBag,
    GroupedLinear,
    Linear,
    Op,
    Param,
    Recurrence,
    TransposedLinear,
    Weighted,
    ops_of,
    view,
)
from graphq.spec.match import Layer, LayerKind

LAYER: Final = "graphq.layer"
PLAN: Final = "graphq.plan"
BY: Final = "graphq.by"
RECURRENT: Final = "graphq.recurrent"  # of a graph: the weights of recurrences that stand as their steps, by name
MADE_OF: Final = "graphq.made_of"  # of a graph: the parameters of the source in whose place it has others, by name
TURNED: Final = "graphq.turned"  # of a graph: the parameters that it holds with the source's last two axes swapped

PROJECTIONS: Final = frozenset(f"{name}_weight" for name in ("in_proj", "q_proj", "k_proj", "v_proj", "kv_proj"))
_NamedOnly = Literal["", "embedding", "output head", "router", "outside of the repeated blocks"]
aten = torch.ops.aten
_CONVOLUTIONS: Final[tuple[LayerKind, ...]] = ("conv1d", "conv2d", "conv3d")
_TRANSPOSED: Final[tuple[LayerKind, ...]] = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_PRODUCTS: Final = (aten.mm.default, aten.bmm.default, aten.matmul.default)


@final
@dataclass(frozen=True)
class Site:
    """One use of a layer's weight. ``fqns``: the layers it uses, one for each expert of a stack."""

    op: Weighted
    param: Param
    fqns: tuple[str, ...]

    @property
    def is_stack(self) -> bool:
        return isinstance(self.op, GroupedLinear)

    @property
    def path(self) -> str:
        """Where the layer's tensors are held: its own FQN, or that of the stack of experts."""
        return layer_path(self.param.fqn)


def layer_path(parameter: str) -> str:
    """The layer that owns a parameter: ``a.b`` for ``a.b.weight``, and for the ``a.b_weight`` of an attention's packed
    projections (torch's ``in_proj_weight``); other parameters are layers of their own name.
    """
    parent, dot, name = parameter.rpartition(".")
    return parent + dot + name.removesuffix("_weight") if name in PROJECTIONS else parameter.removesuffix(".weight")


def weight_param(op: Weighted) -> Param | None:
    """The parameter that an op multiplies by, seen through casts; None for a computed weight."""
    seen = op.weight_op
    while isinstance(seen, Cast):
        seen = seen.self_
    return seen if isinstance(seen, Param) else None


def sites(gm: fx.GraphModule) -> Iterator[Site]:
    """The uses of layers in graph order."""
    for op in ops_of(gm):
        param = weight_param(op) if isinstance(op, Weighted) else None
        if not isinstance(op, Weighted) or param is None:
            continue
        path = layer_path(param.fqn)
        if isinstance(op, GroupedLinear):
            stack, dot, role = path.rpartition(".")
            yield Site(op, param, tuple(f"{stack}{dot}{i}.{role}" for i in range(_shape(param)[0])))
        else:
            yield Site(op, param, (path,))


def _shape(op: Op) -> tuple[int, ...]:
    return tuple(int(size) for size in op.val.shape)


def layers(gm: fx.GraphModule) -> dict[str, Layer]:
    """Every layer that a rule can name, by FQN, in graph order. A weight that is used as an embedding, too, is one."""
    source = source_of(gm)
    routers = _routers(gm)
    heads = _heads(gm) if source.is_causal_lm else frozenset[str]()
    uses = list(sites(gm))
    embeddings = {site.path for site in uses if isinstance(site.op, LOOKUPS)}
    made_of: Mapping[str, tuple[str, ...]] = gm.meta.get(MADE_OF, {})
    recurrent: frozenset[str] = gm.meta.get(RECURRENT, frozenset())
    found: dict[str, Layer] = {}
    for site in uses:
        kind: LayerKind = "recurrent" if site.param.fqn in recurrent else _kind(site.op)
        kind = "embedding" if site.path in embeddings else kind
        shape = _layer_shape(site)
        for fqn in site.fqns:
            if fqn in found:
                continue
            block = source.block_of(fqn)
            named_only: _NamedOnly = ""
            if kind == "embedding":
                named_only = "embedding"
            elif site.op.node in routers:
                named_only = "router"
            elif fqn in heads:
                named_only = "output head"
            elif source.blocks and block is None:
                named_only = "outside of the repeated blocks"
            dtype = str(source.dtype if source.files else site.param.val.dtype).removeprefix("torch.")
            bias = getattr(site.op, "bias", None) is not None or isinstance(site.op, TransposedLinear)
            found[fqn] = Layer(
                fqn,
                kind,
                shape,
                block,
                named_only,
                dtype,
                bias,
                _padding(site.op),
                reads_state=isinstance(site.op, Recurrence),
                made_of=tuple(layer_path(name) for name in made_of.get(site.param.fqn, ())),
            )
    return found


def _kind(op: Weighted) -> LayerKind:
    match op:
        case Linear() if gives_gates(op):
            return "recurrent"
        case Linear() | TransposedLinear():
            return "linear"
        case Embedding() | EmbeddingBag():
            return "embedding"
        case GroupedLinear():
            return "expert"
        case Recurrence():
            return "recurrent"
        case _:
            rank = len(_shape(op.weight_op)) - 2
            return _TRANSPOSED[rank - 1] if isinstance(op, ConvTranspose) else _CONVOLUTIONS[rank - 1]


def gives_gates(op: Linear) -> bool:
    """Whether the weight multiplies a recurrent layer's input: what it gives are gates of states, and nothing else."""
    users = op.users
    return bool(users) and all(isinstance(user, Recurrence) and user.gates == op for user in users)


def _layer_shape(site: Site) -> tuple[int, ...]:
    shape = _shape(site.param)
    if site.is_stack:
        return shape[1:]
    if isinstance(site.op, ConvTranspose):
        return (shape[1] * int(site.op.groups), shape[0] // int(site.op.groups), *shape[2:])
    return shape[::-1] if isinstance(site.op, TransposedLinear) else shape


def _padding(op: Weighted) -> str:
    """The mode of a convolution's padding: one that is not by zeros is an op of its own, in the same module."""
    before = op.input_op.node
    if not isinstance(op, Convolution) or before.target != aten.pad.default or _module(before) != _module(op.node):
        return "zeros"
    mode = before.args[2] if len(before.args) > 2 else before.kwargs.get("mode", "constant")
    return "zeros" if mode == "constant" else str(mode)


def _module(node: fx.Node) -> object:
    return list((node.meta.get("nn_module_stack") or {"": None}).values())[-1]


def _routers(gm: fx.GraphModule) -> set[fx.Node]:
    """The layers whose outputs decide which rows each expert gets."""
    found: set[fx.Node] = set()
    for op in ops_of(gm):
        if isinstance(op, GroupedLinear):
            found.update(made.node for made in _origins(op.offsets.node))
    return found


def _heads(gm: fx.GraphModule) -> frozenset[str]:
    """The layers that the first output, the logits, comes from by no other layer."""
    outputs = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    params = (weight_param(op) for op in _origins(cast(tuple[fx.Node, ...], outputs)[0]))
    return frozenset(layer_path(param.fqn) for param in params if param is not None)


def _origins(node: fx.Node) -> list[Weighted]:
    """The weighted ops that ``node`` is computed from by no other product."""
    found: list[Weighted] = []
    pending, seen = [node], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        op = view(node)
        if isinstance(op, Weighted):
            found.append(op)
        elif node.target not in _PRODUCTS:
            pending.extend(node.all_input_nodes)
    return found
