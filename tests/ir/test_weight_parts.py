"""Codes that are made when they are read are those that are made at once: whole, by rows, and one expert at a time."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graphq import deferred
from graphq.capture.modules import capture_module
from graphq.deferred import Deferred, Stacked
from graphq.errors import GraphError
from graphq.ir import edit
from graphq.passes.annotate import Annotate
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.split_gate_up import SplitGateUp
from graphq.state import as_parameter, deferred_tensors, put_tensor, same_tensors, tensor_of
from tests.graphs import plan, spec
from tests.models import MLP, MoE, Tied, capture

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.tensor([[0, 3, 15], [7, 7, 1]])
METHODS = ("", "/mse", "/hqq", "/percentile90")


class Rows(Deferred):
    """A matrix whose rows are read apart."""

    def __init__(self, shape: tuple[int, ...], make: Callable[[], Tensor]) -> None:
        self.shape = shape
        self.make = make

    def read(self) -> Tensor:
        return self.make()

    def pieces(self, multiple: int = 1) -> Any:
        return iter(self.make().split(multiple))


def deferring(gm: fx.GraphModule, seen: list[str] | None = None) -> fx.GraphModule:
    """The graph whose matrices and stacks are deferred, tied ones as one."""
    first = same_tensors(gm)
    own: dict[str, Tensor] = {}

    def reading(name: str, tensor: Tensor) -> Deferred:
        def read() -> Tensor:
            if seen is not None:
                seen.append(name)
            return tensor.clone()

        if tensor.dim() == 3:
            return Stacked(tuple(Rows(tuple(w.shape), w.clone) for w in tensor))
        return Rows(tuple(tensor.shape), read)

    for name, tensor in list(gm.named_parameters(remove_duplicate=False)):
        if tensor.dim() > 1:
            key = first.get(name, name)
            if key not in own:
                own[key] = edit.deferred_tensor(gm, reading(name, tensor.detach()), tensor.dtype)
            put_tensor(gm, name, as_parameter(own[key]))
    return gm


def both(model: nn.Module, inputs: Any, **rules: Any) -> tuple[dict[str, float], dict[str, float]]:
    """The ratios of both ways, after comparing all tensors."""
    found: list[dict[str, float]] = []
    states: list[dict[str, Tensor]] = []
    for change in (lambda gm: gm, deferring):
        gm = change(capture(model, inputs))
        ratios: dict[str, float] = {}
        SplitGateUp().run(gm)
        Annotate(spec(**rules)).run(gm)
        assert QuantizeWeights(ratios.__setitem__).run(gm)
        states.append({name: tensor_of(gm, name) for name in gm.state_dict(keep_vars=True)})
        found.append(ratios)
    eager, late = states
    assert eager.keys() == late.keys()
    for name, tensor in eager.items():
        assert tensor.dtype == late[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), late[name].view(torch.uint8)), name
    return found[0], found[1]


@pytest.mark.parametrize(
    "quant",
    [
        *(f"int4/asym/g4{method}" for method in METHODS[:-1]),
        *(f"int8/channel{method}" for method in METHODS),
        *("int4/half/g4", "int8/tensor", "int4/2x4", "int8/channel/ssz", "float8_e4m3fn/channel", "mxfp4", "nvfp4"),
    ],
)
def test_the_same_codes(quant: str) -> None:
    eager, late = both(MLP(), X, **{"*": plan(weight=quant)})
    assert eager == late
    assert eager


@pytest.mark.parametrize("quant", ["int4/asym/g4", "int8/channel/mse", "int8/tensor", "nvfp4"])
def test_the_same_codes_of_experts(quant: str) -> None:
    """Some of them, so that a stack has parts."""
    model = MoE()
    names = [f"experts.{i}.gate_proj" for i in range(4)]
    eager, late = both(model, X, **{"*": plan(weight=quant), names[1]: plan(weight="int8/channel")})
    assert eager == late
    assert eager.keys() >= set(names)
    eager, late = both(model, X, **{names[2]: plan(weight=quant)})  # the others stay float
    assert eager == late
    assert list(eager) == [names[2]]


def test_ties_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred, "PIECE", 4)
    for quant in ("int8/channel", "nvfp4"):
        gm = deferring(capture_module(Tied().eval(), (TOKENS,)))
        rules = spec(embedding=plan(weight=quant), head=plan(weight=quant))
        Annotate(rules).run(gm)
        assert QuantizeWeights().run(gm) == 2
        eager = capture_module(Tied().eval(), (TOKENS,))
        Annotate(rules).run(eager)
        QuantizeWeights().run(eager)
        assert same_tensors(gm) == same_tensors(eager)
        assert same_tensors(gm)["embedding.weight"] == "head.weight"


def test_codes_and_scales_are_made_once() -> None:
    seen: list[str] = []
    gm = deferring(capture(MLP(), X), seen)
    Annotate(spec(**{"*": plan(weight="int8/asym/channel")})).run(gm)
    QuantizeWeights().run(gm)
    assert seen == []
    names = [name for name in deferred_tensors(gm) if "weight" in name]
    for name in names:
        tensor_of(gm, name)
    assert len(names) == 3 * len(seen) > 0  # codes, scales and zero points


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none(bad: float) -> None:
    gm = capture(MLP(), X)
    name = "up.weight"
    edit.set_param(gm, name, lambda w: w.index_fill(1, torch.tensor([3]), bad), "break")
    gm = deferring(gm)
    Annotate(spec(**{"*": plan(weight="int8/channel")})).run(gm)
    QuantizeWeights().run(gm)
    with pytest.raises(GraphError, match=f"^{name.removesuffix('.weight')}: the weight holds NaN or Inf$"):
        tensor_of(gm, name)


def test_a_parameter_that_changes_is_changed_when_it_is_read() -> None:
    seen: list[str] = []
    gm, name = capture(MLP(), X), "up.weight"
    w = tensor_of(gm, name)
    deferring(gm, seen)
    edit.set_param(gm, name, lambda t: t + 1, "add")
    edit.set_param(gm, name, lambda t: t * 2, "double")
    assert seen == []
    assert torch.equal(tensor_of(gm, name), (w + 1) * 2)
    assert isinstance(tensor_of(gm, name), nn.Parameter)
    edit.set_param(gm, name, lambda t: t[:1], "cut")
    with pytest.raises(Exception, match=r"cut: .* would change from"):
        tensor_of(gm, name)
