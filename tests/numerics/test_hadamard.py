"""Hadamard matrices of every size claimed, orthogonal matrices, rotated and centred axes."""

import pytest
import torch
from torch import Tensor

from graphq.numerics.hadamard import Rotation, RotationKind, centre_axis, hadamard, rotate_axis, rotation

# The multiples of 4 up to 200 that need other constructions.
MISSING = (92, 116, 156, 172, 184, 188)
SIZES = [1, 2, *(n for n in range(4, 201, 4) if n not in MISSING)]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("n", [*SIZES, 344, 688, 11008 // 16, 14336 // 8, 1332])
def test_hadamard(n: int) -> None:
    """14336 = 28 * 512 and 11008 = 344 * 32 are widths of Llama's; 344 is over the field of 7^3 elements."""
    h = hadamard(n)
    assert h is not None
    assert h.shape == (n, n)
    assert torch.equal(h.abs(), torch.ones_like(h))
    assert torch.equal(h @ h.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [0, -4, 3, 6, 7, 10, *MISSING])
def test_no_hadamard(n: int) -> None:
    assert hadamard(n) is None
    assert rotation(n, "hadamard", 0) is None if n > 0 else True


def test_by_hand() -> None:
    assert hadamard(2).tolist() == [[1, 1], [1, -1]]  # type: ignore[union-attr]
    assert hadamard(4).tolist() == [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]  # type: ignore[union-attr]


def test_sylvesters_signs() -> None:
    """The entry at i, j is -1 to the number of ones that i and j share."""
    expected = [[(-1.0) ** (i & j).bit_count() for j in range(64)] for i in range(64)]
    assert hadamard(64).tolist() == expected  # type: ignore[union-attr]


def turn(n: int, kind: RotationKind, seed: int = 0) -> Rotation:
    made = rotation(n, kind, seed)
    assert made is not None
    assert made.size == n
    return made


@pytest.mark.parametrize("kind", ["hadamard", "random_hadamard", "orthogonal"])
@pytest.mark.parametrize("n", [16, 24, 36, 128])
def test_rotations(kind: RotationKind, n: int) -> None:
    q, again, other = (turn(n, kind, seed).matrix() for seed in (3, 3, 4))
    assert torch.equal(q, again)
    assert torch.equal(q, other) == (kind == "hadamard")
    torch.testing.assert_close(q @ q.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-14)
    if kind != "orthogonal":
        torch.testing.assert_close(q.abs(), torch.full_like(q, n**-0.5), rtol=1e-14, atol=0)
    h = hadamard(n)
    assert h is not None
    plain = turn(n, "hadamard").matrix()
    torch.testing.assert_close(plain, h / n**0.5, rtol=1e-14, atol=0)  # R4 takes one in the graph, one in the weight
    if kind == "random_hadamard":
        assert torch.equal((q / plain).round().abs(), torch.ones_like(q))
        assert ((q / plain).round() == (q / plain).round()[:, :1]).all()  # whole rows change their sign
        assert not torch.equal(q, plain)


def test_orthogonal_is_uniform() -> None:
    """Not QR's own choice of signs: over many seeds the mean of every entry is zero."""
    mean = torch.stack([turn(3, "orthogonal", seed).matrix() for seed in range(2000)]).mean(0)
    assert mean.abs().max() < 0.06, mean  # an entry's deviation is 0.577, that of the mean 0.013


def test_orthogonal_of_any_size() -> None:
    turn(7, "orthogonal")


def test_hadamard_rotations_are_fast() -> None:
    """Two factors near the root: 344 is no square, and 14336 = 28 * 512 has a base of 28."""
    sizes = [
        tuple(part.shape[0] for part in (turn(n, "hadamard").left, turn(n, "hadamard").right))
        for n in (4096, 14336, 36)
    ]
    assert sizes == [(64, 64), (128, 112), (1, 36)]


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("kind", ["orthogonal", "random_hadamard"])
def test_rotate_axis(axis: int, kind: RotationKind) -> None:
    w, q = randn(8, 12, 16), turn(4, kind)
    whole = torch.block_diag(*[q.matrix()] * (w.shape[axis] // 4))
    expected = torch.tensordot(w, whole, ([axis], [0])).movedim(-1, axis)  # type: ignore[arg-type]
    made = rotate_axis(w, axis, q)
    torch.testing.assert_close(made, expected, rtol=1e-13, atol=1e-13)
    assert made.is_contiguous()


def test_rotate_a_part() -> None:
    w, q = randn(12, 3), turn(2, "orthogonal")
    made = rotate_axis(w, 0, q, (6, 1, 4))
    eye = torch.eye(1, dtype=torch.float64)
    expected = torch.block_diag(*[eye, q.matrix(), q.matrix(), eye] * 2).T @ w
    torch.testing.assert_close(made, expected, rtol=1e-13, atol=1e-13)


def test_computed_in_float64() -> None:
    w, q = randn(64, 64).to(torch.bfloat16), turn(64, "orthogonal")
    assert torch.equal(rotate_axis(w, 1, q), (w.double() @ q.matrix()).to(torch.bfloat16))


def test_centre_axis() -> None:
    w = randn(4, 6)
    assert centre_axis(w, 0).mean(0).abs().max() < 1e-15
    torch.testing.assert_close(centre_axis(w, 1), w - w.mean(1, keepdim=True), rtol=0, atol=0)
