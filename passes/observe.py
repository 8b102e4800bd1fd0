"""Observers on the activations whose scale is fixed before run time, and what they see."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import ClassVar, Final, final

import torch
from torch import Tensor, fx, nn

from graphq import edit
from graphq.errors import SpecError
from graphq.formats import PerExpert, Plan, Quant
from graphq.layers import LAYER, PLAN
from graphq.pipeline import Batches, Pass
from graphq.runtime import ops
from graphq.views import Dequantize, Op, Quantize, Weighted, ops_of


@final
class MinMaxObserver(nn.Module):
    """Hands its input on and keeps the smallest and the largest element seen, in float32.

    ``layers``: the layers that read this activation. An element that is NaN or infinite raises ``SpecError``.
    """

    low: Tensor
    high: Tensor
    batches: Tensor
    _is_impure: Final = True  # torch.fx: nothing needs to read its output

    def __init__(self, quant: Quant, layers: tuple[str, ...]) -> None:
        super().__init__()
        self.quant = quant
        self.layers = layers
        self.register_buffer("low", torch.tensor(torch.inf, dtype=torch.float32))
        self.register_buffer("high", torch.tensor(-torch.inf, dtype=torch.float32))
        self.register_buffer("batches", torch.tensor(0))

    @property
    def has_seen(self) -> bool:
        """Whether any element came by."""
        return bool(self.low <= self.high)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel():
            low, high = x.amin().float(), x.amax().float()
            if not (torch.isfinite(low) and torch.isfinite(high)):
                raise SpecError(
                    f"calibration: batch {int(self.batches)}: the input of {self.layers[0]} holds NaN or Inf"
                )
            # In place: tensors made in inference mode could not be loaded into later.
            self.low.copy_(torch.minimum(self.low, low))
            self.high.copy_(torch.maximum(self.high, high))
        self.batches += 1
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MinMaxObserver":
        # A change of the model's dtype leaves the precision of statistics alone; only the device follows.
        for name, buffer in self.named_buffers(recurse=False):
            setattr(self, name, buffer.to(fn(torch.empty(0, dtype=buffer.dtype, device=buffer.device)).device))
        return self


def input_quants(decision: object) -> tuple[Quant | None, ...]:
    """The input format of a layer, or of each expert of a stack."""
    decisions = decision.decisions if isinstance(decision, PerExpert) else (decision,)
    return tuple(d.input if isinstance(d, Plan) else None for d in decisions)


def to_quantize(gm: fx.GraphModule) -> Iterator[tuple[Weighted, tuple[Quant | None, ...]]]:
    """The layers whose planned input is not quantized yet, with its format (a stack: that of each expert)."""
    for op in ops_of(gm):
        if not isinstance(op, Weighted) or _is_quantized(op.input_op):
            continue
        quants = input_quants(op.node.meta.get(PLAN))
        if any(quant is not None for quant in quants):
            yield op, quants


def _is_quantized(x: Op) -> bool:
    if x.node.target is ops.select_rows:  # one of several that are
        return True
    return isinstance(x, Dequantize) and isinstance(x.codes, Quantize)


@final
@dataclass(frozen=True)
class Observe(Pass):
    """Every activation with a static scale is watched by one observer, which all layers that agree on it share.

    The experts of a stack that have the same format share a scale: they read rows of one tensor.
    """

    name: ClassVar[str] = "observe"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        wanted: dict[tuple[Op, Quant], list[Weighted]] = {}
        for op, quants in to_quantize(gm):
            for quant in dict.fromkeys(quants):
                if quant is not None and not quant.dynamic and observer_on(gm, op.input_op, quant) is None:
                    wanted.setdefault((op.input_op, quant), []).append(op)
        free = (path for i in count() if not edit.has_tensor(gm, path := f"observers.{i}"))
        made = list(zip(wanted.items(), islice(free, len(wanted)), strict=True))
        for ((x, quant), readers), path in reversed(made):  # each stands right after x: in order at last
            layers = tuple(dict.fromkeys(str(op.node.meta[LAYER]) for op in readers))
            edit.add_observer(gm, x, path, MinMaxObserver(quant, layers), by=self.name, like=readers[0])
        return len(wanted)


def observer_of(gm: fx.GraphModule, op: Op) -> MinMaxObserver | None:
    """The observer that a node calls."""
    if op.node.op != "call_module":
        return None
    module = gm.get_submodule(str(op.node.target))
    return module if isinstance(module, MinMaxObserver) else None


def observer_on(gm: fx.GraphModule, x: Op, quant: Quant) -> MinMaxObserver | None:
    """The observer for this format that watches ``x``."""
    found = (observer_of(gm, user) for user in x.users)
    return next((observer for observer in found if observer is not None and observer.quant == quant), None)


def observers(gm: fx.GraphModule) -> list[tuple[Op, MinMaxObserver]]:
    """The nodes that call observers, and the observers."""
    found = ((op, observer_of(gm, op)) for op in ops_of(gm))
    return [(op, observer) for op, observer in found if observer is not None]
