"""Checkpoints of llm-compressor, and what else compressed-tensors reads: ``quantization_config``, tensors by formats.

Source: compressed-tensors 0.20, ``compressors/``, as ``compressed_tensors/layouts.py`` has it; ``weight_g_idx`` of its
releases before 0.19.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast, final

from torch import Tensor

from graphq import numerics
from graphq.artifacts.headers import StoredTensor
from graphq.errors import TargetError
from graphq.ir.stored_codes import COLUMNS, StoredWeight
from graphq.lowering.checkpoints.compressed_tensors.caches import is_of_cache
from graphq.lowering.checkpoints.compressed_tensors.layouts import LAYOUTS, decode_input
from graphq.lowering.checkpoints.compressed_tensors.read import Scheme, read_schemes
from graphq.lowering.checkpoints.sources.checkpoint import (
    FLOATS,
    CodedMatrix,
    Parts,
    QuantizedCheckpoint,
    by_layer,
    dtype_of,
    expect,
    floats_of,
    in_files,
)
from graphq.numerics import Scales
from graphq.spec.formats import Nvfp4, code_bits, is_asymmetric
from graphq.spec.quant import PerChannel, PerGroup, PerTensor, Quant


@final
@dataclass(frozen=True)
class _Format:
    """What a layer of a format has, beside zero points and scales of inputs.

    codes: the tensor of them, of one of ``dtypes``; ``word``: the bits of a word that several of them lie in, 0 where
    each has a byte. scales: the dtypes of ``weight_scale``. more: other tensors.
    """

    codes: str
    dtypes: tuple[str, ...]
    word: int = 0
    scales: tuple[str, ...] = FLOATS
    more: tuple[str, ...] = ()


_FORMATS: Final[Mapping[str, _Format]] = {
    "pack-quantized": _Format("weight_packed", ("I32",), 32, more=("weight_shape",)),
    "int-quantized": _Format("weight", ("I8",)),
    "float-quantized": _Format("weight", ("F8_E4M3",)),
    "naive-quantized": _Format("weight", ("I8", "F8_E4M3")),
    "nvfp4-pack-quantized": _Format("weight_packed", ("U8",), 8, ("F8_E4M3",), ("weight_global_scale",)),
    "mxfp4-pack-quantized": _Format("weight_packed", ("U8",), 8, ("U8",)),
    "mxfp8-quantized": _Format("weight", ("F8_E4M3",), 0, ("U8",)),
}
_PARTS: Final = frozenset(
    (
        *("weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_global_scale"),
        *("input_scale", "input_zero_point", "input_global_scale", COLUMNS),
    )
)


def read(directory: Path, config: Mapping[str, Any], held: Mapping[str, StoredTensor]) -> QuantizedCheckpoint:
    """The checkpoint. Raises ``TargetError`` naming the file, the key or the tensor that is wrong."""
    settings: dict[str, Any] = config["quantization_config"]
    file = directory / "config.json"
    _refuse(file, settings)
    schemes = read_schemes(directory)
    dtype = dtype_of(config, held)
    weights: dict[str, StoredWeight] = {}
    tensors: dict[str, CodedMatrix] = {}
    parts: set[str] = set()
    for layer, named in by_layer(held).items():
        if not any(suffix in named for suffix in ("weight_scale", "weight_packed")):
            continue
        try:
            scheme = schemes.of(layer)
        except TargetError as error:
            raise TargetError(f"{file}: {error}") from error
        if scheme is None:
            raise TargetError(f"{directory}: {layer}: has quantized tensors, and no group of config.json is for it")
        if scheme.format not in _FORMATS:
            raise TargetError(f"{directory}: {layer}: {scheme.format}: is no format that is read")
        own = {suffix: part for suffix, part in named.items() if suffix in _PARTS}
        rows, columns = _checked(directory, layer, own, scheme)
        parts |= {f"{layer}.{suffix}" for suffix in own}
        used = {suffix: part for suffix, part in own.items() if suffix != "weight_zero_point" or _is_offset(scheme)}
        stored = StoredWeight(
            layer,
            scheme.format,
            dtype,
            scheme.weight,
            scheme.input,
            in_files(directory, layer, used),
            LAYOUTS[scheme.format].decode,
            _input_scales,
            sum(part.nbytes for part in own.values()),
            in_order=scheme.in_order,
            group=scheme.group,
        )
        weights[layer] = stored
        bits = code_bits(scheme.weight.format) if _FORMATS[scheme.format].word == 32 else 0
        tensors[f"{layer}.weight"] = CodedMatrix(stored, (rows, columns), bits)
    caches = set(filter(is_of_cache, held))
    version = settings.get("version")
    return QuantizedCheckpoint(
        directory,
        f"compressed-tensors{f' {version}' if version else ''}, {settings['format']}",
        config,
        dtype,
        weights,
        floats_of(directory, held, parts | caches) | tensors,
        held,
        frozenset(parts),
        tuple(_unkept(settings, sorted(caches))),
    )


def _refuse(file: Path, settings: Mapping[str, Any]) -> None:
    """Raises ``TargetError`` for what changes the meaning of weights and is not read."""
    sparse: object = settings.get("sparsity_config")
    if isinstance(sparse, dict) and cast(dict[str, Any], sparse).get("format", "dense") != "dense":
        raise TargetError(f"{file}: quantization_config: sparsity_config: sparse weights are not read")
    transforms: object = settings.get("transform_config")
    if isinstance(transforms, dict) and cast(dict[str, Any], transforms).get("config_groups"):
        raise TargetError(f"{file}: quantization_config: transform_config: rotations at run time are not read")


def _unkept(settings: Mapping[str, Any], caches: list[str]) -> list[str]:
    lines = [f"{caches[0]}: the scales of a quantized cache ({len(caches)} tensors)"] if caches else []
    for name, group in settings["config_groups"].items():
        if isinstance(group, dict) and cast(dict[str, Any], group).get("output_activations"):
            lines.append(f"config_groups.{name}: output_activations: quantized outputs of layers")
    return lines


def _is_offset(scheme: Scheme) -> bool:
    return is_asymmetric(scheme.weight.format)


def _checked(directory: Path, layer: str, parts: Parts, scheme: Scheme) -> tuple[int, int]:
    """The shape of the weight, its columns with those that may fill the last word. Raises ``TargetError`` naming the
    part that is missing, or of another dtype or shape.
    """
    format, quant = _FORMATS[scheme.format], scheme.weight
    wanted = [format.codes, "weight_scale", *format.more, *(["weight_zero_point"] * _is_offset(scheme))]
    given = scheme.input
    if given is not None and not given.dynamic:
        wanted.append("input_global_scale" if isinstance(given.format, Nvfp4) else "input_scale")
    if missing := [part for part in wanted if part not in parts]:
        raise TargetError(f"{directory}: {layer}: {scheme.format}: has no {missing[0]}")
    codes = parts[format.codes]
    if len(codes.shape) != 2:
        raise TargetError(f"{directory / codes.file}: {layer}.{format.codes}: {list(codes.shape)}: is no matrix")
    rows, bits = codes.shape[0], code_bits(quant.format)
    widest = codes.shape[1] * format.word // bits if format.word else codes.shape[1]
    least = (codes.shape[1] - 1) * format.word // bits + 1 if format.word == 32 else widest
    shapes = {tuple(_scale_shape(quant, rows, columns)) for columns in (least, widest)}
    shapes |= {(1,), ()} if isinstance(quant.granularity, PerTensor) else set()
    expect(directory, layer, parts, format.codes, format.dtypes, [codes.shape])
    expect(directory, layer, parts, "weight_scale", format.scales, sorted(shapes))
    expect(directory, layer, parts, "weight_shape", ("I64",), [(2,)])
    expect(directory, layer, parts, "weight_global_scale", ("F32",), [(1,)])
    expect(directory, layer, parts, COLUMNS, ("I32", "I64"), [(columns,) for columns in range(least, widest + 1)])
    if _is_offset(scheme):
        zeros, dtypes = shapes, ("I8",)
        if format.word and isinstance(quant.granularity, PerGroup | PerChannel):
            zeros, dtypes = {(-(-rows * bits // 32), shape[1]) for shape in shapes}, ("I32",)
        expect(directory, layer, parts, "weight_zero_point", dtypes, sorted(zeros))
    expect(directory, layer, parts, "input_scale", FLOATS, [(1,), ()])
    expect(directory, layer, parts, "input_zero_point", ("I8",), [(1,), ()])
    expect(directory, layer, parts, "input_global_scale", ("F32",), [(1,), ()])
    return rows, widest


def _scale_shape(quant: Quant, rows: int, columns: int) -> list[int]:
    return numerics.scale_shape((rows, columns), numerics.weight_block(quant.granularity, 2, 0, 1))


def _input_scales(parts: Mapping[str, Tensor]) -> Scales | None:
    found = decode_input(parts)
    scale = found.get("input_scale", found.get("input_global_scale"))
    return None if scale is None else Scales(scale, found.get("input_zero_point"))
