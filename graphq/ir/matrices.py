"""The matrix product in every weighted op: a weight as [B, N, K], and the vectors [rows, K] of the input it multiplies.

B counts experts, or groups of a convolution, and is 1 for a linear; K runs over a convolution's taps too.
"""

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor

from graphq.ir.views import CONVOLUTIONS, GroupedLinear, Op, Weighted, view

Samples = Callable[..., Iterable[tuple[int, Tensor]]]


def input_vectors(op: Weighted) -> tuple[Samples, tuple[Op, ...]]:
    """The vectors that an op's weight multiplies, as a function of its input and of the further ops given."""
    if isinstance(op, GroupedLinear):
        return _by_expert, (view(op.argument("offsets")),)
    if isinstance(op, CONVOLUTIONS):
        return _patches(op), ()
    return _rows, ()


def _rows(x: Tensor) -> Iterable[tuple[int, Tensor]]:
    return [(0, x.reshape(-1, x.shape[-1]))]


def _by_expert(x: Tensor, offsets: Tensor) -> Iterable[tuple[int, Tensor]]:
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        yield expert, x[start:end]
        start = end


def _patches(op: Weighted) -> Samples:
    """The patches of a convolution's input, by its groups; their elements in the order of its weight's."""
    rank = op.weight_op.val.dim() - 2
    kernel = [int(size) for size in op.weight_op.val.shape[2:]]
    stride, dilation = (_each(op.argument(name), rank) for name in ("stride", "dilation"))
    padding = op.argument("padding")
    groups = int(op.argument("groups"))
    if isinstance(padding, str):
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        pads = [(total // 2, total - total // 2) for total in totals]
    else:
        pads = [(p, p) for p in _each(padding, rank)]

    def patches(x: Tensor) -> Iterable[tuple[int, Tensor]]:
        if x.dim() == rank + 1:  # without batches
            x = x.unsqueeze(0)
        x = torch.nn.functional.pad(x, [p for pair in reversed(pads) for p in pair])
        for axis, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True)):
            x = x.unfold(2 + axis, (size - 1) * apart + 1, step)[..., ::apart]  # [B, C, places..., taps...]
        split = x.unflatten(1, (groups, -1))  # [B, G, C / G, places..., taps...]
        places = list(range(3, 3 + rank))
        taps = list(range(3 + rank, 3 + 2 * rank))
        rows = split.permute(1, 0, *places, 2, *taps).flatten(1, 1 + rank).flatten(2)  # [G, rows, K]
        return list(enumerate(rows))

    return patches


def _each(value: object, rank: int) -> list[int]:
    sizes = [int(v) for v in cast(list[int], value)]
    return sizes * rank if len(sizes) == 1 else sizes


def as_matrices(w: Tensor, op: Weighted) -> Tensor:
    """A weight as [B, N, K], alike to the vectors of ``input_vectors``: N outputs of each of B experts or groups."""
    if isinstance(op, GroupedLinear):
        return w
    if isinstance(op, CONVOLUTIONS):
        groups = int(op.argument("groups"))
        return w.reshape(groups, w.shape[0] // groups, -1)
    return (w if op.out_axis == 0 else w.T)[None]


def as_weight(problems: Tensor, op: Weighted, like: Tensor) -> Tensor:
    """The inverse of ``as_matrices``, in the shape of ``like``."""
    if isinstance(op, (GroupedLinear, *CONVOLUTIONS)):
        return problems.reshape(like.shape)
    return problems[0] if op.out_axis == 0 else problems[0].T


def input_key(op: Weighted) -> object:
    """Equal for ops whose weights multiply the same vectors."""
    _, rest = input_vectors(op)
    if isinstance(op, CONVOLUTIONS):
        return op.input_op, op.node.target, op.node.args[3:], str(op.node.kwargs), tuple(op.weight_op.val.shape[1:])
    return op.input_op, rest, type(op)
