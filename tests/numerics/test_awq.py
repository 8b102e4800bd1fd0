"""AWQ's factors and ranges, and the output error that they are judged by."""

import pytest
import torch

from graphq.numerics import awq, fake_quantize
from graphq.numerics.scales import choose_scale
from graphq.spec.formats import Format, Int

INT4, ASYM = Int(4), Int(4, symmetric=False)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clipped(w: torch.Tensor, hessian: torch.Tensor, format: Format, block: list[int]) -> torch.Tensor:
    return awq.clipped(w, awq.clip_steps(w, hessian, format, block), format, block)


def test_factors_of_the_activations_alone() -> None:
    x = torch.tensor([1.0, 4.0, 16.0])
    # sqrt(x) = 1, 2, 4; over sqrt(4 * 1)
    assert awq.factors(x, None, 0.5).tolist() == [0.5, 1.0, 2.0]
    assert awq.factors(x, None, 0.0).tolist() == [1.0, 1.0, 1.0]
    assert awq.factors(x, None, 1.0).tolist() == [0.25, 1.0, 4.0]


def test_factors_of_activations_and_weights() -> None:
    x, w = torch.tensor([1.0, 4.0]), torch.tensor([0.25, 0.01])
    raw = torch.tensor([1 / (0.5 + 1e-4), 2 / (0.1 + 1e-4)], dtype=torch.float64)
    torch.testing.assert_close(awq.factors(x, w, 0.5), raw / (raw[0] * raw[1]).sqrt(), rtol=1e-7, atol=0)


def test_factors_are_positive_and_finite() -> None:
    found = awq.factors(torch.tensor([0.0, 1e30, 1.0]), torch.tensor([0.0, 1.0, 0.0]), 0.5)
    assert found.isfinite().all()
    assert (found > 0).all()
    assert awq.factors(torch.zeros(3), None, 0.5).tolist() == [1.0, 1.0, 1.0]


def test_relative_columns() -> None:
    w = torch.tensor([[1.0, -2.0, 4.0, 8.0], [3.0, 3.0, 0.0, 1.0]])
    shares = torch.tensor([[1 / 2, 1.0, 4 / 8, 1.0], [1.0, 1.0, 0.0, 1.0]])
    torch.testing.assert_close(awq.relative_columns(w, [1, 2], 1), shares.mean(0), rtol=0, atol=2e-6)
    torch.testing.assert_close(awq.relative_columns(w.T, [2, 1], 0), shares.mean(0), rtol=0, atol=2e-6)


def test_output_error_is_that_of_the_outputs_on_all_data() -> None:
    batches = [randn(2, 9, 6, seed=seed) * seed for seed in (1, 2, 5)]  # [experts, rows, K]
    hessian = sum((x.mT @ x for x in batches), torch.zeros(2, 6, 6)) / 27
    change = randn(2, 4, 6)
    squared = [(x @ change.mT).square().sum((1, 2)) for x in batches]
    wanted = torch.stack(squared).sum(0) / 27
    torch.testing.assert_close(awq.output_error(change, hessian), wanted, rtol=1e-5, atol=0)
    first = batches[0].mT @ batches[0] / 9  # the first batch alone says something else
    assert not torch.allclose(awq.output_error(change, first), wanted, rtol=0.5)


@pytest.mark.parametrize("format", [INT4, ASYM, Int(3), Int(8, symmetric=False)])
@pytest.mark.parametrize("size", [-1, 4, 6, 12])
def test_clipping_never_raises_a_block_s_error(format: Format, size: int) -> None:
    w = randn(2, 5, 12, seed=3).pow(3)
    x = randn(2, 40, 12, seed=4)
    hessian = x.mT @ x / 40
    block = [1, 1, size]

    def losses(made: torch.Tensor) -> torch.Tensor:
        error = fake_quantize(made, choose_scale(made, format, block), format, block) - w
        width = 12 if size < 0 else size
        parts = [error[..., i : i + width] for i in range(0, 12, width)]
        hessians = [hessian[:, i : i + width, i : i + width] for i in range(0, 12, width)]
        return torch.stack([((p @ h) * p).sum(-1) for p, h in zip(parts, hessians, strict=True)])

    found = clipped(w, hessian, format, block)
    assert (losses(found) <= losses(w) * (1 + 1e-5)).all()
    assert (losses(found) < losses(w) * 0.99).any() or (isinstance(format, Int) and format.bits == 8)
    assert (found.abs() <= w.abs()).all()
    assert found.shape == w.shape


def test_clipping_finds_the_least_of_its_candidates() -> None:
    w, x = randn(1, 3, 8, seed=5).pow(3), randn(1, 30, 8, seed=6)
    hessian = x.mT @ x
    block = [1, 1, -1]
    found = clipped(w, hessian, INT4, block)
    for row in range(3):
        tried: list[tuple[float, float]] = []
        for share in awq.SHARES:
            bound = w[:, row : row + 1].abs().max() * share
            own = w[:, row : row + 1].clamp(-bound, bound)
            error = fake_quantize(own, choose_scale(own, INT4, block), INT4, block) - w[:, row : row + 1]
            tried.append((float(((error @ hessian) * error).sum()), share))
        share = min(tried)[1]
        bound = w[0, row].abs().max() * share
        torch.testing.assert_close(found[0, row], w[0, row].clamp(-bound, bound), rtol=1e-5, atol=0)


def test_a_ragged_last_block() -> None:
    w, x = randn(1, 3, 10, seed=7), randn(1, 30, 10, seed=8)
    found = clipped(w, x.mT @ x, INT4, [1, 1, 4])
    alone = clipped(w[..., 8:], (x.mT @ x)[:, 8:, 8:], INT4, [1, 1, 4])
    assert torch.equal(found[..., 8:], alone)


def test_clipping_a_symmetric_range_leaves_the_smaller_side() -> None:
    w = torch.tensor([[[-8.0, 1.0, 1.0, 1.0]]])
    found = clipped(w, torch.diag(torch.tensor([1e-4, 1.0, 1.0, 1.0]))[None], INT4, [1, 1, -1])
    assert found[0, 0, 0] > -8
    assert found[0, 0, 1:].tolist() == [1.0, 1.0, 1.0]
