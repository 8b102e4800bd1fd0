"""Ops of the ONNX form that exist in traces alone: ONNX or ONNX Runtime has the kernels.

``integer_matmul``: ``(codes - zero_point) @ (weight - weight_zero_point)`` as int32, of uint8 codes and a weight
``[K, N]`` whose integers are of ``format``. ``nbits_matmul``: ``x @ w.T + bias`` with a weight packed as ONNX Runtime's
MatMulNBits takes it.
"""

import torch
from torch import Tensor

_library = torch.library.Library("graphq", "FRAGMENT")  # held for the process: its ops vanish with it
_library.define(
    "integer_matmul(Tensor codes, Tensor weight, Tensor? weight_zero_point, int zero_point, str format) -> Tensor"
)
_library.define(
    "nbits_matmul(Tensor x, Tensor weight, Tensor scale, Tensor? zero_point, Tensor? bias, int k, int n, int bits,"
    " int block_size, int accuracy_level) -> Tensor"
)


def _integer_matmul_fake(
    codes: Tensor, weight: Tensor, weight_zero_point: Tensor | None, zero_point: int, format: str
) -> Tensor:
    return codes.new_empty([*codes.shape[:-1], weight.shape[1]], dtype=torch.int32)


def _nbits_matmul_fake(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    k: int,
    n: int,
    bits: int,
    block_size: int,
    accuracy_level: int,
) -> Tensor:
    return x.new_empty([*x.shape[:-1], n])


torch.library.register_fake("graphq::integer_matmul", _integer_matmul_fake, lib=_library)
torch.library.register_fake("graphq::nbits_matmul", _nbits_matmul_fake, lib=_library)

integer_matmul = torch.ops.graphq.integer_matmul.default
nbits_matmul = torch.ops.graphq.nbits_matmul.default
