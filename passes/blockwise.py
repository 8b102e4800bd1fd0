"""Passes on one repeated block at a time, each calibrated on what the blocks in front of it give.

The graph is cut at the blocks; a part is a graph of its own, to which a pass cannot tell that it is none. Only the
activations between parts are kept, and what stands behind the last layer with a plan is never run. Deferred weights are
read for their part alone, and what became of them is set aside where the graph has a place for it. Where it has a
journal, a finished part is kept for another process, and what it gives for the parts behind it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from graphq.artifacts.activations import Activations
from graphq.artifacts.journal import Walk, journal_of
from graphq.artifacts.scratch import put_aside, set_aside, take_back
from graphq.artifacts.work_folder import ANEW
from graphq.capture.source import KEY, source_of
from graphq.data.masks import MaskedBatch, Validity, masked_batch
from graphq.errors import SpecError, TargetError
from graphq.ir import edit
from graphq.ir.layers import PLAN
from graphq.ir.part_record import PartBefore, rebuild
from graphq.ir.parts import BlockGraph, Parts
from graphq.ir.pipeline import Batches, Pass, Pipeline, fingerprint
from graphq.passes.calibrate import run_batch
from graphq.progress import in_steps
from graphq.spec.plan import PerExpert, Plan
from graphq.spec.rules import Prefix
from graphq.state import release_freed


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
        journal = journal_of(gm)
        walk = None if journal is None else journal.walk()
        seen = None
        if batches is not None:
            inputs = [_inputs(gm, batch) for batch in batches]
            if not inputs:
                raise SpecError("calibration: no batches; give at least one")
            seen = Activations(inputs, None if walk is None else walk.values(), in_memory=True)
        first, changes = (0, 0) if walk is None else _restored(parts, planned, seen, walk)
        last = planned[-1] if planned else -1
        for index in in_steps("blocks", range(first, last + 1), first):
            part = parts.extract(index)
            given = seen if index < last else None
            if given is not None and (self.prefix == "float" or index not in planned):
                _run(part, given, self.name)
            done = parts.done_with(index, part)
            before = None if walk is None else PartBefore(part.gm)
            names: dict[str, str] = {}
            count = 0
            if index in planned:
                text = fingerprint(part.gm, contents=False)
                count = sum(Pipeline(self.passes).run(part.gm, None if seen is None else _Replay(part, seen)).values())
                if given is not None and self.prefix != "float":
                    _run(part, given, self.name)
                if count and fingerprint(part.gm, contents=False) == text:
                    count = 0  # observers have come and gone
            nodes = before.record(part.gm) if before is not None and count else None
            wide = source_of(part.gm).wide - source_of(gm).wide
            if count:
                names = parts.merge(index, part)
                changes += count
            del part
            if seen is not None:
                seen.keep(names, done)
            if walk is not None and index in planned:
                told = {"count": count, "nodes": nodes, "names": names, "wide": sorted(wide)}
                walk.commit(index, partial(_record, parts, told, seen), seen)
            elif count:
                set_aside(gm, parts.merged)
        if changes:
            edit.drop_unused(gm)
        return changes


@final
class _Replay:
    """The batches of a part, as often as they are asked for."""

    def __init__(self, part: BlockGraph, seen: Activations) -> None:
        self._names = [node.name for node in part.takes]
        self._seen = seen

    def __iter__(self) -> Iterator[MaskedBatch]:
        return (self._seen.of(batch, self._names) for batch in range(len(self._seen)))

    def __len__(self) -> int:
        return len(self._seen)


def _inputs(gm: fx.GraphModule, batch: tuple[Tensor, ...]) -> dict[str, tuple[Any, Validity]]:
    """The inputs of the graph, by the names of their nodes."""
    given = masked_batch(source_of(gm), batch)
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    return dict(zip(names, zip(given, given.validity, strict=True), strict=True))


def _run(part: BlockGraph, seen: Activations, by: str) -> None:
    """``seen`` has what the part gives for each batch, too."""
    part.gm.recompile()

    def given() -> Iterator[MaskedBatch]:
        for number, batch in enumerate(_Replay(part, seen)):
            with torch.inference_mode():
                found = run_batch(part.gm, batch, number, by)
            yield found

    seen.add([node.name for node in part.gives], given())


# -- what is kept of finished blocks


def _record(parts: Parts, told: Mapping[str, Any], seen: Activations | None, place: Path) -> dict[str, Any]:
    """What ``_restored`` reads of the block that was merged last, whose tensors are written to ``place``."""
    tensors = put_aside(parts.gm, parts.merged, place) if told["count"] else {}
    release_freed()
    return {**told, "tensors": tensors, "values": None if seen is None else seen.to_json()}


def _restored(parts: Parts, planned: Sequence[int], seen: Activations | None, walk: Walk) -> tuple[int, int]:
    """What became of the blocks that another process finished stands in their places, and ``seen`` has what the last of
    them gave; how many parts need nothing more, and how many changes there were.
    """
    changes, first = 0, 0
    values: Any = None
    for index in planned:
        found = walk.restore(index)
        if found is None:
            break
        place, record = found
        if record["count"]:
            part = parts.extract(index, read=False)
            rebuild(part.gm, record["nodes"], partial(take_back, place=place, told=record["tensors"]))
            source = source_of(part.gm)
            part.gm.meta[KEY] = replace(source, wide=source.wide | frozenset(record["wide"]))
            if parts.merge(index, part) != record["names"]:
                raise TargetError(f"{place}: is a record of another graph; {ANEW}")
        values, changes, first = record["values"], changes + record["count"], index + 1
    if seen is not None and values is not None:
        seen.restore(values)
    return first, changes


def _is_planned(node: fx.Node) -> bool:
    decision = node.meta.get(PLAN)
    decisions = decision.decisions if isinstance(decision, PerExpert) else (decision,)
    return any(isinstance(d, Plan) for d in decisions)
