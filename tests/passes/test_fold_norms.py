"""Gains and biases of norms are in the linears that read the norms, exactly, or stay where they are for a reason."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.passes.fold_norms import FoldNorms
from graphq.pipelines import canonical_passes
from graphq.runtime import ops
from graphq.state import tensor_of
from tests.decoder import RMS
from tests.graphs import assert_vals, run
from tests.lifted import assert_same_function, lifted
from tests.models import capture, captured, random_inputs, route

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def fold(gm: fx.GraphModule) -> tuple[int, list[str]]:
    """The number of changes, and the reasons for the norms left; a second run finds nothing."""
    notes: list[str] = []
    counts = Pipeline([FoldNorms(notes.append)], strict=True).run(gm)
    assert Pipeline([FoldNorms()], strict=True).run(gm) == {"fold-norms": 0}
    return counts["fold-norms"], [note.removeprefix("fold-norms: ") for note in notes]


def perturbed(family: str) -> fx.GraphModule:
    """The graph of a family, whose gains and biases are not the ones and zeros of a fresh model."""
    gm = captured(family)
    Pipeline(canonical_passes()).run(gm)
    generator = torch.Generator().manual_seed(1)
    for parameter in gm.parameters():
        scale = 0.5 if parameter.dim() == 1 else 0.05
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return gm


def test_golden() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(8, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return torch.cat([self.a(h), self.b(h.view(-1, 8))], -1)

    gm = capture(Normed().double(), torch.ones(2, 8).double())
    old = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    before = run(gm, X)
    assert fold(gm) == (1, [])
    assert_expected_inline(
        dump(gm),
        """\
%x: f64[batch, 8] = input
%1: f64[batch, 8] = aten.layer_norm(%x, [8], @norm.weight, @norm.bias, 1e-05, False)
%2: f64[batch, 4] = aten.linear(%1, @a.weight, @a.bias)
%3: f64[batch, 8] = aten.view(%1, [-1, 8])
%4: f64[batch, 6] = aten.linear(%3, @b.weight, @b.bias)
%5: f64[batch, 10] = aten.cat([%2, %4], -1)
return [%5]
""",
    )
    torch.testing.assert_close(run(gm, X), before, rtol=1e-12, atol=1e-12)  # the same sums, in another order
    assert_vals(gm, X)
    state = gm.state_dict()
    gain, shift = old["norm.weight"], old["norm.bias"]
    assert torch.equal(state["norm.weight"], torch.ones(8).double())
    assert torch.equal(state["norm.bias"], torch.zeros(8).double())
    assert torch.equal(state["a.weight"], old["a.weight"] * gain)
    torch.testing.assert_close(state["a.bias"], old["a.bias"] + old["a.weight"] @ shift, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(state["b.bias"], old["b.weight"] @ shift, rtol=1e-13, atol=1e-13)


# Norms folded, and how many are kept: those of queries and keys, of cached latents, and those behind a block.
@pytest.mark.parametrize(
    ("family", "count", "kept"),
    [
        ("llama", 5, 0),
        ("qwen3", 5, 4),
        ("gemma3", 5, 8),
        ("mixtral", 5, 0),
        ("deepseek", 7, 2),
        ("opt", 5, 0),
        ("gpt2", 5, 0),
        ("bert", 0, 5),
        ("vit", 5, 0),
    ],
)
def test_families(family: str, count: int, kept: int) -> None:
    before = perturbed(family)
    after = copy.deepcopy(before)
    folded, notes = fold(after)
    assert (folded, len(notes)) == (count, kept)
    assert_vals(after, *random_inputs(after))
    exact = lifted(before)
    fold(exact)
    assert_same_function(before, exact, random_inputs(before), 1e-12)


def test_gemmas_gain_becomes_zero() -> None:
    gm = perturbed("gemma3")
    fold(gm)
    assert not tensor_of(gm, "model.layers.0.input_layernorm.weight").any()
    assert tensor_of(gm, "model.layers.0.post_attention_layernorm.weight").any()


def test_reasons() -> None:
    assert fold(perturbed("gemma3"))[1][2] == (
        "model.layers.0.post_attention_layernorm: kept: model.layers.0: aten.add.Tensor reads it"
    )


def test_a_head_without_bias_gets_one() -> None:
    gm = perturbed("gpt2")
    fold(gm)
    assert tensor_of(gm, "lm_head.bias").shape == (128,)


def test_a_bias_of_zeros_gives_no_reader_a_bias() -> None:
    gm = capture(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8, bias=False)), X[:2].float())
    tensor_of(gm, "0.bias").data.zero_()
    assert fold(gm) == (1, [])
    assert sorted(gm.state_dict()) == ["0.bias", "0.weight", "1.weight"]


class Near(nn.Module):
    """A norm, and what ``use`` makes of it."""

    def __init__(self, use: Any, norm: Any) -> None:
        super().__init__()
        self.norm, self.use = norm, use
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.stack = nn.Parameter(torch.empty(4, 8, 8))
        self.row, self.single = nn.Parameter(torch.empty(1, 8)), nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor) -> Any:
        return self.use(self, self.norm(x), x)


def one(m: Any, h: Tensor, _: Tensor) -> Any:
    return m.a(h)


def experts(m: Any, h: Tensor, x: Tensor) -> Any:
    return ops.grouped_linear(h, m.stack, route(x[:, :4])[1])


def returned(m: Any, h: Tensor, _: Tensor) -> Any:
    return m.a(h), h


def added(m: Any, h: Tensor, x: Tensor) -> Any:
    return m.a(h) + h


def activated(m: Any, h: Tensor, _: Tensor) -> Any:
    return m.a(F.relu(h))


def in_heads(m: Any, h: Tensor, _: Tensor) -> Any:
    return m.a(h.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8))


def weight_read_twice(m: Any, h: Tensor, x: Tensor) -> Any:
    return m.a(h) + F.linear(x, m.a.weight)


def weight_computed(m: Any, h: Tensor, _: Tensor) -> Any:
    return F.linear(h, m.a.weight * 2)


def bias_read_twice(m: Any, h: Tensor, x: Tensor) -> Any:
    return m.a(h) + m.a.bias


def gain_read_twice(m: Any, h: Tensor, _: Tensor) -> Any:
    return m.a(h) + m.norm.weight


def same_layer_twice(m: Any, h: Tensor, _: Tensor) -> Any:
    return m.a(h) + m.a(h.view(-1, 8))


def of_itself(m: Any, h: Tensor, _: Tensor) -> Any:
    return F.linear(h, h)


def merged(m: Any, h: Tensor, _: Tensor) -> Any:
    return F.linear(h.unsqueeze(1).expand(-1, 2, 8).reshape(-1, 16), m.stack[0].repeat(1, 2))


def name_taken(m: Any, h: Tensor, x: Tensor) -> Any:
    return F.linear(h, m.a.weight) + x * m.a.bias


def gain_of_two(m: Any, h: Tensor, x: Tensor) -> Any:
    gain = 1 + m.a.bias
    return m.b(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)) * gain) + x * gain


def bias_of_rows(m: Any, h: Tensor, _: Tensor) -> Any:
    return torch.addmm(m.row, h, m.a.weight)


def bias_of_one_number(m: Any, h: Tensor, _: Tensor) -> Any:
    return torch.addmm(m.single, h, m.a.weight)


def gain_as_bias(m: Any, h: Tensor, _: Tensor) -> Any:
    return F.linear(h, m.a.weight, m.norm.weight)


def one_vector(m: Any, h: Tensor, x: Tensor) -> Any:
    return m.b(F.layer_norm(x, [8], m.a.bias, m.a.bias))


def layer_norm() -> nn.Module:
    return nn.LayerNorm(8)


@pytest.mark.parametrize(
    ("norm", "use", "count"),
    [
        (lambda: RMS(8), one, 1),
        (lambda: RMS(8, 1.0), one, 1),
        (lambda: nn.RMSNorm(8), one, 1),
        (layer_norm, one, 1),
        (lambda: nn.LayerNorm(8, bias=False), one, 1),
        (lambda: RMS(8), experts, 1),
        (lambda: nn.LayerNorm(8, bias=False), experts, 1),
        (lambda: nn.LayerNorm(8, elementwise_affine=False), one, 0),  # nothing to fold
    ],
)
def test_norms(norm: Any, use: Any, count: int) -> None:
    gm = capture(Near(use, norm()).double(), X[:2])
    before = run(gm, X)
    assert fold(gm) == (count, [])
    torch.testing.assert_close(run(gm, X), before, rtol=1e-12, atol=1e-12)  # the same sums, in another order
    assert_vals(gm, X)


@pytest.mark.parametrize(
    ("norm", "use", "reason"),
    [
        (lambda: RMS(8), returned, "output: output reads it"),
        (lambda: RMS(8), added, "add_1: aten.add.Tensor reads it"),
        (lambda: RMS(8), activated, "relu: aten.relu.default reads it"),
        (lambda: RMS(8), in_heads, "view: aten.view.default reads it"),
        (lambda: RMS(8), weight_read_twice, "a.weight: a reads it, too"),
        (lambda: RMS(8), same_layer_twice, "a.weight: it is read several times"),
        (lambda: RMS(8), of_itself, "linear: aten.linear.default reads it"),
        (lambda: RMS(8), merged, "reshape: aten.reshape.default reads it"),
        (layer_norm, name_taken, "a.bias: the model has a tensor of this name"),
        (nn.Identity, gain_of_two, "its gain is computed"),
        (lambda: RMS(8), weight_computed, "linear: its weight is computed"),
        (layer_norm, bias_read_twice, "a.bias: add reads it, too"),
        (layer_norm, gain_read_twice, "norm.weight: add reads it, too"),
        (lambda: RMS(8, 1.0), gain_read_twice, "norm.weight: add_2 reads it, too"),
        (layer_norm, bias_of_rows, "a: its bias is computed"),
        (layer_norm, bias_of_one_number, "a: its bias is computed"),
        (lambda: RMS(8), gain_as_bias, "norm.weight: a reads it, too"),
        (nn.Identity, one_vector, "its gain is its bias, too"),
        (layer_norm, experts, "stack: experts take no bias"),
    ],
)
def test_near_misses(norm: Any, use: Any, reason: str) -> None:
    gm = capture(Near(use, norm()), X[:2].float())
    before = dict(gm.state_dict())
    count, notes = fold(gm)
    assert count == 0
    assert len(notes) == 1
    assert notes[0].partition(": kept: ")[2].endswith(reason), notes
    assert all(torch.equal(tensor, before[name]) for name, tensor in gm.state_dict().items())


def test_a_norm_of_two_axes_keeps_its_gain() -> None:
    gm = capture(nn.Sequential(nn.LayerNorm([5, 8]), nn.Linear(8, 5)), torch.ones(2, 5, 8))  # weights as the gain: 5, 8
    assert fold(gm) == (0, ["0: kept: its gain is not one number for each channel"])


def test_a_gain_without_a_norm_is_none() -> None:
    gm = capture(Near(lambda m, h, x: m.a(h * m.b.bias), nn.Identity()), X[:2].float())
    assert fold(gm) == (0, [])
