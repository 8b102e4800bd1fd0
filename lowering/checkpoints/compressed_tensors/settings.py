"""``quantization_config`` of ``config.json``, as compressed-tensors writes and reads it.

Source: compressed-tensors 0.20, ``quantization/quant_config.py`` and ``quant_args.py``. Every group of layers that are
quantized alike says its own format; a layer's group is found by its name, or by its class where all linears are alike.
"""

import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any, Final, Literal

import torch

from graphq.capture.source import Source
from graphq.errors import SpecError
from graphq.frontends.llm_compressor.args import write_args
from graphq.lowering.checkpoints.compressed_tensors.layouts import layout_of
from graphq.lowering.checkpoints.compressed_tensors.vllm import unserved
from graphq.lowering.checkpoints.layers import QuantizedLinear
from graphq.spec.formats import Float, Format, Int, Mx, Nvfp4, has_source_arithmetic
from graphq.spec.quant import PerGroup, PerHead, PerTensor, Quant

Consumer = Literal["vllm", "transformers", "any"]
VERSION: Final = "0.20.0"  # of the format: since 0.18 codes of 3, 5, 6 and 7 bits lie across words
_DEFAULTS: Final[Mapping[str, Any]] = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": None,
    "num_bits": 8,
    "observer": None,
    "observer_kwargs": {},
    "scale_dtype": None,
    "strategy": "tensor",
    "symmetric": True,
    "type": "int",
    "zp_dtype": None,
}


def weight_args(quant: Quant) -> dict[str, Any]:
    """``QuantizationArgs`` of a weight. Raises ``SpecError`` for a format that it cannot say."""
    named = _stored(quant)
    own = replace(named, arithmetic="source" if has_source_arithmetic(named.format) else "float32")
    return _DEFAULTS | write_args(own, "weights") | _zero_points(quant) | {"observer": "memoryless_minmax"}


def input_args(quant: Quant) -> dict[str, Any]:
    """``QuantizationArgs`` of a linear's input. Raises ``SpecError`` for a format that it cannot say.

    Scales of run time are the consumer's: vLLM's integer kernels divide absmax by 127, as ``int8`` does.
    """
    args = _DEFAULTS | write_args(
        quant if quant.dynamic and isinstance(quant.format, Mx) else _stored(quant), "input_activations"
    )
    observer = None if args["dynamic"] is True else "static_minmax"
    return args | _zero_points(quant) | {"observer": observer}


def _stored(quant: Quant) -> Quant:
    """The same quantization by the rule for scales that compressed-tensors has a name for: they need not follow it."""
    return Quant(_named(quant.format), quant.granularity, quant.dynamic)


def _named(format: Format) -> Format:
    match format:
        case Int(bits, symmetric, signed=True):
            return Int(bits, symmetric, "half" if symmetric else "max", joint=not symmetric)
        case Float(layout):
            return Float(layout)
        case Mx():
            return replace(format, rule="even")
        case _:
            return format


def _zero_points(quant: Quant) -> dict[str, Any]:
    """What is said of zero points, and of scales that are no plain numbers."""
    match quant.format:
        case Int(symmetric=False):
            return {"zp_dtype": "torch.int8"}
        case Nvfp4():
            return {"scale_dtype": "torch.float8_e4m3fn"}
        case _:
            return {}


def cache_args(quant: Quant) -> dict[str, Any]:
    """``kv_cache_scheme``. Raises ``SpecError`` for a format that it cannot say."""
    return _DEFAULTS | write_args(_stored(quant), "kv_cache_scheme") | {"observer": "static_minmax"}


def cache_problem(quant: Quant, consumer: Consumer) -> str | None:
    """Why a consumer reads no cache that is quantized so; None if it does.

    Source: vLLM 0.26, ``CompressedTensorsKVCacheMethod``; compressed-tensors 0.20, ``_apply_kv_cache_scheme``.
    """
    if quant.dynamic:
        return "a checkpoint holds scales of caches that calibration fixed; leave out dynamic"
    if not isinstance(quant.granularity, PerTensor | PerHead):
        return "compressed-tensors has one scale of a cache for each tensor or head; write tensor or head"
    if isinstance(quant.format, Int) and not (quant.format.symmetric and quant.format.signed):
        return "compressed-tensors has no zero points of caches; write a symmetric format"
    try:
        cache_args(quant)
    except SpecError as error:
        return str(error)
    if consumer == "vllm" and quant.format != Float("float8_e4m3fn"):
        return "vLLM reads caches of float8_e4m3fn alone; write that, or say consumer=transformers"
    return None


def latent_problem(source: Source) -> str | None:
    """Why a server cannot take the scales of a cache: it has one for the latents of MLA and what lies beside them."""
    settings: dict[str, Any] = json.loads(source.config) if source.config else {}
    if not settings.get("kv_lora_rank"):
        return None
    return "this model's attention is latent (MLA); servers have one scale for its latents and rotary keys together"


def quantization_config(
    layers: Mapping[str, QuantizedLinear],
    linears: Sequence[str],
    names: Mapping[str, str] | None = None,
    in_order: Container[str] = (),
    cache: Quant | None = None,
) -> dict[str, Any]:
    """The value of ``quantization_config`` for these quantized layers of a model with these ``linears``, by name.
    ``cache``: how its cache is quantized, if it is.

    names: of the group that a layer is in, where the spec has one for it; other groups of layers that are quantized
    alike are ``group_0``, ``group_1`` ... in the layers' order. in_order: the layers whose columns were rounded in the
    order of their activations, which is ``actorder: weight``.
    """
    groups: dict[tuple[str, str, str, bool], list[str]] = {}
    for name, layer in layers.items():
        key = (str(layer.weight), str(layer.input), (names or {}).get(name, ""), name in in_order)
        groups.setdefault(key, []).append(name)
    others = [name for name in linears if name not in layers]
    made: dict[str, Any] = {}
    for (_, _, own, ordered), members in groups.items():
        layer, held = layers[members[0]], set(members)
        apart = [name for name in linears if name not in held]
        is_all = len(groups) == 1 and not any(layers[name].kind == "embedding" for name in members)
        made[_free(own, made, {key[2] for key in groups})] = {
            "format": layout_of(layer.weight, layer.input),
            "input_activations": None if layer.input is None else input_args(layer.input),
            "output_activations": None,
            "targets": ["Linear"] if is_all else targets(members, apart),
            "weights": weight_args(layer.weight) | ({"actorder": "weight"} if ordered else {}),
        }
    formats = list(dict.fromkeys(group["format"] for group in made.values()))
    return {
        "config_groups": made,
        "format": "dense" if not formats else formats[0] if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": others if layers else [],
        "kv_cache_scheme": None if cache is None else cache_args(cache),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _free(own: str, made: Container[str], taken: Container[str]) -> str:
    """The name of a group that has its ``own``, or one that none of those that are ``made`` or ``taken`` has."""
    if own and own not in made:
        return own
    stem = own or "group"
    return next(name for i in count() if (name := f"{stem}_{i}") not in made and name not in taken)


def targets(members: Iterable[str], others: Iterable[str]) -> list[str]:
    """Names, or patterns of names that differ in numbers alone, that match ``members`` and none of ``others``."""
    kept = {_shape(name) for name in others}
    found: dict[str, None] = {}
    for name in members:
        found[name if _shape(name) in kept else _pattern(name)] = None
    return list(found)


def _shape(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def _pattern(name: str) -> str:
    """``re:`` and a pattern for the names that differ from this one in their numbers; the name, if it has none."""
    parts = re.split(r"\d+", name)
    return name if len(parts) == 1 else "re:^" + r"\d+".join(map(re.escape, parts)) + "$"


def problem(weight: Quant, given: Quant | None) -> str | None:
    """Why compressed-tensors cannot hold a layer that is quantized so; None if it can."""
    if layout_of(weight, given) is None:
        return f"{weight}: compressed-tensors has no format for it"
    if given is not None and isinstance(given.format, Nvfp4) and given.dynamic:
        return f"input {given}: compressed-tensors fixes the global scale; write nvfp4"
    try:
        weight_args(weight)
        if given is not None:
            input_args(given)
    except SpecError as error:
        return str(error)
    return None


def _packs_zero_points(weight: Quant, given: Quant | None) -> bool:
    is_packed = layout_of(weight, given) == "pack-quantized"
    is_asymmetric = isinstance(weight.format, Int) and not weight.format.symmetric
    return is_packed and is_asymmetric and not isinstance(weight.granularity, PerTensor)


def consumer_problem(
    kind: str,
    weight: Quant,
    given: Quant | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    consumer: Consumer,
) -> str | None:
    """Why a consumer takes no layer of this kind with a weight ``[rows, columns]`` that is quantized so beside such
    inputs, in a model of this ``dtype``; None if it does.
    """
    rows, columns = shape
    if kind == "embedding" and consumer != "any":
        return f"{consumer} loads no quantized embedding; keep it float, or say consumer=any"
    if kind == "expert" and consumer == "transformers":
        return "transformers loads no quantized experts, which it stacks; keep them float, or say consumer=vllm"
    if isinstance(weight.granularity, PerGroup) and columns % weight.granularity.size:
        size = weight.granularity.size
        return f"{weight}: {columns} inputs are no multiple of {size}, and compressed-tensors has no shorter group"
    if consumer == "transformers" and _packs_zero_points(weight, given):
        return f"{weight}: transformers loads no packed zero points; write a symmetric format, or asym/tensor"
    if consumer == "transformers" and dtype == torch.float16 and isinstance(weight.format, Mx | Nvfp4):
        return f"{weight}: transformers dequantizes it to bfloat16, and fails on it in a model of float16"
    if consumer != "vllm":
        return None
    if (reason := unserved(weight, given)) is not None:
        return f"{reason}, or say consumer=any"
    if isinstance(weight.format, Int) and weight.format.bits < 8 and (rows % 32 or columns % 32):
        return f"{weight}: vLLM takes packed weights whose sizes are multiples of 32; this one is [{rows}, {columns}]"
    if isinstance(weight.format, Mx | Nvfp4) and rows % 16:
        return f"{weight}: vLLM takes such weights whose outputs are multiples of 16; this one has {rows}"
    return None
