"""transformers' key/value cache beside a graph that takes and returns each layer's keys and values as tensors."""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from graphq.errors import SpecError


@final
class StaticCache(DynamicCache):
    """A cache whose memory is there from the first token on, for ``max_length`` of them: a step writes its keys and
    values where they stay, and copies no others.

    Layers that slide a window have all tokens, too. Keys and values that a call returns are windows on this memory,
    which later calls write behind them.
    """

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self._memory: dict[int, Tensor] = {}

    def append(self, place: int, past: Tensor, new: Tensor, axis: int) -> Tensor:
        """``past`` with ``new`` behind it, as ``Program`` asks for it.

        A ``past`` that is not what was returned last, such as the rows that a search over beams keeps, is copied.
        Raises ``SpecError`` where the memory is full.
        """
        axis %= new.dim()
        start, count = past.shape[axis], new.shape[axis]
        if start + count > self.max_length:
            raise SpecError(f"cache: {start + count} tokens; it was made for max_length={self.max_length}")
        shape = (*new.shape[:axis], self.max_length, *new.shape[axis + 1 :])
        memory = self._memory.get(place)
        if memory is None or (memory.shape, memory.dtype, memory.device) != (shape, new.dtype, new.device):
            with torch.inference_mode(False):  # whose tensors could not be written to outside of it
                memory = self._memory[place] = torch.empty(shape, dtype=new.dtype, device=new.device)
        held = memory.narrow(axis, 0, start)
        if start and (past.data_ptr() != held.data_ptr() or past.stride() != held.stride()):
            held.copy_(past.clone())
        memory.narrow(axis, start, count).copy_(new)
        return memory.narrow(axis, 0, start + count)


def refusal(cache: Any) -> str | None:
    """What ``cache`` is, where its layers are no plain keys and values as long as what was read; None if they are."""
    if type(cache) not in (DynamicCache, StaticCache):
        return f"a {type(cache).__name__}"
    if cache.offloading:
        return "an offloaded DynamicCache"
    for layer in cache.layers:  # those of other kinds that are empty are replaced
        if not hasattr(layer, "keys") or (type(layer) is not DynamicLayer and not _is_empty(layer)):
            return f"a DynamicCache with a {type(layer).__name__}"
    return None


def _is_empty(layer: Any) -> bool:
    return layer.keys is None or not layer.keys.numel()


def layers_of(cache: DynamicCache) -> list[tuple[Tensor, Tensor] | None]:
    """The keys and values of each layer, None for one that is empty yet. There must be no ``refusal`` of the cache."""
    layers: list[Any] = cache.layers
    return [None if _is_empty(layer) else (layer.keys, layer.values) for layer in layers]


def hold(cache: DynamicCache, pairs: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    """``cache``, which now holds these keys and values, in full-length layers: its own where they are such."""
    layers: list[Any] = [layer if type(layer) is DynamicLayer else DynamicLayer() for layer in cache.layers]
    layers = [*layers[: len(pairs)], *(DynamicLayer() for _ in pairs[len(layers) :])]
    for layer, (keys, values) in zip(layers, pairs, strict=True):
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    cache.layers[:] = layers
    return cache


def dynamic_cache(pairs: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache that holds these keys and values."""
    return hold(DynamicCache(), pairs)
