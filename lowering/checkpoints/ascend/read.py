"""What an Ascend checkpoint holds: its description, its quantized layers with their tags, its other tensors.

Source: msModelSlim 26.1, whose ``quant_model_description.json`` has a tag for each tensor and a few keys of the whole.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast, final

from torch import Tensor

from graphq.artifacts.shards import INDEX_SUFFIX, SUFFIX, read_shards
from graphq.errors import GraphqError, TargetError
from graphq.lowering.checkpoints.ascend.caches import decode_caches
from graphq.lowering.checkpoints.ascend.layouts import decode
from graphq.lowering.checkpoints.ascend.tags import TAGS

DESCRIPTION: Final = "quant_model_description.json"
STEM: Final = "quant_model_weights"
V0_STEM: Final = "quant_model_weight_w8a8"
STEMS: Final = (STEM, V0_STEM)
_ENDS: Final = (SUFFIX, INDEX_SUFFIX)
GLOBAL_KEYS: Final = frozenset(
    (
        *("version", "model_quant_type", "metadata", "group_size", "optional", "kv_cache_type", "kv_quant_type"),
        *("fa_quant_type", "reduce_quant_type", "is_rot_used", "indexer_quant_type", "max_supported_tp"),
    )
)


@final
@dataclass(frozen=True)
class Description:
    """tags: of each tensor by its name. keys: what is said of the whole."""

    tags: Mapping[str, str]
    keys: Mapping[str, Any]


@final
@dataclass(frozen=True)
class StoredLayer:
    """A quantized layer as the files have it: its tag and its tensors by the ends of their names, without its bias."""

    name: str
    tag: str
    parts: Mapping[str, Tensor]


@final
@dataclass(frozen=True)
class StoredCheckpoint:
    """layers: the quantized ones by name. others: all other tensors by name, biases of quantized layers among them."""

    description: Description
    layers: Mapping[str, StoredLayer]
    others: Mapping[str, Tensor]


def read_description(directory: Path) -> Description:
    """The description in ``directory``. Raises ``TargetError`` naming the file and the key that is wrong."""
    file = directory / DESCRIPTION
    if not file.is_file():
        raise TargetError(f"{file}: no such file")
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise TargetError(f"{file}: damaged: {error}") from error
    if not isinstance(found, dict):
        raise TargetError(f"{file}: damaged: is no object of tags by name")
    tags: dict[str, str] = {}
    keys: dict[str, Any] = {}
    for name, value in cast(dict[str, Any], found).items():
        if name in GLOBAL_KEYS or name.endswith(".quant_type"):
            keys[name] = value
        elif isinstance(value, str):
            tags[name] = value
        else:
            raise TargetError(f"{file}: damaged: {name}: {str(value)[:40]} is not a tag such as W8A8")
    return Description(tags, keys)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} stands twice")
    return found


def stem_of(directory: Path) -> str:
    """What the files of weights in ``directory`` are called: by the first of the layouts that is there."""
    return next((one for one in STEMS if any((directory / (one + end)).exists() for end in _ENDS)), STEM)


def read_checkpoint(directory: Path) -> StoredCheckpoint:
    """All that a checkpoint holds. Raises ``TargetError`` naming the file and the tensor that is wrong."""
    description = read_description(directory)
    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in read_shards(directory, stem_of(directory)):
        layer, _, suffix = name.rpartition(".")
        tag, own = description.tags.get(name), description.tags.get(f"{layer}.weight")
        if tag is None:
            raise TargetError(f"{directory / DESCRIPTION}: {name}: has no tag, and the weights have such a tensor")
        if tag not in TAGS:
            others[name] = tensor
        elif own not in TAGS:
            raise TargetError(f"{directory / DESCRIPTION}: {name}: {tag}, of no quantized layer")
        elif tag != own:
            raise TargetError(f"{directory / DESCRIPTION}: {name}: {tag}, but its weight is {own}")
        else:
            layers.setdefault(layer, {})[suffix] = tensor
    held = {f"{layer}.{suffix}" for layer, parts in layers.items() for suffix in parts} | others.keys()
    missing = description.tags.keys() - held
    if missing:
        raise TargetError(f"{directory}: {', '.join(sorted(missing)[:3])}: described, and not in the weights")
    return StoredCheckpoint(
        description,
        {name: StoredLayer(name, description.tags[f"{name}.weight"], parts) for name, parts in layers.items()},
        others,
    )


def decoded(layer: StoredLayer) -> dict[str, Tensor]:
    """The tensors of a layer by the names of the QDQ form, codes unpacked. Raises ``TargetError`` naming the layer."""
    try:
        codes, scales, given = decode(layer.parts, layer.tag)
    except KeyError as error:
        raise TargetError(f"{layer.name}: {layer.tag}: has no {error.args[0]}") from error
    except (RuntimeError, IndexError, ValueError, GraphqError) as error:
        raise TargetError(f"{layer.name}: {layer.tag}: damaged: {error}") from error
    parts = {"weight": codes, "weight_scale": scales.scale, "weight_zero_point": scales.zero_point}
    parts |= {"weight_global_scale": scales.global_scale, **given}
    return {f"{layer.name}.{suffix}": part for suffix, part in parts.items() if part is not None}


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by the names of the QDQ form, packed codes unpacked. Raises ``TargetError``."""
    found = read_checkpoint(path)
    quantized: dict[str, Tensor] = {}
    for layer in found.layers.values():
        try:
            quantized |= decoded(layer)
        except TargetError as error:
            raise TargetError(f"{path}: {error}") from error
    return {**decode_caches(found.others, found.description.tags), **quantized}
