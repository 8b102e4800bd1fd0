"""QDQ forms of chains in a few lines, with every grid, op and reader to choose."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphq import numerics
from graphq.capture.modules import capture_module
from graphq.ir.edit import copy_graph
from graphq.ir.pipeline import Pass
from graphq.ir.text import dump
from graphq.numerics import Scales
from graphq.runtime import ops
from tests.graphs import assert_vals


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Grid(nn.Module):
    """One scale and zero point. The default holds -2.2 to 2.9, so that both ends of what is random are cut off."""

    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, format: str = "uint8", scale: float = 0.02, zero_point: int | None = 110) -> None:
        super().__init__()
        self.format = format
        dtype = numerics.code_dtype(numerics.parse_format(format))
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero_point", None if zero_point is None else torch.tensor(zero_point, dtype=dtype))

    def codes(self, x: Tensor) -> Tensor:
        return ops.quantize(x, self.scale, self.zero_point, None, self.format, [-1] * x.dim())

    def values(self, q: Tensor) -> Tensor:
        return ops.dequantize(q, self.scale, self.zero_point, None, self.format, [-1] * q.dim(), torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.values(self.codes(x))


class Channels(nn.Module):
    """A scale for each of four channels."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.full((1, 4, 1, 1), 0.02))

    def codes(self, x: Tensor) -> Tensor:
        return ops.quantize(x, self.scale, None, None, "int8", [-1, 1, -1, -1])

    def forward(self, x: Tensor) -> Tensor:
        return ops.dequantize(self.codes(x), self.scale, None, None, "int8", [-1, 1, -1, -1], torch.float32)


class Weight(nn.Module):
    """An int8 weight by channel, or by another ``axis``, and a bias."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(
        self, *shape: int, bias: bool = True, format: str = "int8", per_channel: bool = True, axis: int = 0
    ) -> None:
        super().__init__()
        w = floats(*shape, seed=sum(shape)) / (shape[1] * 4) ** 0.5
        self.format, self.block = format, [1 if per_channel and a == axis else -1 for a in range(len(shape))]
        parsed = numerics.parse_format(format)
        scale, zero_point, _ = numerics.choose_scale(w, parsed, self.block)
        self.register_buffer("weight", numerics.quantize(w, Scales(scale, zero_point), parsed, self.block))
        self.register_buffer("weight_scale", scale)
        self.register_buffer("weight_zero_point", zero_point)
        self.bias = nn.Parameter(floats(shape[0], seed=9) / 4) if bias else None

    def value(self) -> Tensor:
        scales = (self.weight_scale, self.weight_zero_point, None)
        return ops.dequantize(self.weight, *scales, self.format, self.block, torch.float32)

    def conv(self, x: Tensor, stride: Any = 1, padding: Any = 1, dilation: Any = 1, groups: int = 1) -> Tensor:
        return F.conv2d(x, self.value(), self.bias, stride, padding, dilation, groups)

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.value(), self.bias)


class Net(nn.Module):
    """``body`` of a net with three grids ``a``, ``b``, ``c``, and the weights given by name."""

    def __init__(self, body: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.a, self.b, self.c = Grid(), Grid(scale=0.015, zero_point=0), Grid(scale=0.03, zero_point=90)
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def graph_of(net: nn.Module, x: Tensor) -> fx.GraphModule:
    return capture_module(net.eval(), x)


def changed(gm: fx.GraphModule, step: Pass, count: int, x: Tensor) -> fx.GraphModule:
    """A copy of ``gm`` after a pass that reports so many changes, of which every ``val`` is true."""
    before = dump(gm)
    made = copy_graph(gm)
    assert step.run(made) == count
    made.graph.lint()
    made.recompile()
    assert (dump(made) == before) == (count == 0)
    assert dump(gm) == before
    assert_vals(made, x)
    return made


def outputs(gm: fx.GraphModule, x: Tensor) -> Sequence[Tensor]:
    with torch.no_grad():
        return gm(x)


def assert_codes_within_a_step(found: Tensor, expected: Tensor, share: float) -> None:
    """No code is off by more than one, and no more than this share of them are off at all."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    off = (found.int() - expected.int()).abs()
    assert off.max() <= 1
    assert (off > 0).double().mean() <= share
