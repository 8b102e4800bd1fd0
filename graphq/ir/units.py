"""A graph as units: an op with its outputs, or a chain of ops that a consumer runs as one."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

from torch import fx

from graphq.ir.effect_table import effect
from graphq.ir.effects import ReadsShape
from graphq.ir.layers import LAYER, gives_gates
from graphq.ir.op_kinds import activations_of, is_float, kind_of
from graphq.ir.views import Dequantize, Linear, Op, Quantize, Weighted, ops_of, view
from graphq.spec.profile import LINEAR

WITH_WEIGHT: Final = (LINEAR, "Conv", "ConvTranspose")


@final
@dataclass(frozen=True)
class Unit:
    """Ops that run as one: their kind (the first's), who reads what in them, and what they give."""

    kind: str
    ops: tuple[Op, ...]
    edges: tuple[tuple[Op, Op], ...]  # (reader, tensor)
    outputs: tuple[Op, ...]

    @property
    def first(self) -> Op:
        return self.ops[0]

    @property
    def name(self) -> str:
        """The layer, or the module and the kind, for people."""
        layer = self.first.node.meta.get(LAYER)
        path = module_of(self.first)
        return str(layer) if layer else f"{path}.{self.kind}" if path else self.kind

    @property
    def gives_gates(self) -> bool:
        """Whether it is the linear of a recurrence, which consumers have as one op with that."""
        return isinstance(self.first, Linear) and gives_gates(self.first)


def module_of(op: Op) -> str:
    """The path of the source's module that an op stands in; empty for the model itself."""
    stack = op.node.meta.get("nn_module_stack") or {}
    return str(next(reversed(list(stack.values())))[0]) if stack else ""


def units_of(gm: fx.GraphModule, fuses: Sequence[tuple[str, ...]]) -> list[Unit]:
    """The graph as units, chains of kinds in ``fuses`` as one each, in graph order."""
    of_data = reading_data(gm)
    ops = [op for op in ops_of(gm) if op.node.op in ("placeholder", "call_function") and not _is_part(op)]
    found = [_unit(op, of_data) for op in ops]
    by_op = {op: unit for unit in found for op in unit.ops}
    gone: set[Op] = set()
    made: list[Unit] = []
    for unit in found:
        if unit.first in gone:
            continue
        for chain in sorted(fuses, key=len, reverse=True):
            links = _chain(unit, chain, by_op, gone)
            if links is not None:
                inside = {output for link in links[:-1] for output in link.outputs}
                edges = tuple(edge for link in links for edge in link.edges if edge[1] not in inside)
                gone |= {op for link in links[1:] for op in link.ops}
                unit = Unit(unit.kind, tuple(op for link in links for op in link.ops), edges, links[-1].outputs)
                break
        made.append(unit)
    return made


def _chain(unit: Unit, chain: tuple[str, ...], by_op: Mapping[Op, Unit], gone: Collection[Op]) -> list[Unit] | None:
    """``unit`` and those after it, if they are of these kinds, nothing else reads what goes between them, and none is
    ``gone`` into another chain: of two convolutions whose sum is taken, it belongs to one.
    """
    links = [unit]
    if unit.kind != chain[0]:
        return None
    for kind in chain[1:]:
        last = links[-1]
        users = last.outputs[0].users if len(last.outputs) == 1 else []
        follower = by_op.get(users[0]) if len(users) == 1 else None
        if follower is None or follower.kind != kind or follower.first in gone:
            return None
        links.append(follower)
    return links


def _is_part(op: Op) -> bool:
    return getattr(op.node.target, "__name__", "") == "getitem"


def reading_data(gm: fx.GraphModule, or_layers: bool = False) -> set[fx.Node]:
    """The nodes whose elements depend on those of an input; others are known once the sizes are. ``or_layers``: or on
    a product with a layer's weight, which is not computed before the model runs.
    """
    found = set[fx.Node]()
    for node in gm.graph.nodes:
        is_size = isinstance(effect(view(node)), ReadsShape)
        is_first = node.op == "placeholder" or (or_layers and kind_of(view(node)) in WITH_WEIGHT)
        if is_first or (not is_size and any(read in found for read in node.all_input_nodes)):
            found.add(node)
    return found


def _unit(op: Op, of_data: set[fx.Node]) -> Unit:
    parts = tuple(user for user in op.users if _is_part(user))
    outputs = tuple(part for part in parts if is_float(part)) if parts else ((op,) if is_float(op) else ())
    kind = kind_of(op)
    inputs = list(activations_of(op)) if op.node.op == "call_function" else []
    if kind == LINEAR and isinstance(op, Weighted) and op.weight_op.node in of_data:
        kind = "MatMul" if len(op.node.all_input_nodes) == 2 else "linear"  # with a bias it is neither
        inputs = [view(node) for node in op.node.all_input_nodes]
    inputs = [x for x in inputs if not _is_quantized(x)]
    return Unit(kind, (op,), tuple((op, x) for x in inputs), outputs)


def _is_quantized(x: Op) -> bool:
    return isinstance(x, Dequantize) and isinstance(x.codes, Quantize)
