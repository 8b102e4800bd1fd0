"""Modules whose weight lies in tiles once it has been multiplied with: in its place, and in memory alone."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self, cast, final

from torch import Tensor, nn

from graphq.runtime.kernels import Product
from graphq.runtime.quantized_module import QuantizedModule


def tensor_version(tensor: Tensor) -> int | None:
    """Counts the changes of a tensor in place, such as by ``load_state_dict``; inference tensors are not counted."""
    return None if tensor.is_inference() else cast(Any, tensor)._version


@final
class Snapshot:
    """A module's own buffers as they were when this was made: where they are held, their names, and their versions."""

    def __init__(self, module: nn.Module) -> None:
        buffers: dict[str, Any] = vars(module)["_buffers"]
        self.held = [(buffers, name, x, tensor_version(x)) for name, x in buffers.items() if x is not None]

    def is_current(self) -> bool:
        """Whether the module holds the same tensors, which nothing has changed in place."""
        for buffers, name, tensor, version in self.held:
            if buffers.get(name) is not tensor or (version is not None and tensor._version != version):
                return False
        return True


class TiledModule(QuantizedModule, ABC):
    """A linear whose first product may rearrange ``weight`` into tiles, in its place. What ``state_dict``, copies and
    ``packed`` give is always what it was before.
    """

    _graphq_ready: Any = None

    @property
    def is_tiled(self) -> bool:
        """Whether ``weight`` is held in tiles now."""
        return self.weight.dim() == 1

    @abstractmethod
    def packed(self) -> Tensor:
        """The weight as it was before it was tiled."""

    @abstractmethod
    def product(self, has_input_zero: bool) -> Product | None:
        """What the library of kernels multiplies with; None where something else does. The weight is in tiles then.

        ``has_input_zero``: whether inputs may have zero points.
        """

    def release(self) -> None:
        """The weight is as it was before it was tiled, and nothing is prepared."""
        self.weight = self.packed()
        self._graphq_ready = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.release()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_tiled:
            destination[f"{prefix}weight"] = self.packed()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        buffers = {**state["_buffers"], "weight": self.packed()}
        return {**state, "_buffers": buffers, "_graphq_ready": None}
