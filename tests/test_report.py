"""The report: one object and one row a layer, with sizes worked out by hand."""

import dataclasses
import json
from typing import Any

import pytest
import torch

import graphq
from graphq.phases import Phase, PhaseTimer, peak_nbytes
from graphq.report import (
    ActivationsReport,
    FallbackReport,
    OpReport,
    Report,
    difference,
    make_report,
    quant_json,
    spec_settings,
    stored_nbytes,
)
from graphq.spec.match import Exact, Layer, Name, Unnamed
from graphq.spec.plan import KeepFloat, Plan
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Algorithm, Resolved, Rule, Run, Spec, resolve

UP = Layer("blocks.0.up", "linear", (12, 8), block=0)
CONV = Layer("conv", "conv2d", (8, 4, 3, 3))
HEAD = Layer("head", "linear", (4, 8), named_only="output head")
RULE = Rule(Name("up"), Plan(parse_quant("int4/asym/g4"), parse_quant("int8/token/dynamic")), "rules[0] (line 3)")
KEPT = Rule(Exact("conv"), KeepFloat("too small"))


def report() -> Report:
    resolved = {
        "blocks.0.up": Resolved(UP, RULE.decision, RULE),
        "conv": Resolved(CONV, KEPT.decision, KEPT),
        "head": Resolved(HEAD, KeepFloat("output head: quantized only when a rule names it"), None),
    }
    return make_report(resolved, ["a note", "another"], 16, {"blocks.0.up": 21.26}, {"dialect": "llmc"})


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("int4/asym/g128", ("int4", False, "group", 128, False, None, None, "minmax")),
        ("int8/half/channel", ("int8", True, "channel", None, False, "half", None, "minmax")),
        ("int8/token/dynamic", ("int8", True, "token", None, True, "max", None, "minmax")),
        ("int16/asym/tensor/entropy", ("int16", False, "tensor", None, False, None, None, "entropy")),
        ("uint8/tensor", ("uint8", False, "tensor", None, False, None, None, "minmax")),
        ("float8_e4m3fn/128x64", ("float8_e4m3fn", True, "block", None, False, None, [128, 64], "minmax")),
        ("mxfp4/even", ("mxfp4/even", True, "group", 32, False, None, None, "minmax")),
    ],
)
def test_a_format_as_json(text, found):
    keys = ("format", "symmetric", "granularity", "group_size", "dynamic", "divisor", "block", "method")
    assert quant_json(parse_quant(text)) == {**dict(zip(keys, found, strict=True)), "text": text}


def test_float_is_null():
    assert quant_json(None) is None


@pytest.mark.parametrize(
    ("layer", "quant", "nbytes"),
    [
        (UP, "int8/tensor", 12 * 8 + 4),
        (UP, "int8/channel", 12 * 8 + 4 * 12),
        (UP, "int4/asym/g4", 12 * 4 + 4 * 24 + 24),  # two groups a row, a zero point of a byte for each
        (UP, "int3/g5", 12 * 3 + 4 * 24),  # the second group is short; 24 bits a row
        (CONV, "int3/channel", 8 * 14 + 4 * 8),  # 36 codes of 3 bits: 108 bits in 14 bytes
        (CONV, "int8/g3", 8 * 36 + 4 * 8 * 2),  # 4 input channels in 2 groups
        (UP, "float8_e4m3fn/5x3", 12 * 8 + 4 * 3 * 3),
        (UP, "mxfp4", 12 * 4 + 12),  # a byte of scale for each row's one block
        (UP, "nvfp4", 12 * 4 + 12 + 4),
        (UP, "int4/over_int8/g4", 12 * 4 + 4 * 24 + 4 * 12),
    ],
)
def test_bytes_of_a_stored_weight(layer, quant, nbytes):
    assert stored_nbytes(layer, parse_quant(quant)) == nbytes


def test_json():
    first, second, third = json.loads(json.dumps(report().to_json()))["layers"]
    assert first == {
        "layer": "blocks.0.up",
        "weight": quant_json(parse_quant("int4/asym/g4")),
        "input": quant_json(parse_quant("int8/token/dynamic")),
        "rule": "up",
        "source": "rules[0] (line 3)",
        "line": 3,
        "dialect": "llmc",
        "reason": "",
        "kind": "linear",
        "shape": [12, 8],
        "bytes": 168,
        "float_bytes": 192,
        "sqnr_db": 21.26,
    }
    expected: list[tuple[dict[str, Any], tuple[Any, ...]]] = [
        (second, (None, None, "=conv", "", "too small", 576, 576, None)),
        (third, (None, None, "", "", "output head: quantized only when a rule names it", 64, 64, None)),
    ]
    keys = ("weight", "input", "rule", "source", "reason", "bytes", "float_bytes", "sqnr_db")
    for found, values in expected:
        assert {key: found[key] for key in keys} == dict(zip(keys, values, strict=True))


def test_parameters_that_are_no_layers():
    """They have rows of their own behind the layers', and are none of the layers that specs are compared by."""
    other = Unnamed(Layer("blocks.0.q", "linear", (2, 8, 4), block=0), "multiplied by aten.bmm; no rule can name it")
    found = make_report({"conv": Resolved(CONV, KEPT.decision, KEPT)}, [], 16, unnamed=[other])
    assert [one.layer.fqn for one in found.layers] == ["conv"]
    first, second = found.rows()
    assert (first["kind"], second["kind"]) == ("conv2d", "parameter")
    assert second == first | {
        "layer": "blocks.0.q",
        "rule": "",
        "reason": "multiplied by aten.bmm; no rule can name it",
        "kind": "parameter",
        "shape": [2, 8, 4],
        "bytes": 128,
        "float_bytes": 128,
    }
    assert str(found).splitlines()[2:] == [
        "blocks.0.q  float   float           128    multiplied by aten.bmm; no rule can name it"
    ]
    assert difference(found, found).same == 1


def test_what_runs_between_layers():
    """Each op with its types, or with a reason; ratios that are infinite are null."""
    ops = (OpReport("fc", "Linear", "uint8 x int8/channel -> uint8"), OpReport("Softmax", "Softmax", "", "a reason"))
    fallback = FallbackReport((("fc", "uint16"),), 20.0, float("inf"), 50.5, 2, ((0, 20.0), (1, float("inf"))), 60)
    found = make_report({}, [], 16, activations=ActivationsReport("qnn-htp", ops, {"uint8/tensor": 3}, fallback))
    data = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert data == {
        "layers": [],
        "activations": {
            "profile": "qnn-htp",
            "ops": [
                {"op": "fc", "kind": "Linear", "types": "uint8 x int8/channel -> uint8", "reason": ""},
                {"op": "Softmax", "kind": "Softmax", "types": None, "reason": "a reason"},
            ],
            "tensors": {"uint8/tensor": 3},
            "fallback": {
                "ops": [{"op": "fc", "type": "uint16"}],
                "sqnr_db": {"before": 20.0, "after": None, "weights": 50.5},
                "batches": 2,
                "tried": [{"ops": 0, "sqnr_db": 20.0}, {"ops": 1, "sqnr_db": None}],
                "min_sqnr": 60,
                "met": True,
            },
        },
    }
    assert not dataclasses.replace(fallback, after=59.9).is_met
    assert dataclasses.replace(fallback, after=0.0, floor=None).is_met
    assert ActivationsReport("ort-cpu", (), {}).to_json()["fallback"] is None


def test_difference():
    layers = {fqn: Layer(fqn, "linear", (8, 8)) for fqn in ("a.up", "a.down", "a.out")}

    def planned(spec: Spec) -> Report:
        resolved, notes = resolve(spec, layers)
        return make_report(resolved, notes, 16, settings=spec_settings(spec))

    plan = Plan(parse_quant("int4/g8"))
    before = Spec((Rule(Name("a"), plan, "first (line 2)"),), cache=parse_quant("int8/token/dynamic"))
    after = Spec(
        (Rule(Name("a"), plan, "x"), Rule(Name("down"), KeepFloat("why"), "y (line 4)")),
        (Algorithm("awq", (("n_grid", 5), ("duo", True)), match=(Name("up"), Name("out"))), Algorithm("gptq")),
        run=Run(samples=4),
        dialect="llmc",
    )
    found = difference(planned(before), planned(after))
    assert str(found) == (
        "dialect: native -> llmc\n"
        "algorithms: rtn -> awq(n_grid=5, duo=True) for up or out, gptq\n"
        "cache: int8/token/dynamic -> float\n"
        "samples: none -> 4\n"
        "layer   before               after        rule before         rule after\n"
        "a.down  int4/g8 x float  ->  float (why)  first (line 2) (a)  y (line 4) (down)\n"
        "1 layers differ, 2 are planned alike"
    )
    data = json.loads(json.dumps(found.to_json()))
    assert [(row["layer"], row["before"]["line"], row["after"]["line"]) for row in data["layers"]] == [("a.down", 2, 4)]
    assert data["settings"][-1] == {"name": "samples", "before": "none", "after": "4"}
    assert data["same"] == 2
    assert str(difference(planned(before), planned(before))) == "0 layers differ, 3 are planned alike"


def test_text():
    assert [line.split("  ") for line in str(report()).splitlines()[-2:]] == [["note: a note"], ["note: another"]]
    assert "\n".join(line.rstrip() for line in str(report()).splitlines()[:-2]) == (
        "layer        weight        input               rule                    bytes  SQNR dB  why float\n"
        "blocks.0.up  int4/asym/g4  int8/token/dynamic  rules[0] (line 3) (up)  168    21.3\n"
        "conv         float         float               (=conv)                 576             too small\n"
        "head         float         float                                       64"
        "              output head: quantized only when a rule names it"
    )


def test_a_column_without_content_is_left_out():
    rule = Rule(Name("up"), Plan(parse_quant("int8/channel")))
    alone = make_report({"blocks.0.up": Resolved(UP, rule.decision, rule)}, [], 32)
    assert alone.table() == [
        ("layer", "weight", "input", "rule", "bytes"),
        ("blocks.0.up", "int8/channel", "float", "(up)", "144"),
    ]
    assert str(make_report({}, ["nothing"], 32)) == "\nnote: nothing"


def test_the_plan_in_words():
    first, second, _ = report().layers
    assert first.plan == "int4/asym/g4 x int8/token/dynamic"
    assert second.plan == "float (too small)"


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_json_without_infinite_numbers(target, tmp_path):
    """A weight that its codes represent exactly has no noise, which JSON has no number for."""
    first, second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    model = torch.nn.Sequential(first, second)
    with torch.no_grad():
        first.weight.zero_()
        second.weight.copy_(torch.eye(8) * 127)
    spec = {"graphq": 1, "rules": [{"match": "*", "weight": "int8/channel"}]}
    made = graphq.compile(model, spec, inputs=torch.ones(2, 8))
    assert [row["sqnr_db"] for row in made.report.rows()] == [None, None]
    made.emit(target, tmp_path / "a")

    def refuse(word):
        raise AssertionError(word)

    for file in (tmp_path / "a").glob("*.json"):
        json.loads(file.read_text(), parse_constant=refuse)


def test_infinite_numbers_of_a_configuration_are_written_as_transformers_does(tmp_path):
    """Mamba's ``time_step_limit`` is (0, inf)."""
    from transformers import LlamaConfig

    from tests.models import tiny

    model = tiny("llama", num_hidden_layers=1)
    model.config.limit = [0.0, float("inf")]
    made = graphq.compile(model, {"graphq": 1, "weight": "int8/channel"})
    made.save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["limit"] == [0.0, {"__float__": "Infinity"}]
    assert LlamaConfig.from_pretrained(tmp_path / "a").limit == [0.0, float("inf")]  # type: ignore[attr-defined]
    assert made.generate(torch.ones(1, 2, dtype=torch.int64), max_new_tokens=1).shape == (1, 3)


# -- what a compile took


def test_phases_of_one_name_are_one(monkeypatch):
    clock = iter([10.0, 11.0, 13.5, 14.0, 20.0])
    monkeypatch.setattr("graphq.phases.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("graphq.phases.peak_nbytes", lambda: 3_000_000_000)
    timer = PhaseTimer()
    for name in ("capture", "round", "capture", "round"):
        timer.end(name)
    assert timer.phases == (Phase("capture", 1.5, 3_000_000_000), Phase("round", 8.5, 3_000_000_000))


def test_phases_as_text_and_data():
    phases = (Phase("capture", 1.5, 2_345_000_000), Phase("nothing", 0.01, None), Phase("round", 8.49, None))
    found = dataclasses.replace(report(), phases=phases)
    assert found.phase_lines() == [
        "in all   10.0 s  2.35 GB at most",
        "capture  1.5 s   2.35 GB at most",
        "round    8.5 s",
    ]
    assert phases[0].to_json() == {"phase": "capture", "seconds": 1.5, "peak_bytes": 2_345_000_000}
    assert json.loads(json.dumps(phases[2].to_json()))["peak_bytes"] is None


def test_phases_are_no_part_of_what_is_compared_or_written():
    plain, timed = report(), dataclasses.replace(report(), phases=(Phase("capture", 1.5, None),))
    assert plain == timed
    assert plain.to_json() == timed.to_json()
    assert str(plain) == str(timed)
    assert plain.phase_lines() == ["in all  0.0 s"]


def test_the_peak_is_that_of_the_process():
    before = peak_nbytes()
    assert before is not None
    held = torch.ones(1 << 28, dtype=torch.uint8).add_(1)
    after = peak_nbytes()
    assert after is not None
    assert held.numel() // 2 <= after < 1 << 38
    assert after >= before


def test_a_compile_tells_its_phases():
    made = graphq.compile(torch.nn.Linear(8, 8), {"graphq": 1, "weight": "int8/channel"}, inputs=torch.ones(2, 8))
    names = [phase.name for phase in made.report.phases]
    assert names[:2] == ["capture", "plan"]
    assert {"annotate", "quantize-weights"} < set(names)
    assert names[-1] == "finish"
