"""What every observer is: a module that hands an activation on and keeps what a pass will need to know of it.

What an observer keeps does not grow with the number of batches. ``merge`` takes in what another saw of later batches;
the result is what one observer of all batches would hold. Statistics stay in float32 or wider under ``.to(dtype)``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor, nn

from graphq.errors import PassError, SpecError
from graphq.ir.views import Op, Weighted


class Observer(nn.Module, ABC):
    """Hands its input on and keeps statistics of it. ``layers``: the layers that read this activation.

    ``sweeps``: how often the batches have to come by; ``sweep`` counts them.
    """

    batches: Tensor
    sweeps: ClassVar[int] = 1
    role: str = "input"  # what of its layers it sees
    _is_impure: Final = True  # torch.fx: nothing needs to read its output

    def __init__(self, layers: tuple[str, ...]) -> None:
        super().__init__()
        self.layers = layers
        self.sweep = 0
        self.register_buffer("batches", torch.tensor(0))

    @property
    @abstractmethod
    def has_observed(self) -> bool:
        """Whether any element came by."""

    @abstractmethod
    def update(self, x: Tensor, *rest: Tensor) -> None:
        """Take in a batch; ``rest``: what else the observer is given."""

    def refine(self, x: Tensor, *rest: Tensor) -> None:
        """Take in a batch on a further sweep."""

    @abstractmethod
    def absorb(self, later: "Observer") -> None:
        """Take in what ``later``, of the same settings, saw of batches that came after these."""

    def settings(self) -> tuple[object, ...]:
        """What observers agree on that can be merged."""
        return ()

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        if self.sweep:
            self.refine(x, *rest)
        else:
            if x.numel():
                self.update(x, *rest)
            self.batches += 1
        return x

    def refuse(self) -> SpecError:
        """The error for the present batch, which holds NaN or Inf."""
        return SpecError(
            f"calibration: batch {int(self.batches)}: the {self.role} of {self.layers[0]} holds NaN or Inf"
        )

    def merge(self, later: "Observer") -> None:
        """Take in what ``later`` saw, of batches that came after these. Raises ``PassError`` for another kind."""
        if not isinstance(later, type(self)) or later.settings() != self.settings() or later.sweep != self.sweep:
            raise PassError(f"the observers of {self.layers[0]} and {later.layers[0]} differ, they cannot be merged")
        self.absorb(later)
        self.batches += later.batches

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Observer":
        # A change of the model's dtype leaves the precision of statistics alone; only the device follows.
        for name, buffer in self.named_buffers(recurse=False):
            setattr(self, name, buffer.to(fn(torch.empty(0, dtype=buffer.dtype, device=buffer.device)).device))
        return self


@final
@dataclass(frozen=True)
class ObserverRequest:
    """An observer of ``x`` that a pass asks for. ``like``: a layer that reads it; ``rest``: what it sees besides."""

    x: Op
    observer: Observer
    like: Weighted
    rest: tuple[Op, ...] = ()
