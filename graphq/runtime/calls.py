"""How a compiled model is called: like its source, or like any model of transformers, which this does not import."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Final, assert_never, cast, final

from torch import Tensor

from graphq.capture.source import Source
from graphq.capture.structure import restore
from graphq.data.batches import arguments, complete
from graphq.errors import SpecError
from graphq.runtime.cache_layers import pairs_of

Outputs = Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]  # a tuple of a transformers model holds its cache
_PAST: Final = "past_key_values"
_PRESENT: Final = re.compile(r"present\.\w+(\.\w+)*")
_NEVER_RETURNED: Final = frozenset(  # an argument that asks for one of them is refused
    ["attentions", "aux_loss", "cross_attentions", "hidden_states", "loss", "router_logits"]
)


@final
class ModelOutput(dict[str, Tensor]):
    """The outputs of a transformers model, read as transformers' own ``ModelOutput`` is.

    ``out["logits"]``, ``out.logits`` and ``out[0]`` are one tensor, also after one of them is set. The key/value cache
    is one output with the name ``past_key_values``, the last place, and one object at each read: the ``DynamicCache``
    that was given to the call, else a new one, or one pair of tensors for each layer where transformers is not
    installed (and what a cache of codes holds beside them, by name), and None without a cache. The next call takes it
    back, as does transformers. What a model of transformers returns only on demand, such as ``loss``, is None.

    As a dict it holds the graph's own outputs, in which each tensor of the cache has a name: ``present.{i}.key`` and
    ``present.{i}.value``, and of codes with scales of run time ``present.{i}.key_scale`` and so on. These are what
    iteration, ``len``, ``dict(out)`` and ``**out`` give.
    """

    def __init__(self, outputs: Mapping[str, Tensor], past: Any = None) -> None:
        """``past``: the cache that holds the ``present`` outputs, if there is one."""
        super().__init__(outputs)
        if past is not None:
            self.__dict__[_PAST] = past

    @cached_property
    def past_key_values(self) -> Any:
        """The key/value cache, as the class says."""
        pairs = pairs_of(self)
        if not pairs:
            return None
        try:
            from graphq.runtime.key_value_cache import dynamic_cache
        except ImportError:
            return tuple(pairs)
        return dynamic_cache(pairs)

    def __getitem__(self, key: str | int | slice) -> Any:
        """By name, or as in a tuple."""
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __missing__(self, key: str) -> Any:
        if key == _PAST and self.past_key_values is not None:
            return self.past_key_values
        raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (key == _PAST and self.past_key_values is not None)

    def get(self, key: str, default: Any = None) -> Any:
        """By name."""
        try:
            return self[key]
        except KeyError:
            return default

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        if name in _NEVER_RETURNED:
            return None
        raise AttributeError(f"the model returned no {name}; it returned {', '.join(self)}")

    def __setitem__(self, key: str, value: Any) -> None:
        if key == _PAST:
            self.past_key_values = value
        else:
            super().__setitem__(key, value)
            self.__dict__.pop(_PAST if _PRESENT.fullmatch(key) else key, None)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != _PAST and value is not None:
            self[name] = value
            return
        for held in [n for n in self if n == name or (name == _PAST and _PRESENT.fullmatch(n))]:
            del self[held]
        self.__dict__[name] = value

    def to_tuple(self) -> tuple[Any, ...]:
        """The outputs in their order, the cache as one, behind the others."""
        past = self.past_key_values
        return (*(x for name, x in self.items() if not _PRESENT.fullmatch(name)), *(() if past is None else (past,)))


@final
class OutputRecord(dict[str, Any]):
    """A dataclass, named tuple or ``ModelOutput`` that the source returns: its fields by name, attribute or place."""

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the model returned no {name}; it returned {', '.join(self)}")

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields in their order."""
        return tuple(self.values())


def is_transformers(source: Source) -> bool:
    """Whether the source is called as transformers' models are."""
    return source.config is not None or source.is_causal_lm


def call(
    source: Source,
    run: Callable[..., Iterable[Tensor]],
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> Outputs:
    """What ``run``, which takes all flat inputs and gives all flat outputs, makes of a call of the source.

    A model of transformers also takes ``past_key_values`` (a ``DynamicCache``, which then holds the present keys and
    values, as after a call of transformers; or a pair of tensors for each layer, which stay), ``use_cache=False`` (the
    outputs hold no cache), ``return_dict=False`` (they are a tuple), ``cache="static"`` with ``max_length`` in a first
    call (the outputs hold a ``StaticCache``) and any argument that asks for nothing: None, False or 0. ``run`` takes
    ``append`` by name where a cache has its own way to append to it. Raises ``TypeError`` for an argument that was not
    captured or is of a wrong type, ``SpecError`` for a wrong shape, a cache of another kind, one in which a layer is
    missing, one that is full, and an empty batch of which the graph can make nothing.
    """
    given = dict(kwargs)
    switches: dict[str, object] = {}
    past: Any = None
    if is_transformers(source):
        switches = {name: given.pop(name) for name in ("use_cache", "return_dict") if given.get(name) is not None}
        past = given.pop(_PAST, None) if _PAST not in source.names else None
        past = _static_cache(source, given, past)
        tensors = dict(past.tensors) if hasattr(past, "tensors") else cached(past)
        for name in tensors.keys() & given.keys():
            raise TypeError(f"forward() got {name} twice, by its name and in {_PAST}")
        given |= tensors
        if source.is_causal_lm and not source.pasts and (_is_cache(past) or switches.get("use_cache")):
            raise TypeError(f"forward() was captured without a cache; it takes neither {_PAST} nor use_cache=True")
    if is_transformers(source) and source.has_states:
        return _with_states(source, run, _by_name(source, args, given), past, switches)
    batch = complete(source, _by_name(source, args, given))
    try:
        outputs = tuple(run(batch, append=past.append) if _is_cache(past) and hasattr(past, "append") else run(batch))
    except Exception as error:  # whatever the ops say
        if problem := _below_range(source, batch):
            raise SpecError(f"inputs: {problem}") from error
        raise
    found = _as_returned(source, outputs)
    if not (isinstance(found, dict) and is_transformers(source)):
        return found
    named = dict(found)
    if _is_cache(past):
        from graphq.runtime.key_value_cache import hold

        hold(past, pairs_of(named))
    uses_cache = bool(switches.get("use_cache", True))
    if not uses_cache:
        named = {name: x for name, x in named.items() if name not in source.presents}
    made = ModelOutput(named, past if uses_cache and _is_cache(past) else None)
    return made if switches.get("return_dict", True) else made.to_tuple()


def _with_states(
    source: Source,
    run: Callable[..., Iterable[Tensor]],
    given: Mapping[str, object],
    past: Any,
    switches: Mapping[str, object],
) -> Outputs:
    """``call`` of a graph that keeps more than keys and values, for a text of any length."""
    from graphq.runtime.stepping import StateCache, read_text

    outputs: Mapping[str, Tensor] = read_text(source, run, given)
    state: Any = None
    if switches.get("use_cache", True):
        ids = given.get("input_ids")
        state = past if isinstance(past, StateCache) else StateCache()
        state.hold(source, outputs, ids.shape[1] if isinstance(ids, Tensor) else 0)
    else:
        outputs = {name: x for name, x in outputs.items() if name not in source.presents}
    made = ModelOutput(outputs, state)
    return made if switches.get("return_dict", True) else made.to_tuple()


def _static_cache(source: Source, given: dict[str, object], past: object) -> Any:
    """The cache that a call is to have: ``past``, or the one that its arguments, taken out of ``given``, ask for."""
    if "cache" in source.names or given.get("cache") is None:
        return past
    kind, length = given.pop("cache"), given.pop("max_length", None)
    if kind == "dynamic":
        return past
    if kind != "static":
        raise TypeError(f"forward(): cache is {kind!r}; it can be 'dynamic' or 'static'")
    if not isinstance(length, int) or length < 1:
        raise TypeError(f"forward(): cache='static' needs max_length, a number of tokens; {length!r} is none")
    if past is not None:
        raise TypeError(f"forward() got a cache twice, as cache='static' and as {_PAST}")
    if not source.pasts:
        raise TypeError("forward() was captured without a cache; it takes no cache='static'")
    if source.has_states:
        raise TypeError("forward(): cache='static': this model keeps states beside keys and values")
    from graphq.runtime.key_value_cache import StaticCache

    return StaticCache(length)


def _as_returned(source: Source, outputs: tuple[Tensor, ...]) -> Outputs:
    """The outputs in the structure that the source returns."""
    match source.output_kind:
        case "tensor":
            return outputs[0]
        case "tuple":
            return outputs
        case "dict":
            return dict(zip(source.outputs, outputs, strict=True))
        case "structured":
            assert source.structure is not None, "capture and the manifest's reader put it there"
            return restore(source.structure, dict(zip(source.outputs, outputs, strict=True)), OutputRecord)
        case _:
            assert_never(source.output_kind)


def _is_cache(past: object) -> bool:
    """Whether it is a cache of transformers, of any kind."""
    return hasattr(past, "layers")


def _below_range(source: Source, batch: Sequence[Tensor]) -> str | None:
    """The first size that is smaller than the smallest that the graph was captured for, in words."""
    lowest = {dimension: low for dimension, low, _ in source.ranges}
    for wanted, value in zip(source.inputs, batch, strict=True):
        for dimension, size in zip(wanted.shape, value.shape, strict=True):
            if isinstance(dimension, str) and size < (low := lowest.get(dimension, 0)):
                return f"{wanted.name} has shape {tuple(value.shape)}; {dimension} is at least {low} in this graph"
    return None


def cached(past: Any) -> dict[str, Tensor]:
    """The flat inputs ``past_key_values.{i}.key`` and ``.value`` of a key/value cache, and what it holds beside them: a
    ``DynamicCache``, whose layers may be empty yet, a pair of tensors for each layer, or None. Raises ``SpecError`` for
    a cache of another kind, ``TypeError`` for what is no cache.
    """
    if _is_cache(past):
        from graphq.runtime.key_value_cache import layers_of, refusal

        refused = refusal(past)
        if refused is not None:
            raise SpecError(
                f"inputs: {_PAST}: {refused} cannot hold this graph's keys and values, which grow with the text;"
                " give a DynamicCache()"
            )
        pairs: Sequence[object] = layers_of(past)
    elif past is None or (isinstance(past, int) and not past):
        pairs = ()
    elif isinstance(past, list | tuple):
        pairs = cast(Sequence[object], past)
    else:
        raise _no_cache(f"a {type(past).__name__}")
    found: dict[str, Tensor] = {}
    for i, pair in enumerate(pairs):
        match pair:
            case None:
                continue
            # A DynamicCache is iterated over in threes, whose last is the window of a sliding layer.
            case (Tensor() as key, Tensor() as value) | (Tensor() as key, Tensor() as value, None):
                found |= {f"{_PAST}.{i}.key": key, f"{_PAST}.{i}.value": value}
            case (Tensor() as key, Tensor() as value, Mapping() as beside):
                parts = {"key": key, "value": value, **cast(Mapping[str, Tensor], beside)}
                found |= {f"{_PAST}.{i}.{part}": tensor for part, tensor in parts.items()}
            case _:
                raise _no_cache(f"layer {i} is a {type(pair).__name__}")
    return found


def _no_cache(given: str) -> TypeError:
    return TypeError(f"forward(): {_PAST}: {given}; give a DynamicCache, or a pair of tensors for each layer")


def _by_name(source: Source, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
    """Arguments of a call by the names of the captured inputs; those that ask for nothing are left out."""
    names = source.names
    places = arguments(names, args)
    if len(args) > len(places):
        raise TypeError(f"forward() takes {len(places)} inputs, {len(args)} were given: {', '.join(places)}")
    batch = dict(zip(places, args, strict=False))
    known = frozenset(names)
    for name, value in kwargs.items():
        asks = value is not None and not (isinstance(value, int) and not value)
        if not asks and is_transformers(source):
            continue
        if name not in known and not any(one.startswith(f"{name}.") for one in names):
            raise TypeError(f"forward() was captured without the argument {name}; it takes {', '.join(names)}")
        if name in batch:
            raise TypeError(f"forward() got {name} twice, by position and by name")
        batch[name] = value
    if not batch:
        raise SpecError(f"inputs: none given; the model takes {', '.join(names)}")
    return batch
