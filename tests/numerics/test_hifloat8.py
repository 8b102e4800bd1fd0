"""HiFloat8: AMCT's decode table, its worked examples, and its encoder's rules written out in integers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import graphq
from graphq.numerics import elements, scale_from_extremes
from graphq.spec.formats import Float
from tests.numerics.tables import HIFLOAT8, INF, NAN, beside, every, halves, hifloat8_code


def encode(x: np.ndarray) -> list[int]:
    return graphq.encode(torch.from_numpy(x), "hifloat8").tolist()


def test_every_code_decodes_as_the_table() -> None:
    got = graphq.decode(torch.arange(256, dtype=torch.uint8), "hifloat8").tolist()
    assert got[:128] == HIFLOAT8
    assert got[129:] == [-v for v in HIFLOAT8[1:]]
    assert math.isnan(got[128])
    assert len({v for v in got[:128] if math.isfinite(v)}) == 127


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_float_encodes_as_the_rule(dtype: str) -> None:
    x = every(dtype)
    expected = [hifloat8_code(v) for v in x.tolist()]
    given = torch.from_numpy(x).to(torch.float16 if dtype == "float16" else torch.bfloat16)
    assert graphq.encode(given, "hifloat8").tolist() == expected
    assert encode(x) == expected
    with np.errstate(invalid="ignore"):  # signalling NaNs
        wide = x.astype(np.float64)
    assert encode(wide) == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_halves_and_their_neighbours(dtype: type[np.floating]) -> None:
    x = beside(np.concatenate([halves(HIFLOAT8), [2.0**-23, 2.0**-24, 40960.0, 49152.0]]), dtype)
    assert encode(x) == [hifloat8_code(v) for v in x.tolist()]


@given(st.lists(st.floats() | st.floats(-70000, 70000) | st.floats(-4e-5, 4e-5), min_size=1, max_size=50))
def test_float64_and_float32_encode_as_the_rule(numbers: list[float]) -> None:
    x = np.array(numbers, dtype=np.float64)
    assert encode(x) == [hifloat8_code(v) for v in x.tolist()]
    with np.errstate(over="ignore"):
        near = x.astype(np.float32)
    assert encode(near) == [hifloat8_code(v) for v in near.tolist()]


def test_not_rounded_through_another_dtype() -> None:
    # 1.061 is 1.0625 in bfloat16, which is a half and would go to 1.125; the last is a half in float32 alone.
    assert graphq.encode(torch.tensor([1.061]), "hifloat8").tolist() == [0x08]
    assert graphq.encode(torch.tensor([1.0625 - 2**-40], dtype=torch.float64), "hifloat8").tolist() == [0x08]


GOLDEN = [
    *[(1, 0x08), (-1, 0x88), (0.5, 0x18), (2, 0x10), (0.25, 0x30), (0.125, 0x38), (3, 0x14), (6, 0x24)],
    *[(0.0625, 0x50), (0.03125, 0x54), (0.1, 0x52), (1 / 3, 0x33), (0.7, 0x1B), (0.01, 0x5D), (0.001, 0x74)],
    *[(10, 0x2A), (100, 0x4A), (13, 0x2D), (7.75, 0x28), (8.5, 0x29), (15.9, 0x40), (17, 0x40), (18, 0x41)],
    *[(-6.3, 0xA5), (1.0625, 0x09), (1.1875, 0x0A), (160, 0x4D), (192, 0x4E), (224, 0x4F), (240, 0x60)],
    *[(320, 0x61), (448, 0x62), (24576, 0x6D), (28672, 0x6E), (32767, 0x6E), (32768, 0x6E), (40960, 0x6E)],
    *[(65504, 0x6E), (1e30, 0x6E), (INF, 0x6F), (-INF, 0xEF), (NAN, 0x80), (-0.0, 0x00), (0.0, 0x00)],
    *[(2.0**-23, 0x01), (2.0**-24, 0x00), (-(2.0**-24), 0x00), (3 * 2.0**-23, 0x02), (1.25 * 2.0**-16, 0x07)],
    *[(1.5 * 2.0**-16, 0x7E), (2.718e-5, 0x7E), (2.0**-15, 0x7E)],
]


@pytest.mark.parametrize(("x", "code"), GOLDEN)
def test_values_encode_as_amct_has_them(x: float, code: int) -> None:
    assert hifloat8_code(x) == code
    for dtype in (torch.float32, torch.float64):
        assert graphq.encode(torch.tensor(x, dtype=dtype), "hifloat8").item() == code


def test_scales() -> None:
    def scale(high: float, kind) -> float:
        return scale_from_extremes(torch.tensor(-high / 2), torch.tensor(high), Float("hifloat8", kind))[0].item()

    assert scale(3, "max") == 0.1875
    assert scale(3, "to15") == np.float32(3) / np.float32(15)
    assert [scale(v, "unit") for v in (0, 3, 1e30)] == [1, 1, 1]
    assert scale(float("inf"), "unit") == float("inf")
    assert [scale(v, "pow2") for v in (3, 2, 16, 16.5)] == [0.25, 0.125, 1, 2]
    assert elements.largest("hifloat8") == 32768
