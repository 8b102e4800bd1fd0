"""Layers that runtimes compute as one, read from the graph."""

from collections.abc import Iterable, Mapping

from graphq.ir.layers import Site
from graphq.ir.views import Op
from graphq.spec.match import Layer


def fused_layers(sites: Iterable[Site], layers: Mapping[str, Layer]) -> list[tuple[str, ...]]:
    """The layers that servers fuse, each group in graph order: linears of one module that read the same value (q, k and
    v; gate and up), and all experts of a module. Routers, and layers that are fused with none, stand alone.
    """
    fused: dict[tuple[Op | str | None, str], dict[str, None]] = {}
    for site in sites:
        for fqn in site.fqns:
            parts = fqn.split(".")
            module = ".".join(parts[:-2] if site.is_stack else parts[:-1])
            alone = layers[fqn].named_only == "router"
            key = (fqn if alone else None if site.is_stack else site.op.input_op, module)
            fused.setdefault(key, {})[fqn] = None
    return [tuple(members) for members in fused.values()]
