"""Experts' products are ``grouped_linear``, from whichever op they were traced as."""

import importlib
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.ir import edit
from graphq.ir.layers import TURNED, layers
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.ir.views import ops_of, view
from graphq.passes.raise_grouped_linear import RaiseGroupedLinear
from graphq.state import tensor_of
from tests.graphs import assert_vals, run, targets
from tests.models import capture, captured, random_inputs, route

aten = torch.ops.aten
X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def raise_grouped(gm: fx.GraphModule) -> int:
    """The number of changes; a second run finds nothing."""
    counts = Pipeline([RaiseGroupedLinear()], strict=True).run(gm)
    assert Pipeline([RaiseGroupedLinear()], strict=True).run(gm) == {"raise-grouped-linear": 0}
    return counts["raise-grouped-linear"]


class Grouped(nn.Module):
    """Rows by 4 experts, by ``product(x, weight, offsets)``; with ``shape`` [4, 16, 16] any dims can be swapped."""

    def __init__(self, product: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.empty(4, 16, 16, dtype=dtype))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        _, offsets = route(x[:, :4])
        return self.product(x, self.proj, offsets)


def fallback(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    importlib.import_module("transformers.integrations.moe")  # defines the op
    return torch.ops.transformers.grouped_mm_fallback(x, w, offsets)


def expected(gm: fx.GraphModule, x: Tensor, weight: Tensor) -> Tensor:
    """Each row by its expert's ``weight[e, K, N]``, one by one."""
    chosen = x[:, :4].argmax(-1).sort().values
    return torch.stack([row @ weight[e] for row, e in zip(x, chosen, strict=True)])


def test_golden() -> None:
    gm = capture(Grouped(lambda x, w, o: fallback(x, w.transpose(-2, -1), o)), torch.ones(2, 16))
    before = run(gm, X)
    assert raise_grouped(gm) == 1
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, 16] = input
%1: f32[batch, 4] = aten.slice.Tensor(%x, 1, 0, 4)
%2: i64[batch] = aten.argmax(%1, -1)
%3: (i64, i64) = aten.sort(%2)
%4: i64[batch] = item(%3, 0)
%5: i64[batch, 1] = aten.unsqueeze(%4, -1)
%6: i64[4] = aten.arange(4, device=cpu, pin_memory=False)
%7: bool[batch, 4] = aten.eq.Tensor(%5, %6)
%8: i64[4] = aten.sum.dim_IntList(%7, [0])
%9: i32[4] = aten.cumsum(%8, 0, dtype=i32)
%10: f32[batch, 16] = graphq.grouped_linear(%x, @proj, %9)
return [%10]
""",
    )
    assert torch.equal(run(gm, X), before)  # float32: the same products in the same order
    torch.testing.assert_close(before, expected(gm, X, tensor_of(gm, "proj").transpose(1, 2)), rtol=1e-5, atol=1e-5)
    assert_vals(gm, X)
    assert list(layers(gm)) == ["0.proj", "1.proj", "2.proj", "3.proj"]


def test_bfloat16() -> None:
    model = Grouped(lambda x, w, o: aten._grouped_mm(x, w.transpose(-2, -1), o), torch.bfloat16)
    gm = capture(model, torch.ones(2, 16, dtype=torch.bfloat16))
    assert "aten._grouped_mm" in targets(gm)
    assert raise_grouped(gm) == 1
    assert "aten._grouped_mm" not in targets(gm)
    assert "aten.transpose.int" not in targets(gm)
    y = run(gm, X.bfloat16())
    assert y.dtype == torch.bfloat16
    reference = expected(gm, X.bfloat16().float(), tensor_of(gm, "proj").transpose(1, 2).float())
    torch.testing.assert_close(y.float(), reference, rtol=2**-8, atol=2**-8)  # one rounding to bfloat16
    assert_vals(gm, X.bfloat16())


@pytest.mark.parametrize("dims", [(1, 2), (2, 1), (-1, -2), (1, -1), (-2, 2)])
def test_every_spelling_of_the_last_two_dimensions(dims: tuple[int, int]) -> None:
    gm = capture(Grouped(lambda x, w, o: fallback(x, w.transpose(1, 2), o)), torch.ones(2, 16))
    transpose = next(n for n in gm.graph.nodes if n.target is aten.transpose.int)
    transpose.args = (transpose.args[0], *dims)
    assert raise_grouped(gm) == 1
    assert "aten.transpose.int" not in targets(gm)


@pytest.mark.parametrize("view", [lambda w: w.mT, lambda w: w.permute(0, 2, 1), lambda w: w.permute(0, -1, -2)])
def test_other_views_with_the_last_two_dimensions_swapped(view: Any) -> None:
    gm = capture(Grouped(lambda x, w, o: fallback(x, view(w), o)), torch.ones(2, 16))
    before = run(gm, X)
    assert raise_grouped(gm) == 1
    assert list(layers(gm)) == ["0.proj", "1.proj", "2.proj", "3.proj"]
    assert torch.equal(run(gm, X), before)


@pytest.mark.parametrize(
    ("product", "weight"),
    [
        (lambda x, w, o: fallback(x, w.permute(0, 1, 2), o), lambda w: w),
        (lambda x, w, o: fallback(x, w.flip(0).transpose(1, 2), o), lambda w: w.flip(0).transpose(1, 2)),
        (lambda x, w, o: fallback(x, (w * 2).transpose(1, 2), o), lambda w: (w * 2).transpose(1, 2)),
    ],
    ids=["not permuted", "flipped", "scaled"],
)
def test_other_weights_are_transposed_back(product: Any, weight: Any) -> None:
    """The op is raised all the same, but by no parameter of its own: there is no layer to quantize."""
    gm = capture(Grouped(product), torch.ones(2, 16))
    before = run(gm, X)
    assert raise_grouped(gm) == 1
    assert "graphq.grouped_linear" in targets(gm)
    assert not layers(gm)
    torch.testing.assert_close(run(gm, X), before, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(before, expected(gm, X, weight(tensor_of(gm, "proj"))), rtol=1e-5, atol=1e-5)
    assert_vals(gm, X)


class Stored(nn.Module):
    """Experts stored ``[E, K, N]``, as gpt-oss has them; ``product`` reads them."""

    def __init__(self, product: Any) -> None:
        super().__init__()
        self.proj = nn.Parameter(torch.empty(4, 16, 8))
        self.product = product

    def forward(self, x: Tensor) -> Any:
        return self.product(x, self.proj, route(x[:, :4])[1])


@pytest.mark.parametrize(
    ("product", "count"),
    [(lambda x, w, o: fallback(x, w, o), 1), (lambda x, w, o: (fallback(x, w, o), fallback(x * 2, w, o)), 2)],
    ids=["once", "twice"],
)
def test_experts_stored_with_inputs_first_are_held_with_outputs_first(product: Any, count: int) -> None:
    """A view of the same numbers, once for all products, which are layers then; the graph says that it is turned."""
    gm = capture(Stored(product), torch.ones(2, 16))
    before, own = run(gm, X), tensor_of(gm, "proj")
    assert raise_grouped(gm) == count
    held = tensor_of(gm, "proj")
    assert (held.shape, held.data_ptr()) == ((4, 8, 16), own.data_ptr())
    assert torch.equal(held.transpose(1, 2), own)
    assert "aten.transpose.int" not in targets(gm)
    assert {name: layer.shape for name, layer in layers(gm).items()} == {f"{i}.proj": (8, 16) for i in range(4)}
    assert gm.meta[TURNED] == {"proj"}
    torch.testing.assert_close(run(gm, X), before, rtol=1e-6, atol=1e-6)
    assert_vals(gm, X)


def test_experts_that_are_read_otherwise_too_stay_as_they_are_stored() -> None:
    gm = capture(Stored(lambda x, w, o: fallback(x, w, o) + w.sum()), torch.ones(2, 16))
    before = run(gm, X)
    assert raise_grouped(gm) == 1
    assert not layers(gm)
    assert (tensor_of(gm, "proj").shape, TURNED in gm.meta) == ((4, 16, 8), False)
    torch.testing.assert_close(run(gm, X), before, rtol=1e-6, atol=1e-6)


def test_other_dimensions_are_another_transpose() -> None:
    """``proj[4, 16, 16]`` as 16 experts of 4 inputs each."""
    gm = capture(Grouped(lambda x, w, _: fallback(x[:, :4], w.transpose(0, 1), route(x)[1])), torch.ones(2, 16))
    before = run(gm, X)
    assert raise_grouped(gm) == 1
    assert not layers(gm)
    torch.testing.assert_close(run(gm, X), before, rtol=1e-6, atol=1e-6)
    assert_vals(gm, X)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w, o: aten._grouped_mm(x.unsqueeze(0).expand(4, -1, 16), w.transpose(-2, -1)),
        lambda x, w, o: aten._grouped_mm(x.t(), x, o),
    ],
    ids=["batches of rows", "groups of columns"],
)
def test_other_forms_stay(product: Any) -> None:
    gm = capture(Grouped(product, torch.bfloat16), torch.ones(2, 16, dtype=torch.bfloat16))
    assert "aten._grouped_mm" in targets(gm)
    assert raise_grouped(gm) == 0


@pytest.mark.parametrize(
    ("extra", "count"),
    [
        ({}, 1),
        ({"out_dtype": torch.bfloat16}, 1),
        ({"out_dtype": torch.float32}, 0),
        ({"bias": True}, 0),
    ],
)
def test_a_bias_or_another_dtype_stays(extra: dict[str, Any], count: int) -> None:
    model = Grouped(lambda x, w, o: aten._grouped_mm(x, w.transpose(-2, -1), o), torch.bfloat16)
    gm = capture(model, torch.ones(2, 16, dtype=torch.bfloat16))
    product = next(op for op in ops_of(gm) if op.node.target is aten._grouped_mm.default)
    x, weight, offsets = product.node.args
    if "bias" in extra:
        bias = edit.add_tensor(gm, product, "bias", torch.ones(4, 16, dtype=torch.bfloat16), by="t")
        extra = {"bias": bias.node}
    product.node.args = (x, weight)
    product.node.kwargs = {"offs": offsets, **extra}
    assert RaiseGroupedLinear().run(gm) == count
    assert ("graphq.grouped_linear" in targets(gm)) == bool(count)


def test_no_offsets() -> None:
    gm = capture(Grouped(lambda x, w, o: fallback(x, w.transpose(1, 2), o)), torch.ones(2, 16))
    op = next(view(n) for n in gm.graph.nodes if "grouped_mm" in str(n.target))
    op.node.target = aten._grouped_mm.default
    op.node.args = (*op.node.args[:2], None, op.node.args[2])  # a bias in the place of offsets
    assert RaiseGroupedLinear().run(gm) == 0


def test_mixtral() -> None:
    gm = captured("mixtral")
    inputs = random_inputs(gm)
    before = run(gm, *inputs)
    assert raise_grouped(gm) == 4  # two blocks, two products each
    assert torch.equal(run(gm, *inputs), before)
    assert not [name for name in targets(gm) if "grouped_mm" in name]
