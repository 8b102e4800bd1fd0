"""Weights in files of a bounded size: what is written is what is read, and what was damaged is named."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from graphq.artifacts import shards
from graphq.artifacts.shards import INDEX, WEIGHTS, InParts, read_shards, write_shards
from graphq.errors import TargetError

TENSORS = {f"block.{i}.weight": torch.arange(10 * i, 10 * i + 10, dtype=torch.float32) for i in range(5)}  # 40 bytes


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(("limit", "sizes"), [(1, [1] * 5), (79, [1] * 5), (80, [2, 2, 1]), (199, [4, 1])])
def test_files_hold_as_many_tensors_as_their_size_allows(tmp_path: Path, limit: int, sizes: list[int]) -> None:
    write_shards(tmp_path, TENSORS.items(), limit)
    files = [f"model-{i:05}-of-{len(sizes):05}.safetensors" for i in range(1, len(sizes) + 1)]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*files, INDEX])
    assert [len(load_file(tmp_path / file)) for file in files] == sizes
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 200}
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
    assert same(dict(read_shards(tmp_path)), TENSORS)


@pytest.mark.parametrize(
    ("numbered", "files"),
    [(False, ["w.safetensors"]), (True, ["w-00001-of-00001.safetensors", "w.safetensors.index.json"])],
)
def test_files_of_another_name(tmp_path: Path, numbered: bool, files: list[str]) -> None:
    write_shards(tmp_path, TENSORS.items(), 200, "w", numbered=numbered, metadata=None)
    assert sorted(file.name for file in tmp_path.iterdir()) == files
    assert same(dict(read_shards(tmp_path, "w")), TENSORS)
    with safe_open(tmp_path / files[0], "pt") as opened:
        assert opened.metadata() is None
    with pytest.raises(TargetError, match=r"model\.safetensors: no such file"):
        dict(read_shards(tmp_path))


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    write_shards(tmp_path, TENSORS.items(), 200)
    assert [file.name for file in tmp_path.iterdir()] == [WEIGHTS]
    assert same(dict(read_shards(tmp_path)), TENSORS)


def test_no_tensors_are_a_file(tmp_path: Path) -> None:
    write_shards(tmp_path, [])
    assert dict(read_shards(tmp_path)) == {}


def test_tensors_that_share_memory_or_are_not_dense(tmp_path: Path) -> None:
    x = torch.arange(12.0).view(3, 4)
    given = {"a": x, "b": x, "t": x.t(), "row": x[1], "bool": torch.tensor([True, False])}
    write_shards(tmp_path, given.items())
    assert same(dict(read_shards(tmp_path)), given)
    assert (tmp_path / WEIGHTS).stat().st_size < 1000


DTYPES = list(shards._DTYPES)


@pytest.mark.parametrize("spooled", [0, 1 << 20])
def test_a_file_is_the_one_that_safetensors_writes(
    tmp_path: Path, spooled: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_SPOOLED", spooled)
    monkeypatch.setattr(shards, "_COPIED", 5)
    given = {f"{name}.{i}": torch.arange(i + 3).to(dtype) for i, dtype in enumerate(DTYPES) for name in "bä"}
    given |= {"scalar": torch.tensor(1.0), "none": torch.empty(0, 3), 'q"\\': torch.ones(2, 2)}
    write_shards(tmp_path, given.items())
    save_file(given, tmp_path / "wanted", metadata={"format": "pt"})
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / "wanted").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == [WEIGHTS, "wanted"]


def test_a_tensor_in_parts(tmp_path: Path) -> None:
    x = torch.arange(12.0).view(4, 3)
    parts = (part for part in (x[:1], x[1:3], x[3:]))
    write_shards(tmp_path, [("x", InParts(x.dtype, (4, 3), parts)), ("y", x[0])])
    assert same(dict(read_shards(tmp_path)), {"x": x, "y": x[0]})
    with pytest.raises(AssertionError, match="x"):  # never a file that lies about its shapes
        write_shards(tmp_path, [("x", InParts(x.dtype, (4, 3), [x[1:]]))])


@pytest.mark.parametrize("room", [0, 10, 60, 150])
def test_a_full_disk_is_named(tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SPOOLED", 0)
    left = [room]
    write = shards._File._write

    def limited(self: Any, file: Any, data: Any = None) -> None:
        class Full:
            def write(self, data: Any) -> None:
                left[0] -= len(data)
                if left[0] < 0:
                    raise OSError(28, "No space left on device")
                file.write(data)

            flush, fileno = file.flush, file.fileno

        full: Any = Full()
        write(self, full, data)

    monkeypatch.setattr(shards._File, "_write", limited)
    (tmp_path / "out").mkdir()
    with pytest.raises(
        TargetError, match=f"^{re.escape(str(tmp_path))}: cannot be written to: No space left on device$"
    ):
        write_shards(tmp_path / "out", [("a", torch.arange(10, dtype=torch.float64))])


def damaged(change: str, directory: Path) -> None:
    index = directory / INDEX
    data = json.loads(index.read_text())
    first = "model-00001-of-00003.safetensors"
    match change:
        case "missing file":
            (directory / first).unlink()
        case "truncated":
            whole = (directory / first).read_bytes()
            (directory / first).write_bytes(whole[:-1])
        case "header":
            (directory / first).write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
        case "other tensor":
            save_file({"other": torch.ones(1)}, directory / first)
        case "path":
            data["weight_map"]["block.0.weight"] = "../elsewhere.safetensors"
        case "absolute":
            data["weight_map"]["block.0.weight"] = "/etc/passwd"
        case "empty":
            data["weight_map"]["block.0.weight"] = ""
        case "pipe":
            (directory / first).unlink()
            os.mkfifo(directory / first)
        case "directory":
            (directory / first).unlink()
            (directory / first).mkdir()
        case "number":
            data["weight_map"]["block.0.weight"] = 3
        case "no map":
            del data["weight_map"]
        case "twice":
            save_file({**load_file(directory / first), "block.4.weight": torch.ones(1)}, directory / first)
            data["weight_map"]["extra"] = first
        case _:
            raise AssertionError(change)
    index.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing file", "model-00001-of-00003.safetensors: no such file"),
        ("pipe", "model-00001-of-00003.safetensors: no such file"),
        ("directory", "model-00001-of-00003.safetensors: no such file"),
        ("empty", f"{INDEX}: block.0.weight: '' is not the name of a file in the directory"),
        ("truncated", "model-00001-of-00003.safetensors: damaged or incomplete: "),
        ("header", "model-00001-of-00003.safetensors: damaged or incomplete: "),
        (
            "other tensor",
            "model-00001-of-00003.safetensors: the index says otherwise of block.0.weight, block.1.weight",
        ),
        ("path", f"{INDEX}: block.0.weight: '../elsewhere.safetensors' is not the name of a file in the directory"),
        ("absolute", f"{INDEX}: block.0.weight: '/etc/passwd' is not the name of a file in the directory"),
        ("number", f"{INDEX}: block.0.weight: 3 is not the name of a file in the directory"),
        ("no map", f"{INDEX}: damaged: 'weight_map'"),
        ("twice", "model-00001-of-00003.safetensors: the index says otherwise of block.4.weight, extra"),
    ],
)
def test_what_was_damaged_is_named(tmp_path: Path, change: str, message: str) -> None:
    write_shards(tmp_path, TENSORS.items(), 80)
    damaged(change, tmp_path)
    with pytest.raises(TargetError) as caught:
        dict(read_shards(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}/{message}")
