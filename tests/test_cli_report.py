"""``graphq report``: a page from an artifact, and from a model and a spec, with what other commands printed."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.checkpoints import save_checkpoint, text
from tests.test_cli import graphq_


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "llama")


def test_a_page_with_all_there_is(model, tmp_path):
    (tmp_path / "text.txt").write_text(text(60))
    data = ("--calibration", tmp_path / "text.txt", "--samples", 2, "--sequence-length", 12)
    spec = tmp_path / "spec.yaml"
    spec.write_text("graphq: 1\nweight: int4/g16\ninput: int8/token/dynamic\n")
    graphq_("compile", model, "--spec", spec, "--target", "torch", "--out", tmp_path / "a")
    length = ("--text", tmp_path / "text.txt", "--sequence-length", 12)
    found = {
        "search": graphq_(
            "search", model, "--options", "int2/channel,int8/channel", "--budget", "5bits", *data, "--json"
        ),
        "eval": graphq_("eval", tmp_path / "a", "--against", model, *length, "--json"),
        "diff": graphq_("diff", model, tmp_path / "a", *data, "--json"),
    }
    for name, done in found.items():
        (tmp_path / f"{name}.json").write_text(done.stdout)
    files = [one for name in found for one in (f"--{name}", tmp_path / f"{name}.json")]
    out = tmp_path / "report.html"
    done = graphq_(
        "report", tmp_path / "a", "--model", model, *data, *files, "-o", out, "--json", "--command", "a first"
    )
    root = ET.fromstring(out.read_text())
    shown = " ".join(root.itertext())
    for part in ("Evaluation", "Search", "Layers", "Spec", "Files", "a first", "local dB"):
        assert part in shown, part
    assert len(list(root.iter("{http://www.w3.org/2000/svg}svg"))) == 1 + 7 + 7
    plain = json.loads(done.stdout)
    assert len(plain["histograms"]["activations"]) == 7
    assert plain["evaluations"][0]["perplexity"] == json.loads(found["eval"].stdout)["perplexity"]
    assert graphq_("report", tmp_path / "a", "-o", out, status=1).stderr.endswith("say --overwrite\n")


def test_a_model_and_a_preset(model, tmp_path):
    out = tmp_path / "report.html"
    graphq_("report", model, "--spec", "w8a16", "-o", out)
    assert "int8/channel" in out.read_text()


def test_refused(model, tmp_path):
    assert "no --json" in graphq_("report", model, "--spec", "w8a16", status=2).stderr
    assert "spec: none given" in graphq_("report", model, "--json", status=1).stderr
    (tmp_path / "x.json").write_text("[]")
    done = graphq_("report", model, "--spec", "w8a16", "--json", "--eval", tmp_path / "x.json", status=1)
    assert "not an object of JSON" in done.stderr
