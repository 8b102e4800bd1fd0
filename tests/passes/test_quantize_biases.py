"""Biases as int32 at the scale of the products: exact to half a step of it, and never saturated or lost."""

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


@pytest.mark.parametrize(
    ("why", "model", "profile", "spec"),
    [
        ("the profile wants it float", Layer(), "openvino", None),
        (
            "a dynamic scale is not known",
            Layer(),
            "generic-int8",
            {"weight": "int8/channel", "input": "int8/token/dynamic"},
        ),
        ("a float input has no scale", Layer(), "generic-int8", {"weight": "int8/channel"}),
        ("a group has a scale of its own", Layer(), "generic-int8", {"weight": "int8/g2", "input": "uint8/tensor"}),
        (
            "a group of a transposed weight has a scale of its own",
            Transposed(),
            "generic-int8",
            {"weight": "int8/g2", "input": "uint8/tensor"},
        ),
        ("there is no bias", Layer(bias=False), "generic-int8", None),
    ],
)
def test_a_bias_that_stays_float(why: str, model: nn.Module, profile: str, spec: Any) -> None:
    given = spec and {"graphq": 1, "rules": [{"match": "*", **spec}]}
    made = compiled(seeded(model), X, profile, given)
    assert not [name for name, t in made.graph.state_dict().items() if t.dtype == torch.int32], why


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
