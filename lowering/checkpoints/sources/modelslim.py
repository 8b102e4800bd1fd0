"""Checkpoints of msModelSlim: a description with a tag for each tensor, and the tensors of each tag.

Source: msModelSlim 26.1, as ``ascend/layouts.py`` has it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from graphq import numerics
from graphq.artifacts.headers import StoredTensor
from graphq.deferred import InFile
from graphq.errors import SpecError, TargetError
from graphq.frontends import load_spec
from graphq.ir.stored_codes import StoredWeight
from graphq.lowering.checkpoints.ascend.caches import TAG as CACHE
from graphq.lowering.checkpoints.ascend.layouts import decode, decode_input
from graphq.lowering.checkpoints.ascend.read import DESCRIPTION, read_description
from graphq.lowering.checkpoints.ascend.tags import FLOAT, TAGS
from graphq.lowering.checkpoints.sources.checkpoint import (
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
from graphq.spec.formats import Int, TwoLevel
from graphq.spec.match import Exact
from graphq.spec.plan import Plan
from graphq.spec.quant import PerChannel, PerGroup, Quant

VERSION: Final = "1.0.0"


@final
@dataclass(frozen=True)
class _Tag:
    """What a layer of a tag has: codes of ``dtype``, two of them a byte of int8 or uint8 along ``packed``; the other
    tensors that it needs. may_offset: whether its zero points need not be 0, which the tag does not say.
    """

    dtype: str = "I8"
    packed: str = ""
    more: tuple[str, ...] = ("weight_scale", "weight_offset")
    may_offset: bool = False


_INPUT: Final = ("input_scale", "input_offset")
_TAGS: Final[Mapping[str, _Tag]] = {
    "W8A8": _Tag(more=("deq_scale", "quant_bias", *_INPUT)),
    "W8A8_MIX": _Tag(more=("weight_scale", "weight_offset", "deq_scale", "quant_bias", *_INPUT)),
    "W8A8_DYNAMIC": _Tag(),
    "W8A16": _Tag(may_offset=True),
    "W4A16": _Tag(packed="rows", may_offset=True),  # by channels along columns
    "W4A8_DYNAMIC": _Tag(packed="rows"),
    "W4A4_DYNAMIC": _Tag(may_offset=True),
    "W8A8FP8_DYNAMIC": _Tag("F8_E4M3"),
    "WFP8AFP8_DYNAMIC": _Tag("F8_E4M3"),
    "W8A8_MXFP8": _Tag("F8_E4M3", more=("weight_scale",)),
    "W4A8_MXFP": _Tag("U8", "columns", ("weight_scale",)),
    "W4A4_MXFP4": _Tag("U8", "columns", ("weight_scale",)),
    "W4A16_MXFP4": _Tag("U8", "columns", ("weight_scale",)),
}


def read(directory: Path, config: Mapping[str, Any], held: Mapping[str, StoredTensor]) -> QuantizedCheckpoint:
    """The checkpoint. Raises ``TargetError`` naming the file, the key or the tensor that is wrong."""
    description = read_description(directory)
    file = directory / DESCRIPTION
    version = description.keys.get("version", VERSION)
    if version != VERSION:
        raise TargetError(f"{file}: version: {str(version)[:40]!r}: is not known; {VERSION} is read, and none")
    if missing := held.keys() ^ description.tags.keys():
        where = "has no tag" if min(missing) in held else "is in no file of weights"
        raise TargetError(f"{file}: {min(missing)}: {where}")
    for name, tag in description.tags.items():
        own = description.tags.get(f"{name.rpartition('.')[0]}.weight")
        if tag in TAGS and tag != own:
            of = f"its weight is {own}" if own in TAGS else "it is of no quantized layer"
            raise TargetError(f"{file}: {name}: {tag}, but {of}")
    try:
        spec = load_spec(file, "modelslim")
    except SpecError as error:
        raise TargetError(str(error)) from error
    plans = {rule.match.fqn: rule.decision for rule in spec.rules if isinstance(rule.match, Exact)}
    dtype = dtype_of(config, held)
    weights: dict[str, StoredWeight] = {}
    tensors: dict[str, CodedMatrix] = {}
    parts: set[str] = set()
    for layer, named in by_layer(held).items():
        tag, plan = description.tags.get(f"{layer}.weight", FLOAT), plans.get(layer)
        if tag not in TAGS or not isinstance(plan, Plan) or plan.weight is None:
            continue
        own = {suffix: part for suffix, part in named.items() if description.tags[f"{layer}.{suffix}"] == tag}
        quant = _grouped(plan.weight, own, description.keys.get("group_size"))
        shape = _checked(directory, layer, own, tag, quant)
        parts |= {f"{layer}.{suffix}" for suffix in own}
        weights[layer] = StoredWeight(
            layer,
            tag,
            dtype,
            quant,
            plan.input,
            in_files(directory, layer, own),
            partial(_decode, tag),
            _input_scales,
            sum(part.nbytes for part in own.values()),
            _is_offset if _TAGS[tag].may_offset else None,
        )
        tensors[f"{layer}.weight"] = CodedMatrix(weights[layer], shape)
    said = [str(description.keys.get(key, "unknown"))[:40] for key in ("version", "model_quant_type")]
    caches = sorted(name for name, tag in description.tags.items() if tag == CACHE)
    unkept = [f"{caches[0]}: the scales of a quantized cache ({len(caches)} tensors)"] if caches else []
    unkept += [f"{algorithm.name}: the description says that weights are rotated" for algorithm in spec.algorithms]
    return QuantizedCheckpoint(
        directory,
        f"msModelSlim {', '.join(said)}",
        config,
        dtype,
        weights,
        floats_of(directory, held, parts | set(caches)) | tensors,
        held,
        frozenset(parts),
        tuple(unkept),
    )


def _grouped(quant: Quant, parts: Parts, size: object) -> Quant:
    """How the weight is quantized, by channels or by groups, which its scales tell: a file has one group size for some
    of its layers.
    """
    scale = parts.get("weight_scale")
    if not isinstance(quant.format, Int) or scale is None or len(scale.shape) != 2:
        return quant
    if scale.shape[1] == 1 or not isinstance(size, int) or size < 1:
        return replace(quant, granularity=PerChannel())
    return replace(quant, granularity=PerGroup(size))


def _checked(directory: Path, layer: str, parts: Parts, tag: str, quant: Quant) -> tuple[int, int]:
    """The shape of the weight. Raises ``TargetError`` naming the part that is missing, or of another dtype or shape."""
    row = _TAGS[tag]
    is_two_level = isinstance(quant.format, TwoLevel)
    second = ("weight_scale_second",) if is_two_level else ()
    if missing := [part for part in ("weight", *row.more, *second) if part not in parts]:
        raise TargetError(f"{directory}: {layer}: {tag}: has no {missing[0]}")
    codes = parts["weight"]
    if len(codes.shape) != 2:
        raise TargetError(f"{directory / codes.file}: {layer}.weight: {list(codes.shape)}: is no matrix")
    rows, columns = codes.shape
    scales = parts.get("weight_scale", codes)
    packed = "columns" if tag == "W4A16" and not isinstance(quant.granularity, PerGroup) else row.packed
    if packed == "columns":
        columns *= 2
    elif packed == "rows" and scales.shape[:1] != (rows,):  # not one a byte, as before version 1.0.0
        rows *= 2
    expect(directory, layer, parts, "weight", (row.dtype,), [codes.shape])
    shape = tuple(numerics.scale_shape((rows, columns), numerics.weight_block(quant.granularity, 2, 0, 1)))
    if tag.endswith(("MXFP", "MXFP4", "MXFP8")):
        expect(directory, layer, parts, "weight_scale", ("U8",), [shape])
        return rows, columns
    if is_two_level:
        expect(directory, layer, parts, "weight_scale_second", ("F32",), [shape])
        shape = (rows, 1)
    expect(directory, layer, parts, "weight_scale", ("F32",), [shape])
    expect(directory, layer, parts, "weight_offset", ("F32",), [shape])
    expect(directory, layer, parts, "deq_scale", ("F32", "I64"), [(rows,)])
    expect(directory, layer, parts, "quant_bias", ("I32",), [(rows,)])
    for suffix in _INPUT:
        expect(directory, layer, parts, suffix, ("F32",), [(1,)])
    return rows, columns


def _decode(tag: str, parts: Mapping[str, Tensor], quant: Quant) -> tuple[Tensor, Scales]:
    codes, scales, _ = decode(parts, tag)
    return codes, scales


def _input_scales(parts: Mapping[str, Tensor]) -> Scales | None:
    if "input_scale" not in parts:
        return None
    found = decode_input(parts)
    return Scales(found["input_scale"], found.get("input_zero_point"))


def _is_offset(parts: Mapping[str, InFile]) -> bool:
    """Whether there are zero points: graphq stores those that are 0 throughout as -0."""
    offset = parts["weight_offset"].read()
    return bool((offset.ne(0) | torch.signbit(offset)).any())
