"""Models compiled for a profile: what explain, the report, the artifact and the command line say of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import graphq
from graphq.artifacts.inspect import inspect
from graphq.cli import app
from graphq.errors import SpecError
from graphq.frontends import print_spec
from graphq.lowering.profiles import PROFILES
from graphq.report import Report
from graphq.spec.rules import Spec
from tests.checkpoints import save_checkpoint, text
from tests.models import tiny

IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two convolutions, a residual sum, a softmax; and a part whose activation is always 0."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        y = y + self.b(y)
        dead = F.relu(-F.relu(y)) * 1.5
        return self.head((y + dead).mean((2, 3))).softmax(-1)


def activations(*rules: Any, **more: Any) -> dict[str, Any]:
    layers = {"match": "*", "weight": "int8/channel", "input": "uint8/tensor", "may_match_nothing": True}
    return {"graphq": 1, "rules": [layers], "activations": list(rules), **more}


def notes_of(report: Report, profile: str) -> list[str]:
    return [note for note in report.notes if note.startswith(f"{profile}: ")]


def test_the_report_says_what_runs_in_integers_and_what_in_float() -> None:
    torch.manual_seed(0)
    made = graphq.compile(Net(), profile="ort-cpu", inputs=IMAGE, calibration=[IMAGE])
    told = notes_of(made.report, "ort-cpu")
    assert told == [
        "ort-cpu: quantized tensors between ops: 4 uint8/tensor",
        "ort-cpu: ops in integers: 2 Conv, 1 Linear",
        "ort-cpu: ops in float: 2 Add: not between ops in integers",
        "ort-cpu: ops in float: 2 Relu: ort-cpu has no row for it",
        "ort-cpu: ops in float: 1 Neg: ort-cpu has no row for it",
        "ort-cpu: ops in float: 1 Mul: not between ops in integers",
        "ort-cpu: ops in float: 1 ReduceMean: ort-cpu has no row for it",
        "ort-cpu: ops in float: 1 Softmax: ort-cpu runs it faster so",
    ]
    assert notes_of(graphq.explain(Net(), profile="ort-cpu", inputs=IMAGE), "ort-cpu") == told
    assert made.report.settings["profile"] == "ort-cpu"


def test_the_report_has_each_op() -> None:
    """In graph order those in integers, with their types, then those in float, with their reason; a rule by its name."""
    torch.manual_seed(0)
    spec = activations({"quant": "uint8/tensor"}, {"float": True, "op": ["Softmax", "ReduceMean"]}, profile="qnn-htp")
    made = graphq.compile(Net(), spec, inputs=IMAGE, calibration=[IMAGE]).report
    data = made.to_json()["activations"]
    assert data == graphq.explain(Net(), spec, inputs=IMAGE).to_json()["activations"]
    weighted = "uint8 x int8/channel -> uint8"
    rule = "a rule keeps it float: Softmax|ReduceMean: float (activations[1])"
    assert [(op["op"], op["kind"], op["types"] or op["reason"]) for op in data["ops"]] == [
        ("a", "Conv", weighted),
        ("b", "Conv", weighted),
        ("Add", "Add", "uint8 -> uint8"),
        ("Relu", "Relu", "uint8 -> uint8"),
        ("Neg", "Neg", "uint8 -> uint8"),
        ("Relu", "Relu", "uint8 -> uint8"),
        ("Mul", "Mul", "uint8 -> uint8"),
        ("Add", "Add", "uint8 -> uint8"),
        ("head", "Linear", weighted),
        ("ReduceMean", "ReduceMean", rule),
        ("Softmax", "Softmax", rule),
    ]
    assert (data["profile"], data["fallback"]) == ("qnn-htp", None)
    assert sum(data["tensors"].values()) == 11
    assert graphq.compile(Net(), "w8a16", inputs=IMAGE).report.to_json()["activations"] is None


def test_without_weights_the_same_is_said(tmp_path: Path) -> None:
    model = tiny("resnet")
    model.save_pretrained(tmp_path / "model")
    pixels = torch.randn(2, 3, 32, 32)
    made = graphq.compile(model, profile="generic-int8", inputs={"pixel_values": pixels}, calibration=[pixels])
    told = notes_of(made.report, "generic-int8")
    assert len(told) > 1
    explained = graphq.explain(tmp_path / "model", profile="generic-int8")
    assert notes_of(explained, "generic-int8") == told
    run = CliRunner().invoke(app, ["explain", str(tmp_path / "model"), "--spec", "w8a16", "--profile", "ort-cpu"])
    assert run.exit_code == 0, run.output


class Recurrent(nn.Module):
    """Two recurrent layers, one of two directions, and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"lstm": nn.LSTM(4, 4, batch_first=True, bidirectional=True)})
        self.gru, self.cell, self.head = nn.GRU(8, 4, batch_first=True), nn.GRUCell(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.gru(self.encoder["lstm"](x)[0])[0][:, -1]
        return self.head(self.cell(y))


def test_recurrent_layers_that_stay_float_are_named() -> None:
    """Whose steps are too many to be written out; where they are not, none is float."""
    x = torch.randn(2, 65, 4)
    notes = graphq.explain(Recurrent(), profile="qnn-htp", inputs=x).notes
    lacks, steps = "qnn-htp has no row for it", "up to 64 steps, in a known number, run in integers"
    assert [note for note in notes if "LSTM" in note or "GRU" in note] == [
        f"qnn-htp: ops in float: 2 LSTM (encoder.lstm): {lacks}: onnxruntime-qnn hands it to QNN in float16; {steps}",
        f"qnn-htp: ops in float: 1 GRU (gru): {lacks}: onnxruntime-qnn has no builder for it; {steps}",
    ]
    few = graphq.explain(Recurrent(), profile="qnn-htp", inputs=x[:, :3])
    assert not [note for note in few.notes if "ops in float" in note]
    assert {one.layer.kind for one in few.layers} == {"recurrent", "linear"}
    notes = graphq.explain(Recurrent(), profile="openvino", inputs=x[:, :3]).notes
    why = "RNNSeq in float; codes as weights do not compile beside quantized tensors"
    assert f"openvino: ops in float: 2 LSTM (encoder.lstm): openvino has no row for it: {why}" in notes


def test_rules_for_the_ops_of_a_recurrence() -> None:
    """Of its steps where these are written out, which a model whose recurrences stay whole does not have."""
    x = torch.randn(2, 3, 4)
    rules = activations({"quant": "uint8/tensor"}, {"quant": "uint16/tensor", "op": "Tanh"}, profile="qnn-htp")
    made = graphq.compile(Recurrent(), rules, inputs=x, calibration=[x])
    placed = made.report.activations
    assert placed is not None
    types = {op.types for op in placed.ops if op.kind == "Tanh"}
    assert types == {"uint16 -> uint16"}
    with pytest.raises(SpecError, match="Tanh: uint16/tensor: matches no op of the model"):
        graphq.compile(Recurrent(), rules | {"profile": "ort-cpu"}, inputs=x, calibration=[x])


def test_dead_activations_are_noted_by_name() -> None:
    torch.manual_seed(0)
    made = graphq.compile(Net(), profile="generic-int8", inputs=IMAGE, calibration=[IMAGE])
    dead = [note for note in made.report.notes if "only zeros" in note]
    unknown = "calibration saw only zeros in its output, from which no range of uint8/tensor follows"
    assert dead == [f"Relu: {unknown}", f"Mul: {unknown}"]


def test_a_rule_for_activations_that_no_op_has() -> None:
    spec = activations(
        {"quant": "uint8/tensor"},
        {"quant": "uint16/tensor", "op": ["Relu", "Soft"]},
        {"quant": "uint16/tensor", "op": "Sigmoid"},
        {"quant": "uint16/tensor", "module": "heads.*"},
    )
    with pytest.raises(SpecError) as caught:
        graphq.compile(Net(), spec, inputs=IMAGE, calibration=[IMAGE])
    assert caught.value.problems == ("activations[1]: op: Soft is no kind of op; did you mean Softmax?",)
    spec["activations"][1]["op"] = ["Relu"]
    with pytest.raises(SpecError) as caught:
        graphq.compile(Net(), spec, inputs=IMAGE, calibration=[IMAGE])
    assert caught.value.problems == (
        "activations[2]: Sigmoid: uint16/tensor: matches no op of the model",
        "activations[3]: all in heads.*: uint16/tensor: matches no op of the model; did you mean head?",
    )
    refused = [note for note in graphq.explain(Net(), spec, inputs=IMAGE).notes if note.startswith("compile refuses")]
    assert refused == [f"compile refuses: {problem}" for problem in caught.value.problems]


def test_a_rule_that_keeps_float_may_match_no_op() -> None:
    spec = activations({"quant": "uint8/tensor"}, {"float": True, "op": "Sigmoid"})
    made = graphq.compile(Net(), spec, inputs=IMAGE, calibration=[IMAGE])
    assert "activations[1]: Sigmoid: float: matches no op of the model" in made.report.notes
    assert made.spec.activations[1].quant is None


def test_a_rule_may_name_what_attention_is_made_of() -> None:
    spec = activations({"quant": "uint8/tensor"}, {"quant": "uint16/tensor", "op": "Softmax"}, profile="qnn-htp")
    made = graphq.compile(
        tiny("vit"), spec, inputs={"pixel_values": torch.randn(2, 3, 32, 32)}, calibration=[torch.randn(2, 3, 32, 32)]
    )
    assert not [note for note in made.report.notes if "matches no op" in note]
    softmax = [node for node in made.graph.graph.nodes if "softmax" in str(node.target)]
    assert len(softmax) == 2
    for node in softmax:
        (reader,) = node.users
        assert "uint16" in reader.args


@pytest.mark.parametrize(
    ("spec", "profile", "problem"),
    [
        (None, None, "spec: none given; give one, or a profile, such as ort-cpu"),
        (None, "ort", f"profile: ort: no such profile; there are {', '.join(PROFILES)}"),
        ("w8a16", "ort", f"profile: ort: no such profile; there are {', '.join(PROFILES)}"),
        (None, "ort-cpu", "calibration: none given, but a, b, head ask for static activation scales"),
    ],
)
def test_refused(spec: Any, profile: Any, problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        graphq.compile(Net(), spec, profile=profile, inputs=IMAGE)
    assert caught.value.problems == (problem,)


def test_rules_for_activations_need_calibration() -> None:
    with pytest.raises(SpecError) as caught:
        graphq.compile(
            Net(), {"graphq": 1, "rules": [{"match": "*", "float": True}], "activations": "uint8/tensor"}, inputs=IMAGE
        )
    assert caught.value.problems == ("calibration: none given, but the spec quantizes activations with static scales",)


def test_a_weight_only_or_dynamic_spec_needs_no_calibration_for_a_profile() -> None:
    dynamic = {"graphq": 1, "rules": [{"match": "head", "weight": "int8/channel", "input": "int8/token/dynamic"}]}
    for spec in ("w8a16", dynamic):
        made = graphq.compile(Net(), spec, profile="ort-cpu", inputs=IMAGE)
        assert made.spec.profile == "ort-cpu"
        assert not notes_of(made.report, "ort-cpu")


def test_the_artifact_says_its_profile(tmp_path: Path) -> None:
    made = graphq.compile(Net(), profile="ort-cpu", inputs=IMAGE, calibration=iter([IMAGE, IMAGE]))
    assert isinstance(made.spec, Spec)
    made.save(tmp_path / "torch")
    found = inspect(tmp_path / "torch")
    assert "profile: ort-cpu" in found.spec
    assert made.report.activations is not None
    assert found.to_json()["activations"] == made.report.activations.to_json()
    assert "\nops        3 of 11 in integers, for ort-cpu\n" in str(found)
    again = graphq.load(tmp_path / "torch")
    found, wanted = again(IMAGE), made(IMAGE)
    assert isinstance(found, Tensor)
    assert isinstance(wanted, Tensor)
    assert torch.equal(found, wanted)


def test_all_scales_are_powers_of_two_for_a_profile_that_wants_them(tmp_path: Path) -> None:
    """Of weights, activations, constants and biases, from the profile's own spec and from one that does not say so."""
    torch.manual_seed(0)
    model = Net()
    given = activations({"quant": "int8/tensor"})
    given["rules"][0] |= {"weight": "int8/tensor", "input": "int8/tensor"}
    for spec in (None, given):
        made = graphq.compile(model, spec, profile="vitis-ai", inputs=IMAGE, calibration=[IMAGE])
        scales = {name: t for name, t in made.graph.state_dict().items() if name.endswith("_scale")}
        assert len(scales) >= 12
        assert {name for name, t in scales.items() if not (torch.frexp(t)[0] == 0.5).all()} == set()
        s_x, s_w, bias = (float(scales[f"a.{name}_scale"]) for name in ("input", "weight", "bias"))
        assert bias == s_x * s_w
        made.graph.recompile()
        assert (made.graph(IMAGE)[0] - model(IMAGE)).abs().max() <= 0.1
        assert not [note for note in made.report.notes if "chosen here" in note]
        told = [note for note in made.report.notes if "are powers of two" in note]
        assert told == ([] if spec is None else ["vitis-ai: scales are powers of two: int8/tensor is int8/pow2/tensor"])
        place = tmp_path / str(spec is None)
        made.emit("onnx", place, shapes={"batch": 2}, opset=17)
        assert not [finding for finding in graphq.lint(place, "vitis-ai").findings if "power" in str(finding)]
    assert "weight: int8/pow2/tensor" in print_spec(made.spec)


def test_a_fallback_on_the_command_line(tmp_path: Path) -> None:
    """From an option, instead of the spec's; its report in JSON, and in the artifact."""
    save_checkpoint(tmp_path / "model")
    (tmp_path / "text").write_text(text(40))
    (tmp_path / "spec.yaml").write_text(
        "graphq: 1\nweight: int8/channel\ninput: uint8/tensor\nprofile: qnn-htp\nfallback: {min_sqnr: 200}\n"
    )
    command = ["compile", tmp_path / "model", "--spec", tmp_path / "spec.yaml", "--target", "torch", "--samples", "2"]
    command += ["--calibration", tmp_path / "text", "--sequence-length", "8", "--out", tmp_path / "out", "--json"]
    run = CliRunner().invoke(app, [*map(str, command), "--fallback", "max_ops=2"])
    assert run.exit_code == 0, run.output
    fallback = json.loads(run.stdout)["activations"]["fallback"]
    assert len(fallback["ops"]) == 2
    assert fallback["min_sqnr"] is None
    assert "fallback:\n  max_ops: 2\n" in inspect(tmp_path / "out").spec
    found = inspect(tmp_path / "out").activations
    assert found is not None
    assert found["fallback"] == fallback
    wrong = CliRunner().invoke(app, [*map(str, command), "--overwrite", "--fallback", "ops=2"])
    assert wrong.exit_code == 1
    assert wrong.stderr.strip() == "fallback: ops: no such key; there are max_ops, min_sqnr"
