"""Observers of means: where they stand, what they keep, and that they agree with the layers' own outputs."""

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.ir.index import GraphIndex
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.ir.views import Linear, ops_of
from graphq.observers.statistics import MeanObserver
from graphq.passes.calibrate import Calibrate
from graphq.passes.observe import Observe, observer_on, observers
from graphq.passes.observe_means import ObserveMeans, mean_of, planned_layers, why_uncorrectable
from graphq.spec.plan import KeepFloat
from graphq.spec.quant import parse_quant
from tests.graphs import annotated, assert_vals, plan, run
from tests.models import MLP, Attention, ConvBnRelu, MoE, Tied, Twice, capture

WEIGHT = "int8/channel"


def observe(gm: fx.GraphModule) -> int:
    """The number of changes; a second run finds nothing."""
    count = Pipeline([ObserveMeans()], strict=True).run(gm)["observe-means"]
    assert Pipeline([ObserveMeans()], strict=True).run(gm) == {"observe-means": 0}
    return count


def watching(gm: fx.GraphModule) -> list[tuple[Any, ...]]:
    return [
        (seen.role, seen.layers, seen.of, tuple(seen.total.shape))
        for _, seen in observers(gm)
        if isinstance(seen, MeanObserver)
    ]


def test_golden() -> None:
    gm = annotated(capture(Attention(), torch.ones(2, 3, 8)), q_proj=WEIGHT, k_proj="int4/g4", v_proj="float")
    x = torch.randn(2, 5, 8)
    before = run(gm, x)
    assert observe(gm) == 3
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, sequence, 8] = input
%1: f32[batch, sequence, 8] = aten.layer_norm(%x, [8], None, None, 1e-05, False)
%2: f32[batch, sequence, 8] = @observers.0(%1)
%3: f32[batch, sequence, 8] = aten.linear(%1, @q_proj.weight)  # q_proj: weight int8/channel
%4: f32[batch, sequence, 8] = @observers.1(%3)
%5: f32[batch, sequence, 8] = aten.linear(%1, @k_proj.weight)  # k_proj: weight int4/g4
%6: f32[batch, sequence, 8] = @observers.2(%5)
%7: f32[batch, sequence, 8] = aten.mul.Tensor(%3, %5)
%8: f32[batch, sequence, 8] = aten.linear(%1, @v_proj.weight)  # v_proj: float (asked for)
%9: f32[batch, sequence, 8] = aten.add.Tensor(%7, %8)
return [%9]
""",
    )
    assert watching(gm) == [
        ("input", ("q_proj", "k_proj"), -1, (8,)),
        ("output", ("q_proj",), -1, (8,)),
        ("output", ("k_proj",), -1, (8,)),
    ]
    assert torch.equal(run(gm, x), before)
    assert_vals(gm, x)


def test_convolutions_are_watched_tap_by_tap() -> None:
    gm = annotated(capture(ConvBnRelu(), torch.ones(2, 4, 8, 8)), conv=WEIGHT, depthwise=WEIGHT)
    assert observe(gm) == 4
    seen = [(role, layers, shape) for role, layers, _, shape in watching(gm)]
    assert seen == [
        ("input", ("conv",), (4, 3, 3)),
        ("output", ("conv",), (8,)),
        ("input", ("depthwise",), (8, 3, 3)),
        ("output", ("depthwise",), (8,)),
    ]


def test_a_mean_that_two_layers_need_is_observed_once() -> None:
    gm = annotated(capture(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)), torch.ones(2, 8)), blocks=WEIGHT)
    assert observe(gm) == 3
    assert watching(gm)[1] == ("output", ("0", "1"), -1, (6,))


@pytest.mark.parametrize(
    ("model", "inputs", "rules"),
    [
        (MLP(), torch.ones(2, 8), {"up": "float"}),
        (MLP(), torch.ones(2, 8), {"up": plan(None, "int8/token/dynamic")}),
        (MoE(), torch.ones(4, 8), {"experts": WEIGHT}),
        (Tied(), torch.ones(2, 3, dtype=torch.int64), {"embedding": WEIGHT}),
    ],
)
def test_other_layers_are_not_watched(model: nn.Module, inputs: Tensor, rules: Any) -> None:
    assert observe(annotated(capture(model, inputs), **rules)) == 0


def test_a_layer_whose_bias_is_read_elsewhere_is_not_watched() -> None:
    class Read(nn.Module):
        def __init__(self, used: bool) -> None:
            super().__init__()
            self.w, self.used = nn.Linear(8, 8), used

        def forward(self, x: Tensor) -> Tensor:
            return self.w(x) + (self.w.bias if self.used else 1)

    assert [observe(annotated(capture(Read(used), torch.ones(2, 8)), w=WEIGHT)) for used in (False, True)] == [2, 0]


def test_means() -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=WEIGHT)
    observe(gm)
    data = [(torch.randn(n, 8),) for n in (3, 5)]
    Pipeline([Calibrate()], strict=True).run(gm, data)
    x = torch.cat([x for (x,) in data]).double()
    up = next(op for op in ops_of(gm) if isinstance(op, Linear))
    w, b = (gm.state_dict()[f"up.{name}"].double() for name in ("weight", "bias"))
    seen, made = mean_of(gm, up.input_op, -1), mean_of(gm, up, -1)
    assert seen is not None
    assert made is not None
    assert (int(seen.count), int(made.count)) == (8, 8)
    assert torch.allclose(seen.total, x.sum(0), rtol=0, atol=1e-13)
    assert torch.allclose(made.total, (x @ w.t() + b).sum(0), rtol=0, atol=1e-4)  # of float32 products
    assert mean_of(gm, up, 0) is None


def test_they_are_no_observers_of_ranges() -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=plan("int8/tensor", "int8/tensor"))
    observe(gm)
    up = next(op for op in ops_of(gm) if isinstance(op, Linear))
    assert observer_on(gm, up.input_op, parse_quant("int8/tensor")) is None
    assert Pipeline([Observe()], strict=True).run(gm) == {"observe": 1}
    assert observer_on(gm, up.input_op, parse_quant("int8/tensor")) is not None


def test_the_uses_of_a_layer_are_together() -> None:
    gm = annotated(capture(Twice(), torch.ones(2, 8)), shared=WEIGHT)
    (uses,) = planned_layers(gm)
    assert len(uses) == 2
    assert why_uncorrectable(GraphIndex(gm), uses) is None
    assert observe(gm) == 4
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up=KeepFloat("asked for"), down=WEIGHT)
    assert [uses[0].node.meta["graphq.layer"] for uses in planned_layers(gm)] == ["down"]
