"""Biases that make up for the rounding of weights.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.2:
the expected error of an output, E[Wq x] - E[W x], is subtracted from its bias. Here the expectations are means over the
calibration data, as the float model has it: E[Wq x] = Wq E[x], and E[W x] is the mean output itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from graphq.ir import edit
from graphq.ir.biases import bias_of, set_bias, weight_of
from graphq.ir.choices import Choices
from graphq.ir.effect_table import channel_axis
from graphq.ir.index import GraphIndex
from graphq.ir.layers import BY, LAYER
from graphq.ir.matrices import as_matrices
from graphq.ir.pipeline import Batches, Invariant, Pass
from graphq.ir.views import Dequantize, Op, Param, view
from graphq.observers.statistics import MeanObserver
from graphq.passes.observe import observers
from graphq.passes.observe_means import (
    Correctable,
    mean_of,
    planned_layers,
    read_by,
    stored_weight,
    why_uncorrectable,
)
from graphq.state import tensor_of


def _float_weight(gm: fx.GraphModule) -> str | None:
    for uses in planned_layers(gm):
        if isinstance(stored_weight(uses[0]), Param):
            return f"{uses[0].node.meta[LAYER]} is still float"
    return None


quantized_weights = Invariant("quantized weights", _float_weight)


@final
@dataclass(frozen=True)
class CorrectBias(Pass):
    """Every layer that ``ObserveMeans`` watched has the float model's mean output for each channel, given the float
    model's inputs; its observers are gone.

    A layer without a bias gets one, ``<layer>.bias``. One bias of several uses makes up for the mean over all that they
    read, which leaves the least sum of squares of their mean errors, each use weighted by how much it reads. ``note``
    is told of each layer that is left as it is, and why; a layer that was corrected before is left without one.
    ``choices``: where what is added to each bias is kept.
    """

    note: Callable[[str], None] | None = None
    choices: Choices | None = None
    name: ClassVar[str] = "correct-bias"
    requires: ClassVar[tuple[Invariant, ...]] = (quantized_weights,)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        used: list[MeanObserver] = []
        count = 0
        index = GraphIndex(gm)
        for uses in planned_layers(gm):
            layer = str(uses[0].node.meta[LAYER])
            reason = why_uncorrectable(index, uses)
            biased = [op for op in uses if isinstance(op, Correctable)]
            if reason is None and all(self._is_corrected(op) for op in biased):
                continue
            means = [mean for op in biased for mean in (mean_of(gm, op.input_op, read_by(op)), _output(gm, op))]
            seen = [mean for mean in means if mean is not None and mean.has_observed]
            if reason is None and len(seen) < len(means):
                reason = "its means were not observed"
            if reason is None:
                self._correct(index, biased, seen[::2], seen[1::2], f"{layer}.bias")
                used += seen
                count += 1
            elif self.note is not None:
                self.note(f"{layer}: its bias is not corrected: {reason}")
        for op, observer in observers(gm):
            if any(observer is mean for mean in used):
                edit.bypass(gm, op, view(op.node.all_input_nodes[0]))
        if count:
            edit.drop_unused(gm)
        return count

    def _is_corrected(self, op: Correctable) -> bool:
        bias = bias_of(op)
        return bias is not None and self.name in bias.node.meta.get(BY, ())

    def _correct(
        self,
        index: GraphIndex,
        uses: Sequence[Correctable],
        inputs: Sequence[MeanObserver],
        outputs: Sequence[MeanObserver],
        name: str,
    ) -> None:
        gm = index.gm
        w = _dequantized(gm, stored_weight(uses[0]))
        rest = torch.zeros_like(outputs[0].total)  # of the outputs beyond the products, summed
        for op, x, y in zip(uses, inputs, outputs, strict=True):
            assert x.count == y.count, "the same batches"
            rest += y.total - product(op, w, x.total)
        old = bias_of(uses[0])
        wide = weight_of(uses[0]).val.dtype  # of the product, for which a stored weight may be cast
        dtype = tensor_of(gm, old.fqn).dtype if isinstance(old, Param) else wide
        bias = (rest / sum(int(y.count) for y in outputs)).to(dtype)
        if self.choices is not None:
            before = tensor_of(gm, old.fqn).detach().double() if isinstance(old, Param) else 0.0
            self.choices.keep(f"bias {name}", bias.double() - before)
        set_bias(index, uses, name, bias, by=self.name)


def _output(gm: fx.GraphModule, op: Correctable) -> MeanObserver | None:
    return mean_of(gm, op, channel_axis(op))


def _dequantized(gm: fx.GraphModule, weight: Op) -> Tensor:
    assert isinstance(weight, Dequantize), "quantized_weights"
    arguments = map_arg(weight.node.args, lambda node: tensor_of(gm, str(node.target)))
    return cast(Any, weight.node.target)(*cast(tuple[Any, ...], arguments))


def product(op: Correctable, w: Tensor, x: Tensor) -> Tensor:
    """The product, in float64, of a layer's weight ``w`` with a mean (or sum) of what it reads, as ``read_by`` says:
    ``[N]``.
    """
    matrices = as_matrices(w.double(), op)
    return (matrices @ x.reshape(matrices.shape[0], -1, 1)).flatten()
