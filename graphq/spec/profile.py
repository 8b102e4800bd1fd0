"""What a consumer of QDQ models runs in integers, as data: a profile is a table with a row for each kind of op.

Kinds are ONNX's op types; ``Linear`` is a MatMul or Gemm with a constant weight, ``MatMul`` one of two activations,
``Embedding`` a Gather of a constant's rows.
Types of activations are written as ``parse_format`` reads them (``uint8``, ``int8``, ``int8/asym``, ``uint16``), each
with one scale; those of weights with their granularity (``int8/channel``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, final

from graphq.errors import SpecError
from graphq.spec.formats import Format, Int, parse_format
from graphq.spec.quant import MinMax, PerTensor, Quant, RangeMethod, parse_quant, powers_of_two

Output = Literal["required", "optional", "same"]
Placed = Literal["always", "through", "between", "never"]
Bias = Literal["int32", "float"]
BiasNeeded = Literal["never", "float output", "always"]
LINEAR: Final = "Linear"
RECURRENCES: Final = ("LSTM", "GRU", "RNN")
_EXTREMES: Final = MinMax()
GEMM: Final = "Gemm"  # a linear's other row, where its spelling as Gemm has rules of its own


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
class Fault:
    """What a consumer gets wrong, or refuses, of ops that it takes by its rule.

    inputs: the types of activations that meet it. effect: what happens, where and by how much. instead: what does not.
    """

    inputs: tuple[Format, ...]
    effect: str
    instead: str


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
    also: further combinations that it takes in integers, and that nothing is quantized to on purpose.
    bias_needed: when a bias that is written otherwise takes it out of integers. bias_checked: whether an int32 bias
        with another scale than that of the products does; else it is added as if it had that.
    bias_axes: how many a bias may have: ``any`` number, or only with a ``zero point`` more than what it is added to.
    zero_points: whether those of its activations have to be 0: placed where something in them may be negative, these
        are of symmetric types.
    passes: (``same``) whether codes go through it where its output is not quantized.
    lifts: (``same``) whether a QuantizeLinear behind it is moved in front of it.
    regrids: (``same``) whether it takes an output on another grid all the same, in integers.
    one_reader: whether the QuantizeLinear behind it has to be all that reads what it gives, as it is placed for every
        op whose output is not ``optional``.
    retyped_alone: whether it takes the types of ``retypes`` where the consumer makes others of them, and only there.
    run_time_scales: whether its activations' scales may be computed at run time.
    run_time_weights: whether the codes of its weight may be computed at run time.
    outputs: how many of its outputs may be there; the second of a MaxPool are places.
    attributes: the values that these attributes have to have.
    float_constants: whether a constant operand may be in float; placed ones are quantized.
    faults: what the consumer gets wrong of it.
    """

    types: tuple[OpTypes, ...]
    output: Output = "required"
    placed: Placed = "always"
    grids: Mapping[str, FixedGrid] = field(default_factory=dict[str, FixedGrid])
    bias: Bias = "float"
    because: str = ""
    also: tuple[OpTypes, ...] = ()
    bias_needed: BiasNeeded = "never"
    bias_checked: bool = True
    bias_axes: Literal["any", "zero point"] = "any"
    zero_points: Literal["any", "zero"] = "any"
    passes: bool = False
    lifts: bool = False
    regrids: bool = False
    one_reader: bool = False
    retyped_alone: bool = False
    run_time_scales: bool = False
    run_time_weights: bool = False
    outputs: int | None = None
    attributes: Mapping[str, tuple[object, ...]] = field(default_factory=dict[str, tuple[object, ...]])
    float_constants: bool = False
    faults: tuple[Fault, ...] = ()


@final
@dataclass(frozen=True)
class WeightsAlone:
    """The linears of float inputs whose weights a consumer multiplies with as they are stored.

    types: of the codes. gemm: whether Gemm's transposed weight may be such. smallest_block: of blocked scales, which
    are powers of two where ``power_of_two``. dequantized: whether also where the input was quantized. columns: how many
    outputs it must have.
    rounded: what becomes of the activations on the way, if something does; exact: how to have them in float.
    """

    types: tuple[str, ...]
    gemm: bool = True
    smallest_block: int = 1
    power_of_two: bool = False
    dequantized: bool = True
    columns: int = 1
    rounded: str = ""
    exact: str = ""
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
    linear_of_rows: the same of one with an input of two axes, where ``linear`` is ``matmul``.
    dynamic: how a linear with scales by token is spelled. weight_only: how one with a float input is.
    power_of_two: whether scales have to be powers of two. range: where the ranges of activations come from where a spec
        does not say it.
    static: whether every dimension has to be an integer.
    opsets: the lowest and the highest that files for it are written in. opset: the lowest that is written where none is
        asked for. reads: those that it reads, where it is more.
    sources: where its rows are from.
    whole: whether an op in float is a fault, since it is refused or runs elsewhere.
    clamps: whether a Relu or Clip at the end of a fused chain runs in integers always, or only where the grid behind it
        holds nothing that it would cut off.
    folds_bias: whether a MatMul and an Add of a vector become a Gemm by the consumer's own doing.
    retypes: the type that activations get where one op alone reads them, by the type that they have.
    weights_alone: which weights of linears of float inputs it multiplies with as they are stored.
    operators: ops in integers that it runs beside QDQ, by type. refuses: types of codes that it does not read.
    whole_blocks: whether blocks of weights have to divide their axis.
    saturates: where products of uint8 and int8 do.
    splits_norms: whether a sum in front of a norm is faster where it is not fused with that.
    least_multiplier: the least factor (scale of input times scale of weight by scale of output) that it multiplies sums
        of products by; 0 where none is too small.
    scales: the types of scales with which ops run in integers; any, where there is none.
    overridable: whether initializers that are inputs, too, are no constants to it.
    strips: the types of codes whose quantizers it takes out, so that their tensors are in float.
    lacks: what becomes of kinds that it has no row for, where that is known.
    steps: up to how many steps a recurrence is written as such, in ops that it runs in integers, instead of as one op.
    float_weights: kinds whose weights it reads as floats alone where activations are quantized.
    """

    name: str
    consumer: str
    activations: tuple[Format, ...]
    weight: Quant
    ops: Mapping[str, OpRule]
    fuses: tuple[tuple[str, ...], ...] = ()
    linear: Literal["gemm", "matmul"] = "gemm"
    linear_of_rows: Literal["gemm", "matmul"] = "matmul"
    dynamic: Dynamic = "none"
    weight_only: WeightOnly = "dequantize"
    power_of_two: bool = False
    range: RangeMethod = _EXTREMES
    static: bool = False
    opsets: tuple[int, int] = (13, 25)
    opset: int = 13
    reads: tuple[int, int] | None = None
    sources: tuple[str, ...] = ()
    whole: bool = False
    clamps: Literal["always", "covered"] = "always"
    folds_bias: bool = False
    retypes: Mapping[str, str] = field(default_factory=dict[str, str])
    weights_alone: WeightsAlone | None = None
    operators: tuple[str, ...] = ()
    refuses: tuple[str, ...] = ()
    whole_blocks: bool = False
    saturates: str = ""
    splits_norms: bool = False
    least_multiplier: float = 0.0
    scales: tuple[str, ...] = ()
    overridable: bool = False
    strips: tuple[str, ...] = ()
    lacks: Mapping[str, str] = field(default_factory=dict[str, str])
    steps: int = 0
    float_weights: tuple[str, ...] = ()

    def no_row(self, kind: str) -> str:
        """Why a kind of op that has no row stays float."""
        known = self.lacks.get(kind)
        steps = (
            f"; up to {self.steps} steps, in a known number, run in integers"
            if kind in RECURRENCES and self.steps
            else ""
        )
        return f"{self.name} has no row for it" + (f": {known}" if known else "") + steps

    def activation(self) -> Quant:
        """The default of activations."""
        return self.own(Quant(self.activations[0], PerTensor(), method=self.range))

    def own(self, quant: Quant) -> Quant:
        """``quant`` as the consumer takes it: with scales that are powers of two where these have to be."""
        return powers_of_two(quant) if self.power_of_two else quant


def int_activations(*formats: str) -> tuple[Format, ...]:
    """Types of activations by name; integers alone."""
    found = tuple(parse_format(text) for text in formats)
    assert all(isinstance(one, Int) for one in found)
    return found


def same_types(formats: Sequence[str]) -> tuple[OpTypes, ...]:
    """Each type in and out, of ops without a weight."""
    return op_types(*(f"{one} -> {one}" for one in formats))
