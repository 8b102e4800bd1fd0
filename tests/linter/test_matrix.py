"""The matrix of what runs in integers: predicted by the profiles, and observed in ONNX Runtime and OpenVINO."""

import functools
import tempfile
from pathlib import Path

import onnx
import pytest

from graphq.linter import onnx_runtime, openvino
from graphq.linter.lint import lint
from tests.linter.cases import CASES as FIRST
from tests.linter.more_cases import MORE

CASES = FIRST | MORE
NAMES = [pytest.param(name, marks=() if name in FIRST else pytest.mark.slow) for name in CASES]


@functools.cache
def run_and_report(name, profile):
    """The report of the case's file, run: three tests read those of the first cases."""
    case = CASES[name]
    m, outputs = case.make()
    with tempfile.TemporaryDirectory() as folder:
        path = m.save(Path(folder) / "model.onnx", *outputs)
        onnx.checker.check_model(str(path), full_check=True)
        return lint(path, profile, run=True)


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    """No process for each of these files, which are known not to end one."""
    monkeypatch.setattr(openvino, "run_apart", openvino.run_here)
    monkeypatch.setattr(onnx_runtime, "run_apart", onnx_runtime.run_here)


@pytest.mark.parametrize("name", NAMES)
def test_onnx_runtime(name, tmp_path):
    _agree(name, "ort-cpu", CASES[name].onnx_runtime, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_openvino(name, tmp_path):
    if ("s8 with zero point" in name or "s8 read twice, weight" in name) and "amx_int8" in Path(
        "/proc/cpuinfo"
    ).read_text():
        pytest.skip("OpenVINO has no such convolution for AMX")
    _agree(name, "openvino", CASES[name].openvino, tmp_path)


def _agree(name, profile, expected, tmp_path):
    """The main op runs as the table says: so the profile predicts, and so it is seen; and so it is of all other ops."""
    case = CASES[name]
    if expected is None:
        m, outputs = case.make()
        path = m.save(tmp_path / "model.onnx", *outputs)
        onnx.checker.check_model(str(path), full_check=True)
        assert not lint(path, profile).ok
        return
    report = run_and_report(name, profile)
    (main,) = [op for op in report.ops if op.name == case.node]
    assert main.runs == expected, main
    assert main.ran in (expected, None), main
    assert main.counted or expected == "float"
    assert report.differences == (), report
    assert [op for op in report.ops if not op.counted and op.ran not in (None, "float")] == [], report
    assert (main.problem is not None) == (main.counted and expected == "float")


def test_the_matrix_was_seen_and_not_guessed():
    """Of main ops there is a trace in what ran: what is not told again is listed here."""
    unseen = {"ort-cpu": [], "openvino": []}
    for name, case in FIRST.items():
        for profile, expected in (("ort-cpu", case.onnx_runtime), ("openvino", case.openvino)):
            if expected is not None:
                report = run_and_report(name, profile)
                unseen[profile] += [name for op in report.ops if op.name == case.node and op.ran is None]
    assert unseen == {"ort-cpu": ["dynamic as matmul integer"], "openvino": []}


def test_the_documented_rows_are_the_seen_ones():
    """docs/profiles.md shows rows of the matrix by their names."""
    words = {"integers": "integers", "weights": "stored weight", "float": "float", None: "not read"}
    text = (Path(__file__).parents[2] / "docs" / "profiles.md").read_text(encoding="utf-8")
    _, _, table = text.partition("| model | ONNX Runtime | OpenVINO |\n|---|---|---|\n")
    rows = [line.strip("| ").split(" | ") for line in table.partition("\n\n")[0].splitlines()]
    assert len(rows) > 80
    for name, *seen in rows:
        assert seen == [words[CASES[name].onnx_runtime], words[CASES[name].openvino]], name
