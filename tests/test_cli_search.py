"""``graphq search``: what it prints and writes, and what it refuses before it works."""

import json
from pathlib import Path

import pytest

import graphq
from tests.checkpoints import save_checkpoint, text
from tests.test_cli import graphq_

OPTIONS = "int2/channel,int4/channel,int8/channel"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(text(200))
    return file


def test_the_spec_that_is_written_holds_the_budget(model, words, tmp_path):
    out = tmp_path / "mix.yaml"
    done = graphq_(
        *("search", model, "--options", OPTIONS, "--budget", "5bits", "--calibration", words, "--samples", 4),
        *("--sequence-length", 16, "--exchanges", 2, "--to", "llmc", "--adapt", "--out", out),
    )
    assert "note: search: 5bits: " in done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition("  ")[0] for line in lines[:4]] == [
        "model.layers.0.self_attn.q_proj, k_proj, v_proj",
        "model.layers.0.self_attn.o_proj",
        "model.layers.0.mlp.gate_proj, up_proj",
        "model.layers.0.mlp.down_proj",
    ]
    assert lines[4].startswith("measured: predicted: size ")
    spec = graphq.load_spec(out)
    assert spec.dialect == "llmc"
    report = graphq.explain(model, spec)
    searched = [row for row in report.layers if row.weight is not None]
    assert len(searched) == 7
    assert 8 * sum(row.nbytes for row in searched) <= 5 * sum(
        row.layer.shape[0] * row.layer.shape[1] for row in searched
    )


def test_json_and_max_drop(model, words, tmp_path):
    held = tmp_path / "held.txt"
    held.write_text(text(64))
    done = graphq_(
        *("search", model, "--options", OPTIONS, "--max-drop", "5%", "--eval-text", held, "--calibration", words),
        *("--samples", 2, "--sequence-length", 16, "--json"),
    )
    found = json.loads(done.stdout)
    assert found["trials"][0]["origin"] == "float"
    assert set(found["groups"][0]["options"]) == set(OPTIONS.split(","))
    assert found["groups"][0]["option"] in OPTIONS.split(",")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--budget", "5"], "budget: '5' is none: write 4.5bits, 600MB, 123456B or 1.2x-latency"),
        (["--budget", "5bits", "--options", "w4a16"], "options: 1 given; a search chooses among two or more"),
        ([], "search: neither a budget nor max_drop is given"),
    ],
)
def test_refused(model, words, more, message):
    done = graphq_(
        *("search", model, "--options", OPTIONS, "--calibration", words, "--sequence-length", 16), *more, status=1
    )
    assert done.stderr.strip().splitlines()[-1] == message


def test_an_existing_file_stays(model, words, tmp_path):
    out = tmp_path / "mix.yaml"
    out.write_text("mine")
    done = graphq_(
        "search", model, "--options", OPTIONS, "--budget", "5bits", "--calibration", words, "--out", out, status=1
    )
    assert done.stderr.strip() == f"{out}: exists already; remove it, or say --overwrite"
    assert out.read_text() == "mine"


def test_an_unknown_dialect(model, words):
    done = graphq_("search", model, "--options", OPTIONS, "--calibration", words, "--to", "yaml", status=2)
    assert "'yaml' is not one of native, llmc, llm-compressor, amct, modelslim" in done.stderr.replace("\n", " ")
