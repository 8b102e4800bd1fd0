"""Records on the command line: each command that calibrates takes the field of their text."""

from pathlib import Path

import pytest

from tests.checkpoints import save_checkpoint
from tests.test_cli import graphq_


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize(
    "command",
    [
        ["compile", "MODEL", "--spec", "w8a8", "--target", "torch", "--out", "OUT"],
        ["dump", "MODEL", "--spec", "w8a8"],
        ["diff", "MODEL", "w8a8"],
        ["report", "MODEL", "--spec", "w8a8", "--json"],
        ["search", "MODEL", "--options", "w8a8,w4a16", "--budget", "6bits", "--out", "OUT"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_that_reads_records_takes_their_field(command: list[str], model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "w1"}\n')
    places = {"MODEL": model, "OUT": tmp_path / "out"}
    given = [places.get(one, one) for one in command]
    more = ["--calibration", tmp_path / "a.jsonl", "--calibration-field", "prompt"]
    result = graphq_(*given, *more, status=1)
    assert "a.jsonl: line 1: no field prompt; it has text (--calibration-field)\n" in result.stderr


def test_options_of_records_without_any(model: Path, tmp_path: Path) -> None:
    command = ["compile", model, "--spec", "w8a8", "--target", "torch", "--out", tmp_path / "out"]
    for option, value in (("--calibration-field", "x"), ("--shuffle", 0), ("--windows", "padded")):
        assert f"Invalid value for {option}: is of records" in graphq_(*command, option, value, status=2).stderr
    assert not (tmp_path / "out").exists()
