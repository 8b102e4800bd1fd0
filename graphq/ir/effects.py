"""The kinds of what an op does to the elements of its operands; ``graphq.ir.effect_table`` says which op does what.

An op acts on its first argument where nothing else is said.
"""

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, final

T = TypeVar("T")


@final
@dataclass(frozen=True)
class Carried(Generic[T]):
    """What a walk knows of an op's output, from what it knew of the operands."""

    value: T


@final
@dataclass(frozen=True)
class Stopped:
    """Why a walk goes no further."""

    reason: str


@final
@dataclass(frozen=True)
class Copies:
    """Every element stays in its place: a copy or an alias, in another layout or dtype perhaps."""


@final
@dataclass(frozen=True)
class Moves:
    """Every element of the output is one of the input's: elements change places, are left out or repeated.

    The op can be run on any tensor of the input's shape. how: ``reshape`` keeps the row-major order; ``permute`` puts
    axes in another order; ``pick`` takes indices along axes (``dim``, ``dims``); ``repeat`` gives elements several
    times; ``split`` gives a list of parts, and ``item`` one part of a list.
    """

    how: Literal["reshape", "permute", "pick", "repeat", "split", "item"]


@final
@dataclass(frozen=True)
class Homogeneous:
    """Elementwise in its first argument, with f(a x) = a f(x) for a > 0. ``linear``: f(x + y) = f(x) + f(y), too."""

    linear: bool = False


@final
@dataclass(frozen=True)
class Elementwise:
    """An element of the output depends on the elements of the operands at its place alone, as they broadcast."""


@final
@dataclass(frozen=True)
class Adds:
    """The elementwise sum or difference of both operands, of which one may be a number."""


@final
@dataclass(frozen=True)
class Scales:
    """The elementwise product or quotient (``divides``) of both operands, of which one may be a number."""

    divides: bool = False


@final
@dataclass(frozen=True)
class Reduces:
    """One number for all elements along some axes (``axes_of``), which are gone or of size 1.

    of: whether it is ``linear`` in them, or ``homogeneous`` (f(a x) = a f(x) for a > 0), or neither.
    """

    of: Literal["linear", "homogeneous", "other"]


@final
@dataclass(frozen=True)
class MixesAxis:
    """Every element depends on those alone that differ from it in the index of one axis (``axes_of``), whose size may
    change. Ops with a list of outputs give them alike. ``orders``: elements are put in another order, or the first few
    taken: values and their indices, or the indices alone.
    """

    orders: bool = False


@final
@dataclass(frozen=True)
class Normalizes:
    """(x - mean) / deviation * gain + bias. ``parameters``: the names of gain and bias, which may be None.

    axis: that of the channels, which gain and bias run along. over: what mean and deviation are taken over: the
    ``row`` of the last axes (``normalized_shape``); ``nothing``, where they are constants; also ``positions``, of each
    sample by itself; or the whole ``batch``, of each channel by itself. centres: whether the mean comes off.
    """

    axis: int
    over: Literal["row", "nothing", "positions", "batch"]
    centres: bool = True
    parameters: tuple[str, ...] = ("weight", "bias")


@final
@dataclass(frozen=True)
class Pools:
    """The mean or maximum of windows of the last ``rank`` axes; homogeneous; each channel, the axis before, by itself.

    The axes before that are batches, or there are none.
    """

    rank: int


@final
@dataclass(frozen=True)
class Projects:
    """Each row (the last axis) of the input times a weight; nothing else is mixed. A linear, or one of experts."""


@final
@dataclass(frozen=True)
class Convolves:
    """Windows of the last ``rank`` axes of the input, of all channels (the axis before these), times a weight."""

    rank: int


@final
@dataclass(frozen=True)
class LooksUp:
    """For each index (the argument ``indices``) a row of a weight, or of the identity, along a new last axis."""

    indices: str = "indices"


@final
@dataclass(frozen=True)
class Contracts:
    """The matrix product of the first two arguments: each row of the first times the last two axes of the second."""


@final
@dataclass(frozen=True)
class AddsProduct:
    """The first argument plus the batched matrix product of the next two, a multiple of each.

    ``sums``: the products of a batch are added up.
    """

    sums: bool = False


@final
@dataclass(frozen=True)
class Attends:
    """Scaled dot product attention: for each row of ``query`` a mean of the rows of ``value``.

    Its weights come from ``query``, ``key`` and ``attn_mask``.
    """


@final
@dataclass(frozen=True)
class Joins:
    """The tensors of a list one after the other, along ``dim``; ``new``: which is a new axis."""

    new: bool = False


@final
@dataclass(frozen=True)
class Gathers:
    """Elements of the first argument, whose indices are tensors: ``slices``, whole but for the indexed axes, or
    ``elements``, each with an index of its own along ``dim``.
    """

    what: Literal["slices", "elements"]


@final
@dataclass(frozen=True)
class Scatters:
    """The first argument, with those of the argument ``source`` (None: a number) written in places, or added
    (``adds``): whole ``slices``, or ``elements``, each with an index of its own.
    """

    what: Literal["slices", "elements"]
    source: str | None
    adds: bool = False


@final
@dataclass(frozen=True)
class Pads:
    """The input between more elements: of this ``value``, or (None) of its own."""

    value: float | None


@final
@dataclass(frozen=True)
class ReadsShape:
    """A size, or a tensor of no operand's elements. ``value``: that of all its elements, where that is known."""

    value: float | None = None


@final
@dataclass(frozen=True)
class Observes:
    """A call of an observer, which gives its first argument as it is."""


@final
@dataclass(frozen=True)
class Opaque:
    """Anything."""


_OfElements = Copies | Moves | Homogeneous | Elementwise | Adds | Scales | Joins | Gathers | Scatters | Pads
_OfAxes = Reduces | MixesAxis | Normalizes | Pools | Contracts | AddsProduct | Attends
_OfWeights = Projects | Convolves | LooksUp
Effect = _OfElements | _OfAxes | _OfWeights | ReadsShape | Observes | Opaque
