"""Predicted losses are the second-order terms of measured ones; runs of mixes equal the graphs that are compiled."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphq
from graphq import compiler
from graphq.capture.source import source_of
from graphq.data.batches import complete
from graphq.errors import SpecError
from graphq.ir.layers import sites
from graphq.ir.pipeline import Pipeline
from graphq.mixed_precision.divergence import Divergence, measured_outputs
from graphq.mixed_precision.layer_groups import layer_groups
from graphq.mixed_precision.options import read_options
from graphq.mixed_precision.quantized import MixedRun, QuantizedLayers, quantized
from graphq.mixed_precision.sensitivity import layer_costs
from graphq.passes.calibrate import run_batch
from graphq.pipelines import canonical_passes
from graphq.spec.plan import Plan
from graphq.spec.quant import parse_quant
from tests.models import captured, tiny


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.second = nn.Linear(24, 8)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture(scope="module")
def two():
    torch.manual_seed(0)
    gm = compiler.capture(Two(), torch.randn(5, 16))
    plan = Plan(parse_quant("int4/channel"))
    held = QuantizedLayers(gm, quantized(gm, {"first": plan, "second": plan}, None))
    return gm, held


def batches_of(count: int, rows: int = 32):
    return [(torch.randn(rows, 16, generator=torch.Generator().manual_seed(i)),) for i in range(count)]


def test_output_error_is_that_of_each_layer_alone(two):
    """With the float model's values in front of each layer, and its weight rounded by itself."""
    gm, held = two
    (x,) = batches_of(1)[0]
    costs = layer_costs(gm, {"int4": held}, [(x,)], "output-error")["int4"]
    weights = {name: tensor.detach() for name, tensor in gm.named_parameters()}
    hidden = torch.tanh(F.linear(x, weights["first.weight"], weights["first.bias"]))
    for name, given in (("first", x), ("second", hidden)):
        w, b = weights[f"{name}.weight"], weights[f"{name}.bias"]
        y = F.linear(given, w, b)
        d = F.linear(given, graphq.fake_quantize(w, "int4/channel"), b) - y
        wanted = float(d.square().sum() / y.square().sum())
        assert costs[name] == pytest.approx(wanted, rel=1e-4)  # float32 differences, in another order
        assert wanted > 1e-4


def test_gradient_of_a_model_is_the_squared_change_of_its_outputs(two):
    """Of the last layer, where the output is linear in what rounding changes, on average over the random signs."""
    gm, held = two
    batches = batches_of(1) * 400
    found = layer_costs(gm, {"int4": held}, batches, "gradient")["int4"]
    nodes = {site.path: site.op.node.name for site in sites(gm)}
    whole = Divergence(gm, batches[:1])
    for path in ("first", "second"):
        measured = whole.of({nodes[path]: held})
        # Half of the relative square; 400 draws of 32 rows are within 15 % of the mean, tanh is nearly linear here.
        assert 2 * found[path] == pytest.approx(measured, rel=0.15)


def test_gradient_of_a_language_model_is_the_divergence_to_second_order():
    gm = compiler.capture(tiny("llama", initializer_range=0.15))  # of tokens that are not all alike likely
    groups = layer_groups(gm, read_options("int6/channel,int8/channel"))
    decisions = {fqn: d for group in groups for fqn, d in group.decisions[0].items()}
    held = QuantizedLayers(gm, quantized(gm, decisions, None))
    generator = torch.Generator().manual_seed(0)
    batches = [complete(source_of(gm), torch.randint(0, 128, (4, 24), generator=generator)) for _ in range(40)]
    costs = layer_costs(gm, {"int6": held}, batches, "gradient")["int6"]
    whole = Divergence(gm, batches)
    nodes = {site.path: site.op.node.name for site in sites(gm)}
    measured = {path: whole.of({nodes[path]: held}) for path in list(costs)[:6]}
    for path, loss in measured.items():
        assert costs[path] == pytest.approx(loss, rel=0.35), path  # 3,840 tokens are drawn; squares have heavy tails


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_mixed_run_is_the_compiled_graph(family):
    gm = captured(family)
    Pipeline(canonical_passes()).run(gm)
    options = read_options("int3/g32 x int8/token/dynamic,int8/channel x int8/asym/tensor")
    groups = layer_groups(gm, options)
    batches = [complete(source_of(gm), torch.arange(24).reshape(2, 12))]
    graphs = [quantized(gm, {f: d for g in groups for f, d in g.decisions[i].items()}, batches) for i in (0, 1)]
    held = [QuantizedLayers(gm, graph) for graph in graphs]
    nodes = {site.path: site.op.node.name for site in sites(gm)}
    mix = {fqn: d for i, g in enumerate(groups) for fqn, d in g.decisions[i % 2].items()}
    chosen = {nodes[path]: held[i % 2] for i, g in enumerate(groups) for path in g.paths}
    with torch.inference_mode():
        whole = run_batch(quantized(gm, mix, batches), batches[0], 0, "test")
        found = MixedRun(gm, chosen).outputs(batches[0])
        assert torch.equal(found[0], whole[0])
        nothing = MixedRun(gm, {}).outputs(batches[0])
        assert torch.equal(nothing[0], run_batch(gm, batches[0], 0, "test")[0])
        assert not torch.equal(found[0], nothing[0])


@pytest.mark.parametrize("kind", ["gradient", "output-error"])
def test_masked_tokens_have_no_part(kind):
    gm = captured("llama")
    Pipeline(canonical_passes()).run(gm)
    groups = layer_groups(gm, read_options("int4/channel,int8/channel"))
    held = QuantizedLayers(gm, quantized(gm, {f: d for g in groups for f, d in g.decisions[0].items()}, None))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    ids = torch.arange(24).reshape(2, 12)
    other = torch.where(mask == 0, ids + 60, ids)
    both = [
        layer_costs(gm, {"q": held}, [complete(source_of(gm), {"input_ids": x, "attention_mask": mask})], kind)["q"]
        for x in (ids, other)
    ]
    assert both[0] == pytest.approx(both[1], rel=1e-5)  # what is under the mask changes no sum but its order
    whole = [Divergence(gm, [complete(source_of(gm), {"input_ids": x, "attention_mask": mask})]) for x in (ids, other)]
    chosen = {site.op.node.name: held for site in sites(gm)}
    assert whole[0].of(chosen) == pytest.approx(whole[1].of(chosen), rel=1e-5)


def test_a_model_that_gives_no_floats_is_refused():
    class Best(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x).argmax(-1)

    gm = compiler.capture(Best(), torch.randn(2, 4))
    with pytest.raises(SpecError, match=r"^search: the model gives no floats but caches"):
        measured_outputs(gm)
