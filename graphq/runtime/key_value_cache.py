"""transformers' key/value cache beside a graph that takes and returns each layer's keys and values as tensors."""

from collections.abc import Callable, Sequence
from typing import Any, cast, final

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from graphq.errors import SpecError
from graphq.runtime.cache_layers import Layer


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
        self._returned: dict[int, Tensor] = {}

    def append(self, place: int, past: Tensor, new: Tensor, axis: int) -> Tensor:
        """``past`` with ``new`` behind it, as ``Program`` asks for it.

        A ``past`` that is not what was returned last, such as the rows that a search over beams keeps, is copied.
        Raises ``SpecError`` where the memory is full.
        """
        axis %= new.dim()
        start, count = past.shape[axis], new.shape[axis]
        if start + count > self.max_length:
            raise SpecError(f"cache: {start + count} tokens; it was made for max_length={self.max_length}")
        memory = self._memory.get(place)
        if memory is None or past is not self._returned.get(place) or new.dtype != memory.dtype:
            memory = self._with(place, past, new, axis)
        memory.narrow(axis, start, count).copy_(new)
        self._returned[place] = made = memory.narrow(axis, 0, start + count)
        return made

    def _with(self, place: int, past: Tensor, new: Tensor, axis: int) -> Tensor:
        """The memory of a place, which begins with ``past``."""
        start = past.shape[axis]
        shape = (*new.shape[:axis], self.max_length, *new.shape[axis + 1 :])
        memory = self._memory.get(place)
        if memory is None or (memory.shape, memory.dtype, memory.device) != (shape, new.dtype, new.device):
            with torch.inference_mode(False):  # whose tensors could not be written to outside of it
                memory = self._memory[place] = torch.empty(shape, dtype=new.dtype, device=new.device)
        held = memory.narrow(axis, 0, start)
        if start and (past.data_ptr() != held.data_ptr() or past.stride() != held.stride()):
            held.copy_(past.clone())
        return memory


@final
class CodesLayer(DynamicLayer):
    """A layer of codes with the scales and zero points of their tokens, ``beside`` them by name: ``key_scale`` ...

    What is done to its keys and values, such as the choice of beams, is done to these, too.
    """

    beside: dict[str, Tensor]

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.get_seq_length() > 0:
            self.keys, self.values = change(cast(Tensor, self.keys)), change(cast(Tensor, self.values))
            self.beside = {name: change(tensor) for name, tensor in self.beside.items()}

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ``SpecError``: keys and values of another model are no codes."""
        raise SpecError("cache: it holds codes, to which only the model that made them appends")

    def reorder_cache(self, beam_idx: Any) -> None:
        """The rows of these indices, in this order."""
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Any) -> None:
        """The rows of these indices."""
        self._each(lambda x: x[indices, ...])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row as often."""
        self._each(lambda x: x.repeat_interleave(repeats, 0))

    def crop(self, tokens_to_remove: int) -> None:
        """All but the last ``-tokens_to_remove`` tokens."""
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.is_initialized:
            self.beside = {name: x[..., :tokens_to_remove, :] for name, x in self.beside.items()}


def refusal(cache: Any) -> str | None:
    """What ``cache`` is, where its layers are no plain keys and values as long as what was read; None if they are."""
    if type(cache) not in (DynamicCache, StaticCache):
        return f"a {type(cache).__name__}"
    if cache.offloading:
        return "an offloaded DynamicCache"
    for layer in cache.layers:  # those of other kinds that are empty are replaced
        if not hasattr(layer, "keys") or (type(layer) not in (DynamicLayer, CodesLayer) and not _is_empty(layer)):
            return f"a DynamicCache with a {type(layer).__name__}"
    return None


def _is_empty(layer: Any) -> bool:
    return layer.keys is None or not layer.keys.numel()


def layers_of(cache: DynamicCache) -> list[Layer | None]:
    """The keys and values of each layer, with what it holds beside them; None for one that is empty yet. There must be
    no ``refusal`` of the cache.
    """
    return [None if _is_empty(layer) else _held(layer) for layer in cast(list[Any], cache.layers)]


def _held(layer: Any) -> Layer:
    pair = (layer.keys, layer.values)
    return (*pair, layer.beside) if type(layer) is CodesLayer else pair


def hold(cache: DynamicCache, pairs: Sequence[Layer]) -> DynamicCache:
    """``cache``, which now holds these keys and values, in full-length layers: its own where they are such."""
    layers: list[Any] = list(cache.layers[: len(pairs)])
    layers += [None] * (len(pairs) - len(layers))
    for place, (keys, values, *beside) in enumerate(pairs):
        kind = CodesLayer if beside else DynamicLayer
        layer: Any = layers[place] if type(layers[place]) is kind else kind()
        layers[place] = layer
        layer.keys, layer.values = keys, values
        if beside:
            layer.beside = dict(beside[0])
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
    cache.layers[:] = layers
    return cache


def dynamic_cache(pairs: Sequence[Layer]) -> DynamicCache:
    """A cache that holds these keys and values."""
    return hold(DynamicCache(), pairs)
