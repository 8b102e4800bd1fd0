"""Ops of torch that trust their arguments, behind a check of them: the same results, and ``GraphqError`` where they
would read or write beyond their tensors (torch 2.13 on the CPU), or return memory that nothing wrote; results, too,
where they would end the process. And Python's arithmetic on sizes, up to numbers that sizes can be.

A loaded graph calls these in place of the ops. ``SUBSTITUTES`` says which.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
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


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``aten.scaled_dot_product_attention``, of as many keys as values and a mask ``[..., queries, keys]``."""
    mask = None if attn_mask is None else attn_mask.shape
    is_traced = type(query) is not Tensor or torch.compiler.is_compiling()  # whose sizes may be symbols
    check = _attention_problem.__wrapped__ if is_traced else _attention_problem
    problem = check(query.shape, key.shape, value.shape, mask, enable_gqa)
    if problem is not None:
        raise GraphqError(f"attention: {problem}")
    return aten.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


@lru_cache(maxsize=64)  # layers ask for the same shapes, one after the other
def _attention_problem(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], mask: Sequence[int] | None, enable_gqa: bool
) -> str | None:
    """Why attention of these shapes would read beyond its tensors; None where it does not."""
    fits = min(len(q), len(k), len(v)) >= 2 and k[-2] == v[-2] and q[-1] == k[-1]
    batch = q[:-2]
    if fits and not batch == k[:-2] == v[:-2]:
        if enable_gqa:
            fits = len(q) >= 3 and k[:-2] == v[:-2] and q[:-3] == k[:-3] and k[-3] > 0 and q[-3] % k[-3] == 0
        else:
            try:
                batch = torch.broadcast_shapes(batch, k[:-2], v[:-2])
            except RuntimeError:
                fits = False
    if not fits:
        return f"queries {list(q)}, keys {list(k)} and values {list(v)} do not fit"
    if mask is not None:
        scores = (*batch, q[-2], k[-2])
        if len(mask) > len(scores) or any(
            own not in (1, size) for own, size in zip(mask[::-1], scores[::-1], strict=False)
        ):
            return f"a mask {list(mask)} for scores {list(scores)}"
    return None


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``aten._weight_norm``, of one norm for each element of its axis."""
    _check_weight_norm(v, g, dim)
    return aten._weight_norm(v, g, dim)


def weight_norm_interface(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    """``aten._weight_norm_interface``, of one norm for each element of the first or the last axis."""
    _check_weight_norm(v, g, dim)
    _require(dim in (0, v.dim() - 1), f"weight norm: axis {dim} is not the first or the last")
    return aten._weight_norm_interface(v.contiguous(), g.contiguous(), dim)


def _check_weight_norm(v: Tensor, g: Tensor, dim: int) -> None:
    fits = dim == -1 and g.dim() == 0  # the norm of the whole
    if 0 <= dim < v.dim():
        fits = g.shape == tuple(size if axis == dim else 1 for axis, size in enumerate(v.shape))
    _require(fits and v.dtype == g.dtype, f"weight norm: norms {list(g.shape)} for axis {dim} of {list(v.shape)}")


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``aten.embedding_bag.padding_idx``, of bags in order and rows that there are: its first result, and zeros for the
    others, which only gradients need and which it leaves unwritten.
    """
    axes = (weight.dim(), indices.dim(), offsets.dim())
    integers = indices.dtype == offsets.dtype and indices.dtype in (torch.int32, torch.int64)
    _require(axes == (2, 1, 1) and integers and mode in (0, 1, 2), "embedding_bag: not rows, indices and offsets")
    rows, count, bags = weight.shape[0], indices.shape[0], offsets.shape[0]
    _require(not count or bool((indices >= 0).all() and (indices < rows).all()), f"embedding_bag: not of {rows} rows")
    ordered = bags > 0 and int(offsets[0]) == 0 and bool((offsets.diff() >= 0).all())
    _require(
        ordered and (int(offsets[-1]) == count if include_last_offset else int(offsets[-1]) <= count),
        f"embedding_bag: offsets that do not divide {count} indices",
    )
    if per_sample_weights is not None:
        fits = per_sample_weights.shape == indices.shape and per_sample_weights.dtype == weight.dtype
        _require(fits, "embedding_bag: weights of samples that are not one for each index")
    _require(padding_idx is None or -rows <= padding_idx < rows, f"embedding_bag: padding_idx {padding_idx}")
    bag, *others = aten.embedding_bag.padding_idx(
        weight, indices, offsets, False, mode, False, per_sample_weights, include_last_offset, padding_idx
    )
    first, second, third = (torch.zeros_like(x) for x in others)
    return bag, first, second, third


def lstm_cell(
    x: Tensor,
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``aten.lstm_cell``, of weights and states that fit the input."""
    _require(len(hx) == 2, "recurrent cell: not two states")
    _check_cell(x, hx, w_ih, w_hh, (b_ih, b_hh), 4)
    return aten.lstm_cell(x, hx, w_ih, w_hh, b_ih, b_hh)


def _one_state_cell(name: str, gates: int) -> Callable[..., Any]:
    def run(
        x: Tensor,
        hx: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor:
        _check_cell(x, [hx], w_ih, w_hh, (b_ih, b_hh), gates)
        return op(x, hx, w_ih, w_hh, b_ih, b_hh)

    op = getattr(aten, name).default
    run.__name__ = run.__qualname__ = name
    return run


def _check_cell(
    x: Tensor, states: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, biases: Sequence[Tensor | None], gates: int
) -> None:
    """Raises ``GraphqError`` unless weights are ``[gates * hidden, in]`` and ``[gates * hidden, hidden]``, biases
    ``[gates * hidden]``, and states ``[batch, hidden]``, of an input ``[batch, in]``.
    """
    _require(x.dim() == 2 and states[0].dim() == 2, "recurrent cell: its input and states are not of two axes")
    batch, hidden = states[0].shape
    given = [b for b in biases if b is not None]
    fits = (
        x.shape[0] == batch
        and all(s.shape == (batch, hidden) for s in states)
        and w_ih.shape == (gates * hidden, x.shape[1])
        and w_hh.shape == (gates * hidden, hidden)
        and all(b.shape == (gates * hidden,) for b in given)
    )
    _require(fits, "recurrent cell: weights or states of other shapes than its input takes")
    same = all(t.dtype == x.dtype for t in (*states, w_ih, w_hh, *given))
    _require(same, "recurrent cell: weights of another dtype")


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


def _one_state(name: str, gates: int) -> Callable[..., Any]:
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

    op = getattr(aten, name).input
    run.__name__ = run.__qualname__ = name  # by which the code of a graph finds it
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


def max_pool1d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Tensor:
    """``aten.max_pool1d``, of sizes that its arithmetic holds: unlike the other poolings, it does not look itself."""
    _check_windows(kernel_size, stride, padding, dilation)
    return aten.max_pool1d(x, kernel_size, stride, padding, dilation, ceil_mode)


def _check_windows(*sizes: Sequence[int]) -> None:
    for size in (s for given in sizes for s in given):
        _require(0 <= size <= _LARGEST, "window: a size, stride, padding or dilation out of range")


def grid_sampler(x: Tensor, grid: Tensor, interpolation_mode: int, padding_mode: int, align_corners: bool) -> Tensor:
    """``aten.grid_sampler``, in one of its modes: for another its kernel fills nothing in."""
    known = interpolation_mode in (0, 1, 2) and padding_mode in (0, 1, 2)
    _require(known, f"grid_sampler: there is no mode {interpolation_mode}, {padding_mode}")
    return aten.grid_sampler(x, grid, interpolation_mode, padding_mode, align_corners)


def div(x: Tensor | float, y: Tensor | float, *, rounding_mode: str | None = None) -> Tensor:
    """``aten.div`` with a rounding mode. The least integer by -1 is itself, as the negative of it is.

    torch divides integers toward zero by the processor's own instruction, which ends the process for these two.
    """
    dtype = torch.result_type(x, y)
    if rounding_mode != "trunc" or dtype not in (torch.int32, torch.int64):
        op = aten.div.Tensor_mode if isinstance(y, Tensor) else aten.div.Scalar_mode
        return op(x, y, rounding_mode=rounding_mode)
    x, y = torch.as_tensor(x).to(dtype), torch.as_tensor(y).to(dtype)
    return torch.where(y == -1, -x, torch.div(x, y.masked_fill(y == -1, 1), rounding_mode="trunc"))


def mul(x: Any, y: Any) -> Any:
    """``operator.mul`` of sizes and tensors, of integers below 2^63."""
    _require(not any(isinstance(value, list | str) for value in (x, y)), "mul: not of two numbers")
    return _in_range("mul", x * y)


def pow(x: Any, y: Any) -> Any:  # noqa: A001
    """``operator.pow`` of sizes and tensors, of integers below 2^63."""
    if isinstance(x, int) and isinstance(y, int):  # whose power may take longer than there is time for
        _require(y * (x.bit_length() - 1) < 63, f"pow: {x} ** {y} is out of range")
    return _in_range("pow", x**y)


def _in_range(name: str, made: Any) -> Any:
    _require(not isinstance(made, int) or abs(made) < 1 << 63, f"{name}: an integer that is out of range")
    return made


gru = _one_state("gru", 3)
rnn_tanh = _one_state("rnn_tanh", 1)
rnn_relu = _one_state("rnn_relu", 1)
gru_cell = _one_state_cell("gru_cell", 3)
rnn_tanh_cell = _one_state_cell("rnn_tanh_cell", 1)
rnn_relu_cell = _one_state_cell("rnn_relu_cell", 1)

SUBSTITUTES: Final[Mapping[str, Callable[..., Any]]] = {
    "aten._native_batch_norm_legit_no_training.default": native_batch_norm,
    "aten._weight_norm.default": weight_norm,
    "aten._weight_norm_interface.default": weight_norm_interface,
    "aten.col2im.default": col2im,
    "aten.div.Scalar_mode": div,
    "aten.div.Tensor_mode": div,
    "aten.embedding_bag.padding_idx": embedding_bag,
    "aten.grid_sampler.default": grid_sampler,
    "aten.gru.input": gru,
    "aten.gru_cell.default": gru_cell,
    "aten.im2col.default": im2col,
    "aten.lstm.input": lstm,
    "aten.lstm_cell.default": lstm_cell,
    "aten.max_pool1d.default": max_pool1d,
    "aten.rnn_relu.input": rnn_relu,
    "aten.rnn_relu_cell.default": rnn_relu_cell,
    "aten.rnn_tanh.input": rnn_tanh,
    "aten.rnn_tanh_cell.default": rnn_tanh_cell,
    "aten.scaled_dot_product_attention.default": scaled_dot_product_attention,
    "mul": mul,
    "pow": pow,
    # What is written before it is read loses nothing; what is not does not show what else the process held.
    "aten.empty.memory_format": aten.zeros.default,
    "aten.empty_like.default": aten.zeros_like.default,
    "aten.new_empty.default": aten.new_zeros.default,
}
