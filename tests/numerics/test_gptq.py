"""Rounding with error feedback: against torch.linalg, against a loop over columns, and AMCT's own integers."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from graphq import numerics
from graphq.numerics import Scales, gptq
from graphq.numerics.codes import round_scaled
from graphq.numerics.gptq import Rows, compensate, factor, order_of
from graphq.numerics.scales import effective_scale
from graphq.spec.formats import Format, Int, Nvfp4, parse_format


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian(seed: int, problems: int, columns: int, samples: int = 64) -> Tensor:
    """E[x xT] of inputs whose channels have sizes of their own and go together."""
    x = numbers(seed, problems, samples, columns) * torch.linspace(0.3, 3, columns)
    x = x + numbers(seed + 1, problems, samples, 1) * torch.linspace(2, -1, columns)
    return x.mT @ x / samples


# -- the factor


@pytest.mark.parametrize("columns", [1, 7, 40])
def test_factor(columns: int) -> None:
    h = hessian(0, 3, columns)
    found, taken = factor(h, 0.01)
    damped = h.double() + 0.01 * torch.diag_embed(
        h.double().diagonal(dim1=1, dim2=2).mean(1)[:, None].expand(3, columns)
    )
    wanted = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))  # float32
    assert taken.tolist() == [0.01] * 3


def test_factor_takes_no_dampening_where_none_is_needed() -> None:
    h = hessian(0, 1, 6).double()
    found, taken = factor(h, 0.0)
    assert taken.tolist() == [0.0]
    assert torch.allclose((found.mT @ found).double() @ h, torch.eye(6, dtype=torch.float64), atol=1e-4)


def test_dampening_grows_until_the_hessian_is_definite() -> None:
    definite = torch.eye(4)
    indefinite = torch.diag(torch.tensor([1.0, 1, 1, 1])) + 1.05 * (torch.eye(4).flip(0))  # eigenvalues 2.05 and -0.05
    hopeless = torch.eye(4) + 3 * torch.eye(4).flip(0)  # -2
    found, taken = factor(torch.stack([definite, indefinite, hopeless]), 0.001)
    assert taken.tolist() == pytest.approx([0.001, 0.1, torch.inf])
    assert torch.allclose(found[0], torch.eye(4) / 1.001**0.5)
    wanted = torch.linalg.cholesky(torch.linalg.inv(indefinite.double() + 0.1 * torch.eye(4)), upper=True)
    torch.testing.assert_close(found[1].double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[2], torch.eye(4))
    assert factor(hopeless[None] / 1.5, 1.0)[1].tolist() == [torch.inf]
    rank_one = torch.ones(1, 4, 4)
    assert factor(rank_one, 0.0)[1].item() == pytest.approx(0.001)  # from nothing to 1e-4 times ten


def test_a_dead_column_gives_and_takes_no_error() -> None:
    h = hessian(1, 1, 6)
    h[:, 2] = h[:, :, 2] = 0
    found, _ = factor(h, 0.01)
    others = torch.arange(6) != 2
    assert not found[0, 2, others].any()
    assert not found[0, others, 2].any()
    part, _ = factor(
        h[:, others][:, :, others],
        0.01 * float(torch.cat([h[0].diagonal()[others], torch.ones(1)]).mean() / h[0].diagonal()[others].mean()),
    )
    torch.testing.assert_close(found[0, others][:, others], part[0], rtol=1e-5, atol=1e-5)


def test_nothing_was_seen() -> None:
    w, rows = stack(2, 1, 8, ["int4"])
    found, taken = compensate(w, torch.zeros(1, 8, 8), rows, dampening=0.01, act_order=True, block_size=4)
    assert torch.equal(found, w)
    assert taken.item() == pytest.approx(0.01)


def test_order_is_stable() -> None:
    h = torch.diag_embed(torch.tensor([[1.0, 3, 1, 3, 2], [0, 0, 0, 0, 5]]))
    assert order_of(h).tolist() == [[1, 3, 4, 0, 2], [4, 0, 1, 2, 3]]
    many = torch.diag_embed(torch.arange(400)[None] % 2 + 1.0)
    assert order_of(many).tolist() == [[*range(1, 400, 2), *range(0, 400, 2)]]


# -- the columns

FORMATS = ["int4", "int3/asym", "float8_e4m3fn", "mxfp4", "nvfp4", "int4/over_int8"]


def scales_of(w: Tensor, format: Format, block: Sequence[int]) -> Scales:
    if isinstance(format, Nvfp4):
        return numerics.choose_scale(w, format, block, numerics.nvfp4_global_scale(w.abs().amax().view(1, 1, 1)))
    return numerics.choose_scale(w, format, block)


def rows_of(w: Tensor, first: int, text: str) -> Rows:
    format = parse_format(text)
    width = {"mxfp4": 32, "nvfp4": 16, "int4/over_int8": 8, "int3/asym": 8}.get(text, -1)
    block = [1, 1, width]
    scales = scales_of(w, format, block)
    parts = [effective_scale(scales, format), scales.zero_point]
    scale, zero = (None if p is None else numerics.expand_scale(p, w, block).expand(w.shape) for p in parts)
    assert scale is not None
    return Rows(first, first + w.shape[1], format, scale, zero)


def stack(seed: int, problems: int, columns: int, formats: Sequence[str]) -> tuple[Tensor, list[Rows]]:
    """Three rows in each of these formats."""
    w = numbers(seed, problems, 3 * len(formats), columns)
    return w, [rows_of(w[:, 3 * i : 3 * i + 3], 3 * i, text) for i, text in enumerate(formats)]


def codes(w: Tensor, rows: Sequence[Rows]) -> list[Tensor]:
    """What the codes stand for before scales: equal iff the codes are."""
    made: list[Tensor] = []
    for r in rows:
        zero = None if r.zero_point is None else r.zero_point.float()
        made.append(round_scaled(w[:, r.first : r.last] / r.scale, zero, r.format))
    return made


def textbook(w: Tensor, h: Tensor, rows: Sequence[Rows], dampening: float, act_order: bool) -> Tensor:
    """The columns of one problem one by one, with the inverse of the Hessian that is left; in float64.

    After column j is rounded, it is taken out of the inverse by a step of Gaussian elimination (Frantar et al.,
    equation 3): no Cholesky factor.
    """
    w, h = w.double().clone(), h.double()
    size = h.shape[0]
    inverse = torch.linalg.inv(h + dampening * h.diagonal().mean() * torch.eye(size))
    order = sorted(range(size), key=lambda j: -float(h[j, j])) if act_order else list(range(size))
    left = list(order)
    for j in order:
        left.remove(j)
        for r in rows:
            own = w[r.first : r.last, j]
            scale = r.scale[0, :, j].double()
            zero = None if r.zero_point is None else r.zero_point[0, :, j].double()
            value = round_scaled((own / scale).float(), None if zero is None else zero.float(), r.format).double()
            error = (own - (value if zero is None else value - zero) * scale) / inverse[j, j]
            w[r.first : r.last, left] -= error[:, None] * inverse[j, left]
        inverse = inverse - inverse[:, j : j + 1] @ inverse[j : j + 1] / inverse[j, j]
    return w


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("formats", [*([text] for text in FORMATS), FORMATS], ids=str)
def test_against_a_loop_over_columns(formats: list[str], act_order: bool) -> None:
    columns, problems = 48, 2
    w, rows = stack(3, problems, columns, formats)
    h = hessian(4, problems, columns)
    found, taken = compensate(w, h, rows, dampening=0.01, act_order=act_order, block_size=16)
    assert taken.tolist() == [0.01] * problems
    for b in range(problems):
        own = [
            Rows(
                r.first, r.last, r.format, r.scale[b : b + 1], None if r.zero_point is None else r.zero_point[b : b + 1]
            )
            for r in rows
        ]
        wanted = textbook(w[b], h[b], own, 0.01, act_order)
        # float32 sums over 48 columns; no element of these lies so near the middle between two codes
        torch.testing.assert_close(found[b].double(), wanted, rtol=0, atol=1e-4)
        for a, c in zip(codes(found[b : b + 1], own), codes(wanted[None].float(), own), strict=True):
            assert torch.equal(a, c)
    assert any(not torch.equal(a, c) for a, c in zip(codes(found, rows), codes(w, rows), strict=True))


@pytest.mark.parametrize("act_order", [False, True])
def test_block_sizes_change_the_speed_alone(act_order: bool) -> None:
    w, rows = stack(5, 2, 64, FORMATS)
    h = hessian(6, 2, 64)
    wanted = codes(compensate(w, h, rows, dampening=0.01, act_order=act_order, block_size=64)[0], rows)
    for block_size in (1, 7, 32, 128):
        found = compensate(w, h, rows, dampening=0.01, act_order=act_order, block_size=block_size)[0]
        # The same sums in another order: equal codes, but for elements in the middle between two, of which none is here
        assert all(torch.equal(a, c) for a, c in zip(codes(found, rows), wanted, strict=True)), block_size


def test_problems_are_independent() -> None:
    w, rows = stack(7, 3, 32, ["int4", "int3/asym"])
    h = hessian(8, 3, 32)
    whole, _ = compensate(w, h, rows, dampening=0.01, act_order=True, block_size=8)
    for b in range(3):
        own = [
            Rows(
                r.first, r.last, r.format, r.scale[b : b + 1], None if r.zero_point is None else r.zero_point[b : b + 1]
            )
            for r in rows
        ]
        alone, _ = compensate(w[b : b + 1], h[b : b + 1], own, dampening=0.01, act_order=True, block_size=8)
        torch.testing.assert_close(whole[b : b + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", FORMATS)
def test_the_output_error_is_less_than_that_of_rounding_to_nearest(text: str) -> None:
    w, rows = stack(9, 1, 64, [text])
    h = hessian(10, 1, 64)
    found, _ = compensate(w, h, rows, dampening=0.01, act_order=True, block_size=128)

    def loss(x: Tensor) -> float:
        zero = rows[0].zero_point
        value = codes(x, rows)[0]
        error = (value if zero is None else value - zero) * rows[0].scale - w
        return float((error @ h * error).sum())

    assert loss(found) < 0.8 * loss(w)


# -- AMCT's golden run, recorded from its own code

W = torch.tensor(
    [
        [0.10, -0.70, 0.35, 1.00, 0.22, -0.41, 0.05, 0.63],
        [-2.00, 0.50, 0.25, 1.50, -0.33, 0.77, -1.10, 0.08],
        [0.31, 0.29, -0.58, 0.44, 0.91, -0.12, 0.67, -0.85],
        [-0.15, 0.93, 0.72, -0.26, 0.38, 0.54, -0.49, 1.20],
        [0.02, 0.11, -0.07, 0.19, -0.23, 0.31, 0.27, -0.05],
        [1.25, -1.5, 0.75, 0.5, -0.25, 0.125, -0.625, 0.875],
        [0.4, 0.3, 0.2, 0.1, -0.1, -0.2, -0.3, -0.4],
        [0.9, -0.8, 0.7, -0.6, 0.5, -0.4, 0.3, -0.2],
    ]
)
X = torch.tensor([[((7 * i + 5 * j) % 11 - 5) / 4 * (4 if j == 2 else 1) for j in range(8)] for i in range(12)])
SCALES = [1 / 7, 0.25, 0.13, 0.17142858, 0.044285715, 0.1875, 0.05714286, 0.12857142]
CODES = [
    [1, -6, 2, 7, 2, -3, 0, 4],
    [-8, 2, 1, 6, -1, 3, -4, 1],
    [2, 3, -4, 4, 6, -1, 6, -6],
    [-1, 5, 4, -2, 2, 3, -3, 7],
    [0, 2, -2, 3, -5, 7, 5, -2],
    [7, -8, 4, 3, -1, 1, -3, 5],
    [7, 6, 4, 2, -2, -3, -5, -6],
    [7, -7, 5, -5, 4, -4, 2, -2],
]
NEAREST_MSE, MSE = 0.0232386, 0.0141919


def test_amct() -> None:
    format = Int(4, divisor="by_sign")
    scales = numerics.choose_scale(W, format, [1, -1])
    assert scales.scale.flatten().tolist() == pytest.approx(SCALES, rel=1e-6)
    rows = [Rows(0, 8, format, scales.scale.expand(8, 8)[None], None)]
    h = (X.T @ X / 12)[None]
    for block_size in (128, 3):
        found, _ = compensate(W[None], h, rows, dampening=0.01, act_order=True, block_size=block_size)
        q = numerics.quantize(found[0], scales, format, [1, -1])
        assert q.tolist() == CODES
    y = X @ W.T
    assert float((X @ numerics.dequantize(q, scales, format, [1, -1]).T - y).square().mean()) == pytest.approx(
        MSE, abs=1e-6
    )
    nearest = numerics.fake_quantize(W, scales, format, [1, -1])
    assert float((X @ nearest.T - y).square().mean()) == pytest.approx(NEAREST_MSE, abs=1e-6)
    assert gptq.ESCALATION == 10
