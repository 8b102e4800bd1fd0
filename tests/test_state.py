"""Tensors of a module by name."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphq.state import first_names, nbytes, put_tensor, remove_tensor, same_tensors, tensor_of, ties


def test_tensor_of() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert tensor_of(module, "0.weight") is module.get_parameter("0.weight")
    assert tensor_of(module, "1.running_mean") is module.get_buffer("1.running_mean")
    for wrong in ("0.wieght", "7.weight", "weight", "0", "0.weight.data", "0.in_features"):
        with pytest.raises(AttributeError):
            tensor_of(module, wrong)
        with pytest.raises(AttributeError):
            remove_tensor(module, wrong)


def test_put_tensor_makes_the_way_there() -> None:
    module, x = nn.Module(), torch.ones(2)
    put_tensor(module, "a.b.scale", x)
    put_tensor(module, "a.c", x)
    put_tensor(module, "top", x)
    assert list(module.state_dict()) == ["top", "a.c", "a.b.scale"]
    assert all(t.data_ptr() == x.data_ptr() for t in module.state_dict().values())  # shared, not copied


def test_put_tensor_below_a_tensor() -> None:
    with pytest.raises(AttributeError):
        put_tensor(nn.Linear(2, 2), "weight.scale", torch.ones(1))


def test_parameters_stay_parameters_and_lose_their_gradient() -> None:
    module = nn.Module()
    weight = nn.Parameter(torch.ones(2))
    put_tensor(module, "a.weight", weight)
    put_tensor(module, "a.scale", weight * 2)
    assert [name for name, _ in module.named_parameters()] == ["a.weight"]
    assert [name for name, _ in module.named_buffers()] == ["a.scale"]
    assert not tensor_of(module, "a.weight").requires_grad
    assert not tensor_of(module, "a.scale").requires_grad
    assert weight.requires_grad  # the caller's own is left alone


def test_put_tensor_replaces() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    put_tensor(module, "0.weight", nn.Parameter(torch.full((2, 2), 5.0)))
    assert tensor_of(module, "0.weight").unique().tolist() == [5]
    put_tensor(module, "0.weight", torch.full((2, 2), 6.0))  # a buffer in the place of a parameter
    assert tensor_of(module, "0.weight").unique().tolist() == [6]
    assert [name for name, _ in module.named_parameters()] == ["0.bias"]
    put_tensor(module, "0.weight", nn.Parameter(torch.full((2, 2), 7.0)))
    assert [name for name, _ in module.named_buffers()] == []
    assert set(module.state_dict()) == {"0.weight", "0.bias"}


def test_put_tensor_keeps_the_order_of_what_it_replaces() -> None:
    module = nn.Linear(2, 2)
    put_tensor(module, "weight", nn.Parameter(torch.zeros(2, 2)))
    assert list(module.state_dict()) == ["weight", "bias"]


def test_remove_tensor() -> None:
    module = nn.Sequential(nn.Linear(2, 3))
    remove_tensor(module, "0.weight")
    assert list(module.state_dict()) == ["0.bias"]
    with pytest.raises(AttributeError):
        remove_tensor(module, "0.weight")


def test_nbytes() -> None:
    assert nbytes(torch.empty(3, 5, dtype=torch.int8)) == 15
    assert nbytes(torch.empty(3, 5, dtype=torch.bfloat16)) == 30
    assert nbytes(torch.empty(3, 5, dtype=torch.float64)) == 120
    assert nbytes(torch.empty(0, 5)) == 0
    assert nbytes(torch.empty(1, 5).expand(3, 5)) == 60  # elements, however they are stored
    assert nbytes(FakeTensorMode().from_tensor(torch.empty(3, 5))) == 60


def test_ties() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 4))
    assert ties(module) == {}
    module[1].weight = module[0].weight
    assert ties(module) == {"0.weight": ("1.weight",), "1.weight": ("0.weight",)}
    top, bottom = tensor_of(module, "0.bias").detach().chunk(2)  # parts of one storage
    module.register_buffer("top", top)
    module.register_buffer("bottom", bottom)
    assert (ties(module).get("top"), ties(module).get("bottom")) == (("0.bias",), None)
    module.register_buffer("turned", tensor_of(module, "0.weight").detach().T)
    assert ties(module)["turned"] == ("0.weight", "1.weight")
    for name in ("none", "nothing"):
        module.register_buffer(name, bottom[:0])
    assert "none" not in ties(module), "no numbers to share"
    with FakeTensorMode():
        fake = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        fake[1].bias = fake[0].bias
    assert ties(fake) == {"0.bias": ("1.bias",), "1.bias": ("0.bias",)}


def test_same_tensors() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    assert same_tensors(module) == {}
    module[1].weight = module[0].weight
    module[2].weight = nn.Parameter(tensor_of(module, "0.weight").detach().t())  # the same numbers, the other way round
    top, _ = tensor_of(module, "0.bias").detach().chunk(2)
    module.register_buffer("top", top)
    assert same_tensors(module) == {"1.weight": "0.weight"}
    w = torch.empty(3, 5, dtype=torch.int8)
    names = {"a": w, "bytes": w.view(torch.uint8), "row": w[0], "copy": w.clone(), "empty": w[:0], "none": w[:0]}
    assert first_names(names) == {"bytes": "a"}
