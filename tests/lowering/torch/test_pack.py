"""Packing: which reads become packed weights, which linears integer products, and that the numbers stay."""

import copy
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

import graphq
from graphq.capture.modules import capture_module
from graphq.ir.edit import copy_graph
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.lowering.torch.pack import pack
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.runtime.experts import PackedExperts
from graphq.runtime.modules import PackedWeight, codes_of
from graphq.runtime.quantized_module import QuantizedModule
from graphq.state import tensor_of
from tests.graphs import annotated, plan
from tests.models import MLP, Attention, ConvBnRelu, MoE, Tied, Twice


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def qdq(model: nn.Module, x: Tensor, *rules: tuple[str, str, str | None], **top: str) -> fx.GraphModule:
    """The QDQ form of a model with the same random weights each time."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape)
    named = [{"match": m, "weight": w, **({"input": i} if i else {})} for m, w, i in rules]
    spec: dict[str, Any] = {"graphq": 1, **({"rules": named} if named else top)}
    return graphq.compile(model.eval(), spec, inputs=x, calibration=[x]).graph


def modules_of(packed: fx.GraphModule) -> dict[str, str]:
    return {
        path: type(module).__name__ for path, module in packed.named_modules() if isinstance(module, QuantizedModule)
    }


def assert_close(packed: fx.GraphModule, gm: fx.GraphModule, x: Tensor, bound: float) -> None:
    with torch.no_grad():
        expected, found = gm(x)[0], packed(x)[0]
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= bound * expected.abs().max()


# -- text --------------------------------------------------------------------------------------------------------------


def test_golden() -> None:
    gm = qdq(MLP(), floats(3, 8), ("up", "int8/channel", "int8/asym/tensor"), ("down", "int4/asym/g4", None))
    assert_expected_inline(
        dump(pack(gm)),
        """\
%x: f32[batch, 8] = input
%1: i8[batch, 8] = graphq.quantize(%x, @up.input_scale, @up.input_zero_point, None, 'int8/asym', [-1, -1])
%2: f32[batch, 12] = @up(%1, @up.input_scale, @up.input_zero_point)
%3: f32[batch, 12] = aten.relu(%2)
%4: f32[batch, 8] = @down(%3)
return [%4]
""",
    )


# -- numbers -----------------------------------------------------------------------------------------------------------

X = floats(5, 8)
WEIGHTS = {
    "linear": (MLP, X),
    "convolutions": (ConvBnRelu, floats(2, 4, 6, 6)),
    "experts": (MoE, floats(9, 8)),
    "embedding": (Tied, torch.arange(6).reshape(2, 3)),
    "called twice": (Twice, X),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize(
    "weight", ["int2/channel", "int3/tensor", "int4/asym/channel", "int7/channel", "int8/asym/tensor"]
)
def test_packed_weights_compute_what_the_qdq_form_computes(name: str, weight: str) -> None:
    model, x = WEIGHTS[name]
    rules = (("embedding", weight, None), ("head", weight, None)) if name == "embedding" else ()
    gm = qdq(model(), x, *rules, weight=weight)
    before, state = dump(gm), {key: value.clone() for key, value in gm.state_dict().items()}
    packed = pack(gm)
    kinds = set(modules_of(packed).values())
    assert kinds <= {"PackedWeight", "PackedLinear", "PackedExperts"}
    assert_close(packed, gm, x, 0 if kinds == {"PackedWeight"} else 1e-6)  # the same floats reach the same ops
    assert dump(gm) == before
    assert all(torch.equal(value, state[key]) for key, value in gm.state_dict().items())
    for path in modules_of(packed):
        module = packed.get_submodule(path)
        assert isinstance(module, PackedWeight)
        assert torch.equal(codes_of(module), tensor_of(gm, f"{path}.weight"))
        assert module.weight_scale is tensor_of(packed, f"{path}.weight_scale")
        assert module.weight_scale.data_ptr() == tensor_of(gm, f"{path}.weight_scale").data_ptr()


INPUTS = ["int8/tensor", "int8/asym/tensor", "int8/token/dynamic", "int8/asym/token/dynamic", "int8/tensor/dynamic"]


@pytest.mark.parametrize("input", INPUTS)
@pytest.mark.parametrize("weight", ["int8/channel", "int8/asym/channel", "int8/tensor", "int8/by_sign/channel"])
@pytest.mark.parametrize("model", [MLP, Attention, Twice], ids=lambda m: m.__name__)
def test_integer_products_compute_what_the_qdq_form_computes(model: type[nn.Module], weight: str, input: str) -> None:
    x = floats(2, 5, 8)
    gm = qdq(model(), x, weight=weight, input=input)
    packed = pack(gm)
    # With static scales MLP's chain stays in codes, and what Twice's linear gives the first time.
    in_codes = input in ("int8/tensor", "int8/asym/tensor") and "asym" not in weight
    assert set(modules_of(packed).values()) <= {"Int8Linear", "FusedLayer"}
    assert ("FusedLayer" in modules_of(packed).values()) <= in_codes
    # Integer sums are exact, the QDQ form's are rounded; where they are quantized again, a code may move by one step.
    assert_close(packed, gm, x, 1e-6 if model is Attention else 0.01)
    first = next(n for n in packed.graph.nodes if n.op == "call_module")
    if modules_of(packed)[str(first.target)] == "FusedLayer":
        return
    with torch.no_grad():
        ours, theirs = intermediate(packed, first.name, x), intermediate(gm, first_linear(gm), x)
    assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


def first_linear(gm: fx.GraphModule) -> str:
    return next(n.name for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default)


def intermediate(gm: fx.GraphModule, name: str, x: Tensor) -> Tensor:
    """What a node gives."""
    found: list[Tensor] = []

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.name == name:
                found.append(result)
            return result

    Run(gm).run(x)
    return found[0]


# -- which linears are integer products --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "input", "kind"),
    [
        ("int8/channel", "int8/tensor", "Int8Linear"),
        ("int8/half/channel", "int8/half/token/dynamic", "Int8Linear"),
        ("int8/channel", None, "PackedLinear"),
        ("int8/g4", "int8/tensor", "PackedLinear"),
        ("int7/channel", "int8/tensor", "PackedLinear"),
        ("int4/channel", "int8/tensor", "PackedLinear"),
        ("int8/channel", "int16/tensor", "PackedLinear"),
        ("int8/channel", "int6/token/dynamic", "PackedLinear"),
    ],
)
def test_which_plans_multiply_integers(weight: str, input: str | None, kind: str) -> None:
    gm = qdq(MLP(), X, ("up", weight, input))
    packed = pack(gm)
    assert modules_of(packed) == {"up": kind}
    assert_close(packed, gm, X, 1e-6)


EXPERTS = [f"experts.{role}" for role in ("gate_proj", "up_proj", "down_proj")]


@pytest.mark.parametrize(
    ("weight", "input", "takes_codes"),
    [
        ("int8/channel", "int8/token/dynamic", True),
        ("int8/asym/channel", "int8/tensor", True),
        ("int4/g4", "int8/asym/token/dynamic", True),
        ("int4/g4", "int6/token/dynamic", False),
        ("float8_e4m3fn/channel", "int8/tensor", False),
        ("int4/g4", None, False),
    ],
)
def test_which_experts_multiply_integers(weight: str, input: str | None, takes_codes: bool) -> None:
    gm = qdq(MoE(), X, weight=weight, **({} if input is None else {"input": input}))
    packed = pack(gm)
    assert [modules_of(packed)[path] for path in EXPERTS] == ["PackedExperts"] * 3
    assert [cast(PackedExperts, packed.get_submodule(path)).takes_codes for path in EXPERTS] == [takes_codes] * 3
    assert_close(packed, gm, X, 1e-6 if input is None else 0.02)  # an activation between two codes may get the other


def test_experts_that_are_cast_or_read_otherwise_are_dequantized() -> None:
    class Read(MoE):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.experts["down_proj"].amax()

    kinds = modules_of(pack(qdq(Read(), X, weight="int8/channel")))
    assert [kinds[path] for path in EXPERTS] == ["PackedExperts", "PackedExperts", "PackedWeight"]


def test_convolutions_by_dynamic_scales_do_not_multiply_integers() -> None:
    x = floats(2, 4, 6, 6)
    gm = qdq(ConvBnRelu(), x, weight="int8/channel", input="int8/tensor/dynamic")
    packed = pack(gm)
    assert set(modules_of(packed).values()) == {"PackedWeight"}
    assert_close(packed, gm, x, 0)


def test_a_computed_bias_is_added_behind_a_packed_weight() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.up.weight, self.up.bias * x.amax())

    gm = qdq(Biased(), X, weight="int8/channel", input="int8/tensor/dynamic")
    packed = pack(gm)
    assert modules_of(packed) == {"up": "PackedWeight"}
    assert_close(packed, gm, X, 0)


def test_rows_of_16_bits_are_not_packed() -> None:
    """As whole-graph activations make of an embedding."""
    x = torch.arange(6).reshape(2, 3)
    rule = {"match": "*", "weight": "int8/channel", "input": "uint16/tensor"}
    spec = {"graphq": 1, "profile": "generic-int8", "rules": [rule], "activations": "uint16/tensor"}
    gm = graphq.compile(Tied().eval(), spec, inputs=x, calibration=[x]).graph
    assert "'uint16'" in next(line for line in dump(gm).splitlines() if "@embedding.weight," in line)
    packed = pack(gm)
    assert "embedding" not in modules_of(packed)
    assert_close(packed, gm, x, 1e-4)


def test_one_module_called_twice_stays_one() -> None:
    packed = pack(qdq(Twice(), X, weight="int8/channel", input="int8/token/dynamic"))
    assert modules_of(packed) == {"shared": "Int8Linear"}
    assert [n.target for n in packed.graph.nodes if n.op == "call_module"] == ["shared", "shared"]


def test_a_weight_with_two_biases_is_not_one_integer_product() -> None:
    class TwoBiases(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)
            self.other = nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) + F.linear(x, self.up.weight, self.other)

    gm = qdq(TwoBiases(), X, weight="int8/channel", input="int8/tensor")
    packed = pack(gm)
    assert modules_of(packed) == {"up": "PackedWeight"}
    assert_close(packed, gm, X, 0)


def test_a_weight_that_is_used_both_ways_round_is_not_one_integer_product() -> None:
    class BothWays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) + torch.addmm(self.up.bias, x, self.up.weight)

    gm = qdq(BothWays(), X, weight="int8/tensor", input="int8/tensor")
    packed = pack(gm)
    assert modules_of(packed) == {"up": "PackedWeight"}
    assert_close(packed, gm, X, 1e-6)  # in memory the weight lies one way round: its sums are taken in another order


class Scaled(nn.Module):
    """A Conv1D that scales its bias, its product, or both, or adds a bias of another shape."""

    def __init__(self, beta: float = 1, alpha: float = 1, bias: tuple[int, ...] = (12,)) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 12))
        self.bias = nn.Parameter(torch.empty(bias))
        self.beta, self.alpha = beta, alpha

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight, beta=self.beta, alpha=self.alpha)


@pytest.mark.parametrize(("beta", "alpha"), [(0.5, 1), (1, 2), (0.5, 2), (0, 1)])
def test_a_conv1d_that_scales_is_never_an_integer_product_that_does_not(beta: float, alpha: float) -> None:
    """As captured it is no layer, so that whatever else reads its weight, its factors are kept; raised it is one."""
    x = floats(5, 8)
    model = nn.Sequential(Scaled(beta, alpha))
    gm = qdq(model, x, weight="int8/channel", input="int8/token/dynamic")
    packed = pack(gm)
    assert modules_of(packed) == {"0": "Int8Linear"}
    assert_close(packed, gm, x, 1e-6)
    with torch.no_grad():
        expected = model(x)
        assert (packed(x)[0] - expected).abs().max() <= 0.02 * expected.abs().max()  # of 8 bits
    as_captured = annotated(
        capture_module(nn.Sequential(*model, nn.Linear(12, 4)), x), **{"*": plan("int8/channel", "int8/token/dynamic")}
    )
    Pipeline([QuantizeWeights(), QuantizeActivations()]).run(as_captured)
    packed = pack(as_captured)
    assert modules_of(packed) == {"1": "Int8Linear"}
    assert_close(packed, as_captured, x, 1e-6)


@pytest.mark.parametrize("bias", [(1, 12), (1,), (1, 1)])
def test_a_bias_of_another_shape_stays_outside_of_the_packed_module(bias: tuple[int, ...]) -> None:
    gm = qdq(nn.Sequential(Scaled(bias=bias)), X, weight="int8/channel", input="int8/token/dynamic")
    packed = pack(gm)
    assert modules_of(packed) == {"0": "PackedWeight"}
    assert_close(packed, gm, X, 0)


def test_a_weight_whose_reader_is_no_layer_has_the_rows_of_the_layer() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), Scaled()

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.addmm(self.up.bias, x, self.up.weight, alpha=2) + self.up(x))

    gm = qdq(Both(), X, ("up", "int4/g4", None), ("down", "int4/g4", None))
    packed = pack(gm)
    rows = {path: m.graphq_form.rows_first for path, m in packed.named_modules() if isinstance(m, PackedWeight)}
    assert rows == {"up": [0, 1], "down": [1, 0]}
    assert_close(packed, gm, X, 0)


@pytest.mark.parametrize("weight", ["int8/channel", "int8/asym/channel", "int8/tensor", "int4/asym/g4"])
@pytest.mark.parametrize("input", [None, "int8/asym/tensor", "int8/token/dynamic"])
def test_conv1d_is_a_transposed_linear(weight: str, input: str | None) -> None:
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(8, 12))
            self.bias = nn.Parameter(torch.empty(12))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    gm = qdq(nn.Sequential(Conv1D()), X, ("0", weight, input))
    packed = pack(gm)
    assert modules_of(packed) == {"0": "Int8Linear" if input and weight.startswith("int8") else "PackedLinear"}
    assert_close(packed, gm, X, 1e-6)


# -- copies ------------------------------------------------------------------------------------------------------------


def test_a_copied_graph_shares_its_tensors_and_nothing_else() -> None:
    gm = qdq(MLP(), X, weight="int8/channel")
    made = copy_graph(gm)
    assert dump(made) == dump(gm)
    for name, tensor in gm.state_dict().items():
        assert made.state_dict()[name].data_ptr() == tensor.data_ptr()
    before = dump(gm)
    made.graph.erase_node(next(n for n in made.graph.nodes if n.op == "output"))
    made.up.register_buffer("more", torch.zeros(1))  # type: ignore[union-attr]
    assert dump(gm) == before
    assert "up.more" not in gm.state_dict()


def test_packed_graphs_are_deepcopied() -> None:
    gm = qdq(MLP(), X, weight="int8/channel", input="int8/token/dynamic")
    packed = pack(gm)
    with torch.no_grad():
        expected = packed(X)[0]  # after which its integer product is prepared
        assert torch.equal(copy.deepcopy(packed)(X)[0], expected)
