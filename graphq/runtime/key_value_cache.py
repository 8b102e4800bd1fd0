"""transformers' key/value cache beside a graph that takes and returns each layer's keys and values as tensors."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


def refusal(cache: Any) -> str | None:
    """What ``cache`` is, where its layers are no plain keys and values as long as what was read; None if they are."""
    if type(cache) is not DynamicCache:
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
