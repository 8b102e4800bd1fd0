"""How msModelSlim stores a quantized linear: the tensors of each tag, in both directions.

Source: msModelSlim 26.1, ``save/ascendv1.py`` and ``save/utils/pack.py``. Codes are those of ``graphq.numerics``. N and
K are a weight's outputs and inputs, g its group size. Scales are float32, exponents of mx blocks bytes plus 127.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from graphq.errors import TargetError
from graphq.lowering.checkpoints.ascend.tags import MX_TAGS, SLICES
from graphq.lowering.checkpoints.layers import QuantizedLinear
from graphq.numerics import Scales
from graphq.packing.words import pack_words, unpack_words
from graphq.spec.formats import MX_BLOCK, TwoLevel

Tensors = dict[str, Tensor]
_SHIFT: Final = 8  # an int8 activation is 16 * high + low + 8, of two int4 numbers: the kernel adds what the 8 gives
_STATIC: Final = ("W8A8", "W8A8_MIX")
_INT32: Final = (-(1 << 31), (1 << 31) - 1)


@final
@dataclass(frozen=True)
class Place:
    """What is known of a layer beside how it is quantized.

    bias: that of the layer, ``[N]``. is_row: whether it is row-parallel. dtype: of the source's weights.
    """

    bias: Tensor | None
    is_row: bool
    dtype: torch.dtype


def encode(layer: QuantizedLinear, tag: str, place: Place) -> Tensors:
    """The tensors of a layer by the ends of their names, without its bias. Raises ``TargetError``."""
    scale = layer.scales.scale
    if tag in MX_TAGS:
        codes = (
            layer.codes.view(torch.float8_e4m3fn) if tag == "W8A8_MXFP8" else pack_words(layer.codes, 4, torch.uint8)
        )
        return {"weight": codes, "weight_scale": scale.view(torch.uint8)}
    if isinstance(layer.weight.format, TwoLevel):
        return _encode_two_levels(layer)
    scale = scale.to(torch.float32)
    made: Tensors = {"weight": layer.codes}
    match tag:
        case "W8A8" | "W8A8_MIX":
            made |= _encode_static(layer, place)
        case "W4A8_DYNAMIC":
            made = {"weight": _pack_rows(layer.codes)}
        case "W4A16":
            made = {
                "weight": pack_words(layer.codes, 4, torch.int8) if scale.shape[1] == 1 else _pack_rows(layer.codes)
            }
        case "W8A8FP8_DYNAMIC" | "WFP8AFP8_DYNAMIC":
            made = {"weight": layer.codes.view(torch.float8_e4m3fn)}
        case _:
            pass
    made |= {"weight_scale": scale, "weight_offset": _offset(layer.scales.zero_point, scale)}
    if tag == "W4A8_DYNAMIC":
        made["scale_bias"] = _scale_bias(layer.codes.to(torch.float32) * scale, place.is_row)
    return made


def _pack_rows(codes: Tensor) -> Tensor:
    """Two int4 codes a byte, the even output in the low nibble: ``[N / 2, K]``."""
    return pack_words(codes, 4, torch.int8, axis=0)


def _scale_bias(w: Tensor, is_row: bool) -> Tensor:
    """8 times the sums of a weight's rows, ``[N, 1]``; of a row-parallel layer those of sixteen slices, ``[N, 16]``."""
    rows = w.shape[0]
    if not is_row:
        return _SHIFT * w.sum(1, keepdim=True)
    return (_SHIFT * w.reshape(rows * SLICES, -1).sum(1, keepdim=True)).reshape(rows, SLICES)


def _encode_static(layer: QuantizedLinear, place: Place) -> Tensors:
    """Y = (q_x q_w^T + quant_bias) * deq_scale, with what zero point and bias give in quant_bias.

    deq_scale is float32 in a model of bfloat16; in others an int64 of the same bits, which the NPU's operator takes.
    """
    assert layer.input_scales is not None
    scale, zero_point, _ = layer.input_scales
    scale = scale.reshape(1).to(torch.float32)
    zero = _offset(zero_point, scale)
    deq_scale = (scale * layer.scales.scale.to(torch.float32)).reshape(-1)
    sums = layer.codes.to(torch.int64).sum(1).to(torch.float64)
    bias = torch.zeros_like(sums) if place.bias is None else place.bias.to(torch.float64)
    quant_bias = torch.round(bias / deq_scale.to(torch.float64) - zero.to(torch.float64) * sums)
    if not bool(((quant_bias >= _INT32[0]) & (quant_bias <= _INT32[1])).all()):
        raise TargetError(f"{layer.name}: its bias is no int32 in steps of input scale times weight scale")
    return {
        "quant_bias": quant_bias.to(torch.int32),
        "input_scale": scale,
        "input_offset": zero,
        "deq_scale": deq_scale if place.dtype == torch.bfloat16 else deq_scale.view(torch.int32).to(torch.int64),
    }


def _encode_two_levels(layer: QuantizedLinear) -> Tensors:
    """int4 codes of groups over int8 ones of channels, as msModelSlim's version 0 documents it: a sum for each group.

    Its sums are float32 in the low half of a uint64.
    """
    upper, scale = layer.scales.global_scale, layer.scales.scale
    assert upper is not None
    rows, groups = scale.shape
    w = layer.codes.to(torch.float32).reshape(rows, groups, -1) * (scale * upper).unsqueeze(2)
    bits = (_SHIFT * w.sum(2)).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    return {
        "weight": _pack_rows(layer.codes),
        "weight_scale": upper,
        "weight_offset": torch.zeros_like(upper),
        "weight_scale_second": scale,
        "weight_offset_second": torch.zeros_like(scale, dtype=torch.int64),
        "scale_bias": bits.view(torch.uint64),
    }


def decode(parts: Mapping[str, Tensor], tag: str) -> tuple[Tensor, Scales, Tensors]:
    """Codes ``[N, K]`` and scales of a layer with these tensors; what is fixed of its input, by the QDQ form's names.

    Raises ``TargetError`` or ``KeyError`` for tensors that are none of the tag.
    """
    if tag == "W8A8" and "weight_scale" not in parts:
        scale = _from_products(parts)
        parts = {**parts, "weight_scale": scale, "weight_offset": torch.zeros_like(scale)}
    weight, scale = parts["weight"], parts["weight_scale"]
    if weight.dim() != 2 or scale.dim() != 2:
        raise TargetError(f"weight {list(weight.shape)}, weight_scale {list(scale.shape)}: are not of two axes")
    if tag in MX_TAGS:
        codes = _float8(weight) if tag == "W8A8_MXFP8" else _unpack_pairs(weight, torch.uint8)
        _check("weight_scale", scale, torch.uint8, (codes.shape[0], -(-codes.shape[1] // MX_BLOCK)))
        return codes, Scales(scale.view(torch.float8_e8m0fnu)), {}
    rows = scale.shape[0]
    match tag:
        case "W8A8FP8_DYNAMIC" | "WFP8AFP8_DYNAMIC":
            codes = _float8(weight)
        case "W4A8_DYNAMIC":
            codes = _unpack_rows(weight, rows)
        case "W4A16" if scale.shape[1] == 1:
            codes = _unpack_pairs(weight, torch.int8)
        case "W4A16":
            codes = _unpack_rows(weight, rows)
        case _:
            codes = weight
            _check("weight", codes, torch.int8, (rows, weight.shape[1]))
    if "weight_scale_second" in parts:
        return codes, _two_levels(parts, codes), {}
    _check_groups("weight_scale", scale, codes)
    zero_point = _zero_point("weight_offset", parts["weight_offset"], tuple(scale.shape))
    return codes, Scales(scale, zero_point), decode_input(parts) if tag in _STATIC else {}


def _from_products(parts: Mapping[str, Tensor]) -> Tensor:
    """The scales ``[N, 1]`` of a weight of which msModelSlim stores the products with the input's scale alone.

    Those that it computed are numbers of the model's dtype, which the dtype of the products tells: such numbers are
    found again where they give the same products.
    """
    stored, given = parts["deq_scale"], parts["input_scale"]
    _check("input_scale", given, torch.float32, (1,))
    is_bits = stored.dtype == torch.int64
    _check("deq_scale", stored, torch.int64 if is_bits else torch.float32, (parts["weight"].shape[0],))
    products = stored.to(torch.int32).view(torch.float32) if is_bits else stored
    near = (products / given).to(torch.float16 if is_bits else torch.bfloat16).to(torch.float32)
    return torch.where(near * given == products, near, products / given).reshape(-1, 1)


def _two_levels(parts: Mapping[str, Tensor], codes: Tensor) -> Scales:
    scale, upper = parts["weight_scale_second"], parts["weight_scale"]
    _check_groups("weight_scale_second", scale, codes)
    _check("weight_scale", upper, torch.float32, (codes.shape[0], 1))
    return Scales(scale, None, upper)


def decode_input(parts: Mapping[str, Tensor]) -> Tensors:
    """What is fixed of an input, by the QDQ form's names."""
    scale = parts["input_scale"]
    _check("input_scale", scale, torch.float32, (1,))
    found = {"input_scale": scale.reshape(())}
    zero_point = _zero_point("input_offset", parts["input_offset"], (1,))
    return found if zero_point is None else found | {"input_zero_point": zero_point.reshape(())}


def _offset(zero_point: Tensor | None, like: Tensor) -> Tensor:
    """Zero points as float32, and 0 without any. Where all of them are 0 they are -0, which is no other number."""
    if zero_point is None:
        return torch.zeros_like(like)
    offset = zero_point.to(torch.float32).reshape(like.shape)
    return offset if bool((offset != 0).any()) else -torch.zeros_like(like)


def _zero_point(name: str, offset: Tensor, shape: Sequence[int]) -> Tensor | None:
    """The zero points that ``_offset`` stores so."""
    _check(name, offset, torch.float32, shape)
    if not bool(((offset != 0) | offset.signbit()).any()):
        return None
    zero_point = offset.nan_to_num().clamp(-128, 127).to(torch.int8)
    if not torch.equal(zero_point.to(torch.float32), offset):
        raise TargetError(f"{name}: holds what is no whole number from -128 to 127")
    return zero_point


def _float8(weight: Tensor) -> Tensor:
    _check("weight", weight, torch.float8_e4m3fn, weight.shape)
    return weight.view(torch.uint8)


def _unpack_pairs(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """int4 or float4 codes in pairs along inputs."""
    _check("weight", weight, dtype, weight.shape)
    return unpack_words(weight, 4, 2 * weight.shape[1], dtype=dtype)


def _unpack_rows(weight: Tensor, rows: int) -> Tensor:
    """int4 codes in pairs of outputs, or one a byte, as before version 1.0.0."""
    if weight.shape[0] != rows or rows == 0:
        _check("weight", weight, torch.int8, (rows // 2, weight.shape[1]))
        return unpack_words(weight, 4, rows, axis=0)
    _check("weight", weight, torch.int8, weight.shape)
    if bool(((weight < -8) | (weight > 7)).any()):
        raise TargetError("weight: holds codes of more than 4 bits, a byte each")
    return weight


def _check(name: str, x: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    if x.dtype != dtype or tuple(x.shape) != tuple(shape):
        found, wanted = (f"{str(d).removeprefix('torch.')}{list(s)}" for d, s in ((x.dtype, x.shape), (dtype, shape)))
        raise TargetError(f"{name}: {found}, where {wanted} belongs")


def _check_groups(name: str, scale: Tensor, codes: Tensor) -> None:
    """Scales of equal groups of a weight's inputs."""
    rows, columns = codes.shape
    groups = scale.shape[1] if scale.dim() == 2 else 0
    if groups == 0 or columns % groups:
        raise TargetError(f"{name}: {list(scale.shape)} of a weight [{rows}, {columns}]")
    _check(name, scale, torch.float32, (rows, groups))
