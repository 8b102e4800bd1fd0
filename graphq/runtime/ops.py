"""The custom ops of the QDQ form, with reference implementations and fake kernels.

Schemas are explicit: jaxtyping's import hook rewrites annotations, from which torch would otherwise infer them.
``format`` is the text of a ``Format``; ``block`` is explained in ``graphq.numerics.blocks``, ``scale`` and
``global_scale`` in ``graphq.numerics.scales``.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor

from graphq import numerics
from graphq.errors import PassError
from graphq.numerics import Format, Scales
from graphq.runtime.kernels import bounds, quantized_rows
from graphq.runtime.rows import Quantizer, quantizer
from graphq.spec import formats
from graphq.spec.formats import has_global_scale

_library = torch.library.Library("graphq", "DEF")  # held for the process: its ops vanish with it
_library.define(
    "dequantize(Tensor codes, Tensor scale, Tensor? zero_point, Tensor? global_scale, str format, int[] block,"
    " ScalarType? dtype=None) -> Tensor"
)
_library.define(
    "quantize(Tensor x, Tensor scale, Tensor? zero_point, Tensor? global_scale, str format, int[] block) -> Tensor"
)
_library.define(
    "choose_scale(Tensor x, str format, int[] block, Tensor? global_scale=None) -> (Tensor scale, Tensor zero_point)"
)
_library.define("choose_global_scale(Tensor x) -> Tensor")
_library.define(
    "quantize_dynamic(Tensor x, str format, int[] block) -> (Tensor codes, Tensor scale, Tensor zero_point)"
)
_library.define("grouped_linear(Tensor x, Tensor weight, Tensor offsets) -> Tensor")
_library.define(
    "recurrence(Tensor gates, Tensor weight, Tensor? bias, Tensor hidden, Tensor? cell, str kind, bool reverse)"
    " -> (Tensor output, Tensor hidden, Tensor cell)"
)
_library.define(
    "max_pool2d(Tensor codes, int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool ceil_mode) -> Tensor"
)
_library.define("select_rows(Tensor[] candidates, Tensor offsets, int[] choice) -> Tensor")


def _format(text: str, global_scale: Tensor | None) -> Format:
    """The format, whose levels of scales are those given."""
    parsed = numerics.parse_format(text)
    if has_global_scale(parsed) != (global_scale is not None):
        wanted = "a global scale" if has_global_scale(parsed) else "no global scale"
        raise PassError(f"{text} has {wanted}")
    return parsed


def _dequantized_dtype(scale: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or (torch.float32 if scale.dtype.itemsize == 1 else scale.dtype)


def _dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    block: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    parsed = _format(format, global_scale)
    made = numerics.dequantize(codes, Scales(scale, zero_point, global_scale), parsed, block)
    return made.to(_dequantized_dtype(scale, dtype))


def _dequantize_fake(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    block: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    _format(format, global_scale)
    return torch.empty_like(codes, dtype=_dequantized_dtype(scale, dtype))


def _quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, global_scale: Tensor | None, format: str, block: Sequence[int]
) -> Tensor:
    return numerics.quantize(x, Scales(scale, zero_point, global_scale), _format(format, global_scale), block)


def _quantize_fake(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, global_scale: Tensor | None, format: str, block: Sequence[int]
) -> Tensor:
    return torch.empty_like(x, dtype=numerics.code_dtype(_format(format, global_scale)))


def _choose_scale(
    x: Tensor, format: str, block: Sequence[int], global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    parsed = _format(format, global_scale)
    scale, zero_point, _ = numerics.choose_scale(x, parsed, block, global_scale)
    if zero_point is None:
        zero_point = torch.zeros(scale.shape, dtype=numerics.code_dtype(parsed), device=x.device)
    return scale, zero_point


def _choose_scale_fake(
    x: Tensor, format: str, block: Sequence[int], global_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    parsed = _format(format, global_scale)
    shape = [1 if b < 0 else (size if b == 1 else (size + b - 1) // b) for size, b in zip(x.shape, block, strict=True)]
    scale = x.new_empty(shape, dtype=numerics.scale_dtype(parsed, x.dtype))
    return scale, x.new_empty(shape, dtype=numerics.code_dtype(parsed))


def _choose_global_scale(x: Tensor) -> Tensor:
    """nvfp4's divisor of all scales of ``x``, of as many axes."""
    amax = x.abs().amax() if x.numel() else x.new_zeros(())
    return numerics.nvfp4_global_scale(amax).view([1] * x.dim())


def _choose_global_scale_fake(x: Tensor) -> Tensor:
    return x.new_empty([1] * x.dim(), dtype=torch.float32)


@cache
def _rows_quantizer(format: str, block: tuple[int, ...]) -> Quantizer | None:
    return quantizer(format, block)


def _quantize_dynamic(x: Tensor, format: str, block: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """``choose_scale`` and ``quantize`` by it, of formats with one level of scales."""
    found = quantized_rows(x, format, block)
    if found is not None:
        return found
    by_rows = _rows_quantizer(format, tuple(block))
    if by_rows is not None:
        scale, codes = by_rows(x)
        return codes, scale, torch.zeros(scale.shape, dtype=codes.dtype, device=x.device)
    scale, zero_point = _choose_scale(x, format, block)
    is_asymmetric = formats.is_asymmetric(numerics.parse_format(format))
    return _quantize(x, scale, zero_point if is_asymmetric else None, None, format, block), scale, zero_point


def _quantize_dynamic_fake(x: Tensor, format: str, block: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.empty_like(x, dtype=numerics.code_dtype(_format(format, None)), memory_format=torch.contiguous_format)
    return codes, *_choose_scale_fake(x, format, block)


def _grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows of ``x[T, K]`` up to ``offsets[0]`` times ``weight[0, N, K]``, up to ``offsets[1]`` times ``weight[1]`` and
    so on; rows after the last offset are 0. A loop over experts: the reference, in any dtype.
    """
    _check_grouped(x, weight)
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for expert, (first, last) in enumerate(bounds(offsets, weight.shape[0], x.shape[0])):
        out[first:last] = torch.nn.functional.linear(x[first:last], weight[expert])
    return out


def _check_grouped(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2]:
        raise PassError(f"rows {tuple(x.shape)} for experts' weights {tuple(weight.shape)}")
    if x.dtype != weight.dtype:
        raise PassError(f"rows {x.dtype} for experts' weights {weight.dtype}")


def _grouped_linear_fake(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    _check_grouped(x, weight)
    return x.new_empty(x.shape[0], weight.shape[1])


GATES: Final = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def _recurrence(
    gates: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, cell: Tensor | None, kind: str, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction of one layer of ``torch.nn.LSTM``, ``GRU`` or ``RNN`` (which have the equations): the states after
    each step, ``[time, batch, H]``, and the last one; and an LSTM's last cell, of others that state again.

    gates: what the inputs give, bias included: ``[time, batch, G * H]``, the gates in torch's order. weight:
    ``[G * H, H]``. hidden, cell: ``[batch, H]``, before the first step. reverse: from the last step to the first.
    """
    size = hidden.shape[-1]
    wide = size * GATES.get(kind, 0)
    fits = gates.dim() == 3 and hidden.shape == (gates.shape[1], size) and (cell is not None) == (kind == "lstm")
    fits = fits and gates.shape[2] == wide and weight.shape == (wide, size) and (bias is None or bias.shape == (wide,))
    if not fits or (cell is not None and cell.shape != hidden.shape):
        raise PassError(f"recurrence {kind}: gates {tuple(gates.shape)} for a state {tuple(hidden.shape)}")
    outputs: list[Tensor] = []
    for own in gates.flip(0) if reverse else gates:
        given = torch.nn.functional.linear(hidden, weight, bias)
        match kind:
            case "lstm":
                assert cell is not None, "checked"
                take, forget, new, give = (own + given).chunk(4, -1)
                cell = forget.sigmoid() * cell + take.sigmoid() * new.tanh()
                hidden = give.sigmoid() * cell.tanh()
            case "gru":
                (r, z, n), (r_state, z_state, n_state) = own.chunk(3, -1), given.chunk(3, -1)
                new = (n + (r + r_state).sigmoid() * n_state).tanh()
                hidden = new + (z + z_state).sigmoid() * (hidden - new)
            case "rnn_tanh":
                hidden = (own + given).tanh()
            case _:
                hidden = (own + given).relu()
        outputs.append(hidden)
    if not outputs:
        raise PassError("recurrence: no steps")
    stacked = torch.stack(outputs[::-1] if reverse else outputs)
    return stacked, hidden, hidden.clone() if cell is None else cell


def _select_rows(candidates: Sequence[Tensor], offsets: Tensor, choice: Sequence[int]) -> Tensor:
    """The rows of expert ``e`` (those up to ``offsets[e]``) taken from ``candidates[choice[e]]``; all are ``[T, K]``.
    Rows after the last offset are 0.
    """
    shapes = {tuple(x.shape) for x in candidates}
    if len(shapes) != 1 or len(min(shapes)) != 2:
        raise PassError(f"candidates of shapes {sorted(shapes)} for the rows of experts")
    if not set(choice) <= set(range(len(candidates))):
        raise PassError(f"choice {list(choice)} of {len(candidates)} candidates")
    out = torch.zeros_like(candidates[0])
    for expert, (first, last) in enumerate(bounds(offsets, len(choice), out.shape[0])):
        out[first:last] = candidates[choice[expert]][first:last]
    return out


def _max_pool2d(
    codes: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    """``aten.max_pool2d`` of codes of 8 bits ``[B, C, H, W]``, of which it moves some: all arguments are pairs."""
    pairs = (kernel_size, stride, padding, dilation)
    fits = codes.dim() == 4 and all(len(pair) == 2 for pair in pairs) and min(*kernel_size, *stride, *dilation) > 0
    fits = fits and all(0 <= 2 * pad <= size for pad, size in zip(padding, kernel_size, strict=True))
    if not fits or codes.dtype not in (torch.uint8, torch.int8):
        raise PassError(f"max_pool2d: {[list(pair) for pair in pairs]} of {codes.dtype}{list(codes.shape)}")
    rest = (list(stride), list(padding), list(dilation), ceil_mode)
    if codes.device.type != "cpu" or not codes.numel():
        return torch.nn.functional.max_pool2d(codes.float(), list(kernel_size), *rest).to(codes.dtype)
    if codes.dtype == torch.uint8:
        return torch.ops.quantized.max_pool2d(codes, list(kernel_size), *rest)
    raised = (codes ^ -128).view(torch.uint8)  # there is no kernel for signed codes, whose order this keeps
    return (torch.ops.quantized.max_pool2d(raised, list(kernel_size), *rest) ^ 128).view(torch.int8)


def _max_pool2d_fake(
    codes: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    rest = (list(stride), list(padding), list(dilation), ceil_mode)
    return torch.nn.functional.max_pool2d(codes.float(), list(kernel_size), *rest).to(codes.dtype)


def _recurrence_fake(
    gates: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, cell: Tensor | None, kind: str, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    output = gates.new_empty(*gates.shape[:2], hidden.shape[-1])
    return output, torch.empty_like(hidden), torch.empty_like(hidden)


def _select_rows_fake(candidates: Sequence[Tensor], offsets: Tensor, choice: Sequence[int]) -> Tensor:
    return torch.empty_like(candidates[0])


for _name, _reference, _fake in (
    ("dequantize", _dequantize, _dequantize_fake),
    ("quantize", _quantize, _quantize_fake),
    ("choose_scale", _choose_scale, _choose_scale_fake),
    ("choose_global_scale", _choose_global_scale, _choose_global_scale_fake),
    ("quantize_dynamic", _quantize_dynamic, _quantize_dynamic_fake),
    ("grouped_linear", _grouped_linear, _grouped_linear_fake),
    ("recurrence", _recurrence, _recurrence_fake),
    ("select_rows", _select_rows, _select_rows_fake),
    ("max_pool2d", _max_pool2d, _max_pool2d_fake),
):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphq::{_name}", _fake, lib=_library)


def _keep_recurrence(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
    ctx.inputs = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.tensors = [isinstance(x, Tensor) for x in inputs]


def _recurrence_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients, of the reference run once more."""
    saved = iter(ctx.saved_tensors)
    with torch.enable_grad():
        given = [
            next(saved).detach().requires_grad_(needed) if is_tensor else value
            for is_tensor, value, needed in zip(ctx.tensors, ctx.inputs, ctx.needs_input_grad, strict=True)
        ]
        made = [(y, grad) for y, grad in zip(_recurrence(*given), grads, strict=True) if grad is not None]
        made = [(y, grad) for y, grad in made if y.requires_grad]
        wanted = [x for x in given if isinstance(x, Tensor) and x.requires_grad]
        found = iter(torch.autograd.grad([y for y, _ in made], wanted, [g for _, g in made], allow_unused=True))
    return tuple(next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in given)


torch.library.register_autograd(
    "graphq::recurrence", _recurrence_backward, setup_context=_keep_recurrence, lib=_library
)
dequantize = torch.ops.graphq.dequantize.default
quantize = torch.ops.graphq.quantize.default
choose_scale = torch.ops.graphq.choose_scale.default
choose_global_scale = torch.ops.graphq.choose_global_scale.default
quantize_dynamic = torch.ops.graphq.quantize_dynamic.default
grouped_linear = torch.ops.graphq.grouped_linear.default
recurrence = torch.ops.graphq.recurrence.default
select_rows = torch.ops.graphq.select_rows.default
max_pool2d = torch.ops.graphq.max_pool2d.default
REFERENCES: Final[Mapping[object, Callable[..., Any]]] = {  # what the ops call, without the dispatcher between
    dequantize: _dequantize,
    quantize: _quantize,
    quantize_dynamic: _quantize_dynamic,
    choose_scale: _choose_scale,
    choose_global_scale: _choose_global_scale,
    grouped_linear: _grouped_linear,
    select_rows: _select_rows,
}
