"""A layer's plan: how its weight and its input are quantized, or why it stays float."""

from dataclasses import dataclass
from typing import Final, final

from graphq.errors import SpecError
from graphq.spec.activations import check_tensor_quant
from graphq.spec.formats import Int, Nvfp4, TwoLevel
from graphq.spec.quant import (
    Entropy,
    Histogram,
    Hqq,
    MovingAverage,
    Ofmr,
    PerBlock,
    Percentile,
    PerChannel,
    PerGroup,
    PerHead,
    PerTensor,
    Quant,
    Ssz,
)

MAX_WEIGHT_BITS: Final = 8
ACTIVATION_BITS: Final = (4, 6, 8, 16)


@final
@dataclass(frozen=True)
class Plan:
    """How one layer is quantized: its weight, its input activation, its output. A weight or an input is given.

    ``output``: a tensor that everything reads quantized; so are inputs where tensors are quantized over the whole graph
    (``placed``), and then their scales are those of ``graphq.ir.grids``.
    """

    weight: Quant | None = None
    input: Quant | None = None
    output: Quant | None = None
    placed: bool = False

    def __post_init__(self) -> None:
        if self.weight is None and self.input is None:
            raise SpecError("a plan quantizes a weight or an input; to keep a layer float, write a keep-float rule")
        if self.weight is not None:
            _check_weight(self.weight)
        if self.input is not None:
            _check_input(self.input)
        if self.output is not None:
            check_tensor_quant(self.output)

    def __str__(self) -> str:
        given = (("weight", self.weight), ("input", self.input), ("output", self.output))
        return ", ".join(f"{role} {quant}" for role, quant in given if quant is not None)


def _check_weight(quant: Quant) -> None:
    if quant.dynamic:
        raise SpecError(f"weight: {quant} is dynamic; a weight's scale is known when it is compiled")
    if isinstance(quant.format, Int) and quant.format.bits > MAX_WEIGHT_BITS:
        raise SpecError(f"weight: {quant} has {quant.format.bits} bits; weights hold 2 to 8")
    if isinstance(quant.granularity, PerHead):
        raise SpecError(f"weight: {quant}: heads are those of caches and of what attention reads; write channel")
    if isinstance(quant.method, Ofmr | Percentile) and not isinstance(quant.granularity, PerTensor | PerChannel):
        raise SpecError(f"weight: {quant}: {quant.method} gives one scale per tensor or per channel")
    if isinstance(quant.method, MovingAverage | Histogram | Entropy):
        raise SpecError(
            f"weight: {quant}: {quant.method} is for activations, seen batch by batch; a weight takes minmax,"
            " percentile, mse, ofmr, ssz or hqq"
        )


def _check_input(quant: Quant) -> None:
    if isinstance(quant.granularity, PerChannel | PerBlock | PerHead) or isinstance(quant.format, TwoLevel):
        raise SpecError(f"input: {quant}: activations have one scale per tensor, per token or per group")
    if isinstance(quant.granularity, PerGroup) and not quant.dynamic and not isinstance(quant.format, Nvfp4):
        raise SpecError(f"input: {quant}: one scale per group exists only at run time; write {quant}/dynamic")
    if isinstance(quant.format, Int) and quant.format.bits not in ACTIVATION_BITS:
        raise SpecError(f"input: {quant} has {quant.format.bits} bits; activations hold 4, 6, 8 or 16")
    if quant.arithmetic == "source":
        raise SpecError(f"input: {quant}: source is the arithmetic of weights; leave it out")
    if isinstance(quant.method, Ssz | Hqq):
        raise SpecError(
            f"input: {quant}: {quant.method} fits a weight's scales to its codes; an activation's codes are not known"
        )


@final
@dataclass(frozen=True)
class KeepFloat:
    """The layer stays float, for this reason."""

    reason: str

    def __str__(self) -> str:
        return f"float ({self.reason})"


Decision = Plan | KeepFloat


@final
@dataclass(frozen=True)
class PerExpert:
    """The decisions for a stack of experts, one for each."""

    decisions: tuple[Decision, ...]

    def __str__(self) -> str:
        counts = {str(d): self.decisions.count(d) for d in dict.fromkeys(self.decisions)}
        return "; ".join(f"{count} x {text}" for text, count in counts.items())


def weight_quants(decision: object) -> tuple[Quant | None, ...]:
    """The weight format of a layer, or of each expert of a stack."""
    decisions = decision.decisions if isinstance(decision, PerExpert) else (decision,)
    return tuple(d.weight if isinstance(d, Plan) else None for d in decisions)


def input_quants(decision: object) -> tuple[Quant | None, ...]:
    """The input format of a layer, or of each expert of a stack."""
    decisions = decision.decisions if isinstance(decision, PerExpert) else (decision,)
    return tuple(d.input if isinstance(d, Plan) else None for d in decisions)
