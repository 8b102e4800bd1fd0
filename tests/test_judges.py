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
