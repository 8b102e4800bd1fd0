"""Biases as int32 at the scale of the products: exact to half a step of it, and never saturated or lost."""

import math
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

import graphq
from graphq.compiler import Compiled
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.lowering.profiles import PROFILES
from graphq.passes.quantize_biases import QuantizeBiases
from graphq.state import tensor_of
from tests.graphs import assert_vals

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def compiled(model: nn.Module, x: Tensor, profile: str = "generic-int8", spec: Any = None) -> Compiled:
    return graphq.compile(model.eval(), spec, profile=profile, inputs=(x,), calibration=[x])


def seeded(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def relative(y: Tensor, wanted: Tensor) -> float:
    return float((y - wanted).abs().max() / wanted.abs().max())


class Layer(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Transposed(nn.Module):
    """GPT-2's layer: a weight [K, N]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(4, 2)), nn.Parameter(torch.empty(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def test_golden() -> None:
    model = seeded(Layer())
    made = compiled(model, X)
    assert_expected_inline(
        dump(made.graph),
        """\
%x: f32[batch, 4] = input
%1: u8[batch, 4] = graphq.quantize(%x, @fc.input_scale, @fc.input_zero_point, None, 'uint8', [-1, -1])
%2: f32[batch, 4] = graphq.dequantize(%1, @fc.input_scale, @fc.input_zero_point, None, 'uint8', [-1, -1], f32)
%3: f32[2, 4] = graphq.dequantize(@fc.weight, @fc.weight_scale, None, None, 'int8', [1, -1], f32)
%4: f32[2] = graphq.dequantize(@fc.bias, @fc.bias_scale, None, None, 'int32', [1], f32)
%5: f32[batch, 2] = aten.linear(%2, %3, %4)  # fc: weight int8/channel, input uint8/tensor
%6: u8[batch, 2] = graphq.quantize(%5, @fc.output_scale, @fc.output_zero_point, None, 'uint8', [-1, -1])
%7: f32[batch, 2] = graphq.dequantize(%6, @fc.output_scale, @fc.output_zero_point, None, 'uint8', [-1, -1], f32)
return [%7]
""",
    )
    s_x, s_w = (tensor_of(made.graph, f"fc.{name}_scale") for name in ("input", "weight"))
    codes, step = tensor_of(made.graph, "fc.bias"), s_x.double() * s_w.double().flatten()
    assert codes.dtype == torch.int32
    assert torch.equal(tensor_of(made.graph, "fc.bias_scale"), step.float())
    assert torch.equal(codes, (tensor_of(model, "fc.bias").detach().double() / step.float().double()).round().int())
    assert_vals(made.graph, X)


def test_a_second_run_changes_nothing() -> None:
    made = compiled(seeded(Layer()), X)
    assert Pipeline([QuantizeBiases(PROFILES["generic-int8"])], strict=True).run(made.graph) == {"quantize-biases": 0}


class Behind(nn.Module):
    """A layer behind a ReLU, whose output every reader has quantized, in integers or not."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.fc = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(x))


LINEAR, UP = (X, lambda: nn.Linear(4, 2)), (IMAGE, lambda: nn.ConvTranspose2d(4, 4, 2))


@pytest.mark.parametrize(
    ("why", "layer", "profile", "weight", "given"),
    [
        ("nothing", LINEAR, "generic-int8", "int8/channel", "uint8/tensor"),
        ("the profile wants it float", LINEAR, "openvino", "int8/channel", "uint8/tensor"),
        ("a dynamic scale is not known", LINEAR, "generic-int8", "int8/channel", "int8/tensor/dynamic"),
        ("a token's scale is not known", LINEAR, "generic-int8", "int8/channel", "int8/token/dynamic"),
        ("a weight in float has no scale", LINEAR, "generic-int8", None, "uint8/tensor"),
        ("codes of floats are no integers", LINEAR, "generic-int8", "float8_e4m3fn/channel", "uint8/tensor"),
        ("a group has a scale of its own", LINEAR, "generic-int8", "int8/g2", "uint8/tensor"),
        ("an element has a scale of its own", LINEAR, "generic-int8", "int8/g1", "uint8/tensor"),
        ("a group of a transposed weight has one", (X, Transposed), "generic-int8", "int8/g2", "uint8/tensor"),
        ("an element of a transposed weight has one", (X, Transposed), "generic-int8", "int8/g1", "uint8/tensor"),
        ("a group of inputs has one", UP, "generic-int8", "int8/g2", "uint8/tensor"),
        ("there is no bias", (X, lambda: nn.Linear(4, 2, bias=False)), "generic-int8", "int8/channel", "uint8/tensor"),
    ],
)
def test_a_bias_that_stays_float(why: str, layer: Any, profile: str, weight: str | None, given: str) -> None:
    """Each differs in one thing from the first, whose bias is int32."""
    x, make = layer
    plan = {"input": given} | ({} if weight is None else {"weight": weight})
    spec = {"graphq": 1, "rules": [{"match": "*", **plan}], "activations": "uint8/tensor"}
    made = compiled(seeded(Behind(make())), x, profile, spec)
    found = [name for name, t in made.graph.state_dict().items() if t.dtype == torch.int32]
    assert bool(found) == (why == "nothing"), why


class Norm(nn.Module):
    def __init__(self, shape: list[int]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


@pytest.mark.parametrize("shape", [[4], [3, 4]])
def test_the_bias_of_a_norm(shape: list[int]) -> None:
    model = Norm(shape)
    model.norm.weight.data = torch.linspace(0.5, 2, 4).expand(shape).clone()
    model.norm.bias.data = torch.linspace(-1, 1, 4).expand(shape).clone()
    x = torch.randn(2, 3, 4)
    made = compiled(
        model, x, "qnn-htp", {"graphq": 1, "rules": [{"match": "*", "float": True}], "activations": "uint8/tensor"}
    )
    assert tensor_of(made.graph, "norm.bias").dtype == torch.int32
    assert tensor_of(made.graph, "norm.bias_scale").shape == (1,) * len(shape)
    step = float(tensor_of(made.graph, "norm.bias_scale"))
    back = tensor_of(made.graph, "norm.bias") * step
    assert (back - model.norm.bias.detach()).abs().max() <= step / 2 * 1.001
    assert_vals(made.graph, x)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("weight", ["int8/channel", "int8/tensor"])
def test_the_bias_of_a_transposed_convolution(groups: int, weight: str) -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(4, 6, 2, 2, groups=groups)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x)

    model = seeded(Up())
    rules = [{"match": "kind:conv_transpose2d", "weight": weight, "input": "uint8/tensor"}]
    made = compiled(model, IMAGE, spec={"graphq": 1, "rules": rules})
    bias = tensor_of(made.graph, "up.bias")
    assert bias.dtype == torch.int32
    back = bias.double() * tensor_of(made.graph, "up.bias_scale").double()
    assert (back - tensor_of(model, "up.bias").detach()).abs().max() <= 1e-3
    made.graph.recompile()
    with torch.no_grad():
        assert relative(made.graph(IMAGE)[0], model(IMAGE)) <= 0.03
    assert_vals(made.graph, IMAGE)


class Shared(nn.Module):
    """One linear on two activations of unlike ranges, and its bias under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.b = nn.Parameter(torch.empty(4, 4)), nn.Parameter(torch.empty(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight, self.b).sin(), self.weight, self.b)


def test_a_bias_that_two_calls_add_has_codes_for_each() -> None:
    made = compiled(seeded(Shared()), X)
    held = {name: t for name, t in made.graph.state_dict().items() if t.dtype == torch.int32}
    assert len(held) == 2
    for name, codes in held.items():
        back = codes * tensor_of(made.graph, f"{name}_scale")
        assert torch.allclose(back, seeded(Shared()).b.detach(), atol=1e-3)  # type: ignore[arg-type]
    assert "b" not in made.graph.state_dict()
    assert_vals(made.graph, X)


class Pruned(nn.Module):
    """A convolution with a channel of zeros, one of tiny weights, and large biases; then a ReLU and another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.conv(x)))


def pruned() -> Pruned:
    model = Pruned()
    seeded(model)
    with torch.no_grad():
        model.conv.weight[1] = 0
        model.conv.weight[2] *= 1e-12
        model.conv.weight[3] *= 1e-38
        model.conv.bias[:] = torch.tensor([0.1, 3.0, 3.0, 0.0, -0.2, 0.3])  # type: ignore[index]
    return model


@pytest.mark.parametrize("profile", ["ort-cpu", "generic-int8"])
def test_a_channel_of_zeros_and_one_of_tiny_weights_keep_their_biases(profile: str, tmp_path: Path) -> None:
    model = pruned()
    made = compiled(model, IMAGE, profile)
    scale = tensor_of(made.graph, "conv.bias_scale")
    codes = tensor_of(made.graph, "conv.bias")
    back = codes.double() * scale.double()
    assert (back - model.conv.bias.detach().double()).abs().max() <= 1e-3  # type: ignore[union-attr]
    assert int(codes.abs().max()) <= 2**30
    assert float(scale.min()) >= torch.finfo(torch.float32).tiny
    assert "conv: 2 of its 6 channels have scales as large as their biases need in int32" in made.report.notes
    made.graph.recompile()
    with torch.no_grad():
        wanted = made.graph(IMAGE)[0]
        assert relative(wanted, model(IMAGE)) <= 0.03
    made.emit("onnx", tmp_path / "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    y = torch.from_numpy(session.run(None, {"x": IMAGE.numpy()})[0])
    assert relative(y, wanted) <= 0.02  # a step of the last output


@pytest.mark.parametrize("fused", [True, False])
def test_a_channel_of_a_multiplier_that_the_consumer_has_not(fused: bool) -> None:
    """Its scale is as large as has to be; the others, and what a consumer of all multipliers gets, are as they were."""

    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).relu() if fused else self.conv(x)

    model = Uneven()
    seeded(model)
    assert model.conv.bias is not None
    model.conv.weight.data[1] *= 1e-7
    model.conv.bias.data[1] = 0.0
    made, plain = compiled(model, IMAGE, "qnn-htp"), compiled(model, IMAGE)
    scale = {name: tensor_of(made.graph, f"conv.{name}_scale").double() for name in ("input", "weight")}
    step = next(t for n, t in made.graph.state_dict().items() if n.endswith("output_scale")).double()
    multipliers = (scale["input"] * scale["weight"].flatten() / step).tolist()
    assert multipliers[1] == pytest.approx(2.0**-21, rel=1e-6)
    before = tensor_of(plain.graph, "conv.weight_scale").flatten()
    assert torch.equal(scale["weight"].flatten().float()[[0, 2]], before[[0, 2]])
    assert (scale["input"] * before[1] / step) < 2.0**-22
    told = "conv: 1 of its 3 channels have scales as large as qnn-htp has multipliers for, of its output"
    assert told in made.report.notes
    assert not [note for note in plain.report.notes if "multipliers" in note]


def test_a_bias_that_needs_another_scale_of_a_weight_that_others_read_stays_float() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4, 4))
            self.bias = nn.Parameter(torch.empty(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias) + F.linear(x.sin(), self.weight)

    model = Both()
    seeded(model)
    model.weight.data[0] *= 1e-12
    made = compiled(model, X)
    assert tensor_of(made.graph, "bias").dtype == torch.float32
    assert any("its bias stays float: it needs larger scales" in note for note in made.report.notes)


@pytest.mark.parametrize(("weight", "profile"), [("int8/tensor", "generic-int8"), ("int8/tensor", "vitis-ai")])
def test_one_scale_for_all_channels_is_as_large_as_the_largest_bias_needs(weight: str, profile: str) -> None:
    model = seeded(Layer())
    with torch.no_grad():
        tensor_of(model, "fc.weight").mul_(1e-10)
        tensor_of(model, "fc.bias").copy_(torch.tensor([0.5, -7.0]))
    spec = {"graphq": 1, "rules": [{"match": "*", "weight": weight, "input": "int8/tensor"}]}
    made = compiled(model, X, profile, spec)
    s_w, scale = (tensor_of(made.graph, f"fc.{name}_scale") for name in ("weight", "bias"))
    assert s_w.numel() == scale.numel() == 1
    back = tensor_of(made.graph, "fc.bias").double() * scale.double()
    assert (back - tensor_of(model, "fc.bias").detach().double()).abs().max() <= float(scale) / 2 * 1.001
    assert 2**28 < int(tensor_of(made.graph, "fc.bias").abs().max()) <= 2**30
    assert "fc: 1 of its 1 channels have scales as large as their biases need in int32" in made.report.notes
    if profile == "vitis-ai":
        assert all(math.frexp(float(s))[0] == 0.5 for s in (*s_w.flatten(), *scale.flatten()))
    assert_vals(made.graph, X)


def test_codes_are_rounded_again_at_the_larger_scale() -> None:
    """So that weights come back as near as that scale allows, and are not those of the smaller one times it."""
    model = seeded(Layer())
    with torch.no_grad():
        tensor_of(model, "fc.weight").mul_(1e-8)
        tensor_of(model, "fc.bias").copy_(torch.tensor([3.0, 0.0]))
    made = compiled(model, X)
    w, s_w = tensor_of(made.graph, "fc.weight"), tensor_of(made.graph, "fc.weight_scale")
    error = (w * s_w - tensor_of(model, "fc.weight").detach()).abs()
    assert (error <= s_w / 2 * 1.02).all()
    assert float(s_w[1]) < 1e-9 < float(s_w[0])  # the second channel's is what its weights need


def test_a_tiny_gain_of_a_norm_leaves_the_bias_float() -> None:
    """Its codes have a zero point, which another scale would move."""
    model = Norm([4])
    model.norm.weight.data.fill_(1e-12)
    model.norm.bias.data.fill_(5.0)
    spec = {"graphq": 1, "rules": [{"match": "*", "float": True}], "activations": "uint8/tensor"}
    made = compiled(model, X, "qnn-htp", spec)
    assert tensor_of(made.graph, "norm.bias").dtype == torch.float32
    assert "norm: its bias stays float: it needs larger scales of a weight with a zero point" in made.report.notes


def test_names_that_the_model_has_are_left_to_it() -> None:
    class Named(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.fc.register_buffer("bias_scale", torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).relu() * self.fc.bias_scale

    made = compiled(seeded(Named()), X)
    held = {name for name, t in made.graph.state_dict().items() if t.dtype == torch.int32}
    assert len(held) == 1
    assert "fc.bias" not in held
    assert_vals(made.graph, X)


def test_a_bias_that_is_read_at_two_nodes_is_gone_when_both_are_quantized() -> None:
    made = compiled(seeded(Shared()), X, "ort-cpu")  # where biases of linears are in float
    gm = made.graph
    (read,) = gm.graph.find_nodes(op="get_attr", target="b")
    first, second = read.users
    with gm.graph.inserting_before(second):
        again = gm.graph.get_attr("b")
    again.meta = dict(read.meta)
    second.replace_input_with(read, again)
    gm.recompile()
    before = gm(X)[0]
    assert Pipeline([QuantizeBiases(PROFILES["generic-int8"])], strict=True).run(gm) == {"quantize-biases": 2}
    assert not gm.graph.find_nodes(op="get_attr", target="b")
    assert "b" not in gm.state_dict()
    assert first.args[2] is not second.args[2]
    assert (gm(X)[0] - before).abs().max() <= 1e-3
    assert_vals(gm, X)
