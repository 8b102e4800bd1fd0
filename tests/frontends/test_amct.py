"""AMCT configs: what each example and each of AMCT's own configs means, on which layers, and in AMCT's numbers."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphq
from graphq.capture.source import source_of
from graphq.errors import SpecError
from graphq.frontends import amct, load_spec, print_spec
from graphq.spec.match import Layer
from graphq.spec.rules import Spec, resolve
from tests.models import tiny

CONFIGS = Path(__file__).parents[2] / "examples" / "configs" / "amct"
GOLDEN = {
    "fp8_fp4_smoothquant": """\
graphq: 1
rules:
  - match: kind:linear|conv2d
    weight: float4_e2m1/over_float8/g32
    input: float8_e4m3fn/tensor
    only_if:
      - kind linear
      - dtype bfloat16
      - K > 32
      - K % 64
      - no bias
  - match: ~lm_head
    float: 'skip_layers: lm_head'
    may_match_nothing: true
algorithms:
  - smooth-quant:
      alpha: 0.5
      where: multiply
prefix: float
run:
  batches: 1
""",
    "fp8_ofmr_resnet": """\
graphq: 1
rules:
  - match: kind:linear|conv2d
    weight: float8_e4m3fn/channel/ofmr_absolute
    input: float8_e4m3fn/tensor/ofmr_absolute
    only_if:
      - kind linear|conv2d
      - dtype float32|bfloat16|float16
      - zero padding
run:
  batches: 2
""",
    "hif8_cast": """\
graphq: 1
rules:
  - match: kind:linear|conv2d
    weight: hifloat8/channel
    input: hifloat8/unit/tensor/dynamic
    only_if:
      - kind linear
      - dtype float32|bfloat16|float16
  - match: ~lm_head
    float: 'skip_layers: lm_head'
    may_match_nothing: true
""",
    "hif8_kv_cache": """\
graphq: 1
rules:
  - match: kind:linear|conv2d
    weight: hifloat8/channel
    input: hifloat8/tensor/ema
    only_if:
      - kind linear
      - dtype float32|bfloat16|float16
  - match: ~lm_head
    float: 'skip_layers: lm_head'
    may_match_nothing: true
cache: hifloat8/tensor/ema
run:
  batches: 1
""",
    "hif8_ofmr": """\
graphq: 1
rules:
  - match: kind:linear|conv2d
    weight: hifloat8/channel/ofmr_absolute
    input: hifloat8/tensor/ofmr_absolute
    only_if:
      - kind linear|conv2d
      - dtype float32|bfloat16|float16
      - zero padding
  - match: ~lm_head
    float: 'skip_layers: lm_head'
    may_match_nothing: true
run:
  batches: 2
""",
    "int4_awq": """\
graphq: 1
rules:
  - match: kind:linear|conv2d
    weight: int4/by_sign/channel
    only_if:
      - kind linear
      - dtype float32|bfloat16|float16
      - N <= 65535
      - K <= 65535
      - K % 64
      - N % 64
  - match: ~lm_head
    float: 'skip_layers: lm_head'
    may_match_nothing: true
algorithms:
  - awq:
      n_grid: 20
      duo: false
      power: 4
      clip: false
      where: multiply
prefix: float
run:
  batches: 1
""",
    "int4_gptq_groups": """\
graphq: 1
rules:
  - match: kind:linear|conv2d
    weight: int4/asym/joint/g32
    only_if:
      - kind linear
      - dtype float32|bfloat16|float16
      - N <= 65535
      - K <= 65535
      - K > 32
      - K % 64
      - N % 64
  - match: ~lm_head
    float: 'skip_layers: lm_head'
    may_match_nothing: true
  - match: ~k_proj
    float: 'skip_layers: k_proj'
    may_match_nothing: true
algorithms:
  - gptq:
      scales: plan
prefix: float
run:
  batches: 2
""",
    "int8_mlp_int4": """\
graphq: 1
rules:
  - match: kind:linear|conv2d
    weight: int8/by_sign/channel
    only_if:
      - kind linear
      - dtype bfloat16|float16
      - N <= 65535
      - K <= 65535
      - K % 32
      - N % 32
  - match: '*mlp*'
    weight: int4/by_sign/g64
    only_if:
      - kind linear
      - dtype float32|bfloat16|float16
      - N <= 65535
      - K <= 65535
      - K > 64
      - K % 64
      - N % 64
  - match: ~lm_head
    float: 'skip_layers: lm_head'
    may_match_nothing: true
  - match: ~layers.0.
    float: 'skip_layers: layers.0.'
    may_match_nothing: true
""",
    "int8_per_token": """\
graphq: 1
rules:
  - match: kind:linear|conv2d
    weight: int8/by_sign/channel
    input: int8/by_sign/token/dynamic
    only_if:
      - kind linear
      - dtype bfloat16|float16
      - K % 16
      - N % 8
  - match: ~lm_head
    float: 'skip_layers: lm_head'
    may_match_nothing: true
""",
    "int8_smoothquant": """\
graphq: 1
rules:
  - match: kind:linear|conv2d
    weight: int8/by_sign/channel
    input: int8/asym/joint/tensor
    only_if:
      - kind linear
      - dtype bfloat16|float16
  - match: ~lm_head
    float: 'skip_layers: lm_head'
    may_match_nothing: true
algorithms:
  - smooth-quant:
      alpha: 0.8
      where: multiply
prefix: float
run:
  batches: 4
""",
    "mxfp8": """\
graphq: 1
rules:
  - match: kind:linear|conv2d
    weight: mxfp8_e4m3
    input: mxfp8_e4m3/dynamic
    only_if:
      - kind linear
      - dtype bfloat16
      - K/32 % 2
  - match: ~lm_head
    float: 'skip_layers: lm_head'
    may_match_nothing: true
""",
    "quantize_int8": """\
graphq: 1
rules:
  - match: kind:linear|conv2d
    weight: int8/by_sign/tensor
    only_if:
      - kind linear
      - dtype bfloat16|float16
      - N <= 65535
      - K <= 65535
      - K % 32
      - N % 32
run:
  batches: 1
""",
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples(path: Path) -> None:
    spec = load_spec(path)
    assert print_spec(spec) == GOLDEN[path.stem]
    assert (spec.dialect, spec.notes) == ("amct", ())
    assert path.read_text(encoding="utf-8").startswith("# ")


# -- what each example quantizes in a Llama of 2 blocks, in bfloat16

BLOCKS = tuple(f"model.layers.{block}." for block in range(2))
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
MLP = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
LLAMA = [f"{block}{name}" for block in BLOCKS for name in (*ATTENTION, *MLP)]
SKIPPED = "skip_layers: lm_head"
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "head_dim": 32}

# example -> what the linears of the blocks get, what the head gets, and the exceptions
EXAMPLES: dict[str, tuple[str, str, dict[str, str]]] = {
    "quantize_int8": ("int8/by_sign/tensor", "int8/by_sign/tensor", {}),
    "int4_awq": ("int4/by_sign/channel", SKIPPED, {}),
    "int4_gptq_groups": (
        *("int4/asym/joint/g32", SKIPPED),
        {f"{block}self_attn.k_proj": "skip_layers: k_proj" for block in BLOCKS},
    ),
    "int8_smoothquant": ("int8/by_sign/channel, int8/asym/joint/tensor", SKIPPED, {}),
    "int8_per_token": ("int8/by_sign/channel, int8/by_sign/token/dynamic", SKIPPED, {}),
    "int8_mlp_int4": (
        *("int8/by_sign/channel", SKIPPED),
        dict.fromkeys(LLAMA[:7], "skip_layers: layers.0.") | dict.fromkeys(LLAMA[11:], "int4/by_sign/g64"),
    ),
    "hif8_ofmr": ("hifloat8/channel/ofmr_absolute, hifloat8/tensor/ofmr_absolute", SKIPPED, {}),
    "hif8_cast": ("hifloat8/channel, hifloat8/unit/tensor/dynamic", SKIPPED, {}),
    "mxfp8": ("mxfp8_e4m3, mxfp8_e4m3/dynamic", SKIPPED, {}),
    "fp8_fp4_smoothquant": ("float4_e2m1/over_float8/g32, float8_e4m3fn/tensor", SKIPPED, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_compile(name: str) -> None:
    layers, head, others = EXAMPLES[name]
    model = tiny("llama", **SIZES).bfloat16()
    spec = load_spec(CONFIGS / f"{name}.yaml")
    batches = [
        {"input_ids": torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(i))} for i in range(4)
    ]
    made = graphq.compile(model, spec, calibration=batches)
    found = {
        one.layer.fqn: one.reason or ", ".join(str(quant) for quant in (one.weight, one.input) if quant)
        for one in made.report.layers
    }
    assert found == dict.fromkeys(LLAMA, layers) | others | {
        "lm_head": head,
        "model.embed_tokens": "embedding: quantized only when a rule names it",
    }
    with torch.no_grad():
        wanted = model(**batches[0]).logits.float()
        error = (made(**batches[0])["logits"].float() - wanted).square().mean() / wanted.square().mean()  # pyright: ignore[reportArgumentType, reportCallIssue, reportIndexIssue, reportOptionalSubscript]
    assert error < 0.1
    report = graphq.explain(model, spec)
    assert {one.layer.fqn: one.reason for one in report.layers} == {
        one.layer.fqn: one.reason for one in made.report.layers
    }


@pytest.mark.slow
def test_resnet() -> None:
    model = tiny("resnet")
    batch = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    made = graphq.compile(model, load_spec(CONFIGS / "fp8_ofmr_resnet.yaml"), calibration=[batch, batch])
    assert {str(one.weight) for one in made.report.layers} == {"float8_e4m3fn/channel/ofmr_absolute"}
    assert {one.layer.kind for one in made.report.layers} == {"linear", "conv2d"}


def test_a_cache() -> None:
    batch = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    made = graphq.compile(tiny("llama"), load_spec(CONFIGS / "hif8_kv_cache.yaml"), calibration=[batch])
    assert [str(one.quant) for one in made.report.caches] == ["hifloat8/tensor/ema"] * 4
    inputs = {i.name: i.dtype for i in source_of(made.graph).inputs}
    assert inputs["past_key_values.1.value"] == torch.uint8


# -- AMCT's own configs

PLANS = {
    "INT4_AWQ_WEIGHT_QUANT_CFG": "weight int4/by_sign/channel",
    "INT4_GPTQ_WEIGHT_QUANT_CFG": "weight int4/by_sign/channel",
    "INT8_SMOOTHQUANT_CFG": "weight int8/by_sign/channel, input int8/by_sign/tensor",
    "INT8_MINMAX_WEIGHT_QUANT_CFG": "weight int8/by_sign/channel",
    "HIFP8_OFMR_CFG": "weight hifloat8/tensor/ofmr_absolute, input hifloat8/tensor/ofmr_absolute",
    "FP8_OFMR_CFG": "weight float8_e4m3fn/tensor/ofmr_absolute, input float8_e4m3fn/tensor/ofmr_absolute",
    "MXFP8_QUANT_CFG": "weight mxfp8_e4m3, input mxfp8_e4m3/dynamic",
    "MXFP4_AWQ_WEIGHT_QUANT_CFG": "weight mxfp4/amct",
    "HIFP8_CAST_CFG": "weight hifloat8/channel, input hifloat8/unit/tensor/dynamic",
    "HIFP8_QUANTILE_CFG": "weight hifloat8/tensor, input hifloat8/tensor/ema",
    "HIFP8_SMOOTHQUANT_CFG": "weight hifloat8/channel, input hifloat8/tensor",
    "HIFP8_KVCACHE_CFG": "float (quant_cfg has no weights for it)",
}
NAMED = {"AWQ": "awq", "GPTQ": "gptq", "SMOOTHQUANT": "smooth-quant"}


@pytest.mark.parametrize("name", amct.PRESETS)
def test_presets(name: str) -> None:
    spec = load_spec(amct.preset(name))
    assert str(spec.rules[0].decision) == PLANS[name]
    assert [one.name for one in spec.algorithms] == [own for word, own in NAMED.items() if word in name]
    assert spec.run.batches == (None if name == "HIFP8_CAST_CFG" else 1)
    skipped = [str(rule.match) for rule in spec.rules[1:]]
    assert skipped == ([] if name in ("HIFP8_OFMR_CFG", "HIFP8_KVCACHE_CFG") else ["~lm_head"])
    assert str(spec.cache) == ("hifloat8/tensor/ema" if "KVCACHE" in name else "None")
    assert (spec.dialect, spec.notes) == ("amct", ())


def test_all_presets_are_tested() -> None:
    assert set(PLANS) == set(amct.PRESETS)


def test_the_default_is_a_copy() -> None:
    assert amct.default_config() == amct.preset("INT8_MINMAX_WEIGHT_QUANT_CFG")
    spoiled: Any = amct.default_config()
    spoiled["quant_cfg"]["weights"]["type"] = "int4"
    assert str(load_spec(amct.default_config()).rules[0].decision) == "weight int8/by_sign/channel"
    with pytest.raises(SpecError) as caught:
        amct.preset("INT8_MINMAX_CFG")
    assert caught.value.problems == (
        "'INT8_MINMAX_CFG' is not a config of AMCT's; did you mean INT8_MINMAX_WEIGHT_QUANT_CFG?",
    )


# -- AMCT's numbers: a layer of eight inputs and outputs, twelve tokens, recorded from its own code

W = torch.tensor(
    [
        [0.10, -0.70, 0.35, 1.00, 0.22, -0.41, 0.05, 0.63],
        [-2.00, 0.50, 0.25, 1.50, -0.33, 0.77, -1.10, 0.08],
        [0.31, 0.29, -0.58, 0.44, 0.91, -0.12, 0.67, -0.85],
        [-0.15, 0.93, 0.72, -0.26, 0.38, 0.54, -0.49, 1.20],
        [0.02, 0.11, -0.07, 0.19, -0.23, 0.31, 0.27, -0.05],
        [1.25, -1.5, 0.75, 0.5, -0.25, 0.125, -0.625, 0.875],
        [0.4, 0.3, 0.2, 0.1, -0.1, -0.2, -0.3, -0.4],
        [0.9, -0.8, 0.7, -0.6, 0.5, -0.4, 0.3, -0.2],
    ]
)
X = torch.tensor([[((7 * i + 5 * j) % 11 - 5) / 4 * (4 if j == 2 else 1) for j in range(8)] for i in range(12)])
INT4 = {"type": "int4", "symmetric": True, "strategy": "channel"}
INT8 = {"type": "int8", "symmetric": True, "strategy": "channel"}


def of_any_layer(config: dict[str, Any]) -> Spec:
    """The spec without what AMCT needs of a layer: its own numbers are of a small one, in float32."""
    spec = load_spec(config)
    return dataclasses.replace(spec, rules=tuple(dataclasses.replace(rule, only_if=()) for rule in spec.rules))


def compiled(config: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """The mean squared error of the output, and the tensors that the layer holds."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    model[0].weight.data = W.clone()
    made = graphq.compile(model.eval(), of_any_layer(config), inputs=X, calibration=[X])
    y = made(X)
    assert isinstance(y, Tensor)
    return float((y - X @ W.T).square().mean()), dict(made.graph.state_dict())


@pytest.mark.parametrize(
    ("algorithm", "error"), [({"minmax"}, 0.0232386), ({"gptq"}, 0.0141919), ({"awq": {"grids_num": 20}}, 0.0085131)]
)
def test_numbers_of_int4(algorithm: Any, error: float) -> None:
    assert compiled({"quant_cfg": {"weights": INT4}, "algorithm": algorithm})[0] == pytest.approx(error, rel=1e-4)


def test_numbers_of_smooth_quant() -> None:
    inputs = {"type": "int8", "symmetric": True, "strategy": "tensor"}
    config: dict[str, Any] = {"quant_cfg": {"weights": INT8, "inputs": inputs}, "algorithm": "smoothquant"}
    error, held = compiled(config)
    assert error == pytest.approx(1.2114e-4, rel=1e-4)
    assert held["0.input_scale"].item() == pytest.approx(0.015247965, rel=1e-6)
    config["quant_cfg"] = {"weights": INT8 | {"strategy": "tensor"}, "inputs": inputs | {"symmetric": False}}
    config["algorithm"] = {"smoothquant": {"smooth_strength": 0.8}}
    error, held = compiled(config)
    assert error == pytest.approx(2.7886e-4, rel=1e-4)
    assert held["0.input_scale"].item() == pytest.approx(0.010216357, rel=1e-6)
    assert held["0.input_zero_point"].item() == -1
    assert held["0.weight_scale"].item() == pytest.approx(0.022668421, rel=1e-6)


@pytest.mark.parametrize(("name", "weight"), [("hifloat8", 0.125), ("float8_e4m3fn", 0.03125)])
def test_numbers_of_ofmr(name: str, weight: float) -> None:
    both = {"type": name, "symmetric": True, "strategy": "tensor"}
    _, held = compiled({"quant_cfg": {"weights": both, "inputs": both}, "algorithm": {"ofmr"}})
    assert held["0.weight_scale"].item() == weight
    assert held["0.input_scale"].item() == 2.0**-5  # of equal losses the smallest


def test_numbers_of_cast() -> None:
    both = {"type": "hifloat8", "symmetric": True, "strategy": "tensor"}
    model = nn.Sequential(nn.Linear(8, 8, bias=False)).eval()
    model[0].weight.data = W.clone()
    config = {"quant_cfg": {"weights": both, "inputs": both}, "algorithm": {"cast"}}
    x = torch.tensor([[1.0625, 13.0, 17.0, 18.0, -6.3, 0.1, 0.7, 100.0]])
    cast = torch.tensor([[1.125, 13.0, 16.0, 20.0, -6.5, 0.09375, 0.6875, 96.0]])  # AMCT's own encodings
    y = graphq.compile(model, of_any_layer(config), inputs=x)(x)
    w = graphq.fake_quantize(W, "hifloat8/tensor")
    assert isinstance(y, Tensor)
    torch.testing.assert_close(y, cast @ w.T, rtol=1e-6, atol=1e-6)


# -- layers that AMCT leaves float

UNFIT = {
    "a.fits": Layer("a.fits", "linear", (64, 128), dtype="bfloat16"),
    "a.short": Layer("a.short", "linear", (64, 32), dtype="bfloat16"),
    "a.odd": Layer("a.odd", "linear", (100, 128), dtype="bfloat16"),
    "a.wide": Layer("a.wide", "linear", (65536, 128), dtype="bfloat16"),
    "a.float": Layer("a.float", "linear", (64, 128)),
    "a.bias": Layer("a.bias", "linear", (64, 128), dtype="bfloat16", bias=True),
    "a.conv": Layer("a.conv", "conv2d", (64, 128, 1, 1), dtype="bfloat16"),
    "a.padded": Layer("a.padded", "conv2d", (64, 128, 1, 1), dtype="bfloat16", padding="reflect"),
}
TOKEN = {"type": "int8", "symmetric": True, "strategy": "token"}
FP8 = {"type": "float8_e4m3fn", "symmetric": True, "strategy": "tensor"}
MX = {"type": "mxfp8_e4m3fn", "symmetric": True, "strategy": "group"}
LINEAR = {"a.conv": "kind linear", "a.padded": "kind linear"}


@pytest.mark.parametrize(
    ("quant_cfg", "algorithm", "needs"),
    [
        ({"weights": INT8}, "minmax", {
            "a.odd": "N % 32", "a.wide": "N <= 65535", "a.float": "dtype bfloat16|float16"}),
        ({"weights": INT4}, "minmax", {"a.short": "K % 64", "a.odd": "N % 64", "a.wide": "N <= 65535"}),
        ({"weights": INT8 | {"strategy": "group", "group_size": 32}}, "awq", {
            "a.short": "K > 32", "a.odd": "N % 32", "a.wide": "N <= 65535", "a.float": "dtype bfloat16|float16"}),
        ({"weights": INT8, "inputs": TOKEN}, "minmax", {"a.odd": "N % 8", "a.float": "dtype bfloat16|float16"}),
        ({"weights": MX | {"group_size": 32}, "inputs": MX}, "mxquant", {
            "a.short": "K/32 % 2", "a.float": "dtype bfloat16"}),
        ({"weights": FP8 | {"type": "float4_e2m1", "strategy": "group", "group_size": 32}, "inputs": FP8}, "minmax", {
            "a.short": "K > 32", "a.float": "dtype bfloat16", "a.bias": "no bias"}),
        ({"weights": FP8, "inputs": FP8}, "ofmr", {"a.padded": "zero padding"}),
    ],
)  # fmt: skip
def test_layers_that_stay_float(quant_cfg: dict[str, Any], algorithm: str, needs: dict[str, str]) -> None:
    spec = load_spec({"quant_cfg": quant_cfg, "algorithm": algorithm})
    resolved, _ = resolve(spec, UNFIT)
    needs = needs if algorithm == "ofmr" else needs | LINEAR
    found = {
        fqn: str(one.decision).removeprefix("float (needs ").partition(":")[0]
        for fqn, one in resolved.items()
        if str(one.decision).startswith("float (")
    }
    assert found == needs


def test_skip_layers_win_over_patterns_and_match_any_part() -> None:
    spec = load_spec(
        {
            "quant_cfg": {"weights": INT8, "*proj*.weights": INT4},
            "algorithm": "minmax",
            "skip_layers": {"down", "ers.1"},
        }
    )
    names = ("layers.0.down_proj", "layers.0.up_proj", "layers.1.up_proj", "layers.0.fc")
    resolved, notes = resolve(spec, {name: Layer(name, "linear", (64, 64), dtype="float16") for name in names})
    assert [str(one.decision) for one in resolved.values()] == [
        "float (skip_layers: down)",
        "weight int4/by_sign/channel",
        "float (skip_layers: ers.1)",
        "weight int8/by_sign/channel",
    ]
    assert notes == ()


def test_a_part_that_no_name_holds_is_noted() -> None:
    spec = load_spec({"quant_cfg": {"weights": INT8}, "algorithm": "minmax", "skip_layers": ["head"]})
    assert resolve(spec, UNFIT)[1] == ("skip_layers[0]: ~head matches no layer",)
