"""Whoever listens is told of each step when it is done."""

import json

import pytest

from graphq.cli import progress as shown
from graphq.progress import Progress, in_steps, listening


def test_each_step_is_told_when_it_is_done() -> None:
    told: list[Progress] = []
    seen: list[tuple[str, int]] = []
    with listening(told.append):
        seen += [(item, len(told)) for item in in_steps("blocks", "abc")]
        assert list(in_steps("tensors", ())) == []
    assert seen == [("a", 0), ("b", 1), ("c", 2)]
    assert [(step.kind, step.done, step.total) for step in told] == [("blocks", n, 3) for n in (1, 2, 3)]
    assert list(in_steps("blocks", "ab")) == ["a", "b"]
    assert len(told) == 3  # nobody listens any more


def test_what_is_left() -> None:
    step = Progress("blocks", 2, 6, 10.0)
    assert step.left == 20
    assert str(step).startswith("blocks: 2 of 6, 10 s, 20 s left")
    assert "left" not in str(Progress("blocks", 6, 6, 10.0))
    found = step.to_json()
    assert found.pop("peak_bytes") > 0
    assert found == {"progress": "blocks", "done": 2, "total": 6, "seconds": 10.0, "left": 20.0}
    assert Progress("blocks", 0, 6, 1.0).left is None


@pytest.mark.parametrize("as_json", [False, True])
def test_lines_beside_no_terminal(
    as_json: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shown, "_EVERY", 0.0)
    with shown.shown_progress(as_json):
        list(in_steps("tensors", "ab"))
    first, second = capsys.readouterr().err.splitlines()
    if as_json:
        assert [json.loads(line)["done"] for line in (first, second)] == [1, 2]
    else:
        assert first.startswith("tensors: 1 of 2, 0 s, 0 s left")
        assert second.startswith("tensors: 2 of 2, 0 s")


def test_short_work_has_no_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with shown.shown_progress(False):
        list(in_steps("tensors", "ab"))
    assert capsys.readouterr().err == ""
