"""The numbers that tensors made of masks may hold, whatever the masks are: more than one batch shows.

A batch without padding has masks of ones, and what is added to scores for them is 0 throughout; a batch with padding
brings the number that hides, too. Elements of a boolean are False or True, and so are few those of all that is computed
of booleans and constants element by element.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast, final

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg

from graphq.capture.source import source_of
from graphq.ir.constants import computation_of
from graphq.ir.effect_table import effect
from graphq.ir.effects import Adds, Copies, Elementwise, Homogeneous, Moves, Observes, ReadsShape, Scales
from graphq.ir.views import Op, Param, view
from graphq.state import tensor_of

aten = torch.ops.aten
_MOST: Final = 16  # numbers: a tensor with more of them is taken for any other
# Ops that give elements of one of their operands where a condition holds: the names of the condition and of these.
_CHOICES: Final[Mapping[Any, tuple[str, tuple[str, ...]]]] = {
    **dict.fromkeys((aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther), ("condition", ("self", "other"))),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), ("mask", ("value",))),
}
_NOT_ALONE: Final = (aten.tril.default, aten.triu.default)  # elementwise, and by the element's place


@final
@dataclass(frozen=True)
class Reach:
    """What a tensor may hold besides what is seen of it: these numbers or, where ``base`` is one of the tensors that it
    is the sum of, the elements of that and one of these numbers.
    """

    numbers: tuple[float, ...]
    base: Op | None = None


@final
class MaskValues:
    """The known numbers of one graph's tensors, each looked for once."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.mask = source_of(gm).mask
        self._found: dict[Op, Tensor | None] = {}

    def reach(self, op: Op) -> Reach | None:
        """What ``op`` may give besides what calibration sees of it; None where that is not known."""
        numbers = self.numbers(op)
        if numbers is not None:
            return _reach(numbers)
        if op.node.target is aten.add.Tensor and op.argument("alpha") == 1:
            for known, base in itertools.permutations((op.argument("self"), op.argument("other"))):
                if isinstance(known, fx.Node) and isinstance(base, fx.Node):
                    numbers = self.numbers(view(known))
                    if numbers is not None and len(numbers) > 1:  # one number alone is added to all that is seen
                        return _reach(numbers, view(base))
        condition, operands = _CHOICES.get(cast(Any, op.node.target), ("", ()))
        if operands and self.is_of_masks(view(op.argument(condition))):
            for given in map(op.argument, operands):
                numbers = self.numbers(view(given)) if isinstance(given, fx.Node) else torch.tensor([float(given)])
                if numbers is not None:
                    return _reach(numbers)
        return None

    def is_of_masks(self, op: Op) -> bool:
        """Whether a tensor is computed of the model's inputs, and of no float among them but the declared mask."""
        inputs = [view(one) for one in computation_of(op.node) if one.op == "placeholder"]
        return bool(inputs) and all(x.node.name == self.mask or not x.val.is_floating_point() for x in inputs)

    def numbers(self, op: Op) -> Tensor | None:
        """All numbers that elements of ``op`` may be, in one axis; None where they are not known to be few."""
        if op not in self._found:
            self._found[op] = None
            self._found[op] = self._numbers(op)
        return self._found[op]

    def _numbers(self, op: Op) -> Tensor | None:
        if isinstance(op.val, Tensor) and op.val.dtype == torch.bool:
            return torch.tensor([False, True])
        if op.node.op == "placeholder":
            return torch.tensor([0, 1]).to(op.val.dtype) if op.node.name == self.mask else None
        if isinstance(op, Param):
            held = tensor_of(self.gm, op.fqn).detach()
            return held.reshape(1).cpu() if held.numel() == 1 and not isinstance(held, FakeTensor) else None
        match effect(op):
            case ReadsShape(value) if isinstance(op.val, Tensor):
                number = value if value is not None else _filled(op)
                return None if number is None else torch.tensor([number]).to(op.val.dtype)
            case Copies() | Moves() | Observes():
                found = self.numbers(view(op.node.all_input_nodes[0]))
                return found if found is None or not isinstance(op.val, Tensor) else found.to(op.val.dtype).unique()
            case Elementwise() | Homogeneous() | Adds() | Scales() if op.node.target not in _NOT_ALONE:
                return self._of_all_pairs(op)
            case _:
                return None

    def _of_all_pairs(self, op: Op) -> Tensor | None:
        """What an op makes of its operands' numbers, each with each."""
        operands = {node: self.numbers(view(node)) for node in op.node.all_input_nodes}
        known = {node: numbers for node, numbers in operands.items() if numbers is not None}
        if not known or len(known) < len(operands) or any(len(numbers) > _MOST for numbers in known.values()):
            return None
        places = torch.meshgrid(*(torch.arange(len(numbers)) for numbers in known.values()), indexing="ij")
        flat = {node: known[node][place.flatten()] for node, place in zip(known, places, strict=True)}
        args, kwargs = map_arg((op.node.args, op.node.kwargs), flat.__getitem__)
        made = cast(Tensor, cast(Any, op.node.target)(*args, **kwargs)).unique()
        made = made[~made.isnan()]
        return made if len(made) <= _MOST else None


def _reach(numbers: Tensor, base: Op | None = None) -> Reach:
    return Reach(tuple(map(float, numbers)), base)


def _filled(op: Op) -> float | None:
    """The one number of a tensor that is filled with it."""
    names = {argument.name for argument in op.schema()}
    given = [op.argument(name) for name in ("fill_value", "s", "value") if name in names]
    return float(given[0]) if given and isinstance(given[0], int | float) else None
