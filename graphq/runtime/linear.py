"""Linears that multiply with packed codes: a weight is expanded tile by tile inside the product, never as a whole."""

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from graphq.runtime import kernels
from graphq.runtime.kernels import Product, Rows
from graphq.runtime.modules import Int8Linear, PackedWeight, has_integer_kernel, scales_of
from graphq.runtime.packed_op import numbers_of, packed_linear
from graphq.runtime.packed_product import PackedProduct
from graphq.runtime.quantized_module import QuantizedModule


@final
class PackedLinear(PackedProduct):
    """A linear with a weight in packed codes, and its bias; called with ``x[..., K]``, or where ``takes_codes`` with
    int8 codes, their scales (one for each row, or for all) and zero points.

    The sums are float32's, or int32's for codes. In float64, on another device than the CPU and without the library of
    kernels it is expanded by torch, some rows at a time. ``graphq.runtime.kernels`` has the table of what computes it.
    """

    def __init__(
        self,
        format: str,
        block: Sequence[int],
        shape: Sequence[int],
        row_axes: Sequence[int],
        dtype: torch.dtype,
        bias: bool = False,
        bias_dtype: torch.dtype | None = None,
        takes_codes: bool = False,
    ) -> None:
        super().__init__(format, block, shape, row_axes, dtype, takes_codes)
        self.graphq_form.settings.update(bias=bias, bias_dtype=bias_dtype)
        self.input_axis = 1 - row_axes[0]
        if bias:
            self.register_buffer("bias", torch.empty(shape[row_axes[0]], dtype=bias_dtype or dtype))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None
    ) -> Tensor:
        """See the class."""
        form, has_zero = self.graphq_form, zero_point is not None
        if kernels.is_traced(x):
            how = (str(form.settings["format"]), form.block, form.shape, form.rows_first[0], form.dtype)
            return packed_linear(
                x, scale, zero_point, self.weight, *scales_of(self), self.held_bias, self.is_tiled, *how
            )
        if (x.requires_grad and torch.is_grad_enabled()) or kernels.is_transformed():
            w = self.differentiated()
            x = numbers_of(x, scale, zero_point, form.dtype)
            return F.linear(x, w.t() if form.rows_first[0] else w, self._bias)
        ready = self.ready(has_zero)
        if isinstance(ready.product, Product):
            return ready.product(x, form.dtype, scale, zero_point)
        return kernels.expanded_linear(numbers_of(x, scale, zero_point, form.dtype), ready.product, self._bias)

    @property
    def held_bias(self) -> Tensor | None:
        return self.get_buffer("bias") if self.graphq_form.settings["bias"] else None

    @property
    def _bias(self) -> Tensor | None:
        held = self.held_bias
        return None if held is None else held.to(self.graphq_form.dtype)

    def rows(self, codes: Tensor) -> Rows:
        form = self.graphq_form
        return kernels.rows_of(codes, scales_of(self), form.format, form.block, form.shape, form.rows_first[0])


def kernel_of(module: QuantizedModule) -> str:
    """What computes a layer with packed codes here, and why it is not something faster."""
    if isinstance(module, PackedProduct):
        return str(module.choice)
    if isinstance(module, PackedWeight):
        return "expanded as a whole: it is no linear, or not only one"
    if module.weight.device.type != "cpu":
        return f"float64 products by torch: no kernel for {module.weight.device.type}"
    if isinstance(module, Int8Linear) and (kernel := module.kernel) is not None:
        return kernel.name
    return "int8 by oneDNN" if has_integer_kernel() else "float64 products by torch: no VNNI"
