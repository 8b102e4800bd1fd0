"""What LLMC's words compute, by its documented formulas, against the formats and ranges that they are read as."""

import math

import pytest
import torch
from torch import Tensor

from graphq.frontends import load_spec
from graphq.numerics.codec import fake_quantize
from graphq.numerics.ranges import weight_scales
from graphq.spec.formats import Int
from graphq.spec.plan import Plan
from graphq.spec.quant import parse_quant


def weight(**keys: object) -> str:
    config = {"quant": {"method": "RTN", "weight": {"symmetric": True, "granularity": "per_channel", **keys}}}
    decision = load_spec(config).rules[0].decision
    assert isinstance(decision, Plan)
    return str(decision.weight)


def fitted_bias(x: Tensor, e: int, m: int) -> Tensor:
    """A row in LLMC's floats without qtorch: the bias of the exponents is fitted to the largest magnitude."""
    bias = 2**e - math.log2(float(x.abs().max())) + math.log2(2 - 2**-m) - 1
    exponent = (x.abs().log2() + bias).floor().clamp(min=1)
    step = 2 ** (exponent - m - bias)
    return (x / step).round() * step


@pytest.mark.parametrize("bit", ["e3m2", "e2m3", "e2m1", "e1m2"])
def test_floats_with_a_fitted_bias_are_scaled_floats(bit):
    x = torch.randn(6, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([fitted_bias(row, int(bit[1]), int(bit[3])) for row in x])
    found = fake_quantize(x, weight(bit=bit))
    assert (found - expected).abs().max() <= 1e-12 * x.abs().max()


def test_e4m3_with_a_fitted_bias_is_not_float8():
    x = torch.tensor([[0.9, 1.0, 0.03]], dtype=torch.float64)
    assert (fitted_bias(x[0], 4, 3) - fake_quantize(x, "float8_e4m3fn/channel")[0]).abs().max() > 1e-3


@pytest.mark.parametrize(("shrink", "grid"), [(0.8, 100), (0.5, 20), (0.29, 100)])
def test_the_search_for_the_least_error_tries_all(shrink, grid):
    w = torch.randn(16, 96, generator=torch.Generator().manual_seed(1)).pow(3)
    searched = weight(bit=3, calib_algo="mse", maxshrink=shrink, mse_grid=grid)
    best, least = torch.zeros(16), torch.full((16,), torch.inf)
    for i in range(int(shrink * grid)):
        scale = w.abs().amax(1) * (1 - i / grid) / 3
        error = ((w / scale[:, None]).round().clamp(-4, 3) * scale[:, None] - w).abs().pow(2.4).sum(1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    assert len(best.unique()) == 16
    found = weight_scales(w, Int(3), [1, -1], parse_quant(searched).method).scale.flatten()
    torch.testing.assert_close(found, best, rtol=1e-6, atol=0)
