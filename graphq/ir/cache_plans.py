"""What becomes of each cache of a model: its quant and its size for a token, or why it stays float."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

from torch import fx

from graphq import numerics
from graphq.capture.source import Source, source_of
from graphq.ir.caches import Cache, caches
from graphq.spec.formats import is_asymmetric
from graphq.spec.quant import Quant

SCALE_BYTES: Final = 2  # of a scale of run time, beside the codes


@final
@dataclass(frozen=True)
class CachePlan:
    """One cache, keys or values: ``name``, the module that appends to it and its role there, or where it stays float
    that of its input. ``nbytes``: what it holds for each token, codes and scales of run time; ``float_nbytes``: as the
    source holds it.
    """

    name: str
    quant: Quant | None
    reason: str
    nbytes: int
    float_nbytes: int

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``quant`` null: it stays float, for this ``reason``."""
        return {
            "cache": self.name,
            "quant": None if self.quant is None else str(self.quant),
            "reason": self.reason,
            "bytes": self.nbytes,
            "float_bytes": self.float_nbytes,
        }


def plan_caches(gm: fx.GraphModule, quant: Quant | None) -> tuple[CachePlan, ...]:
    """What ``quant`` makes of each cache of a captured graph, in the order that they are declared in."""
    source = source_of(gm)
    declared = {one.name: one for one in source.inputs}
    found: list[CachePlan] = []
    for cache in caches(gm) if quant is not None else ():
        assert quant is not None
        if isinstance(cache, Cache):
            rank = cache.new.val.dim()
            sizes = [
                1 if a in (cache.batch_axis, cache.token_axis) else int(n) for a, n in enumerate(cache.new.val.shape)
            ]
            block = numerics.state_block(quant.granularity, quant.dynamic, rank, cache.batch_axis, cache.token_axis)
            scales = math.prod(numerics.scale_shape(sizes, block)) if quant.dynamic else 0
            elements = math.prod(sizes)
            nbytes = elements + scales * (SCALE_BYTES + is_asymmetric(quant.format))
            found.append(CachePlan(cache.name, quant, "", nbytes, elements * source.dtype.itemsize))
        else:
            name, reason = cache
            elements = math.prod(size for size in declared[name].shape if isinstance(size, int))
            size = elements * source.dtype.itemsize
            found.append(CachePlan(name, None, reason, size, size))
    return tuple(found)


def problems_of(plans: Sequence[CachePlan], quant: Quant | None) -> list[str]:
    """Lines on why no cache is quantized although it is asked for; none where one is, or none is asked for."""
    if quant is None or any(plan.quant is not None for plan in plans):
        return []
    if not plans:
        return [f"cache: {quant}: this model has no key/value cache; leave it out of the spec"]
    return [f"cache: {quant}: {plan.name}: {plan.reason}" for plan in plans]


def lines_of(plans: Iterable[CachePlan]) -> list[str]:
    """The plans as lines of text, those that are quantized alike in one."""
    alike: dict[str, list[CachePlan]] = {}
    lines: list[str] = []
    for plan in plans:
        if plan.quant is None:
            lines.append(f"cache: {plan.name} stays float: {plan.reason}")
        else:
            alike.setdefault(str(plan.quant), []).append(plan)
    for text, members in alike.items():
        nbytes, float_nbytes = (sum(getattr(p, key) for p in members) for key in ("nbytes", "float_nbytes"))
        span = members[0].name if len(members) == 1 else f"{members[0].name} to {members[-1].name}"
        lines.insert(
            0, f"cache: {text}: {len(members)} of keys and values ({span}), {nbytes} bytes a token for {float_nbytes}"
        )
    return lines


def notes_of(source: Source, plans: Iterable[CachePlan]) -> list[str]:
    """What the user should know of the caches of this model where they are quantized."""
    settings: Mapping[str, Any] = json.loads(source.config) if source.config else {}
    settings = settings.get("text_config") or settings
    notes: list[str] = []
    if any(plan.quant is not None and plan.name.endswith(".state") for plan in plans):
        notes.append(
            "cache: what is cached, and quantized, are no keys and values that attention reads as they are, but latents"
            " (MLA), which linears read first, and parts of keys"
        )
    kinds: Sequence[str] = settings.get("layer_types") or ()
    if settings.get("sliding_window") and (not kinds or "sliding_attention" in kinds):
        notes.append(
            "cache: layers that slide a window cache all positions here, and scales are calibrated on all of them"
        )
    return notes
