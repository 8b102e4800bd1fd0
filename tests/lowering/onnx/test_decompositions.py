"""Graphs whose ops torch's exporter translates are not traced again, and come out as if they had been."""

import contextlib
import re
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from graphq.ir.pipeline import Pipeline
from graphq.lowering.onnx import emit as target
from graphq.lowering.onnx.decompositions import spell_translated
from graphq.lowering.onnx.emit import emit
from graphq.pipelines import canonical_passes
from tests.models import capture, captured

aten = torch.ops.aten
TRANSLATED = {aten.bitwise_and.Tensor, aten.mean.dim, aten.reshape.default, aten.flatten.using_ints, aten.sym_size.int}
BATCH = {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}}


def exported(model: nn.Module, *inputs: Tensor) -> fx.Graph:
    return torch.export.export(model, inputs, dynamic_shapes=BATCH, strict=False).graph


def calls(graph: fx.Graph) -> list[str]:
    return [f"{n.target} {list(n.args[1:])} {dict(n.kwargs)}" for n in graph.nodes if n.op == "call_function"]


def spelled(f: Any, *inputs: Tensor, translated: Any = TRANSLATED) -> list[str] | None:
    """The ops of the graph of ``f``, and None if it has to be decomposed, in which case it is left alone."""
    module = nn.Module()
    module.forward = lambda x: f(x)
    graph = exported(module, *inputs)
    before = calls(graph)
    if spell_translated(graph, translated):
        graph.lint()
        found = [re.sub(r"sym_size_int(_\d+)?", "size", line) for line in calls(graph)]
        return [line for line in found if "aten.size" not in line and "aten.sym_size" not in line]
    assert calls(graph) == before
    return None


def test_ops_under_another_name() -> None:
    assert spelled(lambda x: x & x, torch.ones(3, 4).bool()) == ["aten.bitwise_and.Tensor [x] {}"]
    x = torch.ones(3, 4, 5, 6)
    assert spelled(lambda x: nn.functional.adaptive_avg_pool2d(x, 1), x) == ["aten.mean.dim [[-1, -2], True] {}"]
    assert spelled(lambda x: nn.functional.adaptive_avg_pool2d(x, (1, 2)), x) is None


def test_sizes_of_reshapes() -> None:
    x = torch.ones(3, 4, 5, 6)
    assert spelled(lambda x: x.reshape(x.shape[0], x.shape[1], -1), x) == ["aten.reshape.default [[size, size, 30]] {}"]
    assert spelled(lambda x: x.reshape(x.shape[0], -1, 30), x) == ["aten.reshape.default [[size, -1, 30]] {}"]
    assert spelled(lambda x: x.transpose(0, 1).reshape(-1, 30), x, translated={*TRANSLATED, aten.transpose.int}) == [
        "aten.transpose.int [0, 1] {}",
        "aten.reshape.default [[-1, 30]] {}",
    ]
    assert spelled(lambda x: x.flatten(2), x) is None  # no node holds either size
    found = spelled(lambda x: (x * x.shape[0] * x.shape[1]).flatten(2), x, translated={*TRANSLATED, aten.mul.Tensor})
    assert found is not None
    assert found[-1] == "aten.reshape.default [[size, size, 30]] {}"


def test_casts() -> None:
    """What export asserts of their operand has no part in a file."""
    x = torch.ones(3, 4)
    found = spelled(lambda x: x.to(torch.float16), x)
    assert found is not None
    assert found[0].startswith("aten._assert_tensor_metadata.default ")
    assert found[1:] == ["aten._to_copy.default [] {'dtype': torch.float16}"]
    same = fx.Graph()
    given = same.placeholder("x")
    given.meta["val"] = x
    same.call_function(aten.to.dtype, (given, torch.float32))
    assert not spell_translated(same, TRANSLATED)  # which a decomposition leaves out


def test_what_has_no_translation_is_decomposed() -> None:
    x = torch.ones(3, 4)
    sine = aten.sin.default
    assert spelled(lambda x: x.sin(), x) is None
    assert spelled(lambda x: x.sin(), x, translated={sine}) == ["aten.sin.default [] {}"]
    # Composite ops that may give their input back are decomposed although they have translations; others stay.
    assert spelled(lambda x: x.expand_as(x), x, translated={*TRANSLATED, aten.expand_as.default}) is None
    x, weight = torch.ones(3, 4, 5), torch.ones(2, 5)
    assert spelled(lambda x: nn.functional.linear(x, weight), x) is None
    assert spelled(lambda x: nn.functional.linear(x, weight), x, translated={aten.linear.default}) is not None


class Mixed(nn.Module):
    """An op of each kind above, around a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear((x.double() * x.shape[1]).flatten(2).float())
        y = y.reshape(x.shape[0], -1, 3, 4) * ((x > 0) & (x < 2))
        return nn.functional.adaptive_avg_pool2d(y, 1).reshape(x.shape[0], -1)


def test_the_file_is_that_of_the_decomposed_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    gm = capture(Mixed(), x)
    emit(gm, tmp_path / "a", {})
    monkeypatch.setattr(target, "lean_decompositions", contextlib.nullcontext)
    emit(gm, tmp_path / "b", {})
    ours, decomposed = (onnx.load(tmp_path / name / "model.onnx").graph for name in "ab")
    assert [(n.name, n.op_type) for n in ours.node] == [(n.name, n.op_type) for n in decomposed.node]
    for name in "ab":
        (found,) = onnxruntime.InferenceSession(tmp_path / name / "model.onnx").run(None, {"x": x.numpy()})
        expected = gm(x)[0]
        assert (torch.from_numpy(found) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_language_models_are_not_decomposed(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("traced again")

    gm = captured(family)
    Pipeline(canonical_passes()).run(gm)
    monkeypatch.setattr(ExportedProgram, "run_decompositions", refuse)
    emit(gm, tmp_path / "a", {})
    held = onnx.load(tmp_path / "a" / "model.onnx", load_external_data=False).graph
    names = {d.dim_param for v in held.value_info for d in v.type.tensor_type.shape.dim}
    assert "sequence" in names
    assert not [name for name in names if name.isdigit()]  # sizes that are known are numbers
