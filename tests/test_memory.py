"""Sizes that a user writes, and what is refused because it does not fit."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from graphq import memory
from graphq.errors import SpecError, TargetError
from graphq.memory import bytes_of, check_directory, check_disk, elements_of, free_bytes, in_words


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("1.5 gib", 3 << 29), ("500MB", 500_000_000), ("12", 12), (4096, 4096), ("2KiB", 2048)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "8 pages", "-1", "GiB", "1e9", "0", "0.1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(SpecError, match=r"^memory: "):
        bytes_of(text)


def test_a_directory_that_fits_and_one_that_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(1 << 18, dtype=torch.bfloat16)}, tmp_path / "one.safetensors")
    save_file({"a": torch.zeros(1 << 18)}, tmp_path / "two.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"none")
    assert elements_of(tmp_path) == pytest.approx(1 << 19, rel=0.001)
    check_directory(tmp_path, 4, "so", 3 << 20)
    line = r"^memory: so, which holds the whole model: 2 MiB and more, and 1 MiB are allowed \(memory=, --memory\)$"
    with pytest.raises(SpecError, match=line):
        check_directory(tmp_path, 4, "so", 1 << 20)
    monkeypatch.setattr(memory, "free_bytes", lambda: 1 << 20)
    with pytest.raises(SpecError, match="and 1 MiB are free"):
        check_directory(tmp_path, 4, "so", None)
    monkeypatch.setattr(memory, "free_bytes", lambda: None)
    check_directory(tmp_path, 4, "so", None)  # who knows


def test_what_is_free() -> None:
    free = free_bytes()
    assert free is not None
    assert free > 1 << 20


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=100 if place == tmp_path else 0))
    check_disk(tmp_path / "not" / "there", 100)
    with pytest.raises(TargetError, match=r"there: at least 1 MiB will be written, and 1 MiB are free there$"):
        check_disk(tmp_path / "not" / "there", 101)


def test_words() -> None:
    assert [in_words(size) for size in (1, 5 << 20, 3 << 29)] == ["1 MiB", "5 MiB", "1.5 GiB"]
