"""Convolutions from codes to codes: what is one kernel, what is not, and that the numbers stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, nn

from graphq.ir.layers import BY
from graphq.ir.text import dump
from graphq.lowering.torch.fuse_conv import FuseConv
from graphq.runtime.fused_layers import FusedLayer
from tests.lowering.torch.chain_graphs import (
    Channels,
    Grid,
    Net,
    Weight,
    assert_codes_within_a_step,
    changed,
    floats,
    graph_of,
    outputs,
)

X = floats(2, 4, 9, 7)
Body = Callable[[Any, Any], Any]


def weights() -> dict[str, nn.Module]:
    return {"up": Weight(6, 4, 3, 3), "down": Weight(4, 6, 3, 3)}


def residual(net: Any, x: Tensor) -> Tensor:
    x = net.a(x)
    y = net.b(net.up.conv(x).relu())
    return net.c.codes((net.down.conv(y) + x).relu())


def test_golden() -> None:
    """Two convolutions in a chain, of which the second adds what the first was given."""
    made = changed(graph_of(Net(residual, **weights()), X), FuseConv(), 2, X)
    assert_expected_inline(
        dump(made),
        """\
%x: f32[batch, 4, 9, 7] = input
%1: u8[batch, 4, 9, 7] = graphq.quantize(%x, @a.scale, @a.zero_point, None, 'uint8', [-1, -1, -1, -1])
%2: u8[batch, 6, 9, 7] = @up(%1, @a.scale, @a.zero_point, @up.bias, None, None, None, @b.scale, @b.zero_point)
%3: u8[batch, 4, 9, 7] = @down(%2, @b.scale, @b.zero_point, @down.bias, %1, @a.scale, @a.zero_point, @c.scale, @c.zero_point)
%4: u8[batch, 4, 9, 7] = aten.contiguous(%3)
return [%4]
""",
    )
    assert [n.meta[BY][-1] for n in made.graph.nodes if n.op == "call_module"] == ["fuse-conv"] * 2


def test_a_residual_chain_gives_the_codes_of_the_qdq_form() -> None:
    gm = graph_of(Net(residual, **weights()), X)
    made = changed(gm, FuseConv(), 2, X)
    assert_codes_within_a_step(outputs(made, X)[0], outputs(gm, X)[0], 0.01)


# -- what is fused -----------------------------------------------------------------------------------------------------

ENDS: dict[str, tuple[Body, dict[str, Any]]] = {
    "nothing": (lambda y, net: net.c.codes(y), {}),
    "relu": (lambda y, net: net.c.codes(y.relu()), {"activation": "relu"}),
    "relu6": (lambda y, net: net.c.codes(F.relu6(y)), {"activation": "clamp", "numbers": [0.0, 6.0]}),
    "hardtanh": (lambda y, net: net.c.codes(F.hardtanh(y)), {"activation": "clamp", "numbers": [-1.0, 1.0]}),
    "clamp": (lambda y, net: net.c.codes(y.clamp(-0.5, 2)), {"activation": "clamp", "numbers": [-0.5, 2.0]}),
    "silu": (lambda y, net: net.c.codes(F.silu(y)), {"activation": "silu"}),
    "hardswish": (lambda y, net: net.c.codes(F.hardswish(y)), {"activation": "hardswish"}),
    "the sum with codes": (lambda y, net: net.c.codes(y + net.first), {"other": "uint8"}),
    "codes and the sum": (lambda y, net: net.c.codes(net.first + y), {"other": "uint8"}),
    "a sum, relu": (lambda y, net: net.c.codes((y + net.first).relu()), {"other": "uint8", "activation": "relu"}),
    "floats": (lambda y, net: y, {"output": None}),
    "floats, relu": (lambda y, net: y.relu(), {"output": None, "activation": "relu"}),
}


class OneConv(nn.Module):
    def __init__(self, end: Body, grids: tuple[Grid, Grid, Grid] | None = None, weight: Weight | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = grids or (Grid(), Grid(scale=0.015, zero_point=0), Grid(scale=0.03, zero_point=90))
        self.conv, self.channels = weight or Weight(4, 4, 3, 3), Channels()
        self.end = end

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        self.__dict__["first"] = x
        return self.end(self.conv.conv(x), self)


def fusion_of(gm: Any) -> dict[str, Any]:
    (layer,) = (m for m in gm.modules() if isinstance(m, FusedLayer))
    return vars(layer.graphq_form)


@pytest.mark.parametrize("name", ENDS)
def test_what_follows_is_in_the_kernel(name: str) -> None:
    end, settings = ENDS[name]
    gm = graph_of(OneConv(end), X)
    made = changed(gm, FuseConv(), 1, X)
    expected = {"output": "uint8", "other": None, "activation": "none", "numbers": []} | settings
    assert {key: fusion_of(made)[key] for key in expected} == expected
    found, known = outputs(made, X)[0], outputs(gm, X)[0]
    if found.dtype == torch.uint8:
        assert_codes_within_a_step(found, known, 0.01)
    else:
        assert (found - known).abs().max() <= 1e-6 * known.abs().max()
    assert found.stride() == known.stride(), "what a graph returns is laid out as before"


FORMATS = {
    "uint8": Grid(),
    "uint8/joint": Grid("uint8/joint", zero_point=111),
    "int8": Grid("int8", zero_point=None),
    "int8/half": Grid("int8/half", zero_point=None),
    "int8/asym": Grid("int8/asym", zero_point=-20),
}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("end", ["relu", "a sum, relu"])
def test_every_kind_of_codes(format: str, end: str) -> None:
    grid = FORMATS[format]
    gm = graph_of(OneConv(ENDS[end][0], (grid, grid, grid)), X)
    made = changed(gm, FuseConv(), 1, X)
    assert fusion_of(made)["input"] == fusion_of(made)["output"] == format
    assert_codes_within_a_step(outputs(made, X)[0], outputs(gm, X)[0], 0.01)


WINDOWS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "stride": ((6, 4, 3, 3), {"stride": (2, 1)}),
    "dilation": ((6, 4, 3, 2), {"dilation": (1, 2), "padding": (1, 0)}),
    "groups": ((6, 2, 3, 3), {"groups": 2}),
    "depthwise": ((4, 1, 3, 3), {"groups": 4}),
    "1x1": ((6, 4, 1, 1), {"padding": 0}),
    "no padding": ((6, 4, 3, 3), {"padding": "valid"}),
    "the same padding": ((6, 4, 3, 1), {"padding": "same"}),
    "one number": ((6, 4, 3, 3), {"stride": (2,), "padding": (1,), "dilation": (1,)}),
    "one output": ((1, 4, 3, 3), {}),
}


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_every_window(name: str, per_channel: bool) -> None:
    shape, options = WINDOWS[name]
    weight = Weight(*shape, bias=name != "stride", per_channel=per_channel)
    gm = graph_of(Net(lambda net, x: net.c.codes(net.w.conv(net.a(x), **options)), w=weight), X)
    made = changed(gm, FuseConv(), 1, X)
    assert_codes_within_a_step(outputs(made, X)[0], outputs(gm, X)[0], 0.01)


def test_a_convolution_that_is_called_twice_stays_one() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        w = net.w.value()
        y = net.b(F.conv2d(net.a(x), w, net.w.bias, padding=1).relu())
        return net.c.codes(F.conv2d(y, w, padding=1).relu())

    gm = graph_of(Net(body, w=Weight(4, 4, 3, 3)), X)
    made = changed(gm, FuseConv(), 2, X)
    assert [n.target for n in made.graph.nodes if n.op == "call_module"] == ["w", "w"]
    assert_codes_within_a_step(outputs(made, X)[0], outputs(gm, X)[0], 0.02)


def test_views_behind_it_become_reshapes() -> None:
    """What it gives lies channels last, of which there is no view as a matrix."""

    def body(net: Any, x: Tensor) -> Tensor:
        return net.w.conv(net.a(x)).view(x.shape[0], -1)

    gm = graph_of(Net(body, w=Weight(4, 4, 3, 3)), X)
    made = changed(gm, FuseConv(), 1, X)
    assert "aten.view" in dump(gm)
    assert "aten.view" not in dump(made)
    assert torch.allclose(outputs(made, X)[0], outputs(gm, X)[0], atol=1e-6)


def test_what_is_added_keeps_its_codes() -> None:
    """The kernel writes over what it adds; another that reads the same codes finds them."""

    def body(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        q = net.a.codes(x)
        return net.c.codes(net.w.conv(net.a.values(q)) + net.a.values(q)), q

    gm = graph_of(Net(body, w=Weight(4, 4, 3, 3)), X)
    made = changed(gm, FuseConv(), 1, X)
    assert torch.equal(outputs(made, X)[1], outputs(gm, X)[1])


def test_a_computed_bias_is_an_argument() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        return net.c.codes(F.conv2d(net.a(x), net.w.value(), net.w.bias * x.amax(), padding=1))

    gm = graph_of(Net(body, w=Weight(4, 4, 3, 3)), X)
    made = changed(gm, FuseConv(), 1, X)
    assert_codes_within_a_step(outputs(made, X)[0], outputs(gm, X)[0], 0.01)


# -- near misses: the convolution is one of codes, and what follows stays outside --------------------------------------


def two_readers(y: Any, net: Any) -> Any:
    return net.c.codes(y), y.sum()


def two_readers_of_relu(y: Any, net: Any) -> Any:
    y = y.relu()
    return net.c.codes(y), y.sum()


HALF_MISSES: dict[str, tuple[Body, str | None, str]] = {  # what follows, the output's format, the activation
    "two readers": (two_readers, None, "none"),
    "two readers of what relu gives": (two_readers_of_relu, None, "relu"),
    "another activation": (lambda y, net: net.c.codes(F.gelu(y)), None, "none"),
    "half a clamp": (lambda y, net: net.c.codes(y.clamp(min=-1.0)), None, "none"),
    "a clamp the wrong way round": (lambda y, net: net.c.codes(y.clamp(1.0, -1.0)), None, "none"),
    "codes of 16 bits": (lambda y, net: Grid("uint16", 0.001, 9000)(y), None, "none"),
    "a scale for each channel": (lambda y, net: net.channels.codes(y), None, "none"),
    "a sum with a broadcast row": (lambda y, net: net.c.codes(y + net.a(net.first[:1])), None, "none"),
    "a sum with floats": (lambda y, net: net.c.codes(y + net.first * 2), None, "none"),
    "a sum with a number": (lambda y, net: net.c.codes(y + 1.0), None, "none"),
    "a sum that scales": (lambda y, net: net.c.codes(torch.add(y, net.first, alpha=2)), None, "none"),
    "a difference": (lambda y, net: net.c.codes(y - net.first), None, "none"),
    "a sum with itself": (lambda y, net: net.c.codes(y + y), None, "none"),
    "a sum that stays float": (lambda y, net: y + net.first, None, "none"),
    "a sum that is read twice": (lambda y, net: two_readers(y + net.first, net), None, "none"),
    "a sum, another activation": (lambda y, net: net.c.codes(F.silu(y + net.first)), None, "none"),
    "an activation, then a sum": (lambda y, net: net.c.codes(y.relu() + net.first), None, "relu"),
}


@pytest.mark.parametrize("name", HALF_MISSES)
def test_what_cannot_follow_in_the_kernel(name: str) -> None:
    end, output, activation = HALF_MISSES[name]
    gm = graph_of(OneConv(end), X)
    made = changed(gm, FuseConv(), 1, X)
    found = fusion_of(made)
    assert (found["output"], found["other"], found["activation"]) == (output, None, activation)
    for ours, theirs in zip(outputs(made, X), outputs(gm, X), strict=True):
        assert (ours.double() - theirs.double()).abs().max() <= (1 if not ours.is_floating_point() else 1e-4)


def test_of_two_convolutions_that_are_added_one_adds() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        x = net.a(x)
        return net.c.codes((net.up.conv(x) + net.b(net.down.conv(x, padding=0))).relu())

    gm = graph_of(Net(body, up=Weight(4, 4, 3, 3), down=Weight(4, 4, 1, 1)), X)
    made = changed(gm, FuseConv(), 2, X)
    assert [m.graphq_form.other for m in made.modules() if isinstance(m, FusedLayer)] == ["uint8", None]
    assert_codes_within_a_step(outputs(made, X)[0], outputs(gm, X)[0], 0.01)


# -- near misses: no convolution of codes ------------------------------------------------------------------------------


def dynamic(net: Any, x: Tensor) -> Tensor:
    scale, _ = torch.ops.graphq.choose_scale(x, "int8", [-1] * 4)
    q = torch.ops.graphq.quantize(x, scale, None, None, "int8", [-1] * 4)
    return net.w.conv(torch.ops.graphq.dequantize(q, scale, None, None, "int8", [-1] * 4, torch.float32))


def read_twice(net: Any, x: Tensor) -> Tensor:
    w = net.w.value()
    return F.conv2d(net.a(x), w, net.w.bias, padding=1) + w.sum()


def dequantized_twice(net: Any, x: Tensor) -> Tensor:
    return net.w.conv(net.a(x)) + net.w.value().sum()


def not_alike(net: Any, x: Tensor) -> Tensor:
    w = net.w.value()
    x = net.a(x)
    return F.conv2d(x, w, padding=1).relu() + F.conv2d(x, w, padding=1).tanh()


def added_to(net: Any, x: Tensor) -> Tensor:
    """The weight is the picture."""
    return F.conv2d(net.w.value(), net.a(x)[:, :, :3, :3])


MISSES: dict[str, tuple[Body, Weight]] = {
    "a float input": (lambda net, x: net.c.codes(net.w.conv(x)), Weight(4, 4, 3, 3)),
    "a scale from run time": (dynamic, Weight(4, 4, 3, 3)),
    "an input's scale for each channel": (lambda net, x: net.w.conv(net.channels(x)), Weight(4, 4, 3, 3)),
    "a weight's scale for each of the input's channels": (
        lambda net, x: net.w.conv(net.a(x)),
        Weight(4, 4, 3, 3, axis=1),
    ),
    "16 bits": (lambda net, x: net.w.conv(Grid("uint16", 0.001, 9000)(x)), Weight(4, 4, 3, 3)),
    "a weight with zero points": (lambda net, x: net.w.conv(net.a(x)), Weight(4, 4, 3, 3, format="int8/asym")),
    "a weight of 4 bits": (lambda net, x: net.w.conv(net.a(x)), Weight(4, 4, 3, 3, format="int4")),
    "a picture without a batch": (lambda net, x: net.w.conv(net.a(x[0])), Weight(4, 4, 3, 3)),
    "transposed": (
        lambda net, x: F.conv_transpose2d(net.a(x), net.w.value(), net.w.bias),
        Weight(4, 4, 3, 3),
    ),
    "one axis": (lambda net, x: F.conv1d(net.a(x.flatten(2)), net.w.value(), net.w.bias), Weight(4, 4, 3)),
    "three axes": (lambda net, x: F.conv3d(net.a(x[:, :, None]), net.w.value(), net.w.bias), Weight(4, 4, 1, 3, 3)),
    "other padding left than right": (lambda net, x: net.w.conv(net.a(x), padding="same"), Weight(4, 4, 2, 2)),
    "the weight is read by another op": (read_twice, Weight(4, 4, 3, 3)),
    "the weight is dequantized twice": (dequantized_twice, Weight(4, 4, 3, 3)),
    "uses that are not alike": (not_alike, Weight(4, 4, 3, 3)),
    "a weight that is convolved": (added_to, Weight(4, 4, 5, 5)),
    "sums that 32 bits do not hold": (lambda net, x: net.w.conv(net.a(x), 64, padding=128), Weight(1, 4, 128, 130)),
}


@pytest.mark.parametrize("name", MISSES)
def test_what_is_no_convolution_of_codes(name: str) -> None:
    body, weight = MISSES[name]
    gm = graph_of(Net(body, w=weight, channels=Channels()), X)
    changed(gm, FuseConv(), 0, X)
