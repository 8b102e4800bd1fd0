"""A graph that tests share is the one that a capture of its own gives, on the model's own tensors."""

from typing import Any

import pytest
import torch

from graphq.capture import hugging_face
from graphq.capture.hugging_face import capture_pretrained
from graphq.capture.source import KEY
from graphq.ir.edit import has_data
from graphq.ir.text import dump
from graphq.state import tensor_of
from tests import shared_captures
from tests.models import random_inputs, tiny, tiny_config
from tests.shared_captures import captured_once


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_captures, "_KEPT", {})


@pytest.mark.parametrize("family", ["gemma3", "resnet"])
def test_a_copy_is_what_a_capture_gives(family: str) -> None:
    first, second = tiny(family), tiny(family)
    with torch.no_grad():
        for tensor in second.state_dict().values():
            tensor.mul_(2)
    with captured_once():
        capture_pretrained(first)
        found = capture_pretrained(second)
    assert len(shared_captures._KEPT) == 1
    wanted = capture_pretrained(second)
    assert dump(found) == dump(wanted)
    assert found.meta[KEY] == wanted.meta[KEY]
    assert found.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(tensor_of(found, name), tensor)
        if not name.startswith("constants."):
            assert tensor_of(found, name).data_ptr() == tensor.data_ptr()
    inputs = random_inputs(wanted)
    with torch.no_grad():
        assert torch.equal(found(*inputs)[0], wanted(*inputs)[0])


def small(**options: Any) -> Any:
    return tiny("gpt2", n_layer=1, **options)


def test_what_decides_a_graph_is_captured_anew() -> None:
    with captured_once():
        made = [
            capture_pretrained(small()),
            capture_pretrained(small(activation_function="relu")),
            capture_pretrained(small().double()),
            capture_pretrained(small(), cache=False),
            capture_pretrained(small(), shapes={"batch": 2}),
        ]
        for options in ({}, {"activation_function": "relu"}, {}):
            cls, config = tiny_config("gpt2", n_layer=1, **options)
            made.append(hugging_face.capture_config(config, cls))
    assert len({dump(gm) for gm in made[:5]}) == 5
    assert len({dump(gm) for gm in made[5:]}) == 2  # of three
    assert len(shared_captures._KEPT) == 7


@pytest.mark.parametrize("first", ["model", "configuration"])
def test_a_model_and_its_configuration_are_captured_once(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever comes first: the one graph is on the model's tensors, ties included, the other on none."""
    exports: list[object] = []
    export = hugging_face.export_flat
    monkeypatch.setattr(hugging_face, "export_flat", lambda *args: (exports.append(args), export(*args))[1])
    model, (cls, config) = small(), tiny_config("gpt2", n_layer=1)
    with captured_once():
        made = {
            "model": lambda: capture_pretrained(model),
            "configuration": lambda: hugging_face.capture_config(config, cls),
        }
        gms = {name: made[name]() for name in sorted(made, key=lambda name: name != first)}
    assert len(exports) == 1
    assert dump(gms["model"]) == dump(gms["configuration"]) == dump(capture_pretrained(model))
    held = gms["model"].state_dict()
    assert all(
        tensor.data_ptr() == held[name].data_ptr() for name, tensor in model.state_dict().items() if name in held
    )
    assert has_data(gms["model"])
    assert not has_data(gms["configuration"])


def test_a_model_with_a_forward_of_its_own_is_captured_anew() -> None:
    with captured_once():
        before = capture_pretrained(small())
        model = small()
        model.lm_head.forward = torch.zeros_like
        after = capture_pretrained(model)
    assert dump(before) != dump(after)


def test_a_copy_is_changed_alone() -> None:
    with captured_once():
        cls, config = tiny_config("gpt2", n_layer=1)
        made = [hugging_face.capture_config(config, cls) for _ in range(2)]
        before = dump(made[1])
        first = next(iter(made[0].graph.nodes))
        first.meta["graphq.by"] = ("test",)
        made[0].graph.output_node().args = ([first],)
        again = hugging_face.capture_config(config, cls)
    assert dump(made[1]) == dump(again) == before
    assert all("graphq.by" not in node.meta for node in again.graph.nodes)
