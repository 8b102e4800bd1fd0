"""A source in a manifest: what was written is read, and every key of a damaged one is refused by its name."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import graphq
from graphq.artifacts.inspect import inspect
from graphq.artifacts.source import source_from_json, source_json
from graphq.capture.source import PAST, TOTAL, CachePair, Source, TensorInput
from graphq.capture.structure import Constant, Fields, Items, Leaf
from graphq.errors import TargetError
from tests.models import MLP

SOURCE = Source(
    inputs=(
        TensorInput("ids", torch.int64, ("batch", "sequence")),
        TensorInput("mask", torch.bool, ("batch", TOTAL)),
        TensorInput("past.0", torch.float32, ("batch", 2, PAST, 4)),
    ),
    outputs=("logits", "present.0"),
    output_kind="dict",
    dtype=torch.bfloat16,
    ranges=(("batch", 1, 2**31), ("sequence", 0, 9)),
    blocks=("model.layers",),
    config='{"architectures": null, "model_type": "x", "limits": [0, Infinity]}',
    generation_config="{}",
    caches=(CachePair("past.0", "present.0"),),
    mask="mask",
)


def test_what_was_written_is_read() -> None:
    bare = Source((), (), "tensor", torch.float32)
    many = replace(SOURCE, output_kind="tuple", config='{"architectures": ["A"]}', generation_config=None, mask=None)
    structure = Fields("record", (("a", Leaf("logits")), ("b", Items("list", (Leaf("present.0"), Constant(3))))))
    structured = replace(SOURCE, output_kind="structured", structure=structure)
    for source in (SOURCE, bare, many, structured):
        assert source_from_json(json.loads(json.dumps(source_json(source)))) == source


@pytest.mark.parametrize("key", source_json(SOURCE))
@pytest.mark.parametrize("value", [5, "x", -1, 1.5, True, {}, {"a": 1}, [5], [None], [[]], [["x", 1]], [{}]])
def test_values_of_other_kinds(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{key}: "):
        source_from_json(source_json(SOURCE) | {key: value})


@pytest.mark.parametrize("key", source_json(SOURCE))
def test_a_missing_key(key: str) -> None:
    data = source_json(SOURCE)
    del data[key]
    with pytest.raises(ValueError, match=f"^{key}: missing$"):
        source_from_json(data)


def ids(**keys: Any) -> dict[str, Any]:
    return {"name": "ids", "dtype": "int64", "shape": [1]} | keys


DAMAGES: list[tuple[str, Any, str]] = [
    ("output_kind", "x", "'x' is not one of tensor, tuple, dict, structured"),
    ("output_kind", None, "None is not one of tensor, tuple, dict, structured"),
    ("output_kind", ["dict"], "['dict'] is not one of tensor, tuple, dict, structured"),
    ("dtype", "int64", "'int64' is not a floating-point dtype"),
    ("dtype", "nn", "'nn' is not a floating-point dtype"),
    ("dtype", None, "None is not a floating-point dtype"),
    ("mask", "masks", "'masks' is not null or the name of an input"),
    ("mask", ["mask"], "['mask'] is not null or the name of an input"),
    ("blocks", None, "None is not a list of paths"),
    ("blocks", "layers", "'layers' is not a list of paths"),
    ("ranges", [["batch", 2, 1]], "[['batch', 2, 1]] is not a list of [name, low, high]"),
    ("ranges", [["batch", 1]], "[['batch', 1]] is not a list of [name, low, high]"),
    ("ranges", [["batch", -1, 1]], "[['batch', -1, 1]] is not a list of [name, low, high]"),
    ("ranges", [["batch", 1, 2.5]], "[['batch', 1, 2.5]] is not a list of [name, low, high]"),
    ("ranges", [["batch", True, 2**63]], "[['batch', True, 9223372036854775808]] is not a list of [name, low, high]"),
    ("ranges", None, "None is not a list of [name, low, high]"),
    ("caches", None, "None is not a list of pairs of names"),
    ("caches", [["past.0"]], "[['past.0']] is not a list of pairs of names"),
    ("caches", [["past.0", "past.0"]], "no input 'past.0' that comes back as an output 'past.0'"),
    ("caches", [["logits", "logits"]], "no input 'logits' that comes back as an output 'logits'"),
    ("config", "{", "'{' is not null or a model's settings as the text of a JSON object"),
    ("config", "[" * 200_000, "is not null or a model's settings as the text of a JSON object"),
    ("config", "[]", "'[]' is not null or a model's settings as the text of a JSON object"),
    ("config", {"model_type": "x"}, "is not null or a model's settings as the text of a JSON object"),
    ("config", '{"model_type": 5}', "is not null or a model's settings as the text of a JSON object"),
    ("config", '{"architectures": [5]}', "is not null or a model's settings as the text of a JSON object"),
    ("config", '{"architectures": "A"}', "is not null or a model's settings as the text of a JSON object"),
    ("generation_config", "{", "'{' is not null or the text of a JSON object"),
    ("generation_config", "3", "'3' is not null or the text of a JSON object"),
    ("outputs", ["logits", "present.0", "logits"], "['logits', 'present.0', 'logits'] is not distinct names"),
    ("inputs", None, "None is not a list"),
    ("inputs", [3], "name: 3 holds no entries"),
    ("inputs", [ids(), ids()], "two have one name"),
    ("inputs", [ids(name=3)], "name: 3 is not a name"),
    ("inputs", [ids(dtype="nn")], "dtype: 'nn' is not a dtype"),
    ("inputs", [ids(dtype=3)], "dtype: 3 is not a dtype"),
    ("inputs", [ids(shape=[-1])], "shape: [-1] is not a list of sizes and names"),
    ("inputs", [ids(shape=[True])], "shape: [True] is not a list of sizes and names"),
    ("inputs", [ids(shape="xy")], "shape: 'xy' is not a list of sizes and names"),
    ("inputs", [{"name": "ids", "dtype": "int64"}], "shape: missing"),
]


@pytest.mark.parametrize(("key", "value", "message"), DAMAGES)
def test_damages(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{key}: ") as caught:
        source_from_json(source_json(SOURCE) | {key: value})
    assert str(caught.value).endswith(message)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("data", [None, 3, [], "inputs"])
def test_what_is_no_source_at_all(data: object) -> None:
    with pytest.raises(ValueError, match=r"^inputs: .* holds no entries$"):
        source_from_json(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("artifacts") / "a"
    graphq.compile(MLP(), {"graphq": 1, "weight": "int8/channel"}, inputs=torch.ones(2, 8)).save(place)
    return place


@pytest.mark.parametrize("read", [graphq.load, graphq.verify, inspect])
def test_every_reader_refuses_a_damaged_source(made: Path, tmp_path: Path, read: Callable[[Path], object]) -> None:
    artifact = Path(shutil.copytree(made, tmp_path / "a"))
    data = json.loads((artifact / "graphq.json").read_text())
    for key, value in {"output_kind": "x", "dtype": "int64", "config": "{", "mask": 3}.items():
        (artifact / "graphq.json").write_text(json.dumps(data | {"source": data["source"] | {key: value}}))
        with pytest.raises(TargetError) as caught:
            read(artifact)
        assert str(caught.value).startswith(f"{artifact}/graphq.json: damaged: source: {key}: ")
