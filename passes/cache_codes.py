"""A cache of codes: what is appended are codes, and the whole cache is dequantized where it is read.

    cat([past, dequantize(q, s)])   ->   dequantize(cat([past, q]), s)

with the input ``past`` and the output as codes. Scales of run time are appended to caches of their own beside it.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, cast, final

import torch
from torch import fx

from graphq.capture.source import KEY, CachePair, TensorInput, source_of
from graphq.ir import edit
from graphq.ir.caches import Cache, caches
from graphq.ir.layers import BY
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Dequantize, Op, Param, Quantize, view
from graphq.runtime import ops
from graphq.state import put_input

aten = torch.ops.aten


@final
@dataclass(frozen=True)
class CacheCodes(Pass):
    """Every cache behind which dequantized codes are put holds these codes; how many do.

    The scales of run time of a cache ``x`` are the cache ``x_scale``, their zero points ``x_zero_point``.
    """

    name: ClassVar[str] = "cache-codes"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        found = [(c, c.new) for c in caches(gm) if isinstance(c, Cache) and isinstance(c.new, Dequantize)]
        found = [(cache, new) for cache, new in found if isinstance(new.codes, Quantize)]
        if not found:
            return 0
        ends = _Ends(gm)
        for cache, new in found:
            self._hold_codes(gm, ends, cache, new)
        ends.declare()
        edit.drop_unused(gm)
        return len(found)

    def _hold_codes(self, gm: fx.GraphModule, ends: "_Ends", cache: Cache, new: Dequantize) -> None:
        codes = new.codes
        cache.past.node.meta["val"] = cache.past.val.to(codes.val.dtype)
        appended = [self._append(gm, cache, cache.past, codes)]
        parts = {"scale": new.scale, "zero_point": new.zero_point}
        for part, held in parts.items():
            if held is None or isinstance(held, Param):
                continue
            appended.append(self._append(gm, cache, ends.take(cache, part, held, self.name), held))
            parts[part] = appended[-1]
        level = (parts["scale"], parts["zero_point"], new.global_scale, new.format, list(new.block))
        read = edit.insert(gm, cache.present, ops.dequantize, appended[0], *level, new.val.dtype, by=self.name)
        ends.give(cache, appended)
        edit.bypass(gm, cache.present, read)

    def _append(self, gm: fx.GraphModule, cache: Cache, past: Op, new: Op) -> Op:
        return edit.insert(gm, cache.present, aten.cat.default, [past, new], cache.token_axis, by=self.name)


@final
class _Ends:
    """What a graph takes and gives, to be declared anew."""

    def __init__(self, gm: fx.GraphModule) -> None:
        source = source_of(gm)
        self.gm = gm
        self.inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), source.inputs, strict=True))
        given = cast(tuple[fx.Node, ...], gm.graph.output_node().args[0])
        self.outputs = dict(zip(source.outputs, given, strict=True))
        self.pairs = {pair.past: pair for pair in source.caches}
        self.parts: dict[str, list[str]] = {}  # of each cache, what is held beside its codes

    def take(self, cache: Cache, part: str, new: Op, by: str) -> Op:
        """A further input, the cache of ``new``, which belongs to the codes of ``cache``."""
        own = self.inputs[cache.past.node]
        beside = self.parts.setdefault(own.name, [])
        after = [node for node, one in self.inputs.items() if one.name == f"{own.name}_{beside[-1]}"] if beside else []
        beside.append(part)
        with self.gm.graph.inserting_after(after[0] if after else cache.past.node):
            node = put_input(self.gm.graph, f"{cache.past.node.name}_{part}")
        sizes = list(new.val.shape)
        sizes[cache.token_axis] = cache.past.val.shape[cache.token_axis]
        with edit.fake_mode_of(self.gm):
            node.meta = {"val": new.val.new_empty(sizes), BY: (by,)}
        shape = [
            known if isinstance(size, torch.SymInt) else size for known, size in zip(own.shape, sizes, strict=True)
        ]
        self.inputs[node] = TensorInput(f"{own.name}_{part}", new.val.dtype, tuple(shape))
        return view(node)

    def give(self, cache: Cache, appended: list[Op]) -> None:
        """``appended``, codes first, are given in the place of the cache."""
        own = self.inputs[cache.past.node]
        self.inputs[cache.past.node] = replace(own, dtype=appended[0].val.dtype)
        present = self.pairs[own.name].present
        names = [present, *(f"{present}_{part}" for part in self.parts.get(own.name, ()))]
        made = dict(zip(names, (op.node for op in appended), strict=True))
        items = [
            item
            for name, node in self.outputs.items()
            for item in (made.items() if name == present else [(name, node)])
        ]
        self.outputs = dict(items)

    def declare(self) -> None:
        """The graph's source says what the graph takes and gives, and its outputs are those."""
        source = source_of(self.gm)
        inputs = tuple(self.inputs[node] for node in self.gm.graph.find_nodes(op="placeholder"))
        pairs: list[CachePair] = []
        for pair in source.caches:
            pairs.append(pair)
            pairs += [
                CachePair(f"{pair.past}_{part}", f"{pair.present}_{part}") for part in self.parts.get(pair.past, ())
            ]
        self.gm.graph.output_node().args = (tuple(self.outputs.values()),)
        self.gm.meta[KEY] = replace(source, inputs=inputs, outputs=tuple(self.outputs), caches=tuple(pairs))
