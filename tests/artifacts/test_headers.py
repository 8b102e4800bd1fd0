"""Headers of safetensors files: what they say of tensors, and each damage that the format's own list has."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graphq.artifacts.headers import StoredTensor, read_headers
from graphq.artifacts.shards import WEIGHTS, read_shards, write_shards
from graphq.errors import TargetError


def test_what_headers_say(tmp_path: Path) -> None:
    given = {
        "a": torch.ones(2, 3, dtype=torch.bfloat16),
        "b": torch.ones(4, dtype=torch.int32),
        "c": torch.ones(5).to(torch.float8_e4m3fn),
        "d": torch.ones(7, dtype=torch.bool),
        "e": torch.ones((), dtype=torch.int64),
    }
    write_shards(tmp_path, given.items())
    assert read_headers(tmp_path) == {
        "a": StoredTensor(WEIGHTS, "BF16", (2, 3), 12),
        "b": StoredTensor(WEIGHTS, "I32", (4,), 16),
        "c": StoredTensor(WEIGHTS, "F8_E4M3", (5,), 5),
        "d": StoredTensor(WEIGHTS, "BOOL", (7,), 7),
        "e": StoredTensor(WEIGHTS, "I64", (), 8),
    }


def test_several_files(tmp_path: Path) -> None:
    write_shards(tmp_path, {name: torch.ones(10) for name in "abc"}.items(), 80)
    assert {name: one.file[:11] for name, one in read_headers(tmp_path).items()} == {
        "a": "model-00001", "b": "model-00001", "c": "model-00002"
    }  # fmt: skip


ONE = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def raw(header: object, data: bytes = bytes(8), size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


# https://huggingface.co/docs/safetensors: the limits of the format, each broken.
DAMAGED = {
    "empty": b"",
    "no header": struct.pack("<Q", 8),
    "header larger than the file": raw(ONE, size=1 << 40),
    "header of more than 100 MB": raw(ONE, size=200_000_000),
    "header is no JSON": raw(b"{" * 16),
    "header is no text": raw(b"\xff\xfe\xfd\xfc"),
    "header is a list": raw([1, 2]),
    "does not begin with a brace": raw(b" " + json.dumps(ONE).encode()),
    "tensor twice": raw(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    ),
    "unknown dtype": raw({"a": {"dtype": "Q9", "shape": [2], "data_offsets": [0, 8]}}),
    "shape of another size": raw({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
    "negative size": raw({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}),
    "sizes whose product overflows": raw({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}}),
    "offsets the wrong way": raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}),
    "overlapping": raw({**ONE, "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)),
    "a hole": raw({**ONE, "b": {"dtype": "F32", "shape": [2], "data_offsets": [12, 20]}}, bytes(20)),
    "data beyond the file": raw(ONE, bytes(4)),
    "data that no tensor has": raw(ONE, bytes(12)),
    "metadata that is no text": raw({"__metadata__": {"format": 3}, **ONE}),
    "keys that are missing": raw({"a": {"dtype": "F32"}}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named(tmp_path: Path, case: str) -> None:
    (tmp_path / WEIGHTS).write_bytes(DAMAGED[case])
    for read in (read_headers, lambda path: dict(read_shards(path))):
        with pytest.raises(TargetError) as caught:
            read(tmp_path)
        assert str(caught.value).startswith(f"{tmp_path}/{WEIGHTS}: damaged or incomplete: ")


def test_the_same_file_undamaged(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(raw(ONE))
    assert read_headers(tmp_path) == {"a": StoredTensor(WEIGHTS, "F32", (2,), 8)}


def test_files_that_are_missing_or_say_otherwise(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=f"{WEIGHTS}: no such file"):
        read_headers(tmp_path)
    write_shards(tmp_path, {name: torch.ones(10) for name in "abc"}.items(), 80)
    save_file({"c": torch.ones(10), "a": torch.ones(10)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(TargetError, match=r"model-00002-of-00002\.safetensors: the index says otherwise of a$"):
        read_headers(tmp_path)
