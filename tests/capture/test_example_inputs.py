"""Example inputs: their names and order, arguments without names, wrapped modules, and examples that cannot be."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphq
from graphq.capture.modules import capture_module
from graphq.capture.source import source_of
from graphq.errors import GraphError
from tests.models import MLP, Tied

OWN_CODE = str(Path(graphq.__file__).parent)


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(model: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return model()


class Difference(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a - 2 * b


def test_a_dicts_order_is_not_that_of_the_inputs() -> None:
    x, y = floats(3, 8), floats(3, 8, seed=1)
    assert torch.equal(capture_module(Difference(), {"b": y, "a": x})(x, y)[0], x - 2 * y)


class ByPosition(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor | None = None, /, z: Tensor | None = None) -> Tensor:
        return self.up(x) + (0 if y is None else 2 * y) - (0 if z is None else z)


def test_arguments_without_names() -> None:
    model = made(ByPosition).eval()
    x, y, z = floats(3, 8), floats(3, 8, seed=1), floats(3, 8, seed=2)
    with torch.no_grad():
        assert torch.equal(capture_module(model, x)(x)[0], model(x))
        assert torch.equal(capture_module(model, (x, y, z))(x, y, z)[0], model(x, y, z))
        assert torch.equal(capture_module(model, {"z": z, "x": x})(x, z)[0], model(x, z=z))
    with pytest.raises(GraphError, match=r"^inputs: ByPosition.forward takes x, y by position alone: give x, too$"):
        capture_module(model, {"y": y})


class Endless(nn.Module):
    def forward(self, *xs: Tensor) -> Tensor:
        return xs[0]


class NamesOnly(nn.Module):
    def forward(self, *, x: Tensor) -> Tensor:
        return x + 1


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (
            Endless,
            (floats(2, 8),),
            "Endless.forward takes any number of tensors (*xs), which have no names for a graph",
        ),
        (Endless, {"xs": floats(2, 8)}, "Endless.forward takes any number of tensors (*xs), which have no names for a"),
        (NamesOnly, (floats(2, 8),), "NamesOnly.forward takes none by position; pass a dict by argument name"),
    ],
)
def test_inputs_that_have_no_position_or_name(model: Callable[[], nn.Module], inputs: Any, message: str) -> None:
    with pytest.raises(GraphError, match="^inputs: " + re.escape(message)):
        capture_module(model(), inputs)


def test_wrapped_modules_are_unwrapped() -> None:
    model, x = made(MLP).eval(), floats(3, 8)
    optimized: Any = torch.compile(model)
    for wrapped in (optimized, nn.DataParallel(model), nn.DataParallel(optimized)):
        gm = capture_module(wrapped, x)
        assert sorted(gm.state_dict()) == ["down.bias", "down.weight", "up.bias", "up.weight"]
        with torch.no_grad():
            assert torch.equal(gm(x)[0], model(x))


def test_a_module_that_only_holds_a_module_is_none_of_these() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._orig_mod = self.module = MLP()

        def forward(self, x: Tensor) -> Tensor:
            return -self.module(x)

    model, x = made(Holder).eval(), floats(3, 8)
    with torch.no_grad():
        assert torch.equal(capture_module(model, x)(x)[0], model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_examples_on_which_the_model_fails(dtype: torch.dtype) -> None:
    message = (
        "^inputs: MLP fails on the examples: mat1 and mat2 must have the same dtype, but got (Double|Long) and Float$"
    )
    with pytest.raises(GraphError, match=message):
        capture_module(made(MLP), floats(3, 8).to(dtype))
    with pytest.raises(GraphError, match=r"^inputs: Tied fails on the examples: index out of range in self$"):
        capture_module(made(Tied), torch.full((2, 3), 16))


def test_a_failing_capture_does_not_blame_graphq() -> None:
    with pytest.raises(GraphError, match=r"^Tied \(.*test|^Tied \(.*models.py") as caught:
        capture_module(made(Tied), floats(2, 3))
    assert OWN_CODE not in str(caught.value)
    with pytest.raises(
        GraphError, match=r"^Difference: cannot be captured: .* missing 1 required positional"
    ) as caught:
        capture_module(Difference(), {"a": floats(2, 3)})  # the innermost frame of the model is graphq's call of it
    assert OWN_CODE not in str(caught.value)


def test_outputs_of_one_name() -> None:
    class Named(nn.Module):
        def __init__(self, *names: Any) -> None:
            super().__init__()
            self.names = names

        def forward(self, x: Tensor) -> dict[Any, Tensor]:
            return {name: x + i for i, name in enumerate(self.names)}

    with pytest.raises(GraphError, match=r"^Named: two outputs are called 1; rename one$"):
        capture_module(Named(1, "1"), floats(2, 8))
    assert source_of(capture_module(Named(1, "2"), floats(2, 8))).outputs == ("1", "2")
