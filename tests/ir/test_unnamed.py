"""Weights that no rule can name stand in the notes; what no op multiplies by does not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphq.ir.layers import unnamed
from tests.models import FAMILIES, MoE, capture, captured

FLAT, ROWS = torch.ones(3, 8), torch.ones(3, 5, 8)


class With(nn.Module):
    """A linear, and what ``body`` makes of its output with modules and parameters of these names."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], **held: nn.Module | tuple[int, ...]) -> None:
        super().__init__()
        self.l = nn.Linear(8, 8)
        for name, what in held.items():
            setattr(self, name, nn.Parameter(torch.empty(what)) if isinstance(what, tuple) else what)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.l(x))


def gives(model: Any, x: Tensor) -> Tensor:
    return model.r(x)


def first(model: Any, x: Tensor) -> Tensor:
    return model.r(x)[0]


NOTED: dict[str, tuple[nn.Module, Tensor, tuple[str, ...], str]] = {
    "lstm": (With(first, r=nn.LSTM(8, 4, batch_first=True)), ROWS, ("r.weight_ih_l0", "r.weight_hh_l0"), "lstm"),
    "gru": (With(first, r=nn.GRU(8, 4, batch_first=True)), ROWS, ("r.weight_ih_l0", "r.weight_hh_l0"), "gru"),
    "cell": (With(gives, r=nn.GRUCell(8, 4)), FLAT, ("r.weight_ih", "r.weight_hh"), "gru_cell"),
    "conv3d": (With(gives, r=nn.Conv3d(2, 4, 3)), torch.ones(2, 2, 8, 8, 8), ("r.weight",), "conv3d"),
    "transposed": (
        With(gives, r=nn.ConvTranspose2d(2, 4, 3)),
        torch.ones(2, 2, 8, 8),
        ("r.weight",),
        "conv_transpose2d",
    ),
    "bilinear": (With(lambda m, x: m.r(x, x), r=nn.Bilinear(8, 8, 4)), FLAT, ("r.weight",), "bilinear"),
    "matmul": (With(lambda m, x: x @ m.w, w=(8, 4)), FLAT, ("w",), "matmul"),
    "matmul of a view": (With(lambda m, x: x @ m.w.t(), w=(4, 8)), ROWS, ("w",), "matmul"),
    "einsum": (With(lambda m, x: torch.einsum("bk,nk->bn", x, m.w), w=(4, 8)), FLAT, ("w",), "einsum"),
    "expanded": (With(lambda m, x: x.bmm(m.w.expand(x.shape[0], -1, -1)), w=(1, 8, 4)), ROWS, ("w",), "bmm"),
    "masked": (With(lambda m, x: x @ (m.w * m.own), w=(8, 4), own=(8, 4)), FLAT, ("w", "own"), "matmul"),
}


@pytest.mark.parametrize("case", NOTED)
def test_weights_of_other_ops_are_noted(case: str) -> None:
    model, x, names, op = NOTED[case]
    expected = [f"{name}: stays float: graphq quantizes no weights of aten.{op}" for name in names]
    assert unnamed(capture(model, x)) == expected


def test_a_bag_of_embeddings() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(10, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.bag(tokens)

    expected = ["bag.weight: stays float: graphq quantizes no weights of aten.embedding_bag"]
    assert unnamed(capture(Bag(), torch.ones(3, 4, dtype=torch.int64))) == expected


QUIET: dict[str, tuple[nn.Module, Tensor]] = {
    "gains, biases and positions": (
        With(lambda m, x: F.layer_norm(x, (5, 8), m.g, m.b) * m.gain + m.position, g=(5, 8), b=(5, 8), gain=(5, 8), position=(5, 8)),
        ROWS,
    ),
    "a token in front": (With(lambda m, x: torch.cat([m.t.expand(x.shape[0], -1, -1), x], 1), t=(1, 1, 8)), ROWS),
    "a product of what the inputs gave": (With(lambda m, x: (x + m.p) @ (x * m.p).transpose(1, 2), p=(5, 8)), ROWS),
    "what is only added": (With(lambda m, x: m.p.expand(x.shape[0], -1, -1).baddbmm(x, x.mT), p=(1, 5, 5)), ROWS),
    "a vector": (With(lambda m, x: x @ m.v, v=(8,)), FLAT),
    "a state to begin with": (
        With(lambda m, x: m.r(x, m.h.expand(-1, x.shape[0], -1).contiguous())[0], r=nn.GRU(8, 8, batch_first=True), h=(1, 1, 8)),
        ROWS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", QUIET)
def test_what_is_no_weight_is_not_noted(case: str) -> None:
    model, x = QUIET[case]
    assert [line for line in unnamed(capture(model, x)) if not line.startswith("r.")] == []


def test_a_layers_own_weight_is_not_noted() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(16, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.embedding(tokens) @ self.embedding.weight.t()

    assert unnamed(capture(Both(), torch.ones(2, 3, dtype=torch.int64))) == []
    assert unnamed(capture(MoE(), torch.ones(5, 8))) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_no_such_weights(family: str) -> None:
    assert unnamed(captured(family)) == []
