"""Products of an activation and a stored matrix are linears, in whichever way they are written."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.ir.layers import layers
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.passes.raise_linear import RaiseLinear
from graphq.state import tensor_of
from tests.graphs import assert_vals, run, targets, without_data
from tests.models import Blocks, capture

Call = Callable[[Any, Tensor], Any]
tensordot: Any = torch.tensordot  # whose ``dims`` may be lists
ROWS = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
EXAMPLE = torch.ones(2, 5, 8, dtype=torch.float64)


class Written(nn.Module):
    """What ``call`` makes of its input with parameters ``w`` and ``b``."""

    def __init__(self, call: Call, w: tuple[int, ...] = (6, 8), b: tuple[int, ...] = (6,)) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.empty(w)), nn.Parameter(torch.empty(b))
        self.norm = nn.LayerNorm(8)
        self.register_buffer("held", torch.arange(48.0).reshape(6, 8) / 48)
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def raised(gm: fx.GraphModule) -> int:
    """The number of changes; a second run finds nothing."""
    counts = Pipeline([RaiseLinear()], strict=True).run(gm)
    assert Pipeline([RaiseLinear()], strict=True).run(gm) == {"raise-linear": 0}
    return counts["raise-linear"]


def written(call: Call, w: tuple[int, ...] = (6, 8), b: tuple[int, ...] = (6,), x: Tensor = EXAMPLE) -> fx.GraphModule:
    return capture(Written(call, w, b).double(), x)


def check(call: Call, w: tuple[int, ...] = (6, 8), b: tuple[int, ...] = (6,), x: Tensor = ROWS) -> fx.GraphModule:
    """The graph of ``call`` raised, which computes what it did, in float64, by one layer ``w`` of 6 outputs."""
    gm = written(call, w, b, x)
    before = run(gm, x)
    assert raised(gm) == 1
    assert_vals(gm, x)
    torch.testing.assert_close(run(gm, x), before, rtol=1e-12, atol=1e-12)
    found = layers(gm)["w"]
    assert (found.kind, found.shape) == ("linear", (6, 8))
    assert isinstance(tensor_of(gm, "w"), nn.Parameter)
    return gm


# -- text --------------------------------------------------------------------------------------------------------------


def test_golden() -> None:
    def falcon(m: Any, x: Tensor) -> Tensor:
        return F.gelu(x @ m.w.T + m.b)

    gm = written(falcon)
    assert_expected_inline(
        dump(gm),
        """\
%x: f64[batch, sequence, 8] = input
%1: f64[8, 6] = aten.numpy_T(@w)
%2: f64[batch, sequence, 6] = aten.matmul(%x, %1)
%3: f64[batch, sequence, 6] = aten.add.Tensor(%2, @b)
%4: f64[batch, sequence, 6] = aten.gelu(%3)
return [%4]
""",
    )
    assert raised(gm) == 1
    assert_expected_inline(
        dump(gm),
        """\
%x: f64[batch, sequence, 8] = input
%1: f64[batch, sequence, 6] = aten.linear(%x, @w, @b)
%2: f64[batch, sequence, 6] = aten.gelu(%1)
return [%2]
""",
    )


def test_factors_stand_behind_the_linear() -> None:
    gm = check(lambda m, x: torch.addmm(m.b, x.flatten(0, 1), m.w, beta=0.5, alpha=2), (8, 6))
    assert_expected_inline(
        dump(gm),
        """\
%x: f64[batch, sequence, 8] = input
%1: f64[sequence*batch, 8] = aten.flatten.using_ints(%x, 0, 1)
%2: f64[sequence*batch, 6] = aten.linear(%1, @w)
%3: f64[sequence*batch, 6] = aten.mul.Tensor(%2, 2)
%4: f64[6] = aten.mul.Tensor(@b, 0.5)
%5: f64[sequence*batch, 6] = aten.add.Tensor(%3, %4)
return [%5]
""",
    )


# -- forms -------------------------------------------------------------------------------------------------------------

TRANSPOSED: dict[str, Callable[[Tensor], Tensor]] = {
    "T": lambda w: w.T,
    "t": lambda w: w.t(),
    "mT": lambda w: w.mT,
    "H": lambda w: w.H,
    "mH": lambda w: w.mH,
    "adjoint": lambda w: w.adjoint(),
    "transpose": lambda w: w.transpose(-1, -2),
    "swapaxes": lambda w: w.swapaxes(0, 1),
    "permute": lambda w: w.permute(1, 0),
    "movedim": lambda w: w.movedim(0, -1),
    "copied": lambda w: w.t().contiguous(),
    "cast": lambda w: w.float().t().double(),
    "three times": lambda w: w.t().contiguous().t().clone().mT,
}


@pytest.mark.parametrize("way", TRANSPOSED)
def test_transposes(way: str) -> None:
    gm = check(lambda m, x: x @ TRANSPOSED[way](m.w))
    assert [t for t in targets(gm) if t != "aten._to_copy"] == ["aten.linear"]
    assert targets(gm).count("aten._to_copy") == (2 if way == "cast" else 0)


PRODUCTS: dict[str, tuple[Call, tuple[int, ...], list[str]]] = {
    "matmul": (lambda m, x: torch.matmul(x, m.w.t()), (6, 8), []),
    "columns": (lambda m, x: x @ m.w, (8, 6), []),
    "mm": (lambda m, x: x[0].mm(m.w), (8, 6), ["aten.select.int"]),
    "linear of columns": (lambda m, x: F.linear(x, m.w.T, m.b), (8, 6), []),
    "einsum": (lambda m, x: torch.einsum("...k,nk->...n", x, m.w), (6, 8), []),
    "einsum of columns": (lambda m, x: torch.einsum("b t k, k n -> b t n", x, m.w), (8, 6), []),
    "einsum the other way round": (lambda m, x: torch.einsum("oi,bti->bto", m.w, x), (6, 8), []),
    "bmm": (lambda m, x: x.bmm(m.w.t().unsqueeze(0).expand(x.shape[0], -1, -1)), (6, 8), []),
    "repeated once": (lambda m, x: x @ m.w.t().unsqueeze(0), (6, 8), []),
    "tensordot": (lambda m, x: tensordot(x, m.w, ([-1], [1])), (6, 8), []),
    "tensordot of columns": (lambda m, x: torch.tensordot(x, m.w, dims=1), (8, 6), []),
    "inner": (lambda m, x: torch.inner(x, m.w), (6, 8), []),
    "addmm": (lambda m, x: torch.addmm(m.b, x[0], m.w.t()), (6, 8), ["aten.select.int"]),
    "a view between": (lambda m, x: (x.unsqueeze(-2) @ m.w.T).squeeze(-2), (6, 8), ["aten.unsqueeze", "aten.squeeze.dim"]),
}  # fmt: skip


@pytest.mark.parametrize("form", PRODUCTS)
def test_products(form: str) -> None:
    call, w, rest = PRODUCTS[form]
    gm = check(call, w)
    assert sorted(targets(gm)) == sorted(["aten.linear", *rest])
    linear = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.linear.default)
    assert len(linear.args) == (3 if "b" in dict(gm.named_parameters()) else 2)


ADDED: dict[str, tuple[Call, bool]] = {
    "added": (lambda m, x: x @ m.w.T + m.b, True),
    "from the left": (lambda m, x: m.b + x @ m.w.T, True),
    "in place": (lambda m, x: (x @ m.w.T).add_(m.b), True),
    "by addmm": (lambda m, x: torch.addmm(m.b, x[0], m.w.t(), beta=1.0), True),
    "scaled": (lambda m, x: torch.add(x @ m.w.T, m.b, alpha=2), False),
    "computed": (lambda m, x: x @ m.w.T + m.b * 2, False),
    "subtracted": (lambda m, x: x @ m.w.T - m.b, False),
    "twice itself": (lambda m, x: (y := x @ m.w.T) + y + m.b, False),
    "a product read twice": (lambda m, x: (y := x @ m.w.T) + m.b + y.sum(), False),
    "another dtype": (lambda m, x: x.float() @ m.w.T.float() + m.b, False),
    "a number": (lambda m, x: x @ m.w.T + 2.0, False),
}


@pytest.mark.parametrize("way", ADDED)
def test_what_is_added(way: str) -> None:
    call, is_bias = ADDED[way]
    gm = check(call)
    linear = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.linear.default)
    assert [str(node.target) for node in linear.args[2:]] == (["b"] if is_bias else [])
    assert any("add" in t or "sub" in t for t in targets(gm)) != is_bias


@pytest.mark.parametrize("shape", [(1,), (1, 6), (3, 6)])
def test_what_is_added_in_another_shape_is_no_bias(shape: tuple[int, ...]) -> None:
    assert targets(check(lambda m, x: x @ m.w.T + m.b, b=shape)) == ["aten.linear", "aten.add.Tensor"]
    flat = check(lambda m, x: torch.addmm(m.b, x[0], m.w.t()), b=shape)
    assert targets(flat) == ["aten.select.int", "aten.linear", "aten.add.Tensor"]


FACTORS = [(0.5, 2), (1, 0.25), (3, 1), (0, 1), (0, 2.0)]


@pytest.mark.parametrize(("beta", "alpha"), FACTORS)
@pytest.mark.parametrize("shape", [(6,), (1, 6)])
@pytest.mark.parametrize("turned", [False, True])
def test_factors(beta: float, alpha: float, shape: tuple[int, ...], turned: bool) -> None:
    """``beta * b + alpha * (x @ w)``, by a matrix stored either way."""

    def scaled(m: Any, x: Tensor) -> Tensor:
        return torch.addmm(m.b, x[0], m.w if turned else m.w.t(), beta=beta, alpha=alpha)

    gm = check(scaled, (8, 6) if turned else (6, 8), shape)
    assert targets(gm).count("aten.mul.Tensor") == (alpha != 1) + (beta not in (0, 1))
    assert targets(gm).count("aten.add.Tensor") == (beta != 0)


@pytest.mark.parametrize(("beta", "alpha"), FACTORS)
def test_factors_of_a_batch(beta: float, alpha: float) -> None:
    def scaled(m: Any, x: Tensor) -> Tensor:
        return torch.baddbmm(m.b, x, m.w.expand(x.shape[0], -1, -1), beta=beta, alpha=alpha)

    check(scaled, (8, 6))


def test_a_bias_times_nothing_may_hold_anything() -> None:
    gm = written(lambda m, x: torch.addmm(m.b * float("inf"), x[0], m.w.t(), beta=0))
    assert raised(gm) == 1
    assert run(gm, ROWS).isfinite().all()


# -- parameters --------------------------------------------------------------------------------------------------------


def test_columns_are_turned_without_a_copy_and_once() -> None:
    gm = written(lambda m, x: (x @ m.w).sum(-1, keepdim=True) + (x * 2) @ m.w, (8, 6))
    stored = tensor_of(gm, "w").detach()
    before = run(gm, ROWS)
    assert raised(gm) == 2
    assert torch.equal(tensor_of(gm, "w"), stored.t())
    assert tensor_of(gm, "w").data_ptr() == stored.data_ptr()
    torch.testing.assert_close(run(gm, ROWS), before, rtol=1e-12, atol=1e-12)


def test_the_callers_model_is_left_alone() -> None:
    model = Written(lambda m, x: x @ m.w, (8, 6)).double()
    assert raised(capture(model, EXAMPLE)) == 1
    assert model.w.shape == (8, 6)


def test_rows_with_other_readers_are_raised_and_those_are_kept() -> None:
    gm = written(lambda m, x: x @ m.w.T + m.w.T.sum() + m.w.mean())
    before = run(gm, ROWS)
    assert raised(gm) == 1
    torch.testing.assert_close(run(gm, ROWS), before, rtol=1e-12, atol=1e-12)


def test_without_weights_the_graph_is_the_same() -> None:
    real = written(lambda m, x: torch.addmm(m.b, x[0], m.w, beta=2) @ m.held, (8, 6))
    fake = without_data(copy.deepcopy(real))
    assert raised(fake) == raised(real) == 1
    assert dump(fake) == dump(real)


class Disguised(nn.Module):
    """A linear as Falcon writes it, or by columns whose bias comes first."""

    def __init__(self, linear: nn.Linear, turned: bool) -> None:
        super().__init__()
        w = linear.weight.detach()
        self.weight = nn.Parameter(w.t().contiguous() if turned else w.clone())
        self.bias = nn.Parameter(linear.bias.detach().clone())
        self.turned = turned

    def forward(self, x: Tensor) -> Tensor:
        return self.bias + x @ self.weight if self.turned else x @ self.weight.T + self.bias


@pytest.mark.parametrize("algorithms", [[], ["rotate", "smooth-quant", "gptq", "correct-bias"]])
def test_a_disguised_model_is_compiled_to_the_same_codes(algorithms: list[str]) -> None:
    import graphq

    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(2))
    models = []
    for turned in (None, False, True):
        torch.manual_seed(0)
        model = Blocks()
        for block in model.blocks if turned is not None else ():
            for name in ("up", "down"):
                setattr(block, name, Disguised(getattr(block, name), bool(turned)))
        models.append(model.eval())
    spec = {"graphq": 1, "weight": "int8/channel", "input": "int8/token/dynamic", "algorithms": algorithms}
    plain, *others = (graphq.compile(model, spec, inputs=x, calibration=[x]).graph.state_dict() for model in models)
    for other in others:
        assert other.keys() == plain.keys()
        for name, tensor in plain.items():
            if tensor.dtype == torch.int8:
                assert torch.equal(other[name], tensor), name
            else:
                torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)  # other orders of sums


class Chained(nn.Module):
    """Products of products with biases, which are raised into additions that others were found to read."""

    def __init__(self, call: Callable[[Tensor, nn.Parameter, nn.Parameter, nn.Parameter], Tensor]) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.empty(8, 8)), nn.Parameter(torch.empty(8, 8))
        self.b = nn.Parameter(torch.empty(8))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.w, self.v, self.b)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, v, b: (x @ w.t() + b) @ v.t() + b,
        lambda x, w, v, b: torch.addmm(x[0] @ w.t() + b, x[0], v.t(), beta=0.5),
        lambda x, w, v, b: torch.addmm(b, x[0] @ w.t() + b, v.t(), alpha=2.0),
        lambda x, w, v, b: torch.addmm(b, torch.addmm(b, x[0], w.t(), beta=0.5), v.t()),
    ],
    ids=["x", "bias", "x of addmm", "addmm of addmm"],
)
def test_a_product_that_reads_another(call: Callable[..., Tensor]) -> None:
    gm = capture(Chained(call).double(), EXAMPLE)
    before = run(gm, ROWS)
    assert raised(gm) == 2
    assert_vals(gm, ROWS)
    torch.testing.assert_close(run(gm, ROWS), before, rtol=1e-12, atol=1e-12)


# -- near misses -------------------------------------------------------------------------------------------------------

KEPT: dict[str, tuple[Call, tuple[int, ...]]] = {
    "columns with another reader": (lambda m, x: x @ m.w + m.w.sum(), (8, 6)),
    "columns with another reader of the transpose": (lambda m, x: x @ m.w + m.w.t().sum(), (8, 6)),
    "columns that are given back": (lambda m, x: (x @ m.w, m.w.t()), (8, 6)),
    "columns with a slice that is read": (lambda m, x: x @ m.w + m.w[0], (8, 6)),
    "a batch of matrices": (lambda m, x: x.unsqueeze(1) @ m.w, (4, 8, 6)),
    "a batch of one": (lambda m, x: x @ m.w, (1, 8, 6)),
    "more matrices than inputs": (lambda m, x: x[:1] @ m.w.t().expand(3, -1, -1), (6, 8)),
    "more matrices than axes": (lambda m, x: x @ m.w.t().expand(2, 1, -1, -1), (6, 8)),
    "one row repeated": (lambda m, x: x @ m.w.t().expand(8, -1), (6, 1)),
    "an activation of one axis": (lambda m, x: x[0, 0] @ m.w.t(), (6, 8)),
    "a vector": (lambda m, x: x @ m.w[0], (6, 8)),
    "activations": (lambda m, x: x @ x.mT, (6, 8)),
    "activations in a linear": (lambda m, x: F.linear(x, x[0]), (6, 8)),
    "a matrix on the left": (lambda m, x: m.w @ x.mT, (6, 8)),
    "a matrix as the input of a linear": (lambda m, x: F.linear(m.w, x[0]), (6, 8)),
    "parameters alone": (lambda m, x: x.sum() + (m.w @ m.w.t()).sum(), (6, 8)),
    "a slice": (lambda m, x: x @ m.w[:3].t(), (6, 8)),
    "another shape": (lambda m, x: x @ m.w.view(8, 6), (6, 8)),
    "a computed matrix": (lambda m, x: x @ (m.w * 2).t(), (6, 8)),
    "a buffer": (lambda m, x: x @ m.held.t(), (6, 8)),
    "an einsum that moves the outputs": (lambda m, x: torch.einsum("btk,nk->bnt", x, m.w), (6, 8)),
    "an einsum that keeps the inputs": (lambda m, x: torch.einsum("btk,nk->btnk", x, m.w), (6, 8)),
    "an einsum over another axis": (lambda m, x: torch.einsum("bkt,nk->btn", x.mT, m.w), (6, 8)),
    "an einsum of three": (lambda m, x: torch.einsum("btk,nk,n->btn", x, m.w, m.b), (6, 8)),
    "an einsum of an axis of both": (lambda m, x: torch.einsum("btk,bk->btk", x[:2], m.w[:2]), (6, 8)),
    "a tensordot over two axes": (lambda m, x: tensordot(x[:, :6], m.w, ([1, 2], [0, 1])), (6, 8)),
    "a tensordot over another axis": (lambda m, x: tensordot(x.mT, m.w, ([1], [1])), (6, 8)),
    "a linear": (lambda m, x: F.linear(x, m.w, m.b), (6, 8)),
    "a Conv1D": (lambda m, x: torch.addmm(m.b, x[0], m.w), (8, 6)),
}  # fmt: skip


@pytest.mark.parametrize("case", KEPT)
def test_kept(case: str) -> None:
    call, w = KEPT[case]
    x = torch.ones(4, 6, 8, dtype=torch.float64)
    gm = written(call, w, x=x)
    before = dump(gm)
    assert raised(gm) == 0
    assert dump(gm) == before
