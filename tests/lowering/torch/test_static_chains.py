"""Whole nets on the ``torch-cpu`` profile: codes from end to end, as compiled, saved, copied and traced."""

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphq
from graphq.artifacts.manifest import quantized_tensors
from graphq.compiler import Compiled
from graphq.errors import GraphqError
from graphq.lowering.torch.module import stored_codes
from graphq.runtime.fused_layers import FusedLayer
from graphq.runtime.model import CompiledModel
from tests.lowering.torch.chain_graphs import floats

X = floats(4, 3, 24, 20)


class Residual(nn.Module):
    """What ResNets are made of: a stem, a pool, two residual blocks, of which one changes the width, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 5, 2, 2)
        self.a, self.b = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.c, self.d = nn.Conv2d(8, 12, 3, 2, 1), nn.Conv2d(12, 12, 3, 1, 1)
        self.short = nn.Conv2d(8, 12, 1, 2)
        self.up, self.head = nn.Linear(12, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x).relu(), 3, 2, 1)
        x = (self.b(self.a(x).relu()) + x).relu()
        x = (self.d(self.c(x).relu()) + self.short(x)).relu()
        return self.head(F.gelu(self.up(x.mean((2, 3)))))


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return graphq.compile(Residual().eval(), profile="torch-cpu", inputs=X, calibration=[X])


@pytest.fixture(scope="module")
def artifact(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifacts") / "a"
    compiled.save(path)
    return path


def layers(model: CompiledModel) -> dict[str, Any]:
    return {path: m.graphq_form for path, m in model.graph.named_modules() if isinstance(m, FusedLayer)}


def test_every_layer_is_fused_and_floats_come_out_at_the_ends_alone(compiled: Compiled) -> None:
    found = layers(compiled.module)
    assert {path: (it.output, it.other, it.activation) for path, it in found.items()} == {
        "stem": ("uint8", None, "relu"),
        "a": ("uint8", None, "relu"),
        "b": ("uint8", "uint8", "relu"),
        "c": ("uint8", None, "relu"),
        "d": (None, None, "none"),  # a mean reads the sum, in float
        "short": ("uint8", None, "none"),
        "up": ("uint8", None, "gelu"),
        "head": (None, None, "none"),
    }
    ops = [str(n.target) for n in compiled.module.graph.graph.nodes if n.op == "call_function"]
    assert ops == [
        "graphq.quantize.default",
        "graphq.max_pool2d.default",
        "graphq.dequantize.default",
        "aten.add.Tensor",
        "aten.relu.default",
        "aten.mean.dim",
        "graphq.quantize.default",
    ]


def test_it_computes_what_the_qdq_form_computes(compiled: Compiled) -> None:
    with torch.no_grad():
        source, expected = Residual().eval()(X), compiled.graph(X)[0]
    found: Any = compiled(X)
    # A code that flips moves what follows by a step of one of 255: 2 % of the largest output at the very most here.
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()
    noise = (found - source).square().mean() / source.square().mean()
    assert 10 * noise.log10() <= -25


@pytest.mark.parametrize("batch", [0, 1, 7])
def test_batches_of_other_sizes(compiled: Compiled, batch: int) -> None:
    found: Any = compiled(floats(batch, 3, 24, 20))
    assert found.shape == (batch, 5)


def test_what_was_saved_is_loaded(compiled: Compiled, artifact: Path) -> None:
    loaded = graphq.load(artifact)
    assert torch.equal(torch.as_tensor(loaded(X)), torch.as_tensor(compiled(X)))
    assert layers(loaded) == layers(compiled.module)
    ours: Any = stored_codes(loaded)
    theirs: Any = quantized_tensors(compiled.graph)
    for path in layers(loaded):
        assert torch.equal(ours[path].codes, theirs[path].codes)
        assert torch.equal(ours[path].scale, theirs[path].scale)


def test_the_artifact_holds_plain_tensors(compiled: Compiled, artifact: Path) -> None:
    """No packing of a kernel's, before a call and after it."""
    from safetensors import safe_open

    state = compiled.module.state_dict()
    with safe_open(artifact / "model.safetensors", framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert held.keys() == state.keys()
    assert held["a.weight"].dtype == torch.int8
    assert held["a.weight"].shape == (8, 8, 3, 3)
    assert torch.equal(held["a.weight"], state["a.weight"])


def test_copies_and_states(compiled: Compiled) -> None:
    before: Any = compiled(X)
    made = copy.deepcopy(compiled.module)
    assert torch.equal(torch.as_tensor(made(X)), before)
    state = made.state_dict()
    made.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in state.items()} | {"head.bias": before[0]})
    with torch.inference_mode():
        zeros: Any = made(X)
    assert torch.equal(zeros, before[0].expand(4, 5))
    assert torch.equal(torch.as_tensor(compiled(X)), before)


def test_it_is_exported_and_compiled(compiled: Compiled) -> None:
    """A traced graph has the ops of the QDQ form, which every backend knows."""
    module = compiled.module.graph
    before: Any = compiled(X)
    with torch.no_grad():
        exported = torch.export.export(module, (X,)).module()(X)[0]
        traced = torch.compile(module, backend="eager", fullgraph=True)(X)[0]
    for found in (exported, traced):
        assert (found - before).abs().max() <= 0.02 * before.abs().max()


def test_many_threads_give_the_same_codes(compiled: Compiled) -> None:
    before, threads = compiled(X), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(torch.as_tensor(compiled(X)), torch.as_tensor(before))
    finally:
        torch.set_num_threads(threads)


VALUES = (None, -1, 0, 1, 2**31, 1.5, "x", "int8", "uint8", [], [0, 0], [1, 1, 1], True, {"node": "x"})


def test_changed_layers_are_errors_or_models(artifact: Path, tmp_path: Path) -> None:
    """Of 120 changes to what fused layers are and read, none ends the process, or raises what is not ours."""
    import shutil

    folder = Path(shutil.copytree(artifact, tmp_path / "a"))
    whole = json.loads((folder / "graph.json").read_text())
    draw = random.Random(0)
    refused = 0
    for _ in range(120):
        data = json.loads(json.dumps(whole))
        if draw.random() < 0.5:
            settings = data["modules"][draw.choice(list(data["modules"]))]["settings"]
            settings[draw.choice(list(settings))] = draw.choice(VALUES)
        else:
            calls = [node for node in data["nodes"] if node["op"] == "call_module"]
            names = [node["name"] for node in data["nodes"][:-1]]
            call = draw.choice(calls)["args"]
            call[draw.randrange(len(call))] = draw.choice([None, 1.0, *({"node": name} for name in names)])
        (folder / "graph.json").write_text(json.dumps(data))
        try:
            graphq.load(folder, verify=False)(X)
        except (GraphqError, RuntimeError):  # torch's own, of shapes that do not fit an op
            refused += 1
    assert refused > 40


class Inverted(nn.Module):
    """MobileNetV2's block: a wide depthwise convolution between two of one place, with ReLU6, and a sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.each = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, 1, 1, groups=12)
        self.narrow, self.last = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(F.relu6(self.each(F.relu6(self.wide(x)))))
        return self.last(F.interpolate(y + x, scale_factor=2, mode="nearest"))


class Joined(nn.Module):
    """What DenseNets and U-Nets do: two paths joined, and one of their parts taken again."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.a(x))
        first, _ = y.chunk(2, 1)
        return self.c(torch.cat([first, F.hardswish(self.b(y))], 1)).flatten(1)


@pytest.mark.parametrize("model", [Inverted, Joined])
@pytest.mark.parametrize("activations", ["uint8", "int8/asym", "int8"])
def test_other_nets_and_other_codes(model: type[nn.Module], activations: str) -> None:
    spec = {
        "graphq": 1,
        "profile": "torch-cpu",
        "rules": [{"match": "*", "weight": "int8/channel", "input": f"{activations}/tensor"}],
    }
    made = graphq.compile(model().eval(), spec, inputs=X, calibration=[X])
    kinds = {str(n.target) for n in made.module.graph.graph.nodes if n.op == "call_function"}
    assert not {"aten.conv2d.default", "aten.add.Tensor"} & kinds
    is_float = model is Inverted and activations != "uint8"  # torch repeats unsigned codes alone
    assert ("graphq.dequantize.default" in kinds) == is_float
    assert {it.input for it in layers(made.module).values()} == {activations}
    with torch.no_grad():
        expected = made.graph(X)[0]
    found: Any = made(X)
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()
