"""Edits: every ``val`` stays true, ``graphq.by`` tells who did it, and nothing unused is left."""

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphq.capture.modules import capture_module
from graphq.errors import PassError
from graphq.ir import edit
from graphq.ir.layers import BY, LAYER, PLAN
from graphq.ir.text import dump
from graphq.ir.views import Op, view
from graphq.state import tensor_of
from tests.graphs import annotated, assert_vals, run, targets, without_data
from tests.models import MLP, capture

aten = torch.ops.aten
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def mlp() -> fx.GraphModule:
    return annotated(capture(MLP(), torch.ones(2, 8)), up="int8/channel")


def find(gm: fx.GraphModule, target: object, number: int = 0) -> Op:
    return [view(n) for n in gm.graph.nodes if target in (n.target, n.op)][number]


def order(gm: fx.GraphModule) -> list[str]:
    return [node.op for node in gm.graph.nodes]


# -- insert, items, following ------------------------------------------------------------------------------------------


def test_insert_stands_in_front_of_before_with_a_true_val() -> None:
    gm = mlp()
    relu = find(gm, aten.relu.default)
    made = edit.insert(gm, relu, aten.cat.default, [relu.node.args[0], find(gm, "placeholder")], -1, by="t")
    assert made.node.next is relu.node
    assert (made.val.dtype, str(made.val.shape[1])) == (torch.float32, "20")
    assert made.val.shape[0] is not None
    assert not isinstance(made.val.shape[0], int)  # the batch stays dynamic
    assert_vals(gm, X)


def test_insert_takes_views_within_lists_and_raw_values() -> None:
    gm = mlp()
    relu = find(gm, aten.relu.default)
    x = find(gm, "placeholder")
    made = edit.insert(gm, relu, aten.cat.default, [x, x], 0, by="t")
    assert made.node.args == ([x.node, x.node], 0)
    assert_vals(gm, X)


def test_insert_belongs_to_the_layer_of_like_or_else_of_before() -> None:
    gm = mlp()
    relu, up = find(gm, aten.relu.default), find(gm, aten.linear.default)
    relu.node.meta |= {LAYER: "act", "nn_module_stack": {"a": ("act", None)}, "stack_trace": "line 1", "other": 1}
    up.node.meta["nn_module_stack"] = {"u": ("up", None)}
    by_default = edit.insert(gm, relu, aten.neg.default, up, by="t").node.meta
    assert {k: v for k, v in by_default.items() if k != "val"} == {
        LAYER: "act",
        "nn_module_stack": {"a": ("act", None)},
        "stack_trace": "line 1",
        BY: ("t",),
    }
    liked = edit.insert(gm, relu, aten.neg.default, up, by="t", like=up).node.meta
    assert (liked[LAYER], liked[PLAN]) == ("up", up.node.meta[PLAN])
    assert liked["nn_module_stack"] == {"u": ("up", None)}


def test_insert_with_options() -> None:
    gm = mlp()
    relu = find(gm, aten.relu.default)
    made = edit.insert(
        gm, relu, aten._to_copy.default, find(gm, "placeholder"), by="t", options={"dtype": torch.float64}
    )
    assert (made.node.kwargs, made.val.dtype) == ({"dtype": torch.float64}, torch.float64)


def test_insert_of_an_op_that_refuses_its_arguments_leaves_the_graph_alone() -> None:
    gm = mlp()
    before = dump(gm)
    with pytest.raises(RuntimeError):
        edit.insert(gm, find(gm, "output"), aten.mm.default, find(gm, "placeholder"), find(gm, "placeholder"), by="t")
    gm.graph.lint()
    assert dump(gm) == before


def test_items() -> None:
    gm = mlp()
    relu = find(gm, aten.relu.default)
    sort = edit.insert(gm, find(gm, aten.linear.default, 1), aten.sort.default, relu, by="t")
    values, indices = edit.items(gm, sort, 2, by="u")
    assert [values.node.args, indices.node.args] == [(sort.node, 0), (sort.node, 1)]
    assert (values.val.dtype, indices.val.dtype) == (torch.float32, torch.int64)
    assert sort.node.next is values.node
    assert values.node.next is indices.node
    assert values.node.target is operator.getitem
    assert values.node.meta[BY] == ("u",)
    assert_vals(gm, X)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.w(x) + y


@pytest.mark.parametrize("name", ["get_attr", "placeholder"])
def test_following_never_stands_among_the_inputs(name: str) -> None:
    gm = capture(TwoInputs(), torch.ones(2, 8), torch.ones(2, 8))
    assert order(gm)[:4] == ["placeholder", "placeholder", "get_attr", "get_attr"]
    first = find(gm, name)
    made = edit.insert(gm, edit.following(first), aten.neg.default, first, by="t")
    assert order(gm)[:4] == ["placeholder", "placeholder", "get_attr", "get_attr"]
    assert made.node.next.target is aten.linear.default


def test_following_is_the_next_node_elsewhere() -> None:
    gm = mlp()
    assert edit.following(find(gm, aten.relu.default)) == find(gm, aten.linear.default, 1)


# -- replace, bypass, redirect -----------------------------------------------------------------------------------------


def test_replace() -> None:
    gm = mlp()
    relu = find(gm, aten.relu.default)
    relu.node.meta[BY] = ("earlier",)
    made = edit.replace(gm, relu, aten.silu.default, find(gm, aten.linear.default), by="t")
    assert targets(gm) == ["aten.linear", "aten.silu", "aten.linear"]
    assert made.node.meta[BY] == ("earlier", "t")
    assert find(gm, aten.linear.default, 1).node.args[0] is made.node
    assert_vals(gm, X)
    torch.testing.assert_close(run(gm, X), _reference(gm, F.silu), rtol=0, atol=0)


def _reference(gm: fx.GraphModule, act: Callable[[Tensor], Tensor]) -> Tensor:
    w = {k: tensor_of(gm, k) for k in ("up.weight", "up.bias", "down.weight", "down.bias")}
    with torch.no_grad():
        return F.linear(act(F.linear(X, w["up.weight"], w["up.bias"])), w["down.weight"], w["down.bias"])


def test_bypass() -> None:
    gm = mlp()
    edit.bypass(gm, find(gm, aten.relu.default), find(gm, aten.linear.default))
    assert targets(gm) == ["aten.linear", "aten.linear"]
    torch.testing.assert_close(run(gm, X), _reference(gm, lambda x: x), rtol=0, atol=0)


def test_redirect_moves_one_reader() -> None:
    gm = mlp()
    relu, up, down = find(gm, aten.relu.default), find(gm, aten.linear.default), find(gm, aten.linear.default, 1)
    neg = edit.insert(gm, down, aten.neg.default, relu, by="t")
    edit.redirect(down, relu, neg, by="t")
    edit.redirect(down, neg, neg, by="t")
    assert down.node.args[0] is neg.node
    assert neg.node.args[0] is relu.node
    assert down.node.meta[BY] == ("t",)  # once
    assert BY not in up.node.meta
    assert_vals(gm, X)


def test_what_is_read_must_be_alike() -> None:
    gm = mlp()
    relu, down, out = find(gm, aten.relu.default), find(gm, aten.linear.default, 1), find(gm, "output")
    with pytest.raises(PassError, match=r"relu: torch.float32 \[.*, 12\] cannot be read as linear_1: .* 8\]"):
        edit.bypass(gm, relu, down)
    double = edit.insert(gm, out, torch.ops.prims.convert_element_type.default, down, torch.float64, by="t")
    with pytest.raises(PassError, match=r"torch\.float32 .* cannot be read as .*torch\.float64"):
        edit.redirect(out, down, double, by="t")
    with pytest.raises(PassError, match="cannot be read"):
        edit.replace(gm, down, aten.unsqueeze.default, relu, 0, by="t")


# -- tensors -----------------------------------------------------------------------------------------------------------


def test_add_tensor() -> None:
    gm = mlp()
    relu, up = find(gm, aten.relu.default), find(gm, aten.linear.default)
    scale = edit.add_tensor(gm, relu, "up.deep.scale", torch.tensor([2, 3]), by="t", like=up)
    gain = edit.add_tensor(gm, relu, "gain", nn.Parameter(torch.ones(12)), by="t")
    assert (scale.node.target, scale.node.meta[LAYER], scale.node.meta[BY]) == ("up.deep.scale", "up", ("t",))
    assert dict(gm.named_buffers())["up.deep.scale"].tolist() == [2, 3]
    assert not dict(gm.named_parameters())["gain"].requires_grad
    assert gain.val.shape == (12,)
    assert all(type(size) is int for size in gain.val.shape)  # never symbolic
    assert gain.node.next is relu.node
    made = edit.insert(gm, relu, aten.mul.Tensor, up, gain, by="t")
    edit.redirect(relu, up, made, by="t")
    assert_vals(gm, X)


@pytest.mark.parametrize("name", ["up.weight", "up"])
def test_add_tensor_under_a_taken_name(name: str) -> None:
    gm = mlp()
    with pytest.raises(PassError, match=f"t: the graph has a tensor {name} already"):
        edit.add_tensor(gm, find(gm, "output"), name, torch.ones(1), by="t")


def test_set_param() -> None:
    gm = mlp()
    before = tensor_of(gm, "up.weight").clone()
    edit.set_param(gm, "up.weight", lambda w: w * 2, by="t")
    after = tensor_of(gm, "up.weight")
    torch.testing.assert_close(after, before * 2, rtol=0, atol=0)
    assert isinstance(after, nn.Parameter)
    assert {n.target: n.meta.get(BY) for n in gm.graph.nodes if n.op == "get_attr"} == {
        "up.weight": ("t",),
        "up.bias": None,
        "down.weight": None,
        "down.bias": None,
    }
    assert_vals(gm, X)


def test_set_param_leaves_the_source_model_alone() -> None:
    model = MLP()
    gm = capture_module(model, torch.ones(2, 8))
    before = model.up.weight.detach().clone()
    edit.set_param(gm, "up.weight", lambda w: w * 2, by="t")
    torch.testing.assert_close(model.up.weight.detach(), before, rtol=0, atol=0)


@pytest.mark.parametrize(("f", "now"), [(Tensor.double, "torch.float64[12, 8]"), (Tensor.t, "torch.float32[8, 12]")])
def test_set_param_keeps_shape_and_dtype(f: Callable[[Tensor], Tensor], now: str) -> None:
    with pytest.raises(PassError) as error:
        edit.set_param(mlp(), "up.weight", f, by="t")
    assert str(error.value) == f"t: up.weight would change from torch.float32[12, 8] to {now}"


# -- drop_unused, observers, data --------------------------------------------------------------------------------------


def test_drop_unused() -> None:
    gm = mlp()
    down, out = find(gm, aten.linear.default, 1), find(gm, "output")
    out.node.replace_input_with(down.node, find(gm, aten.relu.default).node)
    edit.insert(gm, out, aten.neg.default, down, by="t")
    gm.add_module("empty", nn.Sequential(nn.ReLU()))
    assert edit.drop_unused(gm) == 6  # two calls, and two tensors with their nodes
    assert targets(gm) == ["aten.linear", "aten.relu"]
    assert list(gm.state_dict()) == ["up.weight", "up.bias"]
    assert [name for name, _ in gm.named_modules()] == ["", "up"]


def test_drop_unused_leaves_a_clean_graph_alone() -> None:
    gm = mlp()
    before = dump(gm), list(gm.state_dict())
    assert edit.drop_unused(gm) == 0
    assert (dump(gm), list(gm.state_dict())) == before


class Watch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.inner = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_drop_unused_keeps_modules_that_are_called_and_all_that_is_in_them() -> None:
    gm = mlp()
    relu = find(gm, aten.relu.default)
    watch = edit.add_observer(gm, relu, "watch.1", Watch(), by="t", like=relu)
    gm.add_submodule("watch.10", Watch())  # another one, though its name begins alike
    edit.drop_unused(gm)
    assert watch.node in list(gm.graph.nodes)
    kept = [name for name in gm.state_dict() if name.startswith("watch")]
    assert kept == ["watch.1.seen", "watch.1.inner.weight", "watch.1.inner.bias"]
    torch.testing.assert_close(run(gm, X), _reference(gm, F.relu), rtol=0, atol=0)


def test_add_observer() -> None:
    gm = capture(TwoInputs(), torch.ones(2, 8), torch.ones(2, 8))
    x, plus = find(gm, "placeholder"), find(gm, aten.add.Tensor)
    watch = edit.add_observer(gm, x, "watch", Watch(), by="t", like=plus)
    assert order(gm)[4] == "call_module"  # behind both inputs
    assert watch.node.args == (x.node,)
    assert watch.node.meta[BY] == ("t",)
    assert_vals(gm, X, X)
    with pytest.raises(PassError, match="t: the graph has a module watch already"):
        edit.add_observer(gm, x, "watch", Watch(), by="t", like=plus)
    beside = edit.add_observer(gm, plus, "sum", Watch(), "t", plus, [x], before=edit.following(plus))
    assert beside.node.args == (plus.node, x.node)
    assert beside.node.prev == plus.node


def test_has_data_and_fake_mode() -> None:
    gm = mlp()
    assert edit.has_data(gm)
    assert edit.fake_mode_of(gm) is find(gm, "placeholder").val.fake_mode
    assert not edit.has_data(without_data(gm))
    with pytest.raises(PassError, match="no node of this graph knows its val"):
        edit.fake_mode_of(fx.symbolic_trace(nn.ReLU()))


def test_a_fake_tensor_is_its_own_val() -> None:
    gm = without_data(mlp())
    relu = find(gm, aten.relu.default)
    fake = tensor_of(gm, "up.bias")
    made = edit.add_tensor(gm, relu, "other", fake, by="t")
    assert made.val is fake
