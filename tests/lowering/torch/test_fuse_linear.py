"""Linears from codes to codes: what is one kernel, what is not, and that the numbers stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from graphq.ir.text import dump
from graphq.lowering.torch.fuse_linear import FuseLinear
from graphq.runtime import ops
from graphq.runtime.fused_layers import FusedLayer
from tests.lowering.torch.chain_graphs import (
    Grid,
    Net,
    Weight,
    assert_codes_within_a_step,
    changed,
    floats,
    graph_of,
    outputs,
)

X = floats(5, 3, 8)
Body = Callable[[Any, Tensor], Any]


def test_golden() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        y = net.b(F.gelu(net.up.linear(net.a(x))))
        return net.down.linear(y)

    gm = graph_of(Net(body, up=Weight(12, 8), down=Weight(8, 12, bias=False)), X)
    made = changed(gm, FuseLinear(), 2, X)
    assert_expected_inline(
        dump(made),
        """\
%x: f32[batch, sequence, 8] = input
%1: u8[batch, sequence, 8] = graphq.quantize(%x, @a.scale, @a.zero_point, None, 'uint8', [-1, -1, -1])
%2: u8[batch, sequence, 12] = @up(%1, @a.scale, @a.zero_point, @up.bias, None, None, None, @b.scale, @b.zero_point)
%3: f32[batch, sequence, 8] = @down(%2, @b.scale, @b.zero_point, None, None, None, None, None, None)
return [%3]
""",
    )
    found, expected = outputs(made, X)[0], outputs(gm, X)[0]
    assert (found - expected).abs().max() <= 0.01 * expected.abs().max()  # a code between may be off by a step


ENDS: dict[str, tuple[Callable[[Tensor], Tensor], str, list[float]]] = {
    "nothing": (lambda y: y, "none", []),
    "relu": (torch.relu, "relu", []),
    "gelu": (F.gelu, "gelu", []),
    "gelu by tanh": (lambda y: F.gelu(y, approximate="tanh"), "gelu_tanh", []),
    "silu": (F.silu, "silu", []),
    "hardswish": (F.hardswish, "hardswish", []),
    "tanh": (torch.tanh, "tanh", []),
    "leaky relu": (lambda y: F.leaky_relu(y, 0.25), "leaky_relu", [0.25]),
    "relu6": (F.relu6, "clamp", [0.0, 6.0]),
}


def fusion_of(gm: Any) -> dict[str, Any]:
    (layer,) = (m for m in gm.modules() if isinstance(m, FusedLayer))
    return vars(layer.graphq_form)


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("format", ["uint8", "int8"])
def test_what_follows_is_in_the_kernel(name: str, format: str) -> None:
    end, activation, numbers = ENDS[name]
    grid = Grid(format, zero_point=110 if format == "uint8" else None)
    gm = graph_of(Net(lambda net, x: grid.codes(end(net.w.linear(grid(x)))), grid=grid, w=Weight(12, 8)), X)
    made = changed(gm, FuseLinear(), 1, X)
    found = fusion_of(made)
    assert (found["input"], found["output"]) == (format, format)
    assert (found["activation"], found["numbers"]) == (activation, numbers)
    assert_codes_within_a_step(outputs(made, X)[0], outputs(gm, X)[0], 0.02)


@pytest.mark.parametrize("name", ENDS)
def test_floats_come_out_where_nothing_quantizes(name: str) -> None:
    end, activation, _ = ENDS[name]
    gm = graph_of(Net(lambda net, x: end(net.w.linear(net.a(x))), w=Weight(12, 8)), X)
    made = changed(gm, FuseLinear(), 1, X)
    assert (fusion_of(made)["output"], fusion_of(made)["activation"]) == (None, activation)
    found, expected = outputs(made, X)[0], outputs(gm, X)[0]
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 4, 8)])
def test_inputs_of_any_rank(shape: tuple[int, ...]) -> None:
    x = floats(*shape)
    gm = graph_of(Net(lambda net, x: net.c.codes(net.w.linear(net.a(x))), w=Weight(12, 8)), x)
    made = changed(gm, FuseLinear(), 1, x)
    assert_codes_within_a_step(outputs(made, x)[0], outputs(gm, x)[0], 0.02)


def test_a_linear_that_is_called_twice_stays_one() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        w = net.w.value()
        return net.c.codes(F.linear(net.b(F.linear(net.a(x), w).relu()), w, net.w.bias).relu())

    gm = graph_of(Net(body, w=Weight(8, 8)), X)
    made = changed(gm, FuseLinear(), 2, X)
    assert [n.target for n in made.graph.nodes if n.op == "call_module"] == ["w", "w"]
    assert_codes_within_a_step(outputs(made, X)[0], outputs(gm, X)[0], 0.02)


@pytest.mark.parametrize("format", ["uint8", "int8"])
def test_a_computed_bias_is_an_argument(format: str) -> None:
    """Also of signed codes that give floats, whose own module holds its bias."""
    grid = Grid(format, zero_point=110 if format == "uint8" else None)

    def body(net: Any, x: Tensor) -> Tensor:
        return F.linear(net.grid(x), net.w.value(), net.w.bias * x.amax())

    gm = graph_of(Net(body, grid=grid, w=Weight(12, 8)), X)
    made = changed(gm, FuseLinear(), 1, X)
    found, expected = outputs(made, X)[0], outputs(gm, X)[0]
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


# -- near misses: the linear is one of codes, and what follows stays outside -------------------------------------------


def two_readers(net: Any, y: Tensor) -> Any:
    return net.c.codes(y), y.sum()


HALF_MISSES: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "two readers": (two_readers, "none"),
    "two readers of what gelu gives": (lambda net, y: two_readers(net, F.gelu(y)), "gelu"),
    "another activation": (lambda net, y: net.c.codes(F.softplus(y)), "none"),
    "codes of 16 bits": (lambda net, y: Grid("uint16", 0.001, 9000)(y), "none"),
    "a scale from run time": (
        lambda net, y: ops.quantize(y, ops.choose_scale(y, "int8", [-1] * 3)[0], None, None, "int8", [-1] * 3),
        "none",
    ),
    "a sum": (lambda net, y: net.c.codes(y + y.detach().flip(0)), "none"),
}


@pytest.mark.parametrize("name", HALF_MISSES)
def test_what_cannot_follow_in_the_kernel(name: str) -> None:
    end, activation = HALF_MISSES[name]
    gm = graph_of(Net(lambda net, x: end(net, net.w.linear(net.a(x))), w=Weight(12, 8)), X)
    made = changed(gm, FuseLinear(), 1, X)
    assert (fusion_of(made)["output"], fusion_of(made)["activation"]) == (None, activation)
    for ours, theirs in zip(outputs(made, X), outputs(gm, X), strict=True):
        assert (ours.double() - theirs.double()).abs().max() <= (1 if not ours.is_floating_point() else 1e-4)


# -- near misses: no linear of codes -----------------------------------------------------------------------------------


def by_token(net: Any, x: Tensor) -> Tensor:
    scale, _ = ops.choose_scale(x, "int8", [1, 1, -1])
    q = ops.quantize(x, scale, None, None, "int8", [1, 1, -1])
    return net.c.codes(net.w.linear(ops.dequantize(q, scale, None, None, "int8", [1, 1, -1], torch.float32)))


def not_alike(net: Any, x: Tensor) -> Tensor:
    w, x = net.w.value(), net.a(x)
    return F.linear(x, w).relu() + F.linear(x, w).tanh()


def of_experts(net: Any, x: Tensor) -> Tensor:
    return net.c.codes(F.linear(net.a(x), net.w.value()[:4]))


MISSES: dict[str, tuple[Body, nn.Module]] = {
    "a float input": (lambda net, x: net.c.codes(net.w.linear(x)), Weight(12, 8)),
    "signed codes that give floats": (lambda net, x: net.w.linear(Grid("int8", 0.02, None)(x)), Weight(12, 8)),
    "scales by token": (by_token, Weight(12, 8)),
    "a weight with zero points": (
        lambda net, x: net.c.codes(net.w.linear(net.a(x))),
        Weight(12, 8, format="int8/asym"),
    ),
    "a weight of 4 bits": (lambda net, x: net.c.codes(net.w.linear(net.a(x))), Weight(12, 8, format="int4")),
    "a weight's scale for each input": (lambda net, x: net.c.codes(net.w.linear(net.a(x))), Weight(12, 8, axis=1)),
    "uses that are not alike": (not_alike, Weight(12, 8)),
    "rows of a weight": (of_experts, Weight(12, 8)),
    "a bias for each token": (
        lambda net, x: (
            net.c.codes(F.linear(net.a(x), net.w.value()) + x.amax(-1, keepdim=True)).float() + net.w.value().sum()
        ),
        Weight(12, 8),
    ),
    "a product of two activations": (
        lambda net, x: net.c.codes(net.a(x) @ net.w.value().t()),
        Weight(12, 8),
    ),
    "a weight that is multiplied": (lambda net, x: F.linear(net.w.value(), net.a(x)[0]), Weight(12, 8)),
}


@pytest.mark.parametrize("name", MISSES)
def test_what_is_no_linear_of_codes(name: str) -> None:
    body, weight = MISSES[name]
    changed(graph_of(Net(body, w=weight), X), FuseLinear(), 0, X)
