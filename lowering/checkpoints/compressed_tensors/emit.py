"""The compressed-tensors target: a checkpoint that vLLM and transformers load.

Safetensors with the names and dtypes of the source, quantized linears as ``layouts`` stores them, and ``config.json``
with ``quantization_config``. Scales are stored in the dtype of the source's weights, and are numbers of it where the
model was compiled for this target.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx, nn

from graphq.artifacts import manifest
from graphq.artifacts.emission import Emission
from graphq.artifacts.shards import INDEX, SHARD_BYTES, WEIGHTS, InParts, read_shards, write_shards
from graphq.capture.source import Source, source_of
from graphq.errors import GraphqError, TargetError
from graphq.files import whole_directory
from graphq.lowering.checkpoints.caches import cache_scales
from graphq.lowering.checkpoints.compressed_tensors.caches import (
    cache_problems,
    decode_cache,
    encode_cache,
    held_cache,
)
from graphq.lowering.checkpoints.compressed_tensors.layouts import (
    LAYOUTS,
    decode_input,
    encode_input,
    layout_of,
)
from graphq.lowering.checkpoints.compressed_tensors.read import read_schemes
from graphq.lowering.checkpoints.compressed_tensors.settings import (
    Consumer,
    consumer_problem,
    problem,
    quantization_config,
)
from graphq.lowering.checkpoints.content import Content, checkpoint_form, content_of, held, lost
from graphq.lowering.checkpoints.layers import float_linears, is_stored
from graphq.lowering.checkpoints.written import Written

TARGET: Final = "compressed-tensors"
FILES: Final = ("config.json", INDEX, WEIGHTS)


def form(gm: fx.GraphModule) -> fx.GraphModule:
    """``checkpoint_form`` of the QDQ form ``gm``."""
    return checkpoint_form(gm, TARGET)


def emit(
    gm: fx.GraphModule,
    path: str | Path,
    made_from: Mapping[str, Any],
    *,
    overwrite: bool = False,
    consumer: Consumer = "vllm",
    shard_bytes: int = SHARD_BYTES,
) -> tuple[str, ...]:
    """The QDQ form ``gm`` as a checkpoint in the directory ``path``, written whole or not at all.

    consumer: what is to load it: ``vllm``, ``transformers``, or ``any`` that reads the format. shard_bytes: the largest
    size of a file. ``made_from`` goes into the manifest. Gives no notes.

    Raises ``TargetError`` with a line for everything that a checkpoint cannot hold, and for an existing ``path``.
    """
    if shard_bytes < 1:
        raise TargetError(f"{TARGET}: shard_bytes: {shard_bytes} is not a positive number of bytes")
    content = content_of(gm, TARGET)
    layers, floats, dtype = content.layers, content.floats, source_of(gm).dtype
    caches = cache_scales(content.graph)
    problems = [*_problems(content, consumer), *cache_problems(caches, source_of(gm), consumer, TARGET)]
    if problems := [*problems, *lost(content)]:
        raise TargetError("\n".join(dict.fromkeys(f"{TARGET}: {line}" for line in problems)))
    linears = dict.fromkeys((*content.architecture.linears, *layers, *float_linears(content.graph)))
    cache = caches[0].quant if caches else None
    names = content.architecture.names
    rows = {names.get(f"{row['layer']}.weight", "").removesuffix(".weight"): row for row in made_from.get("report", ())}
    groups = {name: str(row["group"]) for name, row in rows.items() if "group" in row}
    in_order = [name for name, row in rows.items() if row.get("in_order")]
    settings = quantization_config(layers, list(linears), groups, in_order, cache)
    config = content.config | {"quantization_config": settings}
    written = Written()
    options = {"target": TARGET, "consumer": consumer, "shard_bytes": shard_bytes}
    emission = Emission(gm, options, {"layers": written.layers, "floats": written.floats})
    of_caches = {name: manifest.record(tensor) for name, tensor in map(held_cache, caches)}
    with whole_directory(path, overwrite, manifest.sources(gm), emission.directory) as directory:
        own = emission.tensors(content.architecture.names.values(), partial(_tensors, content, dtype, written))
        named = chain(own, (encode_cache(one, dtype) for one in caches))
        write_shards(directory, named, shard_bytes, finished=emission.shards, after=emission.after)
        records, quantized = written.all(floats, layers) | of_caches, written.quantized(layers) | of_caches
        manifest.write(directory, content.graph, TARGET, made_from, records, quantized, config)
    emission.end()
    return ()


def _tensors(
    content: Content, dtype: torch.dtype, written: Written, name: str
) -> Iterator[tuple[str, Tensor | InParts]]:
    """The tensors of the checkpoint for the source's tensor ``name``, which are held together.

    Raises ``TargetError`` for scales that were not read before and are no numbers of ``dtype``.
    """
    found = content.layers.get(name.removesuffix(".weight"))
    if found is not None:
        layer = found.read()
        if not found.is_read and not is_stored(layer, dtype):
            raise TargetError(f"{TARGET}: {layer.name}: {_not_stored(dtype)}")
        written.layer(layer.name, held(layer))
        layout = LAYOUTS[str(layout_of(layer.weight, layer.input))]
        for suffix, tensor in (layout.encode(layer, dtype) | encode_input(layer, dtype)).items():
            yield f"{layer.name}.{suffix}", tensor
    elif name in content.floats:
        yield name, written.float_tensor(name, content.floats[name])


def _problems(content: Content, consumer: Consumer) -> Iterator[str]:
    """A line for each layer that the format, or what is to load it, cannot hold."""
    dtype = source_of(content.graph).dtype
    for name, layer in content.layers.items():
        reason = problem(layer.weight, layer.input) or consumer_problem(
            layer.kind, layer.weight, layer.input, layer.codes.shape, dtype, consumer
        )
        if reason is None and layer.is_read and not is_stored(layer, dtype):
            reason = _not_stored(dtype)
        if reason is not None:
            yield f"{name}: {reason}"


def _not_stored(dtype: torch.dtype) -> str:
    short = str(dtype).removeprefix("torch.")
    return f"its scales are no numbers of {short}, which stores them; compile with target={TARGET!r}"


def tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint by the names of the QDQ form, packed codes unpacked. Raises ``TargetError``."""
    schemes = read_schemes(path)
    stored_tensors = dict(read_shards(path))
    quantized = {name.removesuffix(".weight_scale") for name in stored_tensors if name.endswith(".weight_scale")}
    layers: dict[str, dict[str, Tensor]] = {layer: {} for layer in sorted(quantized)}
    found: dict[str, Tensor] = {}
    for name, tensor in stored_tensors.items():
        layer, _, suffix = name.rpartition(".")
        if (cache := decode_cache(name, tensor)) is not None:
            found |= [cache]
        elif layer in layers and suffix != "bias":
            layers[layer][suffix] = tensor
        else:
            found[name] = tensor
    for layer, parts in layers.items():
        try:
            scheme = schemes.of(layer)
        except TargetError as error:
            raise TargetError(f"{path / 'config.json'}: {error}") from error
        if scheme is None or scheme.format not in LAYOUTS:
            reason = "no group is for it" if scheme is None else f"{scheme.format}: is no format that is read"
            raise TargetError(f"{path}: {layer}: {reason}")
        try:
            codes, scales = LAYOUTS[scheme.format].decode(parts, scheme.weight)
            given = decode_input(parts)
        except (KeyError, RuntimeError, IndexError, ValueError, GraphqError) as error:
            raise TargetError(f"{path}: {layer}: damaged: {error}") from error
        named = {"weight": codes, "weight_scale": scales.scale, "weight_zero_point": scales.zero_point}
        named |= {"weight_global_scale": scales.global_scale}
        found |= {f"{layer}.{suffix}": part for suffix, part in named.items() if part is not None}
        found |= {f"{layer}.{suffix}": part for suffix, part in given.items()}
    return found


def open_checkpoint(path: Path, source: Source) -> Callable[..., Any]:
    """The checkpoint as transformers loads it, in evaluation mode. Raises ``TargetError`` where that cannot be."""
    try:
        import compressed_tensors  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise TargetError(f"{path}: transformers loads it with compressed-tensors; pip install it") from error
    import json

    import transformers

    name = json.loads(source.config or "{}").get("architectures", [""])[0]
    model: nn.Module = getattr(transformers, name).from_pretrained(path, dtype=source.dtype)
    return model.eval()
