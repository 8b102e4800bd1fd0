"""The torch artifact: how small it is, that it gives the same bits in a fresh process, and what it refuses to load."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graphq
from graphq.artifacts.manifest import quantized_tensors
from graphq.capture.source import source_of
from graphq.compiler import Compiled
from graphq.errors import TargetError
from graphq.lowering.torch.module import load, stored_codes, weight_nbytes
from graphq.state import tensor_of
from graphq.verifier import verify
from tests.compiled import compile_captured
from tests.models import MLP, ConvBnRelu, MoE, Tied, random_inputs

ROOT = Path(__file__).parents[3]


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compiled(model: nn.Module, x: Tensor, **spec: Any) -> Compiled:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape).to(parameter.dtype)
    return graphq.compile(model.eval(), {"graphq": 1, **spec}, inputs=x, calibration=[x])


def rule(match: str, weight: str, **more: str) -> dict[str, str]:
    return {"match": match, "weight": weight, **more}


# -- size --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_bytes_of_each_layer(bits: int, symmetric: bool, tmp_path: Path) -> None:
    """ceil(bits * K / 8) bytes for each of N rows, float32 scales, zero points of a byte; nothing else."""
    weight = f"int{bits}" + ("" if symmetric else "/asym")
    made = compiled(MLP(9, 13), floats(2, 9), rules=[rule("up", f"{weight}/channel"), rule("down", f"{weight}/g5")])
    made.save(tmp_path / "a")
    stored = load_file(tmp_path / "a" / "model.safetensors")
    report = {r.layer.fqn: r.nbytes for r in made.report.layers}
    for layer, rows, columns, scales in (("up", 13, 9, 13), ("down", 9, 13, 9 * 3)):
        sizes = {key: t.numel() * t.element_size() for key, t in stored.items() if key.startswith(f"{layer}.weight")}
        expected = {f"{layer}.weight": rows * -(-bits * columns // 8), f"{layer}.weight_scale": 4 * scales}
        assert sizes == expected | ({} if symmetric else {f"{layer}.weight_zero_point": scales})
        assert sum(sizes.values()) == report[layer]
    assert set(stored) - {key for key in stored if ".weight" in key} == {"up.bias", "down.bias"}
    assert weight_nbytes(load(tmp_path / "a")) == sum(report.values()) + 4 * (13 + 9)


def test_bytes_of_experts_and_convolutions(tmp_path: Path) -> None:
    made = compiled(MoE(), floats(6, 8), rules=[rule("experts", "int3/g3")])
    made.save(tmp_path / "experts")
    stored = load_file(tmp_path / "experts" / "model.safetensors")
    assert stored["experts.gate_proj.weight"].shape == (4 * 6, 3)  # 8 codes of 3 bits
    assert stored["experts.gate_proj.weight_scale"].shape == (4, 6, 3)
    assert stored["experts.down_proj.weight"].shape == (4 * 8, 3)  # 6 codes in 18 bits
    made = compiled(ConvBnRelu(), floats(2, 4, 6, 6), rules=[rule("conv", "int5/channel")])
    made.save(tmp_path / "convolutions")
    stored = load_file(tmp_path / "convolutions" / "model.safetensors")
    assert stored["conv.weight"].shape == (8, -(-4 * 9 * 5 // 8))


# -- the same bits in a fresh process ----------------------------------------------------------------------------------

SPEC: dict[str, Any] = {
    "graphq": 1,
    "rules": [
        rule("blocks", "int4/asym/g32"),
        rule("down_proj#0", "int3/g24"),
        rule("o_proj", "int8/channel", input="int8/token/dynamic"),
        rule("q_proj#1", "int8/channel", input="int8/asym/tensor"),
        rule("lm_head", "int8/channel"),
    ],
}
FRESH = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "onnx", "onnxruntime", "onnxscript"):
            raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Refuse())
torch.set_num_threads(1)
import graphq
model = graphq.load(Path(sys.argv[1]))
outputs = model(**load_file(sys.argv[2]))
save_file({k: v.contiguous() for k, v in outputs.items()}, sys.argv[3])
assert "transformers" not in sys.modules
"""


@pytest.fixture(scope="module")
def llama() -> Compiled:
    return compile_captured("llama", SPEC)


@pytest.fixture(scope="module")
def artifact(llama: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifacts") / "llama"
    llama.save(path)
    return path


def test_a_fresh_process_gives_the_same_bits(llama: Compiled, artifact: Path, tmp_path: Path) -> None:
    names = [i.name for i in source_of(llama.graph).inputs]
    inputs = dict(zip(names, random_inputs(llama.graph), strict=True))
    save_file({key: value.contiguous() for key, value in inputs.items()}, tmp_path / "inputs.safetensors")
    arguments = [str(artifact), str(tmp_path / "inputs.safetensors"), str(tmp_path / "outputs.safetensors")]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        check=False,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected: Any = llama(**inputs)
    finally:
        torch.set_num_threads(threads)
    found = load_file(tmp_path / "outputs.safetensors")
    assert set(found) == set(expected) == set(source_of(llama.graph).outputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_convolution_with_weight_norm_is_stored_folded(tmp_path: Path) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3))
            self.up = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.conv(x))

    x = floats(2, 4, 10)
    made = compiled(Normed(), x, rules=[rule("up", "int8/channel")])
    assert tensor_of(made.graph, "conv.weight").shape == (6, 4, 3)  # folded, under the layer's own name
    made.save(tmp_path / "a")
    assert torch.equal(graphq.load(tmp_path / "a")(x), cast(Any, made)(x))


def test_an_artifact_holds_data_alone(artifact: Path) -> None:
    files = {file.name for file in artifact.iterdir()}
    assert files == {"graph.json", "model.safetensors", "graphq.json", "config.json"}
    for file in artifact.iterdir():
        data = file.read_bytes()
        assert not data.startswith((b"PK", b"\x80\x02", b"\x80\x04"))  # a zip as torch.save writes it, a pickle
        if file.suffix == ".json":
            json.loads(data)


def test_the_manifest_says_what_it_was_made_from(llama: Compiled, artifact: Path) -> None:
    found = json.loads((artifact / "graphq.json").read_text())
    assert {key: found[key] for key in ("graphq", "target", "algorithm", "seed", "computed_in")} == {
        "graphq": 1,
        "target": "torch",
        "algorithm": "rtn",
        "seed": 0,
        "computed_in": "float32",
    }
    assert found["report"] == llama.report.rows()
    assert graphq.load_spec(_yaml(found["spec"])) == llama.spec
    assert str(artifact.parent) not in (artifact / "graphq.json").read_text()


def _yaml(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)


def test_codes_scales_and_zero_points_are_those_of_the_qdq_form(llama: Compiled, artifact: Path) -> None:
    expected, found = quantized_tensors(llama.graph), stored_codes(load(artifact))
    assert set(found) == set(expected)
    assert len(expected) == 14 + 1 + 1  # layers of two blocks, the head, a static input
    for path, theirs in expected.items():
        ours = found[path]
        for name in ("codes", "scale", "zero_point"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None) == (b is None), (path, name)
            assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), (path, name)


def test_the_source_is_kept(llama: Compiled, artifact: Path) -> None:
    ours, theirs = load(artifact).source, source_of(llama.graph)
    kept = ("inputs", "outputs", "output_kind", "dtype", "ranges", "blocks", "config", "generation_config", "caches")
    for name in kept:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours.caches) == 4


def test_a_loaded_model_generates(llama: Compiled, artifact: Path) -> None:
    ids = torch.arange(3, 9).reshape(2, 3)
    expected = llama.generate(ids, max_new_tokens=4, pad_token_id=0)
    assert torch.equal(load(artifact).generate(ids, max_new_tokens=4, pad_token_id=0), expected)


# -- other models ------------------------------------------------------------------------------------------------------

MODELS: dict[str, tuple[nn.Module, Tensor, dict[str, Any]]] = {
    "static": (MLP(), floats(3, 8), {"weight": "int8/asym/channel", "input": "int8/asym/tensor"}),
    "dynamic": (MLP(), floats(3, 8), {"weight": "int4/channel", "input": "int4/asym/token/dynamic"}),
    "bfloat16": (MLP().to(torch.bfloat16), floats(3, 8).bfloat16(), {"weight": "int8/channel", "input": "int8/tensor"}),
    "experts": (
        MoE(),
        floats(9, 8),
        {"rules": [rule("experts", "int4/g4"), rule("experts.1", "int8/channel", input="int8/tensor")]},
    ),
    "convolutions": (ConvBnRelu(), floats(2, 4, 6, 6), {"weight": "int8/channel", "input": "int8/tensor"}),
    "tied": (Tied(), torch.arange(6).reshape(2, 3), {"rules": [rule("head", "int4/g3")]}),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_was_saved_is_loaded(name: str, tmp_path: Path) -> None:
    model, x, spec = MODELS[name]
    made = compiled(model, x, **spec)
    made.save(tmp_path / "a")
    loaded = graphq.load(tmp_path / "a")
    expected: Any = made(x)
    assert torch.equal(loaded(x), expected)
    assert loaded(x).dtype == expected.dtype
    assert {k: v.dtype for k, v in loaded.state_dict().items()} == {
        k: v.dtype for k, v in made.module.state_dict().items()
    }
    assert not loaded.training


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    model = nn.Sequential(Tied(), nn.Linear(16, 4))
    made = compiled(model, torch.arange(6).reshape(2, 3), rules=[rule("=1", "int8/channel")])
    made.save(tmp_path / "a")
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert [key for key in stored if key.startswith("0.")] in (["0.embedding.weight"], ["0.head.weight"])
    loaded = graphq.load(tmp_path / "a").state_dict()
    assert loaded["0.embedding.weight"].data_ptr() == loaded["0.head.weight"].data_ptr()


def test_parts_of_one_storage_are_stored_apart(tmp_path: Path) -> None:
    model = MLP(8, 8, bias=False)
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(vector, model.parameters())
    more = nn.Sequential(model, nn.Linear(8, 8))
    made = graphq.compile(more, {"graphq": 1, "rules": [rule("=1", "int8/channel")]}, inputs=floats(2, 8), consume=True)
    expected = made(floats(3, 8))
    made.save(tmp_path / "a")
    assert torch.equal(graphq.load(tmp_path / "a")(floats(3, 8)), expected)  # type: ignore[arg-type]


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_an_op_that_cannot_be_stored_names_its_layer(tmp_path: Path) -> None:
    library = torch.library.Library("graphq_test_store", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    torch.library.register_fake("graphq_test_store::twice", torch.empty_like, lib=library)

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)
            self.inner = nn.ModuleDict({"deep": _Twice()})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["deep"](self.up(x))

    class _Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.graphq_test_store.twice(x)

    made = compiled(Foreign(), floats(2, 8), weight="int8/channel")
    with pytest.raises(TargetError) as caught:
        made.save(tmp_path / "a")
    assert str(caught.value).startswith(
        "torch: inner.deep: graphq_test_store.twice.default cannot be stored: graphq.runtime.allowed_ops does not list it"
        f" ({__file__}:"
    )
    assert str(caught.value).endswith(": return torch.ops.graphq_test_store.twice(x))")
    assert list(tmp_path.iterdir()) == []


def edit(path: Path, change: Any) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    compiled(MLP(), floats(2, 8), weight="int8/channel").save(tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize("target", ["aten.from_file.default", "os.system", "aten.relu_.default", "torch.load"])
def test_a_graph_with_other_ops_is_not_loaded(small: Path, target: str) -> None:
    def change(data: dict[str, Any]) -> None:
        next(n for n in data["nodes"] if n.get("target") == "aten.relu.default")["target"] = target

    edit(small / "graph.json", change)
    with pytest.raises(TargetError) as caught:
        graphq.load(small, verify=False)
    assert str(caught.value) == f"{small}/graph.json: relu: {target} is not an op that artifacts may hold"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("graph.json", lambda d: d["modules"]["up"].update({"class": "Sequential"}), "Sequential is not a class"),
        ("graph.json", lambda d: d["nodes"][-1].update({"args": [[{"node": "x"}, {"py": "1"}]]}), "is not an argument"),
        ("graph.json", lambda d: d.update({"same": {"a.b": "nothing"}}), "damaged: same: 'nothing'"),
        ("graph.json", lambda d: d.pop("same"), "damaged: same: 'same'"),
        ("graph.json", lambda d: d.update({"read_as": {"nothing": "int8"}}), "damaged: same: 'nothing'"),
        ("graph.json", lambda d: d.update({"read_as": {"down.bias": "int9"}}), "damaged: same: 'no dtype int9'"),
        ("graph.json", lambda d: d["nodes"].pop(), "its last node, and no other, must be the output"),
        ("graph.json", lambda d: d["nodes"][-1]["args"][0].append(d["nodes"][-1]["args"][0][0]), "gives 2 outputs;"),
        ("graph.json", lambda d: d["nodes"][-1]["args"][0].clear(), "gives 0 outputs; the manifest says output"),
        ("graphq.json", lambda d: d["source"]["outputs"].append("b"), "gives 1 outputs; the manifest says output, b"),
        ("graphq.json", lambda d: d["source"]["inputs"].clear(), "takes 1 inputs; the manifest says "),
        ("graphq.json", lambda d: d.pop("other_tensors"), "damaged: other_tensors"),
        ("graphq.json", lambda d: d.update(target="onnx"), "an artifact for onnx; graphq.load reads torch artifacts"),
        ("graphq.json", lambda d: d.update(graphq=2), "not a graphq artifact of format 1"),
        ("graphq.json", lambda d: d["source"].pop("inputs"), "damaged: source: inputs: missing"),
        (
            "graphq.json",
            lambda d: d["source"].update(dtype="load"),
            "damaged: source: dtype: 'load' is not a floating-point dtype",
        ),
        ("graphq.json", lambda d: d["source"].pop("caches"), "damaged: source: caches: missing"),
        (
            "graphq.json",
            lambda d: d["source"].update(caches=[["a", "b"]]),
            "caches: no input 'a' that comes back as an output 'b'",
        ),
    ],
)
def test_damage_is_named(small: Path, file: str, change: Any, message: str) -> None:
    edit(small / file, change)
    with pytest.raises(TargetError) as caught:
        graphq.load(small, verify=False)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{small}")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("up.bias", lambda t: t[:3].clone(), "graph.json: up.bias is float32[12], the weights hold float32[3]"),
        ("up.bias", lambda t: t.double(), "graph.json: up.bias is float32[12], the weights hold float64[12]"),
        (
            "up.weight",
            lambda t: t[:, :-1].clone(),
            "graph.json: up.weight is uint8[12, 8], the weights hold uint8[12, 7]",
        ),
        ("up.weight", lambda t: t.int(), "graph.json: up.weight is uint8[12, 8], the weights hold int32[12, 8]"),
        ("up.weight_scale", lambda t: t[0].clone(), "graph.json: up.weight_scale is float32[12, 1], the weights hold"),
    ],
)
def test_tensors_that_do_not_fit(small: Path, name: str, change: Any, message: str) -> None:
    tensors = load_file(small / "model.safetensors")
    save_file(tensors | {name: change(tensors[name])}, small / "model.safetensors")
    for read in (functools.partial(graphq.load, verify=False), graphq.verify):
        with pytest.raises(TargetError) as caught:
            read(small)
        assert str(caught.value).startswith(f"{small}/{message}")


@pytest.mark.parametrize("file", ["graph.json", "model.safetensors", "graphq.json"])
def test_missing_files(small: Path, file: str) -> None:
    (small / file).unlink()
    with pytest.raises(TargetError) as caught:
        graphq.load(small)
    assert str(small) in str(caught.value)


def test_a_place_that_is_taken(small: Path) -> None:
    made = compiled(MLP(), floats(2, 8), weight="int4/channel")
    before = (small / "model.safetensors").read_bytes()
    with pytest.raises(TargetError, match="exists; choose another place"):
        made.save(small)
    assert (small / "model.safetensors").read_bytes() == before
    made.save(small, overwrite=True)
    assert torch.equal(graphq.load(small)(floats(3, 8)), made(floats(3, 8)))  # type: ignore[arg-type]
    assert [file.name for file in small.parent.iterdir()] == ["a"]


def test_targets_that_do_not_exist(tmp_path: Path) -> None:
    made = compiled(MLP(), floats(2, 8), weight="int4/channel")
    with pytest.raises(TargetError) as caught:
        made.emit("tflite", tmp_path / "a")
    assert str(caught.value) == "tflite: no such target; there are torch, onnx, compressed-tensors, ascend"


@pytest.mark.parametrize(
    "weight", ["int8/channel", "int4/asym/g4", "hifloat8/channel/ofmr", "nvfp4", "int4/over_int8/g4"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes_are_loaded_as_they_were(weight: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 4)).to(dtype)
    x = torch.randn(3, 10, dtype=dtype)
    rule = {"match": "*", "weight": weight, "input": "int8/asym/token/dynamic"}
    compiled = graphq.compile(model, {"graphq": 1, "rules": [rule]}, inputs=x, calibration=[x])
    compiled.save(tmp_path / "a")
    found: Any = load(tmp_path / "a")(x)
    assert torch.equal(found, cast(Tensor, compiled(x)))
    expected = compiled.graph(x)[0]
    # sums in another order; bfloat16 rounds each layer's result, which a last bit moves by 2^-8
    assert (found - expected).abs().max() <= (1e-12 if dtype == torch.float64 else 2**-7) * expected.abs().max()
    assert verify(tmp_path / "a").ok
