"""Factors and ranges of weights as ``SmoothQuant`` or ``AWQ`` chose them before, without the data they chose by."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

from torch import Tensor, fx

from graphq.errors import GraphError
from graphq.ir import edit
from graphq.ir.channel_groups import Where, apply_factors, chosen_layers, groups
from graphq.ir.choices import Choices
from graphq.ir.index import GraphIndex
from graphq.ir.layers import PLAN
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Param, Weighted
from graphq.passes.annotate import annotated
from graphq.passes.awq import clipped
from graphq.passes.quantize_weights import with_weights
from graphq.spec.folds import EVERYWHERE, Folds
from graphq.spec.plan import weight_quants
from graphq.spec.quant import Quant


@final
@dataclass(frozen=True)
class RepeatFactors(Pass):
    """The graph is what the pass that kept ``choices`` made of one like it, for the same ``only``, ``where`` and
    ``folds``.

    Raises ``GraphError`` for factors or ranges that are of another graph.
    """

    choices: Choices
    only: frozenset[str] | None = None
    where: Where = "fold"
    folds: Folds = EVERYWHERE
    name: ClassVar[str] = "repeat-factors"
    requires: ClassVar = (annotated, with_weights)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count, index = 0, GraphIndex(gm)
        for group in list(groups(gm, self.only, self.where, None, self.folds)):
            factors = self.choices.kept(group.name)
            if factors is not None:
                if tuple(factors.shape) != (group.count,) or not bool((factors > 0).all()):
                    raise GraphError(f"{group.name}: {list(factors.shape)} are no {group.count} positive factors")
                count += apply_factors(index, group, factors, self.name)
        for op in chosen_layers(gm, self.only):
            param = op.weight_op
            assert isinstance(param, Param), "chosen"
            steps = self.choices.kept(f"clip {param.fqn}")
            quant = next(iter(weight_quants(op.node.meta[PLAN])))
            if steps is not None and quant is not None:
                change = partial(_clipped, param.fqn, op, quant, steps)
                edit.set_param(gm, param.fqn, change, self.name, index.reads(param.fqn))
                count += 1
        return count


def _clipped(fqn: str, op: Weighted, quant: Quant, steps: Tensor, w: Tensor) -> Tensor:
    try:
        return clipped(w, op, quant, steps)
    except (RuntimeError, IndexError) as error:
        raise GraphError(f"clip {fqn}: {list(steps.shape)} are no ranges of a weight {list(w.shape)}") from error
