"""AMCT's calling convention with AMCT's configs: its own numbers, its constraints, its formats."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphq
from graphq.errors import SpecError
from graphq.spec.rules import Spec
from tests.in_place.test_quantizer import Net, data, held, seeded
from tests.models import tiny
from tests.numerics.test_gptq import CODES, MSE, W, X

# Round-to-nearest of AMCT's 8 x 8 weight, int4 by channel.
MINMAX = [
    [1, -5, 2, 7, 2, -3, 0, 4], [-8, 2, 1, 6, -1, 3, -4, 0], [2, 2, -4, 3, 7, -1, 5, -7], [-1, 5, 4, -2, 2, 3, -3, 7],
    [0, 2, -2, 4, -5, 7, 6, -1], [7, -8, 4, 3, -1, 1, -3, 5], [7, 5, 4, 2, -2, -4, -5, -7], [7, -6, 5, -5, 4, -3, 2, -2],
]  # fmt: skip


class One(nn.Module):
    """A linear with AMCT's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8, bias=False)
        self.fc.weight.data = W.clone()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def config(
    algorithm: Any, weights: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    """An AMCT config; strategies are by channel, and by tensor for inputs, and all is symmetric, but where it says."""
    quant_cfg = {"weights": {"symmetric": True, "strategy": "channel"} | weights}
    if inputs is not None:
        quant_cfg["inputs"] = {"symmetric": True, "strategy": "tensor"} | inputs
    return {"batch_num": 1, "quant_cfg": quant_cfg, "algorithm": algorithm} | more


def of_any_shape(document: dict[str, Any]) -> Spec:
    """The config without what AMCT's kernels need of layers: its own 8 x 8 layer is none that they take."""
    spec = graphq.load_spec(document)
    return dataclasses.replace(spec, rules=tuple(dataclasses.replace(rule, only_if=()) for rule in spec.rules))


@torch.no_grad()
def run(document: dict[str, Any]) -> tuple[Any, float]:
    """AMCT's layer after calibration, and the mean squared error of its quantized output; converted, it has the same."""
    model = One()
    graphq.quantize(model, of_any_shape(document))
    wanted = model(X)
    assert torch.equal(wanted, X @ W.T)
    error = float((model(X) - wanted).square().mean())
    layer = model.fc
    graphq.convert(model)
    assert float((model(X) - wanted).square().mean()) == pytest.approx(error, rel=1e-4)
    return layer, error


def close(got: Tensor | None, wanted: list[float], rtol: float = 1e-6) -> None:
    assert got is not None
    torch.testing.assert_close(got.flatten(), torch.tensor(wanted), rtol=rtol, atol=2e-8)


def test_minmax() -> None:
    layer, error = run(config({"minmax"}, {"type": "int4"}))
    assert layer.quantized_weight.tolist() == MINMAX
    close(layer.scale_w, [1 / 7, 0.25, 0.13, 0.17142858, 0.044285715, 0.1875, 0.05714286, 0.12857142])
    assert error == pytest.approx(0.0232386, rel=1e-5)


def test_gptq() -> None:
    layer, error = run(config({"gptq"}, {"type": "int4"}))
    assert layer.quantized_weight.tolist() == CODES
    assert error == pytest.approx(MSE, abs=1e-6)


def test_awq() -> None:
    layer, error = run(config({"awq": {"grids_num": 20}}, {"type": "int4"}))
    close(layer.scale_factor, [1.36075, 1.469778, 0.680375, 1.445877, 1.380616, 1.423106, 1.401378, 1.401378], 1e-5)
    close(
        layer.scale_w,
        [0.0988031, 0.1837222, 0.1065589, 0.1511772, 0.0311191, 0.1574762, 0.0419937, 0.1469778],
        2e-6,
    )
    assert layer.scale_factor.shape == (1, 8)
    assert error == pytest.approx(0.0085131, rel=1e-4)


def test_smoothquant() -> None:
    layer, error = run(config({"smoothquant": {"smooth_strength": 0.5}}, {"type": "int8"}, {"type": "int8"}))
    s = torch.tensor([0.7905694, 0.9128709, 2.581989, 0.9128709, 1.172018, 1.274118, 1.0660037, 1.0206207])
    close(layer.scale_factor, (1 / s).tolist())
    close(layer.scale_d, [0.015247965])
    scale_w = [0.00718796, 0.01235265, 0.01169964, 0.01463805, 0.00311005, 0.01524797, 0.00406612, 0.01423144]
    close(layer.scale_w, scale_w)
    assert layer.offset_d is None
    assert error == pytest.approx(1.2114e-4, rel=1e-4)


def test_smoothquant_of_asymmetric_inputs() -> None:
    document = config(
        {"smoothquant": {"smooth_strength": 0.8}},
        {"type": "int8", "strategy": "tensor"},
        {"type": "int8", "symmetric": False},
    )
    layer, error = run(document)
    s = torch.tensor([1.0406915, 1.1023252, 3.8385196, 1.1023252, 1.2182032, 1.259592, 1.1728688, 1.152635])
    close(layer.scale_factor, (1 / s).tolist())
    close(layer.scale_d, [0.010216357])
    assert layer.offset_d.tolist() == [-1]
    close(layer.scale_w, [0.022668421])
    assert error == pytest.approx(2.7886e-4, rel=1e-4)


@pytest.mark.parametrize(
    ("format", "strategy", "scale_w"),
    [
        ("hifloat8", "tensor", [0.125]),
        ("hifloat8", "channel", [0.0625, 4, 4, 0.0625, 0.5, 0.03125, 0.03125, 0.0625]),
        ("float8_e4m3fn", "tensor", [0.03125]),
        ("float8_e4m3fn", "channel", [0.03125, 0.03125, 32, 0.03125, 4, 0.03125, 0.03125, 0.03125]),
    ],
)
def test_ofmr(format: str, strategy: str, scale_w: list[float]) -> None:
    layer, _ = run(config({"ofmr"}, {"type": format, "strategy": strategy}, {"type": format}))
    assert layer.scale_w.flatten().tolist() == scale_w
    assert layer.scale_w.shape == ((1,) if strategy == "tensor" else (8, 1))
    if format == "hifloat8":
        assert layer.scale_d.tolist() == [2.0**-5]  # every scale holds these inputs: the smallest


# -- models


def linear(inputs: int = 128, outputs: int = 64, bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, outputs, bias=bias), nn.ReLU(), nn.Linear(outputs, inputs, bias=bias))


CONFIGS = {
    "default": None,
    "int8-tensor": config({"minmax"}, {"type": "int8", "strategy": "tensor"}),
    "int4-group-asym": config({"minmax"}, {"type": "int4", "strategy": "group", "group_size": 32, "symmetric": False}),
    "int4-awq": config({"awq": {"grids_num": 20}}, {"type": "int4", "strategy": "group", "group_size": 32}),
    "int8-token": config({"minmax"}, {"type": "int8"}, {"type": "int8", "strategy": "token"}),
    "int8-smooth-token": config(
        {"smoothquant": {"smooth_strength": 0.5}}, {"type": "int8"}, {"type": "int8", "strategy": "token"}
    ),
    "hif8-cast": config({"cast"}, {"type": "hifloat8"}, {"type": "hifloat8"}),
    "hif8-quantile": config({"quantile"}, {"type": "hifloat8"}, {"type": "hifloat8"}),
    "hif8-weights-ofmr": config({"ofmr"}, {"type": "hifloat8"}),
    "fp8-gptq": config({"gptq"}, {"type": "float8_e4m3fn"}),
    "mxfp8": config(
        {"mxquant"},
        {"type": "mxfp8_e4m3fn", "strategy": "group", "group_size": 32},
        {"type": "mxfp8_e4m3fn", "strategy": "group"},
    ),
    "mxfp4-awq": config({"awq": {"grids_num": 20}}, {"type": "mxfp4_e2m1", "strategy": "group", "group_size": 32}),
    "fp4-gptq": config({"gptq"}, {"type": "float4_e2m1", "strategy": "group", "group_size": 32}),
    "fp8-fp4": config(
        {"minmax"}, {"type": "float4_e2m1", "strategy": "group", "group_size": 32}, {"type": "float8_e4m3fn"}
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_each_kind_of_config(name: str) -> None:
    model = seeded(linear(bias=name != "fp8-fp4"), torch.bfloat16)
    x, y = data(6, 128, dtype=torch.bfloat16)
    floats = model(y)
    graphq.quantize(model, CONFIGS[name])
    assert [layer.reason for layer in graphq.in_place_report(model).layers] == ["", ""]
    model(x)
    fake = model(y)
    assert 0 < float((fake - floats).abs().max()) < 0.6 * float(floats.abs().max())
    graphq.convert(model)
    assert float((model(y) - fake).abs().max()) <= 0.02 * float(fake.abs().max())


@torch.no_grad()
def test_convolutions_by_ofmr() -> None:
    model = seeded(Net())
    (x,) = data(2, 4, 9, 9, count=1)
    document = config({"ofmr"}, {"type": "hifloat8"}, {"type": "hifloat8"}, skip_layers={"grouped"})
    graphq.quantize(model, document)
    model(x)
    fake = model(x)
    assert held(model.conv)["scale_w"] == ("float32", [8, 1, 1, 1])
    graphq.convert(model)
    assert torch.equal(model(x), fake)
    report = {layer.layer.fqn: layer.reason for layer in graphq.in_place_report(model).layers}
    assert report["grouped"] == "skip_layers: grouped"
    assert [name for name, reason in report.items() if not reason] == ["conv", "up", "down"]


@torch.no_grad()
def test_layers_that_break_a_constraint_stand_in_the_report() -> None:
    model = seeded(nn.ModuleDict({"a": nn.Linear(128, 64), "b": nn.Linear(64, 40), "c": nn.Linear(64, 64)}))
    for name in ("a", "b"):
        model[name].bfloat16()
    graphq.quantize(model, config({"minmax"}, {"type": "int8"}))
    reasons = {layer.layer.fqn: layer.reason for layer in graphq.in_place_report(model).layers}
    assert reasons == {
        "a": "",
        "b": "needs N % 32: N is 40",
        "c": "needs dtype bfloat16|float16: the weight is float32",
    }
    assert held(model["b"]) == {}
    assert not hasattr(model["b"], "scale_w")


@torch.no_grad()
def test_a_model_of_which_nothing_can_be_quantized() -> None:
    model = seeded(linear())
    with pytest.raises(SpecError) as error:
        graphq.quantize(model)
    assert str(error.value) == (
        "the config quantizes no layer of this model\n"
        "0: stays float: needs dtype bfloat16|float16: the weight is float32\n"
        "2: stays float: needs dtype bfloat16|float16: the weight is float32"
    )


@torch.no_grad()
def test_a_llama_by_the_default() -> None:
    model = tiny("llama").to(torch.bfloat16)
    tokens = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(1))
    graphq.quantize(model)
    report = graphq.in_place_report(model)
    assert {layer.layer.fqn: layer.reason for layer in report.layers if layer.reason} == {
        "lm_head": "skip_layers: lm_head"
    }
    floats = model(tokens).logits
    fake = model(tokens).logits
    graphq.convert(model)
    assert torch.equal(model(tokens).logits, fake)
    assert 0 < float((fake - floats).abs().max()) < 0.05 * float(floats.abs().max())
