"""Observers: where they stand, what they keep, and what becomes of it."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.ir import edit
from graphq.ir.layers import BY, LAYER
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.ir.views import Linear, ops_of
from graphq.observers.ranges import OfmrObserver, OfmrWeightObserver
from graphq.passes.observe import Observe, observer_on, observers, weight_observer_on
from graphq.spec.plan import KeepFloat, PerExpert, input_quants
from graphq.spec.quant import parse_quant
from tests.graphs import annotated, assert_vals, plan, run
from tests.models import MLP, Attention, Blocks, MoE, Twice, capture

STATIC = plan("int8/channel", "int8/tensor")
ASYM = plan("int8/channel", "int8/asym/tensor")
DYNAMIC = plan("int8/channel", "int8/token/dynamic")
QUANT = parse_quant("int8/tensor")


def observe(gm: fx.GraphModule) -> int:
    """The number of changes; a second run finds nothing."""
    counts = Pipeline([Observe()], strict=True).run(gm)
    assert Pipeline([Observe()], strict=True).run(gm) == {"observe": 0}
    return counts["observe"]


def watching(gm: fx.GraphModule) -> dict[str, tuple[str, ...]]:
    return {str(op.node.target): observer.layers for op, observer in observers(gm)}


def test_golden() -> None:
    gm = annotated(capture(Attention(), torch.ones(2, 3, 8)), q_proj=STATIC, k_proj=STATIC, v_proj=ASYM)
    x = torch.randn(2, 5, 8)
    before = run(gm, x)
    assert observe(gm) == 2
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, sequence, 8] = input
%1: f32[batch, sequence, 8] = aten.layer_norm(%x, [8], None, None, 1e-05, False)
%2: f32[batch, sequence, 8] = @observers.0(%1)
%3: f32[batch, sequence, 8] = @observers.1(%1)
%4: f32[batch, sequence, 8] = aten.linear(%1, @q_proj.weight)  # q_proj: weight int8/channel, input int8/tensor
%5: f32[batch, sequence, 8] = aten.linear(%1, @k_proj.weight)  # k_proj: weight int8/channel, input int8/tensor
%6: f32[batch, sequence, 8] = aten.mul.Tensor(%4, %5)
%7: f32[batch, sequence, 8] = aten.linear(%1, @v_proj.weight)  # v_proj: weight int8/channel, input int8/asym/tensor
%8: f32[batch, sequence, 8] = aten.add.Tensor(%6, %7)
return [%8]
""",
    )
    assert watching(gm) == {"observers.0": ("q_proj", "k_proj"), "observers.1": ("v_proj",)}
    assert torch.equal(run(gm, x), before)
    assert_vals(gm, x)
    node = observers(gm)[0][0].node
    assert (node.meta[LAYER], node.meta[BY]) == ("q_proj", ("observe",))


@pytest.mark.parametrize("decision", [DYNAMIC, plan("int8/channel"), KeepFloat("asked for")])
def test_other_inputs_are_not_watched(decision: object) -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=decision, down="int4/channel")  # pyright: ignore[reportArgumentType]
    assert observe(gm) == 0


def test_an_unannotated_graph() -> None:
    assert observe(capture(MLP(), torch.ones(2, 8))) == 0


def test_graph_inputs_stay_together() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.w(x) + y

    gm = annotated(capture(Two(), torch.ones(2, 8), torch.ones(2, 8)), w=STATIC)
    assert observe(gm) == 1
    assert [node.op for node in gm.graph.nodes][:5] == ["placeholder"] * 2 + ["get_attr"] * 2 + ["call_module"]


def test_a_layer_called_twice_is_watched_at_both_inputs_and_named_once_at_one() -> None:
    gm = annotated(capture(Twice(), torch.ones(2, 8)), shared=STATIC)
    assert observe(gm) == 2
    assert watching(gm) == {"observers.0": ("shared",), "observers.1": ("shared",)}

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.w(x) + self.w(x)

    gm = annotated(capture(Same(), torch.ones(2, 8)), w=STATIC)
    assert observe(gm) == 1
    assert watching(gm) == {"observers.0": ("w",)}


def test_experts_of_one_format_share_an_observer() -> None:
    gm = annotated(
        capture(MoE(), torch.ones(5, 8)),
        blocks=STATIC,
        experts__1=ASYM,
        experts__2=DYNAMIC,
        experts__3="float",
    )
    assert observe(gm) == 4  # gate_up's and down's input, symmetric and asymmetric
    assert [(observer.layers, str(observer.quant)) for _, observer in observers(gm)] == [
        (("experts.gate_up_proj",), "int8/tensor"),
        (("experts.gate_up_proj",), "int8/asym/tensor"),
        (("experts.down_proj",), "int8/tensor"),
        (("experts.down_proj",), "int8/asym/tensor"),
    ]


def test_names_that_are_taken_are_left_alone() -> None:
    gm = annotated(capture(Blocks(), torch.ones(2, 8)), up=STATIC)
    gm.add_submodule("observers.0", nn.Linear(1, 1))
    assert observe(gm) == 2
    assert list(watching(gm)) == ["observers.1", "observers.2"]
    assert isinstance(gm.get_submodule("observers.0"), nn.Linear)


def test_observers_survive_torchs_own_dead_code_elimination() -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=STATIC)
    observe(gm)
    gm.graph.eliminate_dead_code()
    edit.drop_unused(gm)
    assert len(observers(gm)) == 1


def test_observer_on() -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=STATIC)
    observe(gm)
    x, relu = (next(op for op in ops_of(gm) if op.node.name == name) for name in ("x", "relu"))
    assert observer_on(gm, x, QUANT) is gm.get_submodule("observers.0")
    assert observer_on(gm, x, parse_quant("int8/asym/tensor")) is None
    assert observer_on(gm, relu, QUANT) is None


def test_input_quants() -> None:
    assert input_quants(STATIC) == (QUANT,)
    assert input_quants(KeepFloat("x")) == (None,)
    assert input_quants(None) == (None,)
    assert input_quants(PerExpert((STATIC, plan("int8/channel"), KeepFloat("x")))) == (QUANT, None, None)


def test_the_same_format_for_weight_and_input_has_an_observer_each() -> None:
    both = plan("hifloat8/tensor/ofmr", "hifloat8/tensor/ofmr")
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=both)
    assert Pipeline([Observe()], strict=True).run(gm) == {"observe": 2}
    assert {type(seen) for _, seen in observers(gm)} == {OfmrObserver, OfmrWeightObserver}
    assert Pipeline([Observe()], strict=True).run(gm) == {"observe": 0}
    up = next(op for op in ops_of(gm) if isinstance(op, Linear) and op.node.meta[LAYER] == "up")
    assert both.input is not None
    assert isinstance(observer_on(gm, up.input_op, both.input), OfmrObserver)
    assert isinstance(weight_observer_on(gm, up), OfmrWeightObserver)
