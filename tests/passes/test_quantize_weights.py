"""Weights are codes: the right ones, in the right layout, once each, and nothing float is left of them."""

import gc
import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.errors import GraphError, PassError
from graphq.ir.layers import BY, LAYER, PLAN
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.ir.views import Dequantize, ops_of
from graphq.ir.weight_parts import WeightPart, quantize_weight
from graphq.passes.annotate import Annotate
from graphq.passes.calibrate import Calibrate
from graphq.passes.observe import Observe
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.split_gate_up import SplitGateUp
from graphq.spec.plan import Decision
from graphq.spec.quant import parse_quant
from graphq.state import tensor_of
from tests.graphs import annotated, assert_vals, plan, run, spec, targets, without_data
from tests.models import MLP, Attention, ConvBnRelu, MoE, Tied, Twice, capture

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.tensor([[0, 3, 15], [7, 7, 1]])


def quantize(gm: fx.GraphModule, **rules: Decision | str) -> int:
    """The number of changes; a second run finds nothing."""
    Annotate(spec(**rules)).run(gm)
    counts = Pipeline([QuantizeWeights()], strict=True).run(gm)
    assert Pipeline([QuantizeWeights()], strict=True).run(gm) == {"quantize-weights": 0}
    return counts["quantize-weights"]


def reference(w: Tensor, bits: int, group: int = 0, asymmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zero points of the rows of ``w[N, K]``, group by group, written down a second time."""
    group = group or w.shape[1]
    codes, scales, zeros = torch.empty_like(w), [], []
    for row in range(w.shape[0]):
        for start in range(0, w.shape[1], group):
            part = w[row, start : start + group]
            low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
            if asymmetric:
                bottom, top = min(part.min(), torch.tensor(0.0)), max(part.max(), torch.tensor(0.0))
                scale = (top - bottom) / (high - low)
                zero = torch.round(low - bottom / scale)
            else:
                scale, zero = part.abs().max() / high, torch.tensor(0.0)
            codes[row, start : start + group] = (torch.round(part / scale) + zero).clamp(low, high)
            scales.append(scale)
            zeros.append(zero)
    shape = (w.shape[0], -1)
    return codes, torch.stack(scales).reshape(shape), torch.stack(zeros).reshape(shape)


def rebuilt(codes: Tensor, scale: Tensor, zero: Tensor, group: int = 0) -> Tensor:
    """The weight that ``reference`` stands for."""
    group = group or codes.shape[1]
    parts = codes.split(group, 1)
    return torch.cat([(p - zero[:, i : i + 1]) * scale[:, i : i + 1] for i, p in enumerate(parts)], 1)


def weight(gm: fx.GraphModule, fqn: str) -> Tensor:
    """A parameter's value, before it is quantized."""
    return tensor_of(gm, fqn).detach().clone()


def dequantizes(gm: fx.GraphModule) -> int:
    return targets(gm).count("graphq.dequantize")


# -- linears -----------------------------------------------------------------------------------------------------------


def test_golden() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    up, down = weight(gm, "up.weight"), weight(gm, "down.weight")
    biases = weight(gm, "up.bias"), weight(gm, "down.bias")
    assert quantize(gm, up="int8/channel", down="int4/asym/g5") == 2
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, 8] = input
%1: f32[12, 8] = graphq.dequantize(@up.weight, @up.weight_scale, None, None, 'int8', [1, -1], f32)
%2: f32[batch, 12] = aten.linear(%x, %1, @up.bias)  # up: weight int8/channel
%3: f32[batch, 12] = aten.relu(%2)
%4: f32[8, 12] = graphq.dequantize(@down.weight, @down.weight_scale, @down.weight_zero_point, None, 'int4/asym', [1, 5], f32)
%5: f32[batch, 8] = aten.linear(%3, %4, @down.bias)  # down: weight int4/asym/g5
return [%5]
""",
    )
    assert {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in gm.state_dict().items()} == {
        "up.bias": ("float32", [12]),
        "down.bias": ("float32", [8]),
        "up.weight": ("int8", [12, 8]),
        "up.weight_scale": ("float32", [12, 1]),
        "down.weight": ("int8", [8, 12]),
        "down.weight_scale": ("float32", [8, 3]),
        "down.weight_zero_point": ("int8", [8, 3]),
    }
    new_up = rebuilt(*reference(up, 8))
    new_down = rebuilt(*reference(down, 4, 5, asymmetric=True), 5)
    expected = F.linear(F.relu(F.linear(X, new_up, biases[0])), new_down, biases[1])
    assert torch.equal(run(gm, X), expected)
    assert_vals(gm, X)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("group", [0, 4, 5, 8, 100])
def test_codes_and_scales(bits: int, asymmetric: bool, group: int) -> None:
    """Per channel, and per group: one that divides the 8 inputs, one whose last is short, the whole row, and more."""
    gm = _linear(bits, asymmetric, f"g{group}" if group else "channel")
    codes, scale, zero = reference(gm.original, bits, group, asymmetric)
    state = gm.state_dict()
    assert torch.equal(state["up.weight"].float(), codes)
    assert torch.equal(state["up.weight_scale"], scale)
    assert ("up.weight_zero_point" in state) == asymmetric
    if asymmetric:
        assert torch.equal(state["up.weight_zero_point"].float(), zero)
        assert state["up.weight_zero_point"].dtype == torch.int8


@pytest.mark.parametrize("asymmetric", [False, True])
def test_one_scale_per_tensor(asymmetric: bool) -> None:
    gm = _linear(8, asymmetric, "tensor")
    codes, scale, _ = reference(gm.original.reshape(1, -1), 8, 0, asymmetric)
    assert torch.equal(gm.state_dict()["up.weight"].float().reshape(1, -1), codes)
    assert torch.equal(gm.state_dict()["up.weight_scale"], scale)


def _linear(bits: int, asymmetric: bool, granularity: str) -> Any:
    """An MLP with a quantized ``up``; ``original`` is its weight."""
    gm = capture(MLP(), torch.ones(2, 8))
    gm.original = weight(gm, "up.weight")
    assert quantize(gm, up=f"int{bits}{'/asym' if asymmetric else ''}/{granularity}") == 1
    assert_vals(gm, X)
    return gm


def test_zeros_and_a_single_extreme() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    with torch.no_grad():
        tensor_of(gm, "up.weight").zero_()
        tensor_of(gm, "up.weight")[0, 0] = -3
    quantize(gm, up="int8/channel")
    state = gm.state_dict()
    assert state["up.weight"].abs().sum() == 127
    assert state["up.weight_scale"].flatten().tolist() == [torch.tensor(3 / 127).item()] * 12  # as the finest


def test_scales_of_zeros_leave_room_for_a_bias_too() -> None:
    w = torch.tensor([[0.0, 0], [0, 0], [127, 0], [0, 0], [127, 0]])
    least = torch.tensor([[2.0], [2.0**-8], [0.0], [2.0**-20], [2.0**-40]])
    part = WeightPart((0,), parse_quant("int8/channel"), w, [1, -1], None, (), least)
    made = quantize_weight(part)
    assert made.scales.scale.flatten().tolist() == [2, 1, 1, 2.0**-6, 1]  # 2^16 steps of the bias of the fourth
    assert made.codes.tolist() == [[0, 0], [0, 0], [127, 0], [0, 0], [127, 0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_weight_keeps_its_dtype_and_the_scale_its_precision(dtype: torch.dtype) -> None:
    gm = capture(MLP().to(dtype), torch.ones(2, 8, dtype=dtype))
    original = weight(gm, "up.weight")
    quantize(gm, up="int8/channel")
    read = next(op for op in ops_of(gm) if isinstance(op, Dequantize))
    assert (read.dtype, read.val.dtype) == (dtype, dtype)
    scale = gm.state_dict()["up.weight_scale"]
    assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(scale.flatten(), original.to(scale.dtype).abs().amax(1) / 127)
    assert_vals(gm, X.to(dtype))


def test_float_layers_and_plans_of_inputs_alone_are_left() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    before = dump(annotated(gm, up=plan(None, "int8/tensor")))
    assert quantize(gm, up=plan(None, "int8/tensor")) == 0
    assert dump(gm) == before
    assert tensor_of(gm, "up.weight").dtype == torch.float32


def test_new_nodes_belong_to_their_layer() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    quantize(gm, up="int8/channel", down="int4/g4")
    found = [(n.meta[LAYER], str(n.meta[PLAN])) for n in gm.graph.nodes if n.meta.get(BY) == ("quantize-weights",)]
    assert found == [("up", "weight int8/channel")] * 3 + [("down", "weight int4/g4")] * 3
    assert sorted(map(str, {n.target for n in gm.graph.nodes if n.op == "get_attr"})) == sorted(gm.state_dict())


def test_the_float_weight_is_freed() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    alive = weakref.ref(tensor_of(gm, "up.weight"))
    assert alive() is not None
    quantize(gm, up="int8/channel")
    gc.collect()
    assert alive() is None


# -- other layouts -----------------------------------------------------------------------------------------------------


class Transposed(nn.Module):
    """GPT-2's ``Conv1D``: the weight is ``[K, N]``."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc = nn.ParameterDict({"weight": torch.empty(8, 6), "bias": torch.empty(6)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.c_fc["bias"], x, self.c_fc["weight"])


@pytest.mark.parametrize(("granularity", "group"), [("channel", 0), ("g3", 3)])
def test_a_transposed_weight(granularity: str, group: int) -> None:
    gm = capture(Transposed(), torch.ones(2, 8))
    w, b = weight(gm, "c_fc.weight"), weight(gm, "c_fc.bias")
    assert quantize(gm, c_fc=f"int4/asym/{granularity}") == 1
    codes, scale, zero = reference(w.t(), 4, group, asymmetric=True)
    assert torch.equal(gm.state_dict()["c_fc.weight"].float(), codes.t())
    assert torch.equal(gm.state_dict()["c_fc.weight_scale"], scale.t())
    assert torch.equal(run(gm, X), torch.addmm(b, X, rebuilt(codes, scale, zero, group).t().contiguous()))
    assert_vals(gm, X)


def test_convolutions() -> None:
    gm = capture(ConvBnRelu(), torch.ones(2, 4, 5, 5))
    conv, depthwise = weight(gm, "conv.weight"), weight(gm, "depthwise.weight")
    assert quantize(gm, conv="int8/g3", depthwise="int4/asym/channel") == 2
    state = gm.state_dict()
    assert list(state["conv.weight"].shape) == [8, 4, 3, 3]
    # 4 inputs in groups of 3: whole kernels of the first three, and of the last
    extremes = torch.stack([conv[:, :3].abs().amax((1, 2, 3)), conv[:, 3:].abs().amax((1, 2, 3))], 1)
    assert torch.equal(state["conv.weight_scale"], (extremes / 127).reshape(8, 2, 1, 1))
    codes, scale, zero = reference(depthwise.flatten(1), 4, 0, asymmetric=True)
    assert torch.equal(state["depthwise.weight"].flatten(1).float(), codes)
    assert torch.equal(state["depthwise.weight_scale"], scale.reshape(8, 1, 1, 1))
    assert torch.equal(state["depthwise.weight_zero_point"].float(), zero.reshape(8, 1, 1, 1))
    assert_vals(gm, torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize(("granularity", "group"), [("channel", 0), ("g4", 4)])
def test_an_embedding_has_a_scale_for_each_row(granularity: str, group: int) -> None:
    gm = capture(Tied(), TOKENS)
    w = weight(gm, "embedding.weight")
    assert quantize(gm, embedding=f"int8/{granularity}") == 1
    codes, scale, zero = reference(w, 8, group)
    assert torch.equal(gm.state_dict()["embedding.weight"].float(), codes)
    assert torch.equal(gm.state_dict()["embedding.weight_scale"], scale)
    new = rebuilt(codes, scale, zero, group)
    assert torch.equal(run(gm, TOKENS), F.linear(F.silu(F.embedding(TOKENS, new)), w))


# -- weights with several uses -----------------------------------------------------------------------------------------


def test_tied_weights_part_when_one_is_quantized() -> None:
    for quantized, kept in (("embedding", "head"), ("head", "embedding")):
        gm = capture(Tied(), TOKENS)
        w = weight(gm, "head.weight")
        assert quantize(gm, **{quantized: "int8/channel"}) == 1
        state = gm.state_dict()
        assert sorted(state) == sorted([f"{kept}.weight", f"{quantized}.weight", f"{quantized}.weight_scale"])
        assert torch.equal(state[f"{kept}.weight"], w)
        new = {kept: w, quantized: rebuilt(*reference(w, 8))}
        expected = F.linear(F.silu(F.embedding(TOKENS, new["embedding"])), new["head"])
        assert torch.equal(run(gm, TOKENS), expected)
        assert_vals(gm, TOKENS)


def test_tied_weights_can_both_be_quantized_each_in_its_way() -> None:
    gm = capture(Tied(), TOKENS)
    w = weight(gm, "head.weight")
    assert quantize(gm, embedding="int4/channel", head="int8/g4") == 2
    assert all(t.shape != w.shape for t in gm.state_dict().values() if t.is_floating_point())
    e, h = rebuilt(*reference(w, 4)), rebuilt(*reference(w, 8, 4), 4)
    assert torch.equal(run(gm, TOKENS), F.linear(F.silu(F.embedding(TOKENS, e)), h))


def test_a_layer_called_twice_is_dequantized_once() -> None:
    gm = capture(Twice(), torch.ones(2, 8))
    new = rebuilt(*reference(weight(gm, "shared.weight"), 4))
    assert quantize(gm, shared="int4/channel") == 1
    assert targets(gm) == ["graphq.dequantize", "aten.linear", "aten.relu", "aten.linear"]
    assert torch.equal(run(gm, X), F.linear(F.relu(F.linear(X, new)), new))
    assert_vals(gm, X)


def test_a_weight_read_by_two_nodes_is_dequantized_once() -> None:
    gm = capture(Twice(), torch.ones(2, 8))
    first, second = (n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default)
    with gm.graph.inserting_before(first):
        again = gm.graph.get_attr("shared.weight")
    again.meta = dict(first.args[1].meta)
    second.args = (second.args[0], again)
    new = rebuilt(*reference(weight(gm, "shared.weight"), 4))
    assert quantize(gm, shared="int4/channel") == 1
    assert dequantizes(gm) == 1
    assert torch.equal(run(gm, X), F.linear(F.relu(F.linear(X, new)), new))


class OtherReader(nn.Module):
    """The weight is read before the linear, by what is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(x / self.w.weight.norm())


def test_every_reader_reads_the_quantized_weight() -> None:
    gm = capture(OtherReader(), torch.ones(2, 8))
    new = rebuilt(*reference(weight(gm, "w.weight"), 4))
    quantize(gm, w="int4/channel")
    assert dequantizes(gm) == 1
    assert torch.equal(run(gm, X), F.linear(X / new.norm(), new))


class CastWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w.weight.float())


def test_a_weight_behind_a_cast() -> None:
    gm = capture(CastWeight(), torch.ones(2, 8))
    new = rebuilt(*reference(weight(gm, "w.weight").float(), 8)).bfloat16()
    assert quantize(gm, w="int8/channel") == 1
    assert targets(gm) == ["graphq.dequantize", "aten._to_copy", "aten.linear"]
    assert torch.equal(run(gm, X), F.linear(X, new.float()))


# -- experts -----------------------------------------------------------------------------------------------------------


def experts() -> fx.GraphModule:
    gm = capture(MoE(), torch.ones(2, 8))
    SplitGateUp().run(gm)
    return gm


def check_experts(gm: fx.GraphModule, original: dict[str, Tensor], bits: dict[str, list[int]]) -> None:
    """``gm`` computes what each expert does by itself, its weights quantized with these ``bits`` (0: float)."""
    new = {
        role: [rebuilt(*reference(w[e], b)) if b else w[e] for e, b in enumerate(bits[role])]
        for role, w in original.items()
    }
    chosen = F.linear(X, weight(gm, "router.weight")).argmax(-1)
    assert len(set(chosen.tolist())) > 1
    rows = [
        F.linear(F.silu(F.linear(x, new["gate_proj"][e])) * F.linear(x, new["up_proj"][e]), new["down_proj"][e])
        for x, e in zip(X, chosen.tolist(), strict=True)
    ]
    torch.testing.assert_close(run(gm, X), torch.stack(rows), rtol=1e-5, atol=1e-5)  # rows one by one
    assert_vals(gm, X)


def stacks(gm: fx.GraphModule) -> dict[str, Tensor]:
    return {role: weight(gm, f"experts.{role}") for role in ("gate_proj", "up_proj", "down_proj")}


def test_experts_of_one_plan_are_dequantized_as_one() -> None:
    gm = experts()
    original = stacks(gm)
    assert quantize(gm, blocks="int8/channel") == 3
    assert dequantizes(gm) == 3
    assert "aten.cat" not in targets(gm)
    state = gm.state_dict()
    assert list(state["experts.up_proj.weight"].shape) == [4, 6, 8]
    assert list(state["experts.up_proj.weight_scale"].shape) == [4, 6, 1]
    check_experts(gm, original, {role: [8, 8, 8, 8] for role in original})


def test_a_scale_per_tensor_is_one_per_expert() -> None:
    gm = experts()
    original = stacks(gm)
    quantize(gm, up_proj="int8/tensor")
    scale = gm.state_dict()["experts.up_proj.weight_scale"]
    assert torch.equal(scale, (original["up_proj"].abs().amax((1, 2)) / 127).reshape(4, 1, 1))


def test_groups_run_along_the_inputs() -> None:
    gm = experts()
    original = stacks(gm)
    quantize(gm, up_proj="int4/asym/g3")
    state = gm.state_dict()
    for e in range(4):
        codes, scale, zero = reference(original["up_proj"][e], 4, 3, asymmetric=True)
        assert torch.equal(state["experts.up_proj.weight"][e].float(), codes)
        assert torch.equal(state["experts.up_proj.weight_scale"][e], scale)
        assert torch.equal(state["experts.up_proj.weight_zero_point"][e].float(), zero)


def test_each_distinct_plan_is_one_part_and_the_experts_keep_their_order() -> None:
    gm = experts()
    original = stacks(gm)
    rules = {"blocks": "int8/channel", "experts__1": "int4/channel", "experts__2__down_proj": "int3/channel"}
    assert quantize(gm, **rules) == 3
    assert_expected_inline(
        "".join(line + "\n" for line in dump(gm).splitlines() if "experts.down" in line or "%30" in line),
        """\
%24: f32[2, 8, 6] = graphq.dequantize(@experts.down_proj.part0.weight, @experts.down_proj.part0.weight_scale, None, None, 'int8', [1, 1, -1], f32)
%25: f32[1, 8, 6] = graphq.dequantize(@experts.down_proj.part1.weight, @experts.down_proj.part1.weight_scale, None, None, 'int4', [1, 1, -1], f32)
%26: f32[1, 8, 6] = graphq.dequantize(@experts.down_proj.part2.weight, @experts.down_proj.part2.weight_scale, None, None, 'int3', [1, 1, -1], f32)
%28: f32[4, 8, 6] = aten.index_select(%27, 0, @experts.down_proj.expert_order)
%29: f32[batch, 8] = graphq.grouped_linear(%23, %28, %10)  # experts.down_proj: 2 x weight int8/channel; 1 x weight int4/channel; 1 x weight int3/channel
%30: i64[batch] = aten.argsort(%5)
%31: f32[batch, 8] = aten.index.Tensor(%29, [%30])
""",
    )
    assert dequantizes(gm) == 2 + 2 + 3
    state = gm.state_dict()
    assert list(state["experts.up_proj.part0.weight"].shape) == [3, 6, 8]
    assert state["experts.up_proj.expert_order"].tolist() == [0, 3, 1, 2]
    check_experts(gm, original, {"gate_proj": [8, 4, 8, 8], "up_proj": [8, 4, 8, 8], "down_proj": [8, 4, 3, 8]})


def test_experts_in_order_need_no_index() -> None:
    gm = experts()
    original = stacks(gm)
    quantize(gm, blocks="int8/channel", experts__3="int4/channel")
    assert "aten.index_select" not in targets(gm)
    assert targets(gm).count("aten.cat") == 3
    check_experts(gm, original, {role: [8, 8, 8, 4] for role in original})


@pytest.mark.parametrize(("kept", "bits"), [("0", [0, 8, 8, 8]), ("2", [8, 8, 0, 8])])
def test_float_experts_are_a_part_of_their_own(kept: str, bits: list[int]) -> None:
    gm = experts()
    original = stacks(gm)
    quantize(gm, blocks="int8/channel", **{f"experts__{kept}": "float"})
    check_experts(gm, original, dict.fromkeys(original, bits))
    floats = {name: t.numel() for name, t in gm.named_parameters() if "experts" in name}
    number = 0 if kept == "0" else 1
    assert floats == {f"experts.{role}.part{number}.weight": 48 for role in original}
    held = sum(t.untyped_storage().nbytes() for t in dict(gm.named_parameters()).values())
    assert held == 3 * 48 * 4 + gm.state_dict()["router.weight"].numel() * 4  # and nothing of the others


def test_mixed_inputs_alone_do_not_part_the_weights() -> None:
    gm = experts()
    quantize(gm, blocks="int8/channel", experts__1=plan("int8/channel", "int8/token/dynamic"))
    assert dequantizes(gm) == 3


# -- what is wrong, and what is recorded -------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf_name_the_layer(bad: float) -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    with torch.no_grad():
        tensor_of(gm, "down.weight")[3, 2] = bad
    with pytest.raises(GraphError) as error:
        quantize(gm, blocks="int8/channel")
    assert str(error.value) == "down: the weight holds NaN or Inf"


def test_a_weight_that_stays_float_may_hold_anything() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    with torch.no_grad():
        tensor_of(gm, "down.weight")[3, 2] = torch.inf
    assert quantize(gm, up="int8/channel") == 1


def test_nan_names_the_expert() -> None:
    gm = experts()
    with torch.no_grad():
        tensor_of(gm, "experts.up_proj")[2, 0, 0] = torch.nan
    with pytest.raises(GraphError) as error:
        quantize(gm, blocks="int8/channel")
    assert str(error.value) == "experts.2.up_proj: the weight holds NaN or Inf"


def sqnr(w: Tensor, new: Tensor) -> float:
    return 10 * math.log10(float(w.double().square().sum() / (w.double() - new.double()).square().sum()))


def test_the_noise_of_each_layer_is_recorded() -> None:
    gm = experts()
    original, router = stacks(gm), weight(gm, "router.weight")
    found: dict[str, float] = {}
    rules = {"router": "int4/channel", "blocks": "int8/channel", "experts__1": "int4/channel", "experts__2": "float"}
    Pipeline([Annotate(spec(**rules)), QuantizeWeights(found.__setitem__)], strict=True).run(gm)
    expected = {"router": sqnr(router, rebuilt(*reference(router, 4)))}
    for role, w in original.items():
        for e, bits in ((0, 8), (1, 4), (3, 8)):
            expected[f"experts.{e}.{role}"] = sqnr(w[e], rebuilt(*reference(w[e], bits)))
    assert found == pytest.approx(expected, rel=1e-6)
    assert found["experts.1.up_proj"] < 25 < 35 < found["experts.0.up_proj"]  # 4 bits against 8


def test_without_weights_there_is_nothing_to_quantize() -> None:
    gm = without_data(capture(MLP(), torch.ones(2, 8)))
    with pytest.raises(PassError) as error:
        Pipeline([Annotate(spec(blocks="int8/channel")), QuantizeWeights()]).run(gm)
    assert str(error.value) == "quantize-weights needs weights: the model was captured without its weights"


# -- further formats ---------------------------------------------------------------------------------------------------


def test_nvfp4_layers_that_read_one_activation_share_their_global_scale() -> None:
    gm = capture(Attention(), torch.ones(2, 3, 8))
    w = {name: tensor_of(gm, f"{name}_proj.weight").detach().clone() for name in "qkv"}
    quantize(gm, q_proj=plan("nvfp4"), k_proj=plan("nvfp4"), v_proj=plan("int8/channel"))
    shared = torch.maximum(w["q"].abs().max(), w["k"].abs().max())  # v is not nvfp4, and has no say
    for name in "qk":
        global_scale = tensor_of(gm, f"{name}_proj.weight_global_scale")
        assert global_scale.shape == (1, 1)
        assert global_scale.item() == (448.0 * 6.0 / shared).item()
        scale = tensor_of(gm, f"{name}_proj.weight_scale")
        assert scale.dtype == torch.float8_e4m3fn
        own = w[name].abs().amax(1, keepdim=True)  # 8 inputs: one short block
        assert torch.equal(scale.float(), (own / 6 * global_scale).to(torch.float8_e4m3fn).float())
    assert not hasattr(gm.get_submodule("v_proj"), "weight_global_scale")


def test_nvfp4_layers_of_different_activations_do_not() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    w = {name: tensor_of(gm, f"{name}.weight").detach().clone() for name in ("up", "down")}
    quantize(gm, blocks=plan("nvfp4"))
    for name, weight in w.items():
        expected = 448.0 * 6.0 / weight.abs().max()
        assert tensor_of(gm, f"{name}.weight_global_scale").item() == expected.item()


def test_every_expert_has_a_global_scale_that_its_gate_and_up_share() -> None:
    gm = capture(MoE(), torch.ones(4, 8))
    SplitGateUp().run(gm)
    quantize(gm, blocks=plan("nvfp4"))
    names = [name for name, _ in gm.named_buffers() if name.endswith("weight_global_scale")]
    gate, up, down = (next(name for name in names if role in name) for role in ("gate", "up", "down"))
    assert tensor_of(gm, gate).shape == (tensor_of(gm, gate).numel(), 1, 1)
    assert tensor_of(gm, gate).numel() > 1
    assert torch.equal(tensor_of(gm, gate), tensor_of(gm, up))
    assert not torch.equal(tensor_of(gm, gate), tensor_of(gm, down))


def test_the_method_gives_the_scales() -> None:
    for method in ("mse0.5:20:2:5", "percentile80", "ssz", "hqq"):
        gm, plain = capture(MLP(), torch.ones(2, 8)), capture(MLP(), torch.ones(2, 8))
        w = tensor_of(gm, "up.weight").detach().clone()
        quantize(gm, up=plan(f"int4/channel/{method}"))
        quantize(plain, up=plan("int4/channel"))
        scale, widest = tensor_of(gm, "up.weight_scale"), tensor_of(plain, "up.weight_scale")
        assert (scale <= widest * 1.000001).all() or method in ("ssz", "hqq")
        assert (scale != widest).any()
        codes = tensor_of(gm, "up.weight")
        assert torch.equal(codes, (w / scale).round().clamp(-8, 7).to(torch.int8))


def test_ofmr_needs_calibration() -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=plan("hifloat8/channel/ofmr"))
    with pytest.raises(PassError, match="up: hifloat8/channel/ofmr was not calibrated"):
        Pipeline([QuantizeWeights()]).run(gm)
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=plan("hifloat8/channel/ofmr"))
    Pipeline([Observe(), Calibrate(), QuantizeWeights()], strict=True).run(gm, [(X,), (X * 2,)])
    scale = tensor_of(gm, "up.weight_scale")
    assert torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5))  # powers of two


def test_two_levels_by_hand() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    w = tensor_of(gm, "up.weight").detach().clone()
    quantize(gm, up=plan("int4/over_int8/g4"))
    upper = w.abs().amax(1, keepdim=True) / 127
    eighths = (w / upper).round()
    lower = eighths.view(12, 2, 4).abs().amax(2) / 7
    codes = (eighths.view(12, 2, 4) / lower[..., None]).round().view(12, 8)
    assert torch.equal(tensor_of(gm, "up.weight_global_scale"), upper)
    assert torch.equal(tensor_of(gm, "up.weight_scale"), lower)
    assert torch.equal(tensor_of(gm, "up.weight"), codes.to(torch.int8))
