"""Pages of artifacts, compiled models and specs say the same of the same layers; data and page hold the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import graphq
from graphq.errors import SpecError, TargetError
from graphq.pages.document import page_of, read_json
from tests.models import Blocks
from tests.pages.test_html import strictly, words

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
SPEC = {"graphq": 1, "weight": "int4/channel", "input": "int8/asym/tensor"}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return Blocks().eval()


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("artifacts") / "onnx"
    graphq.compile(model, SPEC, inputs=X, calibration=[X]).emit("onnx", path)
    return path


def test_one_model_from_three_sides(model, artifact):
    compiled = graphq.compile(model, SPEC, inputs=X, calibration=[X])
    options: dict[str, Any] = {"calibration": [X], "inputs": X}
    pages = [
        page_of(model, SPEC, **options),
        page_of(compiled, model=model, **options),
        page_of(artifact, model=model, **options),
    ]
    names = [row["layer"] for row in pages[0].rows]
    for page in pages:
        root = strictly(page)
        assert [row["layer"] for row in page.rows] == names
        assert set(page.weights) == set(page.activations) == set(names) - {"head"}
        assert page.weights == pages[0].weights
        assert page.activations == pages[0].activations
        assert "blocks.0.up: weight" in words(root)
    assert dict(pages[2].facts)["target"] == "onnx"
    assert set(pages[2].files) == {"model.onnx"}
    assert all(len(digest) == 64 for _, digest in pages[2].files.values())
    assert dict(pages[0].facts)["layers"] == "4 of 5 quantized"


def test_an_artifact_alone(artifact, model):
    page = page_of(artifact)
    assert not page.weights
    assert "int4/channel x int8/asym/tensor" in words(strictly(page))
    (note,) = page_of(artifact, model=model, inputs=X).notes
    assert note == "no histograms: an artifact with static scales is read back with calibration data"


def test_data_is_plain(artifact):
    plain = json.loads(json.dumps(page_of(artifact, commands=["graphq report"]).to_json(), allow_nan=False))
    assert plain["commands"] == ["graphq report"]
    assert plain["layers"][0]["layer"] == "blocks.0.up"
    assert plain["layers"][0]["bytes"] > 0
    assert plain["histograms"] == {"weights": {}, "activations": {}}


@pytest.mark.parametrize(("key", "value"), [("shape", [1, "x"]), ("float_bytes", -1), ("sqnr_db", "high")])
def test_a_damaged_manifest(artifact, tmp_path, key, value):
    folder = Path(shutil.copytree(artifact, tmp_path / "a"))
    held = json.loads((folder / "graphq.json").read_text())
    held["report"][0][key] = value
    (folder / "graphq.json").write_text(json.dumps(held))
    with pytest.raises(TargetError, match=f"damaged: report: {key}"):
        page_of(folder)


def test_numbers_that_json_has_not(tmp_path):
    (tmp_path / "eval.json").write_text('{"model": "m", "perplexity": [Infinity]}')
    with pytest.raises(SpecError, match=r"eval\.json: not a file of JSON: Infinity is no JSON"):
        read_json(tmp_path / "eval.json")


def test_what_is_of_something_else(artifact):
    """What would be left out of the page is refused."""
    other = {"layers": [{"layer": "nothing.like.it"}], "outputs": {}}
    with pytest.raises(
        SpecError, match=r"^diff: of another model: it compares nothing\.like\.it, which this one has not$"
    ):
        page_of(artifact, differences=other)
    with pytest.raises(SpecError, match=r"^diff: not what graphq diff --json prints: a layer without a name$"):
        page_of(artifact, differences=other | {"layers": [{}]})
    with pytest.raises(SpecError, match=r"^spec: an artifact has its own"):
        page_of(artifact, "w8a8")


def test_refused(model, artifact):
    with pytest.raises(SpecError, match="spec: none given"):
        page_of(model, inputs=X)
    options: Any = (("search", {"search": {}}), ("eval", {"evaluations": [{}]}), ("diff", {"differences": {}}))
    for name, option in options:
        with pytest.raises(SpecError, match=f"{name}: not what graphq {name} --json prints"):
            page_of(artifact, **option)
