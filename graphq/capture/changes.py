"""What a call of a model leaves behind in its inputs and buffers, which a graph leaves alone."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from graphq.errors import GraphError


def refuse_changes(exported: ExportedProgram, model: nn.Module, names: Sequence[str]) -> None:
    """Raises ``GraphError`` if a call of the model leaves other inputs or other buffers behind."""
    signature = exported.graph_signature
    written = _overwritten(exported)
    changed = [name.removeprefix("model.") for name in signature.buffers_to_mutate.values() if name not in written]
    inputs = list(signature.user_inputs)
    changed += [names[inputs.index(name)] for name in signature.user_inputs_to_mutate.values()]
    if changed:
        names = ", ".join(changed)
        raise GraphError(
            f"{type(model).__name__} changes {names} in place; a graph leaves its inputs and buffers alone"
        )


def _overwritten(exported: ExportedProgram) -> set[str]:
    """The buffers that each call fills anew before it reads them, so that none sees what an earlier one left.

    Frequencies of longrope are such: of the two tables the text's length chooses one, for this call.
    """
    signature, found = exported.graph_signature, set[str]()
    for node in exported.graph.find_nodes(op="placeholder"):
        name = signature.inputs_to_buffers.get(node.name)
        if name is not None and all(fills(user, node) for user in node.users):
            found.add(name)
    return found


def fills(node: fx.Node, written: fx.Node) -> bool:
    """Whether a node only puts another tensor of the same kind in the place of ``written``."""
    is_copy = node.target in (torch.ops.aten.copy.default, torch.ops.aten.copy_.default)
    if not is_copy or node.args[0] is not written or node.args[1] is written:
        return False
    a, b = written.meta["val"], cast(fx.Node, node.args[1]).meta["val"]
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
