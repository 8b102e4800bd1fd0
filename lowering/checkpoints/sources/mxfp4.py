"""Checkpoints of transformers' mxfp4: gpt-oss, whose experts are ``*_blocks`` and ``*_scales``, a stack of them each.

Source: transformers 5.23, ``integrations/mxfp4.py``. ``blocks`` is uint8 ``[E, N, K / 32, 16]``, the even column in the
low nibble; ``scales`` are exponents plus 127, ``[E, N, K / 32]``. The model holds the stack as ``[E, K, N]``.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from graphq.artifacts.headers import StoredTensor
from graphq.deferred import InFile
from graphq.errors import TargetError
from graphq.ir.stored_codes import StoredWeight
from graphq.lowering.checkpoints.sources.checkpoint import (
    CodedStack,
    QuantizedCheckpoint,
    dtype_of,
    expect,
    floats_of,
    in_file,
)
from graphq.numerics import Scales
from graphq.packing.words import unpack_words
from graphq.spec.formats import MX_BLOCK, Mx
from graphq.spec.quant import PerGroup, Quant

_BLOCKS, _SCALES = "_blocks", "_scales"
_QUANT: Final = Quant(Mx("float4_e2m1"), PerGroup(MX_BLOCK))


def read(directory: Path, config: Mapping[str, Any], held: Mapping[str, StoredTensor]) -> QuantizedCheckpoint:
    """The checkpoint. Raises ``TargetError`` naming the file or the tensor that is wrong."""
    dtype = dtype_of(config, held)
    weights: dict[str, StoredWeight] = {}
    tensors: dict[str, CodedStack] = {}
    parts: set[str] = set()
    for stack in [name.removesuffix(_BLOCKS) for name in held if name.endswith(_BLOCKS)]:
        path, _, role = stack.rpartition(".")
        own = {suffix: held[stack + suffix] for suffix in (_BLOCKS, _SCALES) if stack + suffix in held}
        if _SCALES not in own:
            raise TargetError(f"{directory}: {stack}: mxfp4: has no {role}{_SCALES}")
        blocks = own[_BLOCKS]
        if len(blocks.shape) != 4:
            raise TargetError(f"{directory / blocks.file}: {stack}{_BLOCKS}: {list(blocks.shape)}: are no blocks")
        experts, rows, groups, _ = blocks.shape
        named = {f"{role}{suffix}": part for suffix, part in own.items()}
        expect(directory, path, named, role + _BLOCKS, ("U8",), [(experts, rows, groups, MX_BLOCK // 2)])
        expect(directory, path, named, role + _SCALES, ("U8", "F8_E8M0"), [(experts, rows, groups)])
        whole = {suffix: in_file(directory, stack + suffix, part) for suffix, part in own.items()}
        nbytes = sum(part.nbytes for part in own.values()) // max(experts, 1)
        each = tuple(
            StoredWeight(
                f"{path}.{expert}.{role}",
                "mxfp4",
                dtype,
                _QUANT,
                None,
                {suffix: _of_expert(part, expert) for suffix, part in whole.items()},
                _decode,
                lambda parts: None,
                nbytes,
            )
            for expert in range(experts)
        )
        weights |= {one.layer: one for one in each}
        tensors[stack] = CodedStack(each, (experts, groups * MX_BLOCK, rows))
        parts |= {stack + suffix for suffix in own}
    others = floats_of(directory, held, parts)
    return QuantizedCheckpoint(directory, "mxfp4", config, dtype, weights, others | tensors, held, frozenset(parts))


def _of_expert(part: InFile, expert: int) -> InFile:
    return replace(part, start=expert, shape=(1, *part.shape[1:]))


def _decode(parts: Mapping[str, Tensor], quant: Quant) -> tuple[Tensor, Scales]:
    blocks, scales = parts[_BLOCKS][0], parts[_SCALES][0]
    rows, groups = scales.shape
    packed = blocks.reshape(rows, -1)
    return unpack_words(packed, 4, groups * MX_BLOCK, dtype=torch.uint8), Scales(scales.view(torch.float8_e8m0fnu))
