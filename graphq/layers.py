"""The layers that a rule can name, read from a graph: linears, convolutions, embeddings and experts, with their roles."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, cast, final

from torch import fx

from graphq import source
from graphq.spec import Layer, LayerKind
from graphq.views import Cast, Embedding, GroupedLinear, Linear, Op, Param, TransposedLinear, Weighted, ops_of, view

LAYER: Final = "graphq.layer"
PLAN: Final = "graphq.plan"
BY: Final = "graphq.by"


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
    """The layer that owns a parameter: ``a.b`` for ``a.b.weight``; other parameters are layers of their own name."""
    return parameter.removesuffix(".weight")


def weight_param(op: Weighted) -> Param | None:
    """The parameter that an op multiplies by, seen through casts; None for a computed weight."""
    seen = op.weight_op
    while isinstance(seen, Cast):
        seen = cast(Op, seen.self_)
    return seen if isinstance(seen, Param) else None


def sites(gm: fx.GraphModule) -> Iterator[Site]:
    """The uses of layers in graph order."""
    for op in ops_of(gm):
        if not isinstance(op, Weighted):
            continue
        param = weight_param(op)
        if param is None:
            continue
        path = layer_path(param.fqn)
        if isinstance(op, GroupedLinear):
            stack, _, role = path.rpartition(".")
            yield Site(op, param, tuple(f"{stack}.{i}.{role}" for i in range(_shape(param)[0])))
        else:
            yield Site(op, param, (path,))


def _shape(op: Op) -> tuple[int, ...]:
    return tuple(int(size) for size in op.val.shape)


def layers(gm: fx.GraphModule) -> dict[str, Layer]:
    """Every layer that a rule can name, by FQN, in graph order."""
    came_from = source.source_of(gm)
    routers = _routers(gm)
    heads = _heads(gm) if came_from.is_causal_lm else set[str]()
    found: dict[str, Layer] = {}
    for site in sites(gm):
        kind, shape = _kind(site), _layer_shape(site)
        for fqn in site.fqns:
            if fqn in found:
                continue
            block = came_from.block_of(fqn)
            named_only: Any = ""
            if kind == "embedding":
                named_only = "embedding"
            elif site.op.node in routers:
                named_only = "router"
            elif fqn in heads:
                named_only = "output head"
            elif came_from.blocks and block is None:
                named_only = "outside of the repeated blocks"
            found[fqn] = Layer(fqn, kind, shape, block, named_only)
    return found


def _kind(site: Site) -> LayerKind:
    match site.op:
        case Linear() | TransposedLinear():
            return "linear"
        case Embedding():
            return "embedding"
        case GroupedLinear():
            return "expert"
        case op:
            return "conv1d" if len(_shape(op.weight_op)) == 3 else "conv2d"


def _layer_shape(site: Site) -> tuple[int, ...]:
    shape = _shape(site.param)
    if site.is_stack:
        return shape[1:]
    return shape[::-1] if isinstance(site.op, TransposedLinear) else shape


def _routers(gm: fx.GraphModule) -> set[fx.Node]:
    """The linears whose outputs decide which rows each expert gets."""
    found: set[fx.Node] = set()
    for op in ops_of(gm):
        if isinstance(op, GroupedLinear):
            pending, seen = [cast(Op, op.offsets).node], set[fx.Node]()
            while pending:
                node = pending.pop()
                if node in seen:
                    continue
                seen.add(node)
                if isinstance(view(node), Weighted):
                    found.add(node)
                else:
                    pending.extend(node.all_input_nodes)
    return found


def _heads(gm: fx.GraphModule) -> set[str]:
    """The linears that the first output, the logits, comes from by no other layer."""
    found: set[str] = set()
    outputs = cast(Any, next(n for n in gm.graph.nodes if n.op == "output").args[0])
    pending, seen = [cast(fx.Node, outputs[0])], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        op = view(node)
        if isinstance(op, Weighted):
            param = weight_param(op)
            found |= {layer_path(param.fqn)} if param else set()
        else:
            pending.extend(node.all_input_nodes)
    return found
