"""Observers where quantizers will stand, and the QDQ form that they become: for all readers, for some, and again."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

import graphq
from graphq.capture.source import source_of
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.ir.units import module_of
from graphq.ir.views import Dequantize, Param, Quantize, ops_of
from graphq.lowering.profiles import PROFILES
from graphq.observers.grids import GridObserver
from graphq.passes.annotate import Annotate
from graphq.passes.calibrate import Calibrate
from graphq.passes.observe import observers
from graphq.passes.place_quantizers import PlaceQuantizers
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.spec.activations import ActivationRule
from graphq.spec.match import parse_match
from graphq.spec.plan import Plan
from graphq.spec.profile import FixedGrid, OpRule, Profile, int_activations, op_types
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Rule, Spec
from graphq.state import tensor_of
from tests.graphs import assert_vals, run
from tests.models import capture, captured, random_inputs

TYPES = op_types("uint8 -> uint8", "uint16 -> uint16")
X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
EVERY_OP = OpRule(TYPES)
MOVES = OpRule(TYPES, "same")


def table(**ops: OpRule) -> Profile:
    return Profile("test", "a test", int_activations("uint8", "uint16"), parse_quant("int8/channel"), ops)


def place(gm: fx.GraphModule, profile: Profile, *rules: ActivationRule, notes: list[str] | None = None) -> int:
    """How many changes placing makes."""
    plan = Plan(parse_quant("int8/channel"), parse_quant("uint8/tensor"))
    Annotate(Spec((Rule(parse_match("*"), plan, may_match_nothing=True),)), placed=True).run(gm)
    placing = PlaceQuantizers(profile, rules, None if notes is None else notes.append)
    return Pipeline([placing], strict=True).run(gm)["place-quantizers"]


def quantized(
    gm: fx.GraphModule, profile: Profile, *batch: Tensor, rules: tuple[ActivationRule, ...] = ()
) -> fx.GraphModule:
    place(gm, profile, *rules)
    Pipeline([Calibrate(), QuantizeActivations()], strict=True).run(gm, [batch])
    return gm


class Sums(nn.Module):
    """A table that is added, numbers that are added and multiplied by, and a concatenation with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(4))

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.table
        y = 1 - y * 0.5
        return torch.cat([y, y.sin()], -1)


def test_golden() -> None:
    gm = capture(Sums(), X)
    assert place(gm, table(Add=EVERY_OP, Sub=EVERY_OP, Mul=EVERY_OP, Concat=MOVES)) == 11
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, 4] = input
%1: f32[4] = @observers.1(@table)
%2: f32[batch, 4] = @observers.0(%x)
%3: f32[batch, 4] = aten.add.Tensor(%2, %1)
%4: f32[] = @observers.3(@numbers.0)
%5: f32[batch, 4] = @observers.2(%3)
%6: f32[batch, 4] = aten.mul.Tensor(%5, %4)
%7: f32[] = @observers.5(@numbers.1)
%8: f32[batch, 4] = @observers.4(%6)
%9: f32[batch, 4] = aten.sub.Tensor(%7, %8)
%10: f32[batch, 4] = @observers.6(%9)
%11: f32[batch, 4] = aten.sin(%10)
%12: f32[batch, 4] = @observers.7(%11)
%13: f32[batch, 8] = aten.cat([%10, %12], -1)
%14: f32[batch, 8] = @observers.8(%13)
return [%14]
""",
    )
    assert_vals(gm, X)
    assert torch.equal(run(gm, X), run(capture(Sums(), X), X))  # observers give what they are given


def test_golden_of_the_qdq_form() -> None:
    gm = quantized(capture(Sums(), X), table(Add=EVERY_OP, Sub=EVERY_OP, Mul=EVERY_OP, Concat=MOVES), X)
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, 4] = input
%1: f32[4] = graphq.dequantize(@table.weight, @table.weight_scale, @table.weight_zero_point, None, 'uint8', [-1], f32)
%2: u8[batch, 4] = graphq.quantize(%x, @x.value_scale, @x.value_zero_point, None, 'uint8', [-1, -1])
%3: f32[batch, 4] = graphq.dequantize(%2, @x.value_scale, @x.value_zero_point, None, 'uint8', [-1, -1], f32)
%4: f32[batch, 4] = aten.add.Tensor(%3, %1)
%5: f32[] = graphq.dequantize(@numbers.0.weight, @numbers.0.weight_scale, @numbers.0.weight_zero_point, None, 'uint8', [], f32)
%6: u8[batch, 4] = graphq.quantize(%4, @Add.output_scale, @Add.output_zero_point, None, 'uint8', [-1, -1])
%7: f32[batch, 4] = graphq.dequantize(%6, @Add.output_scale, @Add.output_zero_point, None, 'uint8', [-1, -1], f32)
%8: f32[batch, 4] = aten.mul.Tensor(%7, %5)
%9: f32[] = graphq.dequantize(@numbers.1.weight, @numbers.1.weight_scale, @numbers.1.weight_zero_point, None, 'uint8', [], f32)
%10: u8[batch, 4] = graphq.quantize(%8, @Mul.output_scale, @Mul.output_zero_point, None, 'uint8', [-1, -1])
%11: f32[batch, 4] = graphq.dequantize(%10, @Mul.output_scale, @Mul.output_zero_point, None, 'uint8', [-1, -1], f32)
%12: f32[batch, 4] = aten.sub.Tensor(%9, %11)
%13: u8[batch, 4] = graphq.quantize(%12, @Sub.output_scale, @Sub.output_zero_point, None, 'uint8', [-1, -1])
%14: f32[batch, 4] = graphq.dequantize(%13, @Sub.output_scale, @Sub.output_zero_point, None, 'uint8', [-1, -1], f32)
%15: f32[batch, 4] = aten.sin(%14)
%16: u8[batch, 4] = graphq.quantize(%15, @Sub.output_scale, @Sub.output_zero_point, None, 'uint8', [-1, -1])
%17: f32[batch, 4] = graphq.dequantize(%16, @Sub.output_scale, @Sub.output_zero_point, None, 'uint8', [-1, -1], f32)
%18: f32[batch, 8] = aten.cat([%14, %17], -1)
%19: u8[batch, 8] = graphq.quantize(%18, @Sub.output_scale, @Sub.output_zero_point, None, 'uint8', [-1, -1])
%20: f32[batch, 8] = graphq.dequantize(%19, @Sub.output_scale, @Sub.output_zero_point, None, 'uint8', [-1, -1], f32)
return [%20]
""",
    )
    assert_vals(gm, X)
    wanted = run(capture(Sums(), X), X)
    assert (run(gm, X) - wanted).abs().max() <= 0.02 * wanted.abs().max()


def test_numbers_stay_where_the_op_stays_float() -> None:
    gm = capture(Sums(), X)
    assert place(gm, table(Concat=MOVES)) == 3
    assert not [name for name in gm.state_dict() if name.startswith("numbers")]
    gm = capture(Sums(), X)
    place(
        gm,
        table(Add=EVERY_OP, Sub=EVERY_OP, Mul=EVERY_OP),
        ActivationRule(None, ("Mul",)),
        ActivationRule(parse_quant("uint8/tensor"), ("Sub",)),
    )
    assert [float(tensor_of(gm, name)) for name in gm.state_dict() if name.startswith("numbers")] == [1.0]


def test_numbers_of_a_division_and_of_scalars() -> None:
    class Numbers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.aten.add.Scalar(x, 2) / 4 - 1

    gm = quantized(capture(Numbers(), X), table(Add=EVERY_OP, Sub=EVERY_OP, Div=EVERY_OP), X)
    wanted = (X + 2) / 4 - 1
    assert (run(gm, X) - wanted).abs().max() <= 0.01 * wanted.abs().max()
    assert_vals(gm, X)


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        (torch.ops.aten.add.Scalar, lambda x: x + 0.5),
        (torch.ops.aten.sub.Scalar, lambda x: x - 0.5),
        (torch.ops.aten.rsub.Scalar, lambda x: 0.5 - x),
        (torch.ops.aten.mul.Scalar, lambda x: x * 0.5),
        (torch.ops.aten.div.Scalar, lambda x: x / 0.5),
        (torch.ops.aten.add.Tensor, lambda x: x + 0.5),
        (torch.ops.aten.div.Tensor, lambda x: x / 0.5),
    ],
)
def test_every_op_with_a_number(target: Any, wanted: Any) -> None:
    class Number(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin() + 0

    gm = capture(Number(), X)
    (op,) = (op for op in ops_of(gm) if "add" in str(op.node.target))
    op.node.target, op.node.args = target, (op.node.args[0], 0.5)
    gm.recompile()
    gm = quantized(gm, table(Add=EVERY_OP, Sub=EVERY_OP, Mul=EVERY_OP, Div=EVERY_OP), X)
    assert tensor_of(gm, "numbers.0.weight").dtype == torch.uint8
    assert (run(gm, X) - wanted(X.sin())).abs().max() <= 0.02
    assert_vals(gm, X)


def test_each_border_reads_the_tensor_itself() -> None:
    """Two pools of 8 bits read what is in 16: neither reads what was rounded for the other."""

    class Pools(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x.exp()[:, None, :, None]
            a, b = (nn.functional.max_pool2d(y, (1, 1)).sin(), nn.functional.max_pool2d(y, (3, 1)).cos())
            return a + b

    gm = capture(Pools(), X)
    ops = {"Exp": OpRule(op_types("uint16 -> uint16")), "MaxPool": OpRule(op_types("uint8 -> uint8"), "same")}
    place(gm, table(Unsqueeze=MOVES, **ops))
    found = {op.node: one for op, one in observers(gm)}
    pools = [node for node in gm.graph.nodes if "max_pool" in str(node.target)]
    before = [pool.args[0] for pool in pools]
    assert all(node in found for node in before)
    assert before[0] is not before[1]
    assert before[0].args[0] is before[1].args[0]
    assert [str(found[node].grid.quant) for node in (*before, before[0].args[0])] == [  # type: ignore[union-attr]
        *("uint8/tensor", "uint8/tensor", "uint16/tensor")
    ]


def test_observers_belong_to_who_gives_or_alone_reads_a_tensor() -> None:
    """So that names and the report tell whose it is; what only moves elements sees nothing of its own."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.sin()).reshape(-1, 2, 2).flatten(1))

    gm = capture(Two(), X)
    place(gm, PROFILES["generic-int8"])
    found = {op.node.all_input_nodes[0].name: (module_of(op), one) for op, one in observers(gm)}
    assert {name: (module, one.role) for name, (module, one) in found.items()} == {
        "sin": ("a", "input"),
        "linear": ("a", "output"),
        "reshape": ("", "output"),
        "flatten": ("", "input"),  # for all that read it
        "linear_1": ("b", "output"),
    }
    moved = {name for name, (_, one) in found.items() if isinstance(one, GridObserver) and one.moved}
    assert moved == {"reshape", "flatten"}


def test_a_border_is_quantized_again() -> None:
    class Border(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.exp() * x).sigmoid()

    wide = ActivationRule(parse_quant("uint16/tensor"), ("Mul",))
    gm = quantized(
        capture(Border(), X),
        table(Exp=EVERY_OP, Mul=EVERY_OP),
        X,
        rules=(ActivationRule(parse_quant("uint8/tensor")), wide),
    )
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, 4] = input
%1: u16[batch, 4] = graphq.quantize(%x, @x.value_scale, @x.value_zero_point, None, 'uint16', [-1, -1])
%2: f32[batch, 4] = graphq.dequantize(%1, @x.value_scale, @x.value_zero_point, None, 'uint16', [-1, -1], f32)
%3: u8[batch, 4] = graphq.quantize(%x, @x.input0.value_scale, @x.input0.value_zero_point, None, 'uint8', [-1, -1])
%4: f32[batch, 4] = graphq.dequantize(%3, @x.input0.value_scale, @x.input0.value_zero_point, None, 'uint8', [-1, -1], f32)
%5: f32[batch, 4] = aten.exp(%4)
%6: u8[batch, 4] = graphq.quantize(%5, @Exp.output_scale, @Exp.output_zero_point, None, 'uint8', [-1, -1])
%7: f32[batch, 4] = graphq.dequantize(%6, @Exp.output_scale, @Exp.output_zero_point, None, 'uint8', [-1, -1], f32)
%8: u16[batch, 4] = graphq.quantize(%7, @Exp.input0.output_scale, @Exp.input0.output_zero_point, None, 'uint16', [-1, -1])
%9: f32[batch, 4] = graphq.dequantize(%8, @Exp.input0.output_scale, @Exp.input0.output_zero_point, None, 'uint16', [-1, -1], f32)
%10: f32[batch, 4] = aten.mul.Tensor(%9, %2)
%11: u16[batch, 4] = graphq.quantize(%10, @Mul.output_scale, @Mul.output_zero_point, None, 'uint16', [-1, -1])
%12: f32[batch, 4] = graphq.dequantize(%11, @Mul.output_scale, @Mul.output_zero_point, None, 'uint16', [-1, -1], f32)
%13: f32[batch, 4] = aten.sigmoid(%12)
return [%13]
""",
    )
    assert_vals(gm, X)


def test_a_constant_that_several_ops_read_has_codes_for_each_grid() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.empty(4))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.table) * self.table + self.table.sin()

    gm = quantized(capture(Twice(), X), table(Add=EVERY_OP, Mul=EVERY_OP), X)
    wanted = run(capture(Twice(), X), X)
    assert (run(gm, X) - wanted).abs().max() <= 0.02 * wanted.abs().max()
    assert tensor_of(gm, "table").dtype == torch.float32  # which the sine reads
    codes = [op for op in ops_of(gm) if isinstance(op, Dequantize) and not isinstance(op.codes, Quantize)]
    assert {op.format for op in codes} == {"uint8"}
    assert_vals(gm, X)


def test_a_fixed_grid_is_what_the_table_says() -> None:
    class Soft(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(-1).reshape(-1)

    rule = OpRule(TYPES, grids={"uint8": FixedGrid(1 / 256, 0)})
    gm = quantized(capture(Soft(), X), table(Softmax=rule, Reshape=MOVES), X * 0.01)
    scales = {
        str(op.scale): (float(tensor_of(gm, op.scale.fqn)), int(tensor_of(gm, op.zero_point.fqn)))
        for op in ops_of(gm)
        if isinstance(op, Quantize) and isinstance(op.scale, Param) and isinstance(op.zero_point, Param)
    }
    assert [*scales.values()][1:] == [(1 / 256, 0)]
    assert tensor_of(gm, "Softmax.output_zero_point").dtype == torch.uint8


def test_caches_are_on_one_grid_in_and_out() -> None:
    """What a step leaves is what the next one reads: codes go from one to the other."""
    gm = captured("opt")
    profile = table(Concat=MOVES, MatMul=OpRule(op_types("uint8 x uint8 -> uint8")))
    notes: list[str] = []
    place(gm, profile, notes=notes)
    grids = {op.node.all_input_nodes[0].name: one.grid for op, one in observers(gm) if isinstance(one, GridObserver)}
    source = source_of(gm)
    assert source.caches
    outputs = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for pair in source.caches:
        past = inputs[[i.name for i in source.inputs].index(pair.past)]
        present = outputs[list(source.outputs).index(pair.present)]
        assert grids[past.name] == grids[present.all_input_nodes[0].name], pair
    assert len({grids[i.name].number for i in inputs if i.name in grids}) == len(source.caches)


def test_notes_of_what_could_not_be_had() -> None:
    notes: list[str] = []
    profile = table(Sigmoid=OpRule(op_types("uint8 -> uint8")))
    place(capture(nn.Sigmoid(), X), profile, ActivationRule(parse_quant("uint16/tensor")), notes=notes)
    assert notes == [
        "Sigmoid: gives uint8, not uint16, on test",
        "test: quantized tensors between ops: 2 uint8/tensor",
        "test: ops in integers: 1 Sigmoid",
    ]


def test_masked_tokens_have_no_part_in_a_grid() -> None:
    """What stands in masked places does not matter, and one of all is not the one of the valid."""

    def scales(seed: int, masked: bool) -> dict[str, Tensor]:
        gm = captured("bert")
        names = [given.name for given in source_of(gm).inputs]
        batch = dict(zip(names, random_inputs(gm), strict=True))
        batch["attention_mask"][:, 4:] = 0
        other = torch.randint(0, 100, batch["input_ids"].shape, generator=torch.Generator().manual_seed(seed))
        batch["input_ids"][:, 4:] = other[:, 4:]
        if not masked:
            batch["attention_mask"][:] = 1
        place(gm, PROFILES["ort-cpu"])
        Pipeline([Calibrate(), QuantizeActivations()]).run(gm, [tuple(batch.values())])
        return {name: t for name, t in gm.state_dict().items() if name.endswith(("input_scale", "output_scale"))}

    one, two, all_valid = scales(1, True), scales(2, True), scales(1, False)
    assert len(one) > 6
    inside = [name for name in one if "pooler" not in name and "classifier" not in name]
    assert all(torch.equal(one[name], two[name]) for name in inside)
    assert not all(torch.equal(one[name], all_valid[name]) for name in inside)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("profile", ["generic-int8", "ort-cpu"])
def test_models_of_other_dtypes(dtype: torch.dtype, profile: str) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(F.relu(self.a(x)) * 0.5).softmax(-1)

    torch.manual_seed(0)
    model, x = Two().to(dtype), X.to(dtype)
    made = graphq.compile(model, profile=profile, inputs=x, calibration=[x])
    wanted, found = model(x), made(x)
    assert isinstance(found, Tensor)
    assert found.dtype == dtype
    assert (found - wanted).abs().max() <= 0.05
    made.graph.recompile()
    with torch.no_grad():
        assert (made.graph(x)[0] - found).abs().max() <= 0.02
    assert_vals(made.graph, x)


class Hidden(nn.Module):
    """Attention as it is written out: where a token is padding, something very low is added to its scores."""

    def __init__(self, low: float, way: str) -> None:
        super().__init__()
        self.low, self.way = low, way

    def forward(self, q: Tensor, mask: Tensor) -> Tensor:
        scores = q @ q.transpose(-1, -2)
        if self.way == "add":
            scores = scores + (1 - mask)[:, None] * self.low
        elif self.way == "fill":
            scores = scores.masked_fill(mask[:, None] == 0, self.low)
        elif self.way == "where":
            scores = torch.where(mask[:, None] == 0, self.low, scores)
        else:
            number = torch.where(mask.bool(), torch.zeros(()), torch.full((), self.low))
            scores = number[:, None] + scores
        return scores.softmax(-1) @ q


@pytest.mark.parametrize("low", [-1e9, torch.finfo(torch.float32).min, -torch.inf])
@pytest.mark.parametrize("way", ["add", "fill"])
def test_what_hides_scores_takes_no_more_of_a_grid_than_it_has_to(low: float, way: str) -> None:
    if (low, way) == (-torch.inf, "add"):
        low = -1e30  # 0 times infinity is no number
    q = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    model = Hidden(low, way)
    made = graphq.compile(
        model,
        {"graphq": 1, "rules": [{"match": "*", "float": True}], "activations": "uint8/tensor"},
        inputs={"q": q, "mask": mask},
        calibration=[{"q": q, "mask": mask}],
    )
    found, wanted = made(q=q, mask=mask), model(q, mask)
    assert isinstance(found, Tensor)
    assert (found - wanted).abs().max() <= 0.15 * wanted.abs().max()  # scores in steps of a quarter
    changed = q.clone()
    changed[1, 3:] += 1
    hidden = made(q=changed, mask=mask)
    assert isinstance(hidden, Tensor)
    assert torch.equal(hidden[1, :3], found[1, :3])  # what is hidden has no part in it


@pytest.mark.parametrize("low", [-50.0, -1e30, -torch.inf])
@pytest.mark.parametrize("way", ["add", "fill", "where", "number"])
def test_calibration_without_padding_leaves_room_for_what_hides(low: float, way: str) -> None:
    """A batch of whole sequences shows nothing but zeros and ones in masks; one with padding is hidden all the same."""
    if (low, way) == (-torch.inf, "add"):
        low = -1e9  # 0 times infinity is no number
    q = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(2))
    whole, padded = torch.ones(2, 5), torch.tensor([[1.0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    model = Hidden(low, way)
    made = graphq.compile(
        model,
        {"graphq": 1, "rules": [{"match": "*", "float": True}], "activations": "uint8/tensor"},
        inputs={"q": q, "mask": whole},
        calibration=[{"q": q, "mask": whole}],
        mask="mask",
    )
    assert not [note for note in made.report.notes if "calibration saw" in note]
    found, wanted = made(q=q, mask=padded), model(q, padded)
    assert isinstance(found, Tensor)
    assert (found - wanted).abs().max() <= 0.15 * wanted.abs().max()  # scores in steps of a quarter
    hidden = made(q=torch.cat([q[:, :3], q[:, 3:] + 1], 1), mask=padded)
    assert isinstance(hidden, Tensor)
    assert torch.equal(hidden[1, :3], found[1, :3])  # what is hidden has no part in it


class Causal(nn.Module):
    """Attention of scores that differ by hundreds, the highest of which are hidden."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.out = way, nn.Linear(2, 2, bias=False)
        self.out.weight.data.copy_(torch.eye(2))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        if self.way == "fused":
            return self.out(F.scaled_dot_product_attention(q, k, k, is_causal=True, scale=1.0))
        low = {"least": torch.finfo(q.dtype).min, "number": -1e9}[self.way]
        hidden = torch.ones(q.shape[-2], k.shape[-2]).tril().logical_not()
        return self.out((q @ k.transpose(-1, -2) + hidden.to(q.dtype) * low).softmax(-1) @ k)


@pytest.mark.parametrize("way", ["fused", "least", "number"])
def test_scores_far_above_the_visible_ones_are_hidden(way: str) -> None:
    """A number that hides what is 50 above lets through what is 100 above."""
    k = torch.tensor([[[-10.0, 1], [-9, 2], [-10, 3], [10, 4], [10, 5]]])
    q = torch.tensor([[[8.0, 0], [8, 0.1], [8, 0.2], [8, 0.3], [8, 0.4]]])
    model = Causal(way)
    made = graphq.compile(model, None, profile="generic-int8", inputs={"q": q, "k": k}, calibration=[{"q": q, "k": k}])
    found, wanted = made(q=q, k=k), model(q, k)
    assert isinstance(found, Tensor)
    assert (found - wanted).abs().max() <= 0.5  # keys in steps of 0.08, weights of scores in steps of one


def test_numbers_that_only_a_padded_batch_would_show_are_told() -> None:
    """Integers that nobody declares as a mask may be anything: a note says what to calibrate with."""

    class Added(nn.Module):
        def forward(self, q: Tensor, mask: Tensor) -> Tensor:
            return (q @ q.transpose(-1, -2) + (1 - mask)[:, None].float() * -50).softmax(-1) @ q

    q, mask = torch.randn(2, 5, 4), torch.ones(2, 5, dtype=torch.int64)
    made = graphq.compile(
        Added(),
        {"graphq": 1, "rules": [{"match": "*", "float": True}], "activations": "uint8/tensor"},
        inputs={"q": q, "mask": mask},
        calibration=[{"q": q, "mask": mask}],
    )
    notes = [note for note in made.report.notes if "calibration saw" in note]
    assert notes
    for note in notes:
        assert note.endswith(" follows; where a batch with padding brings other numbers, calibrate with one")
