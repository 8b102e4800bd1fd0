"""Models whose blocks share parameters, through every algorithm: as near to the source as those that share none."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphq
from graphq.spec.match import parse_match
from graphq.spec.plan import Plan
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Algorithm, Rule, Spec
from graphq.state import tensor_of

X = torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(1))
ALGORITHMS: dict[str, list[Any]] = {
    "rtn": [],
    "smooth-quant": ["smooth-quant"],
    "multiplied": [{"smooth-quant": {"where": "multiply"}}],
    "awq": ["awq"],
    "gptq": ["gptq"],
    "auto-round": [{"auto-round": {"steps": 5}}],
    "equalize": ["equalize"],
    "rotate": [{"rotate": {"r4": True}}],
    "correct-bias": ["correct-bias"],
    "all": ["equalize", {"rotate": {"r3": True, "r4": True}}, "smooth-quant", "awq", "gptq", "correct-bias"],
}
KINDS = (
    *("tied weight", "tied bias", "tied norm", "one block", "views", "transposed"),
    *("not contiguous", "buffer", "weight norm", "expanded bias"),
)
OF_BLOCKS = ("tied weight", "one block", "views")  # whose weights several blocks read


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


def sharing(kind: str) -> Model:
    torch.manual_seed(0)
    model = Model()
    first: Any = model.layers[0]
    second: Any = model.layers[1]
    for layer in (first, second):
        nn.init.normal_(layer.norm.weight, 1, 0.5)
        nn.init.normal_(layer.norm.bias)
    match kind:
        case "tied weight":
            second.up.weight = first.up.weight
        case "tied bias":
            second.up.bias = first.up.bias
        case "tied norm":
            second.norm = first.norm
        case "one block":
            model.layers[1] = first
        case "views":
            whole = torch.randn(64, 16) / 4
            first.up.weight, second.up.weight = nn.Parameter(whole[:32]), nn.Parameter(whole[16:48])
        case "transposed":
            first.down.weight = nn.Parameter(first.up.weight.detach().t())
        case "not contiguous":
            for layer in (first, second):
                layer.up.weight = nn.Parameter(layer.up.weight.detach().t().contiguous().t())
        case "buffer":
            weight = first.up.weight.detach().clone()
            del first.up.weight
            first.up.register_buffer("weight", weight)
        case "weight norm":
            nn.utils.parametrizations.weight_norm(first.up)
        case "expanded bias":
            first.up.bias = nn.Parameter(torch.tensor([0.3]).expand(32))
        case _:
            raise AssertionError(kind)
    return model.eval()


def compiled(model: Model, algorithms: list[Any], weight: str = "int8/channel") -> Any:
    spec = {"graphq": 1, "weight": weight, "input": "int8/token/dynamic", "algorithms": algorithms}
    return graphq.compile(model, spec, inputs=X, calibration=[X, X[:2]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "algorithm",
    [pytest.param(a, marks=[] if a in ("correct-bias", "all") else pytest.mark.slow) for a in ALGORITHMS],
)
def test_numbers_are_near_the_sources(kind: str, algorithm: str) -> None:
    model = sharing(kind)
    with torch.no_grad():
        wanted = model(X)
        found = compiled(model, ALGORITHMS[algorithm])(X)
        assert (found - wanted).norm() <= 0.01 * wanted.norm()  # of 8 bits; 0.003 to 0.006 where nothing is shared
        assert torch.equal(model(X), wanted), "the caller's model stays"


def weight_error(made: graphq.Compiled, layer: str, w: Tensor) -> Tensor:
    """What rounding took off the weight of a layer."""
    codes, scale = (tensor_of(made.graph, f"{layer}.{name}").double() for name in ("weight", "weight_scale"))
    return w.double() - codes * scale


@pytest.mark.parametrize("kind", OF_BLOCKS)
def test_a_weight_that_blocks_share_has_its_biases_corrected(kind: str) -> None:
    model = sharing(kind)
    up, norm = model.get_submodule("layers.0.up"), model.get_submodule("layers.0.norm")
    with torch.no_grad():
        reads = torch.cat([norm(x).flatten(0, 1) for x in (X, X[:2])])
        made = compiled(model, ["correct-bias"], "int3/channel")
        assert not [note for note in made.report.notes if "bias is not corrected" in note]
        added = weight_error(made, "layers.0.up", up.get_parameter("weight")) @ reads.double().mean(0)
        assert added.abs().max() > 0.05
        # Inputs are rounded to 8 bits before they are read, which moves their means by some 1e-3 of a weight's error.
        assert (tensor_of(made.graph, "layers.0.up.bias") - up.get_parameter("bias") - added).abs().max() <= 2e-3


def test_one_bias_of_several_blocks_is_corrected_for_the_mean_over_all_that_it_reads() -> None:
    class Reader(nn.Module):
        def __init__(self, count: int) -> None:
            super().__init__()
            self.own, self.count = nn.Linear(16, 16), count

        def forward(self, x: Tensor, shared: nn.Module) -> Tensor:
            return x + F.relu(self.own(x)) + shared(x[:, : self.count]).mean(1, keepdim=True)

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Reader(7), Reader(2)])
            self.shared = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, self.shared)
            return x

    torch.manual_seed(0)
    model = Shared().eval()
    reads: list[Tensor] = []
    with torch.no_grad():
        handle = model.shared.register_forward_hook(lambda module, given, y: reads.append(given[0].flatten(0, 1)))
        model(X)
        handle.remove()
        spec = Spec((Rule(parse_match("shared"), Plan(parse_quant("int3/channel"))),), (Algorithm("correct-bias"),))
        made = graphq.compile(model, spec, inputs=X, calibration=[X])
        assert [r.shape[0] for r in reads] == [28, 8]
        added = weight_error(made, "shared", model.shared.weight) @ torch.cat(reads).double().mean(0)
        assert (tensor_of(made.graph, "shared.bias") - model.shared.bias - added).abs().max() <= 1e-6
    assert not [note for note in made.report.notes if "bias is not corrected" in note]


def test_one_bias_of_two_blocks_weights_stays() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(16, 16, bias=False)

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            return x + F.linear(x, self.own.weight, bias)

    class OneBias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Own(), Own()])
            self.bias = nn.Parameter(torch.randn(16))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x, self.bias)
            return x

    torch.manual_seed(0)
    model = OneBias().eval()
    spec = Spec((Rule(parse_match("*"), Plan(parse_quant("int3/channel"))),), (Algorithm("correct-bias"),))
    made = graphq.compile(model, spec, inputs=X, calibration=[X])
    assert torch.equal(tensor_of(made.graph, "bias"), model.bias)
    assert [note for note in made.report.notes if "bias is not corrected" in note] == [
        f"layers.{i}.own: its bias is not corrected: bias is read elsewhere, too" for i in (0, 1)
    ]
