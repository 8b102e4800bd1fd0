"""Keys and values enter attention, and the cache, as they will be read back from it: quantized and dequantized.

They are quantized where they are put behind the cache, after rotary embeddings, so that what a prompt's own tokens see
of each other is what later tokens will see. ``CacheCodes`` then makes the cache one of codes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx

from graphq import numerics
from graphq.capture.source import source_of
from graphq.ir import edit
from graphq.ir.caches import Cache, caches
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Dequantize, Op, Quantize
from graphq.observers.block_ranges import BlockRangeObserver
from graphq.observers.observer import ObserverRequest
from graphq.observers.ranges import RangeObserver, observer_for
from graphq.passes.observe import observer_of
from graphq.passes.quantize_activations import one_value
from graphq.runtime import ops
from graphq.spec.formats import is_asymmetric
from graphq.spec.quant import MovingAverage, PerTensor, Quant

STORED: torch.dtype = torch.bfloat16
"""What scales of run time are stored in, beside the codes."""


@final
@dataclass(frozen=True)
class QuantizeCache(Pass):
    """What is put behind each cache is quantized by ``quant``; scales of run time are numbers of bfloat16.

    ``note`` is told of a cache with a static scale of which calibration saw a single number, and of one that stays
    float.
    """

    quant: Quant
    note: Callable[[str], None] | None = None
    name: ClassVar[str] = "quantize-cache"

    def observer_requests(self, gm: fx.GraphModule) -> Iterator[ObserverRequest]:
        """An observer of what is put behind each cache, where its scales are static."""
        if self.quant.dynamic:
            return
        for cache in _float_ones(gm):
            if _observer_on(gm, cache, self.quant) is None:
                yield ObserverRequest(cache.new, self._observer(cache), cache.present)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        found = list(_float_ones(gm))
        for cache in found:
            made = self._quantized(gm, cache)
            edit.redirect(cache.present, cache.new, made, by=self.name)
        return len(found)

    def _observer(self, cache: Cache) -> RangeObserver:
        if isinstance(self.quant.granularity, PerTensor):
            made = observer_for(self.quant, (cache.path,), tuple)
        else:
            block = self._block(cache)
            sizes = [1 if b == -1 else int(size) for b, size in zip(block, cache.new.val.shape, strict=True)]
            method = self.quant.method
            constant = method.constant if isinstance(method, MovingAverage) else None
            made = BlockRangeObserver(self.quant, (cache.path,), block, sizes, constant)
        made.role = cache.role
        return made

    def _block(self, cache: Cache) -> list[int]:
        return state_block(self.quant, cache)

    def _quantized(self, gm: fx.GraphModule, cache: Cache) -> Op:
        x, before, text = cache.new, cache.present, str(self.quant.format)
        block = self._block(cache)

        def insert(target: Any, *args: Any) -> Op:
            return edit.insert(gm, before, target, *args, by=self.name)

        scale: Op
        zero_point: Op | None = None
        if self.quant.dynamic:
            chosen = insert(ops.choose_scale, x, text, block)
            found = edit.items(gm, chosen, 2 if is_asymmetric(self.quant.format) else 1, by=self.name)
            scale = insert(torch.ops.aten.to.dtype, found[0], STORED)
            zero_point = found[1] if len(found) > 1 else None
        else:
            scale, zero_point = self._held(gm, cache)
        level = (scale, zero_point, None, text, block)
        return insert(ops.dequantize, insert(ops.quantize, x, *level), *level, x.val.dtype)

    def _held(self, gm: fx.GraphModule, cache: Cache) -> tuple[Op, Op | None]:
        """The fixed scale and zero point, under the name of the module that appends to the cache."""
        observer = _observer_on(gm, cache, self.quant)
        assert observer is not None, "calibrated"
        for line in one_value(observer, quant):
            if self.note is not None:
                self.note(line)
        scales = numerics.rounded_scales(observer.scales(), self.quant.format, source_of(gm).scales)
        names = [f"{cache.role}_{part}" for part in ("scale", "zero_point")]
        path = edit.free_path(gm, cache.path, names)

        def hold(name: str, tensor: Tensor | None) -> Op | None:
            full = f"{path}.{name}" if path else name
            return None if tensor is None else edit.add_tensor(gm, cache.present, full, tensor, by=self.name)

        scale, zero_point = (hold(name, part) for name, part in zip(names, scales[:2], strict=True))
        assert scale is not None
        return scale, zero_point


def state_block(quant: Quant, cache: Cache) -> list[int]:
    """Elements per scale along each axis of what is put behind a cache."""
    rank = cache.new.val.dim()
    return numerics.state_block(quant.granularity, quant.dynamic, rank, cache.batch_axis, cache.token_axis)


def _float_ones(gm: fx.GraphModule) -> Iterator[Cache]:
    """The caches behind which nothing is quantized yet."""
    for cache in caches(gm):
        if isinstance(cache, Cache):
            is_quantized = isinstance(cache.new, Dequantize) and isinstance(cache.new.codes, Quantize)
            if not (is_quantized and _is_own(cache)):
                yield cache


def _is_own(cache: Cache) -> bool:
    """Whether what is quantized is quantized for the cache, and not an output that something else wanted so."""
    return cache.new.users == [cache.present]


def _observer_on(gm: fx.GraphModule, cache: Cache, quant: Quant) -> RangeObserver | None:
    for user in cache.new.users:
        found = observer_of(gm, user)
        if isinstance(found, RangeObserver) and (found.quant, found.role, found.layers) == (
            quant,
            cache.role,
            (cache.path,),
        ):
            return found
    return None
