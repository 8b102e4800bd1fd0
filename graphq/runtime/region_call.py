"""A region of a graph in one call of the library, where its inputs allow it, and op by op where they do not."""

from collections.abc import Callable, Sequence
from typing import Any, Final, cast, final

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from graphq.runtime.kernels import is_watched
from graphq.runtime.modules import Int8Linear
from graphq.runtime.packed_product import PackedProduct
from graphq.runtime.region_steps import Lowered, NoSteps, lowered
from graphq.runtime.regions import Region
from graphq.runtime.tiled import Snapshot

Ops = Callable[..., tuple[Tensor, ...]]
_MOST_PLANS: Final = 16  # shapes of inputs for which steps are kept
_PLAIN: Final = (Tensor, nn.Parameter)
_GLOBAL_HOOKS: Final[tuple[dict[Any, Any], ...]] = (
    cast(Any, hooks)._global_forward_hooks,
    cast(Any, hooks)._global_forward_pre_hooks,
)


@final
class _Plan:
    """The steps for inputs of some shapes, as long as the weights are what they were."""

    def __init__(self, modules: Sequence[nn.Module], inputs: Sequence[Any], made: Lowered) -> None:
        self.modules = tuple(modules)
        self.inputs = [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in inputs]
        self.made = made
        self.held = [held for module in modules for held in Snapshot(module).held]  # one loop over all of them
        own = [(vars(m)["_forward_hooks"], vars(m)["_forward_pre_hooks"]) for m in modules]
        self.hooks = [*_GLOBAL_HOOKS, *(found for both in own for found in both)]
        self.is_as_made = all(
            shape == made.made[place][0] and not is_turned and place == i
            for i, (place, shape, is_turned) in enumerate(made.outputs)
        ) and len(made.outputs) == len(made.made)

    def fits(self, modules: tuple[nn.Module, ...], inputs: Sequence[Any]) -> bool:
        """Whether inputs are as they were; each of them plain, and on the CPU."""
        if modules != self.modules:
            return False
        for x, wanted in zip(inputs, self.inputs, strict=True):
            if type(x) not in _PLAIN:
                if type(x) is not int or x != wanted:
                    return False
            elif wanted.__class__ is not tuple or x.shape != wanted[0] or x.dtype is not wanted[1] or not x.is_cpu:
                return False
        return True

    def is_current(self) -> bool:
        """Whether the modules hold what they held, unchanged."""
        for buffers, name, tensor, version in self.held:
            if buffers.get(name) is not tensor or (version is not None and tensor._version != version):
                return False
        return True

    def run(self, inputs: Sequence[Any]) -> tuple[Tensor, ...] | None:
        """What the region gives; None where an input that is quantized is not finite."""
        taken = [x.contiguous().resolve_neg() for x in inputs if type(x) is not int]
        made = [torch.empty(shape, dtype=dtype) for shape, dtype in self.made.made]
        if not self.made.program.run([*taken, *made]):
            return None
        if self.is_as_made:
            return tuple(made)
        found = [
            made[place] if shape == self.made.made[place][0] else made[place].view(shape)
            for place, shape, _ in self.made.outputs
        ]
        turns = zip(found, self.made.outputs, strict=True)
        return tuple(x.transpose(1, 2) if is_turned else x for x, (_, _, is_turned) in turns)


@final
class RegionCall:
    """Calls a region. Steps are made for each shape of the inputs that comes up, and made anew when weights change."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self._last: _Plan | None = None
        self._plans: dict[object, _Plan | None] = {}

    def __call__(self, ops: Ops, modules: tuple[nn.Module, ...], inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """``ops``: the region op by op, of the modules and the inputs."""
        if is_watched() or (torch.is_grad_enabled() and any(x.requires_grad for x in inputs if type(x) in _PLAIN)):
            return ops(*modules, *inputs)
        plan = self._last
        if plan is None or not plan.fits(modules, inputs) or not plan.is_current():
            plan = self._last = self._planned(modules, inputs)
        if plan is None or any(plan.hooks):
            return ops(*modules, *inputs)
        made = plan.run(inputs)
        return ops(*modules, *inputs) if made is None else made

    def _planned(self, modules: tuple[nn.Module, ...], inputs: tuple[Any, ...]) -> _Plan | None:
        if not all(type(x) is int or (type(x) in _PLAIN and x.is_cpu) for x in inputs):
            return None
        if not all(isinstance(m, PackedProduct | Int8Linear) and m.weight.is_cpu for m in modules):
            return None
        key = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in inputs)
        if key in self._plans:
            known = self._plans[key]
            if known is None or (known.fits(modules, inputs) and known.is_current()):
                return known
            self._plans.clear()  # whatever they hold of the weights that were
        if len(self._plans) == _MOST_PLANS:
            self._plans.clear()
        try:
            plan = _Plan(modules, inputs, lowered(self.region, modules, inputs))
        except NoSteps:
            plan = None
        self._plans[key] = plan
        return plan
