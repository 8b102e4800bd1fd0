"""Fixed sizes: numbers and constants in the place of what is computed from sizes, and the same function."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

import graphq
from graphq.capture.source import source_of
from graphq.data.batches import complete
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.passes import fix_sizes
from graphq.passes.fix_sizes import FixSizes
from graphq.passes.quantize_weights import QuantizeWeights
from tests.graphs import annotated, assert_vals, run
from tests.models import MLP, capture, captured, random_inputs


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fix(gm: fx.GraphModule, **sizes: int) -> int:
    """The number of changes; a second run finds nothing."""
    counts = Pipeline([FixSizes(sizes)], strict=True).run(gm)
    assert Pipeline([FixSizes(sizes)], strict=True).run(gm) == {"fix-sizes": 0}
    return counts["fix-sizes"]


class Causal(nn.Module):
    """Rows that read the rows before them: positions, a mask and shapes follow from sizes."""

    ids: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)
        self.table = nn.Embedding(9, 4)
        self.register_buffer("ids", torch.arange(9)[None])

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        h = self.up(x) + self.table(self.ids[:, :length])
        places = torch.arange(length, device=x.device)
        mask = (places[None] <= places[:, None]).expand(batch, -1, -1)
        h = torch.where(mask, h.sum(-1, keepdim=True), 0.0) @ h
        return h.view(batch, length, 2, 2).flatten(2)


def test_golden() -> None:
    torch.manual_seed(0)
    gm = capture(Causal(), floats(2, 3, 4))
    x = floats(2, 6, 4)
    before = run(gm, x)
    assert fix(gm, batch=2, sequence=6) == 7
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[2, 6, 4] = input
%1: f32[2, 6, 4] = aten.linear(%x, @up.weight, @up.bias)
%2: f32[1, 6, 4] = aten.embedding(@table.weight, @constants.slice_1)
%3: f32[2, 6, 4] = aten.add.Tensor(%1, %2)
%4: f32[2, 6, 1] = aten.sum.dim_IntList(%3, [-1], True)
%5: f32[2, 6, 6] = aten.where.ScalarOther(@constants.expand, %4, 0.0)
%6: f32[2, 6, 4] = aten.matmul(%5, %3)
%7: f32[2, 6, 2, 2] = aten.view(%6, [2, 6, 2, 2])
%8: f32[2, 6, 4] = aten.flatten.using_ints(%7, 2)
return [%8]
""",
    )
    assert torch.equal(run(gm, x), before)
    assert_vals(gm, x)
    assert source_of(gm).ranges == (("batch", 2, 2), ("sequence", 6, 6))
    assert source_of(gm).inputs[0].shape == ("batch", "sequence", 4)  # calibration and masks go by names


def test_other_dimensions_stay_dynamic() -> None:
    torch.manual_seed(0)
    gm = capture(Causal(), floats(2, 3, 4))
    given = [floats(n, 6, 4) for n in (1, 5)]
    before = [run(gm, x) for x in given]
    assert fix(gm, sequence=6) > 0
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, 6, 4] = input
%1: int = aten.sym_size.int(%x, 0)
%2: f32[batch, 6, 4] = aten.linear(%x, @up.weight, @up.bias)
%3: f32[1, 6, 4] = aten.embedding(@table.weight, @constants.slice_1)
%4: f32[batch, 6, 4] = aten.add.Tensor(%2, %3)
%5: bool[batch, 6, 6] = aten.expand(@constants.le_1, [%1, -1, -1])
%6: f32[batch, 6, 1] = aten.sum.dim_IntList(%4, [-1], True)
%7: f32[batch, 6, 6] = aten.where.ScalarOther(%5, %6, 0.0)
%8: f32[batch, 6, 4] = aten.matmul(%7, %4)
%9: f32[batch, 6, 2, 2] = aten.view(%8, [%1, 6, 2, 2])
%10: f32[batch, 6, 4] = aten.flatten.using_ints(%9, 2)
return [%10]
""",
    )
    assert all(torch.equal(run(gm, x), y) for x, y in zip(given, before, strict=True))


def test_a_language_model_of_fixed_lengths() -> None:
    gm = captured("llama")
    ids = random_inputs(gm, batch=1, sequence=4)[0]
    given = {i.name: floats(1, 2, 3, 16, seed=n) for n, i in enumerate(source_of(gm).inputs) if i.is_cache}
    inputs = complete(source_of(gm), {"input_ids": ids, **given})
    before = [x.clone() for x in gm(*inputs)]
    fix(gm, batch=1, sequence=4, past_sequence=3)
    assert not [node for node in gm.graph.nodes if "sym_size" in str(node.target) or "arange" in str(node.target)]
    assert all(torch.equal(a, b) for a, b in zip(gm(*inputs), before, strict=True))


def test_an_empty_cache_is_no_input() -> None:
    gm = captured("llama")
    names = [i.name for i in source_of(gm).inputs]
    inputs = dict(zip(names, random_inputs(gm, batch=2, sequence=4), strict=True))
    inputs = {n: x[:, :, :0] if n.startswith("past") else x for n, x in inputs.items()}
    inputs["attention_mask"] = torch.ones(2, 4, dtype=torch.int64)
    before = [x.clone() for x in gm(*inputs.values())]
    fix(gm, sequence=4, past_sequence=0)
    source = source_of(gm)
    assert [i.name for i in source.inputs] == ["input_ids", "attention_mask", "position_ids"]
    assert (source.caches, source.outputs[1]) == ((), "present.0.key")
    assert source.ranges == (("batch", 1, 1 << 20), ("sequence", 4, 4))
    assert source.sizes(source.inputs[1].shape) == ("batch", 4)
    assert not [node for node in gm.graph.nodes if "cat" in str(node.target) and len(node.args[0]) < 2]
    given = [inputs[i.name] for i in source.inputs]
    assert all(torch.equal(a, b) for a, b in zip(gm(*given), before, strict=True))


class Each(nn.Module):
    def __init__(self, body: Callable[["Each", Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.weight = nn.Parameter(floats(4, 4))
        self.register_buffer("held", floats(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


def ops(gm: fx.GraphModule) -> list[str]:
    return [str(node.target).removeprefix("aten.") for node in gm.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (lambda m, x: x @ (m.held.t() * 2), ["matmul.default"]),
        (
            lambda m, x: x @ (m.weight.t() * 2),
            ["t.default", "mul.Tensor", "matmul.default"],
        ),  # artifacts hold the weight
        (lambda m, x: x + torch.rand(4), ["rand.default", "add.Tensor"]),
        (lambda m, x: x + torch.zeros(x.shape[0], 4), ["add.Tensor"]),
        (lambda m, x: x.expand(x.shape[0], 4).sum(1), ["sum.dim_IntList"]),
        (lambda m, x: x.expand(3, x.shape[0], 4).sum(1), ["expand.default", "sum.dim_IntList"]),
        (lambda m, x: x[torch.arange(x.shape[0])] * 2, ["mul.Tensor"]),
        (
            lambda m, x: x[torch.arange(x.shape[0])[:, None], torch.arange(4)[:, None, None]] * 2,
            ["index.Tensor", "mul.Tensor"],
        ),
        (
            lambda m, x: x[torch.arange(x.shape[0])[:, None, None], torch.arange(4)] * 2,
            ["reshape.default", "mul.Tensor"],
        ),
        (lambda m, x: x[torch.arange(x.shape[0]).flip(0)] * 2, ["index.Tensor", "mul.Tensor"]),
        (lambda m, x: x[:, torch.arange(2)] * 2, ["index.Tensor", "mul.Tensor"]),  # picks some
        (lambda m, x: torch.cat([x[:, 4:], x, x[:, :2]], 1), ["slice.Tensor", "cat.default"]),
    ],
)
def test_what_stays(body: Callable[[Each, Tensor], Tensor], left: list[str]) -> None:
    gm = capture(Each(body), floats(3, 4))
    x = floats(2, 4)
    before = run(gm, x)
    fix(gm, batch=2)
    assert ops(gm) == left
    if "rand.default" not in left:
        assert torch.allclose(run(gm, x), before, rtol=1e-6, atol=1e-6)  # a constant lies otherwise in memory


def test_large_constants_are_computed_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fix_sizes, "_LARGEST", 8)
    for size, left in ((2, ["add.Tensor"]), (3, ["zeros.default", "add.Tensor"])):
        gm = capture(Each(lambda m, x: x + torch.zeros(x.shape[0], 4)), floats(5, 4))
        fix(gm, batch=size)
        assert ops(gm) == left


def test_codes_and_scales_stay() -> None:
    torch.manual_seed(0)
    gm = annotated(capture(MLP(), floats(2, 8)), up="int8/channel", down="int4/g4")
    QuantizeWeights().run(gm)
    names, x = set(gm.state_dict()), floats(3, 8)
    before = run(gm, x)
    fix(gm, batch=3)
    assert set(gm.state_dict()) == names
    assert ops(gm).count("graphq.dequantize.default") == 2
    assert torch.equal(run(gm, x), before)


class Queries(nn.Module):
    """A learned token before the others, and zeros of the shape of what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(floats(1, 1, 4))
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(x.shape[0], -1, -1), self.up(x)], 1)
        return self.up(torch.zeros_like(h)) + h


def test_what_is_quantized_of_constants_is_codes() -> None:
    """With one size for the batch, an expanded parameter is itself, and what is made of a shape is a constant."""
    torch.manual_seed(0)
    x = floats(1, 3, 4)
    made = graphq.compile(Queries().eval(), profile="generic-int8", inputs=x, calibration=[x])
    gm = made.graph
    gm.recompile()
    before = run(gm, x)
    assert ops(gm).count("graphq.quantize.default") == 10
    fix(gm, batch=1, sequence=3)
    quantized = [node.args[0] for node in gm.graph.nodes if str(node.target) == "graphq.quantize.default"]
    assert len(quantized) == 9
    assert not [node for node in quantized if isinstance(node, fx.Node) and node.op == "get_attr"]
    assert torch.equal(run(gm, x), before)


def test_what_is_not_set_is_no_constant() -> None:
    gm = capture(Each(lambda m, x: torch.empty_like(x + 1)), floats(5, 4))
    fix(gm, batch=2)
    assert "empty_like.default" in ops(gm)


def test_nothing_to_fix() -> None:
    gm = capture(MLP(), floats(2, 8))
    text: Any = dump(gm)
    assert Pipeline([FixSizes({})], strict=True).run(gm) == {"fix-sizes": 0}
    assert dump(gm) == text
