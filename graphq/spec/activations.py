"""Rules for the tensors between layers: how what ops of some kind give is quantized, or that such ops stay float."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import final

from graphq.errors import SpecError
from graphq.spec.formats import Int
from graphq.spec.quant import Hqq, Ofmr, PerTensor, Quant, Ssz


@final
@dataclass(frozen=True)
class ActivationRule:
    """What ops of the kinds ``ops`` (none: of every kind) give, in modules whose path the glob ``module`` matches, is
    quantized so; ``quant=None``: these ops stay float. The last rule that matches an op wins.

    Kinds are ONNX's op types (``graphq.ir.op_kinds``), ``Linear`` and ``Input``. Raises ``SpecError`` for a quant that
    is no integer with one static scale.
    """

    quant: Quant | None
    ops: tuple[str, ...] = ()
    module: str = "*"
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.quant is not None:
            check_tensor_quant(self.quant)

    def __str__(self) -> str:
        ops = "|".join(self.ops) or "all"
        where = "" if self.module == "*" else f" in {self.module}"
        return f"{ops}{where}: {self.quant or 'float'}"

    def matches(self, kind: str, module: str) -> bool:
        """Whether it is for an op of this kind in the module of this path."""
        return (not self.ops or kind in self.ops) and fnmatch.fnmatchcase(module, self.module)


def check_tensor_quant(quant: Quant) -> None:
    """Raises ``SpecError`` for what a tensor between ops cannot be."""
    if not isinstance(quant.format, Int) or quant.format.bits not in (8, 16):
        raise SpecError(f"{quant}: tensors between ops hold integers of 8 or 16 bits")
    if quant.dynamic or not isinstance(quant.granularity, PerTensor):
        raise SpecError(f"{quant}: tensors between ops have one scale, from calibration; write {quant.format}/tensor")
    if isinstance(quant.method, Ofmr | Ssz | Hqq):
        raise SpecError(f"{quant}: {quant.method} is for layers")


def is_tensor_quant(quant: Quant) -> bool:
    """Whether tensors between ops can be quantized so."""
    try:
        check_tensor_quant(quant)
    except SpecError:
        return False
    return True


def rule_for(rules: Sequence[ActivationRule], kind: str, module: str) -> ActivationRule | None:
    """The rule that decides: the last that matches."""
    return next((rule for rule in reversed(rules) if rule.matches(kind, module)), None)
