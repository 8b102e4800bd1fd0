"""Linears that multiply with packed codes: a weight is expanded tile by tile inside the product, never as a whole."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import torch
import torch.nn.functional as F
from torch import Tensor

from graphq import numerics
from graphq.errors import PassError
from graphq.numerics import Scales
from graphq.runtime import kernels
from graphq.runtime.kernels import Choice, Product, Rows
from graphq.runtime.modules import Int8Linear, PackedWeight, dequantized, has_integer_kernel, scales_of
from graphq.runtime.quantized_module import QuantizedModule
from graphq.runtime.tiled import Snapshot, TiledModule

_library = torch.library.Library("graphq", "FRAGMENT")  # held for the process: its ops vanish with it
_library.define(
    "packed_linear(Tensor x, Tensor? x_scale, Tensor? x_zero_point, Tensor weight, Tensor scale, Tensor? zero_point,"
    " Tensor? global_scale, Tensor? bias, bool is_tiled, str format, int[] block, int[] shape, int row_axis,"
    " ScalarType dtype) -> Tensor"
)
_PREPARING: Final = threading.Lock()


@final
@dataclass(frozen=True)
class _Ready:
    """What a linear computes with: a product or rows for torch. ``of``: the buffers that it is made of."""

    of: Snapshot
    choice: Choice
    product: Product | Rows
    has_input_zero: bool


@final
class PackedLinear(TiledModule, PackedWeight):
    """A linear with a weight in packed codes, and its bias; called with ``x[..., K]``, or where ``takes_codes`` with
    int8 codes, their scales (one for each row, or for all) and zero points.

    ``weight``: as ``PackedWeight`` has it, until the first product rearranges it into tiles in its place; what
    ``state_dict``, copies and ``packed`` give is always the former. The sums are float32's, or int32's for codes. In
    float64, on another device than the CPU and without the library of kernels it is expanded by torch, some rows at a
    time. ``graphq.runtime.kernels`` has the table of what computes it.
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
        super().__init__(format, block, shape, row_axes, dtype)
        self.graphq_form.settings.update(bias=bias, bias_dtype=bias_dtype, takes_codes=takes_codes)
        if bias:
            self.register_buffer("bias", torch.empty(shape[row_axes[0]], dtype=bias_dtype or dtype))
        self._graphq_ready: _Ready | None = None

    @property
    def takes_codes(self) -> bool:
        """Whether its inputs are int8 codes."""
        return bool(self.graphq_form.settings["takes_codes"])

    @property
    def choice(self) -> Choice:
        """The kernel that computes it, and why it is not a better one."""
        if self._graphq_ready is not None:
            return self._graphq_ready.choice
        form = self.graphq_form
        size = form.block[1 - form.rows_first[0]]
        return kernels.choose(
            "int8" if self.takes_codes else str(form.dtype).removeprefix("torch."),
            self.weight.device,
            size=math.prod(form.shape),
            group=form.columns if size < 0 else min(size, form.columns),
            is_integer=kernels.is_integer(form.format),
            is_supported=kernels.is_supported(scales_of(self), form.format),
        )

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None
    ) -> Tensor:
        """See the class."""
        form, has_zero = self.graphq_form, zero_point is not None
        if type(x) is not Tensor or torch.compiler.is_compiling():
            bias = self.get_buffer("bias") if form.settings["bias"] else None
            how = (str(form.settings["format"]), form.block, form.shape, form.rows_first[0], form.dtype)
            return _op(x, scale, zero_point, self.weight, *scales_of(self), bias, self.is_tiled, *how)
        if x.requires_grad and torch.is_grad_enabled():
            w = dequantized(self)
            return F.linear(x.to(form.dtype), w.t() if form.rows_first[0] else w, self._bias)
        ready = self._ready(has_zero)
        if isinstance(ready.product, Product):
            return ready.product(x, form.dtype, scale, zero_point)
        return kernels.expanded_linear(_float(x, scale, zero_point, form.dtype), ready.product, self._bias)

    @property
    def _bias(self) -> Tensor | None:
        return self.get_buffer("bias").to(self.graphq_form.dtype) if self.graphq_form.settings["bias"] else None

    def product(self, has_input_zero: bool) -> Product | None:
        product = self._ready(has_input_zero).product
        return product if isinstance(product, Product) else None

    def _ready(self, has_input_zero: bool) -> _Ready:
        ready = self._graphq_ready
        if ready is None or not ready.of.is_current() or ready.has_input_zero < has_input_zero:
            ready = self._prepare(has_input_zero)
        return ready

    def _prepare(self, has_input_zero: bool) -> _Ready:
        form, has_bias = self.graphq_form, self.graphq_form.settings["bias"]
        with _PREPARING, torch.inference_mode(False), torch.no_grad():
            if self._graphq_ready is not None and not self._graphq_ready.of.is_current():
                self.release()  # tiles hold the scales that were
            choice = self.choice
            plain = self.packed() if has_input_zero else self.weight
            rows = kernels.rows_of(plain, scales_of(self), form.format, form.block, form.shape, form.rows_first[0])
            product: Product | Rows = rows
            if choice.kernel.level is not None:
                if not self.is_tiled:
                    self.weight = kernels.tile(rows)
                sums = kernels.group_sums(rows) if has_input_zero else None
                bias = self.get_buffer("bias") if has_bias else None
                product = Product(choice.kernel, self.weight, replace(rows, codes=self.weight), bias, sums)
            self._graphq_ready = ready = _Ready(Snapshot(self), choice, product, has_input_zero)
            return ready

    def packed(self) -> Tensor:
        if not self.is_tiled:
            return self.weight
        form = self.graphq_form
        how = (scales_of(self), form.format, form.block, form.shape, form.rows_first[0])
        return kernels.untile(self.weight, kernels.rows_of(self.weight, *how))


def kernel_of(module: QuantizedModule) -> str:
    """What computes a layer with packed codes here, and why it is not something faster."""
    if isinstance(module, PackedLinear):
        return str(module.choice)
    if isinstance(module, PackedWeight):
        return "expanded as a whole: it is no linear, or not only one"
    if module.weight.device.type != "cpu":
        return f"float64 products by torch: no kernel for {module.weight.device.type}"
    if isinstance(module, Int8Linear) and (kernel := module.kernel) is not None:
        return kernel.name
    return "int8 by oneDNN" if has_integer_kernel() else "float64 products by torch: no VNNI"


def _float(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
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
) -> Tensor:
    """A ``PackedLinear`` as one op, of its weight in either form. In tiles it takes the machine that they are for."""
    parsed = numerics.parse_format(format)
    rows = kernels.rows_of(weight, Scales(scale, zero_point, global_scale), parsed, block, shape, row_axis)
    if not is_tiled:
        bias = None if bias is None else bias.to(dtype)
        return kernels.expanded_linear(_float(x, x_scale, x_zero_point, dtype), rows, bias)
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
        sums = kernels.group_sums(replace(rows, codes=kernels.untile(weight, rows)))
    return Product(kernel, weight, rows, bias, sums)(x, dtype, x_scale, x_zero_point)


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
) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[row_axis], dtype=dtype)


_library.impl("packed_linear", _packed_linear, "CompositeExplicitAutograd")
torch.library.register_fake("graphq::packed_linear", _packed_linear_fake, lib=_library)
_op: Final = torch.ops.graphq.packed_linear.default
