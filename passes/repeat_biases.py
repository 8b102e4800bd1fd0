"""Biases as ``CorrectBias`` corrected them before, without the data that it took the means of."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import fx

from graphq.errors import GraphError
from graphq.ir.biases import bias_of, channels_of, set_bias, weight_of
from graphq.ir.choices import Choices
from graphq.ir.index import GraphIndex
from graphq.ir.layers import BY, LAYER
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Param
from graphq.passes.observe_means import Correctable, planned_layers, why_uncorrectable
from graphq.state import tensor_of


@final
@dataclass(frozen=True)
class RepeatBiases(Pass):
    """What ``choices`` holds for a layer is added to its bias, once, as the pass did that kept it.

    Raises ``GraphError`` for what is of another layer.
    """

    choices: Choices
    name: ClassVar[str] = "repeat-biases"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count, index = 0, GraphIndex(gm)
        for uses in planned_layers(gm):
            name = f"{uses[0].node.meta[LAYER]}.bias"
            added = self.choices.kept(f"bias {name}")
            biased = [op for op in uses if isinstance(op, Correctable)]
            if added is None or why_uncorrectable(index, uses) is not None:
                continue
            if tuple(added.shape) != (channels_of(biased[0]),):
                raise GraphError(f"bias {name}: {list(added.shape)} are not {channels_of(biased[0])} numbers")
            old = bias_of(biased[0])
            if old is not None and self.name in old.node.meta.get(BY, ()):
                continue
            if isinstance(old, Param):
                before = tensor_of(gm, old.fqn).detach()
                made = (before.double() + added).to(before.dtype)
            else:
                made = added.to(weight_of(biased[0]).val.dtype)
            set_bias(index, biased, name, made, by=self.name)
            count += 1
        return count
