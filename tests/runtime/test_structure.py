"""Calls of models whose outputs and inputs are structures of tensors: compiled, loaded, and in ONNX Runtime."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphq
from graphq.capture.source import source_of
from graphq.errors import SpecError, TargetError
from graphq.lowering.targets import target_named
from graphq.runtime.calls import OutputRecord

RULES: dict[str, Any] = {"graphq": 1, "rules": [{"match": "*", "weight": "int8/channel"}]}


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass
class Detections:
    scores: Tensor
    maps: list[Tensor]
    extra: dict[str, Any]
    stride: int = 8
    loss: Tensor | None = None


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, features: dict[str, Tensor], offsets: list[Tensor]) -> tuple[Detections, Tensor]:
        maps = [self.up(features["low"]), self.up(features["high"]) + offsets[1]]
        scores = self.down(torch.cat(maps, 0)) + offsets[0]
        return Detections(scores, maps, {"names": ("a", "b"), "sum": (scores.sum(-1),)}), maps[0] * 2


def arguments(batch: int, seed: int = 0) -> tuple[dict[str, Tensor], list[Tensor]]:
    x = [floats(batch, 8, seed=seed + i) for i in range(3)]
    return {"low": x[0], "high": x[1]}, [floats(1, 4, seed=seed), x[2]]


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, graphq.Compiled]:
    torch.manual_seed(0)
    model = Detector().eval()
    return model, graphq.compile(model, RULES, inputs=arguments(1), shapes={"batch": 1})


def test_structures_in_and_out(made: tuple[nn.Module, graphq.Compiled], tmp_path: Path) -> None:
    _, compiled = made
    source = source_of(compiled.graph)
    assert [i.name for i in source.inputs] == ["features.low", "features.high", "offsets.0", "offsets.1"]
    assert source.outputs == (
        "output_0.scores",
        "output_0.maps.0",
        "output_0.maps.1",
        "output_0.extra.sum.0",
        "output_1",
    )
    compiled.save(tmp_path / "torch")
    compiled.emit("onnx", tmp_path / "onnx")
    features, offsets = arguments(1, seed=5)
    expected = compiled.graph(features["low"], features["high"], *offsets)
    for model in (compiled, graphq.load(tmp_path / "torch"), target_named("onnx").open(tmp_path / "onnx", source)):
        calls = (
            lambda m: m(features, offsets),
            lambda m: m(features=features, offsets=tuple(offsets)),
            lambda m: m(features, **{"offsets.0": offsets[0], "offsets.1": offsets[1]}),
            lambda m: m(features["low"], features["high"], *offsets),
        )
        for call in calls:
            found: Any = call(model)
            assert isinstance(found, tuple)
            record, last = found
            assert type(record) is OutputRecord
            assert list(record) == ["scores", "maps", "extra", "stride", "loss"]
            assert (record.stride, record["loss"], record[3:], record.extra["names"]) == (
                8,
                None,
                (8, None),
                ("a", "b"),
            )
            assert isinstance(record.maps, list)
            tensors = [record.scores, *record[1], record["extra"]["sum"][0], last]
            for ours, theirs in zip(tensors, expected, strict=True):
                assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    record: Any = compiled(features, offsets)
    with pytest.raises(AttributeError, match=r"^the model returned no boxes; it returned scores, maps, extra, stride,"):
        _ = record[0].boxes


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "message"),
    [
        (({},), {}, SpecError, "inputs: empty; the model takes features.low, features.high, offsets.0, offsets.1"),
        (
            ({"low": floats(1, 8), "mid": floats(1, 8)},),
            {},
            SpecError,
            "inputs: the model has no input features.mid; it takes features.low, features.high, offsets.0, offsets.1",
        ),
        (({}, [], []), {}, TypeError, "forward() takes 2 inputs, 3 were given: features, offsets"),
        (
            (arguments(1)[0],),
            {"offset": [floats(1, 4)]},
            TypeError,
            "forward() was captured without the argument offset; it takes features.low, features.high, offsets.0,",
        ),
        (
            (arguments(1)[0], 3),
            {},
            SpecError,
            "inputs: the model has no input offsets; it takes features.low, features",
        ),
    ],
)
def test_calls_that_do_not_fit(
    args: Any, kwargs: Any, kind: Any, message: str, made: tuple[nn.Module, graphq.Compiled]
) -> None:
    with pytest.raises(kind) as caught:
        made[1](*args, **kwargs)
    assert str(caught.value).startswith(message)


def test_a_manifest_of_another_structure(made: tuple[nn.Module, graphq.Compiled], tmp_path: Path) -> None:
    made[1].save(tmp_path / "torch")
    file = tmp_path / "torch" / "graph.json"
    manifest = tmp_path / "torch" / "graphq.json"
    text = manifest.read_text()
    assert '"structured"' in text
    manifest.write_text(text.replace('"output_0.maps.1"', '"output_0.maps.2"', 1))
    assert file.is_file()
    with pytest.raises(TargetError, match=r"damaged: source: structure: it is not one of the outputs, in their order$"):
        graphq.load(tmp_path / "torch")
