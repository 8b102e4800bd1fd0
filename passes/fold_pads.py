"""Zeros padded in front of convolutions, as models from TensorFlow have them, in the convolutions' own padding."""

from dataclasses import dataclass
from typing import Any, ClassVar, Final, cast, final

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphq.ir import edit
from graphq.ir.op_kinds import kind_of
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Convolution, Op, ops_of, view

aten = torch.ops.aten
_WITH_SIZES: Final = {
    **{op: op for op in (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)},
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


@final
@dataclass(frozen=True)
class FoldPads(Pass):
    """A pad of zeros, as many in front of each axis as behind it, that convolutions alone read is part of their
    padding; a pad by nothing is gone. What one end alone gets stays: torch's convolutions cannot hold it.
    """

    name: ClassVar[str] = "fold-pads"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = 0
        for op in reversed(list(ops_of(gm))):  # of pads in a row, the last first
            pad = _sizes(op)
            if pad is None:
                continue
            x = view(op.node.all_input_nodes[0])
            if not any(pad):
                if _is_returned(op) or not _is_laid_out_alike(x, op):
                    continue
                edit.bypass(gm, op, x)
            else:
                wanted = [(reader, _padding(reader, op, pad)) for reader in op.users]
                if not wanted or any(padding is None for _, padding in wanted):
                    continue
                for reader, padding in wanted:
                    rest = [_given(reader, name) for name in ("weight", "bias", "stride")]
                    target = _WITH_SIZES[cast(Any, reader.node.target)]
                    dilation, groups = reader.argument("dilation"), reader.argument("groups")
                    edit.replace(gm, reader, target, x, *rest, padding, dilation, groups, by=self.name)
                gm.graph.erase_node(op.node)
            count += 1
        return count


def _sizes(op: Op) -> list[int] | None:
    """What a pad of zeros, or by nothing, adds to each end, the last axis first; None of other ops."""
    if kind_of(op) != "Pad":
        return None
    pad, value = list(op.argument("pad")), op.argument("value")
    if not all(isinstance(size, int) for size in pad):
        return None
    is_constant = op.node.target is aten.constant_pad_nd.default or op.argument("mode") == "constant"
    return pad if not any(pad) or (is_constant and not value) else None


def _padding(reader: Op, op: Op, pad: list[int]) -> list[int] | None:
    """The padding of a convolution that reads ``op`` with what ``op`` adds; None where it cannot hold that."""
    if not isinstance(reader, Convolution) or reader.input != op or op in (reader.weight, reader.bias):
        return None
    rank = -1 - reader.input_axis
    front, behind = pad[::2], pad[1::2]
    if front != behind or min(pad) < 0 or any(front[rank:]):
        return None
    own = reader.argument("padding")
    if isinstance(own, str):
        if own != "valid":
            return None
        own = [0]
    own = list(own) * (rank if len(own) == 1 else 1)
    added = [*front[:rank], *[0] * (rank - len(front))][::-1]
    return [a + b for a, b in zip(own, added, strict=True)]


def _given(op: Op, name: str) -> Any:
    value = op.argument(name)
    return view(value) if isinstance(value, fx.Node) else value


def _is_returned(op: Op) -> bool:
    return any(user.op == "output" for user in op.node.users)


def _is_laid_out_alike(x: Op, y: Op) -> bool:
    """Whether a ``view`` behind ``y`` can be one behind ``x``."""
    return all(statically_known_true(a == b) for a, b in zip(x.val.stride(), y.val.stride(), strict=True))
