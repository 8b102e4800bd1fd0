"""Which types quantizers have, and which ops stay float for what reason; see tests/ir/test_grids.py for where they stand."""

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from graphq.ir.grids import place
from graphq.spec.activations import ActivationRule
from graphq.spec.plan import Plan
from graphq.spec.profile import OpRule, op_types
from graphq.spec.quant import parse_quant
from tests.ir.test_grids import IMAGE, ROWS, Conv, graph, grids, layer, placed, row, table

WIDE = Plan(parse_quant("int8/channel"), parse_quant("uint16/tensor"))


def formats(made: str) -> dict[str, list[str]]:
    """The types that each tensor is quantized to."""
    found: dict[str, list[str]] = {}
    for line in made.splitlines():
        if not line.startswith("note"):
            found.setdefault(line.split(" -> ")[0], []).append(line.partition(": ")[2].split("/")[0])
    return found


def test_a_layer_s_own_input_counts_more_than_a_rule_for_its_output() -> None:
    made = placed(table(Conv=layer()), Conv(), IMAGE, rules=[ActivationRule(parse_quant("uint16/tensor"))])
    assert formats(made) == {"x": ["uint8"], "conv2d": ["uint8"]}
    assert made.splitlines()[-1] == "note: conv: gives uint8, not uint16, on test"


class Fork(nn.Module):
    """The sum of two convolutions through a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) + self.b(x))


def test_what_an_op_gives_breaks_a_tie_between_its_inputs() -> None:
    profile = table(Conv=layer(), Add=row())
    assert formats(placed(profile, Fork(), IMAGE, b=WIDE, c=WIDE))["add"] == ["uint16"]
    assert formats(placed(profile, Fork(), IMAGE, b=WIDE))["add"] == ["uint8"]
    assert formats(placed(profile, Fork(), IMAGE, c=WIDE))["add"] == ["uint8", "uint16"]  # both inputs are uint8


@pytest.mark.parametrize(
    "weight", ["int8/asym/channel", "uint8/channel", "int4/channel", "int8/g4", "float8_e4m3fn/channel"]
)
def test_weights_that_a_consumer_does_not_multiply(weight: str) -> None:
    found = place(
        graph(nn.Sequential(nn.Linear(4, 4)), ROWS, **{"0": Plan(parse_quant(weight), parse_quant("uint8/tensor"))}),
        table(Linear=layer()),
    )
    assert not found.quantizers
    assert [*found.why_float.values()] == [f"test multiplies no {weight}"]


def test_one_scale_for_a_weight_is_taken_where_one_by_channel_is() -> None:
    plan = Plan(parse_quant("int8/tensor"), parse_quant("uint8/tensor"))
    assert place(graph(nn.Sequential(nn.Linear(4, 4)), ROWS, **{"0": plan}), table(Linear=layer())).integer
    narrow = table(Linear=OpRule(op_types("uint8 x int8/tensor -> uint8")))
    assert not place(graph(nn.Sequential(nn.Linear(4, 4)), ROWS), narrow).integer


def test_what_moves_elements_stays_on_its_grid_whatever_types_its_row_has() -> None:
    profile = table(Conv=layer(), MaxPool=OpRule(op_types("uint8 -> uint8"), "same"))
    made = placed(profile, Conv(lambda m, y: F.max_pool2d(y, 2)), IMAGE, conv=WIDE)
    assert formats(made) == {"x": ["uint16"], "conv2d": ["uint16"], "max_pool2d": ["uint16"]}
    assert grids(made)["conv2d"] == grids(made)["max_pool2d"]


def test_products_of_two_activations_are_no_linears() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, x.sin())

    class WithBias(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, x.sin(), x[:, 0])

    assert placed(table(Linear=layer()), Product(), ROWS) == "\n"
    assert placed(table(Linear=layer(), MatMul=row()), WithBias(), ROWS) == "\n"
    assert formats(placed(table(MatMul=row()), Product(), ROWS)).keys() == {"x", "sin", "linear"}


def test_summary() -> None:
    profile = table(Conv=layer(), Add=row(placed="between"), Softmax=row(placed="never"), Sigmoid=row())
    model = Conv(lambda m, y: (m.other(y) + y).softmax(1) + (y > 0).long() + y.tanh())
    rules = [ActivationRule(parse_quant("uint8/tensor")), ActivationRule(None, ("Sigmoid",))]
    found = place(graph(model, IMAGE), profile, rules)
    assert found.summary("test") == [
        "test: quantized tensors between ops: 3 uint8/tensor",
        "test: ops in integers: 2 Conv",
        "test: ops in float: 2 Add: not between ops in integers",
        "test: ops in float: 1 Softmax: test runs it faster so",
        "test: ops in float: 1 Add: reads a tensor of integers",
        "test: ops in float: 1 Tanh: test has no row for it",
    ]


def test_an_op_that_is_dropped_takes_others_with_it() -> None:
    """A sum that reads a float goes; then the one that reads it, and the one that was there for that alone."""

    def sums(m: Conv, y: Tensor) -> Tensor:
        first = y.sin() + y
        second = y + y
        return m.other(first + second)

    found = place(graph(Conv(sums), IMAGE), table(Conv=layer(), Add=row(placed="between")))
    assert [unit.kind for unit, _ in found.integer] == ["Conv", "Conv"]
    assert [unit.kind for unit in found.why_float] == ["sin", "Add", "Add", "Add"]
