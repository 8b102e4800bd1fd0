"""compile and explain: the caller's model, copies, determinism, refusals, reports, and what becomes of which layer."""

import copy
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import graphq
from graphq import compiler, numerics
from graphq.capture.source import source_of
from graphq.compiler import Compiled
from graphq.errors import SpecError
from graphq.ir.text import dump
from graphq.spec.algorithms import NEAREST
from graphq.spec.quant import parse_quant
from graphq.state import tensor_of
from tests.models import MLP, Attention, Blocks, ConvBnRelu, MoE, Tied, random_inputs, tiny

ROOT = Path(__file__).parents[1]
TOKENS = torch.arange(6).reshape(2, 3)
W8 = {"graphq": 1, "weight": "int8/channel"}
STATIC = {"graphq": 1, "weight": "int8/channel", "input": "int8/asym/tensor"}
DYNAMIC = {"graphq": 1, "weight": "int8/channel", "input": "int8/token/dynamic"}


def rules(**formats: str) -> dict[str, Any]:
    """A spec with a rule for each layer by name."""
    return {"graphq": 1, "rules": [{"match": name, "weight": weight} for name, weight in formats.items()]}


def seeded(model: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    made = model()
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape)
    return made.eval()


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def output(compiled: Compiled, x: Tensor) -> Tensor:
    y = compiled(x)
    assert isinstance(y, Tensor)
    return y


def rounded(w: Tensor, text: str) -> Tensor:
    """``w[out, in]`` as its codes stand for it."""
    quant = parse_quant(text)
    block = numerics.weight_block(quant.granularity, w.dim(), 0, 1)
    scales = numerics.choose_scale(w, quant.format, block)
    return numerics.dequantize(numerics.quantize(w, scales, quant.format, block), scales, quant.format, block)


# -- the caller's model ------------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "blocks": (Blocks, floats(3, 8)),
    "convolutions": (ConvBnRelu, floats(3, 4, 6, 6)),
    "experts": (MoE, floats(6, 8)),
    "tied": (Tied, TOKENS),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_left_as_it_was(name: str) -> None:
    factory, x = MODELS[name]
    model = seeded(factory).train()
    before = copy.deepcopy(model.state_dict())
    identities = {key: (id(p), p.data_ptr(), p.requires_grad) for key, p in model.named_parameters()}
    compiled = graphq.compile(model, W8, inputs=x)
    assert all(module.training for module in model.modules())
    assert {key: (id(p), p.data_ptr(), p.requires_grad) for key, p in model.named_parameters()} == identities
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        model.eval()
        assert not torch.equal(output(compiled, x), model(x))  # something was quantized


@pytest.mark.parametrize("name", MODELS)
def test_a_compiled_model_does_not_follow_the_source(name: str) -> None:
    factory, x = MODELS[name]
    model = seeded(factory)
    compiled = graphq.compile(model, W8, inputs=x)
    before = output(compiled, x)
    theirs = {t.untyped_storage()._cdata for t in model.state_dict().values()}
    assert not theirs & {t.untyped_storage()._cdata for t in compiled.graph.state_dict().values()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(3)
    assert torch.equal(output(compiled, x), before)
    assert (compiled.graph(x)[0] - before).abs().max() <= 1e-5 * before.abs().max()


def test_tensors_that_are_no_parameters_are_copied_too() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)
            self.shifts = [torch.randn(8)]

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) + self.shifts[0]

    model, x = Plain(), floats(2, 8)
    compiled = graphq.compile(model, W8, inputs=x)
    before = output(compiled, x)
    model.shifts[0].fill_(3)
    assert torch.equal(output(compiled, x), before)


def test_parameters_that_share_one_storage_stay_apart() -> None:
    """As ``torch.nn.utils.vector_to_parameters`` makes them: every parameter is a part of one vector."""
    model = seeded(Attention)
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(vector, model.parameters())
    assert len({p.untyped_storage()._cdata for p in model.parameters()}) == 1
    compiled = graphq.compile(model, rules(q_proj="int8/channel"), inputs=floats(2, 3, 8))
    for name in ("k_proj.weight", "v_proj.weight"):
        assert torch.equal(tensor_of(compiled.graph, name), model.get_parameter(name))


def test_tied_tensors_are_copied_once() -> None:
    model = nn.Sequential(seeded(Tied), nn.Linear(16, 4))
    graph = graphq.compile(
        model, {"graphq": 1, "rules": [{"match": "=1", "weight": "int8/channel"}]}, inputs=TOKENS
    ).graph
    embedding, head = (tensor_of(graph, f"0.{name}.weight").untyped_storage()._cdata for name in ("embedding", "head"))
    assert embedding == head != model[0].get_parameter("embedding.weight").untyped_storage()._cdata


@pytest.mark.parametrize("name", MODELS)
def test_consume_takes_the_tensors(name: str) -> None:
    factory, x = MODELS[name]
    kept = graphq.compile(seeded(factory), W8, inputs=x)
    model = seeded(factory)
    consumed = graphq.compile(model, W8, inputs=x, consume=True)
    assert all(p.numel() == 0 for p in model.parameters())  # its memory is free, or the compiled model's
    assert torch.equal(output(consumed, x), output(kept, x))
    assert dump(consumed.graph) == dump(kept.graph)
    for key, tensor in kept.graph.state_dict().items():
        assert torch.equal(consumed.graph.state_dict()[key], tensor)


# -- determinism -------------------------------------------------------------------------------------------------------

SCRIPT = """
import hashlib, json, sys
from pathlib import Path
import torch
import graphq
from tests.models import Attention, MLP, MoE, tiny

torch.set_num_threads(1)
if sys.argv[2] == "small":
    torch.manual_seed(1)
    experts = MoE()
    for p in experts.parameters():
        p.data = torch.randn(p.shape)
    model = torch.nn.Sequential(MLP(), experts, MLP())
    inputs, options = torch.randn(4, 8), {"inputs": torch.randn(4, 8)}
    spec = {"graphq": 1, "rules": [
        {"match": "0", "weight": "int8/channel", "input": "int8/asym/tensor"},
        {"match": "experts", "weight": "int4/asym/g4"},
        {"match": "experts.1", "weight": "int3/g4", "input": "int8/token/dynamic"},
        {"match": "2.up", "weight": "int4/channel", "input": "int6/token/dynamic"},
    ]}
else:
    model = tiny("mixtral")
    inputs, options = torch.arange(12).reshape(2, 6), {}
    spec = {"graphq": 1, "rules": [
        {"match": "blocks", "weight": "int8/channel", "input": "int8/asym/tensor"},
        {"match": "experts#0", "weight": "int4/asym/g32"},
        {"match": "experts.1#1", "weight": "int3/g32", "input": "int8/token/dynamic"},
        {"match": "lm_head", "weight": "int8/channel"},
    ]}
compiled = graphq.compile(model, spec, calibration=[inputs], seed=int(sys.argv[3]), **options)
found = {}
for target in ("torch", "onnx"):
    compiled.emit(target, Path(sys.argv[1]) / target)
    for file in sorted((Path(sys.argv[1]) / target).iterdir()):
        found[f"{target}/{file.name}"] = hashlib.sha256(file.read_bytes()).hexdigest()
print(json.dumps(found))
"""


def artifacts_of_processes(tmp_path: Path, model: str) -> list[dict[str, str]]:
    """The digests of all files of an artifact, made by two fresh processes with other hashes of strings."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / number), model, "7"],
            env={**os.environ, "PYTHONHASHSEED": number, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in ("1", "2")
    ]
    results: list[dict[str, str]] = []
    for process in started:
        out, err = process.communicate(timeout=900)
        assert process.returncode == 0, err
        results.append(json.loads(out))
    return results


@pytest.mark.parametrize("model", ["small", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, model: str) -> None:
    first, second = artifacts_of_processes(tmp_path, model)
    assert {"torch/graph.json", "torch/model.safetensors", "torch/graphq.json", "onnx/model.onnx"} <= set(first)
    assert first == second


def test_the_callers_random_numbers_are_left_alone() -> None:
    model = seeded(MLP)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    graphq.compile(model, W8, inputs=floats(2, 8))
    assert torch.equal(torch.rand(3), expected)


# -- the QDQ form ------------------------------------------------------------------------------------------------------


def digest(gm: fx.GraphModule) -> str:
    made = hashlib.sha256(dump(gm).encode())
    for name, tensor in sorted(gm.state_dict().items()):
        made.update(name.encode() + tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return made.hexdigest()


@pytest.mark.parametrize(
    "spec", [STATIC, DYNAMIC, {"graphq": 1, "weight": "int4/asym/g4"}], ids=["static", "dynamic", "g4"]
)
@pytest.mark.parametrize("name", ["blocks", "experts"])
def test_the_qdq_form_is_copied_and_exported_again(name: str, spec: Mapping[str, Any]) -> None:
    factory, x = MODELS[name]
    compiled = graphq.compile(seeded(factory), spec, inputs=x, calibration=[x, x + 1])
    gm = compiled.graph
    expected, before = gm(x)[0], digest(gm)
    copied = copy.deepcopy(gm)
    assert torch.equal(copied(x)[0], expected)
    assert digest(copied) == before
    assert source_of(copied) == source_of(gm)
    batch = torch.export.Dim("batch", min=1, max=1 << 20)
    again = torch.export.export(gm, (x,), dynamic_shapes=({0: batch},), strict=False).module()
    for value in (x, x[:1], torch.cat([x, x])):
        assert torch.equal(again(value)[0], gm(value)[0])
    with torch.no_grad():
        for tensor in copied.state_dict().values():
            tensor.zero_()
    assert digest(gm) == before


def test_no_float_copy_of_a_quantized_weight_is_left() -> None:
    gm = graphq.compile(seeded(Blocks), W8, inputs=floats(2, 8)).graph
    state = gm.state_dict()
    for fqn in ("blocks.0.up", "blocks.1.down"):
        assert state[f"{fqn}.weight"].dtype == torch.int8
        assert state[f"{fqn}.weight_scale"].dtype == torch.float32
    assert state["head.weight"].dtype == torch.float32  # outside of the blocks
    assert {key for key in state if key.endswith("weight")} == {
        *(f"blocks.{i}.{role}.weight" for i in (0, 1) for role in ("up", "down")),
        "head.weight",
    }


# -- refusals ----------------------------------------------------------------------------------------------------------


def refusal(model: Any, spec: Any, **options: Any) -> str:
    with pytest.raises(SpecError) as caught:
        graphq.compile(model, spec, **options)
    return str(caught.value)


def test_algorithms_that_graphq_lacks_are_refused_by_name() -> None:
    spec = {**W8, "algorithms": ["spqr", "awq", "quik"]}
    text = refusal(MLP(), spec, inputs=floats(2, 8))
    assert text.splitlines() == [
        f"algorithms[{i}]: graphq has no algorithm {name}; {NEAREST[name]}" for i, name in ((0, "spqr"), (2, "quik"))
    ]
    assert graphq.compile(MLP(), spec, inputs=floats(2, 8), algorithm="rtn").report.layers[0].weight is not None
    assert graphq.compile(MLP(), {**W8, "algorithms": ["rtn"]}, inputs=floats(2, 8)).report.layers
    assert (
        refusal(MLP(), W8, inputs=floats(2, 8), algorithm="awq")
        == "algorithm: 'awq' is not rtn; other algorithms stand in the spec"
    )


def test_a_cache_that_the_model_does_not_have_is_refused() -> None:
    spec = {**W8, "cache": "int8/token/dynamic"}
    assert (
        refusal(MLP(), spec, inputs=floats(2, 8))
        == "cache: int8/token/dynamic: this model has no key/value cache; leave it out of the spec"
    )


def test_static_scales_need_calibration() -> None:
    assert refusal(seeded(Blocks), STATIC, inputs=floats(2, 8)) == (
        "calibration: none given, but blocks.0.up, blocks.0.down, blocks.1.up and 1 more ask for static activation scales"
    )
    assert refusal(seeded(MLP), STATIC, inputs=floats(2, 8)) == (
        "calibration: none given, but up, down ask for static activation scales"
    )
    assert refusal(seeded(MLP), STATIC, inputs=floats(2, 8), calibration=[]) == (
        "calibration: no batches; static scales need at least one"
    )


def test_nothing_is_changed_by_a_refusal() -> None:
    model = seeded(MLP)
    before = copy.deepcopy(model.state_dict())
    refusal(model, rules(upp="int8/channel"), inputs=floats(2, 8))
    refusal(model, STATIC, inputs=floats(2, 8), calibration=[floats(2, 9)])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# -- dtype -------------------------------------------------------------------------------------------------------------


def test_a_model_is_compiled_in_its_own_dtype_or_the_one_asked_for() -> None:
    model = seeded(MLP).to(torch.bfloat16)
    x = floats(3, 8)
    own = graphq.compile(model, W8, inputs=x.to(torch.bfloat16))
    assert output(own, x.to(torch.bfloat16)).dtype == torch.bfloat16
    assert own.graph.state_dict()["up.weight_scale"].dtype == torch.float32
    wide = graphq.compile(model, W8, inputs=x, dtype=torch.float32)
    assert output(wide, x).dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (output(own, x.to(torch.bfloat16)).float() - output(wide, x)).abs().max() < 2**-5 * output(
        wide, x
    ).abs().max()  # 8 bits a number


# -- the report --------------------------------------------------------------------------------------------------------


def test_report() -> None:
    spec = {
        "graphq": 1,
        "rules": [
            {"match": "blocks", "weight": "int8/channel"},
            {"match": "down#1", "weight": "int4/asym/g4", "input": "int8/token/dynamic"},
            {"match": "up#1", "float": "sensitive"},
            {"match": "*.absent", "float": True},
        ],
    }
    report = graphq.compile(seeded(Blocks), spec, inputs=floats(2, 8)).report
    rows = {
        r.layer.fqn: (str(r.weight), str(r.input), r.rule, r.reason, r.nbytes, r.float_nbytes) for r in report.layers
    }
    assert rows == {
        "blocks.0.up": ("int8/channel", "None", "blocks", "", 12 * 8 + 4 * 12, 12 * 8 * 4),
        "blocks.0.down": ("int8/channel", "None", "blocks", "", 12 * 8 + 4 * 8, 12 * 8 * 4),
        "blocks.1.up": ("None", "None", "up#1", "sensitive", 12 * 8 * 4, 12 * 8 * 4),
        "blocks.1.down": ("int4/asym/g4", "int8/token/dynamic", "down#1", "", 8 * 6 + 5 * 24, 12 * 8 * 4),
        "head": (
            "None",
            "None",
            "",
            "outside of the repeated blocks: quantized only when a rule names it",
            4 * 8 * 4,
            4 * 8 * 4,
        ),
    }
    assert [note.rpartition(": ")[2] for note in report.notes] == ["*.absent matches no layer"]
    measured = {r.layer.fqn: r.sqnr_db for r in report.layers if r.sqnr_db is not None}
    w = seeded(Blocks).get_parameter("blocks.0.up.weight").detach()
    assert set(measured) == {"blocks.0.up", "blocks.0.down", "blocks.1.down"}
    assert measured["blocks.0.up"] == pytest.approx(numerics.sqnr_db(w, rounded(w, "int8/channel")))
    assert measured["blocks.1.down"] < 30 < measured["blocks.0.up"]  # about 6 dB a bit


def test_explain_says_what_compile_does() -> None:
    model, x = seeded(Blocks), floats(2, 8)
    spec = {**W8, "algorithms": ["awq"]}
    explained = graphq.explain(model, spec, inputs=x)
    compiled = graphq.compile(model, spec, inputs=x, algorithm="rtn").report
    assert [{**row, "sqnr_db": None} for row in compiled.rows()] == explained.rows()
    assert "algorithms[0]: algorithm awq" in explained.notes


# -- which layer becomes what ------------------------------------------------------------------------------------------


def test_a_tied_head_is_quantized_and_the_embedding_stays_float() -> None:
    model, x = seeded(Tied), TOKENS
    compiled = graphq.compile(model, rules(head="int8/channel"), inputs=x)
    w = model.get_parameter("embedding.weight").detach()
    assert torch.equal(tensor_of(compiled.graph, "embedding.weight"), w)
    assert tensor_of(compiled.graph, "head.weight").dtype == torch.int8
    expected = F.linear(F.silu(F.embedding(x, w)), rounded(w, "int8/channel"))
    assert torch.equal(compiled.graph(x)[0], expected)
    assert {r.layer.fqn: str(r.weight) for r in compiled.report.layers} == {"embedding": "None", "head": "int8/channel"}


def test_an_embedding_is_quantized_when_it_is_named() -> None:
    model, x = seeded(Tied), TOKENS
    compiled = graphq.compile(model, rules(embedding="int4/asym/g4"), inputs=x)
    w = model.get_parameter("embedding.weight").detach()
    assert tensor_of(compiled.graph, "embedding.weight").dtype == torch.int8
    expected = F.linear(F.silu(F.embedding(x, rounded(w, "int4/asym/g4"))), w)
    assert torch.equal(compiled.graph(x)[0], expected)


def test_experts_with_different_plans() -> None:
    model, x = seeded(MoE), floats(40, 8)
    spec = {
        "graphq": 1,
        "rules": [
            {"match": "experts", "weight": "int4/asym/g4"},
            {"match": "experts.2", "weight": "int8/channel"},
            {"match": "experts.3.down_proj", "float": True},
        ],
    }
    compiled = graphq.compile(model, spec, inputs=x)
    formats = {r.layer.fqn: str(r.weight) for r in compiled.report.layers}
    assert formats == {
        "router": "None",
        **{f"experts.{e}.{r}": "int4/asym/g4" for e in (0, 1, 3) for r in ("gate_proj", "up_proj", "down_proj")},
        **{f"experts.2.{r}": "int8/channel" for r in ("gate_proj", "up_proj", "down_proj")},
        "experts.3.down_proj": "None",
    }
    expert = F.linear(x, model.get_parameter("router.weight")).argmax(-1)
    assert set(expert.tolist()) == {0, 1, 2, 3}
    for row, e in enumerate(expert.tolist()):
        first = "int8/channel" if e == 2 else "int4/asym/g4"
        gate, up = (rounded(w, first) for w in model.get_parameter("experts.gate_up_proj")[e].detach().chunk(2))
        down = model.get_parameter("experts.down_proj")[e].detach()
        down = down if e == 3 else rounded(down, first)
        expected = F.linear(F.silu(F.linear(x[row], gate)) * F.linear(x[row], up), down)
        # A single row is summed in another order than several.
        assert (compiled.graph(x)[0][row] - expected).abs().max() <= 1e-5 * expected.abs().max(), e


# -- LLMC's own examples of mixed bits on a model of 32 blocks ---------------------------------------------------------


@pytest.fixture(scope="module")
def captured32() -> fx.GraphModule:
    return compiler.capture(tiny("llama", num_hidden_layers=32, hidden_size=64, intermediate_size=96))


DOWN, W4G, W8G = "down_proj", "int4/asym/g128 x float", "int8/asym/g128 x float"
W4A4 = "int4/asym/channel x int4/asym/token/dynamic"
W6A6 = "int6/asym/channel x int6/asym/token/dynamic"
W8A8 = "int8/asym/channel x int8/asym/token/dynamic"
# Layers by plan, the plans that are not the common one by role and blocks, and the number of quantized activations.
LLMC: dict[str, tuple[dict[str, int], dict[tuple[str, tuple[int, ...]], str], int]] = {
    "mix_bits_1_down_proj": ({W8G: 32, W4G: 192}, {(DOWN, tuple(range(32))): W8G}, 0),
    "mix_bits_2_blocks": (
        {W8G: 8, "float": 32, W4G: 184},
        {(DOWN, (0, 1, 2, 3, 28, 29, 30, 31)): W8G, ("o_proj", tuple(range(32))): "float"},
        0,
    ),
    "mix_bits_3_w4a4_w8a8": ({W8A8: 32, W4A4: 192}, {(DOWN, tuple(range(32))): W8A8}, 4 * 32),
    "mix_bits_4_everything": (
        {W8A8: 4, "float": 6, W6A6: 1, "int4/asym/channel x float": 2, W4A4: 211},
        {
            (DOWN, (0, 1, 8, 15)): W8A8,
            (DOWN, (2, 4, 6, 11)): "float",
            (DOWN, (27,)): W6A6,
            (DOWN, (13, 21)): "int4/asym/channel x float",
            ("o_proj", (2, 7)): "float",
        },
        4 * 32 - 4 - 2 - 2,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LLMC)
def test_llmc_mixed_bits(name: str, captured32: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(*_: object, **__: object) -> fx.GraphModule:  # which is tested elsewhere, and takes its time
        return copy.deepcopy(captured32)

    for module in ("compiler", "explanation"):
        monkeypatch.setattr(f"graphq.{module}._captured", capture)
    config = ROOT / "examples" / "configs" / "llmc" / f"{name}.yaml"
    counts, special, quantized = LLMC[name]
    explained = graphq.explain("a model", config)
    plans = {
        r.layer.fqn: "float" if r.weight is None else r.plan for r in explained.layers if r.layer.block is not None
    }
    assert Counter(plans.values()) == counts
    assert len(plans) == 32 * 7
    common = max(counts, key=lambda plan: counts[plan])
    for fqn, plan in plans.items():
        role, block = fqn.rpartition(".")[2], int(fqn.split(".")[2])
        assert plan == next((p for (r, blocks), p in special.items() if r == role and block in blocks), common), fqn
    outside = [r.layer.fqn for r in explained.layers if r.layer.block is None]
    assert outside == ["model.embed_tokens", "lm_head"]

    assert refusal("a model", config) == "calibration: none given, but the spec asks for awq"
    compiled = graphq.compile("a model", config, algorithm="rtn")
    compiled_plans = {r.layer.fqn: r.plan for r in compiled.report.layers}
    assert compiled_plans == {r.layer.fqn: r.plan for r in explained.layers}
    state = compiled.graph.state_dict()
    for fqn, plan in plans.items():
        assert state[f"{fqn}.weight"].dtype == (torch.float32 if plan == "float" else torch.int8)
    targets = Counter(str(n.target) for n in compiled.graph.graph.nodes)
    assert targets["graphq.quantize.default"] == quantized  # q, k and v share one, and so do gate and up
    logits = compiled.graph(*random_inputs(compiled.graph, 1, 3))[0]
    assert logits.shape == (1, 3, 128)
    assert torch.isfinite(logits).all()


def test_a_causal_language_model_from_its_directory(tmp_path: Path) -> None:
    """The whole way: a bfloat16 checkpoint, explained without weights, compiled in float32, called."""
    tiny("llama", num_hidden_layers=1).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    (tmp_path / "spec.yaml").write_text("graphq: 1\nweight: int4/asym/g32\n")
    explained = graphq.explain(tmp_path / "model", tmp_path / "spec.yaml")
    compiled = graphq.compile(tmp_path / "model", tmp_path / "spec.yaml")
    assert isinstance(compiled, Compiled)
    assert [{**row, "sqnr_db": None} for row in compiled.report.rows()] == explained.rows()
    q_proj = next(r for r in compiled.report.layers if r.layer.fqn == "model.layers.0.self_attn.q_proj")
    assert q_proj.float_nbytes == 64 * 64 * 2  # of the source, which is bfloat16
    assert source_of(compiled.graph).dtype == torch.bfloat16
    outputs: Any = compiled(torch.arange(5).reshape(1, 5))
    assert outputs["logits"].dtype == torch.float32


def test_compare_two_specs():
    before = {"graphq": 1, "weight": "int4/g8"}
    after = before | {"rules": [{"match": "q_proj", "weight": "int8/channel"}], "cache": "int8/token/dynamic"}
    found = graphq.compare(Attention(), before, after, inputs=torch.ones(2, 8))
    assert [(a.layer.fqn, str(a.weight), str(b.weight)) for a, b in found.layers] == [
        ("q_proj", "int4/g8", "int8/channel")
    ]
    assert found.settings == (("cache", "float", "int8/token/dynamic"),)
    assert found.same == 2
