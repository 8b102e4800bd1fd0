"""torch's dtypes and ml_dtypes as judges of the element formats.

In range alone: of what lies above the largest value torch's e5m2 and ml_dtypes make Inf or NaN, and graphq saturates.
"""

import ml_dtypes
import numpy as np
import pytest
import torch

import graphq
from tests.numerics.tables import BITS, MINIFLOATS, beside, every, halves

TORCH = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
ML_DTYPES = {
    "float4_e2m1": ml_dtypes.float4_e2m1fn,
    "float6_e2m3": ml_dtypes.float6_e2m3fn,
    "float6_e3m2": ml_dtypes.float6_e3m2fn,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


def in_range(x: np.ndarray, element: str) -> np.ndarray:
    return x[np.abs(x) <= MINIFLOATS[element][-1]]  # not NaN either


@pytest.mark.parametrize("element", TORCH)
def test_codes_decode_as_torchs(element: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    got, expected = graphq.decode(codes, element), codes.view(TORCH[element]).float()
    assert torch.equal(got.isnan(), expected.isnan())
    real = ~got.isnan()
    assert torch.equal(got[real].view(torch.int32), expected[real].view(torch.int32))


def test_e8m0_codes_decode_as_torchs_and_ml_dtypes() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    got = graphq.decode(codes, "e8m0")
    assert torch.equal(got[:255], codes.view(torch.float8_e8m0fnu).float()[:255])
    theirs = codes.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(got.numpy(), theirs)


def test_powers_of_two_encode_to_e8m0_as_ml_dtypes() -> None:
    x = np.array([2.0**e for e in range(-126, 128)], dtype=np.float32)  # their 2^-127 in float32 is a subnormal number
    theirs = x.astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
    assert (graphq.encode(torch.from_numpy(x), "e8m0").numpy() == theirs).all()


@pytest.mark.parametrize("element", ML_DTYPES)
def test_codes_decode_as_ml_dtypes(element: str) -> None:
    codes = np.arange(1 << BITS[element], dtype=np.uint8)
    got = graphq.decode(torch.from_numpy(codes), element).numpy()
    expected = codes.view(ML_DTYPES[element]).astype(np.float32)
    np.testing.assert_array_equal(got, expected)  # equal, NaN where theirs is NaN
    assert (np.signbit(got) == np.signbit(expected))[~np.isnan(got)].all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("element", TORCH)
def test_every_16_bit_float_encodes_as_torchs(element: str, dtype: str) -> None:
    x = torch.from_numpy(in_range(every(dtype), element)).to(getattr(torch, dtype))
    assert torch.equal(graphq.encode(x, element), x.to(TORCH[element]).view(torch.uint8))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("element", ML_DTYPES)
def test_every_16_bit_float_encodes_as_ml_dtypes(element: str, dtype: str) -> None:
    x = in_range(every(dtype), element)
    theirs = x.astype(ML_DTYPES[element]).view(np.uint8)
    assert (graphq.encode(torch.from_numpy(x), element).numpy() == theirs).all()


@pytest.mark.parametrize("element", ML_DTYPES)
def test_halves_and_their_neighbours_encode_as_ml_dtypes(element: str) -> None:
    x = in_range(beside(halves(MINIFLOATS[element]), np.float32), element)
    theirs = x.astype(ML_DTYPES[element]).view(np.uint8)
    assert (graphq.encode(torch.from_numpy(x), element).numpy() == theirs).all()
    if element in TORCH:
        given = torch.from_numpy(x)
        assert torch.equal(graphq.encode(given, element), given.to(TORCH[element]).view(torch.uint8))


@pytest.mark.parametrize("element", TORCH)
def test_random_float32_bits_encode_as_torchs(element: str) -> None:
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), generator=torch.Generator().manual_seed(3)).to(torch.int32)
    x = torch.from_numpy(in_range(bits.view(torch.float32).numpy(), element))
    assert torch.equal(graphq.encode(x, element), x.to(TORCH[element]).view(torch.uint8))
