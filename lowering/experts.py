"""Experts one by one: a stack's product as a linear for each expert, whose weights have names of their own.

What files hold that know no stacks: the experts' own names are those that rules use, ``<stack>.<index>.<role>``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast, final

import torch
from torch import Tensor, fx, nn

from graphq.errors import PassError
from graphq.ir import edit
from graphq.ir.layers import TURNED
from graphq.ir.views import Dequantize, GroupedLinear, Op, Param, ops_of, view
from graphq.state import as_parameter, deferred_of, held_tensor, tensor_of

_BY: Final = "split-experts"

_library = torch.library.Library("graphq", "FRAGMENT")  # held for the process: its ops vanish with it
_library.define("expert_linears(Tensor x, Tensor[] weights, Tensor offsets) -> Tensor")


def _expert_linears_fake(x: Tensor, weights: Sequence[Tensor], offsets: Tensor) -> Tensor:
    if any(w.dtype != x.dtype for w in weights):
        raise PassError(f"rows {x.dtype} for experts' weights {', '.join(sorted({str(w.dtype) for w in weights}))}")
    return x.new_empty(x.shape[0], weights[0].shape[0])


torch.library.register_fake("graphq::expert_linears", _expert_linears_fake, lib=_library)

expert_linears = torch.ops.graphq.expert_linears.default


def split_experts(gm: fx.GraphModule) -> None:
    """Every stack of experts is read as one weight for each expert, ``[N, K]``, by ``graphq::expert_linears``.

    A float stack that the source holds as ``[E, K, N]`` stays whole: files that know such a stack have it whole.
    """
    made: dict[str, Op] = {}
    turned = gm.meta.get(TURNED, frozenset())
    for op in ops_of(gm):
        if isinstance(op, GroupedLinear) and not (isinstance(op.weight, Param) and op.weight.fqn in turned):
            _split(gm, op, made)
    edit.drop_unused(gm)


@final
@dataclass(frozen=True)
class _Part:
    """Some experts of a stack: codes with scales, or a float weight."""

    op: Op
    members: list[int]


def _parts(gm: fx.GraphModule, weight: Op, experts: int) -> list[_Part]:
    """The parts that a stack's weight was joined from, each with its experts' indices."""
    order = list(range(experts))
    if weight.node.target is torch.ops.aten.index_select.default:
        joined, _, index = weight.node.args
        place = tensor_of(gm, str(cast(fx.Node, index).target)).tolist()
        order = [place.index(i) for i in range(experts)]
        weight = view(cast(fx.Node, joined))
    if weight.node.target is not torch.ops.aten.cat.default:
        return [_Part(weight, order)]
    parts: list[_Part] = []
    for node in cast(list[fx.Node], weight.node.args[0]):
        count = int(node.meta["val"].shape[0])
        parts.append(_Part(view(node), order[:count]))
        order = order[count:]
    return parts


def _member(gm: fx.GraphModule, stack: Tensor, position: int) -> Tensor:
    deferred = deferred_of(stack)
    if deferred is None:
        return stack.detach()[position].clone()
    return edit.deferred_tensor(gm, deferred.member(position), stack.dtype)


def _split(gm: fx.GraphModule, op: GroupedLinear, made: dict[str, Op]) -> None:
    """A stack's product as one linear for each expert, with weights under the experts' own names.

    ``made``: the weights of experts by name, those of a stack that is used again among them.
    """
    experts = int(op.weight.val.shape[0])
    path, _, role = str(op.node.meta.get("graphq.layer", op.node.name)).rpartition(".")
    weights: dict[int, Op] = {}
    for part in _parts(gm, op.weight, experts):
        source = part.op
        for position, expert in enumerate(part.members):
            name = f"{path}.{expert}.{role}" if path else f"{expert}.{role}"
            if name in made:
                weights[expert] = made[name]
            elif isinstance(source, Dequantize) and isinstance(source.codes, Param):
                tensors: list[Op | None] = []
                for suffix, held in (
                    ("weight", source.codes),
                    ("weight_scale", source.scale),
                    ("weight_zero_point", source.zero_point),
                    ("weight_global_scale", source.global_scale),
                ):
                    if held is None:
                        tensors.append(None)
                        continue
                    own = _member(gm, held_tensor(gm, cast(Param, held).fqn), position)
                    tensors.append(edit.add_tensor(gm, op, f"{name}.{suffix}", own, by=_BY))
                arguments = (*tensors, source.format, list(source.block)[1:], source.dtype)
                weights[expert] = made[name] = edit.insert(gm, op, Dequantize.target, *arguments, by=_BY)
            elif isinstance(source, Param):
                stack = held_tensor(gm, source.fqn)
                own = _member(gm, stack, position)
                if isinstance(stack, nn.Parameter):  # which is stored as a parameter
                    own = as_parameter(own)
                weights[expert] = made[name] = edit.add_tensor(gm, op, f"{name}.weight", own, by=_BY, of=source.fqn)
            else:  # a computed stack is cut where it is computed
                weights[expert] = edit.insert(gm, op, torch.ops.aten.select.int, source, 0, position, by=_BY)
    edit.replace(gm, op, expert_linears, op.x, [weights[e] for e in range(experts)], op.offsets, by=_BY)
