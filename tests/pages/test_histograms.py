"""Histograms count every element, wherever the bins began; ranges are those of the quantizers."""

import pytest
import torch
from torch import nn

import graphq
from graphq.comparison.sides import Sources, batches_for, spec_side
from graphq.pages.histograms import Histograms, activation_histograms, weight_histograms
from tests.models import tiny


def test_bins_widen_and_nothing_is_lost():
    seen = Histograms()
    parts = [torch.tensor([0.25, -0.5, float("nan")]), torch.tensor([100.0, 3.0]), torch.zeros(0)]
    for x in parts:
        seen.add(x, torch.tensor([-1.0, -2.0]), torch.tensor([1.0]))
    found = seen.found(bins=10)
    assert found is not None
    assert (found.low, found.high, found.range) == (-0.5, 100, (-2, 1))
    assert found.counts == (3, 0, 0, 0, 0, 0, 0, 0, 0, 1)
    assert Histograms().found() is None


def test_equal_to_one_look():
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    whole, parts = Histograms(), Histograms()
    ends = (torch.tensor(-1.0), torch.tensor(1.0))
    whole.add(x, *ends)
    for part in x.sort().values.split(77):
        parts.add(part, *ends)
    assert whole.found() == parts.found()
    found = whole.found()
    assert found is not None
    exact = torch.histc(x, 64, float(x.min()), float(x.max()))
    assert (torch.tensor(found.counts) - exact).abs().sum() < 0.01 * 10_000  # bins of 2048 are cut by those of 64


def test_weights_and_inputs_of_a_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(64, 16)
    spec = {"graphq": 1, "rules": [{"match": "=0", "weight": "int8/channel", "input": "int8/asym/tensor"}, {"match": "=2", "weight": "int4/tensor"}]}  # fmt: skip
    sources = Sources(model, [x[:32], x[32:]], x)
    made, side = spec_side(spec, sources)
    weights = weight_histograms(sources.beside(side), side.graph)
    w = model.get_parameter("0.weight").detach()
    assert set(weights) == {"0", "2"}
    assert sum(weights["0"].counts) == 128
    assert (weights["0"].low, weights["0"].high) == pytest.approx((float(w.min()), float(w.max())))
    scale = float(made.graph.get_buffer("0.weight_scale").max())
    assert weights["0"].range == pytest.approx((-128 * scale, 127 * scale))
    given = activation_histograms(side.graph, batches_for(side, sources.batches))
    assert set(given) == {"0"}
    assert sum(given["0"].counts) == x.numel()
    assert (given["0"].low, given["0"].high) == pytest.approx((float(x.min()), float(x.max())))
    low, high = given["0"].range
    assert high - low == pytest.approx(255 * float(made.graph.get_buffer("0.input_scale")), rel=1e-6)


def test_a_stack_of_experts_is_one():
    model = tiny("mixtral")
    sources = Sources(model, [])
    _, side = spec_side({"graphq": 1, "weight": "int8/channel"}, sources)
    found = weight_histograms(sources.beside(side), side.graph)
    assert sum(found["model.layers.0.mlp.experts.down_proj"].counts) == 4 * 64 * 96
    assert graphq.dump(side.graph)
