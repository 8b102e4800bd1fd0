"""Caches hold codes: inputs, outputs and scales beside them, and the same numbers as before."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx

from graphq.capture.source import PAST, source_of
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.passes.cache_codes import CacheCodes
from graphq.passes.calibrate import Calibrate
from graphq.passes.observe import Observe
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.passes.quantize_cache import QuantizeCache
from graphq.spec.quant import parse_quant
from tests.caches import EMPTY, CachedAttention, X, cached
from tests.graphs import assert_vals


def with_codes(quant: str, gm: fx.GraphModule | None = None) -> tuple[fx.GraphModule, int]:
    """The graph and the number of changes; a second run finds nothing."""
    gm = gm or cached()
    step = QuantizeCache(parse_quant(quant))
    Pipeline([Observe((step,)), Calibrate(), step, QuantizeActivations()], strict=True).run(gm, [(X, EMPTY, EMPTY)])
    counts = Pipeline([CacheCodes()], strict=True).run(gm)
    assert Pipeline([CacheCodes()], strict=True).run(gm) == {"cache-codes": 0}
    return gm, counts["cache-codes"]


def test_golden_with_scales_beside_the_codes() -> None:
    gm, count = with_codes("int8/asym/token/dynamic")
    assert count == 2
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, sequence, 8] = input
%key: i8[batch, 2, past_sequence, 4] = input
%key_scale: bf16[batch, 2, past_sequence, 1] = input
%key_zero_point: i8[batch, 2, past_sequence, 1] = input
%value: i8[batch, 2, past_sequence, 4] = input
%value_scale: bf16[batch, 2, past_sequence, 1] = input
%value_zero_point: i8[batch, 2, past_sequence, 1] = input
%7: f32[batch, sequence, 16] = aten.linear(%x, @q.weight)
%8: f32[batch, sequence, 4, 4] = aten.unflatten.int(%7, -1, [4, 4])
%9: f32[batch, 4, sequence, 4] = aten.transpose.int(%8, 1, 2)
%10: f32[batch, sequence, 8] = aten.linear(%x, @k.weight)
%11: f32[batch, sequence, 2, 4] = aten.unflatten.int(%10, -1, [2, 4])
%12: f32[batch, 2, sequence, 4] = aten.transpose.int(%11, 1, 2)
%13: f32[batch, sequence, 8] = aten.linear(%x, @v.weight)
%14: f32[batch, sequence, 2, 4] = aten.unflatten.int(%13, -1, [2, 4])
%15: f32[batch, 2, sequence, 4] = aten.transpose.int(%14, 1, 2)
%16: (f32, i8) = graphq.choose_scale(%12, 'int8/asym', [1, 1, 1, -1])
%17: f32[batch, 2, sequence, 1] = item(%16, 0)
%18: i8[batch, 2, sequence, 1] = item(%16, 1)
%19: bf16[batch, 2, sequence, 1] = aten.to.dtype(%17, bf16)
%20: i8[batch, 2, sequence, 4] = graphq.quantize(%12, %19, %18, None, 'int8/asym', [1, 1, 1, -1])
%21: i8[batch, 2, past_sequence + sequence, 4] = aten.cat([%key, %20], 2)
%22: bf16[batch, 2, past_sequence + sequence, 1] = aten.cat([%key_scale, %19], 2)
%23: i8[batch, 2, past_sequence + sequence, 1] = aten.cat([%key_zero_point, %18], 2)
%24: f32[batch, 2, past_sequence + sequence, 4] = graphq.dequantize(%21, %22, %23, None, 'int8/asym', [1, 1, 1, -1], f32)
%25: (f32, i8) = graphq.choose_scale(%15, 'int8/asym', [1, 1, 1, -1])
%26: f32[batch, 2, sequence, 1] = item(%25, 0)
%27: i8[batch, 2, sequence, 1] = item(%25, 1)
%28: bf16[batch, 2, sequence, 1] = aten.to.dtype(%26, bf16)
%29: i8[batch, 2, sequence, 4] = graphq.quantize(%15, %28, %27, None, 'int8/asym', [1, 1, 1, -1])
%30: i8[batch, 2, past_sequence + sequence, 4] = aten.cat([%value, %29], 2)
%31: bf16[batch, 2, past_sequence + sequence, 1] = aten.cat([%value_scale, %28], 2)
%32: i8[batch, 2, past_sequence + sequence, 1] = aten.cat([%value_zero_point, %27], 2)
%33: f32[batch, 2, past_sequence + sequence, 4] = graphq.dequantize(%30, %31, %32, None, 'int8/asym', [1, 1, 1, -1], f32)
%34: f32[batch, 4, past_sequence + sequence, 4] = aten.repeat_interleave.self_int(%24, 2, 1)
%35: f32[batch, 4, past_sequence + sequence, 4] = aten.repeat_interleave.self_int(%33, 2, 1)
%36: f32[batch, 4, sequence, 4] = aten.scaled_dot_product_attention(%9, %34, %35)
return [%36, %21, %22, %23, %30, %31, %32]
""",
    )
    source = source_of(gm)
    assert [(i.name, i.dtype) for i in source.inputs] == [
        ("x", torch.float32),
        ("key", torch.int8),
        ("key_scale", torch.bfloat16),
        ("key_zero_point", torch.int8),
        ("value", torch.int8),
        ("value_scale", torch.bfloat16),
        ("value_zero_point", torch.int8),
    ]
    assert source.outputs == (
        *("y", "present_key", "present_key_scale", "present_key_zero_point"),
        *("present_value", "present_value_scale", "present_value_zero_point"),
    )
    assert [(pair.past, pair.present) for pair in source.caches] == [
        (name, f"present_{name}") for name in source.names if name != "x"
    ]
    shapes = {i.name: i.shape for i in source.inputs}
    assert shapes["key_scale"][:3] == shapes["key"][:3]
    assert (shapes["key"][3], shapes["key_scale"][3]) == (4, 1)


def test_golden_with_fixed_scales() -> None:
    gm, count = with_codes("float8_e4m3fn/tensor")
    assert count == 2
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, sequence, 8] = input
%key: u8[batch, 2, past_sequence, 4] = input
%value: u8[batch, 2, past_sequence, 4] = input
%3: f32[batch, sequence, 16] = aten.linear(%x, @q.weight)
%4: f32[batch, sequence, 4, 4] = aten.unflatten.int(%3, -1, [4, 4])
%5: f32[batch, 4, sequence, 4] = aten.transpose.int(%4, 1, 2)
%6: f32[batch, sequence, 8] = aten.linear(%x, @k.weight)
%7: f32[batch, sequence, 2, 4] = aten.unflatten.int(%6, -1, [2, 4])
%8: f32[batch, 2, sequence, 4] = aten.transpose.int(%7, 1, 2)
%9: f32[batch, sequence, 8] = aten.linear(%x, @v.weight)
%10: f32[batch, sequence, 2, 4] = aten.unflatten.int(%9, -1, [2, 4])
%11: f32[batch, 2, sequence, 4] = aten.transpose.int(%10, 1, 2)
%12: u8[batch, 2, sequence, 4] = graphq.quantize(%8, @key_scale, None, None, 'float8_e4m3fn', [-1, -1, -1, -1])
%13: u8[batch, 2, past_sequence + sequence, 4] = aten.cat([%key, %12], 2)
%14: f32[batch, 2, past_sequence + sequence, 4] = graphq.dequantize(%13, @key_scale, None, None, 'float8_e4m3fn', [-1, -1, -1, -1], f32)
%15: u8[batch, 2, sequence, 4] = graphq.quantize(%11, @value_scale, None, None, 'float8_e4m3fn', [-1, -1, -1, -1])
%16: u8[batch, 2, past_sequence + sequence, 4] = aten.cat([%value, %15], 2)
%17: f32[batch, 2, past_sequence + sequence, 4] = graphq.dequantize(%16, @value_scale, None, None, 'float8_e4m3fn', [-1, -1, -1, -1], f32)
%18: f32[batch, 4, past_sequence + sequence, 4] = aten.repeat_interleave.self_int(%14, 2, 1)
%19: f32[batch, 4, past_sequence + sequence, 4] = aten.repeat_interleave.self_int(%17, 2, 1)
%20: f32[batch, 4, sequence, 4] = aten.scaled_dot_product_attention(%5, %18, %19)
return [%20, %13, %16]
""",
    )
    assert [(i.name, i.dtype) for i in source_of(gm).inputs] == [
        ("x", torch.float32),
        ("key", torch.uint8),
        ("value", torch.uint8),
    ]


@pytest.mark.parametrize("quant", ["int8/asym/token/dynamic", "int8/channel", "float8_e5m2/head", "int4/g2/dynamic"])
def test_the_numbers_are_those_of_a_cache_of_values(quant: str) -> None:
    """Step by step: codes that come back are what values that come back are."""
    values, step = cached(), QuantizeCache(parse_quant(quant))
    Pipeline([Observe((step,)), Calibrate(), step]).run(values, [(X, EMPTY, EMPTY)])
    codes, _ = with_codes(quant)
    for gm in (values, codes):
        gm.recompile()
    past: list[Tensor] = [EMPTY, EMPTY]
    held = [node.meta["val"] for node in codes.graph.find_nodes(op="placeholder")][1:]
    own: list[Tensor] = [torch.zeros(2, 2, 0, val.shape[3], dtype=val.dtype) for val in held]
    with torch.no_grad():
        for part in X.split(1, 1):
            y, *past = values(part, *past)
            mine, *own = codes(part, *own)
            assert torch.equal(mine, y)
    assert_vals(codes, X, *own)


def test_a_cache_of_floats_stays() -> None:
    assert Pipeline([CacheCodes()], strict=True).run(cached()) == {"cache-codes": 0}
    gm, count = with_codes("int8/head", cached(CachedAttention(lambda past, new: torch.cat([past * 2, new], 2))))
    assert count == 1
    assert [i.dtype for i in source_of(gm).inputs] == [torch.float32, torch.float32, torch.int8]


def test_names_of_dimensions_are_kept() -> None:
    made, _ = with_codes("int8/token/dynamic")
    assert {i.shape for i in source_of(made).inputs if i.name.endswith("_scale")} == {("batch", 2, PAST, 1)}
    assert all(i.is_cache for i in source_of(made).inputs[1:])
