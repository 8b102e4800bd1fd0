"""Which types quantizers have, and which ops stay float for what reason; see tests/ir/test_grids.py for where they stand."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from graphq.ir.grids import place
from graphq.spec.activations import ActivationRule
from graphq.spec.plan import Plan
from graphq.spec.profile import FixedGrid, OpRule, op_types
from graphq.spec.quant import parse_quant
from tests.ir.test_grids import IMAGE, ROWS, Conv, graph, layer, placed, row, table, text

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


# -- operands that an op which leaves grids alone does not take as they are --------------------------------------------

NARROW = OpRule(op_types("uint8 -> uint8"), "same")


def test_what_moves_elements_has_the_types_of_its_row_alone() -> None:
    """The pool gets 8 bits, on the grid of what it gives, whether something fills it by 16 or not."""
    profile = table(Conv=layer(), MaxPool=NARROW)
    made = placed(profile, Conv(lambda m, y: m.other(F.max_pool2d(y, 2))), IMAGE, conv=WIDE, other=WIDE)
    assert_expected_inline(
        made,
        """\
x -> conv2d  grid 0: uint16/tensor  conv.input
conv2d -> all  grid 1: uint16/tensor  conv.output
conv2d -> max_pool2d  grid 2: uint8/tensor again  conv.output
max_pool2d -> all  grid 2: uint8/tensor moved  other.input
max_pool2d -> conv2d_1  grid 3: uint16/tensor again  other.input
conv2d_1 -> all  grid 4: uint16/tensor  other.output
""",
    )
    also = replace(NARROW, also=op_types("uint16 -> uint16"))
    assert "again" not in placed(
        table(Conv=layer(), MaxPool=also), Conv(lambda m, y: F.max_pool2d(y, 2)), IMAGE, conv=WIDE
    )


def test_what_has_the_type_stays_on_the_grid_that_another_cannot_have() -> None:
    profile = table(Conv=layer(), MaxPool=NARROW, Transpose=row("same"))
    made = placed(profile, Conv(lambda m, y: (F.max_pool2d(y, 2), y.transpose(2, 3))), IMAGE, conv=WIDE)
    assert_expected_inline(
        made,
        """\
x -> conv2d  grid 0: uint16/tensor  conv.input
conv2d -> all  grid 1: uint16/tensor  conv.output
conv2d -> max_pool2d  grid 2: uint8/tensor again  conv.output
max_pool2d -> all  grid 2: uint8/tensor moved  MaxPool.output
transpose -> all  grid 1: uint16/tensor moved  Transpose.output
""",
    )


def test_operands_of_two_types_are_joined_on_the_grid_of_what_is_given() -> None:
    """A softmax in 8 bits alone, and a convolution of 16 in 16 alone."""
    grids = {"uint8": FixedGrid(1 / 256, 0)}
    profile = table(
        Conv=OpRule(op_types("uint16 x int8/channel -> uint16")),
        Softmax=OpRule(op_types("uint8 -> uint8"), grids=grids),
        Concat=row("same"),
    )
    made = placed(profile, Conv(lambda m, y: torch.cat([y, y.softmax(1)], 1)), IMAGE, conv=WIDE)
    assert_expected_inline(
        made,
        """\
x -> conv2d  grid 0: uint16/tensor  conv.input
conv2d -> all  grid 1: uint16/tensor  conv.output
conv2d -> softmax  grid 2: uint8/tensor again  conv.output
conv2d -> cat  grid 3: uint8/tensor again  conv.output
softmax -> all  grid 3: uint8/tensor  Softmax.output
cat -> all  grid 3: uint8/tensor moved  Concat.output
""",
    )


# -- zero points of 0 --------------------------------------------------------------------------------------------------

ZERO = OpRule(op_types("uint8 x int8/channel -> uint8", "int8 x int8/channel -> int8"), "optional", zero_points="zero")


def test_operands_that_need_zero_points_of_0() -> None:
    """They are symmetric, unless nothing in them is below 0; other inputs of layers are told of."""
    made = placed(table(Conv=ZERO), Conv(lambda m, y: m.other(F.relu(y))), IMAGE)
    assert_expected_inline(
        made,
        """\
x -> conv2d  grid 0: int8/tensor  conv.input
relu -> conv2d_1  grid 1: uint8/tensor  other.input
note: conv: reads int8, not uint8: test multiplies codes with zero points of 0 alone
""",
    )


def test_what_has_nothing_below_0() -> None:
    profile = table(Conv=ZERO, MaxPool=row("same", "through"), Transpose=row("same", "through"))

    def type_of(f: Any) -> str:
        gm = graph(Conv(f), IMAGE)
        giver = next(n for n in gm.graph.nodes if n.name == "conv2d_1").args[0].name
        (line,) = [one for one in text(place(gm, profile)).splitlines() if one.startswith(giver + " ")]
        return line.partition(": ")[2].split("/")[0]

    def moves(y: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(y), 2).transpose(2, 3)

    for f in (
        torch.relu,
        F.relu6,
        torch.sigmoid,
        F.hardsigmoid,
        lambda y: y.softmax(1),
        lambda y: y.clamp(min=0),
        moves,
    ):
        assert type_of(lambda m, y, f=f: m.other(f(y))) == "uint8", f
    for f in (torch.tanh, F.hardtanh, lambda y: y.clamp(max=3), lambda y: y.clamp(min=-1), F.leaky_relu):
        assert type_of(lambda m, y, f=f: m.other(f(y))) == "int8", f


def test_an_op_gives_what_one_behind_it_puts_on_the_same_grid() -> None:
    """One operand of the sum is of 8 bits and one of 16; what it is joined with, further on, is of 16."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(4, 4, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x) + self.b(x), self.c(x)], 1)

    made = placed(table(Conv=layer(), Add=row(), Concat=row("same")), Joined(), IMAGE, b=WIDE, c=WIDE)
    assert formats(made)["add"] == formats(made)["cat"] == ["uint16"]
    assert "cat  grid" not in made  # nothing is brought to another grid for it
