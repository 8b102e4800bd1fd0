"""Ops that lose most by eight bits fall back: the culprit first, as many as are asked for, until a floor is met."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

import graphq
from graphq import compiler
from graphq.compiler import Compiled
from graphq.errors import SpecError
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.ir.views import Quantize, ops_of
from graphq.lowering.profiles import PROFILES
from graphq.passes.annotate import Annotate
from graphq.passes.calibrate import Calibrate
from graphq.passes.fall_back import FallBack, reference_outputs
from graphq.passes.observe import observers
from graphq.passes.place_quantizers import PlaceQuantizers
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.report import FallbackReport
from graphq.spec.fallback import Fallback
from graphq.spec.match import parse_match
from graphq.spec.plan import Plan
from graphq.spec.profile import OpRule, Profile, int_activations, op_types
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Rule, Spec
from tests.graphs import assert_vals
from tests.models import capture, captured, random_inputs

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


class Culprit(nn.Module):
    """Layers in a row, one of whose tensors has a column 300 times as large as the others, which nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 9), nn.Linear(8, 4)
        self.gain = nn.Parameter(torch.ones(9))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        return self.c((y.tanh() * self.gain)[:, 1:]).sigmoid()


def culprit() -> Culprit:
    torch.manual_seed(0)
    model = Culprit()
    with torch.no_grad():
        model.gain[0] = 300.0
    return model


def compiled(fallback: Any, profile: str = "qnn-htp", model: nn.Module | None = None, **options: Any) -> Compiled:
    return graphq.compile(
        model or culprit(), profile=profile, fallback=fallback, inputs=X, calibration=[X, X.flip(0) * 0.9], **options
    )


def told(made: Compiled) -> FallbackReport:
    assert made.report.activations is not None
    assert made.report.activations.fallback is not None
    return made.report.activations.fallback


def sqnr(made: Compiled, model: nn.Module) -> float:
    """Of the artifact's QDQ form against the float model, in decibels."""
    made.graph.recompile()
    with torch.no_grad():
        wanted, found = model(X).double(), made.graph(X)[0].double()
    return float(10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum()))


def formats(gm: fx.GraphModule) -> dict[str, str]:
    """What is quantized to which type."""
    return {op.node.all_input_nodes[0].name: op.format for op in ops_of(gm) if isinstance(op, Quantize)}


def test_the_culprit_is_found_first() -> None:
    """It and what reads it run in 16 bits, up to a border; what only moves elements is not counted."""
    made = compiled({"max_ops": 2})
    report = told(made)
    assert report.ops == (("Mul", "uint16"), ("c", "uint16"))
    assert report.after > report.before + 10
    assert report.after == pytest.approx(sqnr(made, culprit()), abs=0.5)  # whose biases are rounded, too
    assert compiled({"max_ops": 2}).report.notes == made.report.notes
    found = formats(made.graph)
    # the tanh again for Mul, c again for the sigmoid
    assert [*found.values()] == ["uint8"] * 4 + ["uint16"] * 4 + ["uint8"] * 2
    assert [name for name, format in found.items() if format == "uint16"][1:] == ["mul", "slice_1", "linear_2"]
    ops = {op.name: op.types for op in made.report.activations.ops}  # type: ignore[union-attr]
    assert ops["c"] == "uint16 x int8/channel -> uint16"
    assert ops["a"] == "uint8 x int8/channel -> uint8"
    assert_vals(made.graph, X)


def test_a_profile_without_such_types_has_floats() -> None:
    made = compiled({"max_ops": 2}, "rknn")
    report = told(made)
    assert report.ops == (("Mul", "float"), ("c", "float"))
    notes = [note for note in made.report.notes if note.startswith("fallback")]
    assert notes[0] == "fallback: 2 ops run in float, for rknn has no 16-bit types: Mul, c"
    assert notes[1].startswith(f"fallback: SQNR of the outputs on calibration data: {report.before:.1f} dB before, ")
    assert "mul" not in "".join(formats(made.graph))
    reasons = {op.name: op.reason for op in made.report.activations.ops}  # type: ignore[union-attr]
    assert reasons["Mul"] == reasons["c"] == "the fallback keeps it float"


def test_what_gives_a_tensor_that_may_be_float_stays_in_integers() -> None:
    """ONNX Runtime's linears may give floats: only what reads the culprit's tensor is to fall back."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.c = nn.Linear(8, 9), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x)[:, 1:]).sigmoid()

    torch.manual_seed(0)
    model = Wide()
    with torch.no_grad():
        model.a.weight[0] *= 300
    made = compiled({"max_ops": 1}, "ort-cpu", model)
    assert told(made).ops == (("c", "float"),)
    assert [op.types for op in made.report.activations.ops if op.name == "a"] == [  # type: ignore[union-attr]
        "uint8 x int8/channel -> uint8"
    ]


def test_a_floor_is_met_by_the_fewest() -> None:
    before = told(compiled({"max_ops": 2}))
    floor = before.before + 6
    report = told(compiled({"min_sqnr": floor}))
    assert report.ops == before.ops
    assert report.after >= floor
    assert report.is_met
    assert report.tried[0] == (0, report.before)
    assert (2, report.after) in report.tried


def test_a_floor_that_is_met_already_takes_nothing() -> None:
    made = compiled({"min_sqnr": 1.0})
    report = told(made)
    assert report.ops == ()
    assert report.before == report.after
    assert report.tried == ((0, report.before),)
    assert "uint16" not in formats(made.graph).values()
    (line,) = [note for note in made.report.notes if note.startswith("fallback")]
    assert line.startswith(f"fallback: SQNR of the outputs on calibration data: {report.after:.1f} dB, ")


@pytest.mark.parametrize(
    ("fallback", "limit"),
    [({"min_sqnr": 200}, "whatever falls back"), ({"min_sqnr": 200, "max_ops": 3}, "with 3 ops at most")],
)
def test_a_floor_that_cannot_be_met_is_told(fallback: dict[str, int], limit: str) -> None:
    made = compiled(fallback)
    report = told(made)
    assert not report.is_met
    assert report.before + 10 < report.after < report.weights
    assert len(report.ops) <= fallback.get("max_ops", 99)
    assert f"fallback: the floor of 200 dB is not met {limit}" in made.report.notes


def test_no_more_than_max_ops_and_no_less_than_fit() -> None:
    for most in (1, 2, 3, 4):
        report = told(compiled({"max_ops": most}))
        assert len(report.ops) == most, most


def test_a_row_without_16_bits_is_float_and_says_so() -> None:
    """The consumer has 16 bits, but none for products."""
    rows = op_types("uint8 -> uint8", "uint16 -> uint16")
    weighted = op_types("uint8 x int8/channel -> uint8", "uint16 x int8/channel -> uint16")
    ops = {
        "Linear": OpRule(weighted),
        "Mul": OpRule(op_types("uint8 -> uint8")),
        "Slice": OpRule(rows, "same"),
        "Sigmoid": OpRule(rows),
        "Relu": OpRule(rows),
    }
    profile = Profile("test", "a test", int_activations("uint8", "uint16"), parse_quant("int8/channel"), ops)
    gm = compiler.capture(culprit(), X)
    annotate(gm)
    notes: list[str] = []
    fall_back(gm, profile, Fallback(max_ops=2), notes)
    assert notes[0] == "fallback: 2 ops run in float, for test has no 16-bit types for Mul, Slice, Linear: Mul, c"


def test_16_bits_that_take_another_weight_are_none() -> None:
    rows = op_types("uint8 -> uint8", "uint16 -> uint16")
    weighted = op_types("uint8 x int8/channel -> uint8", "uint16 x int4/channel -> uint16")
    ops = {"Linear": OpRule(weighted), "Mul": OpRule(rows), "Slice": OpRule(rows, "same")}
    profile = Profile("test", "a test", int_activations("uint8", "uint16"), parse_quant("int8/channel"), ops)
    gm = compiler.capture(culprit(), X)
    annotate(gm)
    notes: list[str] = []
    fall_back(gm, profile, Fallback(max_ops=2), notes)
    assert notes[0] == "fallback: 2 ops run in float, for test has no 16-bit types for Mul, Slice, Linear: Mul, c"


def annotate(gm: fx.GraphModule) -> None:
    plan = Plan(parse_quant("int8/channel"), parse_quant("uint8/tensor"))
    Annotate(Spec((Rule(parse_match("*"), plan, may_match_nothing=True),)), placed=True).run(gm)
    QuantizeWeights().run(gm)


def fall_back(
    gm: fx.GraphModule, profile: Profile, fallback: Fallback, notes: list[str], batch: tuple[Tensor, ...] = (X,)
) -> int:
    return Pipeline([FallBack(profile, (), fallback, note=notes.append)], strict=True).run(gm, [batch])["fall-back"]


def test_without_anything_to_gain_it_places_as_usual() -> None:
    """The graph is what placing alone gives, and the count is the same."""
    one, other = capture(culprit(), X), capture(culprit(), X)
    annotate(one)
    annotate(other)
    notes: list[str] = []
    count = fall_back(one, PROFILES["qnn-htp"], Fallback(min_sqnr=1.0), notes)
    assert count == PlaceQuantizers(PROFILES["qnn-htp"]).run(other)
    assert dump(one) == dump(other)
    assert len(observers(one)) == len(observers(other))


def test_numbers_that_are_computed_with_can_fall_back() -> None:
    class Numbers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([(x * 500 + 1)[:, :1] / 400, x * 0.5], 1)[:, 1:].sin()

    gm = capture(Numbers(), X)
    annotate(gm)
    notes: list[str] = []
    fall_back(gm, PROFILES["generic-int8"], Fallback(max_ops=3), notes)
    Pipeline([Calibrate(), QuantizeActivations()], strict=True).run(gm, [(X,)])
    assert_vals(gm, X)
    assert "uint16" in formats(gm).values()


def test_what_masks_leave_out_has_no_part_in_it() -> None:
    def report(seed: int) -> list[str]:
        gm = captured("bert")
        annotate(gm)
        batch = [*random_inputs(gm)]
        names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
        mask, ids = names.index("attention_mask"), names.index("input_ids")
        batch[mask][:, 3:] = 0
        other = torch.randint(0, 99, batch[ids].shape, generator=torch.Generator().manual_seed(seed))
        batch[ids][:, 3:] = other[:, 3:]
        notes: list[str] = []
        fall_back(gm, PROFILES["qnn-htp"], Fallback(max_ops=2), notes, tuple(batch))
        return notes

    assert report(1)[:2] == report(2)[:2]


def test_caches_are_not_measured() -> None:
    gm = captured("opt")
    batches = [random_inputs(gm)]
    (found,) = reference_outputs(gm, batches)
    assert len(found) == 1
    assert found[0].shape[-1] > 64  # the logits


def test_a_model_without_floats_is_refused() -> None:
    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).argmax(-1)

    with pytest.raises(SpecError, match="fallback: the model gives no floats but caches: there is nothing to measure"):
        compiled({"max_ops": 1}, "qnn-htp", Ids())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"spec": "w8a16", "profile": "qnn-htp"},
            "fallback: the spec quantizes no activations with static scales between ops; give activations or a profile",
        ),
        (
            {"spec": "w8a8-static"},
            "fallback: the spec quantizes no activations with static scales between ops; give activations or a profile",
        ),
        ({"profile": "qnn-htp", "fallback": {"ops": 1}}, "fallback: ops: no such key; there are max_ops, min_sqnr"),
        (
            {"profile": "qnn", "fallback": {"max_ops": 1}},
            f"profile: qnn: no such profile; there are {', '.join(PROFILES)}",
        ),
    ],
)
def test_refused(options: dict[str, Any], problem: str) -> None:
    given: dict[str, Any] = {"fallback": {"max_ops": 1}, **options}
    with pytest.raises(SpecError) as raised:
        graphq.compile(nn.Sequential(nn.Linear(8, 8)), inputs=X, calibration=[X], **given)
    assert raised.value.problems == (problem,)


def test_explain_says_that_data_decides() -> None:
    spec = {
        "graphq": 1,
        "rules": [{"match": "*", "weight": "int8/channel", "input": "uint8/tensor"}],
        "profile": "qnn-htp",
        "fallback": {"max_ops": 2, "min_sqnr": 40},
    }
    found = graphq.explain(culprit(), spec, inputs=X)
    assert "fallback: max_ops 2, min_sqnr 40: which ops fall back is found on calibration data" in found.notes
    assert found.settings["fallback"] == "max_ops 2, min_sqnr 40"
    refused = graphq.explain(culprit(), {"graphq": 1, "weight": "int8/channel", "fallback": {"max_ops": 2}}, inputs=X)
    assert any(note.startswith("compile refuses: fallback: the spec quantizes no") for note in refused.notes)


def test_the_file_runs_in_integers_where_the_report_says_so(tmp_path: Path) -> None:
    """Borders between 8 and 16 bits are read by lint as the consumer reads them, and by ONNX Runtime."""
    made = compiled({"max_ops": 2})
    made.emit("onnx", tmp_path / "onnx", shapes={"batch": 64})
    found = graphq.lint(tmp_path / "onnx", "qnn-htp")
    assert [*map(str, found.findings)] == []
    assert len(found.ops) == len(made.report.activations.ops)  # type: ignore[union-attr]
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": X.numpy()})
    made.graph.recompile()
    assert (torch.from_numpy(y) - made.graph(X)[0]).abs().max() <= 0.01  # two steps of the last output
