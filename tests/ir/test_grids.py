"""Where quantizers stand: each rule of a consumer's table, on small graphs and on graphs that differ in one thing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.ir.grids import Placement, place
from graphq.ir.units import units_of
from graphq.passes.annotate import Annotate
from graphq.passes.fold_batch_norm import FoldBatchNorm
from graphq.spec.activations import ActivationRule
from graphq.spec.match import parse_match
from graphq.spec.plan import Plan
from graphq.spec.profile import FixedGrid, OpRule, Output, Placed, Profile, int_activations, op_types
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Rule, Spec
from tests.models import capture

BOTH = op_types("uint8 -> uint8", "uint16 -> uint16")
WEIGHTED = op_types("uint8 x int8/channel -> uint8", "uint16 x int8/channel -> uint16")
IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
ROWS = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


def row(output: Output = "required", placed: Placed = "always", **options: Any) -> OpRule:
    return OpRule(BOTH, output, placed, **options)


def layer(output: Output = "required", **options: Any) -> OpRule:
    return OpRule(WEIGHTED, output, **options)


def table(*fuses: tuple[str, ...], **ops: OpRule) -> Profile:
    return Profile("test", "a test", int_activations("uint8", "uint16"), parse_quant("int8/channel"), ops, fuses)


def graph(model: nn.Module, *inputs: Tensor, **plans: Plan) -> fx.GraphModule:
    """The graph, every layer in int8 by channel with uint8 inputs; ``plans``: of other layers, by name."""
    gm = capture(model, *inputs)
    FoldBatchNorm().run(gm)
    rules = [
        Rule(parse_match("*"), Plan(parse_quant("int8/channel"), parse_quant("uint8/tensor")), may_match_nothing=True)
    ]
    rules += [Rule(parse_match(name.replace("__", ".")), plan) for name, plan in plans.items()]
    Annotate(Spec(tuple(rules)), placed=True).run(gm)
    return gm


def text(found: Placement) -> str:
    """A line for each quantizer: its tensor, its readers, and the number and type of its grid; then the notes."""
    lines: list[str] = []
    for one in found.quantizers:
        readers = "all" if one.readers is None else ", ".join(reader.node.name for reader in one.readers)
        fixed = f" fixed {one.grid.fixed.scale:g} {one.grid.fixed.zero_point}" if one.grid.fixed else ""
        flags = " again" * one.again + " moved" * one.moved
        grid = f"{one.grid.number}: {one.grid.quant}{fixed}{flags}"
        lines.append(f"{one.x.node.name} -> {readers}  grid {grid}  {one.name}.{one.role}")
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)]) + "\n"


def placed(
    profile: Profile, model: nn.Module, *inputs: Tensor, rules: Sequence[ActivationRule] = (), **plans: Plan
) -> str:
    return text(place(graph(model, *inputs, **plans), profile, rules))


class Conv(nn.Module):
    """A convolution, then ``f``."""

    def __init__(self, f: Any = None, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=bias)
        self.other = nn.Conv2d(4, 4, 1)
        self.f = f or (lambda m, y: y)

    def forward(self, x: Tensor) -> Any:
        return self.f(self, self.conv(x))


# -- which ops run in integers -----------------------------------------------------------------------------------------


def test_a_layer_whose_output_is_required() -> None:
    assert_expected_inline(
        placed(table(Conv=layer()), Conv(), IMAGE),
        """\
x -> conv2d  grid 0: uint8/tensor  conv.input
conv2d -> all  grid 1: uint8/tensor  conv.output
""",
    )


def test_a_layer_whose_output_may_be_float() -> None:
    assert_expected_inline(
        placed(table(Conv=layer("optional")), Conv(), IMAGE),
        """\
x -> conv2d  grid 0: uint8/tensor  conv.input
""",
    )


def test_an_output_is_quantized_for_those_readers_that_want_it_where_it_may_be_float() -> None:
    made = placed(table(Conv=layer("optional")), Conv(lambda m, y: m.other(y) + y), IMAGE)
    assert_expected_inline(
        made,
        """\
x -> conv2d  grid 0: uint8/tensor  conv.input
conv2d -> conv2d_1  grid 1: uint8/tensor  conv.output
""",
    )


def test_an_op_that_is_always_placed() -> None:
    assert_expected_inline(
        placed(table(Add=row()), Conv(lambda m, y: y + y.sin()), IMAGE),
        """\
conv2d -> add  grid 0: uint8/tensor  conv.output
sin -> add  grid 1: uint8/tensor  sin.output
add -> all  grid 2: uint8/tensor  Add.output
""",
    )


def test_an_op_that_is_never_placed() -> None:
    assert placed(table(Add=row(placed="never")), Conv(lambda m, y: y + y.sin()), IMAGE) == "\n"


def test_an_op_that_is_placed_between_integers() -> None:
    profile = table(Conv=layer(), Add=row(placed="between"))
    assert_expected_inline(
        placed(profile, Conv(lambda m, y: m.other(y + y)), IMAGE),
        """\
x -> conv2d  grid 0: uint8/tensor  conv.input
conv2d -> all  grid 1: uint8/tensor  conv.output
add -> all  grid 2: uint8/tensor  other.input
conv2d_1 -> all  grid 3: uint8/tensor  other.output
""",
    )


def test_an_op_placed_between_needs_a_reader_and_all_operands_in_integers() -> None:
    profile = table(Conv=layer(), Add=row(placed="between"))
    before_float = placed(profile, Conv(lambda m, y: y + y), IMAGE)
    after_float = placed(profile, Conv(lambda m, y: m.other(y + y.sin())), IMAGE)
    assert "\nadd ->" not in before_float
    assert "add -> conv2d_1" in after_float  # the convolution's own input
    assert "sin" not in after_float


def test_ops_placed_between_hold_each_other_up_only_between_integers() -> None:
    """Both sums read and feed each other, but nothing in integers reads what they give at last."""
    profile = table(Conv=layer(), Add=row(placed="between"))
    made = placed(profile, Conv(lambda m, y: ((y + y) + y).sin()), IMAGE)
    assert "add" not in made


def test_an_op_lets_through_what_its_reader_wants() -> None:
    profile = table(Conv=layer("optional"), MaxPool=row("same", "through"))
    assert_expected_inline(
        placed(profile, Conv(lambda m, y: m.other(F.max_pool2d(y.sin(), 2))), IMAGE),
        """\
x -> conv2d  grid 0: uint8/tensor  conv.input
sin -> max_pool2d  grid 1: uint8/tensor  sin.output
max_pool2d -> all  grid 1: uint8/tensor moved  other.input
""",
    )


def test_an_op_that_lets_through_stays_float_where_nothing_wants_integers() -> None:
    profile = table(Conv=layer("optional"), MaxPool=row("same", "through"))
    assert "max_pool" not in placed(profile, Conv(lambda m, y: F.max_pool2d(y, 2).sin()), IMAGE)


def test_an_op_without_a_row_stays_float() -> None:
    made = placed(table(Conv=layer()), Conv(lambda m, y: m.other(F.gelu(y))), IMAGE)
    assert "gelu -> conv2d_1" in made


# -- what runs as one op -----------------------------------------------------------------------------------------------

FUSED = table(("Conv", "Relu"), ("Conv", "Clip"), ("Add", "Relu"), Conv=layer(), Add=row(), Relu=row(), Clip=row())


def units(gm: fx.GraphModule, profile: Profile = FUSED) -> list[str]:
    return ["+".join(op.node.name for op in unit.ops) for unit in units_of(gm, profile.fuses)]


def test_a_chain_has_no_quantizers_inside() -> None:
    assert_expected_inline(
        placed(FUSED, Conv(lambda m, y: F.relu(y)), IMAGE),
        """\
x -> conv2d  grid 0: uint8/tensor  conv.input
relu -> all  grid 1: uint8/tensor  conv.output
""",
    )
    assert units(graph(Conv(lambda m, y: F.relu6(y)), IMAGE)) == ["x", "conv2d+relu6"]
    assert units(graph(Conv(lambda m, y: F.relu(y + y.sin())), IMAGE)) == ["x", "conv2d", "sin", "add+relu"]


def test_a_sum_with_a_relu_reads_its_operands_quantized() -> None:
    assert_expected_inline(
        placed(FUSED, Conv(lambda m, y: F.relu(y + y.sin())), IMAGE),
        """\
x -> conv2d  grid 0: uint8/tensor  conv.input
conv2d -> all  grid 1: uint8/tensor  conv.output
sin -> add  grid 2: uint8/tensor  sin.output
relu -> all  grid 3: uint8/tensor  Add.output
""",
    )


def test_what_others_read_is_no_inside_of_a_chain() -> None:
    two_readers = Conv(lambda m, y: F.relu(y) * y)
    given_back = Conv(lambda m, y: (F.relu(y), y))
    twice_by_one = Conv(lambda m, y: F.relu(y + y))
    assert "conv2d+relu" not in units(graph(two_readers, IMAGE))
    assert "conv2d+relu" not in units(graph(given_back, IMAGE))
    assert units(graph(twice_by_one, IMAGE)) == ["x", "conv2d", "add+relu"]
    assert "conv2d -> all" in placed(FUSED, given_back, IMAGE)


def test_the_longest_chain_is_taken() -> None:
    profile = table(("Conv", "Relu"), ("Conv", "Relu", "MaxPool"), Conv=layer(), MaxPool=row("same"))
    gm = graph(Conv(lambda m, y: F.max_pool2d(F.relu(y), 2)), IMAGE)
    assert units(gm, profile) == ["x", "conv2d+relu+max_pool2d"]


class Branches(nn.Module):
    """The sum of two convolutions, as at the entry of a residual stage."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x) + self.b(x))


def test_a_sum_of_two_convolutions_belongs_to_one_chain() -> None:
    """The other one's output is what the chain reads, quantized."""
    profile = table(("Conv", "Add", "Relu"), Conv=layer("optional"))
    assert units(graph(Branches(), IMAGE), profile) == ["x", "conv2d+add+relu", "conv2d_1"]
    assert_expected_inline(
        placed(profile, Branches(), IMAGE),
        """\
x -> conv2d, conv2d_1  grid 0: uint8/tensor  a.input
conv2d_1 -> add  grid 1: uint8/tensor  b.output
""",
    )


class SharedRelu(nn.Module):
    """One module of a ReLU, called behind each of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.b(self.relu(self.a(x))))


def test_a_relu_that_is_called_twice_is_part_of_both_chains() -> None:
    gm = graph(SharedRelu(), IMAGE)
    assert units(gm) == ["x", "conv2d+relu", "conv2d_1+relu_1"]
    assert_expected_inline(
        text(place(gm, FUSED)),
        """\
x -> conv2d  grid 0: uint8/tensor  a.input
relu -> all  grid 1: uint8/tensor  a.output
relu_1 -> all  grid 2: uint8/tensor  b.output
""",
    )


class Called(nn.Module):
    """One linear, called on two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.shared(x).sin())


def test_a_layer_that_is_called_twice_has_a_grid_for_each_call() -> None:
    assert_expected_inline(
        placed(table(Linear=layer()), Called(), ROWS),
        """\
x -> linear  grid 0: uint8/tensor  shared.input
linear -> all  grid 1: uint8/tensor  shared.output
sin -> linear_1  grid 2: uint8/tensor  shared.input
linear_1 -> all  grid 3: uint8/tensor  shared.output
""",
    )


# -- who shares a grid -------------------------------------------------------------------------------------------------


def grids(made: str) -> dict[str, str]:
    """The number of each tensor's grid."""
    pairs = [line.split(" -> ") for line in made.splitlines() if " -> " in line and not line.startswith("note")]
    return {name: rest.partition("grid ")[2].partition(":")[0] for name, rest in pairs}


def test_concat_with_grids_of_its_own_and_with_one_for_all() -> None:
    model = Conv(lambda m, y: torch.cat([y, y.sin()], 1).cos())
    own = grids(placed(table(Conv=layer(), Concat=row()), model, IMAGE))
    same = grids(placed(table(Conv=layer(), Concat=row("same")), model, IMAGE))
    assert len({own[name] for name in ("conv2d", "sin", "cat")}) == 3
    assert len({same[name] for name in ("conv2d", "sin", "cat")}) == 1


class Residual(nn.Module):
    """Three blocks x = x + f(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = x + conv(x)
        return x


def test_sums_of_a_residual_stream_have_a_grid_each_or_one_for_all() -> None:
    own = grids(placed(table(Conv=layer(), Add=row()), Residual(), IMAGE))
    same = grids(placed(table(Conv=layer(), Add=row("same")), Residual(), IMAGE))
    assert own == {"x": "0", "conv2d": "1", "add": "2", "conv2d_1": "3", "add_1": "4", "conv2d_2": "5", "add_2": "6"}
    assert set(same.values()) == {"0"}


MOVES = {kind: row("same") for kind in ("Reshape", "Transpose", "Slice", "Split", "MaxPool", "Concat")}


def moved(m: Conv, y: Tensor) -> Tensor:
    left, right = F.max_pool2d(y, 2).flatten(2).transpose(1, 2)[:, 1:].split([2, 2], -1)
    return left.sin() + right.cos()


def test_what_moves_elements_stays_on_its_grid() -> None:
    assert_expected_inline(
        placed(table(Conv=layer(), **MOVES), Conv(moved), IMAGE),
        """\
x -> conv2d  grid 0: uint8/tensor  conv.input
conv2d -> all  grid 1: uint8/tensor  conv.output
max_pool2d -> all  grid 1: uint8/tensor moved  MaxPool.output
flatten -> all  grid 1: uint8/tensor moved  Reshape.output
transpose -> all  grid 1: uint8/tensor moved  Transpose.output
slice_1 -> all  grid 1: uint8/tensor moved  Slice.output
getitem -> all  grid 1: uint8/tensor moved  Split.output
getitem_1 -> all  grid 1: uint8/tensor moved  Split.output
""",
    )


def test_a_graph_input_that_several_layers_read_is_quantized_once() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return (self.a(x) * self.b(x)).sin() + x

    assert_expected_inline(
        placed(table(Linear=layer("optional")), Both(), ROWS),
        """\
x -> linear, linear_1  grid 0: uint8/tensor  a.input
""",
    )


# -- constants, fixed grids, borders -----------------------------------------------------------------------------------


class Positions(nn.Module):
    """A table that is added, a number that is multiplied by, and angles that depend on sizes alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x) + self.table[: x.shape[1]]
        return x * (torch.arange(x.shape[1], dtype=x.dtype)[:, None] * 0.5)


def test_constants_are_quantized_where_they_are_read() -> None:
    """The table as codes that are cut; what only sizes decide in float, up to the op that reads data."""
    profile = table(Linear=layer(), Add=row(), Mul=row(), Slice=row("same"), Unsqueeze=row("same"))
    assert_expected_inline(
        placed(profile, Positions(), torch.randn(2, 3, 4)),
        """\
x -> linear  grid 0: uint8/tensor  linear.input
table -> slice_1  grid 1: uint8/tensor  table.value
linear -> all  grid 2: uint8/tensor  linear.output
slice_1 -> all  grid 1: uint8/tensor moved  Slice.output
add -> all  grid 3: uint8/tensor  Add.output
mul -> mul_1  grid 4: uint8/tensor  Mul.output
mul_1 -> all  grid 5: uint8/tensor  Mul.output
""",
    )


def test_integers_are_no_operands() -> None:
    made = placed(table(Mul=row()), Conv(lambda m, y: y * (y > 0).long()), IMAGE)
    assert made == "\n"


def test_a_fixed_grid() -> None:
    grid = {"uint8": FixedGrid(1 / 256, 0), "uint16": FixedGrid(1 / 65536, 0)}
    profile = table(Conv=layer(), Softmax=row(grids=grid), Sigmoid=row(), Transpose=row("same"))
    made = placed(profile, Conv(lambda m, y: y.softmax(1).transpose(1, 2).sin()), IMAGE)
    assert_expected_inline(
        made,
        """\
x -> conv2d  grid 0: uint8/tensor  conv.input
conv2d -> all  grid 1: uint8/tensor  conv.output
softmax -> all  grid 2: uint8/tensor fixed 0.00390625 0  Softmax.output
transpose -> all  grid 2: uint8/tensor fixed 0.00390625 0 moved  Transpose.output
""",
    )
    wide = [ActivationRule(parse_quant("uint16/tensor"))]
    assert "fixed 1.52588e-05 0" in placed(profile, Conv(lambda m, y: y.softmax(1)), IMAGE, rules=wide)
    assert "fixed" not in placed(table(Conv=layer(), Softmax=row()), Conv(lambda m, y: y.softmax(1)), IMAGE)


def test_a_grid_that_others_share_is_not_fixed() -> None:
    """A concatenation of a softmax and of what is outside [0, 1)."""
    grid = {"uint8": FixedGrid(1 / 256, 0)}
    profile = table(Softmax=row(grids=grid), Concat=row("same"), Conv=layer())
    made = placed(profile, Conv(lambda m, y: torch.cat([y.softmax(1), y], 1)), IMAGE)
    assert "fixed" not in made
    alike = placed(profile, Conv(lambda m, y: torch.cat([y.softmax(1), y.softmax(2)], 1)), IMAGE)
    assert alike.count("fixed") == 3


def test_a_border_between_8_and_16_bits() -> None:
    """The convolution behind reads 16 bits: what the one in front gives is quantized again for it."""
    plan = Plan(parse_quant("int8/channel"), parse_quant("uint16/tensor"))
    assert_expected_inline(
        placed(FUSED, Conv(lambda m, y: m.other(y) + y), IMAGE, other=plan),
        """\
x -> conv2d  grid 0: uint8/tensor  conv.input
conv2d -> all  grid 1: uint8/tensor  conv.output
conv2d -> conv2d_1  grid 2: uint16/tensor again  other.input
conv2d_1 -> all  grid 3: uint16/tensor  other.output
conv2d_1 -> add  grid 4: uint8/tensor again  other.output
add -> all  grid 5: uint8/tensor  Add.output
""",
    )


# -- rules -------------------------------------------------------------------------------------------------------------


def test_rules_by_kind_and_by_module() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Conv(lambda m, y: y.softmax(1)), Conv(lambda m, y: y.softmax(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    rules = [
        ActivationRule(parse_quant("uint8/tensor")),
        ActivationRule(parse_quant("uint16/tensor"), ("Softmax",)),
        ActivationRule(None, (), "b*"),
    ]
    made = placed(table(Conv=layer(), Softmax=row()), Blocks(), IMAGE, rules=rules)
    assert_expected_inline(
        made,
        """\
x -> conv2d  grid 0: uint8/tensor  a.conv.input
conv2d -> all  grid 1: uint8/tensor  a.conv.output
conv2d -> softmax  grid 2: uint16/tensor again  a.conv.output
softmax -> all  grid 3: uint16/tensor  a.Softmax.output
""",
    )


def test_where_there_are_rules_an_op_that_none_matches_stays_float() -> None:
    rules = [ActivationRule(parse_quant("uint8/tensor"), ("Conv",))]
    made = placed(table(Conv=layer(), Sigmoid=row()), Conv(lambda m, y: y.sigmoid()), IMAGE, rules=rules)
    assert "sigmoid" not in made
    assert "conv2d -> all" in made


def test_a_layer_that_is_kept_float_in_the_middle() -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

        def forward(self, x: Tensor) -> Tensor:
            for one in self.layers:
                x = one(x)
            return x

    gm = capture(Three(), ROWS)
    plan = Plan(parse_quant("int8/channel"), parse_quant("uint8/tensor"))
    Annotate(Spec((Rule(parse_match("layers.0"), plan), Rule(parse_match("layers.2"), plan))), placed=True).run(gm)
    assert_expected_inline(
        text(place(gm, table(Linear=layer()))),
        """\
x -> linear  grid 0: uint8/tensor  layers.0.input
linear -> all  grid 1: uint8/tensor  layers.0.output
linear_1 -> linear_2  grid 2: uint8/tensor  layers.1.output
linear_2 -> all  grid 3: uint8/tensor  layers.2.output
""",
    )


def test_a_layer_with_an_output_of_its_own() -> None:
    plan = Plan(parse_quant("int8/channel"), parse_quant("uint16/tensor"), parse_quant("uint16/tensor/percentile99"))
    made = placed(table(Conv=layer()), Conv(), IMAGE, conv=plan)
    assert_expected_inline(
        made,
        """\
x -> conv2d  grid 0: uint16/tensor  conv.input
conv2d -> all  grid 1: uint16/tensor/percentile99  conv.output
""",
    )


def test_layers_that_are_dynamic_or_of_other_weights_stay_as_they_are() -> None:
    linear = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    plans = {
        "0": Plan(parse_quant("int8/channel"), parse_quant("int8/token/dynamic")),
        "1": Plan(parse_quant("int4/g4"), parse_quant("uint8/tensor")),
    }
    made = placed(table(Linear=layer("optional")), linear, ROWS, rules=(), **plans)
    assert_expected_inline(
        made,
        """\
linear_1 -> linear_2  grid 0: uint8/tensor  1.output
note: 1: weight int4/g4 is none that test multiplies in integers
""",
    )


def test_the_gain_of_a_norm_is_quantized() -> None:
    types = op_types("uint8 x uint8/tensor -> uint8")
    profile = table(LayerNormalization=OpRule(types))
    made = placed(profile, nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4, elementwise_affine=False)), ROWS)
    assert_expected_inline(
        made,
        """\
input_1 -> layer_norm  grid 0: uint8/tensor  input_1.value
layer_norm -> all  grid 1: uint8/tensor  0.LayerNormalization.output
layer_norm_1 -> all  grid 2: uint8/tensor  1.LayerNormalization.output
_0_weight -> layer_norm  grid 3: uint8/tensor  0.weight.value
""",
    )


def test_grids_have_powers_of_two_where_a_table_wants_them() -> None:
    profile = table(Linear=layer(), LayerNormalization=OpRule(op_types("uint8 x uint8/tensor -> uint8")))
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    wanted = place(graph(model, ROWS), replace(profile, power_of_two=True))
    assert {str(one.grid.quant) for one in wanted.quantizers} == {"uint8/pow2/tensor"}
    assert {str(one.grid.quant) for one in place(graph(model, ROWS), profile).quantizers} == {"uint8/tensor"}
    assert len(wanted.quantizers) == 4
    assert not wanted.notes
