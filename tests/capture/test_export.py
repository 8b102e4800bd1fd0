"""Exports spend no time on what they do not need; what they turn off for that is on again afterwards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphq.capture.export import block_lists, lean_export
from graphq.capture.hugging_face import capture_config
from graphq.capture.modules import capture_module
from graphq.ir.edit import fake_mode_of
from tests.models import MLP, tiny_config


def without_weights() -> fx.GraphModule:
    cls, config = tiny_config("bert", num_hidden_layers=1)
    return capture_config(config, cls)


@pytest.mark.parametrize("capture", [lambda: capture_module(MLP(), torch.ones(2, 8)), without_weights])
def test_no_result_of_fake_tensors_is_kept(capture: Callable[[], fx.GraphModule]) -> None:
    before = FakeTensorMode.cache_misses
    gm = capture()
    assert FakeTensorMode.cache_misses == before
    assert not fake_mode_of(gm).cache_enabled
    assert FakeTensorMode().cache_enabled  # others keep theirs


def test_ops_are_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._export import utils

    calls: list[str] = []
    read: Any = utils._materialize_cpp_cia_ops
    monkeypatch.setattr(utils, "_materialize_cpp_cia_ops", spy := lambda: (calls.append("listed"), read())[1])
    for count in (1, 2):
        with lean_export():
            found = utils._collect_all_valid_cia_ops()
            assert utils._collect_all_valid_cia_ops() == found
        assert len(calls) == count
        assert utils._materialize_cpp_cia_ops is spy
    assert utils._collect_all_valid_cia_ops() == found
    assert len(calls) > 2
    with pytest.raises(KeyError), lean_export():
        raise KeyError
    assert utils._materialize_cpp_cia_ops is spy


class Layer(nn.Module):
    """A base that two kinds of layers of a hybrid share."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2, 2)


class Attention(Layer):
    pass


class Recurrence(Layer):
    pass


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2, 2)


class PreTrainedModel(nn.Module):
    """As transformers' models share one, which does not make them blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(2, 2)


class Text(PreTrainedModel):
    pass


class Vision(PreTrainedModel):
    pass


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ([Layer(), Layer()], ("0",)),
        ([Attention(), Recurrence(), Attention()], ("0",)),
        ([Layer(), Recurrence()], ("0",)),
        ([Attention(), Other()], ()),
        ([Text(), Vision()], ()),
        ([nn.Sequential(nn.Linear(2, 2)), Attention()], ()),
        ([nn.Linear(2, 2), nn.Linear(2, 2)], ()),
        ([], ()),
    ],
)
def test_lists_of_blocks(members: list[nn.Module], found: tuple[str, ...]) -> None:
    assert block_lists(nn.Sequential(nn.ModuleList(members))) == found
