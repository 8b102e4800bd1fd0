"""The cache of a causal language model as flat tensors: what it holds after a few tokens says which there are.

Keys, values and keys of an index grow with the text, ``[batch, heads, past_sequence, K]`` and ``[batch, past_sequence,
K]``. States of convolutions and recurrences have one shape, and begin as zeros. Layers that slide a window are held at
full length: masks leave out what the window has left behind.

The cache that the model made is copied for each call with other tensors in the places of its own, so that nothing is
asked of its class but where its tensors are.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast, final

import torch
from torch import Tensor

from graphq.capture.proof import first_line
from graphq.capture.source import BATCH, PAST, CachePair, TensorInput
from graphq.errors import GraphError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ARGUMENTS: Final = ("past_key_values", "cache_params", "state")
_PAST_NAME: Final = "past_key_values"
_PRESENT_NAME: Final = "present"
_GROWING: Final = {"keys": (2, "key"), "values": (2, "value"), "indexer_keys": (1, "indexer_key")}  # axis, name
_STATES: Final = {"conv_states": "conv_state", "recurrent_states": "recurrent_state"}
_OWN_STATES: Final = ("linear_cache", "rnn_state")  # of caches that have no layers for them
_OBSERVED: Final = (1, 2)  # batch and tokens


@final
@dataclass(frozen=True)
class Held:
    """A tensor of a cache: its place there, its input and output, and whether it grows with the text."""

    path: tuple[str, ...]
    wanted: TensorInput
    present: str
    tensor: Tensor

    @property
    def grows(self) -> bool:
        """Whether each token puts something behind it."""
        return self.wanted.is_cache


@final
@dataclass(frozen=True)
class Caches:
    """``argument``: the name that the model's ``forward`` and what it returns have for it. ``held``: its tensors, where
    ``observed`` holds them.
    """

    argument: str
    observed: Any
    held: tuple[Held, ...]

    @property
    def inputs(self) -> list[TensorInput]:
        """The flat inputs, in order."""
        return [one.wanted for one in self.held]

    @property
    def pairs(self) -> tuple[CachePair, ...]:
        """Each input with the output that becomes it."""
        return tuple(CachePair(one.wanted.name, one.present) for one in self.held)

    @property
    def has_states(self) -> bool:
        """Whether anything in it is more than what attention looks at."""
        return not all(one.grows for one in self.held)

    def filled(self, tensors: Mapping[str, Tensor]) -> Any:
        """A cache of the model's kind that holds these. States, which models change in place, are copies.

        Layers of attention that keep nothing say of the text's length what the first that keeps keys does.
        """
        own: dict[int, Any] = {
            id(one.tensor): tensors[one.wanted.name] if one.grows else tensors[one.wanted.name].clone()
            for one in self.held
        }
        made = copy.deepcopy(self.observed, own)
        layers = {str(place): layer for place, layer in enumerate(getattr(made, "layers", ()))}
        first = next((layers[one.path[0]] for one in self.held if one.grows and one.path[0] in layers), None)
        with_keys = {one.path[0] for one in self.held if one.grows}
        for place, layer in layers.items():
            if first is not None and place not in with_keys and hasattr(layer, "keys"):
                # A layer that keeps its states elsewhere; masks ask it for the length of the text if it is the first.
                layer.get_seq_length, layer.get_mask_sizes = first.get_seq_length, first.get_mask_sizes
        return made

    def outputs(self, cache: Any, before: Mapping[str, Tensor], kept: Tensor | None = None) -> dict[str, Tensor]:
        """What a cache holds after a call, by the names of outputs.

        ``kept``, ``[batch]``: where it is not, the call read padding, and states are those of ``before``.
        """
        found: dict[str, Tensor] = {}
        after = dict(_tensors(cache))
        for one in self.held:
            if one.path not in after:
                raise GraphError(f"the cache has nothing in {'.'.join(one.path)} any more after more tokens")
            tensor = after[one.path]
            if kept is not None and not one.grows:
                shape = [-1] + [1] * (tensor.dim() - 1)
                tensor = torch.where(kept.view(shape), tensor, before[one.wanted.name])
            found[one.present] = tensor
        return found


def cache_argument(model: "PreTrainedModel") -> str | None:
    """The argument of the model's ``forward`` that is its cache, if it has one."""
    arguments = inspect.signature(model.forward).parameters
    return next((name for name in _ARGUMENTS if name in arguments), None)


def caches_of(model: "PreTrainedModel", run: Callable[..., Any]) -> Caches:
    """What the model holds of a text after two tokens. ``run`` calls it with these arguments.

    Raises ``GraphError`` for a cache with tensors of another kind.
    """
    argument = cache_argument(model)
    assert argument is not None, "it is a causal language model"
    observed = _observed(model, argument, run)
    held = tuple(_held(model, path, tensor) for path, tensor in _tensors(observed))
    if not held:
        raise GraphError(f"{type(model).__name__} leaves its cache empty; pass cache=False to compile it without one")
    return Caches(argument, observed, held)


def _observed(model: "PreTrainedModel", argument: str, run: Callable[..., Any]) -> Any:
    """A cache after two tokens: a plain one, one of the layers that the configuration asks for, or the model's own."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    ids = torch.zeros(_OBSERVED, dtype=torch.int64, device=next(model.parameters()).device)
    made = _full_length(model) if argument != "state" else None
    has_others = made is not None and any(type(layer) is not DynamicLayer for layer in made.layers)
    if made is not None and not has_others:
        made = DynamicCache()  # which models with layers of another number fill as they like
    try:
        found = run(input_ids=ids, use_cache=True, **({} if made is None else {argument: made}))
    except (ValueError, TypeError, AttributeError, KeyError):
        made = None
        try:
            found = run(input_ids=ids, use_cache=True)  # it takes caches of a class of its own alone
        except Exception as error:  # whatever its code raises
            raise GraphError(
                f"{type(model).__name__} cannot be called with a cache ({first_line(error)}); pass cache=False to"
                " compile it without one"
            ) from error
    returned = getattr(found, argument, None)
    if returned is None and made is None:
        raise GraphError(f"{type(model).__name__} gives no {argument} back; pass cache=False to compile it without one")
    return made if returned is None else returned  # RecurrentGemma fills what it is given, and returns none


def _full_length(model: "PreTrainedModel") -> Any:
    """A cache of the layers that the configuration asks for, without windows; None where it says nothing of layers."""
    from transformers import DynamicCache
    from transformers.cache_utils import (
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionAndSlidingWindowAttentionLayer,
    )

    try:
        made = DynamicCache(config=model.config)
    except (ValueError, TypeError, AttributeError, KeyError):
        return None
    layers = cast(list[Any], made.layers)
    for place, layer in enumerate(layers):
        if type(layer) is DynamicSlidingWindowLayer:
            layers[place] = DynamicLayer()
        elif type(layer) is LinearAttentionAndSlidingWindowAttentionLayer:
            layers[place] = LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
    return made


def _tensors(cache: Any) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The tensors of a cache with their places, layer by layer: ``0.keys``, ``1.conv_states.0``, ``linear_cache.2``."""
    if isinstance(cache, list | tuple):  # RWKV's states, of all layers in each
        yield from _within((), cast(Any, cache))
        return
    for place, layer in enumerate(getattr(cache, "layers", ())):
        for name, value in vars(layer).items():
            yield from _within((str(place), name), value)
    for name in _OWN_STATES:
        yield from _within((name,), getattr(cache, name, None))


def _within(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(value, Tensor):
        if value.numel():
            yield path, value
    elif isinstance(value, Mapping):
        for key, item in cast(Mapping[Any, Any], value).items():
            yield from _within((*path, str(key)), item)
    elif isinstance(value, list | tuple):
        for key, item in enumerate(cast(list[Any], value)):
            yield from _within((*path, str(key)), item)


def _held(model: "PreTrainedModel", path: tuple[str, ...], tensor: Tensor) -> Held:
    """The input and output of the tensor of this place."""
    batch, tokens = _OBSERVED
    top = path[0] if path else ""
    kind = path[1] if len(path) > 1 else ""
    shape: list[int | str] = [BATCH, *tensor.shape[1:]]
    if kind in _GROWING:
        axis, name = _GROWING[kind]
        label = f"{top}.{name}"
        known = tensor.shape[axis] == tokens
        shape[axis] = PAST
    else:
        own = (top, _STATES.get(kind, kind), *(path[2:] if path[2:] != ("0",) else ()))
        label = ".".join(part for part in own if part)
        known = kind in _STATES or top in _OWN_STATES or len(path) == 1
    if not known or tensor.shape[0] != batch:
        layer = getattr(getattr(model, "config", None), "model_type", "")
        raise GraphError(
            f"{type(model).__name__}: its cache holds {'.'.join(path)} of shape {tuple(tensor.shape)} after {tokens}"
            f" tokens, which is neither what attention looks at nor a state of one shape ({layer}); pass cache=False to"
            " compile it without a cache"
        )
    wanted = TensorInput(f"{_PAST_NAME}.{label}", tensor.dtype, tuple(shape))
    return Held(path, wanted, f"{_PRESENT_NAME}.{label}", tensor)
