"""Scales and codes of activations in one pass over each row, by the library of kernels."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from graphq.runtime.kernels import native
from graphq.runtime.kernels.choice import features
from graphq.runtime.kernels.watched import is_transformed

RULES: Final = {"int8": 0, "int8/half": 1, "int8/by_sign": 2, "int8/asym": 3, "int8/asym/joint": 4}
_TYPES: Final = {torch.float32: 0, torch.bfloat16: 1}


def quantized_rows(x: Tensor, format: str, block: Sequence[int]) -> tuple[Tensor, Tensor, Tensor] | None:
    """Codes, scales and zero points of ``x``, a scale for each row or one for all, as ``graphq.numerics`` gives them.

    None where the library does not: for other formats, dtypes, blocks and devices, for what is not finite, and where
    ops are traced or transformed.
    """
    rule, x_type = RULES.get(format), _TYPES.get(x.dtype)
    if rule is None or x_type is None or not x.is_cpu or not x.dim() or block[-1] != -1:
        return None
    known = features()
    if not known or is_transformed() or any(b != block[0] for b in block[:-1]) or block[0] not in (1, -1):
        return None
    is_whole = len(block) == 1 or block[0] == -1
    k = x.numel() if is_whole else x.shape[-1]
    m = 1 if is_whole else x.shape[:-1].numel()
    x = x.contiguous().resolve_neg()
    codes = torch.empty(x.shape, dtype=torch.int8)
    shape = [1] * x.dim() if is_whole else [*x.shape[:-1], 1]
    scale, zero = torch.empty(shape), torch.empty(shape, dtype=torch.int8)
    failed = native.library().graphq_quantize(
        x.data_ptr(), codes.data_ptr(), scale.data_ptr(), zero.data_ptr(), m, k, x_type, rule,
        int("avx2" in known), torch.get_num_threads(),
    )  # fmt: skip
    return None if failed else (codes, scale, zero)
