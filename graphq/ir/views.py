"""Typed windows on FX nodes. ``view(node)`` gives the view of a node's op; two views are equal iff they show one node.

A class names its op and the op's arguments; the names are checked against the ATen schema when the class is made, so
that a misspelling fails at import. Positional, keyword and default arguments read alike, and ``match`` patterns work:
``case Linear(x, Param() as w)``. Arguments that are nodes come as views, lists of nodes as lists of views.
"""

import inspect
from collections.abc import Iterator
from typing import Any, ClassVar, Final, Self, cast, dataclass_transform, final, get_origin

import torch
from torch import fx
from torch._ops import OpOverload

from graphq.errors import PassError
from graphq.runtime import ops

_VIEWS: Final[dict[OpOverload, type["Op"]]] = {}
aten = torch.ops.aten


@dataclass_transform(eq_default=False, frozen_default=True)  # shows type checkers the fields as positional patterns
class Op:
    """A window on one node. The plain class shows nodes whose op has no view of its own. Only ``view`` makes views."""

    target: ClassVar[Any] = None
    fixed: ClassVar[tuple[tuple[str, object], ...]] = ()  # arguments whose other values are another op's
    __match_args__: tuple[str, ...] = ()

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    def __init_subclass__(cls, target: OpOverload | None = None) -> None:
        if target is None:
            return
        own = (inspect.get_annotations(base) for base in reversed(cls.__mro__) if base is not Op)
        names = tuple(n for fields in own for n, kind in fields.items() if get_origin(kind) is not ClassVar)
        known = [argument.name for argument in _arguments(target)]
        wrong = [name for name in names if _argument_name(name) not in known]
        if wrong:
            raise PassError(f"{cls.__name__}: {target} has no argument {', '.join(wrong)}; it has {', '.join(known)}")
        if target in _VIEWS:
            raise PassError(f"{cls.__name__}: {target} has a view already, {_VIEWS[target].__name__}")
        cls.target = target
        cls.__match_args__ = names
        _VIEWS[target] = cls

    @classmethod
    def of(cls, node: object) -> Self | None:
        """The view of ``node`` if it is a node of this class, else None."""
        seen = view(node) if isinstance(node, fx.Node) else None
        return seen if isinstance(seen, cls) else None

    def __getattr__(self, name: str) -> Any:
        if name in type(self).__match_args__:
            return _show(self.argument(_argument_name(name)))
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def schema(self) -> list[Any]:
        """The arguments that the op declares; none where it is no op of torch's."""
        target = self.node.target
        return _arguments(target) if isinstance(target, OpOverload) else []

    def argument(self, name: str) -> Any:
        """The raw argument of this name, wherever it was given; its default where it was not."""
        target = self.node.target
        for position, argument in enumerate(self.schema()):
            if argument.name == name:
                if name in self.node.kwargs:
                    return self.node.kwargs[name]
                if position < len(self.node.args):
                    return self.node.args[position]
                if not argument.has_default_value():
                    raise PassError(f"{self!r}: {target} was not given its argument {name}")
                return argument.default_value
        raise PassError(f"{self!r}: {target} has no argument {name}")

    @property
    def users(self) -> list["Op"]:
        """The views of the nodes that read this one."""
        return [view(user) for user in self.node.users]

    @property
    def val(self) -> Any:
        """The fake tensor (or symbolic number) that this node gives."""
        return self.node.meta.get("val")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Op) and other.node is self.node

    def __hash__(self) -> int:
        return hash(self.node)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.node.name})"


def _arguments(target: OpOverload) -> list[Any]:
    return cast(Any, target)._schema.arguments


def _argument_name(field: str) -> str:
    return "self" if field == "self_" else field


def view(node: fx.Node) -> Op:
    """The most specific view of ``node``: the plain one where an argument has another value than is ``fixed``."""
    seen = _class_of(node)(node)
    return seen if all(seen.argument(name) == value for name, value in seen.fixed) else Op(node)


def _class_of(node: fx.Node) -> type[Op]:
    if node.op == "get_attr":
        return Param
    if node.op == "placeholder":
        return Input
    return _VIEWS.get(node.target, Op) if isinstance(node.target, OpOverload) else Op


def _show(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return view(value)
    if isinstance(value, list | tuple):
        return [_show(item) for item in cast(list[Any], value)]
    return value


def ops_of(gm: fx.GraphModule) -> Iterator[Op]:
    """The views of a graph's nodes in order; nodes added on the way are not met."""
    for node in list(gm.graph.nodes):
        yield view(node)


@final
class Param(Op):
    """A parameter or buffer; ``fqn`` is its state-dict key."""

    @property
    def fqn(self) -> str:
        return str(self.node.target)


@final
class Input(Op):
    """An input of the graph."""


class Weighted(Op):
    """An op that multiplies an input by a weight, or takes rows of one.

    ``out_axis``, ``in_axis``, ``own_axes``: of the weight as it is stored. ``input_axis``, ``output_axis``: of the
    channels in the op's input and in its output, counted from the end, with batches or without. ``is_product``: whether
    what the weight multiplies is the op's input, and all of it.
    """

    weight_name: ClassVar[str] = "weight"
    input_name: ClassVar[str] = "input"
    out_axis: ClassVar[int] = 0
    in_axis: ClassVar[int] = 1
    own_axes: ClassVar[tuple[int, ...]] = ()
    input_axis: ClassVar[int] = -1
    output_axis: ClassVar[int] = -1
    is_product: ClassVar[bool] = True

    @property
    def weight_op(self) -> Op:
        return view(self.argument(self.weight_name))

    @property
    def input_op(self) -> Op:
        return view(self.argument(self.input_name))


@final
class Linear(Weighted, target=aten.linear.default):
    input: Op
    weight: Op
    bias: Op | None


@final
class TransposedLinear(Weighted, target=aten.addmm.default):
    """GPT-2's ``Conv1D``: ``self + mat1 @ mat2`` with the weight ``mat2[K, N]``; no ``addmm`` that scales either."""

    self_: Op
    mat1: Op
    mat2: Op
    fixed = (("beta", 1), ("alpha", 1))
    weight_name = "mat2"
    input_name = "mat1"
    out_axis = 1
    in_axis = 0


class Convolution(Weighted):
    """Its weight is ``[out, in / groups, ...]``."""

    input: Op
    weight: Op
    bias: Op | None
    groups: int


@final
class Conv1d(Convolution, target=aten.conv1d.default):
    input_axis = output_axis = -2


@final
class Conv1dPadding(Convolution, target=aten.conv1d.padding):
    input_axis = output_axis = -2


@final
class Conv2d(Convolution, target=aten.conv2d.default):
    input_axis = output_axis = -3


@final
class Conv2dPadding(Convolution, target=aten.conv2d.padding):
    input_axis = output_axis = -3


@final
class Conv3d(Convolution, target=aten.conv3d.default):
    input_axis = output_axis = -4


@final
class Conv3dPadding(Convolution, target=aten.conv3d.padding):
    input_axis = output_axis = -4


class ConvTranspose(Weighted):
    """Its weight is ``[in, out / groups, ...]``: axis 0 holds the groups one after the other."""

    input: Op
    weight: Op
    bias: Op | None
    groups: int
    out_axis = 1
    in_axis = 0


@final
class ConvTranspose1d(ConvTranspose, target=aten.conv_transpose1d.default):
    input_axis = output_axis = -2


@final
class ConvTranspose2d(ConvTranspose, target=aten.conv_transpose2d.input):
    input_axis = output_axis = -3


@final
class ConvTranspose3d(ConvTranspose, target=aten.conv_transpose3d.input):
    input_axis = output_axis = -4


@final
class Embedding(Weighted, target=aten.embedding.default):
    weight: Op
    indices: Op
    input_name = "indices"
    is_product = False


@final
class EmbeddingBag(Weighted, target=aten.embedding_bag.padding_idx):
    """Sums, means or maxima of looked up rows; the first of four outputs."""

    weight: Op
    indices: Op
    offsets: Op
    input_name = "indices"
    is_product = False


LOOKUPS: Final = (Embedding, EmbeddingBag)


@final
class GroupedLinear(Weighted, target=ops.grouped_linear):
    """Experts' linears: rows of ``x[T, K]`` by ``weight[E, N, K]``, cut at ``offsets[E]``."""

    x: Op
    weight: Op
    offsets: Op
    input_name = "x"
    out_axis = 1
    in_axis = 2
    own_axes = (0,)


@final
class Recurrence(Weighted, target=ops.recurrence):
    """One direction of a recurrent layer, from its ``gates``, to which ``weight`` times the state before is added."""

    gates: Op
    weight: Op
    bias: Op | None
    hidden: Op
    cell: Op | None
    kind: str
    reverse: bool
    input_name = "hidden"
    is_product = False


@final
class BatchNorm(Op, target=aten.batch_norm.default):
    """The channels are axis 1, whatever the rank."""

    input: Op
    weight: Op | None
    bias: Op | None
    running_mean: Op | None
    running_var: Op | None
    training: bool
    eps: float


@final
class InferenceBatchNorm(Op, target=aten._native_batch_norm_legit_no_training.default):
    """As ``BatchNorm`` when it is not training; the first of three outputs is the normalized input."""

    input: Op
    weight: Op | None
    bias: Op | None
    running_mean: Op
    running_var: Op
    eps: float


@final
class Dequantize(Op, target=ops.dequantize):
    codes: Op
    scale: Op
    zero_point: Op | None
    global_scale: Op | None
    format: str
    block: list[int]
    dtype: torch.dtype | None


@final
class Quantize(Op, target=ops.quantize):
    x: Op
    scale: Op
    zero_point: Op | None
    global_scale: Op | None
    format: str
    block: list[int]


@final
class ChooseScale(Op, target=ops.choose_scale):
    x: Op
    format: str
    block: list[int]


@final
class TopK(Op, target=aten.topk.default):
    self_: Op


@final
class Split(Op, target=aten.split.Tensor):
    self_: Op
    split_size: int | Op  # an Op where it is computed from a dynamic size
    dim: int


@final
class Transpose(Op, target=aten.transpose.int):
    self_: Op
    dim0: int
    dim1: int


@final
class Cast(Op, target=aten._to_copy.default):
    self_: Op
    dtype: torch.dtype | None
