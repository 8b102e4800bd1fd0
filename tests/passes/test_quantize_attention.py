"""What attention reads is quantized where it enters: before heads are repeated, once, and not behind a cache's codes."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.errors import SpecError
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.passes.calibrate import Calibrate
from graphq.passes.observe import Observe, observers
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.passes.quantize_attention import QuantizeAttention
from graphq.passes.quantize_cache import QuantizeCache
from graphq.spec.attention import AttentionOperands
from graphq.spec.quant import parse_quant
from graphq.state import tensor_of
from tests.caches import EMPTY, X, cached
from tests.graphs import assert_vals, run
from tests.models import capture


def operands(**quants: str) -> AttentionOperands:
    return AttentionOperands(**{name: parse_quant(text) for name, text in quants.items()})


def quantize(gm: fx.GraphModule, *inputs: Tensor, **quants: str) -> int:
    """The number of changes; a second run finds nothing."""
    step = QuantizeAttention(operands(**quants))
    Pipeline([Observe((step,)), Calibrate()], strict=True).run(gm, [inputs])
    counts = Pipeline([step, QuantizeActivations()], strict=True).run(gm)
    assert Pipeline([Observe((step,)), step], strict=True).run(gm) == {"observe": 0, "quantize-attention": 0}
    assert observers(gm) == []
    return counts["quantize-attention"]


class Attends(nn.Module):
    """Two query heads over one of keys and values, which are repeated as models write it."""

    def __init__(self, mask: bool = False, repeats: bool = True, **options: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
        self.mask, self.repeats, self.options = mask, repeats, options

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (f(x).view(batch, tokens, -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.repeats:
            k, v = (one[:, :, None].expand(batch, 1, 2, tokens, 4).reshape(batch, 2, tokens, 4) for one in (k, v))
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() if self.mask else None
        return F.scaled_dot_product_attention(q, k, v, mask, **self.options)


def heads(gm: fx.GraphModule, x: Tensor) -> list[Tensor]:
    """Queries, keys and values, with as many heads as each has."""
    rows = [F.linear(x, tensor_of(gm, f"{name}.weight").detach()) for name in "qkv"]
    return [one.unflatten(-1, (-1, 4)).transpose(1, 2) for one in rows]


def rounded(x: Tensor, axes: tuple[int, ...], top: int = 127) -> Tensor:
    scale = x.abs().amax(axes, keepdim=True) / top
    return (x / scale).round().clamp(-top - 1, top) * scale


def test_golden() -> None:
    gm = capture(Attends(), X)
    assert quantize(gm, X, q="int8/head", k="int8/tensor", v="int8/token/dynamic") == 3
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, sequence, 8] = input
%1: int = aten.sym_size.int(%x, 0)
%2: int = aten.sym_size.int(%x, 1)
%3: f32[batch, sequence, 8] = aten.linear(%x, @q.weight)
%4: f32[batch, sequence, 2, 4] = aten.view(%3, [%1, %2, -1, 4])
%5: f32[batch, 2, sequence, 4] = aten.transpose.int(%4, 1, 2)
%6: i8[batch, 2, sequence, 4] = graphq.quantize(%5, @query_scale, None, None, 'int8', [-1, 1, -1, -1])
%7: f32[batch, 2, sequence, 4] = graphq.dequantize(%6, @query_scale, None, None, 'int8', [-1, 1, -1, -1], f32)
%8: f32[batch, sequence, 4] = aten.linear(%x, @k.weight)
%9: f32[batch, sequence, 1, 4] = aten.view(%8, [%1, %2, -1, 4])
%10: f32[batch, 1, sequence, 4] = aten.transpose.int(%9, 1, 2)
%11: i8[batch, 1, sequence, 4] = graphq.quantize(%10, @key_scale, None, None, 'int8', [-1, -1, -1, -1])
%12: f32[batch, 1, sequence, 4] = graphq.dequantize(%11, @key_scale, None, None, 'int8', [-1, -1, -1, -1], f32)
%13: f32[batch, sequence, 4] = aten.linear(%x, @v.weight)
%14: f32[batch, sequence, 1, 4] = aten.view(%13, [%1, %2, -1, 4])
%15: f32[batch, 1, sequence, 4] = aten.transpose.int(%14, 1, 2)
%16: (f32, i8) = graphq.choose_scale(%15, 'int8', [1, 1, 1, -1])
%17: f32[batch, 1, sequence, 1] = item(%16, 0)
%18: i8[batch, 1, sequence, 4] = graphq.quantize(%15, %17, None, None, 'int8', [1, 1, 1, -1])
%19: f32[batch, 1, sequence, 4] = graphq.dequantize(%18, %17, None, None, 'int8', [1, 1, 1, -1], f32)
%20: f32[batch, 1, 1, sequence, 4] = aten.unsqueeze(%12, 2)
%21: f32[batch, 1, 2, sequence, 4] = aten.expand(%20, [%1, 1, 2, %2, 4])
%22: f32[batch, 2, sequence, 4] = aten.reshape(%21, [%1, 2, %2, 4])
%23: f32[batch, 1, 1, sequence, 4] = aten.unsqueeze(%19, 2)
%24: f32[batch, 1, 2, sequence, 4] = aten.expand(%23, [%1, 1, 2, %2, 4])
%25: f32[batch, 2, sequence, 4] = aten.reshape(%24, [%1, 2, %2, 4])
%26: f32[batch, 2, sequence, 4] = aten.scaled_dot_product_attention(%7, %22, %25)
return [%26]
""",
    )
    q, k, v = heads(gm, X)
    q, k, v = rounded(q, (0, 2, 3)), rounded(k, (0, 1, 2, 3)), rounded(v, (3,))
    expected = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    assert torch.equal(run(gm, X), expected)
    assert_vals(gm, X)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize(("quant", "top"), [("int8/tensor", 127), ("uint8/tensor", 255), ("int8/token/dynamic", 0)])
def test_weights_of_the_softmax(quant: str, top: int, mask: bool) -> None:
    """Their range is known: a fixed scale needs no calibration."""
    gm = capture(Attends(mask), X)
    step = QuantizeAttention(operands(p=quant))
    assert list(step.observer_requests(gm)) == []
    assert Pipeline([step], strict=True).run(gm) == {"quantize-attention": 1}
    assert Pipeline([step], strict=True).run(gm) == {"quantize-attention": 0}
    q, k, v = heads(gm, X)
    scores = q / 2 @ k.repeat_interleave(2, 1).transpose(-2, -1)
    if mask:
        scores = scores.masked_fill(~torch.ones(3, 3, dtype=torch.bool).tril(), -torch.inf)
    p = scores.softmax(-1)
    p = rounded(p, (3,)) if not top else (p * top).round() / top
    # a sum in another order, and a probability beside a half step
    torch.testing.assert_close(run(gm, X), p @ v.repeat_interleave(2, 1), rtol=0, atol=1e-6)
    assert [name for name in gm.state_dict() if "probability_scale" in name] == ["probability_scale"] * bool(top)


def test_what_a_cache_gives_back_is_not_quantized_again() -> None:
    """Queries are; and keys where the cache is float."""
    both = {"q": "int8/head", "k": "int8/tensor", "v": "int8/tensor"}
    gm, cache = cached(), QuantizeCache(parse_quant("int8/tensor"))
    step = QuantizeAttention(operands(**both))
    Pipeline([Observe((cache, step)), Calibrate()]).run(gm, [(X, EMPTY, EMPTY)])
    assert Pipeline([cache, step]).run(gm) == {"quantize-cache": 2, "quantize-attention": 1}
    gm = cached()
    assert quantize(gm, X, EMPTY, EMPTY, **both) == 3
    assert [node.name for node in cast(Any, gm.graph.output_node().args[0])][1:] == [
        "cat",
        "cat_1",
    ]  # what is cached stays float


NEAR: dict[str, Callable[[], nn.Module]] = {
    "no attention": lambda: nn.Linear(8, 8),
    "drops at random": lambda: Attends(dropout_p=0.5),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses(name: str) -> None:
    gm = capture(NEAR[name](), X)
    assert quantize(gm, X, p="int8/tensor") == 0


def test_keys_of_one_head_each() -> None:
    gm = capture(Attends(repeats=False, enable_gqa=True), X)
    assert quantize(gm, X, k="int8/head", p="int8/tensor") == 2
    q, k, v = heads(gm, X)
    p = (q / 2 @ rounded(k, (0, 1, 2, 3)).repeat_interleave(2, 1).transpose(-2, -1)).softmax(-1)
    p = (p * 127).round() / 127
    torch.testing.assert_close(run(gm, X), p @ v.repeat_interleave(2, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("quants", "message"),
    [
        ({}, "none is quantized; write q, k, v or p"),
        (
            {"q": "int16/tensor"},
            "q: int16/tensor: a cache holds integers of up to 8 bits, or floats such as float8_e4m3fn",
        ),
        ({"p": "int8/channel"}, "p: int8/channel: its columns are tokens, no channels; write tensor, head or token"),
        (
            {"k": "int8/channel/dynamic"},
            "k: int8/channel/dynamic: a channel has one scale for all tokens, from calibration; leave out dynamic",
        ),
    ],
)
def test_what_cannot_be_written(quants: dict[str, str], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        operands(**quants)
    assert str(caught.value) == message
