"""One suite over all targets: what an artifact computes against the QDQ form, and the integers that it holds.

Foreign judges: ONNX Runtime loads and runs what the ONNX target wrote, onnx's checker has passed it.
"""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from graphq.artifacts import manifest
from graphq.capture.source import source_of
from graphq.errors import TargetError
from graphq.ir.pipeline import Pipeline
from graphq.lowering import targets
from graphq.lowering.onnx import emit as onnx
from graphq.lowering.torch import module as torch_module
from graphq.pipelines import passes_for
from graphq.runtime import ops
from graphq.runtime.model import CompiledModel
from graphq.runtime.onnx_session import OnnxSession
from graphq.spec.match import Blocks, Exact, Name
from graphq.spec.plan import KeepFloat, Plan
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Rule, Spec
from graphq.verifier import verify
from tests.models import (
    FAMILIES,
    MLP,
    ConvBnRelu,
    Tied,
    Twice,
    capture,
    captured,
    random_inputs,
    route,
)

WEIGHT_ONLY = (
    "int8/channel",
    "int4/asym/g32",
    "int4/g32",
    "int3/g24",
    "int8/asym/g40",
    "int6/asym/tensor",
    "int2/g16",
    "int8/asym/channel",
)
ACTIVATIONS = (
    ("int8/channel", "int8/tensor"),
    ("int8/asym/channel", "int8/asym/tensor"),
    ("int8/channel", "int8/token/dynamic"),
    ("int8/channel", "int8/asym/token/dynamic"),
    ("int8/channel", "int8/asym/tensor/dynamic"),
    ("int4/asym/channel", "int4/asym/token/dynamic"),
    ("int6/asym/channel", "int6/asym/token/dynamic"),
    ("int4/g32", "int6/tensor"),
    ("int8/channel", "int16/tensor"),
    ("int5/channel", "uint16/tensor"),
    ("int7/asym/g8", None),
)
# What ONNX has types for, then what this target has not.
FLOATS = (
    ("float8_e4m3fn/channel", None),
    ("float8_e5m2/g8", None),
    ("float8_e4m3fn/16x24", None),
    ("uint8/channel", "uint8/tensor"),
    ("int8/channel", "uint8/tensor/percentile99"),
    ("int8/asym/joint/channel", "int8/asym/joint/tensor"),
    ("int8/channel", "int8/asym/joint/token/dynamic"),
    ("int4/channel/ssz", "int8/asym/tensor/entropy"),
    ("float8_e4m3fn/channel/mse", "float8_e4m3fn/tensor"),
    ("float8_e4m3fn/tensor", "float8_e4m3fn/token/dynamic"),
    ("float8_e5m2/pow2/channel", "float8_e5m2/pow2/token/dynamic"),
    ("float8_e4m3fn/16x16", "float8_e4m3fn/g8/dynamic"),
    ("int8/channel", "int8/asym/g12/dynamic"),
    ("float8_e4m3fn/channel/ofmr", "float8_e4m3fn/tensor/ofmr"),
    ("int4/over_int8/g8", "int8/token/dynamic"),
)
# ONNX has types for them, ONNX Runtime no kernels: onnx's own reference judges.
REFERENCE = (
    ("float6_e2m3/g8", None),
    ("float6_e3m2/channel", None),
    ("float4_e2m1/g8", None),
    ("mxfp4", None),
    ("mxint8", "int8/token/dynamic"),
    ("mxfp8_e5m2", None),
    ("mxfp8_e4m3", None),
    ("mxfp6_e2m3", None),
    ("mxfp6_e3m2", None),
    ("nvfp4", None),
    ("float4_e2m1/over_float8/g8", "float8_e4m3fn/tensor"),
)
TORCH_ONLY = (
    ("hifloat8/channel", "hifloat8/tensor"),
    ("hifloat8/channel/ofmr", "hifloat8/to15/token/dynamic"),
    ("hifloat8/tensor", "hifloat8/unit/tensor/dynamic"),
    ("float4_e1m2/g7", None),
    ("mxfp4/amct_llm", "mxfp8_e4m3/dynamic"),
    ("mxfp6_e3m2", "mxfp6_e2m3/dynamic"),
    ("mxint8", "mxint8/dynamic"),
    ("mxfp8_e5m2", "mxfp8_e5m2/dynamic"),
    ("nvfp4", "nvfp4"),
    ("nvfp4", "nvfp4/dynamic"),
)
QUICK = {"llama": 7, "mixtral": 3, "gpt2": 1, "resnet": 0}  # the weight format that each has by default


def qdq(gm: fx.GraphModule, weight: str, activation: str | None, batch: tuple[Tensor, ...]) -> fx.GraphModule:
    """The QDQ form of a captured graph."""
    plan = Plan(parse_quant(weight), parse_quant(activation) if activation else None)
    Pipeline(passes_for(Spec((Rule(Blocks(), plan),)))).run(gm, [batch])
    return gm


def through_torch(gm: fx.GraphModule, path: Path) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    torch_module.emit(gm, path, {})
    loaded = torch_module.load(path)
    return lambda inputs: loaded.graph(*inputs)


def through_onnx(
    gm: fx.GraphModule, path: Path, reference: bool = False
) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """In ONNX Runtime, or in onnx's own ``reference``."""
    import onnxruntime
    from onnx.reference import ReferenceEvaluator

    onnx.emit(gm, path, {})
    if reference:
        evaluator = ReferenceEvaluator(str(path / "model.onnx"))
        return lambda inputs: [
            torch.from_numpy(np.asarray(y))
            for y in evaluator.run(None, {n: x.numpy() for n, x in zip(evaluator.input_names, inputs, strict=True)})  # type: ignore[union-attr]
        ]
    session = onnxruntime.InferenceSession(path / "model.onnx")
    names = [i.name for i in source_of(gm).inputs]
    assert [i.name for i in session.get_inputs()] == names
    return lambda inputs: [
        torch.from_numpy(y) for y in session.run(None, {n: x.numpy() for n, x in zip(names, inputs, strict=True)})
    ]


TARGETS: dict[str, Callable[..., Callable[[Sequence[Tensor]], Sequence[Tensor]]]] = {
    "torch": through_torch,
    "onnx": through_onnx,
}


CHECKPOINTS = {"compressed-tensors", "ascend"}  # of transformers' models alone: they have suites of their own


def test_every_target_is_here() -> None:
    assert TARGETS.keys() | CHECKPOINTS == targets.TARGETS.keys()


def relative(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of any output, by the largest magnitude of that output."""
    return max(
        float((y - x).abs().max() / x.abs().max())
        for y, x in zip(outputs, expected, strict=True)
        if x.numel() and x.is_floating_point()
    )


def cases() -> list[Any]:
    """Families x weight formats: one format a family by default, two more each among the slow ones, in turn.

    Each format meets every kind of op below; here, each family meets some formats, and each format some families.
    """
    return [
        pytest.param(family, weight, marks=() if i == QUICK.get(family) else pytest.mark.slow)
        for number, family in enumerate(FAMILIES)
        for i, weight in enumerate(WEIGHT_ONLY)
        if i == QUICK.get(family) or (number + i) % 4 == 0
    ]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("family", "weight"), cases())
def test_float_activations_agree_end_to_end(family: str, weight: str, target: str, tmp_path: Path) -> None:
    gm = captured(family)
    gm = qdq(gm, weight, None, random_inputs(gm))
    run = TARGETS[target](gm, tmp_path / "artifact")
    for batch, sequence in ((3, 7), (1, 1), (2, 5)):
        inputs = random_inputs(gm, batch=batch, sequence=sequence, seed=batch)
        with torch.no_grad():
            # float32 sums in another order differ in the last bits: 1e-6 was seen; a wrong code moves outputs by 1e-2
            assert relative(run(inputs), gm(*inputs)) <= 1e-5
    assert verify(tmp_path / "artifact").differences == ()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weight", ["int8/channel", "int4/asym/channel", "float8_e4m3fn/channel"])
@pytest.mark.parametrize("model", [MLP, ConvBnRelu, Twice, Tied], ids=lambda model: model.__name__)
def test_plain_modules_agree_end_to_end(model: type[nn.Module], weight: str, target: str, tmp_path: Path) -> None:
    inputs = plain_inputs(model)
    gm = qdq(capture(model().eval(), *inputs), weight, None, inputs)
    run = TARGETS[target](gm, tmp_path / "artifact")
    with torch.no_grad():
        # float32 sums in another order differ in the last bits
        assert relative(run(inputs), gm(*inputs)) <= 1e-5
    assert verify(tmp_path / "artifact").differences == ()


def plain_inputs(model: type[nn.Module]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    if model is Tied:
        return (torch.randint(0, 5, (2, 3), generator=generator),)
    return (
        torch.randn(2, 4, 6, 6, generator=generator) if model is ConvBnRelu else torch.randn(2, 8, generator=generator),
    )


class Operation(nn.Module):
    """One layer, called on its input alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer: nn.Module
        match kind:
            case "linear":
                self.layer = nn.Linear(40, 24)
            case "conv1d":
                self.layer = nn.Conv1d(6, 8, 3, padding=1)
            case "conv3d":
                self.layer = nn.Conv3d(6, 8, 2, padding=1)
            case "conv_transpose1d":
                self.layer = nn.ConvTranspose1d(6, 8, 3, stride=2, padding=1)
            case "conv_transpose2d":
                self.layer = nn.ConvTranspose2d(6, 8, 3, stride=2, output_padding=1, groups=2)
            case _:
                self.layer = nn.Conv2d(6, 8, 3, padding="same", groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class TransposedLinear(nn.Module):
    """A linear with the weight ``[K, N]``, as GPT-2 has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.weight, self.bias = nn.Parameter(torch.randn(40, 24)), nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, 40), self.weight).view(*x.shape[:-1], 24)


INPUTS = {
    "linear": (2, 5, 40),
    "transposed": (2, 5, 40),
    "conv1d": (2, 6, 9),
    "conv2d": (2, 6, 5, 7),
    "conv3d": (2, 6, 3, 4, 3),
    "conv_transpose1d": (2, 6, 9),
    "conv_transpose2d": (2, 6, 5, 4),
}


@functools.cache
def sample(kind: str) -> Tensor:
    return torch.randn(*INPUTS[kind], generator=torch.Generator().manual_seed(7)) + 0.3


def operations() -> list[Any]:
    """Ops x formats: each format on a linear and on one other op by default, all of them among the slow ones."""
    return [
        pytest.param(kind, *pair, marks=() if kind == "linear" or number == i % 6 + 1 else pytest.mark.slow)
        for number, kind in enumerate(INPUTS)
        for i, pair in enumerate([*ACTIVATIONS, *FLOATS, *REFERENCE, *TORCH_ONLY])
    ]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("kind", "weight", "activation"), operations())
def test_a_quantized_op_agrees_on_its_own_input(
    kind: str, weight: str, activation: str | None, target: str, tmp_path: Path
) -> None:
    if kind.startswith("conv") and activation and ("dynamic" in activation and "tensor" not in activation):
        pytest.skip("a convolution has no tokens")
    if kind.startswith("conv") and activation == "nvfp4":
        pytest.skip("a convolution has no tokens")
    if target == "onnx" and (weight, activation) in TORCH_ONLY:
        pytest.skip("ONNX has no types for it: refused, below")
    if kind == "conv2d" and weight == "int4/g32":
        weight = "int4/g2"
    if target == "onnx" and (weight, activation) in REFERENCE and kind == "conv_transpose2d":
        pytest.skip("onnx.reference 1.23 cannot run a ConvTranspose of several groups")
    x = sample(kind)
    gm = capture(TransposedLinear() if kind == "transposed" else Operation(kind), x, once=True)
    gm = qdq(gm, weight, activation, (x,))
    judged = {"reference": True} if target == "onnx" and (weight, activation) in REFERENCE else {}
    run = TARGETS[target](gm, tmp_path / "artifact", **judged)
    for scale in (1.0, 3.0):  # 3: beyond what static scales were calibrated on, so that codes are clamped
        with torch.no_grad():
            # the same codes give the same integers; only their scaling is summed in float32, in another order
            assert relative(run([x * scale]), gm(x * scale)) <= 1e-5


@pytest.mark.parametrize(("weight", "activation"), TORCH_ONLY)
def test_what_onnx_has_no_types_for_is_refused(weight: str, activation: str | None, tmp_path: Path) -> None:
    x = sample("linear")
    gm = qdq(capture(Operation("linear"), x), weight, activation, (x,))
    with pytest.raises(TargetError) as caught:
        onnx.emit(gm, tmp_path / "artifact", {})
    for line in str(caught.value).splitlines():
        lacks = "ONNX has no type for it"
        holds = "this target holds activations in integers, float8_e4m3fn and float8_e5m2"
        assert re.fullmatch(rf"onnx: layer: \S+: ({lacks}|{holds})", line)
    assert not (tmp_path / "artifact").exists()


def test_every_code_of_an_activation_is_the_same(tmp_path: Path) -> None:
    """Identity weights show the codes themselves; ties and clamped values are among them."""
    layer = nn.Linear(64, 64, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(64))
    x = torch.cat([torch.arange(-320, 320).view(10, 64) / 10.0, torch.randn(50, 64) * 40])
    for activation in (
        "int8/tensor",
        "int8/asym/tensor",
        "int8/asym/joint/tensor",
        "int8/asym/token/dynamic",
        "int4/token/dynamic",
    ):
        gm = qdq(capture(layer, x[:10]), "int8/tensor", activation, (x[:10],))
        with torch.no_grad():
            expected = gm(x)[0]
        for name, emit in TARGETS.items():
            got = emit(gm, tmp_path / f"{name}-{activation.replace('/', '-')}")([x])[0]
            different = (got - expected).abs() > 1e-4 * expected.abs().max()  # a whole step is 4e-3 of it or more
            assert different.float().mean() <= 1e-4  # what the last bit of a division may do


@pytest.mark.parametrize("family", [*QUICK, pytest.param("deepseek", marks=pytest.mark.slow)])
def test_the_artifacts_hold_the_integers_of_the_qdq_form(family: str, tmp_path: Path) -> None:
    gm = captured(family)
    gm = qdq(gm, "int4/asym/g32", "int8/asym/tensor", random_inputs(gm))
    torch_module.emit(gm, tmp_path / "torch", {})
    held = torch_module.stored_codes(torch_module.load(tmp_path / "torch"))
    expected = manifest.quantized_tensors(gm)
    assert held.keys() == expected.keys()
    for path, tensor in expected.items():
        assert held[path].codes is None or torch.equal(held[path].codes, tensor.codes)  # type: ignore[arg-type]
        assert torch.equal(held[path].scale, tensor.scale)  # type: ignore[arg-type]
        assert torch.equal(held[path].zero_point, tensor.zero_point)  # type: ignore[arg-type]
    onnx.emit(gm, tmp_path / "onnx", {})
    assert verify(tmp_path / "onnx").differences == ()


def test_greedy_tokens_are_equal(tmp_path: Path) -> None:
    gm = captured("llama")
    gm = qdq(gm, "int4/asym/g32", None, random_inputs(gm))
    onnx.emit(gm, tmp_path / "onnx", {})
    torch_module.emit(gm, tmp_path / "torch", {})
    session = OnnxSession(tmp_path / "onnx" / "model.onnx", source_of(gm))
    models: list[Callable[..., Any]] = [CompiledModel(gm), torch_module.load(tmp_path / "torch"), session]
    prompt = torch.arange(6).view(2, 3)
    spoken: list[Tensor] = []
    for model in models:
        tokens = prompt
        for _ in range(12):
            with torch.no_grad():
                tokens = torch.cat([tokens, model(tokens)["logits"][:, -1].argmax(-1, keepdim=True)], 1)
        spoken.append(tokens)
    assert torch.equal(spoken[0], spoken[1])
    assert torch.equal(spoken[0], spoken[2])


class Experts(nn.Module):
    """One product of rows by the matrices of their experts; which expert gets a row is not up to a quantized layer."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ParameterDict({"up_proj": nn.Parameter(torch.empty(4, 24, 40))})

    def forward(self, x: Tensor) -> Tensor:
        order, offsets = route(x[:, :4])
        return ops.grouped_linear(x[order], self.experts["up_proj"], offsets)[order.argsort()]


EXPERTS = {
    "one plan": [Rule(Blocks(), Plan(parse_quant("int8/channel"), parse_quant("int8/asym/tensor")))],
    "by token": [Rule(Blocks(), Plan(parse_quant("int4/g8"), parse_quant("int8/asym/token/dynamic")))],
    "several plans": [
        Rule(Blocks(), Plan(parse_quant("int4/asym/g8"))),
        Rule(Name("experts.1"), Plan(parse_quant("int8/channel"), parse_quant("int8/tensor"))),
        Rule(Name("experts.3"), Plan(parse_quant("int6/channel"), parse_quant("int6/token/dynamic"))),
        Rule(Name("experts.0"), KeepFloat("as an example")),
    ],
}


@pytest.mark.parametrize("weight", ["nvfp4", "mxfp4", "int4/over_int8/g8", "hifloat8/channel"])
def test_experts_in_formats_of_the_torch_target(weight: str, tmp_path: Path) -> None:
    x = torch.randn(30, 40, generator=torch.Generator().manual_seed(7))
    gm = capture(Experts(), x, once=True)
    rules = (Rule(Blocks(), Plan(parse_quant(weight))), Rule(Name("experts.2"), Plan(parse_quant("int8/channel"))))
    Pipeline(passes_for(Spec(rules))).run(gm, [(x,)])
    run = through_torch(gm, tmp_path / "artifact")
    with torch.no_grad():
        assert relative(run([x]), gm(x)) <= 1e-6  # the same float32 products of the same weights
    assert verify(tmp_path / "artifact").differences == ()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("plans", EXPERTS)
def test_experts_agree_on_their_own_input(plans: str, target: str, tmp_path: Path) -> None:
    x = torch.randn(30, 40, generator=torch.Generator().manual_seed(7)) + 0.3
    gm = capture(Experts(), x, once=True)
    Pipeline(passes_for(Spec(tuple(EXPERTS[plans])))).run(gm, [(x,)])
    run = TARGETS[target](gm, tmp_path / "artifact")
    for rows in (x, x[:1], x[x[:, :4].argmax(-1) != 2]):  # one expert alone, and one without rows
        with torch.no_grad():
            # the same codes give the same integers; only their scaling is summed in float32, in another order
            assert relative(run([rows]), gm(rows)) <= 1e-5


STORED = dict.fromkeys(
    [*WEIGHT_ONLY, *(weight for weight, _ in (*FLOATS, *REFERENCE, *TORCH_ONLY) if "ofmr" not in weight)]
)


KERNELS_LACK = [weight for weight, _ in REFERENCE] + ["mxfp4/amct_llm"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("weight", STORED)
def test_an_embedding_gives_the_same_numbers(weight: str, target: str, tmp_path: Path) -> None:
    if target == "onnx" and weight.startswith(("hifloat8", "float4_e1m2")):
        pytest.skip("ONNX has no types for it: refused, below")
    judged = {"reference": True} if target == "onnx" and weight in KERNELS_LACK else {}
    tokens = torch.arange(24).view(2, 12)
    gm = capture(nn.Sequential(nn.Embedding(24, 40)), tokens, once=True)
    rule = Rule(Exact("0"), Plan(parse_quant(weight)))
    Pipeline(passes_for(Spec((rule,)))).run(gm)
    run = TARGETS[target](gm, tmp_path / "artifact", **judged)
    with torch.no_grad():
        assert torch.equal(run([tokens])[0], gm(tokens)[0])  # nothing is summed
