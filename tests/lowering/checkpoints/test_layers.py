"""The layers of a checkpoint: what they are called, and what is none of them."""

import torch
from torch import nn

from graphq.lowering.checkpoints.layers import float_linears, rename
from graphq.state import tensor_of
from tests.models import MLP, capture


def test_tensors_that_change_names_with_one_another() -> None:
    gm = capture(nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)), torch.ones(2, 4))
    x = torch.arange(8.0).view(2, 4)
    wanted, (first, second) = gm(x)[0], (tensor_of(gm, f"{i}.weight").clone() for i in range(2))
    rename(gm, {"0.weight": "1.weight", "1.weight": "0.weight"})
    assert torch.equal(tensor_of(gm, "1.weight"), first)
    assert torch.equal(tensor_of(gm, "0.weight"), second)
    assert torch.equal(gm(x)[0], wanted)
    assert float_linears(gm) == ["1", "0"]


def test_names_that_stay() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    before = {name: t.clone() for name, t in gm.state_dict().items()}
    rename(gm, {"up.weight": "up.weight"})
    assert gm.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in gm.state_dict().items())
