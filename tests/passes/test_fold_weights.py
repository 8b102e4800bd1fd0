"""Weights that are computed from a model's own tensors alone are tensors, under the names that modules give them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import graphq
from graphq.capture.modules import capture_module
from graphq.ir.layers import layers
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.passes.fold_weights import FoldWeights
from graphq.passes.raise_linear import RaiseLinear
from graphq.passes.raise_recurrent import RaiseRecurrent
from graphq.passes.remove_no_ops import RemoveNoOps
from graphq.state import same_tensors, tensor_of
from tests.graphs import assert_vals, without_data

Call = Callable[[Any, Tensor], Any]
FLAT, ROWS = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)).double() for shape in ((3, 8), (3, 5, 8)))
IMAGE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1)).double()


class With(nn.Module):
    """What ``body`` makes of its input with modules and parameters of these names."""

    def __init__(self, body: Call, **held: nn.Module | tuple[int, ...]) -> None:
        super().__init__()
        for name, what in held.items():
            setattr(self, name, nn.Parameter(torch.randn(what)) if isinstance(what, tuple) else what)
        self.register_buffer("mask", torch.tensor([1.0, 0, 1, 1, 0, 1, 0, 1]))
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


class StdConv(nn.Conv2d):
    """A convolution whose kernels are standardized, as timm's ``ScaledStdConv2d`` does it."""

    def __init__(self, width: int, out: int, size: int) -> None:
        super().__init__(width, out, size)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, input: Tensor) -> Tensor:
        flat, gain = self.weight.reshape(1, self.out_channels, -1), (self.gain * 0.3).view(-1)
        w = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6).reshape_as(self.weight)
        return F.conv2d(input, w, self.bias)


def folded(model: nn.Module, x: Tensor, changes: int, *before: Any) -> fx.GraphModule:
    """The graph of ``model`` in float64 with ``changes`` folded computations; it gives the same, to the bit."""
    torch.manual_seed(0)
    model = model.double().eval()
    gm = capture_module(model, x)
    Pipeline([RemoveNoOps(), *before]).run(gm)
    wanted = gm(x)
    blank = without_data(copy.deepcopy(gm))
    assert Pipeline([FoldWeights()], strict=True).run(gm) == {"fold-weights": changes}
    assert Pipeline([FoldWeights()], strict=True).run(gm) == {"fold-weights": 0}
    assert_vals(gm, x)
    for found, expected in zip(gm(x), wanted, strict=True):
        assert torch.equal(found, expected)
    assert Pipeline([FoldWeights()], strict=True).run(blank) == {"fold-weights": changes}  # and without weights
    assert dump(blank) == dump(gm)
    return gm


def test_golden() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv1d(8, 4, 3)), weight_norm(nn.ConvTranspose1d(4, 6, 2)), nn.ReLU()
    )
    gm = capture_module(model.double().eval(), ROWS.mT)
    assert_expected_inline(
        dump(gm),
        """\
%input_1: f64[batch, 8, 5] = input
%1: f64[4, 8, 3] = aten._weight_norm(@0.parametrizations.weight.original1, @0.parametrizations.weight.original0)
%2: f64[batch, 4, 3] = aten.conv1d(%input_1, %1, @0.bias)
%3: f64[4, 6, 2] = aten._weight_norm(@1.weight_v, @1.weight_g)
%4: f64[batch, 6, 4] = aten.conv_transpose1d(%2, %3, @1.bias)
%5: f64[batch, 6, 4] = aten.relu(%4)
return [%5]
""",
    )
    gm = folded(model, ROWS.mT, 2)
    assert_expected_inline(
        dump(gm),
        """\
%input_1: f64[batch, 8, 5] = input
%1: f64[batch, 4, 3] = aten.conv1d(%input_1, @0.weight, @0.bias)
%2: f64[batch, 6, 4] = aten.conv_transpose1d(%1, @1.weight, @1.bias)
%3: f64[batch, 6, 4] = aten.relu(%2)
return [%3]
""",
    )
    assert sorted(gm.state_dict()) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert isinstance(tensor_of(gm, "0.weight"), nn.Parameter)


def pruned() -> nn.Module:
    layer = nn.Linear(8, 6)
    torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    return layer


def both(m: Any, x: Tensor) -> Tensor:
    return F.linear(x, m.qkv.weight[:8], m.qkv.bias[:8]) * F.linear(x, m.qkv.weight[8:], m.qkv.bias[8:])


# The model, its input, how many computations are folded, and the names of the layers.
FORMS: dict[str, tuple[nn.Module, Tensor, int, list[str]]] = {
    "old spectral norm": (nn.Sequential(spectral_norm(nn.Linear(8, 6))), FLAT, 1, ["0"]),
    "spectral norm": (nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 6))), FLAT, 1, ["0"]),
    "orthogonal": (nn.Sequential(parametrizations.orthogonal(nn.Linear(8, 8))), FLAT, 1, ["0"]),
    "pruned": (nn.Sequential(pruned()), FLAT, 1, ["0"]),
    "standardized": (nn.Sequential(StdConv(4, 6, 3), nn.ReLU(), StdConv(6, 4, 1)), IMAGE, 2, ["0", "2"]),
    "scaled, bias too": (With(lambda m, x: F.linear(x, m.l.weight * 0.5, m.l.bias * 2), l=nn.Linear(8, 6)), FLAT, 2, ["l"]),
    "masked, in a product": (With(lambda m, x: x @ (m.w * m.mask[:, None]), w=(8, 4)), FLAT, 1, ["w"]),
    "a cast is left to its readers": (
        With(lambda m, x: F.linear(x, (m.w * 2).float().double()), w=(6, 8)),
        FLAT,
        1,
        ["w"],
    ),
    "an embedding": (With(lambda m, x: F.embedding(x.long().abs(), m.w * 8), w=(10, 4)), FLAT, 1, ["w"]),
    "slices": (With(both, qkv=nn.Linear(8, 16)), FLAT, 4, ["qkv_0", "qkv_1"]),
    "one of the experts": (With(lambda m, x: F.linear(x, m.w[1]), w=(3, 4, 8)), FLAT, 1, ["w"]),
    "two of the experts": (With(lambda m, x: F.linear(x, m.w[1]) + F.linear(x, m.w[0]), w=(3, 4, 8)), FLAT, 2, ["w_0", "w_1"]),
    "beside another reader": (
        With(lambda m, x: F.linear(x, m.w * 2) + F.linear(x, m.w), w=(8, 8)),
        FLAT,
        1,
        ["w_0", "w"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_what_models_compute_weights_by(form: str) -> None:
    model, x, changes, names = FORMS[form]
    gm = folded(model, x, changes)
    Pipeline([RaiseLinear()]).run(gm)
    assert list(layers(gm)) == names
    assert {str(node.target) for node in gm.graph.find_nodes(op="get_attr")} == set(gm.state_dict())


@pytest.mark.parametrize(
    ("read", "names"),
    [
        (lambda x: (x, x, x), ["a.in_proj", "a.out_proj"]),
        (lambda x: (x, x + 1, x + 1), ["a.q_proj", "a.k_proj", "a.v_proj", "a.out_proj"]),
        (lambda x: (x, y := x + 1, y), ["a.q_proj", "a.kv_proj", "a.out_proj"]),
    ],
)
def test_attention_has_one_layer_for_each_input(read: Callable[[Tensor], Any], names: list[str]) -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        return m.a(*read(x), need_weights=False)[0]

    gm = folded(With(body, a=nn.MultiheadAttention(8, 2, batch_first=True)), ROWS, {2: 0, 4: 6, 3: 4}[len(names)])
    assert list(layers(gm)) == names
    held = {name.rpartition(".")[2] for name in gm.state_dict()}
    assert {f"{name.split('.')[1]}_bias" for name in names[:-1]} <= held


def test_a_recurrent_layers_weight() -> None:
    model = With(
        lambda m, x: m.r(x)[0], r=parametrizations.weight_norm(nn.LSTM(8, 4, batch_first=True), "weight_hh_l0")
    )
    gm = folded(model, ROWS, 1, RaiseRecurrent())
    assert list(layers(gm)) == ["r.weight_ih_l0", "r.weight_hh_l0"]


def test_equal_computations_are_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.g = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.rand(8, 1))
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(F.linear(x, self.a.weight * self.g))  # export gives both reads one name
            return F.linear(x, self.b.weight * self.g) + F.linear(x, self.b.weight * (self.g + 1))

    gm = folded(Tied(), FLAT, 3)
    assert len(layers(gm)) == 2  # the third computes something else

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a: Any = parametrizations.weight_norm(nn.Linear(8, 8))
            self.b: Any = parametrizations.weight_norm(nn.Linear(8, 8))
            for name in ("original0", "original1"):
                setattr(self.b.parametrizations.weight, name, getattr(self.a.parametrizations.weight, name))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))

    gm = folded(Shared(), FLAT, 2)
    assert list(layers(gm)) == ["a", "b"]
    assert same_tensors(gm) == {"b.weight": "a.weight"}


# Each differs from a form above in one thing.
NEAR: dict[str, tuple[nn.Module, Tensor]] = {
    "gated by the input": (With(lambda m, x: F.linear(x, m.w * x.mean()), w=(6, 8)), FLAT),
    "sized by the input": (With(lambda m, x: F.linear(x, m.w * x.shape[0]), w=(6, 8)), FLAT),
    "larger than its parts": (With(lambda m, x: F.linear(x, m.a @ m.b), a=(8, 1), b=(1, 8)), FLAT),
    "repeated": (With(lambda m, x: F.conv1d(x, m.w.repeat(5, 1, 1), groups=5), w=(1, 1, 3)), ROWS),
    "of constants alone": (With(lambda m, x: F.linear(x, torch.eye(8, dtype=torch.float64) * 2)), FLAT),
    "of buffers alone": (With(lambda m, x: F.linear(x, (m.mask * 2)[None])), FLAT),
    "only moved": (With(lambda m, x: x @ m.w.T, w=(6, 8)), FLAT),
    "drawn at random": (With(lambda m, x: F.linear(x, F.dropout(m.w, 0.5, True)), w=(6, 8)), FLAT),
    "a gain": (With(lambda m, x: x * (1 + m.w), w=(8,)), FLAT),
    "three axes": (With(lambda m, x: x @ (m.w * 2), w=(1, 8, 4)), ROWS),
    "a product of a constant query": (With(lambda m, x: x @ m.l(m.w).T, w=(4, 8), l=nn.Linear(8, 8)), FLAT),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR)
def test_near_misses(case: str) -> None:
    model, x = NEAR[case]
    gm = capture_module(model.double().eval(), x)
    Pipeline([RemoveNoOps()]).run(gm)
    assert Pipeline([FoldWeights()], strict=True).run(gm) == {"fold-weights": 0}


def test_a_convolution_moves_its_weight_itself() -> None:
    gm = folded(With(lambda m, x: F.conv1d(x.mT, m.w.permute(2, 1, 0)), w=(3, 8, 6)), ROWS, 1)
    assert layers(gm)["w"].shape == (6, 8, 3)


def test_rules_say_what_became_of_the_name_that_they_give() -> None:
    attention = With(
        lambda m, x: m.a(x, x + 1, x * 2, need_weights=False)[0], a=nn.MultiheadAttention(8, 2, batch_first=True)
    )
    spec = {"graphq": 1, "rules": [{"match": "in_proj", "weight": "int8/channel"}]}
    with pytest.raises(graphq.SpecError, match=r"in_proj matches no layer; a\.in_proj is read as a\.q_proj, a\.k_proj"):
        graphq.compile(attention, spec, inputs=ROWS.float())
    spec["rules"] = [{"match": "re:.*parametrizations.*", "weight": "int8/channel"}]
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 6)))
    with pytest.raises(graphq.SpecError, match=r"0\.parametrizations\.weight\.original1 is read as 0$"):
        graphq.compile(model, spec, inputs=FLAT.float())
