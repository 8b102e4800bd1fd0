"""How a compiled model is called: like its source, or like any model of transformers, which this does not import."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, assert_never, cast, final

from torch import Tensor

from graphq.capture.source import Source
from graphq.data.batches import complete
from graphq.errors import SpecError

Outputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


@final
class ModelOutput(dict[str, Tensor]):
    """The outputs of a transformers model by name, in their order, as transformers' own ``ModelOutput`` gives them.

    ``out["logits"]``, ``out.logits`` and ``out[0]`` are one tensor. ``out.past_key_values`` holds ``present.{i}.key``
    and ``present.{i}.value``: a ``DynamicCache``, or one pair of tensors for each layer where transformers is not
    installed, and None without a cache. The next call takes it back, as does transformers.
    """

    def __getitem__(self, key: str | int | slice) -> Any:
        """By name, or as in a tuple."""
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __missing__(self, key: str) -> Any:
        if key == "past_key_values" and (found := self.past_key_values) is not None:
            return found
        raise KeyError(key)

    def __getattr__(self, name: str) -> Tensor:
        try:
            return super().__getitem__(name)
        except KeyError:
            raise AttributeError(f"the model returned no {name}; it returned {', '.join(self)}") from None

    @property
    def past_key_values(self) -> Any:
        """The key/value cache, as the class says."""
        pairs: list[tuple[Tensor, Tensor]] = []
        while (name := f"present.{len(pairs)}") + ".key" in self:
            pairs.append((self[f"{name}.key"], self[f"{name}.value"]))
        if not pairs:
            return None
        try:
            from graphq.runtime.generation import dynamic_cache
        except ImportError:
            return tuple(pairs)
        return dynamic_cache(pairs)

    def to_tuple(self) -> tuple[Tensor, ...]:
        """The outputs in their order."""
        return tuple(self.values())


def is_transformers(source: Source) -> bool:
    """Whether the source is called as transformers' models are."""
    return source.config is not None or source.is_causal_lm


def call(
    source: Source,
    run: Callable[[tuple[Tensor, ...]], Iterable[Tensor]],
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> Outputs:
    """What ``run``, which takes all flat inputs and gives all flat outputs, makes of a call of the source.

    A model of transformers also takes ``past_key_values`` (a ``DynamicCache``, or a pair of tensors for each layer),
    ``use_cache=False`` (the outputs hold no cache), ``return_dict=False`` (they are a tuple) and any argument that asks
    for nothing: None, False or 0. Raises ``TypeError`` for an argument that was not captured, ``SpecError`` for a wrong
    shape.
    """
    given = dict(kwargs)
    switches: dict[str, object] = {}
    if is_transformers(source):
        switches = {name: given.pop(name) for name in ("use_cache", "return_dict") if name in given}
        given |= cached(given.pop("past_key_values", None))
    batch = complete(source, _by_name(source, args, given))
    outputs = tuple(run(batch))
    match source.output_kind:
        case "tensor":
            return outputs[0]
        case "tuple":
            return outputs
        case "dict":
            named = dict(zip(source.outputs, outputs, strict=True))
            if switches.get("use_cache") is False:
                named = {name: x for name, x in named.items() if name not in source.presents}
            if switches.get("return_dict") is False:
                return tuple(named.values())
            return ModelOutput(named) if is_transformers(source) else named
        case _:
            assert_never(source.output_kind)


def cached(past: Any) -> dict[str, Tensor]:
    """The flat inputs ``past_key_values.{i}.key`` and ``.value`` of a key/value cache: a cache of transformers, whose
    layers may be empty yet, a pair of tensors for each layer, or None.
    """
    layers = getattr(past, "layers", None)
    if layers is not None:
        pairs = [(layer.keys, layer.values) if layer.is_initialized else None for layer in layers]
    else:
        pairs = cast("Sequence[tuple[Tensor, Tensor] | None]", past or ())
    found: dict[str, Tensor] = {}
    for i, pair in enumerate(pairs):
        if pair is not None:
            found |= {f"past_key_values.{i}.key": pair[0], f"past_key_values.{i}.value": pair[1]}
    return found


def _by_name(source: Source, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
    """Arguments of a call by the names of the captured inputs; those that ask for nothing are left out."""
    names = [i.name for i in source.inputs]
    if len(args) > len(names):
        raise TypeError(f"forward() takes {len(names)} inputs, {len(args)} were given: {', '.join(names)}")
    batch = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        asks = value is not None and not (isinstance(value, int) and not value)
        if not asks and is_transformers(source):
            continue
        if name not in names:
            raise TypeError(f"forward() was captured without the argument {name}; it takes {', '.join(names)}")
        if name in batch:
            raise TypeError(f"forward() got {name} twice, by position and by name")
        batch[name] = value
    if not batch:
        raise SpecError(f"inputs: none given; the model takes {', '.join(names)}")
    return batch
