"""Keys and values enter attention, and the cache, as they will be read back from it: quantized and dequantized.

They are quantized where they are put behind the cache, after rotary embeddings, so that what a prompt's own tokens see
of each other is what later tokens will see. ``CacheCodes`` then makes the cache one of codes.
"""

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor, fx

from graphq import numerics
from graphq.capture.source import source_of
from graphq.ir import edit
from graphq.ir.caches import Cache, caches
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Dequantize, Op, Quantize
from graphq.numerics import Scales
from graphq.observers.block_ranges import BlockRangeObserver
from graphq.observers.observer import ObserverRequest
from graphq.observers.ranges import RangeObserver, observer_for
from graphq.passes.observe import observer_of
from graphq.passes.quantize_activations import one_value
from graphq.runtime import ops
from graphq.spec.formats import is_asymmetric
from graphq.spec.quant import MovingAverage, PerTensor, Quant

STORED: Final = torch.bfloat16
"""What scales of run time are stored in, beside the codes."""
Note = Callable[[str], None] | None


@final
@dataclass(frozen=True)
class State:
    """A tensor that attention reads, or a cache holds: of the module at ``path`` its ``role``, by which observers and
    scales are named. ``block``: elements per scale along each axis.
    """

    x: Op
    path: str
    role: str
    block: tuple[int, ...]

    def request(self, quant: Quant, like: Op) -> ObserverRequest:
        """An observer of what fixed scales follow from."""
        if isinstance(quant.granularity, PerTensor):
            made = observer_for(quant, (self.path,), tuple)
        else:
            sizes = [1 if b == -1 else int(size) for b, size in zip(self.block, self.x.val.shape, strict=True)]
            constant = quant.method.constant if isinstance(quant.method, MovingAverage) else None
            made = BlockRangeObserver(quant, (self.path,), self.block, sizes, constant)
        made.role = self.role
        return ObserverRequest(self.x, made, like)

    def observer(self, gm: fx.GraphModule, quant: Quant) -> RangeObserver | None:
        """The observer that was put there for ``quant``."""
        for user in self.x.users:
            found = observer_of(gm, user)
            if isinstance(found, RangeObserver):
                seen = (found.quant, found.role, found.layers)
                if seen == (quant, self.role, (self.path,)):
                    return found
        return None

    def quantized(
        self,
        gm: fx.GraphModule,
        quant: Quant,
        before: Op,
        by: str,
        note: Note = None,
        stored: torch.dtype | None = None,
        ends: tuple[float, float] | None = None,
    ) -> Op:
        """What is quantized and dequantized, in front of ``before``; scales of run time are numbers of ``stored``.
        ``ends``: the range of it all, where that is known without calibration.
        """
        text, block = str(quant.format), list(self.block)

        def insert(target: Any, *args: Any) -> Op:
            return edit.insert(gm, before, target, *args, by=by)

        if quant.dynamic:
            chosen = insert(ops.choose_scale, self.x, text, block)
            count = 2 if is_asymmetric(quant.format) else 1
            parts = [edit.insert(gm, before, operator.getitem, chosen, i, by=by) for i in range(count)]
            scale, zero_point = parts[0], parts[1] if count > 1 else None
            scale = scale if stored is None else insert(torch.ops.aten.to.dtype, scale, stored)
        else:
            scale, zero_point = self._held(gm, before, by, self._fixed(gm, quant, note, ends), quant)
        level = (scale, zero_point, None, text, block)
        return insert(ops.dequantize, insert(ops.quantize, self.x, *level), *level, self.x.val.dtype)

    def _fixed(self, gm: fx.GraphModule, quant: Quant, note: Note, ends: tuple[float, float] | None) -> Scales:
        if ends is not None:
            low, high = map(torch.tensor, ends)
            return Scales(*numerics.scale_from_extremes(low, high, quant.format))
        observer = self.observer(gm, quant)
        assert observer is not None, "calibrated"
        for line in one_value(observer, quant):
            if note is not None:
                note(line)
        return observer.scales()

    def _held(self, gm: fx.GraphModule, before: Op, by: str, scales: Scales, quant: Quant) -> tuple[Op, Op | None]:
        """The fixed scale and zero point, under the name of the module."""
        scales = numerics.rounded_scales(scales, quant.format, source_of(gm).scales)
        names = [f"{self.role}_{part}" for part in ("scale", "zero_point")]
        path = edit.free_path(gm, self.path, names)

        def hold(name: str, tensor: Tensor | None) -> Op | None:
            full = f"{path}.{name}" if path else name
            return None if tensor is None else edit.add_tensor(gm, before, full, tensor, by=by)

        scale, zero_point = (hold(name, part) for name, part in zip(names, scales[:2], strict=True))
        assert scale is not None
        return scale, zero_point


@final
@dataclass(frozen=True)
class QuantizeCache(Pass):
    """What is put behind each cache is quantized by ``quant``; scales of run time are numbers of bfloat16.

    ``note`` is told of a cache with a static scale of which calibration saw a single number.
    """

    quant: Quant
    note: Note = None
    name: ClassVar[str] = "quantize-cache"

    def observer_requests(self, gm: fx.GraphModule) -> Iterator[ObserverRequest]:
        """An observer of what is put behind each cache, where its scales are static."""
        for cache, state in [] if self.quant.dynamic else self._float_ones(gm):
            if state.observer(gm, self.quant) is None:
                yield state.request(self.quant, cache.present)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        found = list(self._float_ones(gm))
        for cache, state in found:
            made = state.quantized(gm, self.quant, cache.present, self.name, self.note, STORED)
            edit.redirect(cache.present, cache.new, made, by=self.name)
        return len(found)

    def _float_ones(self, gm: fx.GraphModule) -> Iterator[tuple[Cache, State]]:
        """The caches behind which nothing is quantized yet, and what is put there."""
        for cache in caches(gm):
            if isinstance(cache, Cache) and not is_quantized(cache):
                rank = cache.new.val.dim()
                block = numerics.state_block(
                    self.quant.granularity, self.quant.dynamic, rank, cache.batch_axis, cache.token_axis
                )
                yield cache, State(cache.new, cache.path, cache.role, tuple(block))


def is_quantized(cache: Cache) -> bool:
    """Whether what is put behind a cache is quantized for it, and is no tensor that something else wanted so."""
    new = cache.new
    return isinstance(new, Dequantize) and isinstance(new.codes, Quantize) and new.users == [cache.present]
