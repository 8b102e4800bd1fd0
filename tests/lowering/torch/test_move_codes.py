"""Ops that move elements run on codes: which do, which do not, and that the codes are the same bits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor

from graphq.ir.text import dump
from graphq.lowering.torch.move_codes import MoveCodes
from graphq.runtime import ops
from tests.lowering.torch.chain_graphs import Channels, Grid, Net, changed, floats, graph_of, outputs

X = floats(2, 4, 8, 6)
Body = Callable[[Any, Tensor], Any]


def same(move: Callable[[Tensor], Tensor]) -> Body:
    """Codes on a grid, moved as values, on the same grid again."""
    return lambda net, x: net.a.codes(move(net.a(x)))


def test_golden() -> None:
    def body(net: Any, x: Tensor) -> Tensor:
        x = net.a(F.max_pool2d(net.a(x), 3, 2, 1))
        return net.a.codes(torch.cat([x, x], 1).flatten(1))

    gm = graph_of(Net(body), X)
    made = changed(gm, MoveCodes(), 2, X)
    assert_expected_inline(
        dump(made),
        """\
%x: f32[batch, 4, 8, 6] = input
%1: u8[batch, 4, 8, 6] = graphq.quantize(%x, @a.scale, @a.zero_point, None, 'uint8', [-1, -1, -1, -1])
%2: u8[batch, 4, 4, 3] = graphq.max_pool2d(%1, [3, 3], [2, 2], [1, 1], [1, 1], False)
%3: u8[batch, 8, 4, 3] = aten.cat([%2, %2], 1)
%4: u8[batch, 96] = aten.flatten.using_ints(%3, 1)
return [%4]
""",
    )
    assert torch.equal(outputs(made, X)[0], outputs(gm, X)[0])


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda x: x,
    "flatten": lambda x: x.flatten(1),
    "reshape": lambda x: x.reshape(x.shape[0], -1, 6),
    "view": lambda x: x.view(x.shape[0], 8, -1),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, 2),
    "slice": lambda x: x[:, 1:3],
    "select": lambda x: x[:, 1],
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "expand": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "repeat": lambda x: x.repeat(1, 2, 1, 1),
    "flip": lambda x: x.flip(1),
    "roll": lambda x: x.roll(1, 1),
    "a part": lambda x: x.chunk(2, 1)[1],
    "parts in another order": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "cat": lambda x: torch.cat([x, x.flip(2)], 1),
    "stack of rows": lambda x: x.index_select(1, torch.tensor([2, 0])),
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max pool of pairs": lambda x: F.max_pool2d(x, (3, 2), (2, 1), (1, 0), (1, 2), True),
    "max pool by its size": lambda x: F.max_pool2d(x, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
}


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("format", ["uint8", "int8", "int8/asym"])
def test_moved_codes_are_the_codes_of_moved_values(name: str, format: str) -> None:
    grid = Grid(format, 0.02, {"uint8": 110, "int8": None, "int8/asym": -20}[format])
    gm = graph_of(Net(lambda net, x: grid.codes(MOVES[name](grid(x))), grid=grid), X)
    made = changed(gm, MoveCodes(), 0 if name == "nearest" and format != "uint8" else 1, X)
    found, expected = outputs(made, X)[0], outputs(gm, X)[0]
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype


def test_values_that_are_read_as_floats_too() -> None:
    def body(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = net.a(x).flatten(1)
        return net.a.codes(y), y

    gm = graph_of(Net(body), X)
    made = changed(gm, MoveCodes(), 1, X)
    assert all(map(torch.equal, outputs(made, X), outputs(gm, X)))


def test_codes_of_every_value_come_back() -> None:
    """What makes the pass exact: a code's value, rounded to float32, is quantized to the code."""
    every = torch.arange(256, dtype=torch.uint8)
    for scale in (2.0**-99, 1e-20, 0.1, 1 / 3, 0.0123, 1e20, 2.0**99):
        for zero_point in (0, 1, 128, 255):
            grid = Grid("uint8", scale, zero_point)
            assert torch.equal(grid.codes(grid.values(every)), every)


def padded(net: Any, x: Tensor) -> Tensor:
    return net.a.codes(F.pad(net.a(x), (1, 1)))


MISSES: dict[str, Body] = {
    "another scale": lambda net, x: net.b.codes(net.a(x).flatten(1)),
    "another zero point": lambda net, x: ops.quantize(
        net.a(x).flip(1), net.a.scale, net.b.zero_point, None, "uint8", [-1] * 4
    ),
    "another format": lambda net, x: ops.quantize(net.a(x).flip(1), net.a.scale, None, None, "int8", [-1] * 4),
    "values of no codes": lambda net, x: net.a.codes(x.flatten(1)),
    "an op that computes": lambda net, x: net.a.codes(net.a(x) * 1.0),
    "a mean": lambda net, x: net.a.codes(F.avg_pool2d(net.a(x), 2)),
    "between neighbours": lambda net, x: net.a.codes(F.interpolate(net.a(x), scale_factor=2, mode="bilinear")),
    "a constant beside them": padded,
    "one operand of floats": lambda net, x: net.a.codes(torch.cat([net.a(x), x], 1)),
    "one operand of another scale": lambda net, x: net.a.codes(torch.cat([net.a(x), net.b(x)], 1)),
    "a scale for each channel": lambda net, x: net.channels.codes(net.channels(x).flip(0)),
    "16 bits": lambda net, x: net.wide.codes(net.wide(x).flip(1)),
    "a pool of a picture without a batch": lambda net, x: net.a.codes(F.max_pool2d(net.a(x[0]), 2)),
    "a pool along one axis": lambda net, x: net.a.codes(F.max_pool1d(net.a(x[:, :, 0]), 2)),
    "a scale whose values are lost": lambda net, x: net.tiny.codes(net.tiny(x).flip(1)),
}


@pytest.mark.parametrize("name", MISSES)
def test_what_does_not_run_on_codes(name: str) -> None:
    changed(
        graph_of(Net(MISSES[name], tiny=Grid(scale=1e-40), wide=Grid("uint16", 0.001, 9000), channels=Channels()), X),
        MoveCodes(),
        0,
        X,
    )
