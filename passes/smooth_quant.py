"""Activations that are easier to quantize, at the weights' cost.

Xiao et al., SmoothQuant, arXiv 2211.10438, equation 4: each channel j of an input is divided by
s_j = max|x_j|^alpha / max|w_j|^(1 - alpha), and its weights are multiplied by it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor, fx

from graphq.ir.channel_groups import (
    Group,
    Where,
    apply_factors,
    chosen_layers,
    column_magnitudes,
    groups,
    rounding_change,
)
from graphq.ir.choices import Choices
from graphq.ir.index import GraphIndex
from graphq.ir.layers import PLAN
from graphq.ir.pipeline import Batches, Pass
from graphq.numerics.awq import output_error
from graphq.observers.observer import ObserverRequest
from graphq.observers.statistics import ChannelObserver, HessianObserver, channels, hessians, required_statistic
from graphq.passes.annotate import annotated
from graphq.passes.quantize_weights import with_weights
from graphq.spec.folds import EVERYWHERE, Folds
from graphq.spec.formats import Int
from graphq.spec.plan import input_quants
from graphq.spec.quant import PerTensor
from graphq.state import tensor_of

SMALLEST = 1e-5
ALPHAS = tuple(i / 20 for i in range(2, 20))


@final
@dataclass(frozen=True)
class SmoothQuant(Pass):
    """The inputs of the layers ``only`` (None: of all with a plan) have their channels' magnitudes evened out.

    The factors are folded into what makes the input: a norm's gain, or the rows of a linear or convolution, through
    attention, gates and repeated heads. All readers of that input share them.

    alpha: how much of the magnitude moves into the weights, from 0 to 1; ``search`` takes for each group the one of the
        least expected squared error of its outputs, of rounding weights and inputs by their plans.
    statistic: what stands for a channel: ``magnitude``, its largest; ``range``, its largest less its smallest element,
        as llm-compressor has it, against twice the weights'.
    where: ``fold`` leaves a layer alone whose factors nothing can absorb, and notes why; ``fold-or-multiply``
        multiplies its input by them at run time; ``multiply`` folds nothing (AMCT).
    folds: what they may be folded into; layers that read something else are left alone.
    choices: where the factors are kept.
    """

    only: frozenset[str] | None = None
    alpha: float | Literal["search"] = 0.5
    statistic: Literal["magnitude", "range"] = "magnitude"
    where: Where = "fold"
    folds: Folds = EVERYWHERE
    note: Callable[[str], None] | None = None
    choices: Choices | None = None
    name: ClassVar[str] = "smooth-quant"
    requires: ClassVar = (annotated, with_weights)

    def observer_requests(self, gm: fx.GraphModule) -> Iterator[ObserverRequest]:
        """The extremes of each channel of the inputs, and for a search their second moments."""
        yield from channels(gm, chosen_layers(gm, self.only))
        if self.alpha == "search":
            yield from hessians(gm, chosen_layers(gm, self.only))

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count, index = 0, GraphIndex(gm)
        for group in list(groups(gm, self.only, self.where, self.note, self.folds)):
            activations = self._activations(gm, group)
            weights = column_magnitudes(gm, group) * (2 if self.statistic == "range" else 1)
            if self.alpha == "search":
                factors = min(
                    (smoothing(activations, weights, alpha) for alpha in ALPHAS),
                    key=lambda f: expected_error(gm, group, f),
                )
            else:
                factors = smoothing(activations, weights, float(self.alpha))
            count += apply_factors(index, group, factors, self.name, self.choices)
        return count

    def _activations(self, gm: fx.GraphModule, group: Group) -> Tensor:
        found: list[Tensor] = []
        for reader in group.chosen:
            seen = required_statistic(gm, reader.op, ChannelObserver, self.name)
            assert isinstance(seen, ChannelObserver)
            found.append(seen.magnitude if self.statistic == "magnitude" else seen.high - seen.low)
        return group.by_label(found, [reader.channels for reader in group.chosen], "amax")


def smoothing(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """max|x|^alpha / max|w|^(1 - alpha) for each channel, at least 1e-5; 1 where either has no magnitude."""
    found = activations**alpha / weights ** (1 - alpha)
    usable = (activations > 0) & (weights > 0) & found.isfinite()
    return torch.where(usable, found.clamp(min=SMALLEST), 1.0)


def expected_error(gm: fx.GraphModule, group: Group, factors: Tensor) -> float:
    """The mean squared error of the outputs of the layers that decide, from rounding their weights and their inputs.

    That of the weights is tr(D H DT), D the error of the scaled weights and H the second moments of the scaled inputs;
    an input rounded in steps of d adds d^2 / 12 for each weight squared. The step of an input with one scale per tensor
    follows from its largest magnitude; of one with a scale per token, from three times the largest mean of a channel.
    """
    total = 0.0
    for reader in group.chosen:
        op = reader.op
        x = next((quant for quant in input_quants(op.node.meta[PLAN]) if quant is not None), None)
        w = tensor_of(gm, reader.weight.fqn).detach()
        scaled = (w.double() * group.at(factors, reader.weight.labels)).float()
        seen = required_statistic(gm, op, HessianObserver, "smooth-quant")
        extremes = required_statistic(gm, op, ChannelObserver, "smooth-quant")
        assert isinstance(seen, HessianObserver)
        assert isinstance(extremes, ChannelObserver)
        change = rounding_change(op, w.float(), group.at(factors, reader.weight.labels).float())
        total += float(output_error(change, seen.mean()).sum())
        if x is not None and isinstance(x.format, Int):
            per_channel = extremes.magnitude if isinstance(x.granularity, PerTensor) else 3 * extremes.mean
            step = float((per_channel.double() / group.at(factors, reader.channels)).max()) * 2 / (2**x.format.bits - 1)
            total += step**2 / 12 * float(scaled.square().sum())
    return total
