"""Graphs as text."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.ir import edit
from graphq.ir.text import dump
from graphq.ir.views import view
from tests.graphs import annotated, plan
from tests.models import MLP, Attention, MoE, capture, captured, tiny

aten = torch.ops.aten


def test_names_shapes_and_plans() -> None:
    gm = annotated(capture(Attention(), torch.ones(2, 3, 8)), q_proj=plan("int4/asym/g4", "int8/token/dynamic"))
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, sequence, 8] = input
%1: f32[batch, sequence, 8] = aten.layer_norm(%x, [8], None, None, 1e-05, False)
%2: f32[batch, sequence, 8] = aten.linear(%1, @q_proj.weight)  # q_proj: weight int4/asym/g4, input int8/token/dynamic
%3: f32[batch, sequence, 8] = aten.linear(%1, @k_proj.weight)  # k_proj: float (no rule matches it)
%4: f32[batch, sequence, 8] = aten.mul.Tensor(%2, %3)
%5: f32[batch, sequence, 8] = aten.linear(%1, @v_proj.weight)  # v_proj: float (no rule matches it)
%6: f32[batch, sequence, 8] = aten.add.Tensor(%4, %5)
return [%6]
""",
    )


class Odd(nn.Module):
    """One of everything an argument can be."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        n = x.shape[0]
        a = F.gelu(x, approximate="tanh").to(torch.bfloat16).to(torch.float64)
        b = F.pad(x, (1, 1), value=float("-inf"))
        c = torch.cat([x, x]).to(torch.float16), mask.to(torch.bool), mask.to(torch.uint8), mask.to(torch.int16)
        values, indices = x.topk(2)
        return a, b, *c, values, indices.int(), x.new_zeros(n + 1, n * 2).to(torch.int8), mask.to(torch.complex64)


def test_every_kind_of_argument_and_dtype() -> None:
    gm = capture(Odd(), torch.ones(2, 4), torch.ones(2, 5, dtype=torch.int64))
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, 4] = input
%mask: i64[batch, sequence] = input
%2: int = aten.sym_size.int(%mask, 0)
%3: f32[batch, 4] = aten.gelu(%x, approximate='tanh')
%4: bf16[batch, 4] = aten._to_copy(%3, dtype=bf16, device=cpu)
%5: f64[batch, 4] = aten._to_copy(%4, dtype=f64, device=cpu)
%6: f32[batch, 6] = aten.pad(%x, [1, 1], 'constant', -inf)
%7: f32[2*batch, 4] = aten.cat([%x, %x])
%8: f16[2*batch, 4] = aten._to_copy(%7, dtype=f16, device=cpu)
%9: bool[batch, sequence] = aten._to_copy(%mask, dtype=bool, device=cpu)
%10: u8[batch, sequence] = aten._to_copy(%mask, dtype=u8, device=cpu)
%11: i16[batch, sequence] = aten._to_copy(%mask, dtype=i16, device=cpu)
%12: (f32, i64) = aten.topk(%x, 2)
%13: f32[batch, 2] = item(%12, 0)
%14: i64[batch, 2] = item(%12, 1)
%15: i32[batch, 2] = aten._to_copy(%14, dtype=i32, device=cpu)
%16: int = add(%2, 1)
%17: int = mul(%2, 2)
%18: f32[batch + 1, 2*batch] = aten.new_zeros(%x, [%16, %17], pin_memory=False)
%19: i8[batch + 1, 2*batch] = aten._to_copy(%18, dtype=i8, device=cpu)
%20: torch.complex64[batch, sequence] = aten._to_copy(%mask, dtype=torch.complex64, device=cpu)
return [%5, %6, %8, %9, %10, %11, %13, %15, %19, %20]
""",
    )


def test_calls_of_modules_and_constants() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    relu = next(view(n) for n in gm.graph.nodes if n.target is aten.relu.default)
    edit.add_observer(gm, relu, "observers.0", nn.Identity(), by="t", like=relu)
    gain = edit.add_tensor(gm, relu, "up.gain", torch.ones(12, dtype=torch.int32), by="t")
    edit.insert(gm, relu, aten.mul.Tensor, gain, 2.5, by="t")
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, 8] = input
%1: f32[batch, 12] = aten.linear(%x, @up.weight, @up.bias)
%2: f32[12] = aten.mul.Tensor(@up.gain, 2.5)
%3: f32[batch, 12] = aten.relu(%1)
%4: f32[batch, 12] = @observers.0(%3)
%5: f32[batch, 8] = aten.linear(%3, @down.weight, @down.bias)
return [%5]
""",
    )


def test_experts_plans_are_summed_up() -> None:
    gm = annotated(
        capture(MoE(), torch.ones(5, 8)), blocks=plan("int8/channel"), experts__1=plan("int4/channel"), router="float"
    )
    comments = [line.partition("  # ")[2] for line in dump(gm).splitlines()]
    assert [comment for comment in comments if comment] == [
        "router: float (asked for)",
        "experts.gate_up_proj: 3 x weight int8/channel; 1 x weight int4/channel",
        "experts.down_proj: 3 x weight int8/channel; 1 x weight int4/channel",
    ]


def test_two_captures_and_copies_print_alike() -> None:
    from graphq.capture.hugging_face import capture_pretrained

    first = captured("llama")
    again = capture_pretrained(tiny("llama"))
    assert dump(again) == dump(first)
    assert dump(copy.deepcopy(again)) == dump(first)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_sizes_are_written_in_the_names_of_the_inputs_dimensions(family: str) -> None:
    lines = dump(captured(family)).splitlines()
    assert lines[:4] == [
        "%input_ids: i64[batch, sequence] = input",
        "%attention_mask: i64[batch, past_sequence + sequence] = input",
        "%position_ids: i64[batch, sequence] = input",
        "%past_key_values_0_key: f32[batch, 2, past_sequence, 16] = input",
    ]
    shapes = {size for line in lines for size in re.findall(r"\w\[([^\]]*)\] =", line)}
    symbols = {word for shape in shapes for word in re.findall(r"[A-Za-z_]\w*", shape)}
    assert symbols == {"batch", "sequence", "past_sequence"}


def test_numbers_are_the_order_of_lines() -> None:
    gm = captured("llama")
    for number, line in enumerate(dump(gm).splitlines()[:-1]):
        assert line.startswith((f"%{number}: ", "%input_ids", "%attention_mask", "%position_ids", "%past_key_values"))


def test_a_graph_of_another_origin_has_no_text() -> None:
    from graphq.errors import PassError

    with pytest.raises(PassError, match="not made by graphq"):
        dump(fx.symbolic_trace(nn.ReLU()))
