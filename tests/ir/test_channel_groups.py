"""Groups of layers that share factors: which there are, who decides, and the two ways to scale them."""

import pytest
import torch
from torch import nn

from graphq.ir.channel_groups import apply_factors, chosen_layers, column_magnitudes, groups, names_of, rounding_change
from graphq.ir.index import GraphIndex
from graphq.ir.pipeline import Pipeline
from graphq.ir.views import Linear, ops_of
from graphq.passes.split_gate_up import SplitGateUp
from graphq.spec.folds import Folds
from graphq.state import tensor_of
from tests.graphs import annotated, run
from tests.lifted import lifted
from tests.models import MLP, Attention, MoE, capture


class Normed(nn.Module):
    """Two linears behind a norm, one of which has another float reader beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.first = nn.Linear(8, 6)
        self.second = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return torch.cat([self.first(h), self.second(h)], -1)


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def test_readers_of_one_input_are_a_group_of_which_planned_ones_decide() -> None:
    gm = annotated(capture(Normed(), X), first="int8/channel", second="float")
    (group,) = groups(gm, None, "fold", None)
    assert [reader.weight.fqn for reader in group.readers] == ["first.weight", "second.weight"]
    assert [reader.weight.fqn for reader in group.chosen] == ["first.weight"]
    assert torch.equal(column_magnitudes(gm, group), tensor_of(gm, "first.weight").abs().amax(0).double())
    before, gain = run(gm, X), tensor_of(gm, "norm.weight").clone()
    factors = torch.arange(1, 9)
    assert apply_factors(GraphIndex(gm), group, factors, "test") == 4  # gain and bias, and two weights
    assert torch.equal(tensor_of(gm, "norm.weight"), (gain.double() / factors).float())
    # 1e-5: float32 products of changed factors.
    assert torch.allclose(run(gm, X), before, rtol=0, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("where", ["fold", "fold-or-multiply", "multiply"])
def test_where_nothing_absorbs_factors(where: str) -> None:
    gm = annotated(capture(Attention(), torch.ones(2, 3, 8)), blocks="int8/channel")
    notes: list[str] = []
    found = list(groups(gm, None, where, notes.append))  # type: ignore[arg-type]
    assert len(notes) == (3 if where == "fold" else 0)
    assert [len(group.readers) for group in found] == ([] if where == "fold" else [3])
    if found:
        before = run(gm, torch.ones(2, 3, 8))
        assert (
            apply_factors(GraphIndex(gm), found[0], torch.arange(1, 9), "test") == 4
        )  # the factors, and three weights
        after = run(gm, torch.ones(2, 3, 8))
        assert torch.allclose(after, before, rtol=0, atol=1e-5 * float(before.abs().max() + 1))
        assert torch.equal(tensor_of(gm, "q_proj.input_factor"), (1 / torch.arange(1, 9).double()).float())


class Crossed(nn.Module):
    """A convolution and a linear that read one input, along axes of equal sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + self.linear(x)


@pytest.mark.parametrize("unbatched", [False, True])
def test_layers_that_read_one_input_along_different_axes(unbatched: bool) -> None:
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    model = Crossed()
    if unbatched:
        forward = model.forward
        model.forward = lambda x: forward(x[0])[None] + x.mean()  # type: ignore[method-assign]
    gm = lifted(annotated(capture(model, x), conv="int8/channel", linear="int8/channel"))
    before = run(gm, x.double())
    found = list(groups(gm, None, "multiply", None))
    assert [[reader.weight.fqn for reader in group.readers] for group in found] == [["conv.weight"], ["linear.weight"]]
    for group in found:
        assert apply_factors(GraphIndex(gm), group, torch.arange(1, 5), "test") == 2
    # 1e-12: float64 products of changed factors.
    assert torch.allclose(run(gm, x.double()), before, rtol=0, atol=1e-12 * float(before.abs().max()))


def test_chosen_layers() -> None:
    gm = annotated(capture(MLP(), X), up="int8/channel", down="float")
    assert [op.node.meta["graphq.layer"] for op in chosen_layers(gm, None)] == ["up"]
    assert chosen_layers(gm, frozenset({"down"})) == []
    linears = [op for op in ops_of(gm) if isinstance(op, Linear)]
    assert [names_of(op) for op in linears] == [["up"], ["down"]]


def test_experts_are_named_one_by_one() -> None:
    gm = annotated(capture(MoE(), X), experts="int8/channel")
    names = [names_of(op) for op in chosen_layers(gm, None)]
    assert ["experts.0.down_proj", "experts.1.down_proj", "experts.2.down_proj", "experts.3.down_proj"] in names
    assert chosen_layers(gm, frozenset({"experts.2.down_proj"})) != []


@pytest.mark.parametrize(
    ("folds", "count", "noted"),
    [
        (Folds(("up-down",)), 1, False),
        (Folds(("up-down",), ("experts.*.up_proj",)), 1, False),
        (Folds(("up-down",), ("experts.*",), ("experts.[02].*",)), 0, True),
        (Folds(("up-down",), ("experts.*.down_proj",)), 0, False),
        (Folds(("norm-linear",)), 0, False),
    ],
)
def test_experts_are_chosen_together(folds: Folds, count: int, noted: bool) -> None:
    split = capture(MoE(), X)
    Pipeline([SplitGateUp()]).run(split)
    gm = annotated(split, experts="int8/channel")
    notes: list[str] = []
    found = list(groups(gm, frozenset({f"experts.{i}.down_proj" for i in range(4)}), "fold", notes.append, folds))
    assert len(found) == count
    why = "its input's channels keep their scale: only some experts that make it are chosen"
    assert notes == ([f"experts.down_proj: {why}"] if noted else [])


def test_what_rounding_changes_expert_by_expert() -> None:
    gm = annotated(capture(MoE(), X), experts="int8/channel", experts__0="float")
    op = next(op for op in chosen_layers(gm, None) if "experts.0.down_proj" in names_of(op))
    w = tensor_of(gm, "experts.down_proj").detach()
    change = rounding_change(op, w, torch.ones_like(w))
    assert change.shape == w.shape
    assert not change[0].any()
    assert all(expert.any() for expert in change[1:])
    assert change.abs().max() <= w.abs().max() / 127 / 2 * 1.001  # half a step of the largest scale
