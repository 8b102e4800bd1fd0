"""A tied embedding and head that are quantized alike are stored once: in the QDQ form, in memory and in artifacts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import graphq
from graphq.artifacts.manifest import stored_names
from graphq.capture.source import source_of
from graphq.compiler import Compiled
from graphq.lowering.onnx.tensors import initializers
from graphq.lowering.torch.module import weight_nbytes
from graphq.runtime.onnx_session import OnnxSession
from tests.checkpoints import save_checkpoint
from tests.models import Tied

TOKENS = torch.arange(6).reshape(2, 3)
DYNAMIC, STATIC = "int8/token/dynamic", "int8/asym/tensor"
ALIKE = [  # the weight, the head's input, bytes of both weights with their scales and zero points
    ("int8/channel", None, 16 * 8 + 16 * 4),
    ("int8/asym/channel", DYNAMIC, 16 * 8 + 16 * 4 + 16),
    ("int8/tensor", STATIC, 16 * 8 + 4 + 4 + 1),
    ("int4/g4", None, 16 * 4 + 32 * 4),
    ("int4/asym/g4", None, 16 * 4 + 32 * 4 + 32),
    ("int3/channel", DYNAMIC, 16 * 3 + 16 * 4),
    ("float8_e4m3fn/channel", None, 16 * 8 + 16 * 4),
    ("mxfp4", None, 16 * 4 + 16),
    ("nvfp4", None, 16 * 4 + 16 + 4),
]


def tied(embedding: str, head: str, input: str | None = None, **more: Any) -> Compiled:
    torch.manual_seed(0)
    rules: list[dict[str, Any]] = [{"match": "embedding", "weight": embedding}, {"match": "head", "weight": head}]
    if input is not None:
        rules[1]["input"] = input
    spec = {"graphq": 1, "rules": rules, **more}
    return graphq.compile(Tied().eval(), spec, inputs=TOKENS, calibration=[TOKENS])


def of_weights(tensors: Any) -> list[str]:
    return sorted(name for name in tensors if ".weight" in name)


def output(model: Any) -> Tensor:
    found = model(TOKENS)
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize(("weight", "input", "nbytes"), ALIKE)
def test_alike(weight: str, input: str | None, nbytes: int, tmp_path: Path) -> None:
    made = tied(weight, weight, input)
    state = made.graph.state_dict()
    names = [name.removeprefix("head.") for name in of_weights(state) if name.startswith("head.")]
    for name in names:
        assert state[f"head.{name}"].data_ptr() == state[f"embedding.{name}"].data_ptr()
    assert weight_nbytes(made.module) == nbytes
    made.save(tmp_path / "torch")
    with safe_open(tmp_path / "torch" / "model.safetensors", "pt") as file:
        assert of_weights(file.keys()) == [f"embedding.{name}" for name in names]
    loaded = graphq.load(tmp_path / "torch")
    assert weight_nbytes(loaded) == nbytes
    assert torch.equal(output(loaded), output(made))
    assert graphq.verify(tmp_path / "torch").ok
    if "fp4" in weight:
        return  # ONNX has no such format
    made.emit("onnx", tmp_path / "onnx")
    assert of_weights(initializers(tmp_path / "onnx")) == [f"embedding.{name}" for name in names]
    assert graphq.verify(tmp_path / "onnx").ok
    found: Any = OnnxSession(tmp_path / "onnx" / "model.onnx", source_of(made.graph))(TOKENS)
    with torch.no_grad():
        expected = made.graph(TOKENS)[0]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()  # another order of sums


def test_the_numbers_are_those_of_each_alone() -> None:
    both, alone = tied("int4/asym/g4", "int4/asym/g4"), tied("int8/channel", "int4/asym/g4")
    for name, tensor in alone.graph.state_dict().items():
        if name.startswith("head."):
            assert torch.equal(both.graph.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("embedding", "head", "more"),
    [
        ("int8/channel", "int8/tensor", {}),
        ("int8/channel", "int4/channel", {}),
        ("int8/channel", "int8/channel/mse", {}),
        ("int8/channel", "int8/channel", {"algorithms": [{"gptq": {"min_samples": 0}}]}),
    ],
)
def test_unlike(embedding: str, head: str, more: dict[str, Any], tmp_path: Path) -> None:
    made = tied(embedding, head, **more)
    state = made.graph.state_dict()
    assert state["head.weight"].data_ptr() != state["embedding.weight"].data_ptr()
    for target in ("torch", "onnx"):
        made.emit(target, tmp_path / target)
        assert graphq.verify(tmp_path / target).ok
    with safe_open(tmp_path / "torch" / "model.safetensors", "pt") as file:
        assert {"head.weight", "embedding.weight"} <= set(file.keys())
    assert {"head.weight", "embedding.weight"} <= initializers(tmp_path / "onnx").keys()
    assert torch.equal(output(graphq.load(tmp_path / "torch")), output(made))


def test_scales_that_follow_from_more_than_the_weight_stay_two() -> None:
    """Layers that read one input share nvfp4's global scale, which an embedding's is no part of."""

    class Beside(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.beside = torch.nn.Linear(8, 16, bias=False)
            self.beside.weight.data *= 100

        def forward(self, tokens: Tensor) -> Tensor:
            h = torch.nn.functional.silu(self.embedding(tokens))
            return self.head(h) + self.beside(h)

    rules = [{"match": name, "weight": "nvfp4"} for name in ("embedding", "head", "beside")]
    state = graphq.compile(Beside().eval(), {"graphq": 1, "rules": rules}, inputs=TOKENS).graph.state_dict()
    assert not torch.equal(state["head.weight_global_scale"], state["embedding.weight_global_scale"])
    assert torch.equal(state["head.weight_global_scale"], state["beside.weight_global_scale"])
    assert state["head.weight"].data_ptr() != state["embedding.weight"].data_ptr()


def test_names_that_an_artifact_stores() -> None:
    w, other = torch.ones(2, 3), torch.ones(2, 3)
    tensors = {"a": w, "b": w, "c": other, "d": other}
    assert list(stored_names(tensors, {"a", "b", "c", "d"})) == ["a", "b", "c", "d"]
    assert list(stored_names(tensors, {"b", "c"})) == ["b", "c"]
    assert list(stored_names(tensors, {"a"})) == ["a", "c", "d"]  # which are stored nowhere: to be missed


def test_equal_weights_that_were_never_tied_stay_two() -> None:
    model = Tied().eval()
    model.head.weight = torch.nn.Parameter(model.embedding.weight.detach().clone())
    rules = [{"match": name, "weight": "int8/channel"} for name in ("embedding", "head")]
    state = graphq.compile(model, {"graphq": 1, "rules": rules}, inputs=TOKENS).graph.state_dict()
    assert torch.equal(state["head.weight"], state["embedding.weight"])
    assert state["head.weight"].data_ptr() != state["embedding.weight"].data_ptr()


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_verified_against_the_model(target: str, tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model", "gpt2", n_layer=1)
    rules = [{"match": name, "weight": "int8/channel"} for name in ("blocks", "wte", "lm_head")]
    graphq.compile(model, {"graphq": 1, "rules": rules}).emit(target, tmp_path / "a")
    found = graphq.verify(tmp_path / "a", against=model)
    assert found.differences == ()
    recorded = json.loads((tmp_path / "a" / "graphq.json").read_text())["tensors"]
    assert ("transformer.wte.weight" in recorded) or ("lm_head.weight" in recorded)


def test_codes_that_one_name_lost_are_missed(tmp_path: Path) -> None:
    """What is stored under another name is left out of the manifest; what is stored nowhere is not."""
    made = tied("int8/channel", "int8/channel")
    made.emit("onnx", tmp_path / "a")
    manifest = tmp_path / "a" / "graphq.json"
    described = json.loads(manifest.read_text())
    described["tensors"]["head.weight"] = described["tensors"]["embedding.weight"]
    manifest.write_text(json.dumps(described))
    assert graphq.verify(tmp_path / "a").differences == ("head.weight: missing",)
