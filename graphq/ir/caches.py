"""The caches that a graph appends to: what is put behind each, and how attention reads it.

A cache is a declared pair of an input and an output, found by node. What its tokens are, keys or values, follows from
the product that reads them: keys are compared with queries, values are summed by the weights of a softmax.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, cast, final

import torch
from torch import fx

from graphq.capture.source import BATCH, PAST, source_of
from graphq.ir.effect_table import effect
from graphq.ir.effects import AddsProduct, Attends, Contracts, Copies, Joins, Moves, Observes, ReadsShape, Scales
from graphq.ir.index import GraphIndex
from graphq.ir.units import module_of
from graphq.ir.views import Dequantize, Op, view

Role = Literal["key", "value", "state"]
aten = torch.ops.aten
_SOFTMAX: Final = (aten.softmax.int, aten._softmax.default)


@final
@dataclass(frozen=True)
class Cache:
    """One cache that grows by what is computed: ``present`` is ``past`` with ``new`` behind it along ``token_axis``.

    ``path``: the module that appends to it; ``role``: ``state`` where no attention tells keys from values.
    """

    past: Op
    present: Op
    new: Op
    token_axis: int
    batch_axis: int
    role: Role
    path: str

    @property
    def name(self) -> str:
        return f"{self.path}.{self.role}"


def caches(gm: fx.GraphModule) -> Iterator[Cache | tuple[str, str]]:
    """The caches of a graph or a part of one in the order that they are declared in; of one that cannot be told by its
    tokens, the name of its input and the reason.
    """
    index = GraphIndex(gm)
    pasts = {past: present for present, past in index.caches.items()}
    declared = {one.name: one for one in source_of(gm).inputs}
    nodes = {name: node for node, name in index.input_names.items()}
    for pair in source_of(gm).caches:
        past = nodes.get(pair.past)
        if past is None:  # in another part
            continue
        if past not in pasts:
            yield pair.past, "what it becomes is another output, too"
            continue
        found = _appended(view(past), view(pasts[past]), declared[pair.past].shape)
        yield (pair.past, found) if isinstance(found, str) else found


def _appended(past: Op, present: Op, shape: tuple[int | str, ...]) -> Cache | str:
    if not isinstance(effect(present), Joins) or present.node.target is not aten.cat.default:
        return "the model does more with it than to append to it"
    tensors = present.argument("tensors")
    others = [user for user in past.users if user != present and not isinstance(effect(user), ReadsShape)]
    if len(tensors) != 2 or tensors[0] is not past.node or tensors[1] is past.node or others:
        return "the model does more with it than to append to it"
    axis = int(present.argument("dim")) % past.val.dim()
    if PAST in shape and shape.index(PAST) != axis:
        return "it grows along another axis than its tokens'"
    if not past.val.is_floating_point():
        return f"it holds {str(past.val.dtype).removeprefix('torch.')}"
    batch = shape.index(BATCH) if BATCH in shape else 0
    if past.val.dim() < 3 or batch == axis:
        return f"its {past.val.dim()} axes are not those of a batch, tokens and channels"
    return Cache(past, present, view(tensors[1]), axis, batch, _role(present), module_of(present))


def _role(present: Op) -> Role:
    seen: dict[Op, None] = {present: None}
    pending = [present]
    while pending:
        op = pending.pop(0)
        for user in op.users:
            match effect(user):
                case Attends():
                    read = [name for name in ("key", "value") if user.argument(name) is op.node]
                    if len(read) == 1:
                        return "key" if read == ["key"] else "value"
                case Contracts():
                    first, second = map(view, cast(tuple[fx.Node, ...], user.node.args[:2]))
                    return "value" if second == op and _is_of_softmax(first) else "key"
                case AddsProduct() if user.node.args[0] is not op.node:
                    return "key"
                case Copies() | Moves() | Observes() | Scales():
                    if user not in seen:
                        seen[user] = None
                        pending.append(user)
                case _ if isinstance(user, Dequantize) or user.node.target is torch.ops.graphq.quantize.default:
                    if user not in seen:
                        seen[user] = None
                        pending.append(user)
                case _:
                    pass
    return "state"


def _is_of_softmax(op: Op) -> bool:
    while isinstance(effect(op), Copies | Moves):
        op = view(op.node.all_input_nodes[0])
    return op.node.target in _SOFTMAX
