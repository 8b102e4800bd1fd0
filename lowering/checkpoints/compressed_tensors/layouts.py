"""How compressed-tensors stores a quantized linear: the tensors of each of its formats, in both directions.

Source: compressed-tensors 0.20, ``compressors/``; 3-, 5-, 6- and 7-bit codes lie as they do since its 0.18. Codes are
those of ``graphq.numerics``; a scale is stored in the dtype of the model's float tensors.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from graphq.errors import TargetError
from graphq.lowering.checkpoints.layers import QuantizedLinear
from graphq.numerics import Scales
from graphq.packing.words import pack_words, unpack_words
from graphq.spec.formats import MX_BLOCK, NVFP4_BLOCK, Float, Int, Mx, Nvfp4
from graphq.spec.quant import PerBlock, PerChannel, PerGroup, PerTensor, Quant

Tensors = dict[str, Tensor]


@final
@dataclass(frozen=True)
class Layout:
    """One format of compressed-tensors.

    encode: the tensors of a weight by the ends of their names; ``dtype`` is that of scales.
    decode: codes ``[N, K]`` and scales of these tensors, of a weight that is quantized so.
    """

    encode: Callable[[QuantizedLinear, torch.dtype], Tensors]
    decode: Callable[[Mapping[str, Tensor], Quant], tuple[Tensor, Scales]]


def layout_of(weight: Quant, given: Quant | None) -> str | None:
    """The format that holds such a weight beside such inputs; None where there is none.

    As compressed-tensors infers it, but that integers of fewer than 8 bits are packed beside integer inputs, too.
    """
    match weight.format:
        case Nvfp4():
            return "nvfp4-pack-quantized"
        case Mx("float4_e2m1"):
            return "mxfp4-pack-quantized"
        case Mx("float8_e4m3fn"):
            return "mxfp8-quantized"
        case Float("float8_e4m3fn"):
            return "naive-quantized" if given is None else "float-quantized"
        case Int(bits, signed=True) if bits <= 8:
            if isinstance(weight.granularity, PerBlock):
                return None
            return "int-quantized" if given is not None and bits == 8 else "pack-quantized"
        case _:
            return None


def _stored_scale(scale: Tensor, quant: Quant) -> Tensor:
    return scale.reshape(1) if isinstance(quant.granularity, PerTensor) else scale


def _held_scale(scale: Tensor, quant: Quant) -> Tensor:
    scale = _widened(scale)
    return scale.reshape(1, 1) if isinstance(quant.granularity, PerTensor) else scale


def _widened(scale: Tensor) -> Tensor:
    if not scale.is_floating_point():
        raise TargetError(f"a scale: {str(scale.dtype).removeprefix('torch.')}, no floating-point number")
    return scale if scale.dtype in (torch.float32, torch.float64) else scale.to(torch.float32)


def _held_zero_point(zero: Tensor, quant: Quant) -> Tensor:
    if zero.dtype != torch.int8:
        raise TargetError(f"weight_zero_point: {str(zero.dtype).removeprefix('torch.')}, not int8")
    return zero.reshape(1, 1) if isinstance(quant.granularity, PerTensor) else zero


def _packs_zero_points(quant: Quant) -> bool:
    return isinstance(quant.granularity, PerGroup | PerChannel)


def _bits(quant: Quant) -> int:
    assert isinstance(quant.format, Int)
    return quant.format.bits


def _encode_packed(layer: QuantizedLinear, dtype: torch.dtype) -> Tensors:
    """int32 words of codes plus 2^(bits-1), along rows; zero points likewise, along columns."""
    bits = _bits(layer.weight)
    made = {
        "weight_packed": pack_words(layer.codes, bits, torch.int32, offset_binary=True, pad=True),
        "weight_scale": _stored_scale(layer.scales.scale.to(dtype), layer.weight),
        "weight_shape": torch.tensor(layer.codes.shape, dtype=torch.int64),
    }
    zero = layer.scales.zero_point
    if zero is not None and _packs_zero_points(layer.weight):
        made["weight_zero_point"] = pack_words(zero, bits, torch.int32, axis=0, offset_binary=True, pad=True)
    elif zero is not None:
        made["weight_zero_point"] = _stored_scale(zero, layer.weight)
    return made


def _decode_packed(stored: Mapping[str, Tensor], quant: Quant) -> tuple[Tensor, Scales]:
    bits, scale = _bits(quant), _held_scale(stored["weight_scale"], quant)
    rows, columns = _shape(stored["weight_shape"])
    codes = unpack_words(stored["weight_packed"], bits, columns, offset_binary=True)
    zero = stored.get("weight_zero_point")
    if zero is not None and _packs_zero_points(quant):
        zero = unpack_words(zero, bits, rows, axis=0, offset_binary=True)
    elif zero is not None:
        zero = _held_zero_point(zero, quant)
    if codes.shape != (rows, columns):
        raise TargetError(f"weight_packed: {list(codes.shape)}, but weight_shape says [{rows}, {columns}]")
    return codes, Scales(scale, zero)


def _shape(stored: Tensor) -> Sequence[int]:
    if stored.shape != (2,) or stored.dtype != torch.int64 or not bool(((stored > 0) & (stored < 1 << 31)).all()):
        raise TargetError("weight_shape: is not two sizes")
    return [int(size) for size in stored]


def _encode_plain(layer: QuantizedLinear, dtype: torch.dtype) -> Tensors:
    """A byte for each code, float8 as such; zero points of integers likewise."""
    codes = layer.codes if layer.codes.dtype == torch.int8 else layer.codes.view(torch.float8_e4m3fn)
    made = {"weight": codes, "weight_scale": _stored_scale(layer.scales.scale.to(dtype), layer.weight)}
    if layer.scales.zero_point is not None:
        made["weight_zero_point"] = _stored_scale(layer.scales.zero_point, layer.weight)
    return made


def _decode_plain(stored: Mapping[str, Tensor], quant: Quant) -> tuple[Tensor, Scales]:
    codes, zero = stored["weight"], stored.get("weight_zero_point")
    held = codes if codes.dtype == torch.int8 else codes.view(torch.uint8)
    zero = None if zero is None else _held_zero_point(zero, quant)
    return held, Scales(_held_scale(stored["weight_scale"], quant), zero)


def _encode_nvfp4(layer: QuantizedLinear, dtype: torch.dtype) -> Tensors:
    """Two codes a byte, the even column in the low nibble; the global scale is a divisor."""
    assert layer.scales.global_scale is not None
    return {
        "weight_packed": pack_words(layer.codes, 4, torch.uint8),
        "weight_scale": layer.scales.scale,
        "weight_global_scale": layer.scales.global_scale.reshape(1),
    }


def _decode_nvfp4(stored: Mapping[str, Tensor], quant: Quant) -> tuple[Tensor, Scales]:
    scale = stored["weight_scale"]
    codes = unpack_words(stored["weight_packed"], 4, scale.shape[1] * NVFP4_BLOCK, dtype=torch.uint8)
    return codes, Scales(scale, None, stored["weight_global_scale"].reshape(1, 1))


def _encode_mxfp4(layer: QuantizedLinear, dtype: torch.dtype) -> Tensors:
    """As nvfp4, with exponents of powers of two plus 127 as scales (OCP Microscaling Formats 1.0, E8M0)."""
    return {
        "weight_packed": pack_words(layer.codes, 4, torch.uint8),
        "weight_scale": layer.scales.scale.view(torch.uint8),
    }


def _decode_mxfp4(stored: Mapping[str, Tensor], quant: Quant) -> tuple[Tensor, Scales]:
    scale = stored["weight_scale"]
    codes = unpack_words(stored["weight_packed"], 4, scale.shape[1] * MX_BLOCK, dtype=torch.uint8)
    return codes, Scales(scale.view(torch.float8_e8m0fnu))


def _encode_mxfp8(layer: QuantizedLinear, dtype: torch.dtype) -> Tensors:
    return {"weight": layer.codes.view(torch.float8_e4m3fn), "weight_scale": layer.scales.scale.view(torch.uint8)}


def _decode_mxfp8(stored: Mapping[str, Tensor], quant: Quant) -> tuple[Tensor, Scales]:
    return stored["weight"].view(torch.uint8), Scales(stored["weight_scale"].view(torch.float8_e8m0fnu))


LAYOUTS: Final[Mapping[str, Layout]] = {
    "pack-quantized": Layout(_encode_packed, _decode_packed),
    "int-quantized": Layout(_encode_plain, _decode_plain),
    "float-quantized": Layout(_encode_plain, _decode_plain),
    "naive-quantized": Layout(_encode_plain, _decode_plain),
    "nvfp4-pack-quantized": Layout(_encode_nvfp4, _decode_nvfp4),
    "mxfp4-pack-quantized": Layout(_encode_mxfp4, _decode_mxfp4),
    "mxfp8-quantized": Layout(_encode_mxfp8, _decode_mxfp8),
}


def encode_input(layer: QuantizedLinear, dtype: torch.dtype) -> Tensors:
    """The tensors of an input whose scales are fixed, by the ends of their names."""
    if layer.input_scales is None or layer.input is None:
        return {}
    scale, zero_point, _ = layer.input_scales
    if isinstance(layer.input.format, Nvfp4):
        return {"input_global_scale": scale.reshape(1)}
    made = {"input_scale": scale.reshape(1).to(dtype)}
    return made if zero_point is None else made | {"input_zero_point": zero_point.reshape(1)}


def decode_input(stored: Mapping[str, Tensor]) -> Tensors:
    """The same tensors as a QDQ form has them."""
    names = ("input_scale", "input_zero_point", "input_global_scale")
    found = {name: stored[name].reshape(()) for name in names if name in stored}
    if "input_scale" in found:
        found["input_scale"] = _widened(found["input_scale"])
    return found
