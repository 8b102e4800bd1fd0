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

from graphq.errors import GraphqError, PassError, SpecError
from graphq.ir.views import Op


class Observer(nn.Module, ABC):
    """Hands its input on and keeps statistics of it. ``layers``: the layers that read this activation.

    ``sweeps``: how often the batches have to come by; ``sweep`` counts them. ``axis``: that of the channels in what it
    sees, whose rows it takes whole; None where it takes elements. ``reads_windows``: whether it takes what convolutions
    read of many places at once, so that none can be left out.
    """

    batches: Tensor
    sweeps: ClassVar[int] = 1
    role: str = "input"  # what of its layers it sees
    axis: int | None = -1
    reads_windows: bool = False
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

    def forward(self, x: Tensor, *rest: Tensor, valid: Tensor | None = None) -> Tensor:
        """``x``. ``valid``: which elements of it count (None: all); constant along ``axis`` where there is one.

        Raises ``SpecError`` for data that holds NaN or Inf, ``PassError`` for whatever else fails.
        """
        try:
            seen = (x, *rest) if valid is None else self.valid_part(x, valid, *rest)
            if self.sweep:
                self.refine(*seen)
            else:
                if seen[0].numel():
                    self.update(*seen)
                self.batches += 1
        except (GraphqError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            what = f"{type(self).__name__} of the {self.role} of {self.layers[0]}"
            raise PassError(f"calibrate: {what}: {type(error).__name__}: {error}") from error
        return x

    def valid_part(self, x: Tensor, valid: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """What counts of a batch: elements, or rows along the channels in a tensor of as many axes.

        ``rest``: where each expert's rows end, which is counted anew.
        """
        if self.axis is None:
            return (x[valid], *rest)
        rows = valid.movedim(self.axis, -1).flatten(0, -2)[:, 0]
        kept = x.movedim(self.axis, -1).flatten(0, -2)[rows]
        ends = torch.cat([rows.new_zeros(1, dtype=torch.int64), rows.cumsum(0)])
        shape = (len(kept), *[1] * (x.dim() - 2), x.shape[self.axis])
        return (kept.view(shape).movedim(-1, self.axis), *(ends[offsets.long()].to(offsets.dtype) for offsets in rest))

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
    """An observer of ``x`` that a pass asks for. ``like``: an op that reads it; ``rest``: what it sees besides."""

    x: Op
    observer: Observer
    like: Op
    rest: tuple[Op, ...] = ()
