"""Root mean square norms that a model writes out, as one op.

Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467, equation 4:
x / sqrt(mean(x^2) + eps) * gain. Llama, Qwen, Mistral and T5 have no op for it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Final, final

import torch
from torch import fx

from graphq.ir import edit
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Op, Param, ops_of, view

aten = torch.ops.aten
_EXACT: Final = (torch.float32, torch.float64)  # in others the op computes in float32, and rounds once


@final
@dataclass(frozen=True)
class RaiseRmsNorm(Pass):
    """Every ``x * rsqrt(mean(x * x, -1) + eps) * gain`` of float32 or float64 is one ``aten.rms_norm``.

    ``gain`` is a parameter with an element for each of the last axis. What is in between is read by nothing else. With
    a cast to float32 and back, as transformers writes it, the norm rounds in between what the op does not: it stays as
    written, but for models in float32, whose casts are no-ops and gone.
    """

    name: ClassVar[str] = "raise-rms-norm"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count = 0
        for op in ops_of(gm):
            found = _written_norm(op)
            if found is not None:
                x, gain, eps = found
                edit.replace(gm, op, aten.rms_norm.default, x, [int(x.val.shape[-1])], gain, eps, by=self.name)
                count += 1
        if count:
            edit.drop_unused(gm)
        return count


def _written_norm(op: Op) -> tuple[Op, Param, float] | None:
    """What the norm that ends in ``op`` normalizes, its gain and its epsilon; None where none ends there."""
    for gain, normal in _operands(op, aten.mul.Tensor):
        if not isinstance(gain, Param) or normal.users != [op]:
            continue
        for x, divided in _quotients(normal):
            eps = _epsilon(x, divided)
            width = x.val.shape[-1] if x.val.dim() else None
            if eps is not None and list(gain.val.shape) == [width] and x.val.dtype in _EXACT:
                return (x, gain, eps) if gain.val.dtype == x.val.dtype else None
    return None


def _operands(op: Op, target: Any) -> list[tuple[Op, Op]]:
    """The two tensors that an op of two combines, in both orders; nothing where it is no ``target``."""
    if op.node.target is not target:
        return []
    a, b = op.argument("self"), op.argument("other")
    return [(view(a), view(b)), (view(b), view(a))] if isinstance(b, fx.Node) else []


def _quotients(op: Op) -> list[tuple[Op, Op]]:
    """What ``op`` may divide, and the square of what it may divide it by: ``x * rsqrt(y)`` or ``x / sqrt(y)``."""
    roots = [(x, root) for x, root in _operands(op, aten.mul.Tensor) if root.node.target is aten.rsqrt.default]
    roots += [(x, root) for x, root in _operands(op, aten.div.Tensor)[:1] if root.node.target is aten.sqrt.default]
    return [(x, view(root.argument("self"))) for x, root in roots if root.users == [op]]


def _epsilon(x: Op, shifted: Op) -> float | None:
    """The eps of ``mean(x^2, -1, keepdim) + eps``; None where ``shifted`` is something else."""
    if shifted.node.target not in (aten.add.Tensor, aten.add.Scalar) or len(shifted.users) != 1:
        return None
    eps = shifted.argument("other")
    if not isinstance(eps, float) or shifted.argument("alpha") != 1:
        return None
    mean = view(shifted.argument("self"))
    if mean.node.target is not aten.mean.dim or mean.users != [shifted] or not mean.argument("keepdim"):
        return None
    if list(mean.argument("dim")) not in ([-1], [x.val.dim() - 1]) or mean.argument("dtype") is not None:
        return None
    square = view(mean.argument("self"))
    return eps if square.users == [mean] and _is_square(square, x) else None


def _is_square(op: Op, x: Op) -> bool:
    if op.node.target is aten.pow.Tensor_Scalar:
        return op.argument("exponent") == 2 and op.argument("self") is x.node
    return op.node.target is aten.mul.Tensor and op.argument("self") is x.node and op.argument("other") is x.node
