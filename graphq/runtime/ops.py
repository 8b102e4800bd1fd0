"""The custom ops of the QDQ form, with reference implementations and fake kernels.

Schemas are explicit: jaxtyping's import hook rewrites annotations, from which torch would otherwise infer them.
``format`` is the text of a ``Format``; ``block`` is explained in ``graphq.numerics``. ``global_scale`` belongs to
two-level formats; no format here has one, and giving it is an error.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from graphq import numerics
from graphq.errors import PassError

_library = torch.library.Library("graphq", "DEF")  # held for the process: its ops vanish with it
_library.define(
    "dequantize(Tensor codes, Tensor scale, Tensor? zero_point, Tensor? global_scale, str format, int[] block,"
    " ScalarType? dtype=None) -> Tensor"
)
_library.define(
    "quantize(Tensor x, Tensor scale, Tensor? zero_point, Tensor? global_scale, str format, int[] block) -> Tensor"
)
_library.define("choose_scale(Tensor x, str format, int[] block) -> (Tensor scale, Tensor zero_point)")
_library.define("grouped_linear(Tensor x, Tensor weight, Tensor offsets) -> Tensor")
_library.define("select_rows(Tensor[] candidates, Tensor offsets, int[] choice) -> Tensor")


def _one_level(global_scale: Tensor | None) -> None:
    if global_scale is not None:
        raise PassError("integer formats have one level of scales; global_scale belongs to two-level formats")


def _dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    block: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    _one_level(global_scale)
    return numerics.dequantize(codes, scale, zero_point, block).to(dtype or scale.dtype)


def _dequantize_fake(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    global_scale: Tensor | None,
    format: str,
    block: Sequence[int],
    dtype: torch.dtype | None = None,
) -> Tensor:
    _one_level(global_scale)
    return torch.empty_like(codes, dtype=dtype or scale.dtype)


def _quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, global_scale: Tensor | None, format: str, block: Sequence[int]
) -> Tensor:
    _one_level(global_scale)
    return numerics.quantize(x, scale, zero_point, numerics.parse_format(format), block)


def _quantize_fake(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, global_scale: Tensor | None, format: str, block: Sequence[int]
) -> Tensor:
    _one_level(global_scale)
    return torch.empty_like(x, dtype=numerics.code_dtype(numerics.parse_format(format)))


def _choose_scale(x: Tensor, format: str, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    parsed = numerics.parse_format(format)
    scale, zero_point = numerics.choose_scale(x, parsed, block)
    if zero_point is None:
        zero_point = torch.zeros_like(scale, dtype=numerics.code_dtype(parsed))
    return scale, zero_point


def _choose_scale_fake(x: Tensor, format: str, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    shape = [1 if b < 0 else (size if b == 1 else (size + b - 1) // b) for size, b in zip(x.shape, block, strict=True)]
    scale = x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return scale, x.new_empty(shape, dtype=numerics.code_dtype(numerics.parse_format(format)))


def _bounds(offsets: Tensor, experts: int) -> list[tuple[int, int]]:
    """The first row of each expert and the one after its last."""
    ends: list[int] = offsets.tolist()
    if len(ends) != experts:
        raise PassError(f"{len(ends)} offsets for {experts} experts")
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows of ``x[T, K]`` up to ``offsets[0]`` times ``weight[0, N, K]``, up to ``offsets[1]`` times ``weight[1]`` and
    so on; rows after the last offset are 0. A loop over experts: the reference, in any dtype.
    """
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for expert, (first, last) in enumerate(_bounds(offsets, weight.shape[0])):
        out[first:last] = torch.nn.functional.linear(x[first:last], weight[expert])
    return out


def _grouped_linear_fake(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _select_rows(candidates: Sequence[Tensor], offsets: Tensor, choice: Sequence[int]) -> Tensor:
    """The rows of expert ``e`` (those up to ``offsets[e]``) taken from ``candidates[choice[e]]``; all are ``[T, K]``.
    Rows after the last offset are 0.
    """
    out = torch.zeros_like(candidates[0])
    for expert, (first, last) in enumerate(_bounds(offsets, len(choice))):
        out[first:last] = candidates[choice[expert]][first:last]
    return out


def _select_rows_fake(candidates: Sequence[Tensor], offsets: Tensor, choice: Sequence[int]) -> Tensor:
    return torch.empty_like(candidates[0])


for _name, _reference, _fake in (
    ("dequantize", _dequantize, _dequantize_fake),
    ("quantize", _quantize, _quantize_fake),
    ("choose_scale", _choose_scale, _choose_scale_fake),
    ("grouped_linear", _grouped_linear, _grouped_linear_fake),
    ("select_rows", _select_rows, _select_rows_fake),
):
    _library.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphq::{_name}", _fake, lib=_library)

dequantize = torch.ops.graphq.dequantize.default
quantize = torch.ops.graphq.quantize.default
choose_scale = torch.ops.graphq.choose_scale.default
grouped_linear = torch.ops.graphq.grouped_linear.default
select_rows = torch.ops.graphq.select_rows.default
