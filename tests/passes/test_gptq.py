"""GPTQ in graphs: who shares a Hessian, what is left alone, and less error than round-to-nearest."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq import numerics
from graphq.errors import PassError, SpecError
from graphq.ir.layers import PLAN
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.ir.views import Dequantize, ops_of
from graphq.observers.statistics import HessianObserver
from graphq.passes.calibrate import Calibrate
from graphq.passes.gptq import GPTQ
from graphq.passes.observe import Observe, observers
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.spec.plan import Plan
from graphq.spec.quant import Quant, parse_quant
from graphq.state import put_tensor, tensor_of
from tests.graphs import annotated, assert_vals, run
from tests.models import MLP, Attention, MoE, Tied, Twice, capture
from tests.numerics.test_gptq import CODES, MSE, W, X

Data = list[tuple[Tensor, ...]]


def data(*shape: int, count: int = 3) -> Data:
    """Batches whose channels, the last axis, go together, and neighbours on the axes between."""
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(shape[-1], shape[-1], generator=generator)
    made = [torch.randn(shape, generator=generator) @ mixed for _ in range(count)]
    for axis in range(1, len(shape) - 1):
        made = [x + x.roll(1, axis) for x in made]
    return [(x,) for x in made]


def gptq(gm: fx.GraphModule, batches: Iterable[tuple[Tensor, ...]], **options: Any) -> int:
    """The number of layers that were rounded; a second run finds nothing. No observer is left."""
    step = GPTQ(**options)
    steps = [Observe((step,), ranges=False), Calibrate(), step]
    count = Pipeline(steps, strict=True).run(gm, list(batches))["gptq"]
    assert Pipeline([step], strict=True).run(gm) == {"gptq": 0}
    Pipeline([QuantizeActivations()], strict=True).run(gm)
    assert observers(gm) == []
    return count


def hessians(gm: fx.GraphModule, **options: Any) -> list[tuple[str, ...]]:
    """The layers of each Hessian."""
    step = GPTQ(**options)
    count = Pipeline([Observe((step,), ranges=False)], strict=True).run(gm)["observe"]
    assert Pipeline([Observe((step,), ranges=False)], strict=True).run(gm) == {"observe": 0}
    found = [seen.layers for _, seen in observers(gm) if isinstance(seen, HessianObserver)]
    assert len(found) == count
    return found


def test_golden() -> None:
    gm = annotated(
        capture(Attention(), torch.ones(2, 3, 8)), q_proj="int4/channel", k_proj="int3/asym/g4", v_proj="int4/channel"
    )
    assert gptq(gm, data(2, 5, 8)) == 3
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, sequence, 8] = input
%1: f32[batch, sequence, 8] = aten.layer_norm(%x, [8], None, None, 1e-05, False)
%2: f32[8, 8] = graphq.dequantize(@q_proj.weight, @q_proj.weight_scale, None, None, 'int4', [1, -1], f32)
%3: f32[batch, sequence, 8] = aten.linear(%1, %2)  # q_proj: weight int4/channel
%4: f32[8, 8] = graphq.dequantize(@k_proj.weight, @k_proj.weight_scale, @k_proj.weight_zero_point, None, 'int3/asym', [1, 4], f32)
%5: f32[batch, sequence, 8] = aten.linear(%1, %4)  # k_proj: weight int3/asym/g4
%6: f32[batch, sequence, 8] = aten.mul.Tensor(%3, %5)
%7: f32[8, 8] = graphq.dequantize(@v_proj.weight, @v_proj.weight_scale, None, None, 'int4', [1, -1], f32)
%8: f32[batch, sequence, 8] = aten.linear(%1, %7)  # v_proj: weight int4/channel
%9: f32[batch, sequence, 8] = aten.add.Tensor(%6, %8)
return [%9]
""",
    )
    assert_vals(gm, torch.randn(2, 5, 8))


def test_linears_that_read_one_node_share_a_hessian() -> None:
    gm = annotated(capture(Attention(), torch.ones(2, 3, 8)), blocks="int4/channel", k_proj="int8/channel")
    assert hessians(gm) == [("q_proj", "k_proj", "v_proj")]
    gm = annotated(capture(Attention(), torch.ones(2, 3, 8)), blocks="int4/channel", k_proj="float")
    assert hessians(gm) == [("q_proj", "v_proj")]
    assert hessians(annotated(capture(MLP(), torch.ones(2, 8)), blocks="int4/channel")) == [("up",), ("down",)]
    assert hessians(annotated(capture(MoE(), torch.ones(2, 8)), blocks="int4/channel", router="int8/channel")) == [
        ("router",),
        ("experts.gate_up_proj",),
        ("experts.down_proj",),
    ]


def test_nothing_to_round() -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), blocks="float")
    assert hessians(gm) == []
    assert gptq(gm, []) == 0
    assert (
        gptq(annotated(capture(MLP(), torch.ones(2, 8)), blocks=Plan(None, parse_quant("int8/token/dynamic"))), []) == 0
    )
    gm = annotated(capture(MLP(), torch.ones(2, 8)), blocks="int4/channel")
    assert hessians(gm, only=frozenset({"other"})) == []
    assert gptq(gm, [], only=frozenset({"other"})) == 0
    QuantizeWeights().run(gm)
    assert gptq(gm, []) == 0


def test_only() -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), blocks="int4/channel")
    assert gptq(gm, data(9, 8), only=frozenset({"down"})) == 1
    assert [op.node.meta["graphq.layer"] for op in ops_of(gm) if isinstance(op, Dequantize)] == ["down"]
    assert QuantizeWeights().run(gm) == 1


def test_embeddings_are_left_to_others() -> None:
    tokens = torch.ones(2, 3, dtype=torch.int64)
    batches = [(torch.randint(0, 16, (4, 5)),)]
    gm = annotated(capture(Tied(), tokens), embedding="int8/channel", head="int4/channel")
    assert gptq(gm, batches) == 1
    assert QuantizeWeights().run(gm) == 1
    gm = annotated(capture(Tied(), tokens), embedding="int8/channel")
    assert hessians(gm) == []
    assert gptq(gm, batches) == 0


def test_without_data() -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), blocks="int4/channel")
    with pytest.raises(PassError, match=r"^gptq: no data was seen of the input of up$"):
        GPTQ().run(gm)
    with pytest.raises(SpecError, match="no batches"):
        gptq(gm, [])


class Call(nn.Module):
    """GPT-2's linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(8, 6)), nn.Parameter(torch.empty(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Picture(nn.Module):
    """One convolution, of inputs whose channels come last."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.movedim(-1, 1))


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Sequential(nn.Linear(8, 6)), (40, 8)),
    "addmm": (Call(), (40, 8)),
    "conv2d": (Picture(nn.Conv2d(8, 6, 3, padding=1, stride=2)), (2, 9, 7, 8)),
    "grouped": (Picture(nn.Conv2d(8, 6, (3, 2), groups=2, dilation=(1, 2))), (2, 9, 7, 8)),
    "same": (Picture(nn.Conv2d(8, 6, (2, 3), padding="same")), (2, 9, 7, 8)),
    "depthwise": (Picture(nn.Conv2d(8, 8, 3, groups=8)), (2, 9, 7, 8)),
    "conv1d": (Picture(nn.Conv1d(8, 6, 3, padding=2, dilation=2)), (3, 20, 8)),
    "conv1d same": (Picture(nn.Conv1d(8, 6, 4, padding="same", groups=2)), (3, 20, 8)),
}


def error(gm: fx.GraphModule, wanted: list[Tensor], batches: Data) -> float:
    return sum(float((run(gm, *batch) - y).double().square().sum()) for batch, y in zip(batches, wanted, strict=True))


@pytest.mark.parametrize("weight", ["int3/channel", "int3/asym/channel", "float4_e2m1/channel"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_output_error_is_less_than_that_of_rounding_to_nearest(name: str, weight: str) -> None:
    model, shape = LAYERS[name]
    batches = data(*shape)
    nearest, found, searched = (annotated(capture(model, torch.ones(shape)), blocks=weight) for _ in range(3))
    wanted = [run(nearest, *batch) for batch in batches]
    QuantizeWeights().run(nearest)
    assert gptq(found, batches, scales="plan") == 1
    assert gptq(searched, batches) == 1
    assert dump(found) == dump(nearest)
    assert error(found, wanted, batches) < 0.9 * error(nearest, wanted, batches)
    assert error(searched, wanted, batches) < 0.9 * error(nearest, wanted, batches)
    names = [key for key in found.state_dict() if key.endswith(("_scale", "_zero_point"))]
    assert all(torch.equal(tensor_of(found, key), tensor_of(nearest, key)) for key in names)
    assert any(not torch.equal(tensor_of(searched, key), tensor_of(nearest, key)) for key in names)


def test_experts() -> None:
    batches = data(300, 8)
    nearest, found = (annotated(capture(MoE(), torch.ones(2, 8)), experts="int3/channel") for _ in range(2))
    wanted = [run(nearest, *batch) for batch in batches]
    QuantizeWeights().run(nearest)
    notes: list[str] = []
    assert gptq(found, batches, note=notes.append, scales="plan") == 2
    assert notes == []
    assert dump(found) == dump(nearest)
    assert error(found, wanted, batches) < 0.7 * error(nearest, wanted, batches)


def alone(model: nn.Module, layer: str, weight: str, batches: Data, **options: Any) -> dict[str, Tensor]:
    gm = annotated(capture(model, batches[0][0]), **{layer: weight})
    assert gptq(gm, batches, **options) == 1
    return {key: value for key, value in gm.state_dict().items() if key.startswith(f"{layer}.weight")}


def test_mixed_formats_in_one_stack() -> None:
    batches = data(2, 30, 8)
    plans = {"q_proj": "int4/channel", "k_proj": "int3/asym/g4", "v_proj": "float8_e4m3fn/channel"}
    gm = annotated(capture(Attention(), torch.ones(2, 3, 8)), **plans)
    assert gptq(gm, batches) == 3
    for layer, weight in plans.items():
        for key, value in alone(Attention(), layer, weight, batches).items():
            assert torch.equal(tensor_of(gm, key).float(), value.float()), key


def test_experts_of_several_plans() -> None:
    batches = data(300, 8)
    gm = annotated(
        capture(MoE(), torch.ones(2, 8)),
        experts="int4/channel",
        experts__1="int3/asym/g4",
        experts__3="float",
    )
    before = run(gm, *batches[0])
    reference = annotated(capture(MoE(), torch.ones(2, 8)), experts="int4/channel")
    assert gptq(gm, batches) == 2
    assert gptq(reference, batches) == 2
    assert_vals(gm, *batches[0])
    assert not torch.equal(run(gm, *batches[0]), before)
    codes = {
        key: value for key, value in gm.state_dict().items() if "gate_up_proj.part" in key and key.endswith("weight")
    }
    assert {key: (value.dtype, value.shape[0]) for key, value in codes.items()} == {
        "experts.gate_up_proj.part0.weight": (torch.int8, 2),
        "experts.gate_up_proj.part1.weight": (torch.int8, 1),
        "experts.gate_up_proj.part2.weight": (torch.float32, 1),
    }
    whole = tensor_of(reference, "experts.gate_up_proj.weight")
    assert torch.equal(codes["experts.gate_up_proj.part0.weight"], whole[[0, 2]])


def test_experts_that_few_tokens_reach() -> None:
    batches = data(60, 8, count=1)
    nearest, found = (annotated(capture(MoE(), torch.ones(2, 8)), experts="int3/channel") for _ in range(2))
    counts = (
        (run(found, *batches[0]), batches[0][0] @ tensor_of(found, "router.weight").T)[1]
        .argmax(-1)
        .bincount(minlength=4)
    )
    few = [i for i in range(4) if counts[i] < counts.max()]
    assert few
    QuantizeWeights().run(nearest)
    notes: list[str] = []
    gptq(found, batches, note=notes.append, min_samples=int(counts.max()), scales="plan")
    assert notes == [
        f"experts.{i}.{layer}: rounded to nearest: {int(counts[i])} tokens reached it in calibration"
        for layer in ("gate_up_proj", "down_proj")
        for i in few
    ]
    for layer in ("gate_up_proj", "down_proj"):
        a, b = (tensor_of(gm, f"experts.{layer}.weight") for gm in (nearest, found))
        same = [torch.equal(x, y) for x, y in zip(a, b, strict=True)]
        assert same == [i in few for i in range(4)]


def test_a_hessian_that_is_not_definite_is_noted() -> None:
    x = torch.ones(4, 8)
    notes: list[str] = []
    gm = annotated(capture(nn.Sequential(nn.Linear(8, 6)), torch.ones(2, 8)), blocks="int4/channel")
    assert gptq(gm, [(x,)], dampening=0.0, note=notes.append) == 1
    assert notes == ["0: its Hessian is not positive definite: dampening 0.001 instead of 0"]
    notes.clear()
    gm = annotated(capture(nn.Sequential(nn.Linear(8, 6)), torch.ones(2, 8)), blocks="int4/channel")
    assert gptq(gm, [(x,)], note=notes.append) == 1
    assert notes == []


def test_nvfp4_layers_still_share_their_global_scale() -> None:
    nearest, found = (annotated(capture(Attention(16), torch.ones(2, 3, 16)), blocks="nvfp4") for _ in range(2))
    QuantizeWeights().run(nearest)
    assert gptq(found, data(2, 30, 16)) == 3
    keys = [f"{name}_proj.weight_global_scale" for name in "qkv"]
    assert len({float(tensor_of(found, key)) for key in keys}) == 1
    for key, value in nearest.state_dict().items():
        if key.endswith("_scale"):
            assert torch.equal(tensor_of(found, key).float(), value.float())
    assert any(not torch.equal(tensor_of(found, k), tensor_of(nearest, k)) for k in ("q_proj.weight", "v_proj.weight"))


def test_a_layer_that_is_called_twice_has_the_sum_of_both_hessians() -> None:
    batches = data(20, 8)
    gm = annotated(capture(Twice(), torch.ones(2, 8)), shared="int3/channel")
    w = tensor_of(gm, "shared.weight").detach()
    first = torch.cat([x for (x,) in batches])
    both = torch.cat([first, (first @ w.T).relu()])
    assert gptq(gm, batches) == 1
    wanted = annotated(capture(nn.Sequential(nn.Linear(8, 8, bias=False)), torch.ones(2, 8)), blocks="int3/channel")
    put_tensor(wanted, "0.weight", nn.Parameter(w, requires_grad=False))
    assert gptq(wanted, [(both,)]) == 1
    assert torch.equal(tensor_of(gm, "shared.weight"), tensor_of(wanted, "0.weight"))


def test_amct() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    gm = annotated(capture(model, torch.ones(2, 8)), blocks="int4/by_sign/channel")
    put_tensor(gm, "0.weight", nn.Parameter(W, requires_grad=False))
    wanted = run(gm, X)
    assert gptq(gm, [(X[:5],), (X[5:],)], scales="plan") == 1
    assert tensor_of(gm, "0.weight").tolist() == CODES
    assert float((run(gm, X) - wanted).square().mean()) == pytest.approx(MSE, abs=1e-6)


@pytest.mark.parametrize(
    "weight", ["int4/channel", "int3/asym/g4", "int2/half/channel", "int8/asym/channel", "int4/by_sign/tensor"]
)
def test_codes_stay_in_their_range(weight: str) -> None:
    gm = annotated(capture(nn.Sequential(nn.Linear(8, 64)), torch.ones(2, 8)), blocks=weight)
    assert gptq(gm, data(20, 8)) == 1
    quant = gm_quant(gm)
    lowest, highest = numerics.code_range(quant.format)  # pyright: ignore[reportArgumentType]
    q = tensor_of(gm, "0.weight")
    assert (int(q.min()), int(q.max())) == (lowest, highest) or (int(q.min()) >= lowest and int(q.max()) == highest)
    assert q.dtype == numerics.code_dtype(quant.format)


def gm_quant(gm: fx.GraphModule) -> Quant:
    found = next(node.meta[PLAN] for node in gm.graph.nodes if PLAN in node.meta)
    assert isinstance(found, Plan)
    assert found.weight is not None
    return found.weight


def test_scales_from_calibration() -> None:
    gm = annotated(capture(nn.Sequential(nn.Linear(8, 6)), torch.ones(2, 8)), blocks="hifloat8/tensor/ofmr")
    step = GPTQ()
    batches = data(20, 8)
    assert Pipeline([Observe((step,)), Calibrate(), step], strict=True).run(gm, batches)["gptq"] == 1


def test_records() -> None:
    seen: dict[str, float] = {}
    gm = annotated(capture(MLP(), torch.ones(2, 8)), blocks="int8/channel")
    assert gptq(gm, data(20, 8), record=seen.__setitem__) == 2
    assert list(seen) == ["up", "down"]
    assert all(30 < value < 60 for value in seen.values())


def test_the_order_of_columns_and_the_dampening_matter() -> None:
    batches = data(20, 8)
    found = [
        alone(nn.Sequential(nn.Linear(8, 64)), "0", "int3/channel", batches, scales="plan", **options)["0.weight"]
        for options in ({}, {"act_order": "none"}, {"dampening": 1.0}, {"block_size": 3})
    ]
    assert [torch.equal(found[0], other) for other in found] == [True, False, False, True]
