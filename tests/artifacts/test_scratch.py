"""What is set aside is the same when it is read again, and leaves nothing on the disk."""

import gc
from pathlib import Path

import torch
from torch import nn

from graphq.artifacts.scratch import SCRATCH, give_scratch, set_aside
from graphq.state import as_parameter, deferred_of, held_tensor, put_tensor, same_tensors, tensor_of
from tests.models import MLP, capture

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def test_tensors_set_aside_are_read_again(tmp_path: Path) -> None:
    gm = capture(MLP(), X)
    large = torch.arange(3000.0).view(50, 60)
    put_tensor(gm, "a.weight", as_parameter(large))
    put_tensor(gm, "b.codes", large.to(torch.int16).t())
    put_tensor(gm, "c.again", large)
    set_aside(gm, ["a.weight"])  # without a folder
    assert deferred_of(held_tensor(gm, "a.weight")) is None
    give_scratch(gm, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert gm.meta[SCRATCH] == str(folder)
    names = ("a.weight", "b.codes", "c.again")
    set_aside(gm, [*names, "up.weight"])
    set_aside(gm, names)  # once is enough
    assert len(list(folder.iterdir())) == 1
    assert [deferred_of(held_tensor(gm, name)) is None for name in (*names, "up.weight")] == [False] * 3 + [True]
    assert torch.equal(tensor_of(gm, "a.weight"), large)
    assert isinstance(tensor_of(gm, "a.weight"), nn.Parameter)
    assert torch.equal(tensor_of(gm, "b.codes"), large.to(torch.int16).t())
    assert same_tensors(gm)["c.again"] == "a.weight"
    put_tensor(gm, "a.weight", as_parameter(large + 1))
    set_aside(gm, ["a.weight"])
    assert torch.equal(tensor_of(gm, "a.weight"), large + 1)
    assert torch.equal(tensor_of(gm, "c.again"), large)
    del gm
    gc.collect()  # graphs are cycles
    assert list(tmp_path.iterdir()) == []
