"""Views: arguments however they were given, patterns, equality, and misspellings refused when the class is made."""

from typing import Any

import pytest
import torch
from torch import fx, nn

from graphq.errors import PassError
from graphq.ir import views
from graphq.ir.views import (
    Cast,
    Conv2d,
    Conv2dPadding,
    Dequantize,
    Embedding,
    GroupedLinear,
    Input,
    Linear,
    Op,
    Param,
    Quantize,
    Split,
    Transpose,
    TransposedLinear,
    Weighted,
    ops_of,
    view,
)
from graphq.runtime import ops

aten = torch.ops.aten


def graph_of(target: Any, *args: Any, inputs: str = "x", params: str = "w", **kwargs: Any) -> fx.Node:
    """A call of ``target``; arguments that name an input or a parameter are these nodes, in lists too."""
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in inputs.split()}
    nodes |= {name: graph.get_attr(name) for name in params.split()}

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(item) for item in value]
        return nodes.get(value, value) if isinstance(value, str) else value

    return graph.call_function(target, tuple(map(resolve, args)), {k: resolve(v) for k, v in kwargs.items()})


@pytest.mark.parametrize(
    ("target", "shape", "weight"),
    [
        (aten.linear.default, (2, 5, 4), (6, 4)),
        (aten.conv1d.default, (2, 4, 8), (6, 4, 3)),
        (aten.conv1d.padding, (2, 4, 8), (6, 4, 3)),
        (aten.conv2d.default, (2, 4, 8, 9), (6, 4, 3, 3)),
        (aten.conv2d.padding, (2, 4, 8, 9), (6, 4, 3, 3)),
    ],
)
def test_axes_of_channels_with_batches_and_without(
    target: Any, shape: tuple[int, ...], weight: tuple[int, ...]
) -> None:
    op = view(graph_of(target, "x", "w"))
    assert isinstance(op, Weighted)
    for x in (torch.randn(shape), torch.randn(shape)[0]):
        assert x.shape[op.input_axis] == weight[op.in_axis] == 4
        assert target(x, torch.randn(weight)).shape[op.output_axis] == weight[op.out_axis] == 6


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        (("x", "w", "b"), {}),
        (("x", "w"), {"bias": "b"}),
        ((), {"bias": "b", "weight": "w", "input": "x"}),
    ],
)
def test_positional_and_keyword_arguments_read_alike(args: tuple[str, ...], kwargs: dict[str, str]) -> None:
    op = view(graph_of(aten.linear.default, *args, params="w b", **kwargs))
    assert isinstance(op, Linear)
    assert isinstance(op.input, Input)
    assert isinstance(op.weight, Param)
    assert op.weight.fqn == "w"
    assert isinstance(op.bias, Param)
    assert op.bias.fqn == "b"
    match op:
        case Linear(Input() as x, Param() as weight, Param() as bias):
            assert (x, weight, bias) == (op.input, op.weight, op.bias)
        case _:
            pytest.fail("the pattern does not match")


def test_arguments_not_given_are_their_defaults() -> None:
    op = view(graph_of(aten.linear.default, "x", "w"))
    assert isinstance(op, Linear)
    assert op.bias is None
    assert view(graph_of(aten.conv2d.default, "x", "w")).argument("stride") == [1, 1]
    assert view(graph_of(aten.conv2d.padding, "x", "w")).argument("padding") == "valid"
    read = view(graph_of(ops.dequantize, "w", "w", None, None, "int4", [1, 32]))
    assert isinstance(read, Dequantize)
    assert read.dtype is None
    assert (read.zero_point, read.format, read.block) == (None, "int4", [1, 32])
    cut = view(graph_of(aten.split.Tensor, "x", 4))
    assert isinstance(cut, Split)
    assert (cut.split_size, cut.dim) == (4, 0)


def test_a_falsy_argument_is_not_taken_for_a_missing_one() -> None:
    assert view(graph_of(aten.conv2d.default, "x", "w", None, [0, 0])).argument("stride") == [0, 0]
    assert view(graph_of(aten.conv2d.default, "x", "w", groups=0)).argument("groups") == 0
    assert view(graph_of(aten.dropout.default, "x", 0.0, False)).argument("train") is False


def test_argument_self_is_read_as_self_() -> None:
    node = graph_of(aten.transpose.int, "w", 1, 0)
    match view(node):
        case Transpose(Param() as stored, 1, 0) as op:
            assert stored.fqn == "w"
            assert op.self_ == stored
        case _:
            pytest.fail("the pattern does not match")
    match view(graph_of(aten._to_copy.default, "x", dtype=torch.float16)):
        case Cast(Input(), torch.float16):
            pass
        case _:
            pytest.fail("the pattern does not match")


def test_batch_norms_and_transposed_convolutions() -> None:
    match view(graph_of(aten.batch_norm.default, "x", "w", None, "w", "w", False, 0.1, 1e-5, True)):
        case views.BatchNorm(Input(), Param(), None, Param(), Param(), False, 1e-5):
            pass
        case _:
            pytest.fail("the pattern does not match")
    match view(graph_of(aten._native_batch_norm_legit_no_training.default, "x", None, "w", "w", "w", 0.1, 1e-5)):
        case views.InferenceBatchNorm(Input(), None, Param(), Param(), Param(), 1e-5):
            pass
        case _:
            pytest.fail("the pattern does not match")
    for target, kind in (
        (aten.conv_transpose1d.default, views.ConvTranspose1d),
        (aten.conv_transpose2d.input, views.ConvTranspose2d),
        (aten.conv_transpose3d.input, views.ConvTranspose3d),
    ):
        op = view(graph_of(target, "x", "w", groups=2))
        assert isinstance(op, kind)
        assert (op.bias, op.groups) == (None, 2)
        assert isinstance(op, views.ConvTranspose)
        assert (op.out_axis, op.in_axis) == (1, 0)


@pytest.mark.parametrize(
    "node",
    [
        graph_of(aten.transpose.int, "x", 1, 0),  # of an input
        graph_of(aten.transpose.int, "w", 0, 1),  # other axes
        graph_of(aten.permute.default, "w", [1, 0]),  # another op
        graph_of(aten.transpose_copy.int, "w", 1, 0),  # its twin
    ],
)
def test_near_misses_do_not_match(node: fx.Node) -> None:
    match view(node):
        case Transpose(Param(), 1, 0):
            pytest.fail("the pattern matches")
        case _:
            pass


def test_arguments_that_are_nodes_come_as_views_in_lists_too() -> None:
    op = view(graph_of(ops.select_rows, ["x", "w", "x"], "x", [0, 1, 1]))
    assert type(op) is Op
    candidates = op.argument("candidates")
    assert all(isinstance(candidate, fx.Node) for candidate in candidates)  # raw

    class Selected(Op, target=ops.select_rows):
        candidates: list[Op]
        choice: list[int]

    try:
        seen = view(op.node)
        assert isinstance(seen, Selected)
        assert list(map(type, seen.candidates)) == [Input, Param, Input]
        assert seen.candidates[0] == seen.candidates[2]
        assert seen.choice == [0, 1, 1]
    finally:
        del views._VIEWS[ops.select_rows]


def test_a_dynamic_size_comes_as_a_view() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(aten.sym_size.int, (x, 0))
    op = view(graph.call_function(aten.split.Tensor, (x, size)))
    assert isinstance(op, Split)
    assert op.split_size == view(size)


def test_weighted_ops_know_their_weight_and_its_axes() -> None:
    def seen(node: fx.Node) -> tuple[Any, ...]:
        op = view(node)
        assert isinstance(op, Weighted)
        assert isinstance(op.weight_op, Param)
        assert isinstance(op.input_op, Input)
        return type(op), op.out_axis, op.in_axis, op.own_axes

    assert seen(graph_of(aten.linear.default, "x", "w")) == (Linear, 0, 1, ())
    assert seen(graph_of(aten.addmm.default, "b", "x", "w", params="w b")) == (TransposedLinear, 1, 0, ())
    assert seen(graph_of(aten.conv2d.default, "x", "w")) == (Conv2d, 0, 1, ())
    assert seen(graph_of(aten.conv2d.padding, "x", "w", padding="same")) == (Conv2dPadding, 0, 1, ())
    assert seen(graph_of(aten.embedding.default, "w", "x")) == (Embedding, 0, 1, ())
    assert seen(graph_of(ops.grouped_linear, "x", "w", "x")) == (GroupedLinear, 1, 2, (0,))


@pytest.mark.parametrize("factors", [{"beta": 0.5}, {"alpha": 2}, {"beta": 0.5, "alpha": 2}])
def test_an_addmm_that_scales_is_no_linear(factors: dict[str, float]) -> None:
    node = graph_of(aten.addmm.default, "b", "x", "w", inputs="x", params="w b", **factors)
    assert type(view(node)) is Op
    assert TransposedLinear.of(node) is None
    same = graph_of(aten.addmm.default, "b", "x", "w", params="w b", beta=1.0, alpha=1)
    assert isinstance(view(same), TransposedLinear)


def test_the_weights_axes_are_those_that_the_ops_use() -> None:
    w = torch.randn(3, 5)
    assert torch.addmm(torch.zeros(5), torch.randn(2, 3), w).shape[1] == w.shape[TransposedLinear.out_axis]
    assert nn.functional.linear(torch.randn(2, 5), w).shape[1] == w.shape[Linear.out_axis]
    w = torch.randn(2, 3, 5)
    offsets = torch.tensor([1, 2])
    assert ops.grouped_linear(torch.randn(2, 5), w, offsets).shape[1] == w.shape[GroupedLinear.out_axis]


def test_views_are_equal_iff_they_show_one_node() -> None:
    node = graph_of(aten.linear.default, "x", "w")
    other = graph_of(aten.linear.default, "x", "w")
    assert view(node) == view(node)
    assert len({view(node), view(node), view(other)}) == 2
    assert view(node) != view(other)
    assert view(node) != node
    assert repr(view(node)) == "Linear(linear_default)"


def test_of_gives_a_view_of_its_own_class_only() -> None:
    node = graph_of(aten.linear.default, "x", "w")
    assert Linear.of(node) == view(node)
    assert Weighted.of(node) == view(node)
    assert Conv2d.of(node) is None
    assert Linear.of("linear") is None
    assert Linear.of(None) is None


def test_users_and_values() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first, second = (graph.call_function(aten.relu.default, (x,)) for _ in range(2))
    graph.call_function(aten.add.Tensor, (x, x))
    assert view(x).users[:2] == [view(first), view(second)]
    assert len(view(x).users) == 3
    assert view(x).val is None
    x.meta["val"] = 7
    assert view(x).val == 7


def test_nodes_without_a_view_of_their_own_are_shown_plainly() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    called = graph.call_module("child", (x,))
    relu = graph.call_function(aten.relu.default, (called,))
    output = graph.output(relu)
    assert [type(view(node)) for node in (x, called, relu, output)] == [Input, Op, Op, Op]
    assert view(relu).argument("self") is called  # ATen's names hold for every op
    with pytest.raises(PassError, match="has no argument self"):
        view(called).argument("self")


def test_ops_of_does_not_meet_nodes_added_on_the_way() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.ReLU(), nn.ReLU()))
    seen = 0
    for op in ops_of(gm):
        with gm.graph.inserting_after(op.node):
            gm.graph.call_function(torch.relu, (op.node,))
        seen += 1
    assert seen == 4  # the input, two calls, the output
    assert len(gm.graph.nodes) == 8


def test_no_other_attributes() -> None:
    op: Any = view(graph_of(aten.linear.default, "x", "w"))
    with pytest.raises(AttributeError, match="Linear has no wieght"):
        op.wieght  # noqa: B018 - a misspelling
    with pytest.raises(AttributeError, match="Linear has no self_"):
        op.self_  # noqa: B018
    with pytest.raises(PassError, match=r"Linear\(linear_default\): aten.linear.default has no argument wieght"):
        op.argument("wieght")


def test_an_argument_that_the_op_must_have() -> None:
    node = graph_of(aten.linear.default, "x", "w")
    node.args = node.args[:1]
    with pytest.raises(
        PassError, match=r"Linear\(linear_default\): aten.linear.default was not given its argument weight"
    ):
        view(node).argument("weight")


@pytest.mark.parametrize("name", ["wieght", "self_", "weight_", "_weight", "Weight"])
def test_a_misspelt_argument_is_an_error_when_the_class_is_made(name: str) -> None:
    before = dict(views._VIEWS)
    with pytest.raises(PassError) as raised:
        type("Bilinear", (Op,), {"__annotations__": {"input1": Op, name: Op}}, target=aten.bilinear.default)
    assert str(raised.value) == (
        f"Bilinear: aten.bilinear.default has no argument {name}; it has input1, input2, weight, bias"
    )
    assert before == views._VIEWS


def test_an_op_has_one_view() -> None:
    with pytest.raises(PassError, match=r"Again: aten.linear.default has a view already, Linear"):
        type("Again", (Op,), {"__annotations__": {"input": Op}}, target=aten.linear.default)
    assert views._VIEWS[aten.linear.default] is Linear


def test_every_view_matches_its_fields_in_order() -> None:
    assert Linear.__match_args__ == ("input", "weight", "bias")
    assert Transpose.__match_args__ == ("self_", "dim0", "dim1")
    assert Quantize.__match_args__ == ("x", "scale", "zero_point", "global_scale", "format", "block")
    assert Param.__match_args__ == ()
    for target, cls in views._VIEWS.items():
        assert cls.target is target
        assert len(cls.__match_args__) > 0
