"""Codes and values of the element formats: tables of the specifications, and every way to round into them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import graphq
from graphq.errors import SpecError
from graphq.numerics import elements
from tests.numerics.tables import BITS, HIFLOAT8, INF, MINIFLOATS, NAN, beside, every, halves, minifloat_code

WITH_NAN = ["float8_e4m3fn", "float8_e5m2", "hifloat8"]
WITHOUT_NAN = ["float4_e2m1", "float4_e1m2", "float6_e2m3", "float6_e3m2", "int4", "uint8"]
SIXTEEN_BITS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def torch_codes(x: np.ndarray, element: str) -> np.ndarray:
    return graphq.encode(torch.from_numpy(x), element).numpy()


@pytest.mark.parametrize("element", MINIFLOATS)
def test_every_code_decodes_as_the_table(element: str) -> None:
    values, half = MINIFLOATS[element], 1 << (BITS[element] - 1)
    rest = [INF, *[NAN] * 3] if element == "float8_e5m2" else [NAN] * (half - len(values))
    expected = torch.tensor([*values, *rest, *(-v for v in [*values, *rest])])
    got = graphq.decode(torch.arange(2 * half, dtype=torch.uint8), element)
    assert got.dtype == torch.float32
    assert torch.equal(got.view(torch.int32)[~expected.isnan()], expected.view(torch.int32)[~expected.isnan()])
    assert torch.equal(got.isnan(), expected.isnan())


def test_every_e8m0_code_decodes_to_its_power_of_two() -> None:
    got = graphq.decode(torch.arange(256, dtype=torch.uint8), "e8m0").tolist()
    assert got[:255] == [2.0 ** (code - 127) for code in range(255)]
    assert math.isnan(got[255])


@pytest.mark.parametrize("element", [*MINIFLOATS, "hifloat8", "e8m0"])
def test_values_encode_to_their_own_code(element: str) -> None:
    codes = torch.arange(1 << BITS.get(element, 8), dtype=torch.uint8)
    values = graphq.decode(codes, element)
    kept = ~values.isnan()
    if element == "float8_e5m2":
        kept &= ~values.isinf()  # infinity saturates
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(graphq.encode(values[kept].to(dtype), element), codes[kept])


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("element", MINIFLOATS)
def test_every_16_bit_float_encodes_to_the_nearest_value(element: str, dtype: str) -> None:
    x = every(dtype)
    x = x[~np.isnan(x)]
    got = graphq.encode(torch.from_numpy(x).to(SIXTEEN_BITS[dtype]), element)
    assert got.dtype == torch.uint8
    assert (got.numpy() == minifloat_code(x, element)).all()
    assert (torch_codes(x.astype(np.float64), element) == minifloat_code(x, element)).all()
    away = elements.encode(torch.from_numpy(x), element, "away")
    assert (away.numpy() == minifloat_code(x, element, away=True)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("element", MINIFLOATS)
def test_halves_and_their_neighbours(element: str, dtype: type[np.floating]) -> None:
    x = beside(halves(MINIFLOATS[element]), dtype)
    assert (torch_codes(x, element) == minifloat_code(x, element)).all()
    away = elements.encode(torch.from_numpy(x), element, "away")
    assert (away.numpy() == minifloat_code(x, element, away=True)).all()


@pytest.mark.parametrize("rounding", ["even", "away"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("element", [*MINIFLOATS, "hifloat8"])
def test_round_to_is_the_value_of_the_code(element: str, dtype: torch.dtype, rounding: elements.Rounding) -> None:
    points = beside(halves(MINIFLOATS.get(element, HIFLOAT8)), np.float32)
    x = torch.from_numpy(np.concatenate([points, every("bfloat16")])).to(dtype)
    x = x if elements.has_nan(element) else x[~x.isnan()]
    got = elements.round_to(x.clone(), element, rounding)
    expected = elements.decode(elements.encode(x, element, rounding), element, dtype)
    assert got.dtype == dtype
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[~got.isnan()], expected[~got.isnan()])  # but for the sign of zeros, which may differ


# AMCT's own examples of float4_e2m1 and float4_e1m2.
FLOAT4 = [
    *[("float4_e2m1", x, v) for x, v in [(0.25, 0), (0.26, 0.5), (0.75, 1), (1.25, 1), (1.26, 1.5), (1.75, 2)]],
    *[("float4_e2m1", x, v) for x, v in [(2.5, 2), (2.6, 3), (3.5, 4), (5.0, 4), (5.1, 6), (9, 6)]],
    *[("float4_e1m2", x, v) for x, v in [(2, 1.75), (1.4, 1.5), (1.24, 1.25), (0.9, 1), (0.7, 0.75), (0.22, 0.25)]],
    ("float4_e1m2", 0.1, 0),
    # Its thresholds: <= .125, [.375, .625], [.875, 1.125], [1.375, 1.625] take their even ends.
    *[("float4_e1m2", x, v) for x, v in [(0.125, 0), (0.375, 0.5), (0.625, 0.5), (0.875, 1), (1.125, 1)]],
    *[("float4_e1m2", x, v) for x, v in [(1.375, 1.5), (1.625, 1.5)]],
]


@pytest.mark.parametrize(("element", "x", "value"), FLOAT4)
def test_float4_rounds_as_amct(element: str, x: float, value: float) -> None:
    got = graphq.decode(graphq.encode(torch.tensor([x, -x], dtype=torch.float32), element), element)
    assert got.tolist() == [value, -value]


def test_float4_codes_of_ascend() -> None:
    assert graphq.encode(torch.tensor([0, 0.5, -1, -6]), "float4_e2m1").tolist() == [0, 1, 10, 15]  # bytes 16, 250


@pytest.mark.parametrize(("element", "largest"), [(e, max(values)) for e, values in MINIFLOATS.items()])
def test_what_is_too_large_saturates(element: str, largest: float) -> None:
    top = len(MINIFLOATS[element]) - 1
    sign = 1 << (BITS[element] - 1)
    for dtype, far in [(torch.float32, 3e38), (torch.float64, 1e300), (torch.bfloat16, 3e38), (torch.float16, 65504.0)]:
        x = torch.tensor([largest, far, INF, -largest, -far, -INF], dtype=dtype)
        assert graphq.encode(x, element).tolist() == [top] * 3 + [sign | top] * 3


@pytest.mark.parametrize("element", WITH_NAN)
def test_nan_stays_nan(element: str) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        codes = graphq.encode(torch.tensor([NAN, -NAN, 1.0], dtype=dtype), element)
        assert graphq.decode(codes, element).isnan().tolist() == [True, True, False]
    signalling = torch.tensor([0x7F800001, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert graphq.decode(graphq.encode(signalling, element), element).isnan().all()


@pytest.mark.parametrize("element", WITHOUT_NAN)
def test_nan_is_an_error_where_the_format_has_none(element: str) -> None:
    with pytest.raises(SpecError) as raised:
        graphq.encode(torch.tensor([1.0, NAN]), element)
    assert str(raised.value) == f"{element} has no NaN; x holds one"


def test_zero_keeps_its_sign_but_in_hifloat8() -> None:
    for element, bits in BITS.items():
        codes = graphq.encode(torch.tensor([0.0, -0.0, -1e-30]), element)
        assert codes.tolist() == [0, 1 << (bits - 1), 1 << (bits - 1)]
    assert graphq.encode(torch.tensor([0.0, -0.0, -1e-30]), "hifloat8").tolist() == [0, 0, 0]


# -- e8m0


@pytest.mark.parametrize("dtype", [*SIXTEEN_BITS, "float32", "float64"])
def test_e8m0_is_the_largest_power_of_two_up_to_x(dtype: str) -> None:
    if dtype in SIXTEEN_BITS:
        x = every(dtype)
        x = x[x >= 0]
        given = torch.from_numpy(x).to(SIXTEEN_BITS[dtype])
    else:
        kind = np.float32 if dtype == "float32" else np.float64
        powers = np.array([2.0**e for e in range(-127, 128)])
        x = np.concatenate([beside(powers, kind), beside(1.5 * powers[1:], kind), [kind(0), kind(np.inf)]])
        given = torch.from_numpy(x)
    expected = [0 if v < 2.0**-127 else min(math.frexp(v)[1] - 1, 127) + 127 if v < INF else 254 for v in x.tolist()]
    assert graphq.encode(given, "e8m0").tolist() == expected


def test_e8m0_has_nan_and_no_negative_numbers() -> None:
    assert graphq.encode(torch.tensor([NAN, 1.0, -0.0]), "e8m0").tolist() == [255, 127, 0]
    for x in (-1.0, -1e-40, -INF):
        with pytest.raises(SpecError) as raised:
            graphq.encode(torch.tensor([1.0, x]), "e8m0")
        assert str(raised.value) == "e8m0 has no negative numbers; x holds one"


# -- laws


@given(
    st.lists(st.floats(allow_nan=False), min_size=2, max_size=30),
    st.sampled_from([*MINIFLOATS, "hifloat8"]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_rounding_is_monotonic_idempotent_and_odd(numbers: list[float], element: str, dtype: torch.dtype) -> None:
    x = torch.tensor(sorted(numbers), dtype=torch.float64).to(dtype)
    codes = graphq.encode(x, element)
    values = graphq.decode(codes, element)
    assert (values[1:] >= values[:-1]).all()
    assert torch.equal(graphq.decode(graphq.encode(values, element), element), values)
    assert torch.equal(graphq.decode(graphq.encode(-x, element), element), -values)


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20), st.sampled_from([*MINIFLOATS])
)
def test_float64_is_rounded_once(numbers: list[float], element: str) -> None:
    x = np.array([*numbers, *(math.ldexp(math.frexp(v)[0], int(v) % 12 - 6 if abs(v) < 1e9 else 0) for v in numbers)])
    assert (torch_codes(x, element) == minifloat_code(x, element)).all()


def test_shapes_are_kept() -> None:
    for shape in [(), (0,), (3,), (2, 0, 3), (2, 3, 4)]:
        for element in (*MINIFLOATS, "hifloat8", "e8m0", "int4", "uint16"):
            codes = graphq.encode(torch.ones(shape), element)
            assert codes.shape == shape
            assert torch.equal(graphq.decode(codes, element), torch.ones(shape))
    x = torch.arange(12.0).reshape(3, 4).T  # not contiguous
    for element in (*MINIFLOATS, "hifloat8"):
        assert torch.equal(graphq.encode(x, element), graphq.encode(x.contiguous(), element))
        assert torch.equal(x, torch.arange(12.0).reshape(3, 4).T)  # and not written to
