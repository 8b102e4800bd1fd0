"""A region as steps of the library of kernels, for inputs of known shapes (``graphq.runtime.regions``)."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, cast, final

import torch
from torch import Tensor, fx, nn

from graphq.runtime import ops
from graphq.runtime.experts import PackedExperts
from graphq.runtime.kernels.steps import Assembler, Buffer, Program, Spread
from graphq.runtime.modules import Int8Linear
from graphq.runtime.packed_product import PackedProduct
from graphq.runtime.regions import FLOATS, VIEWS, Region

aten: Any = torch.ops.aten
MOST_ROWS: Final = 16  # more are the work of kernels that torch calls one by one
MOST_OF_EXPERTS: Final = 2 * MOST_ROWS  # each token has a row for each of its experts


class NoSteps(Exception):  # noqa: N818 - no error
    """There are no steps for it."""


@final
@dataclass(frozen=True)
class Value:
    """A tensor: the buffer it is in, its ``shape`` there, and whether axes 1 and 2 of that are exchanged in it.

    A weight ``is_cast`` that is read as it is stored, in another dtype than the graph says.
    """

    place: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_turned: bool = False
    is_cast: bool = False


@final
@dataclass(frozen=True)
class Lowered:
    """The program of a region. ``made``: the outputs' buffers; ``outputs``: of each its buffer among them, the shape in
    which it is seen there, and whether axes 1 and 2 are exchanged.
    """

    program: Program
    made: list[tuple[tuple[int, ...], torch.dtype]]
    outputs: list[tuple[int, tuple[int, ...], bool]]


def lowered(region: Region, modules: Sequence[nn.Module], inputs: Sequence[Any]) -> Lowered:
    """The steps of a region for inputs like these. Raises ``NoSteps``."""
    maker = _Maker(dict(zip(region.modules, modules, strict=True)))
    taken: list[int] = []
    for node, given in zip(region.inputs, inputs, strict=True):
        if isinstance(given, Tensor):
            place = maker.program.buffer(Buffer(tuple(given.shape), given.dtype))
            maker.values[node] = Value(place, tuple(given.shape), given.dtype)
            taken.append(place)
        else:
            maker.values[node] = given
    for node in region.nodes:
        maker.values[node] = maker.made(node)
    results = [maker.tensor(node) for node in region.outputs]
    places = list(dict.fromkeys(value.place for value in results))
    if any(place in taken for place in places):
        raise NoSteps
    made = [(maker.program.buffers[place].shape, maker.program.buffers[place].dtype) for place in places]
    outputs = [(places.index(value.place), value.shape, value.is_turned) for value in results]
    return Lowered(maker.program.assembled(taken, places), made, outputs)


def spread(a: Sequence[int], b: Sequence[int]) -> Spread:
    """How contiguous ``b`` is read for each element of contiguous ``a``, to whose shape it is broadcast.

    Raises ``NoSteps`` where that has more than these runs of axes: repeated, own, repeated, own.
    """
    b = (*[1] * (len(a) - len(b)), *b)
    if len(b) != len(a) or any(j not in (1, i) for i, j in zip(a, b, strict=True)):
        raise NoSteps
    runs: list[tuple[bool, int]] = []
    for i, j in zip(a, b, strict=True):
        if i != 1:
            is_own = j != 1
            if runs and runs[-1][0] == is_own:
                runs[-1] = (is_own, runs[-1][1] * i)
            else:
                runs.append((is_own, i))
    sizes = [1, 1, 1, 1]
    at = 0
    for is_own, size in runs:
        at += at % 2 != is_own
        if at > 3:
            raise NoSteps
        sizes[at] = size
        at += 1
    repeated, own, inner, last = sizes
    if own == last == 1:
        return Spread(1, 1, repeated * inner, t2=0)
    if last == inner == 1:
        return Spread(repeated, 1, own)
    if last == 1:
        return Spread(repeated * own, 1, inner, own, 1, 0, 0)
    return Spread(repeated * own, inner, last, own, last, 0, 1)


@final
class _Maker:
    """Makes steps of nodes, one after another."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.program = Assembler()
        self.modules = modules
        self.most = MOST_OF_EXPERTS if any(isinstance(m, PackedExperts) for m in modules.values()) else MOST_ROWS
        self.values: dict[fx.Node, Any] = {}

    def tensor(self, node: Any) -> Value:
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        if not isinstance(value, Value) or value.is_cast:
            raise NoSteps
        return value

    def number(self, node: Any) -> Any:
        return self.values[node] if isinstance(node, fx.Node) else node

    def made(self, node: fx.Node) -> Any:
        """What a node gives: a value, or several. Raises ``NoSteps``."""
        args = node.args
        if node.op == "call_module":
            return self.linear(self.modules[str(node.target)], args)
        target: Any = node.target
        if target is operator.getitem:
            return self.values[cast(fx.Node, args[0])][cast(int, args[1])]
        if target is aten.linear.default:
            return self.plain_linear(*args)
        if target is aten._to_copy.default:
            return self.cast(cast(fx.Node, args[0]), cast(torch.dtype, node.kwargs["dtype"]))
        if target in _BINARY:
            return self.binary(_BINARY[target], args[0], args[1])
        x = self.numbers(args[0])
        if target in _UNARY:
            return self.unary(_UNARY[target], x, x.dtype)
        if target in VIEWS:
            return self.viewed(x, cast(Sequence[Any], args[1]))
        return _MADE[target](self, x, *args[1:])

    def numbers(self, node: Any) -> Value:
        value = self.tensor(node)
        if value.dtype not in FLOATS or not prod(value.shape):
            raise NoSteps
        return value

    def rows(self, x: Value) -> Value:
        """``x`` where its last axis is one of rows that lie one after another. Raises ``NoSteps`` otherwise."""
        if x.is_turned or not x.shape or prod(x.shape[:-1]) > self.most:
            raise NoSteps
        return x

    # -- linears --
    def linear(self, module: nn.Module, args: Sequence[Any]) -> Value:
        assert isinstance(module, PackedProduct | Int8Linear), "what regions have"
        taken = [None if a is None else self.tensor(a) for a in args]
        offsets = taken.pop(1) if isinstance(module, PackedExperts) else None
        x, scale, zero = (*taken, *[None] * (3 - len(taken)))
        assert x is not None, "an argument"
        x, dtype = self.rows(x), module.graphq_form.dtype
        product, is_code = module.product(zero is not None), scale is not None
        if product is None or dtype not in FLOATS or x.shape[-1] != product.k or (x.dtype == torch.int8) != is_code:
            raise NoSteps
        if is_code != product.takes_codes or (not is_code and x.dtype not in FLOATS):
            raise NoSteps
        count = prod(x.shape[:-1])
        for part, wanted in ((scale, torch.float32), (zero, torch.int8)):
            if part is not None and (part.dtype != wanted or prod(part.shape) != count):
                raise NoSteps
        places = [-1 if part is None else part.place for part in (scale, zero)]
        out = Buffer((*x.shape[:-1], product.n), dtype)
        if offsets is None:
            return self.value(self.program.packed(product, x.place, places[0], places[1], out))
        is_cut = offsets.dtype in (torch.int32, torch.int64) and offsets.shape == (product.experts,)
        if not is_cut or len(x.shape) != 2:
            raise NoSteps
        return self.value(self.program.packed(product, x.place, places[0], places[1], out, offsets.place))

    def plain_linear(self, input: Any, weight: Any, bias: Any = None) -> Value:
        x, w = self.rows(self.numbers(input)), self.values.get(weight)
        b = None if bias is None else self.numbers(bias)
        if not isinstance(w, Value) or w.dtype not in FLOATS or len(w.shape) != 2 or w.shape[1] != x.shape[-1]:
            raise NoSteps
        is_same = w.dtype == x.dtype or (w.is_cast and x.dtype == torch.float32)
        if not is_same or (b is not None and (b.shape != w.shape[:1] or b.dtype != x.dtype)):
            raise NoSteps
        out = Buffer((*x.shape[:-1], w.shape[0]), x.dtype)
        return self.value(self.program.plain(x.place, w.place, -1 if b is None else b.place, out))

    def quantize(self, x: Value, format: str, block: Sequence[int]) -> tuple[Value, Value, Value]:
        is_whole = all(b == -1 for b in block)
        is_known = format in ("int8", "int8/half", "int8/by_sign", "int8/asym", "int8/asym/joint")
        if not is_known or not (is_whole or list(block) == [*[1] * (len(x.shape) - 1), -1]):
            raise NoSteps
        made = self.program.quantize(x.place, self.rows(x).shape, format, is_whole)
        return self.value(made[0]), self.value(made[1]), self.value(made[2])

    # -- numbers --
    def value(self, place: int, like: Value | None = None) -> Value:
        held = self.program.buffers[place]
        return Value(place, held.shape, held.dtype, like is not None and like.is_turned)

    def unary(self, name: str, x: Value, dtype: torch.dtype) -> Value:
        return self.value(self.program.unary(name, x.place, Buffer(x.shape, dtype)), x)

    def cast(self, node: fx.Node, dtype: torch.dtype) -> Value:
        x = self.numbers(node)
        if node.op == "get_attr":
            if (x.dtype, dtype) != (torch.bfloat16, torch.float32):  # other numbers than those that are stored
                raise NoSteps
            return Value(x.place, x.shape, x.dtype, is_cast=True)
        return x if x.dtype == dtype else self.unary("copy", x, dtype)

    def binary(self, name: str, first: Any, second: Any) -> Value:
        a = self.numbers(first)
        if not isinstance(second, fx.Node) or not isinstance(self.values[second], Value):
            other = self.number(second)
            if isinstance(other, bool) or not isinstance(other, int | float):
                raise NoSteps
            return self.scalar(name, a, float(other))
        b = self.numbers(second)
        if name != "sub" and (len(b.shape), prod(b.shape)) > (len(a.shape), prod(a.shape)):
            a, b = b, a
        return self.two(name, a, b)

    def scalar(self, name: str, a: Value, b: float) -> Value:
        if name != "mul":  # as torch does
            b = float(torch.tensor(b, dtype=a.dtype))
        how = Spread(1, 1, prod(a.shape), t2=0)
        return self.value(self.program.binary(name, a.place, b, how, Buffer(a.shape, a.dtype)), a)

    def two(self, name: str, a: Value, b: Value) -> Value:
        dtype = torch.promote_types(a.dtype, b.dtype) if a.shape and b.shape else a.dtype
        how = spread(a.shape, b.shape if a.is_turned == b.is_turned else _turned(b.shape))
        return self.value(self.program.binary(name, a.place, b.place, how, Buffer(a.shape, dtype)), a)

    def viewed(self, x: Value, sizes: Sequence[Any]) -> Value:
        wanted = [self.number(size) for size in sizes]
        if x.is_turned or not all(type(size) is int for size in wanted):
            raise NoSteps
        if -1 in wanted:
            rest = -prod(wanted)
            wanted[wanted.index(-1)] = prod(x.shape) // rest if rest > 0 else -1
        if prod(wanted) != prod(x.shape) or min(wanted, default=1) < 1:
            raise NoSteps
        return Value(x.place, tuple(wanted), x.dtype)

    def turned(self, x: Value, *axes: Any) -> Value:
        if len(x.shape) != 4:
            raise NoSteps
        shape = x.shape
        if 1 in shape[1:3]:  # the same memory in both orders
            return Value(x.place, (shape[0], shape[2], shape[1], shape[3]), x.dtype, x.is_turned)
        return Value(x.place, shape, x.dtype, not x.is_turned)

    def mean(self, x: Value, *axes: Any) -> Value:
        return self.value(self.program.mean(x.place, x.shape[-1], Buffer((*x.shape[:-1], 1), x.dtype)), x)

    def roll(self, x: Value, shifts: Sequence[Any], *axes: Any) -> Value:
        return self.value(self.program.roll(x.place, int(shifts[0]), Buffer(x.shape, x.dtype)), x)

    def rms_norm(self, x: Value, shape: Any, weight: Any = None, eps: float | None = None) -> Value:
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        if x.dtype != torch.float32:  # in which it is computed, and rounded once
            raise NoSteps
        return self.normed(x, x, shape, weight, eps)

    def layer_norm(
        self, x: Value, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *unused: Any
    ) -> Value:
        if x.dtype != torch.float32:
            raise NoSteps
        centred = self.two("sub", x, self.mean(x))
        y = self.normed(centred, centred, shape, weight, eps)
        return y if bias is None else self.two("add", y, self.numbers(bias))

    def normed(self, x: Value, measured: Value, shape: Any, weight: Any, eps: float) -> Value:
        """``x`` by the root mean square of what is ``measured``, times the weight."""
        if list(shape) != [x.shape[-1]]:
            raise NoSteps
        raised = self.scalar("add", self.mean(self.unary("square", measured, x.dtype)), eps)
        y = self.two("mul", x, self.unary("rsqrt", raised, x.dtype))
        return y if weight is None else self.two("mul", y, self.numbers(weight))


def _turned(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what four axes are when 1 and 2 are exchanged, and the memory stays as it is. Raises ``NoSteps``."""
    shape = (*[1] * (4 - len(shape)), *shape)
    if len(shape) != 4 or 1 not in shape[1:3]:
        raise NoSteps
    return (shape[0], shape[2], shape[1], shape[3])


_BINARY: Final[Mapping[Any, str]] = {aten.add.Tensor: "add", aten.sub.Tensor: "sub", aten.mul.Tensor: "mul"}
_UNARY: Final[Mapping[Any, str]] = {
    aten.pow.Tensor_Scalar: "square",
    aten.rsqrt.default: "rsqrt",
    aten.neg.default: "neg",
    aten.relu.default: "relu",
    aten.sigmoid.default: "sigmoid",
    aten.silu.default: "silu",
    aten.gelu.default: "gelu_tanh",
}
_MADE: Final[Mapping[Any, Callable[..., Any]]] = {
    aten.mean.dim: _Maker.mean,
    aten.roll.default: _Maker.roll,
    aten.transpose.int: _Maker.turned,
    aten.rms_norm.default: _Maker.rms_norm,
    aten.layer_norm.default: _Maker.layer_norm,
    ops.quantize_dynamic: _Maker.quantize,
}
