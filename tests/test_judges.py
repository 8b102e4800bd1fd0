"""The judges' table and its runner; the judges themselves run by ``make judges``."""

import ast
import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("graphq_judges", ROOT / "judges" / "judges.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


judges = _load()


def test_every_row_is_whole() -> None:
    assert len({judge.name for judge in judges.JUDGES}) == len(judges.JUDGES)
    text = (ROOT / "judges" / "README.md").read_text(encoding="utf-8")
    for judge in judges.JUDGES:
        assert re.fullmatch("[a-z0-9-]+", judge.name)
        assert all("==" in requirement for requirement in judge.requirements)
        assert f"| `{judge.name}` | {judge.finds} | {judge.takes} |" in text
        assert ast.get_docstring(ast.parse((ROOT / "judges" / judge.script).read_text(encoding="utf-8")))
    scripts = {path.name for path in (ROOT / "judges").glob("*.py")} - {"judges.py", "qdq_parts.py"}
    assert scripts == {judge.script for judge in judges.JUDGES}


@pytest.fixture
def ours(tmp_path: Path) -> Any:
    """A judge that needs nothing of its own, and finds a fault where ``fault`` stands beside its script."""
    (tmp_path / "ours.py").write_text(
        "import sys, torch, graphq, pathlib as p\nsys.exit(7 * (p.Path(__file__).parent / 'fault').exists())"
    )
    return judges.Judge("ours", (), "ours.py", "what we say", "nothing")  # fmt: skip


def test_a_verdict(ours: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert judges.verdict(ours, tmp_path / "place", tmp_path)
    assert re.fullmatch(r"ours: passed \(\d+ s\): what we say\n", capfd.readouterr().out)
    (tmp_path / "fault").touch()
    assert not judges.verdict(ours, tmp_path / "place", tmp_path)
    assert "ours: failed, exit status 7 (" in capfd.readouterr().out


def test_a_script_is_given_its_arguments(ours: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ours.py").write_text("import sys\nprint(sys.argv[1:], flush=True)")
    assert judges.verdict(replace(ours, arguments=("one", "two")), tmp_path / "place", tmp_path)
    assert capfd.readouterr().out.startswith("['one', 'two']\n")


def test_an_environment_apart(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It sees nothing of ours; the script, which runs in this Python, is given its own."""
    client = "import importlib.util as u; print([u.find_spec(n) is not None for n in ('graphq', 'torch')])"
    (tmp_path / "apart.py").write_text(
        f"import graphq, subprocess, sys\nprint(sys.executable, sys.argv[1], flush=True)\n"
        f"sys.exit(subprocess.run([sys.argv[1], '-c', {client!r}], cwd='/').returncode)"
    )
    apart = judges.Judge("apart", (), "apart.py", "what we say", "nothing", apart=True)
    assert judges.verdict(apart, tmp_path / "place", tmp_path)
    said = capfd.readouterr().out.splitlines()
    assert said[0].split() == [sys.executable, str(tmp_path / "place" / "apart" / "bin" / "python")]
    assert said[1] == "[False, False]"
    shared = replace(apart, apart=False)  # another environment, under the same name
    judges.environment(shared, tmp_path / "place")
    assert list((tmp_path / "place" / "apart").rglob("shared.pth"))


def test_an_environment_is_made_anew_when_its_row_changes(ours: Any, tmp_path: Path) -> None:
    python = judges.environment(ours, tmp_path)
    assert python.is_file()
    (tmp_path / "ours" / "kept").touch()
    assert judges.environment(ours, tmp_path) == python
    assert (tmp_path / "ours" / "kept").exists()
    (tmp_path / "ours" / ".installed").write_text("another==1")
    judges.environment(ours, tmp_path)
    assert not (tmp_path / "ours" / "kept").exists()


def test_what_cannot_be_installed_is_no_verdict(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    absent = judges.Judge("absent", (), "absent.py", "what we say", "nothing")
    assert not judges.verdict(absent, tmp_path / "file", tmp_path)
    assert "absent: not installed: " in capfd.readouterr().out


def test_every_judge_is_heard(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [judges.Judge(name, (), f"{name}.py", f"finds {name}", "nothing") for name in ("one", "two", "three")]
    heard: list[str] = []

    def verdict(judge: Any) -> bool:
        heard.append(judge.name)
        return judge.name != "one"

    monkeypatch.setattr(judges, "verdict", verdict)
    assert judges.main([], rows) == 1
    assert heard == ["one", "two", "three"]
    assert judges.main(["three", "two"], rows) == 0
    assert heard[3:] == ["three", "two"]
    assert judges.main(["--list", "two"], rows) == 0
    assert capsys.readouterr().out == "two: finds two (nothing)\n"
    with pytest.raises(SystemExit, match="2"):
        judges.main(["four"], rows)
    assert "four is no judge; there are one, two, three" in capsys.readouterr().err


def _parts() -> Any:
    spec = importlib.util.spec_from_file_location("graphq_qdq_parts", ROOT / "judges" / "qdq_parts.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_a_model_taken_apart_gives_what_the_whole_does(tmp_path: Path) -> None:
    """Each op fed what the whole has for it; a part that is wrong shows alone, by its own number of steps."""
    import onnx
    import onnxruntime
    import torch
    from torch import nn

    import graphq

    parts_of = _parts()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, 2)).eval()
    x = torch.randn(1, 3, 6, 6)
    compiled = graphq.compile(model, profile="qnn-htp", inputs=(x,), calibration=[x])
    compiled.emit("onnx", tmp_path / "out", shapes={"batch": 1})
    whole = onnx.load(str(tmp_path / "out" / "model.onnx"))
    apart, parts = parts_of.take_apart(whole)
    onnx.checker.check_model(apart, full_check=True)
    assert [part.op for part in parts] == ["Conv+Relu", "Conv", "Reshape", "Gemm"]
    given = {whole.graph.input[0].name: x.numpy()}
    held = parts_of.activations(whole, parts, given)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(apart.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def steps(held: dict[str, Any]) -> list[float]:
        found = session.run(None, parts_of.feeds(parts, held, given))
        names = [one.name for one in session.get_outputs()]
        return list(parts_of.steps(parts, held, dict(zip(names, found, strict=True))).values())

    assert max(steps(held)) <= 1e-3
    wrong = dict(held)
    wrong[parts[-1].tensor] = held[parts[-1].tensor] + 3 * parts[-1].scale  # which nothing reads
    assert [round(one) for one in steps(wrong)] == [0, 0, 0, 3]
    fewer, _ = parts_of.take_apart(whole, most_axes=2)
    assert len(fewer.graph.output) == 2
    near = parts_of.on_grids(whole, given)
    assert set(near) == set(given)
    codes = next(node for node in whole.graph.node if node.op_type == "QuantizeLinear" and node.input[0] in given)
    scale = next(float(onnx.numpy_helper.to_array(t)) for t in whole.graph.initializer if t.name == codes.input[1])
    (found,), (own,) = near.values(), given.values()
    assert 0 < abs(found - own).max() <= scale / 2 * 1.001
    assert all(
        abs(a - b).max() <= 1e-5
        for a, b in zip(parts_of.activations(whole, parts, near).values(), held.values(), strict=True)
    )
