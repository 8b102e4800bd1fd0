"""What algorithms chose by calibration data, as far as it is no code or scale: kept, so that it can be done again."""

from dataclasses import dataclass
from typing import Final, final

from torch import Tensor

CHOICES: Final = "graphq.choices"  # of a graph: all tensors that were chosen for it, by the names of ``Choices.keep``


@final
@dataclass(frozen=True, eq=False)
class Choices:
    """The tensors that one algorithm of a spec chose. ``algorithm``: its place in the spec and its name; ``tensors``:
    those of all algorithms, by name.
    """

    algorithm: str
    tensors: dict[str, Tensor]

    def keep(self, of: str, tensor: Tensor) -> None:
        """``tensor`` was chosen for ``of``: what it is, and the parameter or layer."""
        self.tensors[f"{self.algorithm} {of}"] = tensor.detach().cpu().contiguous()

    def kept(self, of: str) -> Tensor | None:
        """What was chosen for ``of``; None where nothing was."""
        return self.tensors.get(f"{self.algorithm} {of}")
