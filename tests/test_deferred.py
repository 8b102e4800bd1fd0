"""Tensors that are made when they are read give what they stand for, whole, in parts and one expert at a time."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from graphq import deferred
from graphq.deferred import Deferred, InFile, Joined, Made, Stacked
from graphq.errors import GraphError

W = {name: torch.randn(6, 4, generator=torch.Generator().manual_seed(i)).bfloat16() for i, name in enumerate("abcd")}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, InFile]:
    save_file(W | {"scalar": torch.tensor(3.0)}, tmp_path / "w.safetensors")
    return {name: InFile(tmp_path / "w.safetensors", name, (6, 4), torch.bfloat16, torch.float32) for name in W}


def experts(files: dict[str, InFile]) -> tuple[Deferred, torch.Tensor]:
    """Two experts of twelve rows, each of two tensors, and the same in memory."""
    made = Stacked((Joined((files["a"], files["b"])), Joined((files["c"], files["d"]))))
    whole = torch.stack([torch.cat([W["a"], W["b"]]), torch.cat([W["c"], W["d"]])]).float()
    return made, whole


def test_a_tensor_of_a_file_is_read_anew(files: dict[str, InFile]) -> None:
    first = files["a"].read()
    assert torch.equal(first, W["a"].float())
    first.fill_(7)
    assert torch.equal(files["a"].read(), W["a"].float())
    plain = files["a"].plain().read()
    assert plain.dtype == torch.bfloat16
    assert torch.equal(plain, W["a"])
    scalar = InFile(files["a"].file, "scalar", (), torch.float32, torch.float64)
    assert torch.equal(scalar.read(), torch.tensor(3.0, dtype=torch.float64))
    assert [torch.equal(part, scalar.read()) for part in scalar.pieces()] == [True]


@pytest.mark.parametrize(
    ("piece", "multiple", "rows"), [(8, 1, [2, 2, 2]), (4, 4, [4, 2]), (1, 1, [1] * 6), (24, 1, [6])]
)
def test_rows_in_parts(
    piece: int, multiple: int, rows: list[int], files: dict[str, InFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deferred, "PIECE", piece)
    parts = list(files["b"].pieces(multiple))
    assert [len(part) for part in parts] == rows
    assert torch.equal(torch.cat(parts), W["b"].float())
    some = files["b"].narrowed(0, 1, 3)
    assert torch.equal(torch.cat(list(some.pieces(multiple))), W["b"][1:4].float())


def test_a_file_that_changes_is_named(files: dict[str, InFile]) -> None:
    one = files["a"]
    save_file({"a": W["a"].float()}, one.file)
    with pytest.raises(GraphError, match=r"w\.safetensors: a: was changed while it was compiled$"):
        one.read()
    save_file({"a": W["a"][:2]}, one.file)
    with pytest.raises(GraphError, match=r"w\.safetensors: a: was changed while it was compiled$"):
        one.read()
    save_file({"b": W["a"]}, one.file)
    with pytest.raises(GraphError, match=r"w\.safetensors: a: cannot be read any more: "):
        one.read()
    one.file.write_bytes(one.file.read_bytes()[:-4])
    with pytest.raises(GraphError, match=r"w\.safetensors: b: cannot be read any more: "):
        files["b"].read()
    one.file.unlink()
    with pytest.raises(GraphError, match=r"w\.safetensors: a: cannot be read any more: "):
        one.read()


def test_experts_and_halves_of_their_rows(files: dict[str, InFile]) -> None:
    made, whole = experts(files)
    assert made.shape == (2, 12, 4)
    assert torch.equal(made.read(), whole)
    assert torch.equal(made.member(1).read(), whole[1])
    for start, own in ((0, ("a", "c")), (6, ("b", "d"))):
        half = made.narrowed(1, start, 6)
        assert half == Stacked(tuple(files[name] for name in own))  # nothing else is read
        assert torch.equal(half.read(), whole[:, start : start + 6])
    assert torch.equal(made.narrowed(1, 3, 6).read(), whole[:, 3:9])
    assert torch.equal(made.narrowed(2, 1, 2).read(), whole[:, :, 1:3])
    assert torch.equal(made.narrowed(0, 1, 1).read(), whole[1:])


def test_what_is_made_of_others(files: dict[str, InFile]) -> None:
    made, whole = experts(files)
    twice = made.changed(lambda x: x * 2)
    assert twice.shape == (2, 12, 4)
    assert torch.equal(twice.read(), whole * 2)
    assert torch.equal(twice.member(1).read(), whole[1] * 2)
    assert torch.equal(twice.narrowed(1, 2, 5).read(), whole[:, 2:7] * 2)
    assert [torch.equal(part, whole * 2) for part in twice.pieces()] == [True]


def test_the_dtype_that_files_hold(files: dict[str, InFile]) -> None:
    made, whole = experts(files)
    plain = made.plain()
    assert plain is not None
    assert plain.read().dtype == torch.bfloat16
    assert torch.equal(plain.read().float(), whole)
    assert made.dtypes() == {torch.bfloat16}
    computed = made.changed(lambda x: x)
    assert computed.plain() is None
    assert computed.dtypes() == frozenset()
    assert Joined((files["a"], Made((1, 4), lambda: torch.zeros(1, 4)))).plain() is None
