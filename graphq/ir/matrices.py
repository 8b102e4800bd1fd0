"""The matrix product in every weighted op: a weight as [B, N, K], and the vectors [rows, K] of the input it multiplies.

B counts experts, or groups of a convolution, and is 1 for a linear; K runs over a convolution's taps too. A transposed
convolution is that of its input with zeros between the places (Dumoulin and Visin, arXiv 1603.07285, section 4).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from graphq.ir.views import Convolution, ConvTranspose, GroupedLinear, Op, Weighted, view
from graphq.numerics import weight_block
from graphq.spec.quant import Granularity

Samples = Callable[..., Iterable[tuple[int, Tensor]]]


def input_vectors(op: Weighted) -> tuple[Samples, tuple[Op, ...]]:
    """The vectors that an op's weight multiplies, as a function of its input and of the further ops given."""
    if isinstance(op, GroupedLinear):
        return _by_expert, (view(op.argument("offsets")),)
    if isinstance(op, Convolution):
        return _patches(op), ()
    if isinstance(op, ConvTranspose):
        return _transposed_patches(op), ()
    return _rows, ()


def _rows(x: Tensor) -> Iterable[tuple[int, Tensor]]:
    return [(0, x.reshape(-1, x.shape[-1]))]


def _by_expert(x: Tensor, offsets: Tensor) -> Iterable[tuple[int, Tensor]]:
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        yield expert, x[start:end]
        start = end


def _patches(op: Convolution) -> Samples:
    """The patches of a convolution's input, by its groups; their elements in the order of its weight's."""
    rank, kernel = len(_kernel(op)), _kernel(op)
    stride, dilation = (_each(op.argument(name), rank) for name in ("stride", "dilation"))
    padding = op.argument("padding")
    groups = int(op.groups)
    if isinstance(padding, str):
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        pads = [(total // 2, total - total // 2) for total in totals]
    else:
        pads = [(p, p) for p in _each(padding, rank)]

    def patches(x: Tensor) -> Iterable[tuple[int, Tensor]]:
        if x.dim() == rank + 1:  # without batches
            x = x.unsqueeze(0)
        x = torch.nn.functional.pad(x, [p for pair in reversed(pads) for p in pair])
        return _unfolded(x, groups, kernel, stride, dilation)

    return patches


def _transposed_patches(op: ConvTranspose) -> Samples:
    """The same for a transposed convolution: tap t of an output's place reads what t takes to that place, or 0."""
    rank, kernel = len(_kernel(op)), _kernel(op)
    names = ("stride", "padding", "output_padding", "dilation")
    stride, padding, further, dilation = (_each(op.argument(name), rank) for name in names)
    groups = int(op.groups)
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    pads = [(s - p, s - p + o) for s, p, o in zip(spans, padding, further, strict=True)]  # negative ones cut off

    def patches(x: Tensor) -> Iterable[tuple[int, Tensor]]:
        if x.dim() == rank + 1:
            x = x.unsqueeze(0)
        sizes = [(size - 1) * s + 1 for size, s in zip(x.shape[2:], stride, strict=True)]
        apart = x.new_zeros(*x.shape[:2], *sizes)
        apart[(..., *(slice(None, None, s) for s in stride))] = x
        apart = torch.nn.functional.pad(apart, [p for pair in reversed(pads) for p in pair])
        return _unfolded(apart, groups, kernel, [1] * rank, dilation, turned=True)

    return patches


def _unfolded(
    x: Tensor,
    groups: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    turned: bool = False,
) -> Iterable[tuple[int, Tensor]]:
    """``x[batch, in, places...]`` as the vectors [rows, in / groups * taps] of each group; ``turned``: the last tap is
    the first.
    """
    rank = len(kernel)
    for axis, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + axis, (size - 1) * apart + 1, step)[..., ::apart]  # [B, C, places..., taps...]
    x = x.flip(list(range(2 + rank, 2 + 2 * rank))) if turned else x
    split = x.unflatten(1, (groups, -1))  # [B, G, C / G, places..., taps...]
    places, taps = range(3, 3 + rank), range(3 + rank, 3 + 2 * rank)
    rows = split.permute(1, 0, *places, 2, *taps).flatten(1, 1 + rank).flatten(2)  # [G, rows, K]
    return list(enumerate(rows))


def _kernel(op: Weighted) -> list[int]:
    return [int(size) for size in op.weight_op.val.shape[2:]]


def _each(value: object, rank: int) -> list[int]:
    sizes = [int(v) for v in cast(list[int], value)]
    return sizes * rank if len(sizes) == 1 else sizes


def as_matrices(w: Tensor, op: Weighted) -> Tensor:
    """A weight as [B, N, K], alike to the vectors of ``input_vectors``: N outputs of each of B experts or groups."""
    if isinstance(op, GroupedLinear):
        return w
    if isinstance(op, Convolution):
        return w.reshape(int(op.groups), w.shape[0] // int(op.groups), -1)
    if isinstance(op, ConvTranspose):
        return w.unflatten(0, (int(op.groups), -1)).transpose(1, 2).flatten(2)
    return (w if op.out_axis == 0 else w.T)[None]


def as_weight(problems: Tensor, op: Weighted, like: Tensor) -> Tensor:
    """The inverse of ``as_matrices``, in the shape of ``like``."""
    if isinstance(op, GroupedLinear | Convolution):
        return problems.reshape(like.shape)
    if isinstance(op, ConvTranspose):
        return problems.unflatten(2, (-1, *like.shape[2:])).transpose(1, 2).reshape(like.shape)
    return problems[0] if op.out_axis == 0 else problems[0].T


def input_key(op: Weighted) -> object:
    """Equal for ops whose weights multiply the same vectors."""
    _, rest = input_vectors(op)
    if isinstance(op, Convolution):
        return op.input_op, op.node.target, op.node.args[3:], str(op.node.kwargs), tuple(op.weight_op.val.shape[1:])
    if isinstance(op, ConvTranspose):
        return op.input_op, op.node.target, op.node.args[3:], str(op.node.kwargs), tuple(op.weight_op.val.shape[2:])
    return op.input_op, rest, type(op)


def scale_block(op: Weighted, granularity: Granularity) -> list[int]:
    """The elements of the op's weight that share a scale, along each axis: as ``graphq.numerics.blocks`` has it.

    An output channel of a transposed convolution is a column of one group's rows.
    """
    shape = op.weight_op.val.shape
    block = weight_block(granularity, len(shape), op.out_axis, op.in_axis, op.own_axes)
    if isinstance(op, ConvTranspose) and op.groups != 1 and block[op.out_axis] == 1 and block[op.in_axis] == -1:
        block[op.in_axis] = int(shape[op.in_axis]) // int(op.groups)
    return block


def output_channels(op: Weighted) -> Tensor:
    """The output channel that each element of the op's weight belongs to, in the weight's shape."""
    shape = [int(size) for size in op.weight_op.val.shape]
    labels = torch.arange(shape[op.out_axis]).view([-1 if axis == op.out_axis else 1 for axis in range(len(shape))])
    if isinstance(op, ConvTranspose):  # its axis of outputs holds those of one group
        groups = torch.arange(int(op.groups)).repeat_interleave(shape[0] // int(op.groups))
        labels = labels + groups.view(-1, *[1] * (len(shape) - 1)) * shape[op.out_axis]
    return labels.expand(shape)
