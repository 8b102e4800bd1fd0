"""Ops of torch that trust their arguments, behind a check of them: the same results, and ``GraphqError`` where they
would read or write beyond their tensors (torch 2.13 on the CPU), or return memory that nothing wrote.

A loaded graph calls these in place of the ops. ``SUBSTITUTES`` says which.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from graphq.errors import GraphqError

aten: Any = torch.ops.aten
_LARGEST: Final = 1 << 24  # of a window's sizes, strides and padding, whose products 64 bits then hold


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise GraphqError(text)


def native_batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten._native_batch_norm_legit_no_training``, of vectors with one element for each channel."""
    _require(x.dim() >= 2, "batch norm: its input has no channels")
    for vector in (weight, bias, running_mean, running_var):
        _require(
            vector is None or (vector.dim() == 1 and vector.shape[0] == x.shape[1]),
            f"batch norm: a vector that has not one element for each of {x.shape[1]} channels",
        )
    return aten._native_batch_norm_legit_no_training(x, weight, bias, running_mean, running_var, momentum, eps)


def lstm(
    x: Tensor,
    hx: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten.lstm.input``, of weights and states that fit the input."""
    _require(len(hx) == 2, "recurrent: not two states")
    _check_recurrent(x, hx, params, 4, has_biases, num_layers, bidirectional, batch_first)
    return aten.lstm.input(x, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)


def _one_state(op: Callable[..., Any], gates: int) -> Callable[..., Any]:
    def run(
        x: Tensor,
        hx: Tensor,
        params: Sequence[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, Tensor]:
        _check_recurrent(x, [hx], params, gates, has_biases, num_layers, bidirectional, batch_first)
        return op(x, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)

    return run


def _check_recurrent(
    x: Tensor,
    states: Sequence[Tensor],
    params: Sequence[Tensor],
    gates: int,
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> None:
    """Raises ``GraphqError`` for weights ``[gates * hidden, in]``, ``[gates * hidden, out]``, two biases, and of an
    LSTM with a projection ``[out, hidden]``, for each layer and direction, or states ``[layers, batch, out]``, that are
    not these.
    """
    directions = 2 if bidirectional else 1
    fits = x.dim() == 3 and all(s.dim() == 3 for s in states)
    _require(fits, "recurrent: its input and states are not of three axes")
    out, hidden = states[0].shape[2], states[-1].shape[2]
    own = [
        (gates * hidden, out),
        *([(gates * hidden,)] * 2 if has_biases else []),
        *([(out, hidden)] * (out != hidden)),
    ]
    counted = 0 <= num_layers <= len(params) and len(params) == num_layers * directions * (1 + len(own))
    _require(counted, f"recurrent: {len(params)} weights for {num_layers} layers")
    widths = [x.shape[2], *[directions * out] * (num_layers - 1)]
    wanted = [shape for width in widths for _ in range(directions) for shape in ((gates * hidden, width), *own)]
    batch = x.shape[0 if batch_first else 1]
    fits = all(tuple(p.shape) == shape for p, shape in zip(params, wanted, strict=True)) and all(
        s.shape[0] == num_layers * directions and s.shape[1] == batch for s in states
    )
    _require(fits, "recurrent: weights or states of other shapes than its input takes")
    _require(all(t.dtype == x.dtype for t in (*states, *params)), "recurrent: weights of another dtype")


def col2im(
    x: Tensor,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Tensor:
    """``aten.col2im``, of sizes that its arithmetic holds."""
    _check_windows(output_size, kernel_size, dilation, padding, stride)
    return aten.col2im(x, output_size, kernel_size, dilation, padding, stride)


def im2col(
    x: Tensor, kernel_size: Sequence[int], dilation: Sequence[int], padding: Sequence[int], stride: Sequence[int]
) -> Tensor:
    """``aten.im2col``, of sizes that its arithmetic holds."""
    _check_windows(kernel_size, dilation, padding, stride)
    return aten.im2col(x, kernel_size, dilation, padding, stride)


def _check_windows(*sizes: Sequence[int]) -> None:
    for size in (s for given in sizes for s in given):
        _require(0 <= size <= _LARGEST, "fold: a size, stride or padding out of range")


def grid_sampler(x: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool) -> Tensor:
    """``aten.grid_sampler``, in one of its modes: for another its kernel fills nothing in."""
    known = interpolation_mode in (0, 1, 2) and padding_mode in (0, 1, 2)
    _require(known, f"grid_sampler: there is no mode {interpolation_mode}, {padding_mode}")
    return aten.grid_sampler(x, grid, interpolation_mode, padding_mode, align_corners)


gru = _one_state(aten.gru.input, 3)
rnn_tanh = _one_state(aten.rnn_tanh.input, 1)
rnn_relu = _one_state(aten.rnn_relu.input, 1)
for _name, _made in (("gru", gru), ("rnn_tanh", rnn_tanh), ("rnn_relu", rnn_relu)):
    _made.__name__ = _made.__qualname__ = _name  # by which the code of a graph finds it

SUBSTITUTES: Final[Mapping[str, Callable[..., Any]]] = {
    "aten._native_batch_norm_legit_no_training.default": native_batch_norm,
    "aten.col2im.default": col2im,
    "aten.grid_sampler.default": grid_sampler,
    "aten.gru.input": gru,
    "aten.im2col.default": im2col,
    "aten.lstm.input": lstm,
    "aten.rnn_relu.input": rnn_relu,
    "aten.rnn_tanh.input": rnn_tanh,
    # What is written before it is read loses nothing; what is not does not show what else the process held.
    "aten.empty.memory_format": aten.zeros.default,
    "aten.empty_like.default": aten.zeros_like.default,
    "aten.new_empty.default": aten.new_zeros.default,
}
