"""Dynamic quantizers as one op: which, how many, and that the numbers stay."""

from typing import Any

import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

import graphq
from graphq.ir.text import dump
from graphq.lowering.torch.fuse_quantization import fuse_quantization
from graphq.lowering.torch.pack import copy_graph, pack
from tests.models import MLP, Attention


def qdq(model: nn.Module, x: Tensor, **spec: Any) -> fx.GraphModule:
    torch.manual_seed(0)
    return graphq.compile(model.eval(), {"graphq": 1, **spec}, inputs=x).graph


def fused(gm: fx.GraphModule) -> tuple[int, fx.GraphModule]:
    made = copy_graph(gm)
    count = fuse_quantization(made)
    made.graph.lint()
    made.recompile()
    return count, made


def test_golden_linears_of_one_input_read_one_quantizer() -> None:
    x = torch.randn(2, 5, 8)
    gm = qdq(Attention(), x, weight="int4/g4", input="int8/asym/token/dynamic")
    packed = pack(gm)
    assert_expected_inline(
        dump(packed),
        """\
%x: f32[batch, sequence, 8] = input
%1: f32[batch, sequence, 8] = aten.layer_norm(%x, [8], None, None, 1e-05, False)
%2: (i8, f32, i8) = graphq.quantize_dynamic(%1, 'int8/asym', [1, 1, -1])
%3: i8[batch, sequence, 8] = item(%2, 0)
%4: f32[batch, sequence, 1] = item(%2, 1)
%5: i8[batch, sequence, 1] = item(%2, 2)
%6: f32[batch, sequence, 8] = @q_proj(%3, %4, %5)
%7: f32[batch, sequence, 8] = @k_proj(%3, %4, %5)
%8: f32[batch, sequence, 8] = aten.mul.Tensor(%6, %7)
%9: f32[batch, sequence, 8] = @v_proj(%3, %4, %5)
%10: f32[batch, sequence, 8] = aten.add.Tensor(%8, %9)
return [%10]
""",
    )
    with torch.no_grad():
        assert (packed(x)[0] - gm(x)[0]).abs().max() <= 1e-5 * gm(x)[0].abs().max()


def test_counts_one_for_each_activation() -> None:
    x = torch.randn(3, 8)
    gm = qdq(MLP(), x, weight="int8/channel", input="int8/token/dynamic")
    count, made = fused(gm)
    assert count == 2
    assert fuse_quantization(made) == 0
    with torch.no_grad():
        assert torch.equal(made(x)[0], gm(x)[0])


def test_leaves_scales_alone_that_are_fixed_or_have_two_levels() -> None:
    x = torch.randn(3, 32)
    model = nn.Sequential(nn.Linear(32, 32))
    assert fused(qdq(model, x, weight="int4/g16", input="nvfp4/dynamic"))[0] == 0
    assert fused(qdq(model, x, weight="int4/g16"))[0] == 0
    spec = {"graphq": 1, "weight": "int8/channel", "input": "int8/tensor"}
    assert fused(graphq.compile(model.eval(), spec, inputs=x, calibration=[x]).graph)[0] == 0


def test_leaves_a_scale_alone_that_something_else_is_quantized_by() -> None:
    x = torch.randn(3, 8)
    gm = qdq(MLP(), x, rules=[{"match": "up", "weight": "int8/channel", "input": "int8/token/dynamic"}])
    (quantizer,) = (n for n in gm.graph.nodes if n.target is torch.ops.graphq.quantize.default)
    with gm.graph.inserting_before(quantizer):
        doubled = gm.graph.call_function(torch.ops.aten.mul.Tensor, (quantizer.args[0], 2.0))
    doubled.meta = dict(quantizer.args[0].meta)
    quantizer.args = (doubled, *quantizer.args[1:])
    assert fused(gm)[0] == 0
