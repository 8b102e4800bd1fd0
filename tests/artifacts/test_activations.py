"""What parts give is the same from memory and from files, and files go when nothing is in them any more."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graphq.artifacts.activations import Activations
from graphq.data.masks import ALL, MaskedBatch, Validity
from graphq.errors import TargetError

MASK = torch.tensor([[True, False, True], [True, True, False]])


def values(batch: int) -> dict[str, tuple[Any, Validity]]:
    x = torch.arange(6.0).view(3, 2) + batch
    return {
        "x": (x.t(), Validity(MASK, ("softmax mixes them",))),  # strided otherwise than a file holds it
        "same": (x, ALL),
        "count": (3 + batch, ALL),
        "scale": (torch.tensor(2.0 * batch), Validity(None, ("mean",))),
    }


def filled(folder: Path | None, in_memory: bool) -> Activations:
    made = Activations([{"tokens": (torch.tensor([n]), ALL)} for n in range(2)], folder, in_memory)
    batches = [values(0), values(1)]
    made.add(list(batches[0]), (MaskedBatch([v for v, _ in b.values()], [m for _, m in b.values()]) for b in batches))
    return made


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("is_filed", [True, False])
@pytest.mark.parametrize("is_restored", [True, False])
def test_what_was_given_is_given(tmp_path: Path, in_memory: bool, is_filed: bool, is_restored: bool) -> None:
    made = filled(tmp_path if is_filed else None, in_memory)
    assert len(list(tmp_path.iterdir())) == 2 * is_filed
    if is_restored and is_filed:
        told = json.loads(json.dumps(made.to_json()))
        made = Activations([{"tokens": (torch.tensor([n]), ALL)} for n in range(2)], tmp_path, in_memory)
        made.restore(told)
    for batch in range(2):
        found = made.of(batch, ["tokens", "x", "same", "count", "scale"])
        wanted = values(batch)
        assert torch.equal(found[0], torch.tensor([batch]))
        for value, validity, (given, valid) in zip(found[1:], found.validity[1:], wanted.values(), strict=True):
            assert type(value) is type(given)
            assert torch.equal(value, given) if isinstance(given, torch.Tensor) else value == given
            assert not isinstance(value, torch.Tensor) or value.is_contiguous()
            assert (validity.mask is None) == (valid.mask is None)
            assert validity.mask is None or torch.equal(validity.mask, MASK)
            assert validity.stops == valid.stops
    assert bool(made._held[0]) == (in_memory or not is_filed)


def test_names_change_and_files_go(tmp_path: Path) -> None:
    made = filled(tmp_path, in_memory=False)
    made.keep({"x": "y", "same": "x"}, ["count"])
    made.add(["later"], [MaskedBatch([torch.ones(1)], [ALL])] * 2)
    made.remove_files()
    assert torch.equal(made.of(1, ["y"])[0], values(1)["x"][0])
    assert torch.equal(made.of(1, ["x"])[0], values(1)["same"][0])
    with pytest.raises(KeyError):
        made.of(1, ["count"])
    assert len(list(tmp_path.iterdir())) == 4
    made.keep({}, ["x", "y", "scale"])
    assert len(list(tmp_path.iterdir())) == 4  # until it is said that they may go
    made.remove_files()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00001-00000.safetensors", "00001-00001.safetensors"]


def test_what_is_restored_must_be_there(tmp_path: Path) -> None:
    told = filled(tmp_path, in_memory=True).to_json()
    (tmp_path / "of-another-try.safetensors").write_bytes(b"")
    again = Activations([{}, {}], tmp_path, in_memory=True)
    again.restore(told)
    assert not (tmp_path / "of-another-try.safetensors").exists()
    with pytest.raises(TargetError, match="is of 2 batches, not of 1"):
        Activations([{}], tmp_path, in_memory=True).restore(told)
    (tmp_path / "00000-00001.safetensors").unlink()
    with pytest.raises(TargetError, match=r"00000-00001\.safetensors: no such file"):
        Activations([{}, {}], tmp_path, in_memory=False).restore(told)
