"""Models quantized where they stand: what layers hold, what they give, and that ``graphq.compile`` finds the same."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

import graphq
from graphq.runtime.layers import QuantizedLayer
from graphq.runtime.modules import Int8Linear, PackedWeight
from graphq.spec.rules import Spec
from tests.models import MLP, Blocks, tiny


class Net(nn.Module):
    """Three convolutions, the second in groups and the third depthwise, and two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, dilation=2)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=2, bias=False)
        self.up = nn.Linear(8, 64)
        self.down = nn.Linear(64, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.grouped(F.relu(self.conv(x))))
        return self.down(F.gelu(self.up(h.flatten(2).transpose(1, 2))))


def spec(weight: str, input: str | None = None, algorithms: list[Any] | None = None, batches: int = 1, **more: Any) -> Spec:  # fmt: skip
    """All linears and convolutions of these formats."""
    formats = {"weight": weight} | ({"input": input} if input else {})
    kinds = more.pop("kinds", ("linear", "conv2d"))
    rules = [{"match": f"kind:{kind}", **formats} for kind in kinds]
    document = {"graphq": 1, "rules": rules, "algorithms": algorithms or [], "run": {"batches": batches}, **more}
    return graphq.load_spec(document)


def linears(weight: str, input: str | None = None, algorithms: list[Any] | None = None, batches: int = 1, **more: Any) -> Spec:  # fmt: skip
    """All linears of these formats."""
    return spec(weight, input, algorithms, batches, kinds=("linear",), **more)


def data(*shape: int, count: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


def seeded(model: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) / 3).to(dtype)
    return model.eval()


def held(layer: Any) -> dict[str, tuple[str, list[int]]]:
    """The factors of a layer that are not None: dtypes and shapes."""
    own = dict(layer.named_buffers(recurse=False))
    return {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in own.items()}


@torch.no_grad()
def test_a_model_calibrates_then_quantizes_then_is_packed() -> None:
    model = seeded(MLP())
    first, second, x = data(5, 3, 8, count=3)
    wanted = [model(first), model(second), model(x)]
    assert graphq.quantize(model, linears("int8/by_sign/channel", "int8/asym/joint/tensor", batches=2)) is None
    assert torch.equal(model(first), wanted[0])
    assert held(model.up) == {}
    assert model.up.scale_w is None
    assert torch.equal(model(second), wanted[1])  # the last batch that calibrates still gives floats
    assert held(model.up) == {
        "quantized_weight": ("int8", [12, 8]),
        "scale_w": ("float32", [12, 1]),
        "scale_d": ("float32", [1]),
        "offset_d": ("int32", [1]),
    }
    low, high = (min(first.min(), second.min()), max(first.max(), second.max()))
    assert model.up.scale_d.item() == pytest.approx(float(high - low) / 255, rel=1e-6)
    fake = model(x)
    assert 1e-4 < float((fake - wanted[2]).abs().max()) < 0.05 * float(wanted[2].abs().max())
    assert isinstance(model.up, nn.Linear)
    assert graphq.convert(model) is None
    assert isinstance(model.up, QuantizedLayer)
    assert isinstance(model.up.product, Int8Linear)
    assert not model.up.training
    torch.testing.assert_close(model(x), fake, rtol=1e-5, atol=1e-5 * float(fake.abs().max()))
    assert "up.weight" not in model.state_dict()
    assert model.state_dict()["up.product.weight"].dtype == torch.int8
    assert_expected_inline(
        str(model),
        """\
MLP(
  (up): QuantizedLayer(
    [12, 8], weight int8/by_sign/channel, input int8/asym/joint/tensor
    (product): Int8Linear()
  )
  (down): QuantizedLayer(
    [8, 12], weight int8/by_sign/channel, input int8/asym/joint/tensor
    (product): Int8Linear()
  )
)""",
    )


FORMATS: list[tuple[str, str | None, list[Any]]] = [
    ("int8/by_sign/tensor", None, []),
    ("int8/by_sign/channel", "int8/by_sign/tensor", []),
    ("int8/channel", "int8/token/dynamic", []),
    ("int8/asym/tensor", "int8/asym/tensor/percentile99.9", []),
    ("int8/channel", "int8/g32/dynamic", []),
    ("int8/g32", "int8/tensor", []),
    ("int8/channel", "int8/tensor/ema0.1", []),
    ("int4/g32", None, []),
    ("int4/asym/joint/g32", None, []),
    ("int4/by_sign/channel", None, [{"gptq": {"scales": "plan"}}]),
    ("int4/g32", "int8/token/dynamic", ["gptq"]),
    ("int4/g32", None, ["awq"]),
    ("int4/g32", None, [{"awq": {"power": 4, "duo": False, "clip": False}}, "gptq"]),
    ("int8/channel", "int8/tensor", [{"smooth-quant": {"alpha": 0.7}}]),
    ("int8/channel", "int8/token/dynamic", ["smooth-quant", "gptq"]),
    ("int3/g16/hqq", None, []),
    ("hifloat8/channel", "hifloat8/token/dynamic", []),
    ("hifloat8/channel/ofmr", "hifloat8/tensor/ofmr", []),
    ("float8_e4m3fn/tensor/ofmr_absolute", "float8_e4m3fn/tensor/ofmr_absolute", []),
    ("float8_e4m3fn/channel", None, ["gptq"]),
    ("float8_e4m3fn/32x32", "float8_e4m3fn/g32/dynamic", []),
    ("mxfp4/amct", None, ["awq"]),
    ("mxfp8_e4m3", "mxfp8_e4m3/dynamic", []),
    ("nvfp4", "nvfp4", []),
    ("nvfp4", "nvfp4/dynamic", []),
    ("float4_e2m1/over_float8/g32", "float8_e4m3fn/tensor", ["smooth-quant"]),
]


def texts() -> list[str]:
    return [f"{weight} {input} {'+'.join(a if isinstance(a, str) else next(iter(a)) for a in algorithms)}".strip() for weight, input, algorithms in FORMATS]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("weight", "input", "algorithms"), FORMATS, ids=texts())
@torch.no_grad()
def test_what_is_packed_gives_what_was_fake_quantized(
    weight: str, input: str | None, algorithms: list[Any], dtype: torch.dtype
) -> None:
    model = seeded(MLP(64, 32), dtype)
    batches = data(4, 3, 64, dtype=dtype)
    floats = model(batches[0])
    graphq.quantize(model, linears(weight, input, algorithms, batches=2))
    for batch in batches:
        model(batch)
    fake = model(batches[0])
    assert fake.dtype == dtype
    assert 0 < float((fake - floats).abs().max()) < float(floats.abs().max())
    assert fake.shape == floats.shape
    scale_w = model.up.scale_w
    assert scale_w.shape in {(1,), (32, 1), (32, 2), (32, 4), (1, 2)}
    assert (model.up.scale_factor is not None) == any("smooth" in str(a) or "awq" in str(a) for a in algorithms)
    assert (model.up.offset_w is not None) == ("asym" in weight)
    assert (model.up.scale_d is not None) == (input is not None and "dynamic" not in input)
    assert (model.up.offset_d is not None) == (input is not None and "asym" in input)
    graphq.convert(model)
    got = model(batches[0])
    assert (got.dtype, got.shape) == (dtype, fake.shape)
    if isinstance(model.up.product, PackedWeight):
        assert torch.equal(got, fake)  # the same product of the same numbers
    else:  # sums of integers are exact, those of floats are not
        bound = 1e-5 if dtype == torch.float32 else 0.02
        assert float((got - fake).abs().max()) <= bound * float(fake.abs().max())
    both = weight.startswith("int8") and input is not None
    assert isinstance(model.up.product, Int8Linear) == (both and "/g32" not in f"{weight} {input}")


CONVOLUTIONS: list[tuple[str, str | None, list[Any]]] = [
    ("hifloat8/channel/ofmr_absolute", "hifloat8/tensor/ofmr_absolute", []),
    ("float8_e4m3fn/tensor/ofmr", "float8_e4m3fn/tensor/ofmr", []),
    ("int8/by_sign/channel", "int8/asym/joint/tensor", []),
    ("int8/by_sign/tensor", "int8/tensor", ["gptq"]),
    ("int4/channel", None, ["gptq"]),
]


@pytest.mark.parametrize(("weight", "input", "algorithms"), CONVOLUTIONS)
@torch.no_grad()
def test_convolutions(weight: str, input: str | None, algorithms: list[Any]) -> None:
    model = seeded(Net())
    batches = data(2, 4, 9, 9)
    floats = model(batches[0])
    graphq.quantize(model, spec(weight, input, algorithms, batches=2))
    for batch in batches:
        model(batch)
    assert model.conv.quantized_weight.shape == (8, 4, 3, 3)
    assert model.conv.scale_w.shape == ((8, 1, 1, 1) if "channel" in weight else (1,))
    fake = model(batches[0])
    one = model.conv(batches[0][:1])
    assert 0 < float((fake - floats).abs().max()) < float(floats.abs().max())
    assert torch.equal(model.conv(batches[0][0]), one[0])  # an image without a batch
    graphq.convert(model)
    torch.testing.assert_close(model(batches[0]), fake, rtol=1e-5, atol=1e-5 * float(fake.abs().max()))
    assert torch.equal(model.conv(batches[0][:1]), one)
    assert torch.equal(model.conv(batches[0][0]), one[0])


@torch.no_grad()
def test_a_scaled_convolution() -> None:
    model = seeded(Net())
    batches = data(2, 4, 9, 9)
    graphq.quantize(model, spec("int8/channel", "int8/tensor", [{"smooth-quant": {}}]))
    model(batches[0])
    assert model.conv.scale_factor.shape == (1, 4, 1, 1)
    assert model.grouped.scale_factor is None
    assert graphq.in_place_report(model).notes == (
        "grouped: its input's channels keep their scale: it is a convolution of groups",
    )
    fake = model(batches[1])
    graphq.convert(model)
    torch.testing.assert_close(model(batches[1]), fake, rtol=1e-5, atol=1e-5 * float(fake.abs().max()))


@pytest.mark.parametrize("shape", [(8,), (5, 8), (2, 5, 8), (2, 1, 3, 2, 1, 8)])
@torch.no_grad()
def test_inputs_of_any_rank(shape: tuple[int, ...]) -> None:
    model, flat = seeded(MLP()), seeded(MLP())
    (x,) = data(*shape, count=1)
    for one, batch in ((model, x), (flat, x.reshape(-1, 8))):
        graphq.quantize(one, linears("int8/channel", "int8/token/dynamic", ["smooth-quant"]))
        one(batch)
    fake = model(x)
    assert torch.equal(fake, flat(x.reshape(-1, 8)).reshape(shape))
    graphq.convert(model)
    torch.testing.assert_close(model(x), fake, rtol=1e-5, atol=1e-6)
    assert model(x[..., :0, :]).shape == x[..., :0, :].shape if x.dim() > 1 else True


NAMES = {
    "weight_scale": "scale_w",
    "weight_zero_point": "offset_w",
    "input_scale": "scale_d",
    "input_zero_point": "offset_d",
    "input_factor": "scale_factor",
}


def same_factors(model: nn.Module, compiled: graphq.Compiled) -> int:
    """How many tensors of quantized layers the two have, which are the same, bit for bit."""
    ours, count = model.state_dict(), 0
    for name, wanted in compiled.graph.state_dict().items():
        layer, _, last = name.rpartition(".")
        if f"{layer}.quantized_weight" not in ours or last == "bias":
            continue
        got = ours[f"{layer}.{NAMES.get(last, 'quantized_weight')}"]
        assert torch.equal(got.flatten(), wanted.flatten().to(got.dtype)), name
        count += 1
    return count


SAME: list[tuple[str, str | None, list[Any]]] = [
    ("int8/by_sign/channel", "int8/asym/joint/tensor", []),
    ("int4/g32", None, []),
    ("int4/by_sign/channel", None, [{"gptq": {"scales": "plan"}}]),
    ("int4/asym/g32", "int8/token/dynamic", ["gptq"]),
    ("mxfp4/amct", None, []),
    ("float8_e4m3fn/channel/ofmr", "float8_e4m3fn/tensor/ofmr", []),
    ("int8/channel", "int8/tensor/ema", []),
]


@pytest.mark.parametrize(("weight", "input", "algorithms"), SAME)
@torch.no_grad()
def test_compile_finds_the_same_in_an_mlp(weight: str, input: str | None, algorithms: list[Any]) -> None:
    model, batches = seeded(MLP(64, 32)), data(4, 64)
    asked = linears(weight, input, algorithms, batches=2)
    compiled = graphq.compile(model, asked, inputs=batches[0], calibration=batches)
    report = compiled.report  # later it has the packed module's kernels, too
    graphq.quantize(model, asked)
    for batch in batches:
        model(batch)
    assert same_factors(model, compiled) == 2 * len(held(model.up))
    fixed = 0 if input is None or "dynamic" in input else 2 if "asym" in input else 1
    assert len(held(model.up)) == 2 + ("asym" in weight) + fixed
    fake = model(batches[1])
    torch.testing.assert_close(compiled(batches[1]), fake, rtol=1e-5, atol=1e-5 * float(fake.abs().max()))
    assert str(graphq.in_place_report(model)) == str(report)


@torch.no_grad()
def test_compile_finds_the_same_smoothing_where_nothing_is_shared() -> None:
    model, batches = seeded(MLP(64, 32)), data(4, 64)
    asked = linears("int8/channel", "int8/tensor", [{"smooth-quant": {"where": "multiply"}}], batches=2)
    compiled = graphq.compile(model, asked, inputs=batches[0], calibration=batches)
    graphq.quantize(model, linears("int8/channel", "int8/tensor", [{"smooth-quant": {"where": "fold"}}], 2))
    for batch in batches:
        model(batch)
    assert same_factors(model, compiled) == 8
    assert graphq.in_place_report(model).notes == (
        "smooth-quant: where: fold: in place, factors are multiplied by at run time",
    )


@pytest.mark.parametrize(("weight", "input", "algorithms"), SAME[:3])
@torch.no_grad()
def test_compile_finds_the_same_in_a_llama(weight: str, input: str | None, algorithms: list[Any]) -> None:
    model = tiny("llama")
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 128, (2, 9), generator=generator) for _ in range(2)]
    asked = linears(weight, input, algorithms, batches=2, prefix="float")
    compiled = graphq.compile(model, asked, calibration=batches)
    graphq.quantize(model, asked)
    for batch in batches:
        model(input_ids=batch)
    shared = 0 if input is None else 2 * 3 * 2  # a scale and a zero point that k, v and up have from q and gate
    assert same_factors(model, compiled) == 15 * len(held(model.lm_head)) - shared
    first = model.model.layers[0]
    assert first.self_attn.v_proj.scale_d == first.self_attn.q_proj.scale_d
    fake = model(input_ids=batches[0]).logits
    graphq.convert(model)
    got = model(input_ids=batches[0]).logits
    assert float((got - fake).abs().max()) <= (0 if input is None else 0.02) * float(fake.abs().max())
    assert model.generate(batches[0], max_new_tokens=3, do_sample=False).shape == (2, 12)


@torch.no_grad()
def test_layers_in_and_out_of_the_repeated_blocks_are_told_apart() -> None:
    model = tiny("llama")
    graphq.quantize(model, {"graphq": 1, "weight": "int8/channel"})
    report = graphq.in_place_report(model)
    assert {found.layer.block for found in report.layers} == {0, 1, None}
    assert [(f.layer.fqn, f.reason) for f in report.layers if f.reason] == [
        ("lm_head", "output head: quantized only when a rule names it")
    ]
    assert report.notes == (
        "model.embed_tokens: stays float: a Embedding; in place, nn.Linear and nn.Conv2d are quantized",
    )
    assert len(report.layers) == 15


def test_layers_outside_of_the_blocks_are_named_or_left() -> None:
    model = Blocks()
    graphq.quantize(model, {"graphq": 1, "rules": [{"match": "*", "weight": "int8/channel"}]})
    report = graphq.in_place_report(model)
    assert [(f.layer.fqn, f.layer.block) for f in report.layers][-2:] == [("blocks.1.down", 1), ("head", None)]
    assert report.layers[-1].reason == "outside of the repeated blocks: quantized only when a rule names it"
    assert [f.reason for f in report.layers[:-1]] == [""] * 4


@torch.no_grad()
def test_algorithms_are_for_the_layers_that_they_match() -> None:
    plain, model, batches = seeded(MLP(64, 32)), seeded(MLP(64, 32)), data(4, 64)
    graphq.quantize(plain, linears("int4/channel"))
    graphq.quantize(model, linears("int4/channel", None, [{"gptq": {"match": "up"}}]))
    for one in (plain, model):
        one(batches[0])
    assert not torch.equal(plain.up.quantized_weight, model.up.quantized_weight)
    assert torch.equal(plain.down.quantized_weight, model.down.quantized_weight)


@torch.no_grad()
def test_the_report_measures_errors_and_stays_after_conversion() -> None:
    model, batches = seeded(MLP(64, 32)), data(4, 64)
    graphq.quantize(model, {"graphq": 1, "rules": [{"match": "up", "weight": "int8/channel"}]})
    before = graphq.in_place_report(model)
    assert [layer.sqnr_db for layer in before.layers] == [None, None]
    model(batches[0])
    graphq.convert(model)
    report = graphq.in_place_report(model)
    up, down = report.layers
    assert up.sqnr_db is not None
    assert 35 < up.sqnr_db < 50
    assert (down.plan, down.sqnr_db) == ("float (no rule matches it)", None)
    assert isinstance(model.down, nn.Linear)


@torch.no_grad()
def test_double_weights() -> None:
    model = seeded(MLP(), torch.float64)
    (x,) = data(5, 8, count=1, dtype=torch.float64)
    graphq.quantize(model, linears("int8/channel", "int8/tensor"))
    model(x)
    fake = model(x)
    assert (fake.dtype, model.up.scale_w.dtype, model.up.scale_d.dtype) == (torch.float64, torch.float64, torch.float32)
    fresh = seeded(MLP(), torch.float64)
    graphq.quantize(fresh, linears("int8/channel", "int8/tensor"))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), fake)
    graphq.convert(model)
    assert isinstance(model.up.product, PackedWeight)  # float32 does not hold such products
    assert torch.equal(model(x), fake)


@torch.no_grad()
def test_a_packed_model_is_copied_saved_and_moved_like_any_other() -> None:
    model, batches = seeded(MLP(64, 32)), data(4, 64)
    for one in (model, other := seeded(MLP(64, 32))):
        graphq.quantize(one, linears("int8/channel", "int8/asym/tensor", ["smooth-quant"]))
    model(batches[0])
    other(batches[1])
    for one in (model, other):
        graphq.convert(one)
    y = model(batches[0])
    assert not torch.equal(other(batches[0]), y)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(batches[0]), y)
    assert torch.equal(copy.deepcopy(model)(batches[0]), y)
    assert torch.equal(model.to(torch.bfloat16)(batches[0]), y)  # dtypes are part of it, as of a compiled model
