"""Ranges evened out between a layer's outputs and the next layer's inputs, without data.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.1,
equation 11: channel i between two weights is divided by s_i = sqrt(r1_i / r2_i), where r1 is the range of its weights
in the first and r2 in the second, so that both are sqrt(r1_i r2_i).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor, fx

from graphq.ir.channel_groups import Group, apply_factors, chosen_layers, column_magnitudes
from graphq.ir.channels import Flow, Flows
from graphq.ir.index import GraphIndex
from graphq.ir.layers import LAYER
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Op, Weighted
from graphq.passes.annotate import annotated
from graphq.passes.quantize_weights import with_weights
from graphq.state import tensor_of

CLOSE = 1e-3


@final
@dataclass(frozen=True)
class Equalize(Pass):
    """Wherever a linear or convolution feeds others through ops that keep factors, such as ReLU, its rows and their
    columns have the same largest magnitudes, channel by channel.

    rounds: how often all pairs are gone through; it ends when no factor is further from 1 than 0.1 %.
    """

    only: frozenset[str] | None = None
    rounds: int = 20
    note: Callable[[str], None] | None = None
    name: ClassVar[str] = "equalize"
    requires: ClassVar = (annotated, with_weights)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        pairs, index = self._pairs(gm), GraphIndex(gm)
        changed = set[str]()
        for _ in range(self.rounds):
            far = False
            for pair in pairs:
                found = equalizing(_row_magnitudes(gm, pair), column_magnitudes(gm, pair))
                if bool((found.log().abs() > CLOSE).any()):
                    far = True
                    apply_factors(index, pair, found, self.name)
                    assert pair.flow is not None
                    changed |= {part.fqn for part in pair.flow.produced} | {r.weight.fqn for r in pair.readers}
            if not far:
                break
        return len(changed)

    def _pairs(self, gm: fx.GraphModule) -> list[Group]:
        chosen = dict.fromkeys(chosen_layers(gm, self.only))
        flows = Flows(gm)
        found: dict[Op, Group] = {}
        for op in chosen:
            flow = flows.into(op)
            if not isinstance(flow, Flow):
                if self.note is not None:
                    self.note(f"{op.node.meta[LAYER]}: its input's channels keep their scale: {flow.reason}")
            elif isinstance(flow.producer, Weighted):
                own = tuple(reader for reader in flow.readers if reader.op in chosen)
                found[flow.producer] = Group(flow.count, flow.moved, flow.readers, own, flow)
        return list(found.values())


def equalizing(rows: Tensor, columns: Tensor) -> Tensor:
    """sqrt(r1 / r2) for each channel; 1 where either has no magnitude."""
    found = (rows / columns).sqrt()
    return torch.where((rows > 0) & (columns > 0) & found.isfinite(), found, 1.0)


def _row_magnitudes(gm: fx.GraphModule, pair: Group) -> Tensor:
    assert pair.flow is not None
    weight = pair.flow.produced[0]
    rows = pair.by_label([tensor_of(gm, weight.fqn).detach().abs()], [weight.labels], "amax")
    return torch.where(pair.moved, rows, 0.0)
