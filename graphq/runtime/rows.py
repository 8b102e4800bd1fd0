"""Dynamic quantization of activations in as few ops as torch needs for it, where format and block are known before."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graphq import numerics
from graphq.spec.formats import Int, parse_format

Quantizer = Callable[[Tensor], tuple[Tensor, Tensor]]


def quantizer(format: str, block: Sequence[int]) -> Quantizer | None:
    """What gives the scales and the codes of a tensor as ``choose_scale`` and ``quantize`` do, bit for bit.

    There is one for symmetric integers of at most 8 bits whose scale is that of a token's vector, or of all of them;
    else None.
    """
    it = parse_format(format)
    if not isinstance(it, Int) or not (it.symmetric and it.signed and it.bits <= 8 and it.divisor == "max"):
        return None
    per_token, whole = [1] * (len(block) - 1) + [-1], [-1] * len(block)
    if not block or list(block) not in (per_token, whole):
        return None
    axes = [axis for axis, b in enumerate(block) if b == -1]
    # A tensor without axes, of which torch makes none at each call; it leaves the dtype of what it divides alone.
    largest = torch.tensor(float(numerics.code_range(it)[1]))
    block = list(block)

    def quantized(x: Tensor) -> tuple[Tensor, Tensor]:
        if not x.numel():
            scales = numerics.choose_scale(x, it, block)
            return scales.scale, numerics.quantize(x, scales, it, block)
        x = x if x.dtype == torch.float64 else x.to(torch.float32)
        extreme = x.abs().amax(axes, True)
        # What is 0 has scale 1, which the smallest number does not change.
        scale = torch.div(extreme, largest).clamp_(min=torch.finfo(x.dtype).tiny).add_(extreme.logical_not())
        # No quotient is beyond ``largest`` by more than it is rounded by, so that none is clamped.
        return scale, torch.div(x, scale).round_().char()

    return quantized
