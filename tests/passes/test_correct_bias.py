"""Corrected biases: the mean output of a layer is that of its float weight again."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.capture.source import SHARED
from graphq.errors import GraphError, PassError, SpecError
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.passes.calibrate import Calibrate
from graphq.passes.correct_bias import CorrectBias
from graphq.passes.observe import Observe, observers
from graphq.passes.observe_means import ObserveMeans
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.state import put_tensor, tensor_of
from tests.graphs import annotated, assert_vals, plan, run
from tests.models import MLP, Blocks, ConvBnRelu, MoE, Tied, Twice, capture, captured, random_inputs

WEIGHT = "int3/channel"


def data(*shape: int, count: int = 3) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(shape, generator=generator) + 0.5,) for _ in range(count)]


def corrected(gm: fx.GraphModule, batches: Any, notes: list[str] | None = None) -> int:
    """The number of layers that were corrected; no observer is left of them."""
    note = None if notes is None else notes.append
    steps = [ObserveMeans(), Calibrate(), QuantizeWeights(), CorrectBias(note)]
    return Pipeline(steps, strict=True).run(gm, batches)["correct-bias"]


def means(gm: fx.GraphModule, batches: list[tuple[Tensor]], axis: int) -> Tensor:
    """The mean output of each channel over all batches."""
    y = torch.stack([run(gm, *batch) for batch in batches]).double()
    return y.movedim(axis, -1).flatten(0, -2).mean(0)


def assert_mean_kept(model: nn.Module, axis: int, *shape: int) -> fx.GraphModule:
    """The one layer of ``model``, corrected, has its float mean output; without the correction it has not."""
    batches = data(*shape)
    gm, plain = (annotated(capture(model, batches[0][0]), blocks=WEIGHT) for _ in range(2))
    wanted = means(gm, batches, axis)
    QuantizeWeights().run(plain)
    assert corrected(gm, batches) == 1
    assert observers(gm) == []
    size = wanted.abs().max()
    # Both sums are of float32 products, whose rounding is 2^-24 relative for each term; so is that of the bias.
    assert (means(gm, batches, axis) - wanted).abs().max() <= 1e-5 * size
    assert (means(plain, batches, axis) - wanted).abs().max() > 1e-2 * size
    assert_vals(gm, *batches[0])
    return gm


def test_golden() -> None:
    gm = annotated(capture(MLP(bias=False), torch.ones(2, 8)), up=WEIGHT, down="int4/asym/g4")
    assert corrected(gm, data(5, 8)) == 2
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, 8] = input
%1: f32[12, 8] = graphq.dequantize(@up.weight, @up.weight_scale, None, None, 'int3', [1, -1], f32)
%2: f32[batch, 12] = aten.linear(%x, %1, @up.bias)  # up: weight int3/channel
%3: f32[batch, 12] = aten.relu(%2)
%4: f32[8, 12] = graphq.dequantize(@down.weight, @down.weight_scale, @down.weight_zero_point, None, 'int4/asym', [1, 4], f32)
%5: f32[batch, 8] = aten.linear(%3, %4, @down.bias)  # down: weight int4/asym/g4
return [%5]
""",
    )
    assert [name for name, _ in gm.named_parameters()] == ["up.bias", "down.bias"]
    assert not hasattr(gm, "observers")
    assert Pipeline([CorrectBias()], strict=True).run(gm) == {"correct-bias": 0}


class Call(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width, out)), nn.Parameter(torch.empty(out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize(
    ("model", "axis", "shape"),
    [
        (nn.Linear(8, 6), -1, (5, 3, 8)),
        (nn.Linear(8, 6, bias=False), -1, (5, 8)),
        (Call(8, 6), -1, (5, 8)),
        (Call(8, 8), -1, (5, 8)),  # where its transpose would do as well
        (nn.Conv1d(4, 6, 3, padding=2, stride=2), -2, (5, 4, 9)),
        (nn.Conv1d(4, 6, 4, padding="same", groups=2, bias=False), -2, (5, 4, 9)),
        (nn.Conv2d(4, 6, 3, padding=(0, 2), dilation=2, stride=(2, 1)), -3, (5, 4, 9, 8)),
        (nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), -3, (5, 4, 6, 6)),
        (nn.Conv2d(4, 8, (2, 3), padding="same"), -3, (5, 4, 6, 6)),
    ],
)
def test_the_mean_output_is_the_float_weights(model: Any, axis: int, shape: tuple[int, ...]) -> None:
    assert_mean_kept(model if isinstance(model, Call) else nn.Sequential(model), axis, *shape)


def test_a_layer_called_twice_has_one_bias_for_both() -> None:
    batches = data(5, 8)
    gm = annotated(capture(Twice(), torch.ones(2, 8)), shared=WEIGHT)
    w = tensor_of(gm, "shared.weight").detach().double()
    x = torch.cat([x for (x,) in batches]).double()
    reads = torch.cat([x, F.relu(x @ w.t())])
    assert corrected(gm, batches) == 1
    codes, scale = (tensor_of(gm, f"shared.{name}").double() for name in ("weight", "weight_scale"))
    wanted = (reads @ (w - codes * scale).t()).mean(0)
    assert (tensor_of(gm, "shared.bias") - wanted).abs().max() <= 1e-5 * wanted.abs().max()  # of float32 outputs


def test_a_bias_of_two_uses_weighs_them_by_what_they_read() -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(x) + self.shared(x.square().sum(1, keepdim=True))

    batches = data(2, 5, 8)
    gm = annotated(capture(Uneven(), torch.ones(2, 3, 8)), shared=WEIGHT)
    w, bias = (tensor_of(gm, f"shared.{name}").detach().double().clone() for name in ("weight", "bias"))
    x = torch.cat([x for (x,) in batches]).double()
    reads = torch.cat([x.flatten(0, 1), x.square().sum(1)])
    assert corrected(gm, batches) == 1
    codes, scale = (tensor_of(gm, f"shared.{name}").double() for name in ("weight", "weight_scale"))
    added = (reads @ (w - codes * scale).t()).mean(0)
    assert (tensor_of(gm, "shared.bias") - bias - added).abs().max() <= 1e-5 * added.abs().max()  # of float32 outputs


def test_a_corrected_layer_is_corrected_once() -> None:
    notes: list[str] = []
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=WEIGHT, down=WEIGHT)
    assert corrected(gm, data(5, 8), notes) == 2
    before = dump(gm)
    steps = [ObserveMeans(), Calibrate(), CorrectBias(notes.append)]
    assert Pipeline(steps, strict=True).run(gm, data(5, 8)) == {"observe-means": 0, "calibrate": 0, "correct-bias": 0}
    assert (dump(gm), notes) == (before, [])


def test_a_part_leaves_what_other_parts_read_to_the_whole() -> None:
    notes: list[str] = []
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=WEIGHT, down=WEIGHT)
    gm.meta[SHARED] = frozenset({"up.weight"})
    bias = tensor_of(gm, "up.bias").clone()
    assert corrected(gm, data(5, 8), notes) == 1
    assert notes == []
    assert torch.equal(tensor_of(gm, "up.bias"), bias)
    del gm.meta[SHARED]
    assert corrected(gm, data(5, 8), notes) == 1
    assert not torch.equal(tensor_of(gm, "up.bias"), bias)
    assert notes == []


def test_every_layer_is_corrected_for_the_float_models_inputs() -> None:
    batches = data(5, 8)
    gm = annotated(capture(MLP(), torch.ones(2, 8)), blocks=WEIGHT)
    w = {name: t.detach().double().clone() for name, t in gm.state_dict().items()}
    assert corrected(gm, batches) == 2
    x = torch.cat([x for (x,) in batches]).double()
    for layer, reads in (("up", x), ("down", F.relu(x @ w["up.weight"].t() + w["up.bias"]))):
        codes, scale = (tensor_of(gm, f"{layer}.{name}").double() for name in ("weight", "weight_scale"))
        wanted = w[f"{layer}.bias"] + (reads @ (w[f"{layer}.weight"] - codes * scale).t()).mean(0)
        assert (tensor_of(gm, f"{layer}.bias") - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_exact_weights_need_no_correction() -> None:
    gm = annotated(capture(nn.Sequential(nn.Linear(8, 4)), torch.ones(2, 8)), blocks="int4/tensor")
    codes = torch.randint(-7, 8, (4, 8), generator=torch.Generator().manual_seed(0)).float()
    codes[0, 0] = 7
    put_tensor(gm, "0.weight", nn.Parameter(codes))
    bias = tensor_of(gm, "0.bias").clone()
    assert corrected(gm, data(5, 8)) == 1
    assert (tensor_of(gm, "0.bias") - bias).abs().max() <= 1e-5  # of float32 outputs of magnitude 20


def test_all_kinds_of_observers_together() -> None:
    gm = annotated(capture(Blocks(), torch.ones(2, 8)), up=plan(WEIGHT, "int8/tensor"), down=plan(None, "int8/tensor"))
    steps = [Observe(), ObserveMeans(), Calibrate(), QuantizeWeights(), CorrectBias(), QuantizeActivations()]
    assert Pipeline(steps, strict=True).run(gm, data(5, 8)) == {
        "observe": 4,
        "observe-means": 4,
        "calibrate": 8,
        "quantize-weights": 2,
        "correct-bias": 2,
        "quantize-activations": 4,
    }
    assert_vals(gm, torch.randn(5, 8))


@pytest.mark.parametrize("family", ["gpt2", "resnet"])
def test_families(family: str) -> None:
    gm = annotated(captured(family), blocks=WEIGHT)
    inputs = [random_inputs(gm, seed=seed) for seed in (0, 1)]
    notes: list[str] = []
    assert corrected(gm, inputs, notes) == {"gpt2": 8, "resnet": 7}[family]
    assert notes == []
    assert_vals(gm, *inputs[0])


# -- layers that are left as they are


@pytest.mark.parametrize(
    ("model", "inputs", "layer", "reason"),
    [
        (MoE(), torch.ones(4, 8), "experts.gate_up_proj", "it adds no bias"),
        (Tied(), torch.ones(2, 3, dtype=torch.int64), "embedding", "it adds no bias"),
    ],
)
def test_layers_that_add_no_bias(model: nn.Module, inputs: Tensor, layer: str, reason: str) -> None:
    notes: list[str] = []
    gm = annotated(capture(model, inputs), **{layer.partition(".")[0]: "int4/channel"})
    assert corrected(gm, [(inputs,)], notes) == 0
    assert notes[0] == f"{layer}: its bias is not corrected: {reason}"


def test_a_bias_that_is_read_elsewhere() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.w(x) + self.v(x) * self.w.bias

    notes: list[str] = []
    gm = annotated(capture(Read(), torch.ones(2, 8)), blocks=WEIGHT)
    w, v = (tensor_of(gm, f"{name}.bias").clone() for name in "wv")
    assert corrected(gm, data(5, 8), notes) == 1
    assert notes == ["w: its bias is not corrected: w.bias is read elsewhere, too"]
    assert torch.equal(tensor_of(gm, "w.bias"), w)
    assert not torch.equal(tensor_of(gm, "v.bias"), v)


def test_means_that_were_not_observed() -> None:
    notes: list[str] = []
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=WEIGHT)
    steps = [QuantizeWeights(), CorrectBias(notes.append)]
    assert Pipeline(steps, strict=True).run(gm, data(5, 8))["correct-bias"] == 0
    assert notes == ["up: its bias is not corrected: its means were not observed"]
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=WEIGHT)
    steps = [ObserveMeans(), QuantizeWeights(), CorrectBias(notes.append)]
    assert Pipeline(steps, strict=True).run(gm, data(5, 8))["correct-bias"] == 0  # no data came by
    assert notes[1:] == notes[:1]
    assert len(observers(gm)) == 2


def test_float_layers_have_no_notes_and_float_weights_are_refused() -> None:
    notes: list[str] = []
    gm = annotated(capture(MLP(), torch.ones(2, 8)), blocks=plan(None, "int8/token/dynamic"))
    assert CorrectBias(notes.append).run(gm) == 0
    assert notes == []
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=WEIGHT)
    with pytest.raises(PassError, match=r"^correct-bias needs quantized weights: up is still float$"):
        Pipeline([CorrectBias()]).run(gm)


def test_a_bias_whose_name_is_taken() -> None:
    gm = annotated(capture(MLP(bias=False), torch.ones(2, 8)), up=WEIGHT)
    put_tensor(gm, "up.bias", torch.ones(3))
    steps = [ObserveMeans(), Calibrate(), QuantizeWeights()]
    Pipeline(steps).run(gm, data(5, 8))
    put_tensor(gm, "up.bias", torch.ones(3))
    with pytest.raises(GraphError, match=r"^up.bias: the model has a tensor of this name, which correct-bias gives"):
        CorrectBias().run(gm)


def test_nan_names_the_layer_and_the_batch() -> None:
    batches = data(5, 4, 8, 8)
    batches[1][0][0, 0, 0, 0] = torch.nan
    gm = annotated(capture(ConvBnRelu(), torch.ones(2, 4, 8, 8)), conv=WEIGHT)
    with pytest.raises(SpecError, match=r"^calibration: batch 1: the input of conv holds NaN or Inf$"):
        corrected(gm, batches)


def test_a_new_bias_has_the_dtype_of_the_product() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).bfloat16())

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.w.float())

    gm = annotated(capture(Half(), torch.ones(2, 8)), w=WEIGHT)
    assert corrected(gm, data(5, 8)) == 1
    assert tensor_of(gm, "w.bias").dtype == torch.float32
    run(gm, torch.ones(2, 8))
