"""What was chosen by data, done again without it: the same tensors, bit for bit, and the same graph."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graphq.errors import GraphError
from graphq.ir.choices import Choices
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.passes.awq import AWQ
from graphq.passes.calibrate import Calibrate
from graphq.passes.observe import Observe
from graphq.passes.repeat_factors import RepeatFactors
from graphq.passes.smooth_quant import SmoothQuant
from graphq.passes.stop_observing import StopObserving
from graphq.spec.folds import Folds
from tests.graphs import annotated, plan
from tests.models import MLP, capture, captured, random_inputs

W8A8 = plan("int8/channel", "int8/tensor")
BATCHES = [(torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)).exp(),) for seed in (1, 2)]


def chosen(gm: fx.GraphModule, step: AWQ | SmoothQuant, batches: Any = BATCHES) -> None:
    with torch.no_grad():
        Pipeline([Observe((step,), ranges=False), Calibrate(), step, StopObserving()], strict=True).run(gm, batches)


def state(gm: fx.GraphModule) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in gm.state_dict().items()}


def assert_repeated(plain: fx.GraphModule, kind: Any, batches: Any = BATCHES, **options: Any) -> dict[str, Tensor]:
    """The pass chooses on one copy of ``plain``, what it kept is repeated on another; both come out alike."""
    choices = Choices("0 a", {})
    once, again, other = (copy.deepcopy(plain) for _ in range(3))
    chosen(once, kind(choices=choices, **options), batches)
    kept = {name: options[name] for name in ("only", "where", "folds") if name in options}
    changed = [
        name for name, w in state(once).items() if name not in state(plain) or not torch.equal(w, state(plain)[name])
    ]
    assert changed
    with torch.no_grad():
        (count,) = Pipeline([RepeatFactors(choices, **kept)], strict=True).run(again).values()
    assert count >= len(changed)
    assert dump(again) == dump(once)
    assert state(again).keys() == state(once).keys()
    assert all(torch.equal(w, state(once)[name]) for name, w in state(again).items())
    unlike = RepeatFactors(Choices("1 a", choices.tensors), **kept)  # of another algorithm of the spec
    assert Pipeline([unlike], strict=True).run(other) == {"repeat-factors": 0}
    return choices.tensors


@pytest.mark.parametrize(
    "options",
    [{}, {"where": "multiply"}, {"where": "fold-or-multiply"}, {"only": frozenset({"down"})}, {"alpha": "search"}],
)
def test_smoothing(options: dict[str, Any]) -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=W8A8, down=W8A8)
    tensors = assert_repeated(gm, SmoothQuant, **options)
    is_folded = options.get("where", "fold") == "fold"
    assert sorted(tensors) == [f"0 a factors {name}.weight" for name in ("down", "up")[: 1 if is_folded else 2]]
    assert all(one.dtype == torch.float64 for one in tensors.values())


def test_nothing_is_folded_elsewhere() -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=W8A8, down=W8A8)
    choices = Choices("0 a", {})
    chosen(copy.deepcopy(gm), SmoothQuant(choices=choices))
    step = RepeatFactors(choices, folds=Folds(("norm-linear",)))
    assert Pipeline([step], strict=True).run(gm) == {"repeat-factors": 0}


@pytest.mark.parametrize("weight", ["int4/g4", "int3/asym/channel"])
def test_factors_and_ranges_of_awq(weight: str) -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=weight, down=weight)
    tensors = assert_repeated(gm, AWQ)
    assert {name.split()[2] for name in tensors} >= {"clip"}
    assert all(one.dtype == torch.uint8 for name, one in tensors.items() if " clip " in name)
    assert not any(" clip " in name for name in assert_repeated(gm, AWQ, clip=False))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(4, 6, 3), nn.Conv1d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def test_ranges_of_convolutions() -> None:
    batches = [(torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(1)),)]
    gm = annotated(capture(Convolutions(), batches[0][0]), up="int3/channel", down="int3/channel")
    assert any(" clip " in name for name in assert_repeated(gm, AWQ, batches))


def test_experts() -> None:
    gm = annotated(captured("mixtral"), blocks="int4/g32")
    assert assert_repeated(gm, AWQ, [tuple(random_inputs(gm, 2, 9))])


def test_what_is_of_another_graph() -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up="int4/g4", down="int4/g4")
    for tensors, message in (
        ({"factors down.weight": torch.ones(11)}, "factors down.weight: [11] are no 12 positive factors"),
        ({"factors down.weight": torch.zeros(12)}, "factors down.weight: [12] are no 12 positive factors"),
        ({"clip up.weight": torch.zeros(3, 3)}, "clip up.weight: [3, 3] are no ranges of a weight [12, 8]"),
        (
            {"clip up.weight": torch.full((1, 12, 2), 11)},
            "clip up.weight: [1, 12, 2] are no ranges of a weight [12, 8]",
        ),
    ):
        step = RepeatFactors(Choices("0 a", {f"0 a {name}": tensor for name, tensor in tensors.items()}))
        with pytest.raises(GraphError, match=f"^{re.escape(message)}$"):
            step.run(copy.deepcopy(gm))
