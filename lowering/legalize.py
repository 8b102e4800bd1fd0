"""What a target can hold, checked layer by layer before anything is written."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import fx

from graphq.errors import TargetError
from graphq.ir.layers import LAYER
from graphq.ir.views import Op, ops_of


@final
@dataclass(frozen=True)
class Limits:
    """A target's name, and for each node the reason why the target cannot hold it (None if it can)."""

    target: str
    refuses: Callable[[Op], str | None]


def legalize(gm: fx.GraphModule, limits: Limits) -> None:
    """Raises ``TargetError`` with a line for every node that the target cannot hold: target, layer, reason."""
    problems = [
        f"{limits.target}: {where(op)}: {reason}" for op in ops_of(gm) if (reason := limits.refuses(op)) is not None
    ]
    if problems:
        raise TargetError("\n".join(dict.fromkeys(problems)))


def where(op: Op) -> str:
    """The layer a node belongs to, or the module of the source that it came from."""
    layer = op.node.meta.get(LAYER)
    if layer:
        return str(layer)
    stack = op.node.meta.get("nn_module_stack")
    return str(list(stack.values())[-1][0]) or op.node.name if stack else op.node.name
