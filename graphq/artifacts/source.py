"""A ``Source`` as the manifest holds it, and back; what is not a source is refused by its key."""

import json
from collections.abc import Mapping
from typing import Any, Final, cast

import torch

from graphq.artifacts.fields import are_texts, entry, is_size, is_text
from graphq.artifacts.structure import structure_from_json, structure_json
from graphq.capture.source import CachePair, Source, TensorInput

_KINDS: Final = ("tensor", "tuple", "dict", "structured")


def source_json(source: Source) -> dict[str, Any]:
    """A ``Source`` as plain data, without the place it was read from."""
    return {
        "inputs": [
            {"name": i.name, "dtype": str(i.dtype).removeprefix("torch."), "shape": list(i.shape)}
            for i in source.inputs
        ],
        "outputs": list(source.outputs),
        "output_kind": source.output_kind,
        "dtype": str(source.dtype).removeprefix("torch."),
        "ranges": [list(r) for r in source.ranges],
        "blocks": list(source.blocks),
        "caches": [[pair.past, pair.present] for pair in source.caches],
        "config": source.config,
        "generation_config": source.generation_config,
        "mask": source.mask,
        **({"structure": structure_json(source.structure)} if source.structure is not None else {}),
    }


def source_from_json(data: object) -> Source:
    """The ``Source`` that ``source_json`` wrote. Raises ``ValueError`` that begins with the key for other data."""
    entries: list[Any] = entry(data, "inputs", lambda value: isinstance(value, list), "a list")
    inputs = tuple(_input(i) for i in entries)
    names = [i.name for i in inputs]
    if len(set(names)) < len(names):
        raise ValueError("inputs: two have one name")
    outputs = tuple(entry(data, "outputs", lambda value: are_texts(value) and _are_distinct(value), "distinct names"))
    kind = entry(data, "output_kind", lambda value: value in _KINDS, f"one of {', '.join(_KINDS)}")
    structure = entry(data, "structure", lambda value: True, "") if kind == "structured" else None
    caches = entry(data, "caches", _are_pairs, "a list of pairs of names")
    for past, present in caches:
        if past not in names or present not in outputs:
            raise ValueError(f"caches: no input {past!r:.80} that comes back as an output {present!r:.80}")
    return Source(
        inputs=inputs,
        outputs=outputs,
        output_kind=kind,
        dtype=dtype_named(entry(data, "dtype", _is_float, "a floating-point dtype")),
        ranges=tuple(
            (n, low, high) for n, low, high in entry(data, "ranges", _are_ranges, "a list of [name, low, high]")
        ),
        blocks=tuple(entry(data, "blocks", are_texts, "a list of paths")),
        config=entry(data, "config", _is_config, "null or a model's settings as the text of a JSON object"),
        generation_config=entry(data, "generation_config", _is_settings, "null or the text of a JSON object"),
        caches=tuple(CachePair(past, present) for past, present in caches),
        mask=entry(data, "mask", lambda value: value is None or value in names, "null or the name of an input"),
        structure=structure_from_json(structure, outputs) if kind == "structured" else None,
    )


def dtype_named(name: str) -> torch.dtype:
    """The dtype of this name. Raises ``KeyError`` for another name."""
    found = getattr(torch, name, None) if name.isidentifier() else None
    if not isinstance(found, torch.dtype):
        raise KeyError(f"no dtype {name}")
    return found


def _input(data: object) -> TensorInput:
    try:
        name = entry(data, "name", is_text, "a name")
        dtype = entry(data, "dtype", lambda value: _dtype_or_none(value) is not None, "a dtype")
        shape = entry(data, "shape", _is_shape, "a list of sizes and names")
    except ValueError as error:
        raise ValueError(f"inputs: {error}") from error
    return TensorInput(name, dtype_named(dtype), tuple(shape))


def _dtype_or_none(name: object) -> torch.dtype | None:
    try:
        return dtype_named(name) if isinstance(name, str) else None
    except KeyError:
        return None


def _is_float(name: object) -> bool:
    dtype = _dtype_or_none(name)
    return dtype is not None and dtype.is_floating_point


def _are_distinct(names: list[str]) -> bool:
    return len(set(names)) == len(names)


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and all(is_text(d) or is_size(d) for d in cast(list[object], value))


def _are_pairs(value: object) -> bool:
    return isinstance(value, list) and all(are_texts(p) and len(p) == 2 for p in cast(list[Any], value))


def _are_ranges(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_range, cast(list[object], value)))


def _is_range(value: object) -> bool:
    match value:
        case [str(), low, high]:
            return is_size(low) and is_size(high) and low <= high
        case _:
            return False


def _settings(text: object) -> Mapping[str, Any] | None:
    """The JSON object that the text holds, if it does; transformers writes NaN and Infinity as they are."""
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
    return cast(Mapping[str, Any], found) if isinstance(found, dict) else None


def _is_settings(text: object) -> bool:
    return text is None or _settings(text) is not None


def _is_config(text: object) -> bool:
    """Whether it is null, or settings that name their model, if at all, by text."""
    if text is None:
        return True
    match _settings(text):
        case None:
            return False
        case found:
            classes, kind = found.get("architectures"), found.get("model_type")
            return (classes is None or are_texts(classes)) and (kind is None or is_text(kind))
