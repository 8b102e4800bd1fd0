"""compressed-tensors and ONNX as judges of the packed codes."""

import importlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from graphq.packing import AWQ_ORDER, pack_flat, pack_words, unpack_flat, unpack_words

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E2M3 = [m / 8 for m in range(8)] + [(1 + m / 8) * 2**e for e in range(3) for m in range(8)]


def random_codes(bits: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int8) -> Tensor:
    low = 0 if dtype == torch.uint8 else -(1 << (bits - 1))
    return torch.randint(low, low + (1 << bits), shape, generator=torch.Generator().manual_seed(bits)).to(dtype)


@pytest.mark.parametrize("shape", [(3, 32), (5, 33), (31, 7), (1, 1), (64, 2), (2, 6, 40)], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", range(1, 9))
def test_compressed_tensors_int32_words(bits: int, axis: int, shape: tuple[int, ...]) -> None:
    helpers = importlib.import_module("compressed_tensors.compressors.pack_quantized.helpers")
    codes = random_codes(bits, shape)
    ours = axis - 2  # compressed-tensors packs each matrix of a 3-D tensor
    words = pack_words(codes, bits, torch.int32, axis=ours, offset_binary=True, pad=True)
    assert torch.equal(words, helpers.pack_to_int32(codes, bits, axis))
    theirs = helpers.unpack_from_int32(words, bits, codes.shape, axis)
    assert torch.equal(theirs, codes)
    assert torch.equal(unpack_words(words, bits, shape[ours], axis=ours, offset_binary=True), theirs)


def values_of(codes: Tensor, magnitudes: list[float]) -> Tensor:
    """Sign and magnitude: the highest of the codes' bits is the sign."""
    table = torch.tensor([*magnitudes, *(-m for m in magnitudes)])
    return table[codes.long()]


def test_compressed_tensors_float4_pairs() -> None:
    helpers = importlib.import_module("compressed_tensors.compressors.nvfp4.helpers")
    codes = random_codes(4, (16, 64), torch.uint8)
    assert codes.unique().numel() == 16
    packed = pack_words(codes, 4, torch.uint8)
    values = values_of(codes, E2M1)
    assert torch.equal(packed, helpers.pack_fp4_to_uint8(values))
    assert torch.equal(helpers.unpack_fp4_from_uint8(packed, 16, 64, torch.float32), values)
    assert torch.equal(unpack_words(packed, 4, 64, dtype=torch.uint8), codes)


def test_compressed_tensors_float6_fours() -> None:
    helpers = importlib.import_module("compressed_tensors.compressors.mxfp6.helpers")  # since 0.20
    codes = random_codes(6, (32, 64), torch.uint8)
    assert codes.unique().numel() == 64
    packed = pack_words(codes, 6, torch.uint8)
    values = values_of(codes, E2M3)
    assert torch.equal(packed, helpers.pack_fp6_to_uint8(values))
    assert torch.equal(helpers.unpack_fp6_from_uint8(packed, 32, 64, torch.float32), values)
    assert torch.equal(unpack_words(packed, 6, 64, dtype=torch.uint8), codes)


def test_compressed_tensors_reads_autoawq_words() -> None:
    converter = importlib.import_module("compressed_tensors.entrypoints.convert.converters.autoawq").AutoAWQConverter
    codes, zeros = random_codes(4, (16, 40), torch.uint8), random_codes(4, (2, 40), torch.uint8)
    qweight, qzeros = (pack_words(q, 4, torch.int32, order=AWQ_ORDER) for q in (codes, zeros))
    unpacked = converter.reverse_awq_order(*converter.unpack_awq(qweight, qzeros, 4), 4)
    assert torch.equal(unpacked[0] & 15, codes.view(torch.int8))
    assert torch.equal(unpacked[1] & 15, zeros.view(torch.int8))


ONNX_TYPES: list[tuple[int, torch.dtype, int, Any]] = [
    (TensorProto.INT2, torch.int8, 2, ml_dtypes.int2),
    (TensorProto.UINT2, torch.uint8, 2, ml_dtypes.uint2),
    (TensorProto.INT4, torch.int8, 4, ml_dtypes.int4),
    (TensorProto.UINT4, torch.uint8, 4, ml_dtypes.uint4),
    (TensorProto.FLOAT4E2M1, torch.uint8, 4, ml_dtypes.float4_e2m1fn),
    (TensorProto.FLOAT6E2M3, torch.uint8, 6, ml_dtypes.float6_e2m3fn),
    (TensorProto.FLOAT6E3M2, torch.uint8, 6, ml_dtypes.float6_e3m2fn),
    (TensorProto.INT8, torch.int8, 8, np.int8),
]


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 7), (2, 4, 8), (3, 0)], ids=str)
@pytest.mark.parametrize(
    ("onnx_type", "dtype", "bits", "element"), ONNX_TYPES, ids=[str(row[3].__name__) for row in ONNX_TYPES]
)
def test_onnx_raw_data(onnx_type: int, dtype: torch.dtype, bits: int, element: Any, shape: tuple[int, ...]) -> None:
    codes = random_codes(bits, shape, dtype)
    array = codes.numpy().view(element)  # ml_dtypes hold one code in the low bits of each byte
    raw = pack_flat(codes, bits)
    assert raw.numpy().tobytes() == numpy_helper.from_array(array).raw_data
    tensor = helper.make_tensor("codes", onnx_type, shape, raw.numpy().tobytes(), raw=True)
    read = numpy_helper.to_array(tensor)
    assert read.dtype == element
    np.testing.assert_array_equal(
        read.view(np.uint8) & ((1 << bits) - 1), codes.numpy().view(np.uint8) & ((1 << bits) - 1)
    )
    assert torch.equal(unpack_flat(raw, bits, shape, dtype), codes)
