"""Hadamard matrices and other orthogonal ones, and what becomes of a weight whose axis is rotated or centred.

Sylvester's doubling (1867) times Paley's constructions I and II over the fields of p, p^2 and p^3 elements (1933).
QuaRot (arXiv:2404.00456) takes Q = D H / sqrt(n) with D of random signs (section 3); SliceGPT (arXiv:2401.15024,
section 3.1) centres what a layer norm reads.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

RotationKind = Literal["hadamard", "random_hadamard", "orthogonal"]
_DOUBLING: Final = ((1, 1), (1, -1))
_PALEY_2: Final = ((1, -1), (-1, -1))


def hadamard(n: int) -> Float64[Tensor, "n n"] | None:
    """A matrix of +1 and -1 with H H^T = n I; None if these constructions give none of this size.

    The smallest base is taken, and doubled until it has the size. Sizes such as 92, 156 and 172 have none here.
    """
    odd = n // (n & -n) if n > 0 else 0
    bases = [odd] if odd <= 1 else [odd << k for k in range(2, n.bit_length()) if n % (odd << k) == 0]
    for base in bases if odd else ():
        made = _paley(base) if base > 1 else torch.ones(1, 1, dtype=torch.float64)
        if made is not None:
            while made.shape[0] < n:
                made = torch.kron(torch.tensor(_DOUBLING, dtype=torch.float64), made)
            return made
    return None


def _paley(n: int) -> Float64[Tensor, "n n"] | None:
    """I + S of a skew conference matrix S of n = q + 1, or the double of a symmetric one of n = 2 (q + 1)."""
    field = _prime_power(n - 1)
    if field is not None and (n - 1) % 4 == 3:
        return _conference(*field, corner=-1) + torch.eye(n, dtype=torch.float64)
    field = _prime_power(n // 2 - 1)
    if field is not None and (n // 2 - 1) % 4 == 1:
        plus, minus = (torch.tensor(block, dtype=torch.float64) for block in (_DOUBLING, _PALEY_2))
        return torch.kron(_conference(*field, corner=1), plus) + torch.kron(
            torch.eye(n // 2, dtype=torch.float64), minus
        )
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    """The prime p and the exponent, at most 3, with p^k = q."""
    prime = next((p for p in range(2, math.isqrt(q) + 1) if q % p == 0), q) if q > 1 else 0
    return next(((prime, k) for k in (1, 2, 3) if prime and prime**k == q), None)


def _conference(p: int, k: int, corner: int) -> Float64[Tensor, "n n"]:
    """The matrix of chi(a - b) over the field of p^k elements, bordered by 1 above and by ``corner`` on the left."""
    q = p**k
    places = p ** torch.arange(k)
    elements = torch.arange(q).unsqueeze(1) // places % p  # coefficients, the constant first
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[(_squares(elements, p, k) * places).sum(1)] = 1
    character[0] = 0
    differences = ((elements.unsqueeze(1) - elements.unsqueeze(0)) % p * places).sum(2)
    made = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    made[0, 1:], made[1:, 0], made[1:, 1:] = 1, corner, character[differences]
    return made


def _squares(elements: Int64[Tensor, "q k"], p: int, k: int) -> Int64[Tensor, "q k"]:
    """The squares of polynomials modulo p and a monic polynomial of degree k that has no root, and so no factor."""
    lower = next(  # x^k = sum of these; up to degree 3 a polynomial without a root is irreducible
        tail
        for tail in itertools.product(range(p), repeat=k)
        if all((x**k - sum(c * x**i for i, c in enumerate(tail))) % p for x in range(p)) or k == 1
    )
    product = torch.zeros(elements.shape[0], 2 * k - 1, dtype=torch.int64)
    for i, j in itertools.product(range(k), repeat=2):
        product[:, i + j] += elements[:, i] * elements[:, j]
    for degree in range(2 * k - 2, k - 1, -1):
        for i, c in enumerate(lower):
            product[:, degree - k + i] += c * product[:, degree]
    return product[:, :k] % p


@final
@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix diag(signs) (left x right), a Kronecker product of a p x p and an r x r one.

    Each of n = p r numbers takes p + r products: of 4096, 128 in the place of 4096.
    """

    left: Float64[Tensor, "p p"]
    right: Float64[Tensor, "r r"]
    signs: Float64[Tensor, " n"] | None = None

    @property
    def size(self) -> int:
        return self.left.shape[0] * self.right.shape[0]

    def matrix(self) -> Float64[Tensor, "n n"]:
        """The matrix itself."""
        return self.times(torch.eye(self.size, dtype=torch.float64))

    def times(self, x: Float64[Tensor, "*rows n"]) -> Float64[Tensor, "*rows n"]:
        """Each row of ``x`` times the matrix."""
        signed = x if self.signs is None else x * self.signs
        blocks = signed.unflatten(-1, (self.left.shape[0], self.right.shape[0]))
        return (self.left.T @ (blocks @ self.right)).flatten(-2)


def rotation(n: int, kind: RotationKind, seed: int) -> Rotation | None:
    """A rotation of this kind, the same for the same seed; None where there is no Hadamard matrix."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "orthogonal":
        q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
        # The signs make it uniform (Mezzadri, arXiv:math-ph/0609050, section 5).
        return Rotation(torch.ones(1, 1, dtype=torch.float64), q * r.diagonal().sign())
    doublings = (n & -n).bit_length() - 1 if n > 0 else 0
    sizes = sorted((2**k for k in range(doublings + 1)), key=lambda p: p + n // p)
    found = ((hadamard(p), hadamard(n // p)) for p in sizes)
    left, right = next((pair for pair in found if pair[0] is not None and pair[1] is not None), (None, None))
    if left is None or right is None:
        return None
    signs = None
    if kind == "random_hadamard":
        signs = (torch.randint(0, 2, (n,), generator=generator) * 2 - 1).to(torch.float64)
    return Rotation(left / math.sqrt(left.shape[0]), right / math.sqrt(right.shape[0]), signs)


def rotate_axis(
    w: Float[Tensor, "*shape"], axis: int, rotation: Rotation, part: Sequence[int] | None = None
) -> Float[Tensor, "*shape"]:
    """``w`` whose ``axis`` is rotated, in blocks: each n numbers v in a row are v Q.

    ``part``: (period, offset, length), if only ``length`` of each ``period`` numbers are, from the ``offset``-th on.
    """
    moved = w.movedim(axis, -1)
    period, offset, length = part or (moved.shape[-1], 0, moved.shape[-1])
    rows = moved.unflatten(-1, (-1, period)).clone()
    taken = rows[..., offset : offset + length].unflatten(-1, (-1, rotation.size))
    rows[..., offset : offset + length] = rotation.times(taken.double()).flatten(-2).to(w.dtype)
    return rows.flatten(-2).movedim(-1, axis).contiguous()


def centre_axis(w: Float[Tensor, "*shape"], axis: int) -> Float[Tensor, "*shape"]:
    """``w`` without its mean along ``axis``."""
    return w - w.mean(axis, keepdim=True)
