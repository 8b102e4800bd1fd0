"""A compiled model is called like its source: the same inputs by position and name, the same structure of outputs."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphq
from graphq.capture.modules import capture_module
from graphq.capture.source import source_of
from graphq.errors import GraphqError, SpecError
from graphq.runtime.model import CompiledModel
from tests import models
from tests.models import MLP, Tied, tiny


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Structured(nn.Module):
    """One linear and an output of the wanted structure."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.kind = kind

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        y = self.up(x) * mask
        return {"tensor": y, "tuple": (y, y.sum(-1)), "dict": {"y": y, "total": y.sum(-1)}}[self.kind]


@pytest.fixture(scope="module", params=["tensor", "tuple", "dict"])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, CompiledModel]:
    """A source and its graph, in which nothing is quantized."""
    torch.manual_seed(0)
    source = Structured(request.param)
    return source, CompiledModel(capture_module(source, (floats(2, 8), floats(2, 8))))


def test_it_returns_what_the_source_returned(pair: tuple[nn.Module, CompiledModel]) -> None:
    source, model = pair
    x, mask = floats(5, 8), floats(5, 8, seed=1)
    with torch.no_grad():
        expected = source(x, mask)
        for found in (model(x, mask), model(x, mask=mask), model(mask=mask, x=x)):
            assert type(found) is type(expected)
            if isinstance(expected, dict):
                assert list(found) == list(expected)
                found, wanted = list(found.values()), list(expected.values())
            else:
                found, wanted = (found, expected) if isinstance(expected, tuple) else ((found,), (expected,))
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((floats(2, 8),) * 3, {}, TypeError, "forward() takes 2 inputs, 3 were given: x, mask"),
        (
            (floats(2, 8),),
            {"masks": floats(2, 8)},
            TypeError,
            "forward() was captured without the argument masks; it takes x, mask",
        ),
        (
            (floats(2, 8), floats(2, 8)),
            {"mask": floats(2, 8)},
            TypeError,
            "forward() got mask twice, by position and by name",
        ),
        ((), {}, SpecError, "inputs: none given; the model takes x, mask"),
        ((floats(2, 8),), {}, SpecError, "inputs: mask is missing; the model takes x, mask"),
        ((floats(2, 7), floats(2, 8)), {}, SpecError, "inputs: x has shape (2, 7), expected (batch = 2, 8)"),
        ((floats(2, 8), floats(3, 8)), {}, SpecError, "inputs: mask has shape (3, 8), expected (batch = 2, 8)"),
        (
            (torch.ones(2, 8).long(), floats(2, 8)),
            {},
            SpecError,
            "inputs: x is torch.int64, the model takes torch.float32",
        ),
    ],
)
def test_wrong_calls(
    pair: tuple[nn.Module, CompiledModel],
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error) as caught:
        pair[1](*args, **kwargs)
    assert str(caught.value).startswith(message)


def test_masks_positions_and_caches_may_be_left_out() -> None:
    model = CompiledModel(models._captured("llama"))
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        expected = tiny("llama")(input_ids=ids).logits
        whole = model(input_ids=ids)
        assert torch.equal(model(ids)["logits"], expected)
        assert list(whole) == ["logits", *(f"present.{i}.{part}" for i in (0, 1) for part in ("key", "value"))]
        first = model(ids[:, :3])
        past = {k.replace("present", "past_key_values"): v for k, v in first.items() if k != "logits"}
        second = model(ids[:, 3:], **past)  # the mask covers the past, positions go on
        assert second["present.0.key"].shape[2] == 5
        assert (
            second["logits"] - expected[:, 3:]
        ).abs().max() <= 1e-6 * expected.abs().max()  # other shapes, other sums
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
        assert not torch.equal(model(ids, attention_mask=mask)["logits"], expected)


def test_its_tensors_have_the_names_of_the_source() -> None:
    compiled = graphq.compile(MLP(), {"graphq": 1, "weight": "int8/channel"}, inputs=floats(2, 8)).module
    assert set(compiled.state_dict()) == {
        f"{layer}.{name}" for layer in ("up", "down") for name in ("weight", "weight_scale", "bias")
    }
    assert compiled.source == source_of(compiled.graph)
    assert not compiled.training


def test_copies_are_independent() -> None:
    compiled = graphq.compile(MLP(), {"graphq": 1, "weight": "int8/channel"}, inputs=floats(2, 8)).module
    x = floats(3, 8)
    before = compiled(x)
    copied = copy.deepcopy(compiled)
    assert torch.equal(copied(x), before)
    with torch.no_grad():
        for tensor in copied.state_dict().values():
            tensor.zero_()
    assert copied(x).abs().max() == 0
    assert torch.equal(compiled(x), before)


def test_a_state_dict_is_loaded() -> None:
    spec = {"graphq": 1, "weight": "int4/asym/g4"}
    torch.manual_seed(1)
    first, second = (graphq.compile(MLP(), spec, inputs=floats(2, 8)).module for _ in range(2))
    x = floats(3, 8)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_only_causal_language_models_generate() -> None:
    compiled = graphq.compile(Tied(), {"graphq": 1, "weight": "int8/channel"}, inputs=torch.ones(2, 3).long())
    with pytest.raises(GraphqError) as caught:
        compiled.generate(torch.ones(1, 3).long())
    assert str(caught.value) == (
        "generate: this model is not a causal language model captured with its key/value cache"
    )
