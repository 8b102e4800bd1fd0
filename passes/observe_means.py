"""Observers of mean inputs and outputs, for layers whose biases will make up for the rounding of their weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, final

from torch import fx

from graphq.capture.source import SHARED
from graphq.ir.biases import channels_of, why_no_bias
from graphq.ir.effect_table import channel_axis
from graphq.ir.index import GraphIndex
from graphq.ir.layers import LAYER, PLAN
from graphq.ir.pipeline import Batches, Invariant, Pass
from graphq.ir.views import (
    Cast,
    Convolution,
    ConvTranspose,
    Linear,
    Op,
    Param,
    Recurrence,
    TransposedLinear,
    Weighted,
    ops_of,
)
from graphq.numerics.taps import TransposedWindow, Window, transposed_window, window
from graphq.observers.observer import ObserverRequest
from graphq.observers.statistics import MeanObserver
from graphq.passes.annotate import annotated
from graphq.passes.observe import add_observers, observer_of
from graphq.spec.plan import weight_quants

Correctable = Linear | TransposedLinear | Convolution | ConvTranspose


@final
@dataclass(frozen=True)
class ObserveMeans(Pass):
    """The mean input and the mean output of every layer with a planned weight that can be given another bias are
    observed, while the weight is float. Layers that read one input alike share its observer.
    """

    name: ClassVar[str] = "observe-means"
    requires: ClassVar[tuple[Invariant, ...]] = (annotated,)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        wanted: dict[tuple[Op, int | Window | TransposedWindow], list[Correctable]] = {}
        index = GraphIndex(gm)
        for uses in planned_layers(gm):
            if isinstance(stored_weight(uses[0]), Param) and why_uncorrectable(index, uses) is None:
                for op in uses:
                    assert isinstance(op, Correctable), "asked for"
                    wanted.setdefault((op.input_op, read_by(op)), []).append(op)
                    wanted.setdefault((op, channel_axis(op)), []).append(op)
        made: list[ObserverRequest] = []
        for (x, of), readers in wanted.items():
            if mean_of(gm, x, of) is not None:
                continue
            layers = tuple(dict.fromkeys(str(op.node.meta[LAYER]) for op in readers))
            role = "output" if x == readers[0] else "input"
            observer = MeanObserver(layers, of, _shape(readers[0], of, role), role)
            made.append(ObserverRequest(x, observer, readers[0]))
        add_observers(gm, made, by=self.name)
        return len(made)


def planned_layers(gm: fx.GraphModule) -> list[list[Weighted]]:
    """The uses of each layer with a planned weight, whether it is quantized already or not.

    In a part of a graph these are its own: a weight that other parts read, too, is quantized, and its bias corrected,
    in the whole.
    """
    found: dict[Op | str, list[Weighted]] = {}
    for op in ops_of(gm):
        if isinstance(op, Weighted) and any(weight_quants(op.node.meta.get(PLAN))):
            weight = stored_weight(op)
            if isinstance(weight, Param) and weight.fqn in gm.meta.get(SHARED, ()):
                continue
            found.setdefault(weight.fqn if isinstance(weight, Param) else weight, []).append(op)
    return list(found.values())


def stored_weight(op: Weighted) -> Op:
    """The weight that an op multiplies by, seen through casts."""
    weight = op.weight_op
    while isinstance(weight, Cast):
        weight = weight.self_
    return weight


_ADDS_NONE: Final = "it adds no bias"


def why_uncorrectable(index: GraphIndex, uses: Sequence[Weighted]) -> str | None:
    """None where a layer with these uses can be given another bias, else the reason."""
    biased = [op for op in uses if isinstance(op, Correctable)]
    if any(isinstance(op, Recurrence) for op in uses):
        return "its output is inside of a recurrence"
    return why_no_bias(index, biased) if len(biased) == len(uses) else _ADDS_NONE


def read_by(op: Correctable) -> int | Window | TransposedWindow:
    """What of its input decides a layer's mean output: the mean of each feature, or of each tap of a convolution."""
    if isinstance(op, Linear | TransposedLinear):
        return -1
    kernel = [int(size) for size in op.weight.val.shape[2:]]
    stride, padding, dilation = (op.argument(name) for name in ("stride", "padding", "dilation"))
    if isinstance(op, ConvTranspose):
        return transposed_window(kernel, stride, padding, op.argument("output_padding"), dilation)
    return window(kernel, stride, padding, dilation)


def mean_of(gm: fx.GraphModule, x: Op, of: int | Window | TransposedWindow) -> MeanObserver | None:
    """The observer of this mean of ``x``."""
    for user in x.users:
        found = observer_of(gm, user)
        if isinstance(found, MeanObserver) and found.of == of:
            return found
    return None


def _shape(op: Correctable, of: int | Window | TransposedWindow, role: str) -> list[int]:
    if role == "output":
        return [channels_of(op)]
    channels = int(op.input_op.val.shape[op.input_axis])
    return [channels] if isinstance(of, int) else [channels, *of.kernel]
