"""Every change of codes, scales and zero points in an artifact is found and named; what cannot be read is refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import graphq
from graphq.cli import app
from graphq.errors import GraphError, TargetError
from graphq.verifier import Verification, _difference, verify
from tests.checkpoints import save_checkpoint
from tests.models import Blocks

X = torch.linspace(-2, 3, 5 * 8).reshape(5, 8)
# every kind of storage: packed codes with and without zero points, the integer linear, static inputs, one scale in all
SPEC = {
    "graphq": 1,
    "rules": [
        {"match": "up", "weight": "int4/asym/g4", "input": "int8/asym/tensor"},
        {"match": "down#0", "weight": "int3/g5"},
        {"match": "down#1", "weight": "int8/channel", "input": "int8/tensor"},
        {"match": "=head", "weight": "int8/asym/tensor"},
    ],
}
NAMES = {
    *(f"blocks.{i}.up.{n}" for i in (0, 1) for n in ("weight", "weight_scale", "weight_zero_point")),
    *(f"blocks.{i}.up.{n}" for i in (0, 1) for n in ("input_scale", "input_zero_point")),
    *(f"blocks.0.down.{n}" for n in ("weight", "weight_scale")),
    *(f"blocks.1.down.{n}" for n in ("weight", "weight_scale", "input_scale")),
    *(f"head.{n}" for n in ("weight", "weight_scale", "weight_zero_point")),
}


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    torch.manual_seed(0)
    made = graphq.compile(Blocks(), SPEC, inputs=X, calibration=[X])
    made.emit("torch", folder / "torch")
    made.emit("onnx", folder / "onnx")
    return folder


@pytest.fixture(params=["torch", "onnx"])
def artifact(request, artifacts, tmp_path) -> Path:
    return Path(shutil.copytree(artifacts / request.param, tmp_path / request.param))


def target_of(artifact: Path) -> str:
    return json.loads((artifact / "graphq.json").read_text())["target"]


def change_tensor(artifact: Path, name: str, change: Callable[[np.ndarray], np.ndarray] | None) -> None:
    """``name`` becomes ``change`` of itself, or is gone."""
    if target_of(artifact) == "torch":
        tensors = load_file(artifact / "model.safetensors")
        tensor = tensors.pop(name)
        if change is not None:
            tensors[name] = torch.from_numpy(change(tensor.numpy().copy()))
        save_file(tensors, artifact / "model.safetensors")
        return
    model = onnx.load(artifact / "model.onnx")
    (found,) = [i for i in model.graph.initializer if i.name == name]
    if change is None:
        model.graph.initializer.remove(found)
    else:
        found.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(found).copy()), name))
    onnx.save(model, artifact / "model.onnx")


def change_manifest(artifact: Path, change: Callable[[Any], None]) -> None:
    data = json.loads((artifact / "graphq.json").read_text())
    change(data)
    (artifact / "graphq.json").write_text(json.dumps(data))


def flip_first_bit(x: np.ndarray) -> np.ndarray:
    """The least significant bit of the first element's last byte flipped, in the array's own type."""
    if x.dtype.name in ("int4", "uint4"):
        raw = x.astype("int8")
        raw.reshape(-1)[0] ^= 1
        return raw.astype(x.dtype)
    x.reshape(-1)[:1].view(np.uint8)[0] ^= 1
    return x


def test_an_artifact_as_it_was_written(artifact):
    assert verify(artifact) == Verification((), len(NAMES))
    assert verify(str(artifact)).ok
    assert set(json.loads((artifact / "graphq.json").read_text())["tensors"]) == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_one_flipped_bit(artifact, name):
    change_tensor(artifact, name, flip_first_bit)
    assert verify(artifact) == Verification((f"{name}: differs from its digest in the manifest",), len(NAMES))
    assert not verify(artifact).ok


def test_every_code_is_compared(artifacts, tmp_path):
    """Each byte of packed codes, one after the other."""
    artifact = Path(shutil.copytree(artifacts / "torch", tmp_path / "a"))
    original = (artifact / "model.safetensors").read_bytes()
    size = int.from_bytes(original[:8], "little")
    header = json.loads(original[8 : 8 + size])
    start, end = header["blocks.0.down.weight"]["data_offsets"]
    assert end - start == 8 * 5  # 8 rows of 12 codes of 3 bits: 36 bits in 5 bytes
    for offset in range(start, end):
        changed = bytearray(original)
        changed[8 + size + offset] ^= 1
        (artifact / "model.safetensors").write_bytes(changed)
        assert verify(artifact).differences == ("blocks.0.down.weight: differs from its digest in the manifest",)


@pytest.mark.parametrize("target", ["torch", "compressed-tensors", "ascend"])
def test_a_tensor_in_a_numbered_file_is_named_alone(tmp_path, target):
    model = save_checkpoint(tmp_path / "model")
    spec = {"graphq": 1, "weight": "int8/channel"}
    made = graphq.compile(model, spec, **({} if target == "torch" else {"target": target}))
    made.emit(target, tmp_path / "b", **({} if target == "torch" else {"shard_bytes": 40_000}))
    files = sorted((tmp_path / "b").glob("*.safetensors"))
    assert (len(files) > 1) == (target != "torch")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    (file,) = [file for file in files if name in load_file(file)]
    tensors = load_file(file)
    tensors[name][3] *= 2
    save_file(tensors, file, metadata={"format": "pt"})
    assert verify(tmp_path / "b").differences == (f"{name}: differs from its digest in the manifest",)


def test_a_changed_shape(artifact):
    change_tensor(artifact, "head.weight_scale", lambda x: np.concatenate([x.reshape(-1)] * 2))
    if target_of(artifact) == "onnx":
        assert verify(artifact).differences == ("head.weight_scale: float32[2], not float32[]",)
    else:  # which cannot be loaded
        message = f"{artifact}/graph.json: head.weight_scale is float32[1, 1], the weights hold float32[2]"
        with pytest.raises(TargetError, match=f"^{re.escape(message)}$"):
            verify(artifact)


def test_codes_of_another_size(artifacts, tmp_path):
    artifact = Path(shutil.copytree(artifacts / "torch", tmp_path / "a"))
    change_tensor(artifact, "blocks.0.up.weight", lambda x: x[:, :-1].copy())
    with pytest.raises(TargetError, match=r"blocks\.0\.up\.weight is uint8\[12, 4\], the weights hold uint8\[12, 3\]$"):
        verify(artifact)


def test_a_missing_tensor(artifacts, tmp_path):
    artifact = Path(shutil.copytree(artifacts / "onnx", tmp_path / "a"))
    change_tensor(artifact, "blocks.1.up.input_zero_point", None)
    assert verify(artifact).differences == ("blocks.1.up.input_zero_point: missing",)
    change_tensor(artifact, "blocks.0.down.weight_scale", None)
    assert verify(artifact).differences == (
        "blocks.0.down.weight_scale: missing",
        "blocks.1.up.input_zero_point: missing",
    )


def test_a_tensor_that_the_weights_lack(artifacts, tmp_path):
    artifact = Path(shutil.copytree(artifacts / "torch", tmp_path / "a"))
    change_tensor(artifact, "blocks.1.up.input_zero_point", None)
    with pytest.raises(TargetError, match=f"^{artifact}/graph.json: the weights lack blocks.1.up.input_zero_point$"):
        verify(artifact)


def test_a_changed_bias(artifact):
    change_tensor(artifact, "head.bias", flip_first_bit)
    assert verify(artifact).differences == ("head.bias: differs from its digest in the manifest",)


def edit_graph(artifact: Path, change: Callable[[Any], object]) -> None:
    data = json.loads((artifact / "graph.json").read_text())
    change(data)
    (artifact / "graph.json").write_text(json.dumps(data))


def replace_relu(data: Any) -> None:
    next(n for n in data["nodes"] if n.get("target") == "aten.relu.default")["target"] = "aten.neg.default"


def test_another_op_in_the_graph(artifacts, tmp_path):
    artifact = Path(shutil.copytree(artifacts / "torch", tmp_path / "a"))
    edit_graph(artifact, replace_relu)
    assert verify(artifact).differences == ("graph.json: differs from its digest in the manifest",)
    change_tensor(artifact, "head.bias", flip_first_bit)
    assert verify(artifact).differences == (
        "head.bias: differs from its digest in the manifest",
        "graph.json: differs from its digest in the manifest",
    )


def rewire(model: Any) -> None:
    """Two layers of the same shape read each other's codes and scales."""
    first, second = (n for n in model.graph.node if n.op_type == "DequantizeLinear" and "up.weight" in n.input[0])
    inputs = list(first.input), list(second.input)
    first.input[:], second.input[:] = inputs[1], inputs[0]


def drop_output(model: Any) -> None:
    model.graph.output.pop()
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(model.graph.node[0].output[0]))


@pytest.mark.parametrize("change", [rewire, drop_output])
def test_another_graph_of_the_same_tensors(artifacts, tmp_path, change):
    artifact = Path(shutil.copytree(artifacts / "onnx", tmp_path / "a"))
    model = onnx.load(artifact / "model.onnx")
    change(model)
    onnx.save(model, artifact / "model.onnx")
    assert verify(artifact).differences == ("model.onnx: differs from its digest in the manifest",)
    result = CliRunner().invoke(app, ["verify", str(artifact)])
    assert (result.exit_code, result.stderr) == (1, f"{artifact}: 1 differences from what was compiled\n")


def test_other_files(artifact):
    """A file that is gone differs; one that somebody put there is a note."""
    (artifact / "README.md").write_text("mine")
    change_manifest(artifact, lambda data: data["files"].update({"tokenizer.json": "0" * 64}))
    found = verify(artifact)
    assert (found.differences, found.notes) == (("tokenizer.json: missing",), ("README.md: graphq did not write it",))


FILES = {"torch": ("graph.json", "model.safetensors"), "onnx": ("model.onnx", "model.onnx.data")}


@pytest.mark.parametrize("target", FILES)
def test_a_file_that_the_target_reads_and_the_manifest_does_not_list(artifacts, tmp_path, target):
    """Whatever it holds: nothing tells a file without a digest from another that was put in its place."""
    artifact = Path(shutil.copytree(artifacts / target, tmp_path / "a"))
    (artifact / FILES["onnx"][1]).touch()  # of the torch target nothing but somebody else's file
    own = [name for name in FILES[target] if (artifact / name).exists()]
    lines = tuple(f"{name}: the manifest has no digest of it" for name in own)
    notes = () if target == "onnx" else ("model.onnx.data: graphq did not write it",)
    change_manifest(artifact, lambda data: data.update(files={}))
    assert verify(artifact) == Verification(lines, len(NAMES), notes)
    if target == "torch":
        edit_graph(artifact, replace_relu)
    change_tensor(artifact, "head.bias", flip_first_bit)
    assert verify(artifact).differences == ("head.bias: differs from its digest in the manifest", *lines)
    result = CliRunner().invoke(app, ["verify", str(artifact)])
    assert (result.exit_code, result.stderr) == (
        1,
        f"{artifact}: {1 + len(lines)} differences from what was compiled\n",
    )


def test_lines_of_names_that_are_not_printable(artifacts, tmp_path):
    artifact = Path(shutil.copytree(artifacts / "torch", tmp_path / "a"))
    change_manifest(artifact, lambda data: data["files"].update({"a\x1b[2J\n\ud800": "0"}))
    (artifact / "b\x1b").touch()
    assert verify(artifact).differences == ("a\x1b[2J\n\ud800: missing",)
    result = CliRunner().invoke(app, ["verify", str(artifact)])
    lines = [r"a\x1b[2J\n\ud800: missing", r"note: b\x1b: graphq did not write it"]
    assert (result.exit_code, result.stdout.splitlines()) == (1, lines)


class OwnNames(torch.nn.Module):
    """A layer with buffers of its own that are called as graphq calls its tensors."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.l = torch.nn.Linear(8, 8)
        self.names = names
        for name in names:
            self.l.register_buffer(name, torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.l(x)
        for name in self.names:
            y = y + getattr(self.l, name)
        return y


@pytest.mark.parametrize("target", ["torch", "onnx"])
@pytest.mark.parametrize("input", [None, "int8/tensor", "int8/asym/tensor", "int8/asym/token/dynamic"])
def test_a_models_own_tensors_of_the_same_names(target, input, tmp_path):
    rule = {"match": "*", "weight": "int4/channel"} | ({"input": input} if input else {})
    model = OwnNames("input_scale", "input_zero_point", "input_global_scale")
    made = graphq.compile(model, {"graphq": 1, "rules": [rule]}, inputs=X, calibration=[X])
    made.emit(target, tmp_path / "a")
    assert verify(tmp_path / "a").differences == ()
    recorded = json.loads((tmp_path / "a" / "graphq.json").read_text())
    assert {f"l.{name}" for name in model.names} <= set(recorded["other_tensors"])
    change_tensor(tmp_path / "a", "l.input_scale", flip_first_bit)
    assert verify(tmp_path / "a").differences == ("l.input_scale: differs from its digest in the manifest",)


@pytest.mark.parametrize("name", ["weight_scale", "weight_zero_point", "weight_global_scale"])
def test_names_that_a_quantized_weight_needs(name):
    with pytest.raises(GraphError) as caught:
        graphq.compile(OwnNames(name), {"graphq": 1, "rules": [{"match": "*", "weight": "int8/channel"}]}, inputs=X)
    assert str(caught.value) == (
        f"l.{name}: the model has a tensor of this name, which graphq gives to the quantized weight of l; rename it"
    )


def test_a_tensor_that_the_manifest_lacks(artifact):
    change_manifest(artifact, lambda data: data["tensors"].pop("head.weight"))
    assert verify(artifact) == Verification(("head.weight: not in the manifest",), len(NAMES) - 1)


def edit_text(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda artifact: (artifact / name).write_bytes(change((artifact / name).read_bytes()))


def remove(name: str) -> Callable[[Path], object]:
    return lambda artifact: (artifact / name).unlink()


def manifest_with(**keys: Any) -> Callable[[Path], object]:
    return lambda artifact: change_manifest(artifact, lambda data: data.update(keys))


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no manifest": ("torch", remove("graphq.json"), "{}: not a graphq artifact: graphq.json is missing"),
    "bad manifest": ("torch", edit_text("graphq.json", lambda b: b[:-9]), "{}/graphq.json: damaged: "),
    "not text": ("onnx", edit_text("graphq.json", lambda b: b"\xff" + b), "{}/graphq.json: damaged: 'utf-8' codec"),
    "a list": ("onnx", edit_text("graphq.json", lambda _: b"[]"), "{}/graphq.json: not a graphq artifact of format 1"),
    "newer": ("torch", manifest_with(graphq=2), "{}/graphq.json: not a graphq artifact of format 1"),
    "target": ("torch", manifest_with(target="tflite"), "{}/graphq.json: no such target: tflite"),
    "tensors": ("onnx", manifest_with(tensors=[1]), "{}/graphq.json: damaged: tensors: "),
    "record": (
        "onnx",
        manifest_with(tensors={"a.weight": {"dtype": "int8"}}),
        "{}/graphq.json: damaged: tensors: 'shape'",
    ),
    "source": ("torch", manifest_with(source={}), "{}/graphq.json: damaged: source: inputs: missing"),
    "truncated": (
        "torch",
        edit_text("model.safetensors", lambda b: b[:-1]),
        "{}/model.safetensors: damaged or incomplete: Error while",
    ),
    "no weights": ("torch", remove("model.safetensors"), "{}/model.safetensors: no such file"),
    "no graph": ("torch", remove("graph.json"), "{}/graph.json: damaged or incomplete: "),
    "bad graph": ("torch", edit_text("graph.json", lambda b: b[:-9]), "{}/graph.json: damaged or incomplete: "),
    "other graph": (
        "torch",
        edit_text("graph.json", lambda _: b'{"same": {}}'),
        "{}/graph.json: damaged: KeyError: 'modules'",
    ),
    "deep graph": (
        "torch",
        edit_text("graph.json", lambda _: b"[" * 200_000),
        "{}/graph.json: damaged or incomplete: ",
    ),
    "deep manifest": ("torch", edit_text("graphq.json", lambda _: b"[" * 200_000), "{}/graphq.json: damaged: "),
    "files": ("onnx", manifest_with(files=3), "{}/graphq.json: damaged: files: "),
    "others": ("torch", manifest_with(other_tensors=3), "{}/graphq.json: damaged: other_tensors: "),
    "no model": ("onnx", remove("model.onnx"), "{}: damaged or incomplete: model.onnx is missing"),
    "truncated model": ("onnx", edit_text("model.onnx", lambda b: b[: len(b) // 2]), "{}/model.onnx: damaged: "),
    "not a model": ("onnx", edit_text("model.onnx", lambda _: b"\x0a"), "{}/model.onnx: damaged: "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_read(artifacts, tmp_path, damage):
    target, harm, message = DAMAGES[damage]
    artifact = Path(shutil.copytree(artifacts / target, tmp_path / target))
    harm(artifact)
    with pytest.raises(TargetError) as caught:
        verify(artifact)
    assert str(caught.value).startswith(message.format(artifact))
    assert "\n" not in str(caught.value)


def test_a_missing_directory(tmp_path):
    with pytest.raises(TargetError, match=r"not a graphq artifact: graphq\.json is missing"):
        verify(tmp_path / "nothing")


MIXED: dict[str, Any] = {
    "graphq": 1,
    "rules": [
        {"match": "blocks", "weight": "int4/asym/g16", "input": "int8/token/dynamic"},
        {"match": "k_proj", "weight": "int8/channel", "input": "int8/asym/tensor"},
    ],
}
PLANS: dict[str, Any] = {
    "llama": MIXED,
    "mixtral": {"graphq": 1, "rules": [*MIXED["rules"], {"match": "*.experts.[12].*", "weight": "int3/channel"}]},
    "gpt2": {"graphq": 1, "rules": [{"match": "blocks", "weight": "int4/asym/g24"}]},
}


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f == "llama" else pytest.mark.slow) for f in PLANS])
def test_against_the_model(tmp_path, family):
    model = save_checkpoint(tmp_path / "model", family)
    made = graphq.compile(model, PLANS[family], calibration=[torch.arange(12).reshape(2, 6)])
    for target in ("torch", "onnx"):
        artifact = tmp_path / target
        made.emit(target, artifact)
        alone, found = verify(artifact), verify(artifact, model)
        assert found.ok, found.differences
        assert alone.compared == found.compared == len(json.loads((artifact / "graphq.json").read_text())["tensors"])
        assert not alone.notes
        inputs = "input scales and zero points, which need calibration data, were compared with the manifest only"
        count = {"llama": 2, "mixtral": 4, "gpt2": 0}[family]  # a scale and a zero point for each k_proj
        assert found.notes == ((f"{count} {inputs}",) if count else ())


@pytest.mark.parametrize("target", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
def test_against_another_model(tmp_path, target):
    model = save_checkpoint(tmp_path / "model")
    graphq.compile(model, {"graphq": 1, "rules": MIXED["rules"][:1]}).emit(target, tmp_path / "a")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name][3] += 1  # one channel: other codes, scales and zero points
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    codes, scales, zero_points = verify(tmp_path / "a", model).differences
    assert re.fullmatch(rf"{name}: [1-9]\d* of 2048 elements differ \({model}\)", codes)
    assert scales == f"{name}_scale: 4 of 128 elements differ ({model})"
    assert re.fullmatch(rf"{name}_zero_point: [1-4] of 128 elements differ \({model}\)", zero_points)


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_against_takes_the_input_scales_that_the_artifact_holds(tmp_path, target):
    """Of weights that are tiny beside a bias, whose scales leave room for it in steps of the input's scale."""
    model = save_checkpoint(tmp_path / "model", "gpt2")
    tensors = load_file(model / "model.safetensors")
    name = next(key for key in tensors if key.endswith("h.0.attn.c_attn.weight"))
    tensors[name][:, 3] *= 1e-9
    tensors[name.replace("weight", "bias")][3] = 5
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    spec = {"graphq": 1, "rules": [{"match": "blocks", "weight": "int8/channel", "input": "int8/asym/tensor"}]}
    data = [torch.arange(12).reshape(2, 6)]
    made = graphq.compile(model, spec, calibration=data)
    alone = graphq.compile(model, {"graphq": 1, "rules": [{"match": "blocks", "weight": "int8/channel"}]})
    path = "transformer.h.0.attn.c_attn.weight_scale"
    differ = made.graph.state_dict()[path] != alone.graph.state_dict()[path]
    assert differ.flatten().nonzero().tolist() == [[3]]  # the scale depends on the input's
    made.emit(target, tmp_path / "a")
    assert verify(tmp_path / "a", model).differences == ()


def test_the_words_for_a_difference():
    codes = torch.tensor([[1, 2, 3]], dtype=torch.int8)
    assert _difference("w", codes, codes.clone()) is None
    assert _difference("w", codes, torch.tensor([[1, 0, 4]], dtype=torch.int8)) == "w: 2 of 3 elements differ"
    assert _difference("w", codes, codes.t()) == "w: int8[3, 1], compiled anew int8[1, 3]"
    assert _difference("w", codes, codes.short()) == "w: int16[1, 3], compiled anew int8[1, 3]"
    assert _difference("w", codes, None) == "w: missing"
    assert _difference("w", None, codes) == "w: not in the model compiled anew"
    zero = torch.tensor([0.0, torch.nan])
    assert _difference("s", zero, zero.clone()) is None  # by bits: NaN equals itself
    assert _difference("s", zero, -zero) == "s: 2 of 2 elements differ"  # and 0 is not -0


def test_against_takes_the_dtype_that_was_compiled_in(tmp_path):
    """float32 weights rounded to bfloat16 give other codes."""
    model = save_checkpoint(tmp_path / "model")
    graphq.compile(model, MIXED | {"rules": MIXED["rules"][:1]}, dtype=torch.bfloat16).save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "graphq.json").read_text())["computed_in"] == "bfloat16"
    assert verify(tmp_path / "a", model).ok
    change_manifest(tmp_path / "a", lambda data: data.update(computed_in="float32"))
    assert not verify(tmp_path / "a", model).ok


def test_against_refuses_a_damaged_manifest(artifacts, tmp_path):
    artifact = Path(shutil.copytree(artifacts / "torch", tmp_path / "a"))
    damages: list[tuple[dict[str, Any], str]] = [
        ({"spec": "graphq: 2"}, "damaged: graphq: 2 is not a version"),
        ({"spec": "{"}, "damaged: while parsing a flow node"),
        ({"spec": 3}, "damaged: "),
        ({"spec": "{graphq: 1, weight: int8/channel}", "seed": "x"}, "damaged: invalid literal for int"),
        (
            {"spec": "{graphq: 1, weight: int8/channel}", "seed": 0, "computed_in": "float3"},
            "damaged: 'no dtype float3'",
        ),
    ]
    for keys, message in damages:
        change_manifest(artifact, lambda data, keys=keys: data.update(keys))
        with pytest.raises(TargetError) as caught:
            verify(artifact, tmp_path)
        assert str(caught.value).startswith(f"{artifact}/graphq.json: {message}")
