"""What a node of an artifact may give its op: arguments that the op's schema takes, none of them out of all bounds."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch import fx
from torch._ops import OpOverload

from graphq.errors import TargetError

aten: Any = torch.ops.aten
_KINDS: Final[Mapping[str, type]] = {  # an integer would do in their place, unchecked
    "ScalarType": torch.dtype,
    "Layout": torch.layout,
    "MemoryFormat": torch.memory_format,
    "Device": torch.device,
}
_WIDEST: Final = 1 << 16
# A window's arguments, from which kernels compute memory without care, and parts, of which each is a tensor.
_BOUNDED: Final = frozenset(["kernel_size", "stride", "padding", "output_padding", "dilation", "sections"])
_MOST: Final = 1 << 31  # elements of a tensor that a graph makes of nothing, or of one tensor's copies
_MADE: Final = re.compile(
    r"aten::(affine_grid_generator|empty|(hamming|hann)_window|(lin|log)space"
    r"|(new_)?(empty|full|ones|zeros)|repeat|tile)"
)
_SIDES: Final = {"aten::eye": ("n", "m")} | dict.fromkeys(("aten::tril_indices", "aten::triu_indices"), ("row", "col"))
_CUTS: Final = (
    aten.slice.Tensor,
    aten.slice_scatter.default,
)  # which end at the largest integer where they have no end


def check_arguments(name: str, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Raises ``TargetError`` for arguments that an op does not take, or lacks, and for a tensor out of all bounds."""
    if not isinstance(target, OpOverload):
        return
    taken = target._schema.arguments  # pyright: ignore[reportPrivateUsage]
    positional = [a.name for a in taken if not a.kwarg_only]
    given = {**dict(zip(positional, args, strict=False)), **kwargs}
    needed = {a.name for a in taken if not a.has_default_value()}
    if len(args) > len(positional) or not needed <= given.keys() <= {a.name for a in taken}:
        raise TargetError(f"graph.json: {name}: its arguments are not those of {target}")
    for argument in taken:
        value = given.get(argument.name)
        real_type = str(cast(Any, argument).real_type)
        if argument.name in given and not _are_tensors(target, real_type, value):
            raise TargetError(f"graph.json: {name}: {target}: {argument.name}: {value!r} is not a {real_type}")
        kind = _KINDS.get(real_type.removeprefix("Optional[").removesuffix("]"))
        if kind is not None and value is not None and not isinstance(value, kind):
            raise TargetError(f"graph.json: {name}: {target}: {argument.name}: {value!r} is not a {kind.__name__}")
    if target == aten.view.dtype and given["dtype"] == torch.bool:
        raise TargetError(f"graph.json: {name}: {target}: bytes are not read as bools, which are 0 or 1")
    sizes = {a.name: _integers(given.get(a.name)) for a in taken if "int" in str(cast(Any, a).real_type)}
    if _elements(target, sizes, given) > _MOST:
        raise TargetError(f"graph.json: {name}: {target}: makes a tensor of more than 2^31 elements")
    for argument, size in sizes.items() if target not in _CUTS else ():
        if max(map(abs, size), default=0) > (_WIDEST if argument in _BOUNDED else _MOST):
            raise TargetError(f"graph.json: {name}: {target}: {argument}: {given[argument]!r} is out of range")


def _elements(target: OpOverload, sizes: Mapping[str, list[int]], given: Mapping[str, Any]) -> float:
    """How many elements the arguments alone ask for, 0 where they do not say."""
    op = target._schema.name  # pyright: ignore[reportPrivateUsage]
    if op == "aten::arange":
        start, end, step = given.get("start", 0), given["end"], given.get("step", 1)
        is_known = all(isinstance(bound, int | float) for bound in (start, end, step))
        return abs(end - start) / abs(step) if is_known and step else 0
    if op in _SIDES:
        rows, columns = (sizes.get(name) for name in _SIDES[op])
        return math.prod([*(rows or ()), *(columns or rows or ())])
    if not _MADE.fullmatch(op):
        return 0
    return max(math.prod(side for side in size if side > 0) for size in sizes.values())


def _integers(value: Any) -> list[int]:
    return [i for i in (cast(list[Any], value) if isinstance(value, list) else [value]) if isinstance(i, int)]


def _are_tensors(target: OpOverload, real_type: str, value: Any) -> bool:
    """Whether a value is a node, or nodes, where an op takes tensors. A few ops take numbers in their place."""
    match real_type:
        case "Tensor":
            op = target._schema.name.removeprefix("aten::")  # pyright: ignore[reportPrivateUsage]
            takes_numbers = cast(Any, torch._C)._should_allow_numbers_as_tensors(op)  # pyright: ignore[reportPrivateUsage]
            return isinstance(value, fx.Node) or (takes_numbers and isinstance(value, int | float | complex))
        case "Optional[Tensor]":
            return value is None or _are_tensors(target, "Tensor", value)
        case "List[Tensor]" | "List[Optional[Tensor]]" if isinstance(value, list | tuple):
            each = real_type.removeprefix("List[").removesuffix("]")
            return all(_are_tensors(target, each, v) for v in cast(Sequence[Any], value))
        case "List[Tensor]" | "List[Optional[Tensor]]":
            return isinstance(value, fx.Node)
        case _:
            return True
