"""Identities are gone, and what looks like one and is none stays."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.ir import edit
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.ir.views import view
from graphq.passes.remove_no_ops import RemoveNoOps
from graphq.state import tensor_of
from tests.graphs import assert_vals, run, targets
from tests.models import MLP, capture

aten = torch.ops.aten
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def remove(gm: fx.GraphModule) -> int:
    """The number of changes; a second run finds nothing."""
    counts = Pipeline([RemoveNoOps()], strict=True).run(gm)
    assert Pipeline([RemoveNoOps()], strict=True).run(gm) == {"remove-no-ops": 0}
    return counts["remove-no-ops"]


class Identities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(self.up(x).detach()).clone()
        return self.up(h + x.clone()) + torch.tensor(2.0)


def test_golden() -> None:
    gm = capture(Identities(), torch.ones(2, 8))
    before = run(gm, X)
    assert targets(gm).count("aten.clone") >= 3
    assert remove(gm) == 5
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, 8] = input
%1: f32[batch, 8] = aten.linear(%x, @up.weight)
%2: f32[batch, 8] = aten.add.Tensor(%1, %x)
%3: f32[batch, 8] = aten.linear(%2, @up.weight)
%4: f32[batch, 8] = aten.add.Tensor(%3, @lifted_tensor_0)
return [%4]
""",
    )
    assert torch.equal(run(gm, X), before)
    assert_vals(gm, X)


class Sum(nn.Module):
    """A sum of what ``terms`` makes of x times 2."""

    def __init__(self, terms: Any, alpha: int = 1) -> None:
        super().__init__()
        self.terms, self.alpha = terms, alpha

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.terms(x * 2)
        return torch.add(a, b, alpha=self.alpha).sin()


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (Sum(lambda x: (torch.zeros_like(x), x)), 2),  # the sum and its zeros
        (Sum(lambda x: (x, torch.zeros_like(x))), 2),
        (Sum(lambda x: (x, torch.zeros_like(x)), alpha=3), 2),
        (Sum(lambda x: (torch.zeros_like(x), x), alpha=3), 0),
        (Sum(lambda x: (x, torch.ones_like(x))), 0),
        (Sum(lambda x: (x, torch.zeros(2, 1, 8))), 0),  # of more axes
        (Sum(lambda x: (x[:1], torch.zeros_like(x))), 0),  # of more rows
        (Sum(lambda x: (x, torch.zeros_like(x, dtype=torch.float64))), 0),
        (Sum(lambda x: (x, 0.0)), 0),
    ],
)
def test_sums_with_zeros(model: nn.Module, count: int) -> None:
    gm = capture(model, torch.ones(2, 8))
    before = run(gm, X)
    assert remove(gm) == count
    assert torch.equal(run(gm, X), before)
    assert_vals(gm, X)
    assert len([target for target in targets(gm) if "add" in target]) == (not count)


DROPOUTS = [F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout]


class Dropout(nn.Module):
    def __init__(self, dropout: Any, training: bool) -> None:
        super().__init__()
        self.dropout, self.trains = dropout, training

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x * 2, 0.5, training=self.trains) + 1


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_dropout(dropout: Any) -> None:
    """Gone in evaluation; in training it stays."""
    image = torch.ones(2, 3, 4, 4)
    gm = capture(Dropout(dropout, False), image)
    remove(gm)
    assert targets(gm) == ["aten.mul.Tensor", "aten.add.Tensor"]
    gm = capture(Dropout(dropout, True), image)
    assert len(targets(gm)) > 2
    assert remove(gm) == 0


class ContiguousCopy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.t().contiguous().view(-1) + 1


class ExpandedCopy(nn.Module):
    """The copy keeps no overlap, on which the view relies."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(1).expand(-1, 2, 8).clone().view(-1, 8) + 1


@pytest.mark.parametrize("model", [ContiguousCopy(), ExpandedCopy()])
def test_a_copy_into_another_layout_stays(model: nn.Module) -> None:
    gm = capture(model, torch.ones(2, 8))
    before = run(gm, X)
    number = len(targets(gm))
    assert remove(gm) == 0
    assert len(targets(gm)) == number
    assert torch.equal(run(gm, X), before)


def test_a_copy_into_its_own_layout_is_gone() -> None:
    class Copy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2).clone(memory_format=torch.contiguous_format).view(-1) + 1

    gm = capture(Copy(), torch.ones(2, 8))
    assert remove(gm) == 1
    assert targets(gm) == ["aten.mul.Tensor", "aten.view", "aten.add.Tensor"]


def test_casts_stay() -> None:
    class Casts(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 2).to(torch.bfloat16).to(torch.float32) + 1

    gm = capture(Casts(), torch.ones(2, 8))
    assert targets(gm).count("aten._to_copy") == 2
    assert remove(gm) == 0


class Returned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.clone(), self.gain.clone(), (x * self.gain).clone()


def test_a_returned_copy_of_an_input_or_parameter_stays() -> None:
    """The caller may write to what a graph returns."""
    gm = capture(Returned(), torch.ones(2, 8))
    assert remove(gm) == 1
    assert targets(gm) == ["aten.clone", "aten.clone", "aten.mul.Tensor"]
    x = X.clone()
    first, gain, _ = gm(x)
    first.add_(1)
    gain.add_(1)
    assert torch.equal(x, X)
    assert not torch.equal(gain, tensor_of(gm, "gain"))


def test_a_returned_alias_of_an_input_stays() -> None:
    gm = capture(Identities(), torch.ones(2, 8))
    out = next(n for n in gm.graph.nodes if n.op == "output")
    x = next(view(n) for n in gm.graph.nodes if n.op == "placeholder")
    alias = edit.insert(gm, view(out), aten.alias.default, x, by="t")
    inner = edit.insert(gm, edit.following(x), aten.alias.default, x, by="t")
    edit.insert(gm, view(inner.node.next), aten.neg.default, inner, by="t")
    out.replace_input_with(out.all_input_nodes[0], alias.node)
    RemoveNoOps().run(gm)
    assert targets(gm).count("aten.alias") == 1
    assert out.all_input_nodes == [alias.node]


@pytest.mark.parametrize(
    "target",
    [
        aten.alias.default,
        aten.detach.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.lift_fresh_copy.default,
        aten._to_copy.default,
    ],
)
def test_each_identity(target: Any) -> None:
    """Whether or not export leaves it today."""
    gm = capture(MLP(), torch.ones(2, 8))
    first = next(view(n) for n in gm.graph.nodes if n.target is aten.linear.default)
    made = edit.insert(gm, edit.following(first), target, first, by="t")
    for user in [user for user in first.users if user != made]:
        edit.redirect(user, first, made, by="t")
    assert remove(gm) == 1
    assert targets(gm) == ["aten.linear", "aten.relu", "aten.linear"]
