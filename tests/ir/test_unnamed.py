"""Parameters that are multiplied with an activation and are no layer are listed; what no op multiplies by is not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphq.ir.pipeline import Pipeline
from graphq.ir.unnamed import unnamed
from graphq.pipelines import canonical_passes
from tests.models import FAMILIES, MoE, capture, captured

FLAT, ROWS = torch.ones(3, 8), torch.ones(3, 5, 8)


class With(nn.Module):
    """A linear, and what ``body`` makes of its output with modules and parameters of these names."""

    def __init__(self, body: Callable[[Any, Tensor], Tensor], **held: nn.Module | tuple[int, ...]) -> None:
        super().__init__()
        self.l = nn.Linear(8, 8)
        for name, what in held.items():
            setattr(self, name, nn.Parameter(torch.empty(what)) if isinstance(what, tuple) else what)
        self.register_buffer("basis", torch.eye(8))
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.l(x))


def gives(model: Any, x: Tensor) -> Tensor:
    return model.r(x)


def first(model: Any, x: Tensor) -> Tensor:
    return model.r(x)[0]


NOTED: dict[str, tuple[nn.Module, Tensor, tuple[str, ...], str]] = {
    "lstm with a projection": (
        With(first, r=nn.LSTM(8, 4, proj_size=2, batch_first=True)),
        ROWS,
        ("r.weight_ih_l0", "r.weight_hh_l0", "r.weight_hr_l0"),
        "lstm",
    ),
    "bilinear": (With(lambda m, x: m.r(x, x), r=nn.Bilinear(8, 8, 4)), FLAT, ("r",), "bilinear"),
    "batch": (With(lambda m, x: x @ m.w, w=(3, 8, 4)), torch.ones(2, 3, 5, 8)[:, :, :], ("w",), "matmul as a tensor of 3 axes"),
    "heads": (
        With(lambda m, x: torch.einsum("btd,hdk->bthk", x, m.w), w=(2, 8, 4)),
        ROWS,
        ("w",),
        "einsum as a tensor of 3 axes",
    ),
    "expanded": (With(lambda m, x: x.bmm(m.w.expand(x.shape[0], -1, -1)), w=(1, 8, 4)), ROWS, ("w",), "bmm as a tensor of 3 axes"),
    "from the left": (With(lambda m, x: m.w @ x.mT, w=(4, 8)), ROWS, ("w",), "matmul from the left"),
    "the input of a linear": (With(lambda m, x: F.linear(m.w, x), w=(4, 8)), FLAT, ("w",), "linear from the left"),
    "a vector": (With(lambda m, x: x[0] @ m.w, w=(8, 4)), FLAT, ("w",), "matmul with a vector"),
    "columns read elsewhere": (With(lambda m, x: x @ m.w + m.w.sum(), w=(8, 4)), FLAT, ("w",), "matmul and read elsewhere, too"),
    "scaled and read elsewhere": (
        With(lambda m, x: torch.addmm(m.c, x, m.w, alpha=2) + m.w.sum(), w=(8, 4), c=(4,)),
        FLAT,
        ("w",),
        "addmm and read elsewhere, too",
    ),
    "outer product": (
        With(lambda m, x: x @ (m.w * m.own), w=(8, 1), own=(1, 4)),
        FLAT,
        ("w", "own"),
        "matmul behind aten.mul",
    ),
    "low rank": (
        With(lambda m, x: F.linear(x, m.b @ m.a), b=(4, 2), a=(2, 8)),
        FLAT,
        ("b", "a"),
        "linear behind aten.matmul",
    ),
    "gated by its input": (
        With(lambda m, x: F.linear(x, m.w * m.l(x).mean()), w=(4, 8)),
        FLAT,
        ("w",),
        "linear behind aten.mul, which the input has a part in",
    ),
    "a kernel that is repeated": (
        With(lambda m, x: F.conv1d(x, m.w.repeat(5, 1, 1), groups=5), w=(1, 1, 3)),
        ROWS,
        ("w",),
        "conv1d behind aten.repeat",
    ),
    "keys": (
        With(lambda m, x: F.scaled_dot_product_attention(x, *[m.w.expand(x.shape[0], -1, -1)] * 2), w=(1, 5, 8)),
        ROWS,
        ("w",),
        "scaled_dot_product_attention",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTED)
def test_weights_of_other_ops_are_listed(case: str) -> None:
    model, x, names, how = NOTED[case]
    gm = capture(model, x)
    Pipeline(canonical_passes()).run(gm)
    assert [(one.layer.fqn, one.reason) for one in unnamed(gm)] == [
        (name, f"multiplied by aten.{how}; no rule can name it") for name in names
    ]
    held = dict(gm.named_parameters())
    assert all(list(one.layer.shape) in [list(p.shape) for p in held.values()] for one in unnamed(gm))


@pytest.mark.parametrize("case", ["matmul", "einsum", "masked"])
def test_before_products_are_raised_they_are_listed_too(case: str) -> None:
    calls: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "matmul": lambda m, x: x @ m.w,
        "einsum": lambda m, x: torch.einsum("bk,kn->bn", x, m.w),
        "masked": lambda m, x: x @ m.w.masked_fill(m.w > 0, 0.0),
    }
    assert [one.layer.fqn for one in unnamed(capture(With(calls[case], w=(8, 4)), FLAT))] == ["w"]


QUIET: dict[str, tuple[nn.Module, Tensor]] = {
    "gains, biases and positions": (
        With(lambda m, x: F.layer_norm(x, (5, 8), m.g, m.b) * m.gain + m.position, g=(5, 8), b=(5, 8), gain=(5, 8), position=(5, 8)),
        ROWS,
    ),
    "a token in front": (With(lambda m, x: torch.cat([m.t.expand(x.shape[0], -1, -1), x], 1), t=(1, 1, 8)), ROWS),
    "a product of what the inputs gave": (With(lambda m, x: (x + m.p) @ (x * m.p).transpose(1, 2), p=(5, 8)), ROWS),
    "what is only added": (With(lambda m, x: m.p.expand(x.shape[0], -1, -1).baddbmm(x, x.mT), p=(1, 5, 5)), ROWS),
    "a vector": (With(lambda m, x: x @ m.v, v=(8,)), FLAT),
    "what is only added, by addmm": (With(lambda m, x: torch.addmm(m.p, x.mT, x), p=(8, 8)), FLAT),
    "a mask": (With(lambda m, x: F.scaled_dot_product_attention(x, x, x, m.p), p=(5, 5)), ROWS),
    "parameters alone": (With(lambda m, x: x + (m.a @ m.b).sum(), a=(4, 8), b=(8, 4)), FLAT),
    "a buffer": (With(lambda m, x: x @ m.basis), FLAT),
    "a state to begin with": (
        With(lambda m, x: m.r(x, m.h.expand(-1, x.shape[0], -1).contiguous())[0], r=nn.GRU(8, 8, batch_first=True), h=(1, 1, 8)),
        ROWS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", QUIET)
def test_what_is_no_weight_is_not_noted(case: str) -> None:
    model, x = QUIET[case]
    assert [one for one in unnamed(capture(model, x)) if not one.layer.fqn.startswith("r.")] == []


def test_a_layers_own_weight_is_not_noted() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(16, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.embedding(tokens) @ self.embedding.weight.t()

    assert unnamed(capture(Both(), torch.ones(2, 3, dtype=torch.int64))) == ()
    assert unnamed(capture(MoE(), torch.ones(5, 8))) == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_no_such_weights(family: str) -> None:
    assert unnamed(captured(family)) == ()
