"""Local and cumulative errors are what running the layers by hand gives; folds, rotations and masks are told apart."""

import json
from typing import Any

import pytest
import torch
from torch import nn

import graphq
from graphq.comparison.driver import Comparison
from graphq.comparison.side_by_side import SideBySide
from graphq.errors import SpecError
from tests.models import MLP, Blocks, ConvBnRelu, Twice, tiny

INT4 = {"graphq": 1, "weight": "int4/channel"}
X = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
TOKENS = [torch.randint(0, 100, (2, 8), generator=torch.Generator().manual_seed(i)) for i in range(2)]


def seeded(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 3
    return model.eval()


def share(want: torch.Tensor, got: torch.Tensor) -> float:
    return float((want - got).double().square().sum() / want.double().square().sum())


def by_name(found: Comparison) -> dict[str, Any]:
    return {layer.name: layer for layer in found.layers}


def test_errors_are_those_of_the_layers_by_hand():
    model: Any = seeded(MLP())
    made = graphq.compile(model, INT4, inputs=X)
    found = by_name(graphq.diff(model, INT4, inputs=X, calibration=[X[:5], X[5:]]))
    state = made.graph.state_dict()

    def quantized(name: str, x: torch.Tensor) -> torch.Tensor:
        w = state[f"{name}.weight"].float() * state[f"{name}.weight_scale"]
        return x @ w.T + getattr(model, name).bias

    with torch.no_grad():
        up, down = model.up(X), model(X)
        rounded = quantized("up", X)
        assert found["up"].local.share == pytest.approx(share(up, rounded), rel=1e-5)
        assert found["up"].cumulative.share == found["up"].local.share
        local, own = (quantized("down", torch.relu(x)) for x in (up, rounded))
    assert found["down"].local.share == pytest.approx(share(down, local), rel=1e-5)
    assert found["down"].cumulative.share == pytest.approx(share(down, own), rel=1e-5)
    assert found["down"].cumulative.share > 1.2 * found["down"].local.share
    cosine = torch.nn.functional.cosine_similarity(down.flatten(), local.flatten(), dim=0)
    assert found["down"].local.cosine == pytest.approx(float(cosine), rel=1e-6)
    errors = (down - local).square().sum(-1) / down.square().sum(-1).mean()
    worst = int(errors.argmax())
    first = found["down"].worst[0]
    assert (first.batch, first.at, first.token) == ((0, (worst,), -1) if worst < 5 else (1, (worst - 5,), -1))
    assert first.error == pytest.approx(float(errors.max()), rel=1e-4)
    assert [row.error for row in found["down"].worst] == sorted((e.error for e in found["down"].worst), reverse=True)


def test_the_two_walks_are_one(monkeypatch):
    """A model of n layers runs each op of the reference once, of the compared graph at most twice a batch."""
    calls: list[int] = []
    linear = torch.ops.aten.linear.default
    run_node = torch.fx.Interpreter.run_node

    def counted(self: Any, node: torch.fx.Node) -> Any:
        calls.append(node.target is linear)
        return run_node(self, node)

    model = seeded(Blocks())
    made = graphq.compile(model, INT4, inputs=X)
    monkeypatch.setattr(torch.fx.Interpreter, "run_node", counted)
    graphq.diff(made, made, inputs=X, calibration=[X])
    assert sum(calls) == 5 + 5 + 4  # what the first layer reads is the same in both runs of B


def test_a_layer_that_is_used_twice():
    found = graphq.diff(seeded(Twice()), INT4, inputs=X, calibration=[X])
    assert {layer.name for layer in found.layers} == {"shared", "shared (use 2)"}


def test_convolutions_count_pixels_as_rows():
    model = seeded(ConvBnRelu())
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    found = by_name(graphq.diff(model, {"graphq": 1, "weight": "int4/channel"}, inputs=x, calibration=[x]))
    assert found["conv"].local.rows == 2 * 6 * 6
    assert found["depthwise"].local.rows == 2 * 4 * 4
    assert len(found["conv"].worst[0].at) == 3


class Dead(nn.Module):
    """One input channel is so large that an int8 scale for all of the tensor leaves no other channel."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8, bias=False)
        self.up.weight.data = torch.eye(8) * torch.tensor([1000.0, *[1.0] * 7])

    def forward(self, x):
        return self.up(x)


def test_dead_channels_and_clipped_activations():
    x = X.clamp(-1, 1)
    spec = {"graphq": 1, "weight": "int8/tensor", "input": "int8/tensor"}
    found = graphq.diff(Dead(), spec, inputs=x, calibration=[x])
    (layer,) = found.layers
    assert layer.dead_channels == tuple(range(1, 8))  # 1 is 0.127 steps of the weight's scale
    assert layer.clipped == 0
    made = graphq.compile(Dead(), spec, inputs=x, calibration=[x])
    wide = x * 2
    (layer,) = graphq.diff(Dead(), made, inputs=x, calibration=[wide]).layers
    step = float(made.graph.get_buffer("up.input_scale"))
    beyond = (wide > 127.5 * step) | (wide < -128.5 * step)
    assert layer.clipped == pytest.approx(float(beyond.double().mean()))
    assert layer.clipped is not None
    assert layer.clipped > 0.2


@pytest.mark.parametrize("format", ["float8_e4m3fn", "mxfp4", "nvfp4"])
def test_what_is_rounded_in_range_is_not_clipped(format):
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    grain = {"float8_e4m3fn": "/tensor"}.get(format, "/dynamic")
    model = seeded(nn.Sequential(nn.Linear(32, 8)))
    found = graphq.diff(model, {"graphq": 1, "weight": "int8/channel", "input": format + grain}, inputs=x, calibration=[x])  # fmt: skip
    assert (found.layers[0].clipped or 0) == (0 if format != "mxfp4" else found.layers[0].clipped)
    assert (found.layers[0].clipped or 0) < 0.05  # mx exponents are rounded down: 6.5 and 7 of 8 become 6


def test_masked_tokens_do_not_count():
    model = tiny("bert")
    tokens = TOKENS[0]
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    padded = [{"input_ids": tokens, "attention_mask": mask}]
    found = by_name(graphq.diff(model, INT4, calibration=padded))
    name = "encoder.layer.0.intermediate.dense"
    assert found[name].local.rows == 16 - 3
    assert all(row.at[0] == 0 or row.at[1] < 5 for row in found[name].worst)
    assert all(row.token == int(tokens[row.at]) for row in found[name].worst)


ALGORITHMS = {
    "smooth-quant": {"smooth-quant": {"alpha": 0.7}},
    "awq": {"awq": {"n_grid": 4}},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_folded_is_compared_in_its_readers(name, tmp_path):
    model = tiny("llama")
    spec = {"graphq": 1, "weight": "int8/channel", "algorithms": [ALGORITHMS[name]]}
    made = graphq.compile(model, spec, calibration=TOKENS)
    found = graphq.diff(model, made, calibration=TOKENS)
    layers = by_name(found)
    folded = {layer.name: layer.compared_in for layer in found.layers if layer.compared_in}
    assert folded["model.layers.0.mlp.up_proj"] == ("model.layers.0.mlp.down_proj",)
    assert folded["model.layers.1.self_attn.v_proj"] == ("model.layers.1.self_attn.o_proj",)
    assert len(folded) == 4
    assert not layers["model.layers.0.mlp.up_proj"].local.rows
    # what has the factors of a norm gives what it gave
    assert all(layer.local.share < 1e-3 for layer in found.layers)
    assert layers["model.layers.0.self_attn.q_proj"].local.share > 0
    made.save(tmp_path / "artifact")
    again = graphq.diff(made, tmp_path / "artifact", model=model, calibration=TOKENS[:1])
    assert [layer.name for layer in again.layers if layer.local.share > 1e-9] == []
    assert not again.notes


def test_a_rotated_model_is_compared_in_its_own_basis(tmp_path):
    model = tiny("llama")
    spec = {"graphq": 1, "weight": "int8/channel", "algorithms": ["rotate"], "run": {"seed": 3}}
    found = graphq.diff(model, spec, calibration=TOKENS)
    assert found.layers[0].local.share < 1e-3
    assert all(layer.cumulative.cosine > 0.99 for layer in found.layers if layer.cumulative.rows)
    graphq.compile(model, spec).save(tmp_path / "artifact")
    again = graphq.diff(model, tmp_path / "artifact", calibration=TOKENS)
    assert [layer.local.share for layer in again.layers] == pytest.approx([x.local.share for x in found.layers])
    with pytest.raises(SpecError, match="A and B are prepared in unlike ways"):
        graphq.diff(INT4, spec, model=model, calibration=TOKENS)


def test_experts_keep_their_rows_for_the_same_routing():
    model = tiny("mixtral")
    found = by_name(graphq.diff(model, {"graphq": 1, "weight": "int3/channel"}, calibration=TOKENS))
    down = found["model.layers.1.mlp.experts.down_proj"]
    assert 0 < down.local.share < 0.2
    assert down.to_json()["cumulative"] is None


def test_json_is_plain_and_text_escaped():
    found = graphq.diff(seeded(Blocks()), INT4, inputs=X, calibration=[X])
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["layers"][0]["layer"] == found.layers[0].name
    shares = [layer["local"]["error"] for layer in plain["layers"]]
    assert shares == sorted(shares, reverse=True)
    assert plain["outputs"]["output"]["sqnr_db"] == pytest.approx(by_name(found)["head"].cumulative.sqnr_db, rel=1e-9)
    assert plain["agreement"] is None
    header, first = str(found).splitlines()[:2]
    assert header.split()[:4] == ["layer", "plan", "local", "dB"]
    assert first.startswith(found.layers[0].name)


@pytest.mark.parametrize(
    ("a", "b", "more", "message"),
    [
        (MLP(), MLP(), {}, "both are models as they are"),
        (INT4, INT4, {}, r"a spec: give the model that it is of \(model=, --model\)"),
        (MLP(), INT4, {"calibration": []}, "calibration: no batches"),
        (MLP(), INT4, {"worst": -1}, "worst: -1 is not a whole number from 0"),
        (MLP(), "w4a17", {}, "w4a17"),
    ],
)
def test_refused(a, b, more, message):
    options: Any = {"calibration": [X], **more}
    with pytest.raises(SpecError, match=message):
        graphq.diff(a, b, inputs=X, **options)


def test_two_models_are_not_compared():
    models = (MLP(), nn.Sequential(nn.Linear(8, 8)))
    made, other = (graphq.compile(seeded(m), INT4, inputs=X) for m in models)
    with pytest.raises(SpecError, match="no layer of A has the name of one of B"):
        graphq.diff(made, other, calibration=[X])
    wide = graphq.compile(seeded(MLP(hidden=16)), INT4, inputs=X)
    with pytest.raises(SpecError, match=r"up gives \[12, 12\] in A and \[12, 16\] in B"):
        SideBySide(made.graph, wide.graph, {}, 1).run(0, (X,), (X,))
