"""Observers of what algorithms need to know of a layer's input: extremes by channel, and second moments."""

from collections.abc import Iterable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor, fx

from graphq.errors import PassError
from graphq.ir.layers import LAYER
from graphq.ir.matrices import Samples, as_matrices, input_key, input_vectors
from graphq.ir.views import Convolution, ConvTranspose, Op, Weighted
from graphq.numerics.taps import TransposedWindow, Window, tap_sums
from graphq.observers.observer import Observer, ObserverRequest


@final
class ChannelObserver(Observer):
    """The smallest and largest element, and the sum of magnitudes, of each channel of an activation."""

    low: Tensor
    high: Tensor
    total: Tensor
    count: Tensor

    def __init__(self, layers: tuple[str, ...], channels: int, axis: int) -> None:
        super().__init__(layers)
        self.axis = axis
        self.register_buffer("low", torch.full((channels,), torch.inf))
        self.register_buffer("high", torch.full((channels,), -torch.inf))
        self.register_buffer("total", torch.zeros(channels, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))

    @property
    def has_observed(self) -> bool:
        return bool(self.count)

    def settings(self) -> tuple[object, ...]:
        return self.low.shape, self.axis

    def update(self, x: Tensor, *rest: Tensor) -> None:
        assert self.axis is not None
        rows = x.movedim(self.axis, -1).reshape(-1, x.shape[self.axis])
        total = rows.abs().sum(0, dtype=torch.float64)
        if not torch.isfinite(total).all():
            raise self.refuse()
        self.low.copy_(torch.minimum(self.low, rows.amin(0)))
        self.high.copy_(torch.maximum(self.high, rows.amax(0)))
        self.total += total
        self.count += rows.shape[0]

    def absorb(self, later: Observer) -> None:
        assert isinstance(later, ChannelObserver)
        self.low.copy_(torch.minimum(self.low, later.low))
        self.high.copy_(torch.maximum(self.high, later.high))
        self.total += later.total
        self.count += later.count

    @property
    def magnitude(self) -> Tensor:
        """The largest magnitude of each channel."""
        return torch.maximum(self.low.abs(), self.high.abs())

    @property
    def mean(self) -> Tensor:
        """The mean magnitude of each channel."""
        return (self.total / self.count).float()


@final
class MeanObserver(Observer):
    """The mean of what comes by, in float64: of each index of an axis, or of each tap of a convolution (``Window``).

    The mean product of any weight with that input is the weight's product with the mean.
    """

    total: Tensor
    count: Tensor

    def __init__(
        self, layers: tuple[str, ...], of: int | Window | TransposedWindow, shape: Sequence[int], role: str = "input"
    ) -> None:
        super().__init__(layers)
        self.of = of
        self.role = role
        self.axis = of if isinstance(of, int) else None
        self.reads_windows = self.axis is None
        self.register_buffer("total", torch.zeros(*shape, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(0))

    @property
    def has_observed(self) -> bool:
        return bool(self.count)

    def settings(self) -> tuple[object, ...]:
        return self.of, self.total.shape, self.role

    def update(self, x: Tensor, *rest: Tensor) -> None:
        if isinstance(self.of, int):
            total = x.movedim(self.of, -1).reshape(-1, x.shape[self.of]).sum(0, dtype=torch.float64)
            count = x.numel() // x.shape[self.of]
        else:
            total, count = tap_sums(x, self.of)
        if not torch.isfinite(total).all():
            raise self.refuse()
        self.total += total
        self.count += count

    def absorb(self, later: Observer) -> None:
        assert isinstance(later, MeanObserver)
        self.total += later.total
        self.count += later.count


@final
class HessianObserver(Observer):
    """``sums`` [B, K, K] of x xT over the vectors x that a weight multiplies, and their number, ``counts`` [B].

    B counts experts, or groups of a convolution; 1 for a linear.

    ``samples`` gives, for what the observer is called with, each of them that has vectors, and these [rows, K].
    """

    sums: Tensor
    counts: Tensor

    def __init__(
        self, layers: tuple[str, ...], shape: tuple[int, int], samples: Samples, reads_windows: bool = False
    ) -> None:
        super().__init__(layers)
        self.samples = samples
        self.reads_windows = reads_windows
        self.register_buffer("sums", torch.zeros(shape[0], shape[1], shape[1]))
        self.register_buffer("counts", torch.zeros(shape[0], dtype=torch.int64))

    @property
    def has_observed(self) -> bool:
        return bool(self.counts.any())

    def settings(self) -> tuple[object, ...]:
        return (self.sums.shape,)

    def update(self, x: Tensor, *rest: Tensor) -> None:
        for index, rows in self.samples(x, *rest):
            if rows.shape[0]:
                rows = rows if rows.dtype == torch.float64 else rows.float()
                self.sums[index].addmm_(rows.T.to(self.sums.dtype), rows.to(self.sums.dtype))
                self.counts[index] += rows.shape[0]
        if not torch.isfinite(self.sums.diagonal(dim1=-2, dim2=-1)).all():
            raise self.refuse()

    def absorb(self, later: Observer) -> None:
        assert isinstance(later, HessianObserver)
        self.sums += later.sums
        self.counts += later.counts

    def mean(self) -> Tensor:
        """The mean of x xT [B, K, K]; 0 where nothing was seen."""
        return self.sums / self.counts.clamp(min=1)[:, None, None]


def statistic_on(gm: fx.GraphModule, op: Weighted, kind: type[Observer]) -> Observer | None:
    """The observer of this kind of the input of ``op``."""
    for user in op.input_op.users:
        found = gm.get_submodule(str(user.node.target)) if user.node.op == "call_module" else None
        if isinstance(found, kind) and str(op.node.meta.get(LAYER)) in found.layers:
            return found
    return None


def required_statistic(gm: fx.GraphModule, op: Weighted, kind: type[Observer], by: str) -> Observer:
    """The same, which has seen data. Raises ``PassError`` where there is none."""
    found = statistic_on(gm, op, kind)
    if found is None or not found.has_observed:
        raise PassError(f"{by}: no data was seen of the input of {op.node.meta.get(LAYER)}")
    return found


def hessians(gm: fx.GraphModule, ops: Iterable[Weighted]) -> Iterator[ObserverRequest]:
    """One observer of second moments for all of ``ops`` that multiply the same vectors, where there is none."""
    made: dict[object, list[Weighted]] = {}
    for op in ops:
        if statistic_on(gm, op, HessianObserver) is None:
            made.setdefault(input_key(op), []).append(op)
    for alike in made.values():
        samples, rest = input_vectors(alike[0])
        names = tuple(dict.fromkeys(str(op.node.meta[LAYER]) for op in alike))
        problems = as_matrices(torch.empty(tuple(alike[0].weight_op.val.shape), device="meta"), alike[0])
        is_convolution = isinstance(alike[0], Convolution | ConvTranspose)
        observer = HessianObserver(names, (problems.shape[0], problems.shape[2]), samples, is_convolution)
        yield ObserverRequest(alike[0].input_op, observer, alike[0], rest)


def channels(gm: fx.GraphModule, ops: Iterable[Weighted]) -> Iterator[ObserverRequest]:
    """One observer of channels for each input of ``ops``, where there is none."""
    made: dict[tuple[Op, int], list[Weighted]] = {}
    for op in ops:
        if statistic_on(gm, op, ChannelObserver) is None:
            made.setdefault((op.input_op, op.input_axis), []).append(op)
    for (x, axis), readers in made.items():
        names = tuple(dict.fromkeys(str(op.node.meta[LAYER]) for op in readers))
        yield ObserverRequest(x, ChannelObserver(names, int(x.val.shape[axis]), axis), readers[0])
