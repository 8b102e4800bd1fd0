"""Activations go through quantize and dequantize: once for all that agree, each expert's rows in its own way."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq import numerics
from graphq.errors import PassError
from graphq.ir import edit
from graphq.ir.layers import BY, LAYER
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.ir.views import ops_of
from graphq.passes.annotate import Annotate
from graphq.passes.calibrate import Calibrate
from graphq.passes.observe import Observe, observers
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.raise_grouped_linear import RaiseGroupedLinear
from graphq.passes.remove_no_ops import RemoveNoOps
from graphq.passes.split_gate_up import SplitGateUp
from graphq.spec.plan import Decision
from graphq.spec.quant import parse_quant
from graphq.state import tensor_of
from tests.graphs import annotated, assert_vals, plan, run, spec, targets
from tests.models import MLP, Attention, ConvBnRelu, MoE, Twice, capture, captured, random_inputs

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
DYNAMIC = plan(None, "int8/token/dynamic")
STATIC = plan(None, "int8/tensor")
ASYM = plan(None, "int8/asym/tensor")


def quantize(gm: fx.GraphModule, *batch: Tensor, **rules: Decision | str) -> int:
    """The number of changes, with ``batch`` for calibration; a second run finds nothing."""
    Pipeline([Annotate(spec(**rules)), Observe(), Calibrate()], strict=True).run(gm, [batch])
    counts = Pipeline([QuantizeActivations()], strict=True).run(gm)
    assert Pipeline([Observe(), QuantizeActivations()], strict=True).run(gm) == {
        "observe": 0,
        "quantize-activations": 0,
    }
    return counts["quantize-activations"]


def per_token(x: Tensor, bits: int = 8) -> Tensor:
    """``x`` symmetrically rounded, each vector with its own scale."""
    top = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True) / top
    return (x / scale).round().clamp(-top - 1, top) * scale


def symmetric(x: Tensor, seen: Tensor) -> Tensor:
    """``x`` rounded with the scale that ``seen`` fixed."""
    scale = seen.abs().max() / 127
    return (x / scale).round().clamp(-128, 127) * scale


def asymmetric(x: Tensor, seen: Tensor) -> Tensor:
    low, high = seen.min().clamp(max=0), seen.max().clamp(min=0)
    scale = (high - low) / 255
    zero = (-128 - low / scale).round()
    return (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale


# -- dynamic and static ------------------------------------------------------------------------------------------------


def test_dynamic_golden() -> None:
    gm = capture(Attention(), torch.ones(2, 3, 8))
    x = torch.randn(2, 5, 8)
    assert quantize(gm, x, blocks=DYNAMIC) == 3
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, sequence, 8] = input
%1: f32[batch, sequence, 8] = aten.layer_norm(%x, [8], None, None, 1e-05, False)
%2: (f32, i8) = graphq.choose_scale(%1, 'int8', [1, 1, -1])
%3: f32[batch, sequence, 1] = item(%2, 0)
%4: i8[batch, sequence, 8] = graphq.quantize(%1, %3, None, None, 'int8', [1, 1, -1])
%5: f32[batch, sequence, 8] = graphq.dequantize(%4, %3, None, None, 'int8', [1, 1, -1], f32)
%6: f32[batch, sequence, 8] = aten.linear(%5, @q_proj.weight)  # q_proj: input int8/token/dynamic
%7: f32[batch, sequence, 8] = aten.linear(%5, @k_proj.weight)  # k_proj: input int8/token/dynamic
%8: f32[batch, sequence, 8] = aten.mul.Tensor(%6, %7)
%9: f32[batch, sequence, 8] = aten.linear(%5, @v_proj.weight)  # v_proj: input int8/token/dynamic
%10: f32[batch, sequence, 8] = aten.add.Tensor(%8, %9)
return [%10]
""",
    )
    h = per_token(F.layer_norm(x, [8]))
    w = {name: tensor_of(gm, f"{name}_proj.weight").detach() for name in "qkv"}
    assert torch.equal(run(gm, x), F.linear(h, w["q"]) * F.linear(h, w["k"]) + F.linear(h, w["v"]))
    assert_vals(gm, x)


def test_dynamic_asymmetric_passes_the_zero_point_on() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    quantize(gm, X, up=plan(None, "int4/asym/token/dynamic"))
    low, high = X.amin(-1, keepdim=True).clamp(max=0), X.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 15
    zero = (-8 - low / scale).round()
    h = (((X / scale).round() + zero).clamp(-8, 7) - zero) * scale
    assert torch.equal(run(gm, X), mlp(gm, h))


def mlp(gm: fx.GraphModule, x: Tensor, inner: Callable[[Tensor], Tensor] = lambda h: h) -> Tensor:
    """What ``MLP`` computes."""
    w = {name: tensor_of(gm, name).detach() for name in ("up.weight", "up.bias", "down.weight", "down.bias")}
    hidden = inner(F.relu(F.linear(x, w["up.weight"], w["up.bias"])))
    return F.linear(hidden, w["down.weight"], w["down.bias"])


def test_static_golden() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    assert quantize(gm, X, up=STATIC, down=ASYM) == 2
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, 8] = input
%1: i8[batch, 8] = graphq.quantize(%x, @up.input_scale, None, None, 'int8', [-1, -1])
%2: f32[batch, 8] = graphq.dequantize(%1, @up.input_scale, None, None, 'int8', [-1, -1], f32)
%3: f32[batch, 12] = aten.linear(%2, @up.weight, @up.bias)  # up: input int8/tensor
%4: f32[batch, 12] = aten.relu(%3)
%5: i8[batch, 12] = graphq.quantize(%4, @down.input_scale, @down.input_zero_point, None, 'int8/asym', [-1, -1])
%6: f32[batch, 12] = graphq.dequantize(%5, @down.input_scale, @down.input_zero_point, None, 'int8/asym', [-1, -1], f32)
%7: f32[batch, 8] = aten.linear(%6, @down.weight, @down.bias)  # down: input int8/asym/tensor
return [%7]
""",
    )
    state = gm.state_dict()
    assert {name: (t.dtype, list(t.shape)) for name, t in state.items() if "input" in name} == {
        "up.input_scale": (torch.float32, []),
        "down.input_scale": (torch.float32, []),
        "down.input_zero_point": (torch.int8, []),
    }
    y = X * 2 - 1  # beyond what was seen
    seen: list[Tensor] = []
    mlp(gm, X, lambda h: seen.append(h) or h)  # calibration saw the float activations
    assert torch.equal(run(gm, y), mlp(gm, symmetric(y, X), lambda h: asymmetric(h, seen[0])))
    assert not observers(gm)
    assert [name for name, _ in gm.named_children()] == ["up", "down"]
    assert_vals(gm, y)


def test_scales_and_activations_of_bfloat16() -> None:
    gm = capture(MLP().bfloat16(), torch.ones(2, 8, dtype=torch.bfloat16))
    quantize(gm, X.bfloat16(), up=STATIC, down=DYNAMIC)
    assert tensor_of(gm, "up.input_scale").dtype == torch.float32
    assert_vals(gm, X.bfloat16())  # the products are bfloat16


def test_a_convolutions_input() -> None:
    gm = capture(ConvBnRelu(), torch.ones(2, 4, 5, 5))
    x = torch.randn(2, 4, 5, 5)
    assert quantize(gm, x, blocks=STATIC) == 2
    assert targets(gm).count("graphq.quantize") == 2
    assert_vals(gm, x)


# -- sharing -----------------------------------------------------------------------------------------------------------


def test_layers_that_disagree_have_each_their_own() -> None:
    gm = capture(Attention(), torch.ones(2, 3, 8))
    x = torch.randn(2, 5, 8)
    assert quantize(gm, x, q_proj=DYNAMIC, k_proj=STATIC, v_proj=DYNAMIC) == 3
    assert targets(gm).count("graphq.quantize") == 2
    h = F.layer_norm(x, [8])
    w = {name: tensor_of(gm, f"{name}_proj.weight").detach() for name in "qkv"}
    expected = F.linear(per_token(h), w["q"]) * F.linear(symmetric(h, h), w["k"]) + F.linear(per_token(h), w["v"])
    assert torch.equal(run(gm, x), expected)


def test_float_layers_read_on_as_before() -> None:
    gm = capture(Attention(), torch.ones(2, 3, 8))
    x = torch.randn(2, 5, 8)
    assert quantize(gm, x, q_proj=DYNAMIC) == 1
    h = F.layer_norm(x, [8])
    w = {name: tensor_of(gm, f"{name}_proj.weight").detach() for name in "qkv"}
    assert torch.equal(run(gm, x), F.linear(per_token(h), w["q"]) * F.linear(h, w["k"]) + F.linear(h, w["v"]))
    assert quantize(capture(MLP(), torch.ones(2, 8)), X, up="int8/channel") == 0


def test_static_layers_that_agree_share_the_scale_of_the_first() -> None:
    gm = capture(Attention(), torch.ones(2, 3, 8))
    quantize(gm, torch.randn(2, 5, 8), blocks=STATIC)
    assert [name for name in gm.state_dict() if "input" in name] == ["q_proj.input_scale"]


def test_each_use_of_a_layer_has_its_own_scale() -> None:
    gm = capture(Twice(), torch.ones(2, 8))
    assert quantize(gm, X, shared=STATIC) == 2
    w = tensor_of(gm, "shared.weight").detach()
    inner = F.relu(F.linear(X, w))
    assert tensor_of(gm, "shared.input_scale") == X.abs().max() / 127
    assert tensor_of(gm, "shared.input0.input_scale") == inner.abs().max() / 127
    assert torch.equal(run(gm, X), F.linear(symmetric(F.relu(F.linear(symmetric(X, X), w)), inner), w))


def test_graph_inputs_stay_together() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.v = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.w(x) + self.v(y)

    gm = capture(Two(), torch.ones(2, 8), torch.ones(2, 8))
    assert quantize(gm, X, X, w=STATIC, v=DYNAMIC) == 2
    ops = [node.op for node in gm.graph.nodes]
    assert ops.index("placeholder") + 1 == len(ops) - 1 - ops[::-1].index("placeholder")
    assert_vals(gm, X, X)


def test_new_nodes_belong_to_the_layer_that_reads_them() -> None:
    """Not to the one that makes the activation: a target's refusal names the layer with the plan."""
    gm = capture(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.ones(2, 8))
    quantize(gm, X, **{"=1": DYNAMIC})
    made = [op for op in ops_of(gm) if op.node.meta.get(BY) == ("quantize-activations",)]
    assert {op.node.meta[LAYER] for op in made} == {"1"}
    assert [n.meta.get(BY) for n in gm.graph.nodes if "linear" in n.name] == [None, ("quantize-activations",)]


# -- experts -----------------------------------------------------------------------------------------------------------


def test_each_row_of_a_stack_is_read_as_its_expert_wants() -> None:
    gm = capture(MoE(), torch.ones(5, 8))
    SplitGateUp().run(gm)
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(2))
    rules: dict[str, Decision | str] = {
        "blocks": DYNAMIC,
        "experts__1": STATIC,
        "experts__2": "float",
        "experts__3__up_proj": ASYM,
    }
    assert quantize(gm, x, router=DYNAMIC, **rules) == 4
    assert_expected_inline(
        "".join(line + "\n" for line in dump(gm).splitlines() if "select_rows" in line or "grouped_linear" in line),
        """\
%24: f32[batch, 8] = graphq.select_rows([%23, %19, %15], %14, [0, 1, 2, 0])
%25: f32[batch, 6] = graphq.grouped_linear(%24, @experts.gate_proj, %14)  # experts.gate_proj: 2 x input int8/token/dynamic; 1 x input int8/tensor; 1 x float (asked for)
%26: f32[batch, 8] = graphq.select_rows([%23, %19, %15, %17], %14, [0, 1, 2, 3])
%27: f32[batch, 6] = graphq.grouped_linear(%26, @experts.up_proj, %14)  # experts.up_proj: 1 x input int8/token/dynamic; 1 x input int8/tensor; 1 x float (asked for); 1 x input int8/asym/tensor
%36: f32[batch, 6] = graphq.select_rows([%35, %31, %29], %14, [0, 1, 2, 0])
%37: f32[batch, 8] = graphq.grouped_linear(%36, @experts.down_proj, %14)  # experts.down_proj: 2 x input int8/token/dynamic; 1 x input int8/tensor; 1 x float (asked for)
""",
    )
    router = tensor_of(gm, "router.weight").detach()
    chosen = F.linear(per_token(x), router).argmax(-1).tolist()
    assert set(chosen) == {0, 1, 2, 3}
    float_chosen = F.linear(x, router).argmax(-1)
    gate, up, down = (tensor_of(gm, f"experts.{role}_proj").detach() for role in ("gate", "up", "down"))
    hidden = torch.stack(
        [F.silu(F.linear(r, gate[e])) * F.linear(r, up[e]) for r, e in zip(x, float_chosen.tolist(), strict=True)]
    )  # what calibration saw
    for row, e, y in zip(x, chosen, run(gm, x), strict=True):
        read = [per_token, lambda r: symmetric(r, x), lambda r: r, per_token][e]
        read_up = read if e != 3 else lambda r: asymmetric(r, x)
        read_down = [per_token, lambda r: symmetric(r, hidden), lambda r: r, per_token][e]
        h = F.silu(F.linear(read(row), gate[e])) * F.linear(read_up(row), up[e])
        # A last-bit difference of a product may flip a code of the hidden activation: one step of its 127.
        bound = float(read_down(h).abs().max()) / 127 * float(down[e].abs().sum(1).max()) * 1.01
        assert (F.linear(read_down(h), down[e]) - y).abs().max() <= bound
    assert_vals(gm, x)


def test_experts_that_agree_need_no_selection() -> None:
    gm = capture(MoE(), torch.ones(5, 8))
    SplitGateUp().run(gm)
    assert quantize(gm, X, blocks=STATIC) == 3
    assert "graphq.select_rows" not in targets(gm)
    assert targets(gm).count("graphq.quantize") == 2  # gate and up read one


@pytest.mark.parametrize("weight", ["int8/channel", None])
def test_static_scales_of_a_stack_are_apart(weight: str | None) -> None:
    """They stand beside the codes; a float stack is itself a tensor, which holds no others."""
    gm = capture(MoE(), torch.ones(5, 8))
    rules = {"gate_up_proj": plan(weight, "int8/tensor"), "experts__1__gate_up_proj": plan(weight, "int8/asym/tensor")}
    steps = [Annotate(spec(**rules)), QuantizeWeights(), Observe(), Calibrate(), QuantizeActivations()]
    assert Pipeline(steps, strict=True).run(gm, [(X,)])["quantize-activations"] == 1
    path = "experts.gate_up_proj" if weight else "experts.gate_up_proj_input"
    assert sorted(name for name in gm.state_dict() if "input_" in name) == [
        f"{path}.input0.input_scale",
        f"{path}.input0.input_zero_point",
        f"{path}.input_scale",
    ]
    assert_vals(gm, X)


# -- what it needs and promises ----------------------------------------------------------------------------------------


def test_static_scales_need_observers_that_have_seen_data() -> None:
    message = "quantize-activations needs data for every static scale: no data was seen of the input of up"
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=STATIC)
    with pytest.raises(PassError) as error:
        Pipeline([QuantizeActivations()]).run(gm)
    assert str(error.value) == message
    Observe().run(gm)
    with pytest.raises(PassError) as error:
        Pipeline([QuantizeActivations()]).run(gm)
    assert str(error.value) == message
    Calibrate().run(gm, [(X,)])
    assert Pipeline([QuantizeActivations()], strict=True).run(gm) == {"quantize-activations": 1}


def test_dynamic_scales_need_no_data() -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), blocks=DYNAMIC)
    assert Pipeline([QuantizeActivations()], strict=True).run(gm) == {"quantize-activations": 2}


def test_a_graph_that_is_still_observed_breaks_the_promise() -> None:
    (promise,) = QuantizeActivations.ensures
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=STATIC)
    assert promise.broken(gm) is None
    Observe().run(gm)
    assert promise.broken(gm) == "up is still observed"


def test_an_input_that_is_a_dequantized_weight_is_an_activation_all_the_same() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + F.linear(self.a.weight, self.b.weight).sum()

    gm = annotated(capture(Product(), torch.ones(2, 8)), a="int8/channel", b=plan(None, "int8/token/dynamic"))
    steps = [QuantizeWeights(), QuantizeActivations()]
    assert Pipeline(steps, strict=True).run(gm) == {"quantize-weights": 1, "quantize-activations": 1}
    assert Pipeline(steps, strict=True).run(gm) == {"quantize-weights": 0, "quantize-activations": 0}


def test_observers_that_nothing_needs_any_more_are_gone() -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), blocks=STATIC)
    Observe().run(gm)
    edit.drop_unused(gm)
    Annotate(spec(up=DYNAMIC)).run(gm)
    QuantizeActivations().run(gm)
    assert not observers(gm)


# -- all passes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_families(family: str) -> None:
    """Every pass keeps its word on a whole model, and int8 costs it little."""
    gm = captured(family)
    inputs = random_inputs(gm)
    before = run(gm, *inputs)
    wanted = spec(blocks=plan("int8/channel", "int8/token/dynamic"), down_proj=plan("int8/channel", "int8/asym/tensor"))
    steps = [
        RemoveNoOps(),
        RaiseGroupedLinear(),
        SplitGateUp(),
        Annotate(wanted),
        Observe(),
        Calibrate(),
        QuantizeWeights(),
        QuantizeActivations(),
    ]
    counts = Pipeline(steps, strict=True).run(gm, [inputs])
    assert counts["quantize-weights"] == counts["quantize-activations"] == 14
    after = run(gm, *inputs)
    assert 0 < (after - before).abs().max() / before.abs().max() < 0.1  # 8 bits everywhere; tiny random layers
    assert_vals(gm, *inputs)
    assert all(t.dtype == torch.int8 for name, t in gm.state_dict().items() if name.endswith("_proj.weight"))


# -- further formats ---------------------------------------------------------------------------------------------------


def test_nvfp4_has_its_global_scale_from_calibration_and_the_others_from_run_time() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    seen = torch.randn(4, 8)
    quantize(gm, seen, up=plan(None, "nvfp4"))
    assert_expected_inline(
        "\n".join(line for line in dump(gm).splitlines() if "graphq" in line),
        """\
%1: (f8e4m3, u8) = graphq.choose_scale(%x, 'nvfp4', [1, 16], @up.input_global_scale)
%3: u8[batch, 8] = graphq.quantize(%x, %2, None, @up.input_global_scale, 'nvfp4', [1, 16])
%4: f32[batch, 8] = graphq.dequantize(%3, %2, None, @up.input_global_scale, 'nvfp4', [1, 16], f32)""",
    )
    held = tensor_of(gm, "up.input_global_scale")
    assert held.item() == (448.0 * 6.0 / seen.abs().max()).item()
    quant = parse_quant("nvfp4")
    given = numerics.choose_scale(X, quant.format, [1, 16], held.view(1, 1))
    h = numerics.fake_quantize(X, given, quant.format, [1, 16])
    assert torch.equal(run(gm, X), mlp(gm, h))
    assert_vals(gm, X)


def test_nvfp4_dynamic_has_both_from_run_time() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    quantize(gm, X, up=plan(None, "nvfp4/dynamic"))
    assert not [name for name, _ in gm.named_buffers()]
    quant = parse_quant("nvfp4")
    h = numerics.fake_quantize(X, numerics.choose_scale(X, quant.format, [1, 16]), quant.format, [1, 16])
    assert torch.equal(run(gm, X), mlp(gm, h))
    assert_vals(gm, X)


def test_groups_of_activations() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    quantize(gm, X, up=plan(None, "mxfp8_e4m3/dynamic"), down=plan(None, "float8_e4m3fn/g4/dynamic"))

    def by_group(h: Tensor) -> Tensor:
        scale = h.view(-1, 3, 4).abs().amax(-1, keepdim=True) / 448
        scale = torch.where(scale == 0, 1.0, scale)
        return ((h.view(-1, 3, 4) / scale).to(torch.float8_e4m3fn).float() * scale).view(-1, 12)

    exponent = X.abs().amax(-1, keepdim=True).log2().floor() - 8
    h = (X / 2**exponent).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 2**exponent
    assert torch.equal(run(gm, X), mlp(gm, h, by_group))
    assert_vals(gm, X)


def test_ranges_by_their_method() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    x = torch.randn(2000, 8)
    x[0, 0] = 50
    quantize(gm, x, up=plan(None, "int8/tensor/percentile99"))
    scale = tensor_of(gm, "up.input_scale").item() * 127
    assert (
        abs(scale - x.abs().flatten().kthvalue(int(0.99 * x.numel())).values.item()) < 50 / 1024
    )  # a bin of the histogram


# -- inputs of which calibration saw a single number


def noted(text: str, *batches: Tensor) -> list[str]:
    notes: list[str] = []
    gm = annotated(capture(Attention(), torch.ones(2, 8)), q_proj=plan(None, text), v_proj=plan(None, text))
    steps = [Observe(), Calibrate(), QuantizeActivations(notes.append)]
    Pipeline(steps, strict=True).run(gm, [(x,) for x in batches])
    return notes


CONSTANT = torch.full((2, 8), 0.5)  # a layer norm of it gives zeros


@pytest.mark.parametrize("text", ["int8/tensor", "int8/asym/tensor", "int8/tensor/ema", "int8/tensor/percentile"])
def test_layers_whose_input_was_zero_are_noted(text: str) -> None:
    assert noted(text, CONSTANT, CONSTANT) == [
        f"{layer}: calibration saw only zeros in its input, from which no range of {parse_quant(text)} follows"
        for layer in ("q_proj", "v_proj")
    ]
    assert noted(text, CONSTANT, X[:2]) == []
    assert noted(text.partition("/")[0] + "/token/dynamic", CONSTANT) == []


def test_layers_whose_input_was_one_number_are_noted() -> None:
    notes: list[str] = []
    for x in (CONSTANT, torch.cat([CONSTANT, CONSTANT.nextafter(torch.ones(()))])):
        gm = annotated(capture(MLP(), torch.ones(2, 8)), up=plan(None, "int8/tensor"))
        Pipeline([Observe(), Calibrate(), QuantizeActivations(notes.append)]).run(gm, [(x,)])
    assert notes == ["up: calibration saw nothing but 0.5 in its input, from which no range of int8/tensor follows"]
