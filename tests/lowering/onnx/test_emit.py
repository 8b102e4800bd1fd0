"""The ONNX artifact: its opset, the types and names of what it holds, its caches, its files, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

import graphq
from graphq.capture.source import source_of
from graphq.compiler import Compiled
from graphq.errors import TargetError
from graphq.lowering.onnx import emit as target
from graphq.runtime.onnx_session import OnnxSession
from graphq.state import tensor_of
from tests.compiled import blocks_spec, compile_captured
from tests.models import FAMILIES, MLP, ConvBnRelu, Tied, random_inputs, tiny

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def compiled(model: nn.Module, x: Tensor = X, **spec: Any) -> Compiled:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape).to(parameter.dtype)
    return graphq.compile(model.eval(), {"graphq": 1, **spec}, inputs=x, calibration=[x])


def emitted(made: Compiled, path: Path, **options: Any) -> onnx.ModelProto:
    """The model that was written, checked once more."""
    made.emit("onnx", path, **options)
    onnx.checker.check_model(str(path / "model.onnx"), full_check=True)
    return onnx.load(path / "model.onnx")


def opset(model: onnx.ModelProto) -> int:
    assert [o.domain for o in model.opset_import] == [""]
    assert all(node.domain == "" for node in model.graph.node)
    assert not model.functions
    return model.opset_import[0].version


def initializers(model: onnx.ModelProto) -> dict[str, tuple[str, list[int]]]:
    kind = onnx.TensorProto.DataType.Name
    return {i.name: (kind(i.data_type), list(i.dims)) for i in model.graph.initializer}


def values(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(i for i in model.graph.initializer if i.name == name))


def nodes(model: onnx.ModelProto, op_type: str) -> list[tuple[list[str], dict[str, int]]]:
    found = [node for node in model.graph.node if node.op_type == op_type]
    return [(list(node.input), {a.name: a.i for a in node.attribute}) for node in found]


# -- opsets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "input", "expected"),
    [
        ("float8_e4m3fn/channel", None, 19),
        ("int8/channel", None, 13),
        ("int8/asym/tensor", None, 13),
        ("int6/channel", None, 13),
        ("int8/channel", "int8/asym/tensor", 13),
        ("int8/channel", "int8/tensor", 13),
        ("int8/channel", "int8/token/dynamic", 13),
        ("int5/asym/channel", "int6/asym/token/dynamic", 13),
        ("int4/channel", None, 21),
        ("int3/asym/tensor", None, 21),
        ("int4/asym/g4", None, 21),
        ("int8/g4", None, 21),  # blocks
        ("int2/channel", None, 25),
        ("int8/channel", "int16/tensor", 21),
    ],
)
def test_the_lowest_opset_that_holds_the_types(weight: str, input: str | None, expected: int, tmp_path: Path) -> None:
    formats = {"weight": weight} | ({"input": input} if input else {})
    made = compiled(MLP(), X, **formats)
    assert opset(emitted(made, tmp_path / "a")) == expected


@pytest.mark.parametrize(("wanted", "given"), [(17, 17), (21, 21), (25, 25), (26, 26), (13, 13)])
def test_a_higher_opset_can_be_asked_for(wanted: int, given: int, tmp_path: Path) -> None:
    made = compiled(MLP(), weight="int8/channel")
    assert opset(emitted(made, tmp_path / "a", opset=wanted)) == given


@pytest.mark.parametrize("wanted", [99, 29, 12, 7, 0, -1])
def test_an_opset_that_is_never_written_is_refused(
    wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("the export begins"))
    with pytest.raises(TargetError) as caught:
        compiled(MLP(), weight="int8/channel").emit("onnx", tmp_path / "a", opset=wanted)
    end = "the highest is 28" if wanted > 28 else "the lowest is 13"
    assert str(caught.value) == f"onnx: opset {wanted}: {end}"
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("weight", "input", "wanted", "reason"),
    [
        ("int4/channel", None, 20, "DequantizeLinear of INT4 needs opset 21; opset 20 was asked for"),
        ("int3/asym/g4", None, 13, "DequantizeLinear of UINT4 needs opset 21; opset 13 was asked for"),
        ("int8/g4", None, 17, "DequantizeLinear as it is used here needs opset 21; opset 17 was asked for"),
        ("float8_e4m3fn/channel", None, 18, "DequantizeLinear of FLOAT8E4M3FN needs opset 19; opset 18 was asked for"),
        ("int8/channel", "int16/tensor", 20, "QuantizeLinear of INT16 needs opset 21; opset 20 was asked for"),
        ("mxfp4", None, 23, "DequantizeLinear of FLOAT8E8M0 needs opset 24; opset 23 was asked for"),
    ],
)
def test_an_opset_that_is_too_low(weight: str, input: str | None, wanted: int, reason: str, tmp_path: Path) -> None:
    made = compiled(MLP(), X, weight=weight, **({"input": input} if input else {}))
    with pytest.raises(TargetError) as caught:
        made.emit("onnx", tmp_path / "a", opset=wanted)
    assert str(caught.value) == f"onnx: up: {reason}"
    assert list(tmp_path.iterdir()) == []


STATIC = "int8/asym/tensor"
# One of each kind by default: layer norms, expert routing, convolutions.
QUICK = (("opt", None), ("mixtral", STATIC), ("resnet", STATIC))


@pytest.mark.parametrize(
    ("family", "input"),
    [
        pytest.param(family, input, marks=() if (family, input) in QUICK else pytest.mark.slow)
        for family in FAMILIES
        for input in (None, STATIC)
    ],
)
def test_int8_by_channel_needs_opset_13_alone(family: str, input: str | None, tmp_path: Path) -> None:
    made = compile_captured(family, blocks_spec("int8/channel", input))
    model = emitted(made, tmp_path / "a")
    assert opset(model) == 13
    held = {name for name, (kind, _) in initializers(model).items() if kind == "INT8" and name.endswith(".weight")}
    assert held == {r.layer.fqn + ".weight" for r in made.report.layers if r.weight is not None}


# -- what it holds -----------------------------------------------------------------------------------------------------


def test_weights_by_channel_and_static_inputs(tmp_path: Path) -> None:
    made = compiled(MLP(), weight="int8/asym/channel", input="int8/asym/tensor")
    model = emitted(made, tmp_path / "a")
    assert initializers(model) == {
        name: value
        for layer, shape in (("up", [12, 8]), ("down", [8, 12]))
        for name, value in {
            f"{layer}.weight": ("INT8", shape),
            f"{layer}.weight_scale": ("FLOAT", shape[:1]),
            f"{layer}.weight_zero_point": ("INT8", shape[:1]),
            f"{layer}.input_scale": ("FLOAT", []),
            f"{layer}.input_zero_point": ("INT8", []),
            f"{layer}.bias": ("FLOAT", shape[:1]),
        }.items()
    }
    for name in ("weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point", "bias"):
        expected = tensor_of(made.graph, f"up.{name}").reshape(values(model, f"up.{name}").shape)
        assert torch.equal(torch.from_numpy(values(model, f"up.{name}").copy()), expected), name
    by_weight = {tuple(inputs): attributes for inputs, attributes in nodes(model, "DequantizeLinear")}
    for layer in ("up", "down"):
        assert by_weight[f"{layer}.weight", f"{layer}.weight_scale", f"{layer}.weight_zero_point"]["axis"] == 0
    assert nodes(model, "QuantizeLinear")[0][0] == ["x", "up.input_scale", "up.input_zero_point"]


@pytest.mark.parametrize(
    ("weight", "kind", "raised"),
    [
        ("int4/g4", "INT4", 0),
        ("int4/asym/g4", "UINT4", 8),
        ("int3/g4", "INT4", 0),
        ("int2/g4", "INT2", 0),
        ("int2/asym/g4", "UINT2", 2),
        ("int2/asym/g4 before opset 25", "UINT4", 8),
    ],
)
def test_weights_in_blocks_of_4_bits(weight: str, kind: str, raised: int, tmp_path: Path) -> None:
    weight, _, older = weight.partition(" before ")
    made = compiled(MLP(), weight=weight)
    model = emitted(made, tmp_path / "a", opset=24 if older else None)
    assert opset(model) == (24 if older else 25 if "2" in kind else 21)
    asymmetric = {"up.weight_zero_point": (kind, [12, 2])} if raised else {}
    found = {name: value for name, value in initializers(model).items() if name.startswith("up.")}
    assert found == {
        "up.weight": (kind, [12, 8]),
        "up.weight_scale": ("FLOAT", [12, 2]),
        "up.bias": ("FLOAT", [12]),
        **asymmetric,
    }
    for name in ("weight", *(["weight_zero_point"] if raised else [])):
        codes = torch.from_numpy(values(model, f"up.{name}").astype(np.int8)) - raised
        assert torch.equal(codes, tensor_of(made.graph, f"up.{name}"))
    read = next(attributes for inputs, attributes in nodes(model, "DequantizeLinear") if inputs[0] == "up.weight")
    assert read == {"axis": 1, "block_size": 4}


def test_a_short_last_block(tmp_path: Path) -> None:
    made = compiled(MLP(8, 10), weight="int4/g8")
    model = emitted(made, tmp_path / "a")
    assert initializers(model)["down.weight_scale"] == ("FLOAT", [8, 2])  # 8 and 2 of 10
    session = onnxruntime.InferenceSession(tmp_path / "a" / "model.onnx")
    (found,) = session.run(None, {"x": X.numpy()})
    expected = made.graph(X)[0]
    assert (torch.from_numpy(found) - expected).abs().max() <= 1e-6 * expected.abs().max()  # another order of sums


def test_experts_stand_under_their_own_names(tmp_path: Path) -> None:
    spec = {
        "graphq": 1,
        "rules": [
            {"match": "experts", "weight": "int4/asym/g32"},
            {"match": "experts.1", "weight": "int8/channel"},
            {"match": "experts.2.down_proj", "float": True},
        ],
    }
    made = compile_captured("mixtral", spec)
    held = initializers(emitted(made, tmp_path / "a"))
    for block in (0, 1):
        prefix = f"model.layers.{block}.mlp.experts"
        assert held[f"{prefix}.0.gate_proj.weight"] == ("UINT4", [96, 64])
        assert held[f"{prefix}.0.gate_proj.weight_scale"] == ("FLOAT", [96, 2])
        assert held[f"{prefix}.1.up_proj.weight"] == ("INT8", [96, 64])
        assert held[f"{prefix}.1.up_proj.weight_scale"] == ("FLOAT", [96])
        assert held[f"{prefix}.2.down_proj.weight"] == ("FLOAT", [64, 96])
        assert held[f"{prefix}.3.down_proj.weight"] == ("UINT4", [64, 96])
    inputs = random_inputs(made.graph, 2, 5)
    session = OnnxSession(tmp_path / "a" / "model.onnx", source_of(made.graph))
    found: Any = session(*inputs)
    with torch.no_grad():
        expected = made.graph(*inputs)[0]
    assert (found["logits"] - expected).abs().max() <= 1e-5 * expected.abs().max()  # another order of sums


def test_tied_weights_and_embeddings(tmp_path: Path) -> None:
    tokens = torch.arange(6).reshape(2, 3)
    rules = [{"match": "embedding", "weight": "int4/asym/g4"}, {"match": "head", "weight": "int8/channel"}]
    made = compiled(Tied(), tokens, rules=rules)
    held = initializers(emitted(made, tmp_path / "a"))
    assert (held["embedding.weight"], held["head.weight"]) == (("UINT4", [16, 8]), ("INT8", [16, 8]))


def test_convolutions(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 6, 6)
    made = compiled(ConvBnRelu(), x, weight="int8/channel", input="int8/asym/tensor")
    model = emitted(made, tmp_path / "a")
    assert opset(model) == 13
    assert initializers(model)["conv.weight"] == ("INT8", [8, 4, 3, 3])
    assert initializers(model)["depthwise.weight"] == ("INT8", [8, 1, 3, 3])


# -- inputs and outputs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> Compiled:
    return compile_captured("llama", blocks_spec("int4/asym/g32"))


@pytest.fixture(scope="module")
def artifact(llama: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifacts") / "llama"
    emitted(llama, path)
    return path


def dimensions(value: onnx.ValueInfoProto) -> list[Any]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_names_and_dynamic_axes(artifact: Path) -> None:
    model = onnx.load(artifact / "model.onnx")
    past = {
        f"past_key_values.{i}.{part}": ["batch", 2, "past_sequence", 16] for i in (0, 1) for part in ("key", "value")
    }
    assert {i.name: dimensions(i) for i in model.graph.input} == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "past_sequence + sequence"],
        "position_ids": ["batch", "sequence"],
        **past,
    }
    total = dimensions(model.graph.output[1])[2]
    assert sorted(total.replace(" ", "").split("+")) == ["past_sequence", "sequence"]
    assert {o.name: dimensions(o) for o in model.graph.output} == {
        "logits": ["batch", "sequence", 128],
        **{name.replace("past_key_values", "present"): ["batch", 2, total, 16] for name in past},
    }
    assert [i.name for i in model.graph.input] == [i.name for i in source_of_llama(artifact)]


def source_of_llama(artifact: Path) -> list[Any]:
    from graphq.artifacts.manifest import read, source_of_artifact

    return list(source_of_artifact(artifact, read(artifact)).inputs)


def test_empty_caches_and_steps(llama: Compiled, artifact: Path) -> None:
    session = onnxruntime.InferenceSession(artifact / "model.onnx")
    ids = torch.randint(0, 100, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected: Any = llama.graph(*_complete(llama, ids))[0]
    past = {f"past_key_values.{i}.{p}": np.zeros((2, 2, 0, 16), np.float32) for i in (0, 1) for p in ("key", "value")}
    logits: list[Tensor] = []
    done = 0
    for step in (5, 1, 2):
        feeds = {
            "input_ids": ids[:, done : done + step].numpy(),
            "attention_mask": np.ones((2, done + step), np.int64),
            "position_ids": np.arange(done, done + step)[None].repeat(2, 0),
        }
        names = ["logits", *(name.replace("past_key_values", "present") for name in past)]
        found: Any = dict(zip(names, session.run(names, feeds | past), strict=True))
        logits.append(torch.from_numpy(found.pop("logits")))
        past = {name.replace("present", "past_key_values"): value for name, value in found.items()}
        done += step
        assert {value.shape for value in past.values()} == {(2, 2, done, 16)}
    assert (torch.cat(logits, 1) - expected).abs().max() <= 1e-5 * expected.abs().max()  # other shapes, other sums


def _complete(made: Compiled, batch: Any) -> tuple[Tensor, ...]:
    from graphq.data.batches import complete

    return complete(source_of(made.graph), batch)


def test_left_padding(llama: Compiled, artifact: Path) -> None:
    ids = torch.randint(1, 100, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    given = {"input_ids": ids, "attention_mask": mask}
    found: Any = OnnxSession(artifact / "model.onnx", source_of(llama.graph))(**given)
    with torch.no_grad():
        expected = llama.graph(*_complete(llama, given))[0]
    difference = (found["logits"] - expected)[mask.bool()].abs().max()
    assert difference <= 1e-5 * expected.abs().max()  # another order of sums


def test_without_a_cache(llama: Compiled, tmp_path: Path) -> None:
    before = json.dumps([str(n) for n in llama.graph.graph.nodes])
    model = emitted(llama, tmp_path / "a", cache=False)
    assert {i.name: dimensions(i) for i in model.graph.input} == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "position_ids": ["batch", "sequence"],
    }
    assert [o.name for o in model.graph.output] == ["logits"]
    source = json.loads((tmp_path / "a" / "graphq.json").read_text())["source"]
    assert [i["name"] for i in source["inputs"]] == ["input_ids", "attention_mask", "position_ids"]
    session = onnxruntime.InferenceSession(tmp_path / "a" / "model.onnx")
    for batch, sequence in ((1, 1), (2, 6)):
        ids, mask, positions, *_ = random_inputs(llama.graph, batch, sequence)
        feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
        (found,) = session.run(None, feeds)
        with torch.no_grad():
            expected = llama.graph(*_complete(llama, ids))[0]
        assert (torch.from_numpy(found) - expected).abs().max() <= 1e-5 * expected.abs().max()  # another order of sums
    assert json.dumps([str(n) for n in llama.graph.graph.nodes]) == before


# -- files -------------------------------------------------------------------------------------------------------------


def test_an_artifact_is_two_files_and_the_models_own(artifact: Path, llama: Compiled) -> None:
    others = {"config.json", "genai_config.json"}
    assert {file.name for file in artifact.iterdir()} == {"model.onnx", "graphq.json", *others}
    manifest = json.loads((artifact / "graphq.json").read_text())
    assert manifest["target"] == "onnx"
    assert manifest["report"] == llama.report.rows()
    assert manifest["tensors"]["model.layers.0.mlp.down_proj.weight"]["dtype"] == "int8"


def test_large_models_keep_their_tensors_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled(MLP(64, 96), torch.randn(3, 64), weight="int4/asym/g32")
    made.emit("onnx", tmp_path / "whole")
    monkeypatch.setattr(target, "_INLINE_BYTES", 100)
    made.emit("onnx", tmp_path / "apart")
    assert {file.name for file in (tmp_path / "apart").iterdir()} == {"model.onnx", "model.onnx.data", "graphq.json"}
    sizes = {name: (tmp_path / name / "model.onnx").stat().st_size for name in ("whole", "apart")}
    assert sizes["apart"] < sizes["whole"] - 64 * 96 // 2
    x = torch.randn(3, 64).numpy()
    outputs: list[Any] = [
        onnxruntime.InferenceSession(tmp_path / name / "model.onnx").run(None, {"x": x})[0]
        for name in ("whole", "apart")
    ]
    assert np.array_equal(outputs[0], outputs[1])
    assert graphq.verify(tmp_path / "apart").ok
    (tmp_path / "apart").rename(tmp_path / "moved")  # the place of the data is relative
    onnxruntime.InferenceSession(tmp_path / "moved" / "model.onnx")


def test_the_compiled_model_is_left_alone(tmp_path: Path) -> None:
    made = compiled(MLP(), weight="int8/channel", input="int8/asym/tensor")
    before = {key: value.clone() for key, value in made.graph.state_dict().items()}
    text = graphq.dump(made.graph)
    made.emit("onnx", tmp_path / "a")
    assert graphq.dump(made.graph) == text
    assert {k: v.shape for k, v in made.graph.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(value, before[key]) for key, value in made.graph.state_dict().items())


def test_emission_prints_and_warns_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    made = compiled(Tied(), torch.arange(6).reshape(2, 3), rules=[{"match": "head", "weight": "int4/g4"}])
    made.emit("onnx", tmp_path / "a")
    printed = capfd.readouterr()
    assert (printed.out, printed.err, [str(w.message) for w in recwarn]) == ("", "", [])


# -- other dtypes ------------------------------------------------------------------------------------------------------


def test_bfloat16_in_onnx_own_reference(tmp_path: Path) -> None:
    """ONNX Runtime has no bfloat16 kernels on the CPU; the reference has them from opset 21 on."""
    import ml_dtypes
    from onnx.reference import ReferenceEvaluator

    made = compiled(MLP().to(torch.bfloat16), X.to(torch.bfloat16), weight="int8/channel")
    with pytest.raises(TargetError) as caught:
        made.emit("onnx", tmp_path / "refused", opset=21)
    assert str(caught.value) == (
        "onnx: up: computes in bfloat16, which ONNX Runtime has no kernels for on the CPU; compile with"
        " dtype=torch.float32, or pass bfloat16=True for a runtime that has them"
    )
    model = emitted(made, tmp_path / "a", opset=21, bfloat16=True)
    assert graphq.verify(tmp_path / "a").ok
    assert initializers(model)["up.bias"] == ("BFLOAT16", [12])
    x = X.to(torch.bfloat16)
    found: Any = ReferenceEvaluator(model).run(None, {"x": x.float().numpy().astype(ml_dtypes.bfloat16)})
    expected = made.graph(x)[0].float()
    assert found[0].dtype == ml_dtypes.bfloat16
    # bfloat16 has 8 bits; the reference rounds each product and sum, torch the sums alone
    assert (torch.from_numpy(found[0].astype(np.float32)) - expected).abs().max() <= 2**-5 * expected.abs().max()


def test_float64_is_refused_by_layer(tmp_path: Path) -> None:
    made = compiled(MLP().to(torch.float64), X.to(torch.float64), weight="int8/channel")
    with pytest.raises(TargetError) as caught:
        made.emit("onnx", tmp_path / "a")
    assert str(caught.value).splitlines() == [
        f"onnx: {layer}: its scales are float64, ONNX's are float32 at most; compile the model in float32"
        for layer in ("up", "down")
    ]


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "input", "reason"),
    [
        ("hifloat8/channel", None, "hifloat8: ONNX has no type for it"),
        ("hifloat8/unit/tensor", None, "hifloat8/unit: ONNX has no type for it"),
        ("float4_e1m2/g4", None, "float4_e1m2: ONNX has no type for it"),
        (
            "mxint8",
            "mxint8/dynamic",
            "mxint8: this target holds activations in integers, float8_e4m3fn and float8_e5m2",
        ),
        ("nvfp4", "nvfp4", "nvfp4: this target holds activations in integers, float8_e4m3fn and float8_e5m2"),
    ],
)
def test_formats_that_onnx_lacks(weight: str, input: str | None, reason: str, tmp_path: Path) -> None:
    made = compiled(MLP(), X, weight=weight, **({"input": input} if input else {}))
    with pytest.raises(TargetError) as caught:
        made.emit("onnx", tmp_path / "a")
    assert str(caught.value).splitlines() == [f"onnx: {layer}: {reason}" for layer in ("up", "down")]
    assert list(tmp_path.iterdir()) == []


class Deep(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.inner = nn.ModuleDict({"deep": Applied(function)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["deep"](self.up(x))


class Applied(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda x: torch.linalg.qr(x)[0], "aten.linalg_qr.default"),
        (torch.special.bessel_j0, "aten.special_bessel_j0.default"),  # which the exporter decomposes further
    ],
)
def test_an_op_that_onnx_lacks_names_layer_and_op(function: Any, op: str, tmp_path: Path) -> None:
    made = compiled(Deep(function), weight="int8/channel")
    with pytest.raises(TargetError) as caught:
        made.emit("onnx", tmp_path / "a")
    assert str(caught.value) == f"onnx: inner.deep: torch's exporter cannot translate {op}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("function", "share"),
    [
        (lambda x: F.dropout(x, 0.5), 0.5),
        (lambda x: F.alpha_dropout(x, 0.25, training=True), 0.25),
        (lambda x: F.dropout(x, 0.0), None),
        (lambda x: F.dropout(x, 0.5, training=False), None),
    ],
)
def test_what_is_dropped_at_random(function: Any, share: float | None, tmp_path: Path) -> None:
    made = compiled(Deep(function), weight="int8/channel")
    if share is None:
        emitted(made, tmp_path / "a")
        return
    with pytest.raises(
        TargetError, match=rf"^onnx: inner\.deep: aten\.\w*dropout\.default drops {share} of its input at"
    ):
        made.emit("onnx", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "options", "problem"),
    [
        ("onnx", {"opset": "17"}, "onnx: opset: '17' is not a whole number or null"),
        ("onnx", {"opset": True}, "onnx: opset: True is not a whole number or null"),
        ("onnx", {"profile": 3}, "onnx: profile: 3 is not text or null"),
        ("onnx", {"cache": 0}, "onnx: cache: 0 is not true or false"),
        (
            "onnx",
            {"op_set": 17},
            "onnx: no option op_set; there are overwrite, cache, opset, bfloat16, profile, shapes",
        ),
        ("torch", {"opset": 3}, "torch: no option opset; there are overwrite"),
        ("torch", {"overwrite": "yes"}, "torch: overwrite: 'yes' is not true or false"),
    ],
)
def test_options_that_do_not_exist(target: str, options: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError) as caught:
        compiled(MLP(), weight="int8/channel").emit(target, tmp_path / "a", **options)
    assert str(caught.value) == problem
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_onnx_runtime_cannot_load(tmp_path: Path) -> None:
    made = compiled(MLP(), weight="int8/channel")
    (tmp_path / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(TargetError, match="ONNX Runtime cannot load it"):
        OnnxSession(tmp_path / "model.onnx", source_of(made.graph))


def test_a_file_of_another_model(tmp_path: Path) -> None:
    made = compiled(MLP(), weight="int8/channel")
    made.emit("onnx", tmp_path / "a")
    other = compiled(Tied(), torch.arange(6).reshape(2, 3), rules=[{"match": "head", "weight": "int8/channel"}])
    with pytest.raises(TargetError) as caught:
        OnnxSession(tmp_path / "a" / "model.onnx", source_of(other.graph))
    assert str(caught.value) == f"{tmp_path / 'a' / 'model.onnx'}: takes x; the manifest says tokens"


def test_a_file_with_other_outputs(tmp_path: Path) -> None:
    made = compiled(MLP(), weight="int8/channel")
    made.emit("onnx", tmp_path / "a")
    source = replace(source_of(made.graph), outputs=("output", "more"))
    with pytest.raises(TargetError) as caught:
        OnnxSession(tmp_path / "a" / "model.onnx", source)
    assert str(caught.value) == f"{tmp_path / 'a' / 'model.onnx'}: gives output; the manifest says output, more"


def test_the_place_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "_export", lambda _: pytest.fail("exported"))
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetError, match=r"file is not a directory$"):
        compiled(MLP(), weight="int8/channel").emit("onnx", tmp_path / "file" / "a")


@pytest.mark.slow
def test_a_model_from_its_directory_to_its_artifact(tmp_path: Path) -> None:
    tiny("qwen3", num_hidden_layers=1).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    made = graphq.compile(tmp_path / "model", {"graphq": 1, "weight": "int8/channel"})
    assert opset(emitted(made, tmp_path / "a")) == 13
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model_type"] == "qwen3"
    assert (tmp_path / "a" / "generation_config.json").is_file()
