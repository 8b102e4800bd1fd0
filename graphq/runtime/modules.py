"""The modules of a compiled model: weights as packed bytes, scales and zero points as buffers.

Their dtypes are part of the compiled model: ``.to(dtype)`` moves these modules' tensors, scales and biases included,
between devices and leaves their dtypes, and that of the result, alone.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final, TypeVar, cast, final

import torch
from torch import Tensor, nn

from graphq import numerics, packing
from graphq.errors import PassError
from graphq.numerics import Scales
from graphq.runtime import kernels
from graphq.runtime.exactness import is_exact, largest_codes
from graphq.runtime.kernels import Kernel, Product, Rows
from graphq.runtime.packed_op import packed_linear
from graphq.runtime.quantized_module import QuantizedModule
from graphq.runtime.tiled import Snapshot, TiledModule
from graphq.spec.formats import Format, code_bits, has_global_scale, is_asymmetric

_onednn: Any = torch.ops.onednn
_row_product: Any = cast(Any, torch)._int_mm
_SCALES: Final = ("weight_scale", "weight_zero_point", "weight_global_scale")
_PREPARING: Final = threading.Lock()


def _expect(what: str, tensor: Tensor | None, wanted: Tensor | None) -> None:
    given, want = (None if t is None else tuple(t.shape) for t in (tensor, wanted))
    if given != want:
        raise PassError(f"{what} of shape {given}, not {want}")


@final
@dataclass(frozen=True)
class _Packing:
    """What a packed weight is, beside its tensors."""

    settings: dict[str, Any]
    format: Format
    block: list[int]
    shape: list[int]
    rows_first: list[int]
    columns: int
    bits: int
    dtype: torch.dtype


class PackedWeight(QuantizedModule):
    """A weight in packed codes; calling it gives the dequantized weight.

    ``weight``: ``uint8[rows, bytes]``, packed as ``graphq.packing`` says, one row for each index of ``row_axes``
    (output channels, of each expert). ``weight_scale``, ``weight_zero_point``, ``weight_global_scale`` and ``block``
    are those of the QDQ form, ``shape`` and ``row_axes`` those of the float weight; ``dtype`` is what it is dequantized
    to. It has no other name, nor those of the tensors that its format lacks: what the float layer held besides may.
    """

    def __init__(
        self, format: str, block: Sequence[int], shape: Sequence[int], row_axes: Sequence[int], dtype: torch.dtype
    ) -> None:
        super().__init__()
        parsed = numerics.parse_format(format)
        rows_first = [*row_axes, *(a for a in range(len(shape)) if a not in row_axes)]
        sizes = [shape[a] for a in rows_first]
        rows, columns = math.prod(sizes[: len(row_axes)]), math.prod(sizes[len(row_axes) :])
        bits = code_bits(parsed)
        settings = {"format": format, "block": list(block), "shape": list(shape)}
        settings |= {"row_axes": list(row_axes), "dtype": dtype}
        self.graphq_form = _Packing(settings, parsed, list(block), list(shape), rows_first, columns, bits, dtype)
        self.register_buffer("weight", torch.empty(rows, packing.packed_size(columns, bits), dtype=torch.uint8))
        _register(self, numerics.empty_scales(shape, block, parsed, row_axes[:-1], dtype))

    def forward(self) -> Tensor:
        return dequantized(self)

    def packed(self) -> Tensor:
        """The packed codes, ``uint8[rows, bytes]``."""
        return self.weight


def dequantized(module: PackedWeight) -> Tensor:
    """The weight in its float shape and dtype."""
    form = module.graphq_form
    return numerics.dequantize(codes_of(module), scales_of(module), form.format, form.block).to(form.dtype)


_W = TypeVar("_W", bound=PackedWeight)


def _register(module: nn.Module, scales: Scales) -> None:
    for name, tensor in zip(_SCALES, scales, strict=True):
        if tensor is not None:
            module.register_buffer(name, tensor)


def hold_weight(module: _W, codes: Tensor, scales: Scales) -> _W:
    """``module`` with these codes, packed; the scales are kept as they are. Raises ``PassError`` for other shapes."""
    form, held = module.graphq_form, scales_of(module)
    if list(codes.shape) != form.shape:
        raise PassError(f"codes of shape {tuple(codes.shape)}, not {tuple(form.shape)}")
    _expect("a scale", scales.scale, held.scale)
    _expect("a zero point", scales.zero_point, held.zero_point)
    _expect("a global scale", scales.global_scale, held.global_scale)
    rows = math.prod(form.shape[a] for a in form.settings["row_axes"])
    module.weight = packing.pack(codes.permute(form.rows_first).reshape(rows, form.columns), form.bits)
    _register(module, scales)
    return module


@final
@dataclass(frozen=True)
class _Prepared:
    """What an integer linear computes from its codes before the first product: tiles, or else what oneDNN takes, and
    ``row_sums``, exact up to K = 2^17. ``of``: the buffers that it is made of.
    """

    of: Snapshot
    product: Product | None
    packed: Tensor | None
    row_sums: Tensor | None


@final
@dataclass(frozen=True)
class _Product:
    """What an integer linear is, beside its tensors."""

    shape: list[int]
    per_channel: bool
    symmetric: bool
    bias: bool
    dtype: torch.dtype
    transposed: bool
    bias_dtype: torch.dtype | None


@final
class Int8Linear(TiledModule):
    """A linear on int8 codes of the input, with integer accumulation where the machine has a kernel for it.

    ``weight``: ``int8[N, K]``; ``weight_scale`` (and ``weight_zero_point``): ``[N, 1]`` or ``[1, 1]``; ``transposed``:
    the float weight is ``[K, N]`` (GPT-2's Conv1D), its scales ``[1, N]``. The product is
    ``scale_x * scale_w * sum_k (q_x - z_x)(q_w - z_w)``, whose zero points are taken out of the integer sum. It is
    computed in float32, which holds sums up to 2^24 exactly, and given in ``dtype``. The kernel's own integer sums, of
    ``(q_x + 128) q_w``, are rounded to float32 too: by 2^-24 of themselves where they are above 2^24. ``bias`` is held
    in ``bias_dtype``, by default in ``dtype``. Where tiles are faster than oneDNN, the first product rearranges
    ``weight`` into them (``TiledModule``).
    """

    def __init__(
        self,
        shape: Sequence[int],
        per_channel: bool,
        symmetric: bool,
        bias: bool,
        dtype: torch.dtype,
        transposed: bool = False,
        bias_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.graphq_form = _Product(list(shape), per_channel, symmetric, bias, dtype, transposed, bias_dtype)
        scales = [shape[0] if per_channel else 1, 1][:: -1 if transposed else 1]
        zero_point = None if symmetric else torch.empty(scales, dtype=torch.int8)
        self.register_buffer("weight", torch.empty(*shape, dtype=torch.int8))
        _register(self, Scales(torch.empty(scales, dtype=torch.float32), zero_point))
        if bias:
            self.register_buffer("bias", torch.empty(shape[0], dtype=bias_dtype or dtype))
        self._graphq_ready: _Prepared | None = None

    def forward(self, q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """``q``: int8 codes ``[..., K]``; ``scale``, ``zero_point``: ``[..., 1]``, for each token, or single ones."""
        form = self.graphq_form
        held: dict[str, Any] = self._buffers
        weight, ready = held["weight"], self._graphq_ready
        if q.dtype != torch.int8 or q.shape[-1:] != tuple(form.shape[1:]):  # which the kernel takes for granted
            raise PassError(f"codes {q.dtype}{list(q.shape)} for a weight int8{form.shape}")
        if type(q) is not Tensor or torch.compiler.is_dynamo_compiling():
            return self._traced(q, scale, zero_point)
        if ready is None or not ready.of.is_current():
            if (
                zero_point is None
                and form.symmetric
                and q.shape[:-1].numel() == 1
                and weight.dim() == 2
                and has_row_kernel(weight.device)
                and kernels.integer_kernel(weight) is None
            ):
                y = (_row_product(q.reshape(1, -1), weight.t()) * scale).mul_(held["weight_scale"].flatten())
                y = (y + held["bias"] if form.bias else y).view(*q.shape[:-1], -1)
                return y if y.dtype == form.dtype else y.to(form.dtype)
            if kernels.is_transformed():  # all above is torch's own, from here on memory is read
                return self._traced(q, scale, zero_point)
            ready = self._prepare()
        elif kernels.is_transformed():
            return self._traced(q, scale, zero_point)
        if ready.product is not None:
            return ready.product(q, form.dtype, scale, zero_point)
        return self._computed(_integer_product(q, weight, ready.packed), q, scale, zero_point, ready.row_sums)

    def _traced(self, q: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """Ops on its own tensors, which a graph holds: in tiles, one that knows them."""
        form = self.graphq_form
        if not self.is_tiled:
            row_sums = self.weight.sum(1, dtype=torch.int32).to(torch.float32)
            return self._computed(_integer_product(q, self.weight, None), q, scale, zero_point, row_sums)
        scales, format, block = _columns(self)
        how = (_bias_of(self), True, format, block, form.shape, 0, form.dtype)
        return packed_linear(q, scale, zero_point, self.weight, *scales, *how)

    def _computed(
        self, sums: Tensor, q: Tensor, scale: Tensor, zero_point: Tensor | None, row_sums: Tensor | None
    ) -> Tensor:
        """What it gives, from the sums of products of codes."""
        form = self.graphq_form
        if zero_point is not None:
            assert row_sums is not None, "it was prepared with"
            sums = sums - zero_point.to(torch.float32) * row_sums
        if not form.symmetric:
            totals = q.sum(-1, keepdim=True, dtype=torch.int32).to(torch.float32)
            if zero_point is not None:
                totals = totals - zero_point.to(torch.float32) * form.shape[1]
            sums = sums - totals * self.get_buffer("weight_zero_point").flatten().to(torch.float32)
        y = sums * scale * self.weight_scale.flatten()
        return (y + self.get_buffer("bias") if form.bias else y).to(form.dtype)

    def _prepare(self) -> _Prepared:
        with _PREPARING, torch.inference_mode(False), torch.no_grad():
            if self._graphq_ready is not None and self._graphq_ready.of.is_current():  # by another thread
                return self._graphq_ready
            self.release()  # tiles hold the scales that were
            kernel, product = kernels.integer_kernel(self.weight), None
            packed, row_sums = None, None
            if kernel is None:
                packed, row_sums = _prepack(self.weight), self.weight.sum(1, dtype=torch.int32).to(torch.float32)
            else:
                rows = _rows(self)
                sums = kernels.group_sums(rows)
                self.weight = kernels.tile(rows)
                product = Product(kernel, self.weight, replace(rows, codes=self.weight), _bias_of(self), sums)
            self._graphq_ready = made = _Prepared(Snapshot(self), product, packed, row_sums)
            return made

    @property
    def kernel(self) -> Kernel | None:
        """The kernel of the library that computes it, if one does."""
        product = None if self._graphq_ready is None else self._graphq_ready.product
        return kernels.integer_kernel(self.packed()) if product is None else product.kernel

    def product(self, has_input_zero: bool) -> Product | None:
        ready = self._graphq_ready
        return (self._prepare() if ready is None or not ready.of.is_current() else ready).product

    def packed(self) -> Tensor:
        return kernels.untile(self.weight, _rows(self)).view(torch.int8) if self.is_tiled else self.weight


def hold_linear(
    module: Int8Linear, codes: Tensor, scale: Tensor, zero_point: Tensor | None, bias: Tensor | None
) -> Int8Linear:
    """``module`` with a float weight's codes; scale and zero point stay as they are. Raises ``PassError`` for other
    shapes.
    """
    codes = codes.t().contiguous() if module.graphq_form.transposed else codes
    held = scales_of(module)
    _expect("codes", codes, module.packed())
    _expect("a scale", scale, held.scale)
    _expect("a zero point", zero_point, held.zero_point)
    _expect("a bias", bias, _bias_of(module))
    module.weight = codes
    _register(module, Scales(scale, zero_point))
    if bias is not None:
        module.register_buffer("bias", bias)
    return module


def _bias_of(module: Int8Linear) -> Tensor | None:
    return module.get_buffer("bias") if module.graphq_form.bias else None


def settings_of(module: QuantizedModule) -> dict[str, Any]:
    """The arguments that make an empty module of this kind."""
    return dict(module.graphq_form.settings) if isinstance(module, PackedWeight) else vars(module.graphq_form).copy()


def format_of(module: QuantizedModule) -> str:
    """The text of the weight's format."""
    if isinstance(module, PackedWeight):
        return str(module.graphq_form.settings["format"])
    return "int8" if module.graphq_form.symmetric else "int8/asym"


def codes_of(module: QuantizedModule) -> Tensor:
    """The codes in the float weight's shape."""
    if not isinstance(module, PackedWeight):
        held = module.packed() if isinstance(module, TiledModule) else module.weight
        return held.t() if module.graphq_form.transposed else held
    form = module.graphq_form
    flat = packing.unpack(module.packed(), form.bits, form.columns, numerics.code_dtype(form.format))
    moved = flat.reshape([form.shape[a] for a in form.rows_first])
    return moved.permute([form.rows_first.index(a) for a in range(len(form.shape))])


def scales_of(module: QuantizedModule) -> Scales:
    """Scales and zero points as they are stored; a tensor of theirs that the format lacks is none of them."""
    format = module.graphq_form.format if isinstance(module, PackedWeight) else None
    has_zero_point = is_asymmetric(format) if format is not None else not module.graphq_form.symmetric
    zero_point = module.get_buffer("weight_zero_point") if has_zero_point else None
    upper = module.get_buffer("weight_global_scale") if format is not None and has_global_scale(format) else None
    return Scales(module.weight_scale, zero_point, upper)


def _columns(module: Int8Linear) -> tuple[Scales, str, list[int]]:
    """Scales ``[N, 1]`` or ``[1, 1]``, format and block of its weight ``[N, K]``."""
    block = [1 if module.weight_scale.numel() > 1 else -1, -1]
    scale, zero_point, _ = (None if part is None else part.reshape(-1, 1) for part in scales_of(module))
    assert scale is not None
    return Scales(scale, zero_point), format_of(module), block


def _rows(module: Int8Linear) -> Rows:
    scales, format, block = _columns(module)
    codes = module.weight if module.is_tiled else module.weight.contiguous().view(torch.uint8)
    return kernels.rows_of(codes, scales, numerics.parse_format(format), block, module.graphq_form.shape, 0)


def _prepack(weight: Tensor) -> Tensor | None:
    if weight.device.type != "cpu" or not has_integer_kernel():
        return None
    return cast(Tensor, _onednn.qlinear_prepack(weight.contiguous(), None))  # torch 2.13 ignores strides here


def _integer_product(q: Tensor, weight: Tensor, packed: Tensor | None) -> Tensor:
    """``q @ weight.T`` of int8 codes, as float32: exact up to 2^24, correctly rounded above. The kernel's are exact
    where ``(q + 128) @ weight.T`` is no larger than that.
    """
    if packed is None:  # float64 holds these sums exactly
        return (q.double() @ weight.double().t()).float()
    one, none = torch.ones(weight.shape[0]), torch.zeros(weight.shape[0], dtype=torch.int32)
    # oneDNN 3.12 has fast kernels for unsigned inputs alone: codes move up by 128, and the zero point with them.
    raised = (q.reshape(-1, q.shape[-1]).contiguous() ^ -128).view(torch.uint8)
    made = _onednn.qlinear_pointwise(raised, 1.0, 128, packed, one, none, None, 1.0, 0, torch.float32, "none", [], "")
    return cast(Tensor, made).reshape(*q.shape[:-1], weight.shape[0])


@cache
def has_row_kernel(device: torch.device) -> bool:
    """Whether torch multiplies one row of int8 codes exactly here. oneDNN takes 20 microseconds to begin, this one."""
    if device.type != "cpu":
        return False
    q, w = largest_codes(1, 64), largest_codes(16, 64)
    return is_exact(lambda: _row_product(q, w.t()), q.double() @ w.double().t())


_PROBED: Final[list[bool]] = []


def has_integer_kernel() -> bool:
    """Whether oneDNN multiplies int8 exactly here."""
    if not _PROBED:
        q, w = largest_codes(1, 64), largest_codes(16, 64)
        wanted = q.double() @ w.double().t()
        _PROBED.append(is_exact(lambda: _integer_product(q, w, _onednn.qlinear_prepack(w, None)), wanted))
    return _PROBED[0]
