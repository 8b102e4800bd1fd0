"""Algorithms as specs ask for them: compositions, scopes, what is refused, and what comes out."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import graphq
from graphq import compiler, pipelines
from graphq.capture.source import source_of
from graphq.data.batches import complete
from graphq.errors import SpecError
from graphq.ir.pipeline import Pipeline
from graphq.runtime.onnx_session import OnnxSession
from graphq.spec.algorithms import ALGORITHMS, problems
from graphq.spec.match import parse_match
from graphq.spec.plan import KeepFloat
from graphq.spec.rules import Algorithm, Rule, Spec
from tests.graphs import run
from tests.models import ConvBnRelu, captured, tiny

TOKENS = [torch.randint(0, 128, (4, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
NAMES = ", ".join(ALGORITHMS)


def spec(*algorithms: Any, weight: str = "int4/channel", input: str | None = None, **others: Any) -> dict[str, Any]:
    rule = {"match": "blocks", "weight": weight} | ({"input": input} if input else {})
    return {"graphq": 1, "rules": [rule], "algorithms": list(algorithms), **others}


@pytest.mark.parametrize(
    ("algorithm", "after"),
    [
        (name, "annotate" if entry.stage == "prepare" else name)
        for name, entry in ALGORITHMS.items()
        if entry.stage not in ("default", "round")  # those change no float that stays
    ],
)
def test_what_folds_change_is_rounded_to_the_stored_dtype_at_once(algorithm: str, after: str) -> None:
    parsed = graphq.load_spec(spec(algorithm))
    names = [step.name for step in pipelines.passes_for(parsed)]
    assert names[names.index(after) + 1] == "round-to-stored"


@pytest.fixture(autouse=True)
def _captures_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = compiler.capture

    def shared(model: Any, *args: Any, **options: Any) -> fx.GraphModule:
        family = getattr(getattr(model, "config", None), "model_type", None)
        if family not in ("llama", "bert"):
            return capture(model, *args, **options)
        gm = captured(family)
        Pipeline(pipelines.canonical_passes()).run(gm)
        return gm

    monkeypatch.setattr(compiler, "capture", shared)


@functools.cache
def source_logits() -> list[Tensor]:
    model = tiny("llama")
    with torch.no_grad():
        return [model(tokens).logits for tokens in TOKENS]


def compiled(*algorithms: Any, calibration: Any = TOKENS, **others: Any) -> graphq.Compiled:
    return graphq.compile(tiny("llama"), spec(*algorithms, **others), calibration=calibration)


def error(made: graphq.Compiled) -> float:
    """The mean squared error of the logits on the calibration data."""
    total = 0.0
    with torch.no_grad():
        for tokens, logits in zip(TOKENS, source_logits(), strict=True):
            inputs = complete(source_of(made.graph), tokens)
            total += float((run(made.graph, *inputs) - logits).square().mean())
    return total


def codes(made: graphq.Compiled) -> dict[str, Tensor]:
    return {name: t for name, t in made.graph.state_dict().items() if t.dtype == torch.int8}


@pytest.fixture
def rounded() -> graphq.Compiled:
    return compiled("rtn", calibration=None)


@pytest.mark.parametrize(
    "algorithms",
    [
        ["equalize"],
        ["smooth-quant"],
        ["awq"],
        ["gptq"],
        ["correct-bias"],
        ["smooth-quant", "gptq"],
        ["awq", "gptq"],
        ["equalize", {"awq": {"power": 4, "n_grid": 4, "clip": False}}],
        [{"awq": {"match": "self_attn"}}, {"gptq": {"match": "mlp"}}],
    ],
    ids=str,
)
def test_each_and_together(algorithms: list[Any], rounded: graphq.Compiled) -> None:
    made = compiled(*algorithms)
    assert set(codes(made)) == set(codes(rounded))
    assert len(codes(made)) == 14
    if algorithms != ["correct-bias"]:  # the sums alone change
        assert any(not torch.equal(q, codes(rounded)[name]) for name, q in codes(made).items())
    assert not any(node.op == "call_module" for node in made.graph.graph.nodes)
    if algorithms != ["smooth-quant"] and algorithms != ["equalize"]:  # which help activations
        assert error(made) < error(rounded)


@pytest.mark.parametrize(
    "algorithm", [{"smooth-quant": {}}, {"awq": {"clip": False}}, {"awq": {"clip": False, "power": 4}}]
)
def test_what_factors_are_folded_into(algorithm: dict[str, Any], rounded: graphq.Compiled) -> None:
    (name, options), plain = next(iter(algorithm.items())), codes(rounded)
    changed = {
        kind: {
            path.split(".")[-2]
            for path, q in codes(compiled({name: {**options, "folds": {"kinds": [kind]}}})).items()
            if not torch.equal(q, plain[path])
        }
        for kind in ("norm-linear", "ov", "up-down", "linear-linear")
    }
    # The rows of v and up are divided, each with its own scale: codes stay, but for roundings.
    assert changed["norm-linear"] == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert changed["ov"] - {"v_proj"} == {"o_proj"}
    assert changed["up-down"] - {"up_proj"} == {"down_proj"}
    assert changed["linear-linear"] == set()


@pytest.mark.parametrize("pipeline", ["sequential", "independent"])
def test_scopes(pipeline: str, rounded: graphq.Compiled) -> None:
    attention, mlp = {"awq": {"match": "self_attn", "clip": False}}, {"gptq": {"match": "mlp"}}
    made = compiled(attention, mlp, pipeline=pipeline)
    alone = compiled(mlp)
    assert error(made) < error(rounded)
    plain, ours, gptq = codes(rounded), codes(made), codes(alone)
    for name in plain:
        if "self_attn" in name:
            assert torch.equal(gptq[name], plain[name])
    assert any(not torch.equal(ours[name], plain[name]) for name in plain if "self_attn" in name)
    assert all(not torch.equal(ours[name], plain[name]) for name in plain if "mlp" in name)


def test_independent_walks_see_what_the_one_before_left() -> None:
    sequential, independent = (compiled("awq", "gptq", pipeline=order) for order in ("sequential", "independent"))
    assert set(codes(sequential)) == set(codes(independent))
    first = [name for name in codes(sequential) if "layers.0" in name]
    last = [name for name in codes(sequential) if "layers.1" in name]
    assert all(torch.equal(codes(sequential)[n], codes(independent)[n]) for n in first)
    assert any(not torch.equal(codes(sequential)[n], codes(independent)[n]) for n in last)


def test_a_float_prefix() -> None:
    quantized, float_ = compiled("gptq"), compiled("gptq", prefix="float")
    same = {name: torch.equal(codes(quantized)[name], codes(float_)[name]) for name in codes(quantized)}
    assert all(value for name, value in same.items() if "layers.0" in name)
    assert not all(value for name, value in same.items() if "layers.1" in name)


def test_static_activations_are_calibrated_behind_the_algorithms() -> None:
    made = compiled("smooth-quant", "gptq", input="int8/tensor")
    assert sum(name.endswith("input_scale") for name in made.graph.state_dict()) == 8
    assert error(made) < error(compiled("rtn", weight="int4/channel", input="int8/tensor"))


def test_rtn_overrides(rounded: graphq.Compiled) -> None:
    made = graphq.compile(tiny("llama"), spec("gptq"), algorithm="rtn")
    assert all(torch.equal(q, codes(rounded)[name]) for name, q in codes(made).items())


def test_batch_norms_are_folded() -> None:
    model, x = ConvBnRelu().eval(), torch.randn(2, 4, 8, 8)
    rules = {"graphq": 1, "rules": [{"match": "conv", "weight": "int8/channel"}], "algorithms": ["fold-batch-norm"]}
    made = graphq.compile(model, rules, inputs=x)
    assert "batch_norm" not in graphq.dump(made.graph)


# -- the report


def test_notes() -> None:
    made = graphq.compile(tiny("bert"), spec("smooth-quant"), calibration=TOKENS)
    kept = [note for note in made.report.notes if "its input's channels keep their scale" in note]
    assert (
        "encoder.layer.0.output.dense: its input's channels keep their scale: nothing that makes it has weights a factor could move to"
        in kept
    )
    assert len(kept) == 10
    assert not any("keep their scale" in note for note in compiled("smooth-quant").report.notes)


def test_errors_of_layers_are_in_the_report() -> None:
    made = compiled("gptq")
    assert sum(layer.sqnr_db is not None for layer in made.report.layers) == 14


# -- what is refused


def refusal(*algorithms: Any, **others: Any) -> list[str]:
    with pytest.raises(SpecError) as caught:
        compiled(*algorithms, **others)
    return list(caught.value.problems)


@pytest.mark.parametrize(
    ("algorithm", "problem"),
    [
        ("gtpq", f"graphq has no algorithm gtpq; there are {NAMES}"),
        ({"gptq": {"blocksize": 128}}, "gptq has no option blocksize; there are block_size, act_order, dampening, scales, min_samples"),
        ({"rtn": {"bits": 4}}, "rtn has no option bits"),
        ({"gptq": {"dampening": 0}}, "gptq: dampening: 0 is not a number above 0, up to 1"),
        ({"gptq": {"block_size": True}}, "gptq: block_size: True is not a whole number from 1"),
        ({"gptq": {"act_order": "group"}}, "gptq: act_order: 'group' is not one of static, none"),
        ({"awq": {"duo": "both"}}, "awq: duo: 'both' is not true, false, or null for both"),
        ({"awq": {"power": 3}}, "awq: power: 3 is not 2 or 4"),
        ({"awq": {"n_grid": 0}}, "awq: n_grid: 0 is not a whole number from 1"),
        ({"smooth-quant": {"alpha": 1.5}}, "smooth-quant: alpha: 1.5 is not a number from 0 to 1, or search"),
        ({"smooth-quant": {"where": "nowhere"}}, "smooth-quant: where: 'nowhere' is not one of fold, fold-or-multiply, multiply"),
        ({"equalize": {"rounds": 2.5}}, "equalize: rounds: 2.5 is not a whole number from 1"),
        ({"correct-bias": {"match": "mlp"}}, "correct-bias is for the whole model; leave out its match"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_names_and_options(algorithm: Any, problem: str) -> None:
    assert refusal(algorithm) == [f"algorithms[0]: {problem}"]


def test_all_problems_at_once() -> None:
    bad = (Algorithm("awq", (("clip", 1), ("grid", 3))), Algorithm("nope"))
    assert problems(Spec((Rule(parse_match("blocks"), KeepFloat("x")),), bad)) == [
        "awq: clip: 1 is not true or false",
        "awq has no option grid; there are n_grid, duo, power, clip, where",
        f"graphq has no algorithm nope; there are {NAMES}",
    ]


def test_a_match_of_nothing() -> None:
    assert refusal({"gptq": {"match": ["mpl", "nothing"]}}, {"awq": {"match": "self_atn"}}) == [
        "algorithms[0]: gptq: mpl matches no layer; did you mean mlp?",
        "algorithms[0]: gptq: nothing matches no layer",
        "algorithms[1]: awq: self_atn matches no layer; did you mean self_attn?",
    ]
    spec = {"graphq": 1, "weight": "int8/channel", "algorithms": [{"awq": {"match": "self_atn"}}]}
    refused = [note for note in graphq.explain(tiny("llama"), spec).notes if note.startswith("compile refuses: ")]
    assert refused == ["compile refuses: algorithms[0]: awq: self_atn matches no layer; did you mean self_attn?"]


def test_calibration() -> None:
    assert refusal("awq", "gptq", calibration=None) == ["calibration: none given, but the spec asks for awq and gptq"]
    assert refusal("gptq", calibration=[]) == ["calibration: no batches; give at least one"]
    many = compiled("gptq", calibration=[TOKENS[0]])
    one = compiled("gptq", calibration=(tokens for tokens in TOKENS[:1]))
    assert all(torch.equal(q, codes(many)[name]) for name, q in codes(one).items())


# -- artifacts


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        compiled("awq", "gptq", input="int8/tensor").save(tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert files(tmp_path / "a")


def test_artifacts_hold_what_was_rounded(tmp_path: Path) -> None:
    made = compiled("smooth-quant", "gptq", weight="int4/g16")
    tokens = TOKENS[0]
    wanted = made(input_ids=tokens)
    assert isinstance(wanted, dict)
    made.emit("torch", tmp_path / "torch")
    loaded = graphq.load(tmp_path / "torch")(input_ids=tokens)
    assert isinstance(loaded, dict)
    assert torch.equal(loaded["logits"], wanted["logits"])
    made.emit("onnx", tmp_path / "onnx")
    session = OnnxSession(tmp_path / "onnx" / "model.onnx", source_of(made.graph))(input_ids=tokens)
    assert isinstance(session, dict)
    torch.testing.assert_close(
        session["logits"], wanted["logits"], rtol=0, atol=1e-3 * float(wanted["logits"].abs().max())
    )
