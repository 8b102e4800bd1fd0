"""Float parameters as artifacts will hold them, before anything is chosen or calibrated on top of them.

What a fold makes of a gain, a bias or an embedding is a float32 number, and a bfloat16 checkpoint stores it rounded.
Rounded here, the graph that scales are chosen for, and whose errors GPTQ makes up for, is what every target stores.
"""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch
from torch import Tensor, fx

from graphq.capture.source import source_of, stored_dtype
from graphq.errors import GraphError
from graphq.ir import edit
from graphq.ir.layers import BY, PLAN, sites
from graphq.ir.pipeline import Batches, Pass
from graphq.passes.annotate import annotated
from graphq.spec.plan import weight_quants
from graphq.state import deferred_of, held_tensor


@final
@dataclass(frozen=True)
class RoundToStored(Pass):
    """Every parameter that a pass changed and that stays float holds numbers of the dtype that it is stored in.

    Weights that are planned to be quantized are left as they are: their codes are stored. Of a stack the experts that
    stay float are rounded. A graph without data is left as it is. Raises ``GraphError`` naming the parameter whose
    numbers are too large for the dtype.
    """

    name: ClassVar[str] = "round-to-stored"
    requires: ClassVar = (annotated,)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        source = source_of(gm)
        if source.stored is None or not edit.has_data(gm):
            return 0
        plans = {site.param.fqn: weight_quants(site.op.node.meta.get(PLAN)) for site in sites(gm)}
        count = 0
        for fqn, reads in _changed(gm).items():
            tensor = held_tensor(gm, fqn)
            dtype = stored_dtype(source, fqn, tensor)
            kept = [i for i, quant in enumerate(plans.get(fqn, (None,))) if quant is None]
            if dtype == tensor.dtype or not kept:
                continue
            whole = fqn not in plans or len(kept) == len(plans[fqn])
            made = partial(_rounded, fqn, dtype, None if whole else kept)
            if (deferred := deferred_of(tensor)) is not None:
                is_changed = deferred.dtypes() != frozenset({dtype})
            else:
                is_changed = not torch.equal(made(tensor.detach()), tensor)
            if is_changed:
                edit.set_param(gm, fqn, made, self.name, reads)
                count += 1
        return count


def _rounded(fqn: str, dtype: torch.dtype, members: list[int] | None, x: Tensor) -> Tensor:
    made = rounded(x, dtype, members)
    if bool((made.isinf() & x.isfinite()).any()):
        largest, name = float(x.abs().max()), str(dtype).removeprefix("torch.")
        raise GraphError(
            f"{fqn}: {largest:g} is too large for {name}, which the source's parameters are stored in; compile"
            " with dtype=torch.float32, which stores them in float32"
        )
    return made


def _changed(gm: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The tensors that passes made or changed, each with the nodes that are it."""
    reads: dict[str, list[fx.Node]] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        reads.setdefault(str(node.target), []).append(node)
    return {fqn: nodes for fqn, nodes in reads.items() if any(node.meta.get(BY) for node in nodes)}


def rounded(x: Tensor, dtype: torch.dtype, members: list[int] | None = None) -> Tensor:
    """``x`` with numbers of ``dtype``, in its own dtype; ``members``: only these along the first axis."""
    if members is None:
        return x.to(dtype).to(x.dtype)
    made = x.clone()
    made[members] = x[members].to(dtype).to(x.dtype)
    return made
