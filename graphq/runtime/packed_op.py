"""A product with packed codes as one op, ``graphq::packed_linear``: what export and ``torch.compile`` see of it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from graphq import numerics
from graphq.errors import PassError
from graphq.numerics import Scales
from graphq.runtime import kernels
from graphq.runtime.kernels import Product

_library = torch.library.Library("graphq", "FRAGMENT")  # held for the process: its ops vanish with it
_library.define(
    "packed_linear(Tensor x, Tensor? x_scale, Tensor? x_zero_point, Tensor weight, Tensor scale, Tensor? zero_point,"
    " Tensor? global_scale, Tensor? bias, bool is_tiled, str format, int[] block, int[] shape, int row_axis,"
    " ScalarType dtype, Tensor? offsets=None) -> Tensor"
)


def numbers_of(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What a linear's inputs stand for, in the dtype that it computes in."""
    if scale is not None:
        x = x.to(scale.dtype) if zero_point is None else x.to(scale.dtype) - zero_point.to(scale.dtype)
        x = x * scale
    return x.to(dtype)


def _packed_linear(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    global_scale: Tensor | None,
    bias: Tensor | None,
    is_tiled: bool,
    format: str,
    block: Sequence[int],
    shape: Sequence[int],
    row_axis: int,
    dtype: torch.dtype,
    offsets: Tensor | None = None,
) -> Tensor:
    """A ``PackedLinear``, or with ``offsets`` ``PackedExperts``, as one op, of its weight in either form. In tiles it
    takes the machine that they are for.
    """
    parsed, scales = numerics.parse_format(format), Scales(scale, zero_point, global_scale)
    experts = None if offsets is None else shape[0]
    if offsets is None:
        rows = kernels.rows_of(weight, scales, parsed, block, shape, row_axis)
    else:
        rows = kernels.stacked_rows(weight, scales, parsed, block, shape)
    if not is_tiled:
        bias = None if bias is None else bias.to(dtype)
        x = numbers_of(x, x_scale, x_zero_point, dtype)
        if offsets is None:
            return kernels.expanded_linear(x, rows, bias)
        return kernels.expanded_experts(x, rows, shape[0], offsets)
    kernel = kernels.choose(
        str(dtype).removeprefix("torch.") if x_scale is None else "int8",
        weight.device,
        size=math.prod(shape),
        group=rows.group,
        is_integer=rows.is_integer,
        is_supported=True,  # or there were no tiles
    ).kernel
    if kernel.level is None:
        raise PassError(f"{format}: there is no kernel for a weight in tiles here")
    sums = None
    if x_zero_point is not None:
        each = experts or 1
        sums = kernels.group_sums(replace(rows, codes=kernels.untile(weight, rows, each)), each)
    return Product(kernel, weight, rows, bias, sums, experts)(x, dtype, x_scale, x_zero_point, offsets)


def _packed_linear_fake(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    global_scale: Tensor | None,
    bias: Tensor | None,
    is_tiled: bool,
    format: str,
    block: Sequence[int],
    shape: Sequence[int],
    row_axis: int,
    dtype: torch.dtype,
    offsets: Tensor | None = None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[row_axis], dtype=dtype)


_library.impl("packed_linear", _packed_linear, "CompositeExplicitAutograd")
torch.library.register_fake("graphq::packed_linear", _packed_linear_fake, lib=_library)
packed_linear: Final = torch.ops.graphq.packed_linear.default
"""See ``_packed_linear``."""
