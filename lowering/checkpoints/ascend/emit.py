"""The Ascend target: a checkpoint in msModelSlim's format, which vLLM-Ascend loads on an NPU.

Safetensors with the names of the source, quantized linears as ``layouts`` stores them, and a description that has a tag
for each tensor. Scales are float32, and numbers of the source's dtype where the model was compiled for this target:
vLLM-Ascend casts those of most types to it as it loads them.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx

from graphq.artifacts import manifest
from graphq.artifacts.emission import Emission
from graphq.artifacts.shards import INDEX_SUFFIX, SUFFIX, InParts, write_shards
from graphq.capture.source import Source, source_of
from graphq.errors import TargetError
from graphq.files import whole_directory
from graphq.lowering.checkpoints.ascend.caches import KEYS as CACHE_KEYS
from graphq.lowering.checkpoints.ascend.caches import TAG as CACHE_TAG
from graphq.lowering.checkpoints.ascend.caches import cache_problems, encode_cache, held_cache
from graphq.lowering.checkpoints.ascend.layouts import Place, encode
from graphq.lowering.checkpoints.ascend.read import DESCRIPTION, STEM, STEMS, V0_STEM
from graphq.lowering.checkpoints.ascend.roles import row_parallel
from graphq.lowering.checkpoints.ascend.tags import (
    FLOAT,
    Consumer,
    Layout,
    Prefill,
    Wanted,
    file_problems,
    group_size_of,
    layer_problem,
    quant_type,
    tag_of,
)
from graphq.lowering.checkpoints.caches import CacheScales, cache_scales
from graphq.lowering.checkpoints.content import Content, checkpoint_form, content_of, held, lost
from graphq.lowering.checkpoints.layers import is_stored
from graphq.lowering.checkpoints.written import FloatTensor, Written

TARGET: Final = "ascend"
FILES: Final = ("config.json", DESCRIPTION, *(stem + end for stem in STEMS for end in (INDEX_SUFFIX, SUFFIX)))
SHARD_BYTES: Final = 4 << 30  # msModelSlim's
VERSION: Final = "1.0.0"  # codes of 4 bits are packed, and scale_bias is there


def form(gm: fx.GraphModule) -> fx.GraphModule:
    """``checkpoint_form`` of the QDQ form ``gm``."""
    return checkpoint_form(gm, TARGET)


def emit(
    gm: fx.GraphModule,
    path: str | Path,
    made_from: Mapping[str, Any],
    *,
    overwrite: bool = False,
    consumer: Consumer = "vllm-ascend",
    layout: Layout = "v1",
    prefill: Prefill = "static",
    tp: int = 1,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[str, ...]:
    """The QDQ form ``gm`` as a checkpoint in the directory ``path``, written whole or not at all.

    consumer: what is to load it: ``vllm-ascend``, or ``any`` that reads the format. layout: ``v0`` has int4 groups over
    int8 channels, and that version's file name. prefill: with ``dynamic``, layers with static inputs are tagged for
    dynamic ones while a prompt is read. tp: how many ranks of tensor parallelism are to serve it. shard_bytes: the
    largest size of a file. ``made_from`` goes into the manifest. Gives no notes.

    Raises ``TargetError`` with a line for everything that a checkpoint cannot hold, and for an existing ``path``.
    """
    if shard_bytes < 1:
        raise TargetError(f"{TARGET}: shard_bytes: {shard_bytes} is not a positive number of bytes")
    wanted = Wanted(consumer, layout, prefill, tp)
    content = content_of(gm, TARGET, ties=True)
    rows = row_parallel(content.graph)
    caches = cache_scales(content.graph)
    problems = [*_problems(content, rows, wanted), *cache_problems(caches, source_of(gm), TARGET)]
    if problems := [*problems, *lost(content)]:
        raise TargetError("\n".join(dict.fromkeys(f"{TARGET}: {line}" for line in problems)))
    floats = {name: _stored_bias(content, name, tensor) for name, tensor in content.floats.items()}
    written = Written()
    of_caches = {name: manifest.record(tensor) for one in caches for name, tensor in held_cache(one).items()}
    description: dict[str, Any] = {}
    options = {"target": TARGET, "shard_bytes": shard_bytes, "wanted": wanted}
    learnt = {"layers": written.layers, "floats": written.floats, "description": description}
    emission = Emission(gm, options, learnt)
    config = {key: value for key, value in content.config.items() if key != "quantization_config"}
    with whole_directory(path, overwrite, manifest.sources(gm), emission.directory) as directory:
        make = partial(_tensors, content, floats, rows, wanted, description, written)
        named = chain(
            emission.tensors(content.architecture.names.values(), make),
            _tensors_of(caches, source_of(gm).dtype, description),
        )
        is_v0 = layout == "v0"
        stem = V0_STEM if is_v0 else STEM
        kept: dict[str, Any] = {"finished": emission.shards, "after": emission.after}
        write_shards(directory, named, shard_bytes, stem, numbered=not is_v0, metadata=None, **kept)
        tags = [tag for tag in dict.fromkeys(description.values()) if tag != CACHE_TAG]
        sizes = [group_size_of(layer.weight) for layer in content.layers.values()]
        description |= {"version": VERSION, "model_quant_type": quant_type(tags), "metadata": {}}
        description |= {"group_size": max(sizes, default=0), "optional": {}}
        description |= CACHE_KEYS if caches else {}
        text = json.dumps(description, indent=4) + "\n"
        (directory / DESCRIPTION).write_text(text, encoding="utf-8")
        records = written.all(floats, content.layers) | of_caches
        quantized = written.quantized(content.layers) | of_caches
        manifest.write(directory, content.graph, TARGET, made_from, records, quantized, config)
    emission.end()
    return ()


def _stored_bias(content: Content, name: str, tensor: FloatTensor) -> FloatTensor | Tensor:
    """The tensor; a quantized layer's bias in float32."""
    return tensor.read().float() if name.endswith(".bias") and name.removesuffix(".bias") in content.layers else tensor


def _tensors(
    content: Content,
    floats: Mapping[str, FloatTensor | Tensor],
    rows: frozenset[str],
    wanted: Wanted,
    description: dict[str, Any],
    written: Written,
    name: str,
) -> Iterator[tuple[str, Tensor | InParts]]:
    """The tensors of the checkpoint for the source's tensor ``name``, which are held together; ``description`` gets the
    tag of each.

    Raises ``TargetError`` for scales that were not read before and that vLLM-Ascend's dtype does not hold.
    """
    dtype = source_of(content.graph).dtype
    path = name.removesuffix(".weight")
    found = content.layers.get(path)
    if found is not None:
        layer = found.read()
        if not found.is_read and wanted.consumer == "vllm-ascend" and not is_stored(layer, dtype):
            raise TargetError(f"{TARGET}: {path}: {_not_stored(dtype)}")
        written.layer(path, held(layer))
        tag = str(tag_of(layer.weight, layer.input, wanted))
        bias = floats.get(f"{path}.bias")
        place = Place(bias if isinstance(bias, Tensor) else None, path in rows, dtype)
        for suffix, tensor in encode(layer, tag, place).items():
            description[f"{path}.{suffix}"] = tag
            yield f"{path}.{suffix}", tensor
    elif name in floats:
        description[name] = FLOAT
        yield name, written.float_tensor(name, floats[name])


def _tensors_of(
    caches: Iterable[CacheScales], dtype: torch.dtype, description: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    for one in caches:
        for name, tensor in encode_cache(one, dtype).items():
            description[name] = CACHE_TAG
            yield name, tensor


def _problems(content: Content, rows: frozenset[str], wanted: Wanted) -> Iterator[str]:
    """A line for each layer that the format, or what is to load it, cannot hold."""
    dtype = source_of(content.graph).dtype
    for name, layer in content.layers.items():
        reason = layer_problem(layer.kind, layer.weight, layer.input, layer.codes.shape, name in rows, wanted)
        if reason is None and layer.is_read and wanted.consumer == "vllm-ascend" and not is_stored(layer, dtype):
            reason = _not_stored(dtype)
        if reason is not None:
            yield f"{name}: {reason}"
    yield from file_problems({name: (one.weight, one.input) for name, one in content.layers.items()}, wanted)


def _not_stored(dtype: torch.dtype) -> str:
    short = str(dtype).removeprefix("torch.")
    return f"its scales are no numbers of {short}, in which vLLM-Ascend holds them; compile with target={TARGET!r}"


def open_checkpoint(path: Path, source: Source) -> Callable[..., Any]:
    """Raises ``TargetError``: nothing here runs such a checkpoint."""
    raise TargetError(f"{path}: an Ascend checkpoint runs on an NPU, in vLLM-Ascend; graphq verify reads it back")
