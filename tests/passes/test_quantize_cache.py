"""Keys and values are quantized where they are put behind caches: once, by scales of their own, and nothing else is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx

from graphq.errors import PassError, SpecError
from graphq.ir.caches import Cache, caches
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.observers.block_ranges import BlockRangeObserver
from graphq.passes.calibrate import Calibrate
from graphq.passes.observe import Observe, observers
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.passes.quantize_cache import QuantizeCache
from graphq.spec.quant import parse_quant
from graphq.state import tensor_of
from tests.caches import EMPTY, PAIRS, CachedAttention, X, cached, reference
from tests.graphs import assert_vals, run


def quantize(gm: fx.GraphModule, quant: str, *batches: tuple[Tensor, ...]) -> int:
    """The number of changes; a second run finds nothing."""
    step = QuantizeCache(parse_quant(quant))
    batches = batches or ((X, EMPTY, EMPTY),)
    Pipeline([Observe((step,)), Calibrate()], strict=True).run(gm, batches)
    counts = Pipeline([step, QuantizeActivations()], strict=True).run(gm)
    assert Pipeline([Observe((step,)), step], strict=True).run(gm) == {"observe": 0, "quantize-cache": 0}
    return counts["quantize-cache"]


def narrow(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def test_golden_of_run_time() -> None:
    gm = cached()
    assert quantize(gm, "int8/token/dynamic") == 2
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, sequence, 8] = input
%key: f32[batch, 2, past_sequence, 4] = input
%value: f32[batch, 2, past_sequence, 4] = input
%3: f32[batch, sequence, 16] = aten.linear(%x, @q.weight)
%4: f32[batch, sequence, 4, 4] = aten.unflatten.int(%3, -1, [4, 4])
%5: f32[batch, 4, sequence, 4] = aten.transpose.int(%4, 1, 2)
%6: f32[batch, sequence, 8] = aten.linear(%x, @k.weight)
%7: f32[batch, sequence, 2, 4] = aten.unflatten.int(%6, -1, [2, 4])
%8: f32[batch, 2, sequence, 4] = aten.transpose.int(%7, 1, 2)
%9: f32[batch, sequence, 8] = aten.linear(%x, @v.weight)
%10: f32[batch, sequence, 2, 4] = aten.unflatten.int(%9, -1, [2, 4])
%11: f32[batch, 2, sequence, 4] = aten.transpose.int(%10, 1, 2)
%12: (f32, i8) = graphq.choose_scale(%8, 'int8', [1, 1, 1, -1])
%13: f32[batch, 2, sequence, 1] = item(%12, 0)
%14: bf16[batch, 2, sequence, 1] = aten.to.dtype(%13, bf16)
%15: i8[batch, 2, sequence, 4] = graphq.quantize(%8, %14, None, None, 'int8', [1, 1, 1, -1])
%16: f32[batch, 2, sequence, 4] = graphq.dequantize(%15, %14, None, None, 'int8', [1, 1, 1, -1], f32)
%17: f32[batch, 2, past_sequence + sequence, 4] = aten.cat([%key, %16], 2)
%18: (f32, i8) = graphq.choose_scale(%11, 'int8', [1, 1, 1, -1])
%19: f32[batch, 2, sequence, 1] = item(%18, 0)
%20: bf16[batch, 2, sequence, 1] = aten.to.dtype(%19, bf16)
%21: i8[batch, 2, sequence, 4] = graphq.quantize(%11, %20, None, None, 'int8', [1, 1, 1, -1])
%22: f32[batch, 2, sequence, 4] = graphq.dequantize(%21, %20, None, None, 'int8', [1, 1, 1, -1], f32)
%23: f32[batch, 2, past_sequence + sequence, 4] = aten.cat([%value, %22], 2)
%24: f32[batch, 4, past_sequence + sequence, 4] = aten.repeat_interleave.self_int(%17, 2, 1)
%25: f32[batch, 4, past_sequence + sequence, 4] = aten.repeat_interleave.self_int(%23, 2, 1)
%26: f32[batch, 4, sequence, 4] = aten.scaled_dot_product_attention(%5, %24, %25)
return [%26, %17, %23]
""",
    )

    def read(x: Tensor) -> Tensor:
        scale = narrow(x.abs().amax(-1, keepdim=True) / 127)
        return (x / scale).round().clamp(-128, 127) * scale

    assert torch.equal(run(gm, X, EMPTY, EMPTY), reference(gm, X, read))
    assert_vals(gm, X, torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 4))


def test_golden_of_calibration() -> None:
    gm = cached()
    assert quantize(gm, "int8/asym/head") == 2
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, sequence, 8] = input
%key: f32[batch, 2, past_sequence, 4] = input
%value: f32[batch, 2, past_sequence, 4] = input
%3: f32[batch, sequence, 16] = aten.linear(%x, @q.weight)
%4: f32[batch, sequence, 4, 4] = aten.unflatten.int(%3, -1, [4, 4])
%5: f32[batch, 4, sequence, 4] = aten.transpose.int(%4, 1, 2)
%6: f32[batch, sequence, 8] = aten.linear(%x, @k.weight)
%7: f32[batch, sequence, 2, 4] = aten.unflatten.int(%6, -1, [2, 4])
%8: f32[batch, 2, sequence, 4] = aten.transpose.int(%7, 1, 2)
%9: f32[batch, sequence, 8] = aten.linear(%x, @v.weight)
%10: f32[batch, sequence, 2, 4] = aten.unflatten.int(%9, -1, [2, 4])
%11: f32[batch, 2, sequence, 4] = aten.transpose.int(%10, 1, 2)
%12: i8[batch, 2, sequence, 4] = graphq.quantize(%8, @key_scale, @key_zero_point, None, 'int8/asym', [-1, 1, -1, -1])
%13: f32[batch, 2, sequence, 4] = graphq.dequantize(%12, @key_scale, @key_zero_point, None, 'int8/asym', [-1, 1, -1, -1], f32)
%14: f32[batch, 2, past_sequence + sequence, 4] = aten.cat([%key, %13], 2)
%15: i8[batch, 2, sequence, 4] = graphq.quantize(%11, @value_scale, @value_zero_point, None, 'int8/asym', [-1, 1, -1, -1])
%16: f32[batch, 2, sequence, 4] = graphq.dequantize(%15, @value_scale, @value_zero_point, None, 'int8/asym', [-1, 1, -1, -1], f32)
%17: f32[batch, 2, past_sequence + sequence, 4] = aten.cat([%value, %16], 2)
%18: f32[batch, 4, past_sequence + sequence, 4] = aten.repeat_interleave.self_int(%14, 2, 1)
%19: f32[batch, 4, past_sequence + sequence, 4] = aten.repeat_interleave.self_int(%17, 2, 1)
%20: f32[batch, 4, sequence, 4] = aten.scaled_dot_product_attention(%5, %18, %19)
return [%20, %14, %17]
""",
    )

    def read(x: Tensor) -> Tensor:
        low, high = x.amin((0, 2, 3), keepdim=True).clamp(max=0), x.amax((0, 2, 3), keepdim=True).clamp(min=0)
        scale = (high - low) / 255
        zero = (-128 - low / scale).round()
        return (((x / scale).round() + zero).clamp(-128, 127) - zero) * scale

    assert torch.equal(run(gm, X, EMPTY, EMPTY), reference(gm, X, read))
    assert_vals(gm, X, torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 4, 4))
    assert observers(gm) == []


@pytest.mark.parametrize(
    ("quant", "block", "axes"),
    [
        ("int8/tensor", [-1, -1, -1, -1], (0, 1, 2, 3)),
        ("int8/head", [-1, 1, -1, -1], (0, 2, 3)),
        ("int8/channel", [-1, 1, -1, 1], (0, 2)),
        ("int8/tensor/dynamic", [1, -1, 1, -1], (1, 3)),
        ("int8/head/dynamic", [1, 1, 1, -1], (3,)),
        ("int8/token/dynamic", [1, 1, 1, -1], (3,)),
        ("int4/tensor", [-1, -1, -1, -1], (0, 1, 2, 3)),
    ],
)
def test_each_granularity(quant: str, block: list[int], axes: tuple[int, ...]) -> None:
    """Whose scale is the largest magnitude along these axes; of run time each token has its own."""
    gm = cached()
    quantize(gm, quant)
    parsed = parse_quant(quant)
    top = 7 if quant.startswith("int4") else 127

    def read(x: Tensor) -> Tensor:
        scale = x.abs().amax(axes, keepdim=True) / top
        scale = narrow(scale) if parsed.dynamic else scale
        return (x / scale).round().clamp(-top - 1, top) * scale

    assert torch.equal(run(gm, X, EMPTY, EMPTY), reference(gm, X, read))
    blocks = {
        str(node.args[-1 if node.target == torch.ops.graphq.quantize.default else -2])
        for node in gm.graph.nodes
        if "quantize" in str(node.target)
    }
    assert blocks == {str(block)}


def test_what_tokens_become_does_not_depend_on_their_neighbours() -> None:
    """Neither scales of run time nor those of calibration: a prompt at once, or token by token."""
    for quant in ("int8/tensor/dynamic", "int8/asym/token/dynamic", "int4/g2/dynamic", "int8/channel"):
        gm = cached()
        quantize(gm, quant)
        gm.recompile()
        with torch.no_grad():
            _, keys, values = gm(X, EMPTY, EMPTY)
            past = (EMPTY, EMPTY)
            for i in range(3):
                _, *past = gm(X[:, i : i + 1], *past)
        assert torch.equal(past[0], keys)
        assert torch.equal(past[1], values)


def test_all_batches_have_a_part_in_fixed_scales() -> None:
    gm = cached()
    quantize(gm, "int8/head", (X, EMPTY, EMPTY), (3 * X, EMPTY, EMPTY), (2 * X, EMPTY, EMPTY))
    k = torch.nn.functional.linear(3 * X, tensor_of(gm, "k.weight")).unflatten(-1, (2, 4))
    assert torch.equal(tensor_of(gm, "key_scale").flatten(), k.abs().amax((0, 1, 3)) / 127)


APPENDED: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "replaced": (lambda past, new: new + past.sum(), "the model does more with it than to append to it"),
    "in front": (lambda past, new: torch.cat([new, past], 2), "the model does more with it than to append to it"),
    "twice": (lambda past, new: torch.cat([past, new, new], 2), "the model does more with it than to append to it"),
    "changed": (lambda past, new: torch.cat([past * 2, new], 2), "the model does more with it than to append to it"),
    "read": (
        lambda past, new: torch.cat([past, new + past.sum()], 2),
        "the model does more with it than to append to it",
    ),
}


@pytest.mark.parametrize("name", APPENDED)
def test_near_misses(name: str) -> None:
    appended, reason = APPENDED[name]
    gm = cached(CachedAttention(appended))
    assert [found for found in caches(gm) if isinstance(found, tuple)] == [("key", reason)]
    assert quantize(gm, "int8/token/dynamic") == 1  # the values
    assert "graphq.quantize" not in str([n.args for n in gm.graph.find_nodes(op="output", sort=False)])


def test_what_is_no_declared_pair_is_left_alone() -> None:
    gm = cached(None, PAIRS[0])
    assert quantize(gm, "int8/token/dynamic") == 1
    gm = cached(None, PAIRS[1])
    assert quantize(gm, "int8/head") == 1
    assert [name for name in gm.state_dict() if "scale" in name] == ["value_scale"]


def test_keys_and_values_are_told_by_what_reads_them() -> None:
    found = [one for one in caches(cached()) if isinstance(one, Cache)]
    assert [(one.role, one.token_axis, one.batch_axis, one.path) for one in found] == [
        ("key", 2, 0, ""),
        ("value", 2, 0, ""),
    ]


def test_without_data_there_is_no_scale() -> None:
    gm, step = cached(), QuantizeCache(parse_quant("int8/head"))
    with pytest.raises(SpecError, match="no batches"):
        Pipeline([Observe((step,)), Calibrate(), step]).run(gm, [])


def test_a_single_number_is_told() -> None:
    notes: list[str] = []
    gm, step = cached(), QuantizeCache(parse_quant("int8/tensor"), notes.append)
    Pipeline([Observe((step,)), Calibrate(), step]).run(gm, [(0 * X, EMPTY, EMPTY)])
    assert notes == [
        f": calibration saw only zeros in its {role}, from which no range of int8/tensor follows"
        for role in ("key", "value")
    ]


def test_nan_is_refused() -> None:
    for quant in ("int8/head", "int8/tensor"):
        gm, step = cached(), QuantizeCache(parse_quant(quant))
        with pytest.raises(SpecError, match="batch 0: the key of  holds NaN or Inf"):
            Pipeline([Observe((step,)), Calibrate()]).run(gm, [(X * torch.inf, EMPTY, EMPTY)])


def observer(constant: float | None = None) -> BlockRangeObserver:
    return BlockRangeObserver(parse_quant("int8/head"), ("a",), [-1, 1, -1, -1], [1, 2, 1, 1], constant)


@pytest.mark.parametrize("constant", [None, 0.25])
def test_halves_of_an_observer_are_the_whole(constant: float | None) -> None:
    batches = torch.randn(4, 3, 2, 5, 4, generator=torch.Generator().manual_seed(5)).unbind()
    whole, first, second = observer(constant), observer(constant), observer(constant)
    for i, batch in enumerate(batches):
        whole(batch)
        (first if i < 2 else second)(batch)
    first.merge(second)
    low, high = whole.extremes()
    if constant is None:
        assert torch.equal(high.flatten(), torch.stack(batches).amax((0, 1, 3, 4)))
    else:
        ends = [batch.amax((0, 2, 3)) for batch in batches]
        average = ends[0]
        for end in ends[1:]:
            average = average * 0.75 + end * 0.25
        torch.testing.assert_close(high.flatten(), average, rtol=1e-6, atol=0)
    torch.testing.assert_close(first.extremes(), (low, high), rtol=1e-6, atol=0)
    assert int(first.batches) == 4
    with pytest.raises(PassError, match="cannot be merged"):
        first.merge(observer(0.5))


def test_masked_tokens_have_no_part() -> None:
    seen, x = observer(), torch.tensor([[[[1.0], [50.0]], [[-2.0], [60.0]]]])
    seen(x, valid=torch.tensor([True, False]).view(1, 1, 2, 1).expand(1, 2, 2, 1))
    assert seen.scales().scale.flatten().tolist() == [
        torch.tensor(1.0).div(127).item(),
        torch.tensor(2.0).div(127).item(),
    ]
