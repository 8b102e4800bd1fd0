"""Float weights in the places of codes."""

import copy
from typing import Any

import torch
from expecttest import assert_expected_inline

from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.passes.hold_weights import HoldWeights
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.split_gate_up import SplitGateUp
from graphq.state import first_names, put_tensor
from tests.graphs import annotated
from tests.models import MLP, MoE, Tied, capture, captured


def test_golden() -> None:
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up="int3/channel", down="int4/asym/g4")
    before = {name: w.clone() for name, w in gm.state_dict().items()}
    held: dict[str, Any] = {}
    assert Pipeline([HoldWeights(held)], strict=True).run(gm) == {"hold-weights": 2}
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
    assert held == {"up": ("up",), "down": ("down",)}
    for name in ("up.weight", "down.weight", "up.bias", "down.bias"):
        assert torch.equal(gm.state_dict()[name], before[name])
    assert Pipeline([HoldWeights(held)], strict=True).run(gm) == {"hold-weights": 0}


def test_the_names_and_shapes_are_those_of_the_qdq_form() -> None:
    plain = capture(MoE(), torch.ones(2, 8))
    SplitGateUp().run(plain)
    annotated(plain, blocks="int4/asym/g4", experts__1="int3/channel", experts__2="float")
    anew, codes, held = copy.deepcopy(plain), copy.deepcopy(plain), dict[str, Any]()
    HoldWeights(held).run(anew)
    QuantizeWeights().run(codes)
    shapes = [{name: tuple(t.shape) for name, t in gm.state_dict().items()} for gm in (anew, codes)]
    assert shapes[0] == shapes[1]
    assert {path: layers for path, layers in held.items() if path.startswith("experts.up_proj")} == {
        "experts.up_proj.part0": ("experts.0.up_proj", "experts.3.up_proj"),
        "experts.up_proj.part1": ("experts.1.up_proj",),
    }
    whole = plain.state_dict()["experts.up_proj"]
    assert torch.equal(anew.state_dict()["experts.up_proj.part0.weight"], whole[[0, 3]])
    assert torch.equal(anew.state_dict()["experts.up_proj.part2.weight"], whole[[2]])


def test_chosen_layers_and_products() -> None:
    held: dict[str, Any] = {}
    gm = annotated(capture(MLP(), torch.ones(2, 8)), up="int3/channel", down="int3/channel")
    assert HoldWeights(held, only=frozenset({"up"})).run(gm) == 1
    assert [*held] == ["up"]
    gm = annotated(captured("llama"), embed_tokens="int8/channel", lm_head="int8/channel")
    assert HoldWeights(held, products=True).run(gm) == 1
    assert [*held] == ["up", "lm_head"]
    assert HoldWeights(held).run(gm) == 1
    assert [*held] == ["up", "lm_head", "model.embed_tokens"]


def test_tied_weights_stay_one() -> None:
    gm = annotated(capture(Tied(), torch.tensor([[1, 2]])), embedding="int8/channel", head="int8/channel")
    put_tensor(gm, "head.weight", gm.get_parameter("embedding.weight"))
    HoldWeights({}).run(gm)
    assert first_names(gm.state_dict(keep_vars=True)) == {"embedding.weight": "head.weight"}
