"""Observers wherever a consumer's table wants a tensor quantized; ``QuantizeActivations`` puts quantizers there.

Unlike an observer of a layer's input, which stands beside it, each of these stands between a tensor and its readers.
Quantizer placement: ``graphq.ir.grids``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, Final, cast, final

import torch
from torch import fx

from graphq.ir import edit
from graphq.ir.grids import NOTHING, Placement, Quantizer, Raised, place
from graphq.ir.mask_values import MaskValues, Reach
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Op, view
from graphq.observers.grids import GridObserver
from graphq.report import ActivationsReport, activations_report
from graphq.spec.activations import ActivationRule
from graphq.spec.profile import Profile

aten = torch.ops.aten
# Ops that may have a number in the place of a tensor, and what computes the same of tensors.
_WITH_TENSOR: Final = {
    **{op: op for op in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)},
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.rsub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
}


@final
@dataclass(frozen=True)
class PlaceQuantizers(Pass):
    """Every tensor that ``profile`` wants quantized is read through an observer; numbers that ops in integers add or
    multiply by are tensors. ``rules``, ``raised``: see ``graphq.ir.grids.place``. ``note`` is told what could not be
    had, ``placed`` what runs in which types.
    """

    profile: Profile
    rules: tuple[ActivationRule, ...] = ()
    note: Callable[[str], None] | None = None
    raised: Raised = NOTHING
    placed: Callable[[ActivationsReport], None] | None = None
    name: ClassVar[str] = "place-quantizers"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        found = place(gm, self.profile, self.rules, self.raised)
        changes = name_numbers(gm, found, self.name)
        if changes:
            found = place(gm, self.profile, self.rules, self.raised)
        for note in (*found.notes, *found.summary(self.profile.name)):
            if self.note is not None:
                self.note(note)
        if self.placed is not None:
            self.placed(activations_report(found, self.profile.name))
        return changes + put_observers(gm, found, self.name)


def put_observers(gm: fx.GraphModule, found: Placement, by: str) -> int:
    """Where quantizers will stand, tensors are read through observers of their grids; how many there are."""
    free = (path for i in count() if not edit.has_tensor(gm, path := f"observers.{i}"))
    everywhere: dict[Op, Op] = {}
    masks = MaskValues(gm)
    for one in found.quantizers:
        x = everywhere[one.x] if one.again else one.x
        reach = masks.reach(one.x) or Reach(())
        terms = [] if reach.base is None else [reach.base]
        observer = GridObserver(one.grid, one.name, one.role, one.moved, reach.numbers, is_sum=bool(terms))
        readers = [user for user in x.users if one.readers is None or user in one.readers]
        made = edit.add_observer(gm, x, next(free), observer, by, _like(one), terms, before=edit.following(x))
        for reader in readers:
            edit.redirect(reader, x, made, by=by)
        if one.readers is None:
            everywhere[one.x] = made
    return len(found.quantizers)


def name_numbers(gm: fx.GraphModule, found: Placement, by: str) -> int:
    """Python numbers that ops in integers compute with are tensors, which can be quantized; how many became such."""
    changes = 0
    for op in (op for unit, _ in found.integer for op in unit.ops):
        if op.node.target not in _WITH_TENSOR:
            continue
        given = op.argument("other")
        if isinstance(given, fx.Node):
            continue
        path = next(p for i in count() if not edit.has_tensor(gm, p := f"numbers.{i}"))
        number = torch.tensor(float(given), dtype=op.val.dtype)
        held = edit.add_tensor(gm, op, path, number, by=by, like=op)
        x = op.argument("self")
        operands = (held, view(x)) if op.node.target is aten.rsub.Scalar else (view(x), held)
        edit.replace(gm, op, _WITH_TENSOR[cast(Any, op.node.target)], *operands, by=by)
        changes += 1
    return changes


def _like(one: Quantizer) -> Op:
    """The op whose module a quantizer belongs to."""
    return one.readers[0] if one.readers and one.role == "input" else one.x
