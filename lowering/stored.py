"""Float parameters as artifacts hold them: in the dtype of the source's weights, and cast where they are used.

A cast is a node of the graph, right in front of the op that reads it: at no time is more than one parameter held twice.
An embedding's rows are looked up first. The values are those of the QDQ form, exactly: a parameter that the narrower
dtype does not hold keeps its own.
"""

import torch
from torch import Tensor, fx, nn

from graphq.capture.source import source_of, stored_dtype
from graphq.ir import edit
from graphq.ir.views import Embedding, Param, ops_of
from graphq.state import held_tensor, put_tensor, same_tensors, tensor_of

_BY = "hold-stored"


def stored(gm: fx.GraphModule, fqn: str) -> Tensor:
    """The parameter or buffer of this name, as an artifact holds it."""
    return narrowed(tensor_of(gm, fqn), stored_dtype(source_of(gm), fqn, held_tensor(gm, fqn)))


def narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype`` where that holds its numbers."""
    if dtype == tensor.dtype:
        return tensor
    narrow = tensor.detach().to(dtype)
    return nn.Parameter(narrow, requires_grad=False) if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def hold_stored(gm: fx.GraphModule) -> None:
    """``gm`` holds its float parameters in the dtype of the source's weights; what it computes stays."""
    first = same_tensors(gm)  # found before any is freed, whose place in memory another may take
    narrow: dict[str, Tensor] = {}  # tied tensors stay one
    for op in ops_of(gm):
        if not isinstance(op, Param):
            continue
        name = first.get(op.fqn, op.fqn)
        held = narrow[name] if name in narrow else stored(gm, op.fqn)
        if held.dtype == op.val.dtype:
            continue
        narrow[name] = held
        _hold(gm, op, held)


def _hold(gm: fx.GraphModule, op: Param, held: Tensor) -> None:
    """``op`` reads ``held``, and its readers what they read before."""
    dtype = op.val.dtype
    put_tensor(gm, op.fqn, held)
    op.node.meta["val"] = edit.fake_mode_of(gm).from_tensor(held.detach(), static_shapes=True)
    for user in op.users:
        if isinstance(user, Embedding) and user.weight_op == op:
            _cast_rows(gm, user, dtype)
        else:
            cast = edit.insert(gm, user, torch.ops.aten.to.dtype, op, dtype, by=_BY)
            user.node.replace_input_with(op.node, cast.node)


def _cast_rows(gm: fx.GraphModule, op: Embedding, dtype: torch.dtype) -> None:
    readers = op.users
    op.node.meta["val"] = op.val.to(op.weight_op.val.dtype)
    cast = edit.insert(gm, edit.following(op), torch.ops.aten.to.dtype, op, dtype, by=_BY, like=op)
    for reader in readers:
        reader.node.replace_input_with(op.node, cast.node)
