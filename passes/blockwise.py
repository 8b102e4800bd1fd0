"""Passes on one repeated block at a time, each calibrated on what the blocks in front of it give.

The graph is cut at the blocks; a part is a graph of its own, to which a pass cannot tell that it is none. Only the
activations between parts are kept, and what stands behind the last layer with a plan is never run. Deferred weights are
read for their part alone, and what became of them is set aside where the graph has a place for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from graphq.artifacts.scratch import set_aside
from graphq.capture.source import source_of
from graphq.data.masks import MaskedBatch, Validity, masked_batch
from graphq.errors import SpecError
from graphq.ir import edit
from graphq.ir.layers import PLAN
from graphq.ir.parts import BlockGraph, Parts
from graphq.ir.pipeline import Batches, Pass, Pipeline, fingerprint
from graphq.passes.calibrate import run_batch
from graphq.progress import in_steps
from graphq.spec.plan import PerExpert, Plan
from graphq.spec.rules import Prefix


@final
@dataclass(frozen=True)
class Blockwise(Pass):
    """``passes`` have been run on every part of the graph between cuts at the repeated blocks, in order.

    ``prefix``: each part sees what the changed parts in front of it give, ``quantized``, or what they gave before the
    change, ``float``. A graph whose blocks do not stand one after the other is one part.
    """

    passes: tuple[Pass, ...]
    prefix: Prefix = "quantized"
    name: ClassVar[str] = "blockwise"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        parts = Parts(gm)
        planned = [i for i, stage in enumerate(parts.stages) if any(_is_planned(node) for node in stage)]
        seen = None if batches is None else [_inputs(gm, batch) for batch in batches]
        if seen == []:
            raise SpecError("calibration: no batches; give at least one")
        changes = 0
        for index in in_steps("blocks", range(planned[-1] + 1 if planned else 0)):
            part = parts.extract(index)
            later = index < planned[-1]
            given: list[_Values] | None = None
            if seen is not None and later and (self.prefix == "float" or index not in planned):
                given = _run(part, seen, self.name)
            names: dict[str, str] = {}
            done = parts.done_with(index, part)
            if index in planned:
                inputs = None if seen is None else _Replay(part, seen)
                before = fingerprint(part.gm, contents=False)
                count = sum(Pipeline(self.passes).run(part.gm, inputs).values())
                if seen is not None and later and given is None:
                    given = _run(part, seen, self.name)
                if count and fingerprint(part.gm, contents=False) != before:  # observers may have come and gone
                    names = parts.merge(index, part)
                    changes += count
                    set_aside(gm, parts.merged)
            for values, new in zip(seen or (), given or (), strict=False):
                for name in done:
                    values.pop(name, None)
                values |= {names.get(name, name): value for name, value in new.items() if name not in done}
        if changes:
            edit.drop_unused(gm)
        return changes


_Values = dict[str, tuple[Any, Validity]]  # of a batch, by the names of their nodes


class _Replay:
    """The batches of a part, as often as they are asked for."""

    def __init__(self, part: BlockGraph, seen: Sequence[_Values]) -> None:
        self.part = part
        self.seen = seen

    def __iter__(self) -> Any:
        return iter([_arguments(self.part, values) for values in self.seen])

    def __len__(self) -> int:
        return len(self.seen)


def _arguments(part: BlockGraph, values: _Values) -> MaskedBatch:
    taken = [values[node.name] for node in part.takes]
    return MaskedBatch([value for value, _ in taken], [validity for _, validity in taken])


def _inputs(gm: fx.GraphModule, batch: tuple[Tensor, ...]) -> _Values:
    return _named([node.name for node in gm.graph.find_nodes(op="placeholder")], masked_batch(source_of(gm), batch))


def _named(names: Sequence[str], batch: MaskedBatch) -> _Values:
    return dict(zip(names, zip(batch, batch.validity, strict=True), strict=True))


def _run(part: BlockGraph, seen: Sequence[_Values], by: str) -> list[_Values]:
    """What the part gives for each batch."""
    part.gm.recompile()
    names = [node.name for node in part.gives]
    found: list[_Values] = []
    for number, values in enumerate(seen):
        with torch.inference_mode():
            found.append(_named(names, run_batch(part.gm, _arguments(part, values), number, by)))
    return found


def _is_planned(node: fx.Node) -> bool:
    decision = node.meta.get(PLAN)
    decisions = decision.decisions if isinstance(decision, PerExpert) else (decision,)
    return any(isinstance(d, Plan) for d in decisions)
