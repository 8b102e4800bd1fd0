"""What a consumer of QDQ models runs in integers, as data: a profile is a table with a row for each kind of op.

Kinds are ONNX's op types; ``Linear`` is a MatMul or Gemm with a constant weight, ``MatMul`` one of two activations.
Types of activations are written as ``parse_format`` reads them (``uint8``, ``int8``, ``int8/asym``, ``uint16``), each
with one scale; those of weights with their granularity (``int8/channel``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, final

from graphq.errors import SpecError
from graphq.spec.formats import Format, Int, parse_format
from graphq.spec.quant import PerTensor, Quant, parse_quant

Output = Literal["required", "optional", "same"]
Placed = Literal["always", "through", "between", "never"]
Bias = Literal["int32", "float"]
LINEAR: Final = "Linear"


@final
@dataclass(frozen=True)
class OpTypes:
    """One combination of types in which an op runs in integers.

    inputs: of its activations, the last one's for all that follow. weight: of its constant operand, where it has one.
    output: of what it gives where that is quantized.
    """

    inputs: tuple[Format, ...]
    output: Format
    weight: Quant | None = None

    def __str__(self) -> str:
        parts = [*map(str, self.inputs), *([str(self.weight)] if self.weight else [])]
        return f"{' x '.join(parts)} -> {self.output}"

    def input(self, position: int) -> Format:
        """The type of the activation at a position among them."""
        return self.inputs[min(position, len(self.inputs) - 1)]


def op_types(*texts: str) -> tuple[OpTypes, ...]:
    """Combinations such as ``uint8 x int8/channel -> uint8``: activations, a weight with its granularity, output."""
    found: list[OpTypes] = []
    for text in texts:
        operands, arrow, output = text.partition(" -> ")
        if not arrow:
            raise SpecError(f"{text!r} is not <type>[ x <type>] -> <type>")
        inputs: list[Format] = []
        weight: Quant | None = None
        for part in operands.split(" x "):
            if part.rpartition("/")[2] in ("tensor", "channel") or part.rpartition("/")[2][1:].isdigit():
                weight = parse_quant(part)
            else:
                inputs.append(parse_format(part))
        found.append(OpTypes(tuple(inputs), parse_format(output), weight))
    return tuple(found)


@final
@dataclass(frozen=True)
class FixedGrid:
    """The scale and zero point that a consumer wants of an op's output, whatever it was seen to be."""

    scale: float
    zero_point: int


@final
@dataclass(frozen=True)
class Grid:
    """One scale and zero point, of one tensor or several. ``number`` tells grids apart; ``fixed``: as a consumer wants
    it.
    """

    number: int
    quant: Quant
    fixed: FixedGrid | None = None


@final
@dataclass(frozen=True)
class OpRule:
    """How a consumer runs one kind of op in integers.

    types: the combinations it takes, the preferred first.
    output: whether what it gives must be quantized for that (``required``), may be (``optional``), or must be on the
        grid of its input (``same``).
    placed: whether quantizers are put around it ``always``; where what reads it wants integers, which it lets
        ``through``; only ``between`` ops that are in integers anyway; or ``never``, where it is taken in integers but
        is not faster so.
    grids: fixed ones of its output, by type.
    bias: how its bias is written.
    because: what was measured, or where the row is from.
    """

    types: tuple[OpTypes, ...]
    output: Output = "required"
    placed: Placed = "always"
    grids: Mapping[str, FixedGrid] = field(default_factory=dict[str, FixedGrid])
    bias: Bias = "float"
    because: str = ""


Dynamic = Literal["none", "matmul_integer"]
WeightOnly = Literal["dequantize", "matmul_nbits"]


@final
@dataclass(frozen=True)
class Profile:
    """What one consumer runs in integers, and how it wants QDQ models spelled.

    activations: the types of tensors that it has kernels for, the default first. weight: a weight's default.
    fuses: chains of kinds that run as one op; nothing is quantized between them.
    linear: whether a linear is ``gemm`` (weight ``[N, K]``, transposed) or ``matmul`` (``[K, N]``) and an Add.
    dynamic: how a linear with scales by token is spelled. weight_only: how one with a float input is.
    power_of_two: whether scales have to be powers of two. static: whether every dimension has to be an integer.
    opsets: the lowest and the highest it reads. sources: where its rows are from.
    """

    name: str
    consumer: str
    activations: tuple[Format, ...]
    weight: Quant
    ops: Mapping[str, OpRule]
    fuses: tuple[tuple[str, ...], ...] = ()
    linear: Literal["gemm", "matmul"] = "gemm"
    dynamic: Dynamic = "none"
    weight_only: WeightOnly = "dequantize"
    power_of_two: bool = False
    static: bool = False
    opsets: tuple[int, int] = (13, 25)
    sources: tuple[str, ...] = ()

    def activation(self) -> Quant:
        """The default of activations."""
        return Quant(self.activations[0], PerTensor())


def int_activations(*formats: str) -> tuple[Format, ...]:
    """Types of activations by name; integers alone."""
    found = tuple(parse_format(text) for text in formats)
    assert all(isinstance(one, Int) for one in found)
    return found


def same_types(formats: Sequence[str]) -> tuple[OpTypes, ...]:
    """Each type in and out, of ops without a weight."""
    return op_types(*(f"{one} -> {one}" for one in formats))
