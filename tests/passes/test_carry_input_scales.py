"""Static scales of inputs that are known already."""

from typing import Any

import pytest
import torch
from torch import fx

from graphq.errors import GraphError
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.numerics import Scales
from graphq.observers.known import KnownScales
from graphq.passes.carry_input_scales import CarryInputScales
from graphq.passes.observe import observers
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.state import tensor_of
from tests.graphs import annotated, plan
from tests.models import MLP, capture

X = torch.linspace(-1, 1, 16).view(2, 8)
STATIC = plan(None, "int8/asym/joint/tensor")


def graph(**rules: Any) -> fx.GraphModule:
    return annotated(capture(MLP(), X), **(rules or {"up": STATIC, "down": STATIC}))


def scales(scale: float, zero_point: int | None = None) -> Scales:
    zero = None if zero_point is None else torch.tensor(zero_point, dtype=torch.int8)
    return Scales(torch.tensor(scale), zero)


def test_each_input_has_its_own() -> None:
    gm = graph()
    passes = [CarryInputScales({"up": scales(0.125, 3), "down": scales(0.5, -7)}), QuantizeActivations()]
    assert Pipeline(passes, strict=True).run(gm) == {"carry-input-scales": 2, "quantize-activations": 2}
    assert [float(tensor_of(gm, f"{layer}.input_scale")) for layer in ("up", "down")] == [0.125, 0.5]
    assert [int(tensor_of(gm, f"{layer}.input_zero_point")) for layer in ("up", "down")] == [3, -7]
    assert "choose_scale" not in dump(gm)


def test_dynamic_and_float_inputs_are_left_alone() -> None:
    gm = graph(up=plan(None, "int8/token/dynamic"), down="float")
    before = dump(gm)
    assert CarryInputScales({"up": scales(1.0)}).run(gm) == 0
    assert dump(gm) == before


def test_a_second_time_changes_nothing() -> None:
    gm = graph()
    step = CarryInputScales({"up": scales(0.125, 3), "down": scales(0.5, -7)})
    assert step.run(gm) == 2
    assert step.run(gm) == 0
    assert all(isinstance(seen, KnownScales) for _, seen in observers(gm))


def test_an_input_without_a_scale_is_named() -> None:
    with pytest.raises(GraphError) as caught:
        CarryInputScales({"up": scales(0.125, 3)}).run(graph())
    assert str(caught.value) == "down: input int8/asym/joint/tensor: there is no scale of it"


class Pair(torch.nn.Module):
    """Two linears that read one activation."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.left(x) + self.right(x)


@pytest.mark.parametrize("other", [scales(0.25, 3), scales(0.125, 4), scales(0.125)])
def test_unlike_scales_of_one_activation_are_named(other: Scales) -> None:
    gm = annotated(capture(Pair(), X), left=STATIC, right=STATIC)
    with pytest.raises(GraphError) as caught:
        CarryInputScales({"left": scales(0.125, 3), "right": other}).run(gm)
    assert str(caught.value) == "left and right read one activation, and have unlike scales of it"
    assert CarryInputScales({"left": scales(0.125, 3), "right": scales(0.125, 3)}).run(gm) == 1
