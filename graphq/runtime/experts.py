"""Experts' linears on packed codes: rows of one tensor, each by the weight of its expert, in one call."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from graphq.runtime import kernels, ops
from graphq.runtime.kernels import Product, Rows
from graphq.runtime.modules import scales_of
from graphq.runtime.packed_op import numbers_of, packed_linear
from graphq.runtime.packed_product import PackedProduct


@final
class PackedExperts(PackedProduct):
    """``graphq::grouped_linear`` by weights ``[E, N, K]`` in packed codes; called with rows ``x[T, K]`` and
    ``offsets[E]``, or where ``takes_codes`` with int8 codes, offsets, scales (one for each row, or for all) and zero
    points.

    As ``PackedLinear`` it sums in float32, or in int32 for codes, and is expanded by torch where there is no kernel: of
    the experts that have rows, some of theirs at a time.
    """

    def __init__(
        self,
        format: str,
        block: Sequence[int],
        shape: Sequence[int],
        row_axes: Sequence[int],
        dtype: torch.dtype,
        takes_codes: bool = False,
    ) -> None:
        super().__init__(format, block, shape, row_axes, dtype, takes_codes)
        self.input_axis, self.experts = 2, shape[0]

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, offsets: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None
    ) -> Tensor:
        """See the class. Raises ``PassError`` for offsets that do not cut the rows."""
        form = self.graphq_form
        if kernels.is_traced(x):
            how = (str(form.settings["format"]), form.block, form.shape, 1, form.dtype, offsets)
            return packed_linear(x, scale, zero_point, self.weight, *scales_of(self), None, self.is_tiled, *how)
        if (x.requires_grad and torch.is_grad_enabled()) or kernels.is_transformed():
            x = numbers_of(x, scale, zero_point, form.dtype)
            return ops.REFERENCES[ops.grouped_linear](x, self.differentiated(), offsets)
        ready = self.ready(zero_point is not None)
        if isinstance(ready.product, Product):
            return ready.product(x, form.dtype, scale, zero_point, offsets)
        x = numbers_of(x, scale, zero_point, form.dtype)
        return kernels.expanded_experts(x, ready.product, form.shape[0], offsets)

    def rows(self, codes: Tensor) -> Rows:
        form = self.graphq_form
        return kernels.stacked_rows(codes, scales_of(self), form.format, form.block, form.shape)
