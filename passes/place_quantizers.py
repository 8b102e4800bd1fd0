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
from graphq.ir.grids import Placement, Quantizer, place, units_of
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Op
from graphq.observers.ranges import GridObserver
from graphq.spec.activations import ActivationRule
from graphq.spec.profile import Profile

aten = torch.ops.aten
_SCALARS: Final = {
    aten.add.Tensor: aten.add.Tensor,
    aten.sub.Tensor: aten.sub.Tensor,
    aten.mul.Tensor: aten.mul.Tensor,
    aten.div.Tensor: aten.div.Tensor,
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
}


@final
@dataclass(frozen=True)
class PlaceQuantizers(Pass):
    """Every tensor that ``profile`` wants quantized is read through an observer; numbers that ops in integers add or
    multiply by are tensors. ``rules``: see ``graphq.ir.grids.place``. ``note`` is told what could not be had.
    """

    profile: Profile
    rules: tuple[ActivationRule, ...] = ()
    note: Callable[[str], None] | None = None
    name: ClassVar[str] = "place-quantizers"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        changes = self._name_numbers(gm)
        found = place(gm, self.profile, self.rules)
        for note in found.notes:
            if self.note is not None:
                self.note(note)
        self._observe(gm, found)
        return changes + len(found.quantizers)

    def _observe(self, gm: fx.GraphModule, found: Placement) -> None:
        free = (path for i in count() if not edit.has_tensor(gm, path := f"observers.{i}"))
        everywhere: dict[Op, Op] = {}
        for one in found.quantizers:
            x = everywhere[one.x] if one.again else one.x
            observer = GridObserver(one.grid, one.name, one.role, one.moved)
            readers = [user for user in x.users if one.readers is None or user in one.readers]
            made = edit.add_observer(gm, x, next(free), observer, self.name, like=_like(one))
            for reader in readers:
                edit.redirect(reader, x, made, by=self.name)
            if one.readers is None:
                everywhere[one.x] = made

    def _name_numbers(self, gm: fx.GraphModule) -> int:
        """Python numbers that ops in integers compute with become tensors, which can be quantized."""
        changes = 0
        for unit in units_of(gm, ()):
            op = unit.first
            rule = self.profile.ops.get(unit.kind)
            if rule is None or rule.placed != "always" or op.node.target not in _SCALARS or len(unit.edges) != 1:
                continue
            other = op.argument("other")
            alpha = op.argument("alpha") if any(a.name == "alpha" for a in op.schema()) else 1
            if not isinstance(other, int | float) or isinstance(other, bool) or alpha != 1:
                continue
            path = next(p for i in count() if not edit.has_tensor(gm, p := f"numbers.{i}"))
            held = edit.add_tensor(gm, op, path, torch.tensor(float(other), dtype=op.val.dtype), by=self.name, like=op)
            edit.replace(gm, op, _SCALARS[cast(Any, op.node.target)], unit.edges[0][1], held, by=self.name)
            changes += 1
        return changes


def _like(one: Quantizer) -> Op:
    """The op whose module a quantizer belongs to."""
    return one.readers[0] if one.readers and one.role == "input" else one.x
