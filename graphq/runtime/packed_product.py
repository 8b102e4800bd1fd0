"""What products with packed codes have in common: a kernel, chosen once, and tiles in the place of the codes."""

import math
import threading
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast, final

import torch
from torch import Tensor

from graphq.runtime import kernels
from graphq.runtime.kernels import Choice, Product, Rows
from graphq.runtime.modules import PackedWeight, dequantized, scales_of
from graphq.runtime.tiled import Snapshot, TiledModule

_PREPARING: Final = threading.Lock()


@final
@dataclass(frozen=True)
class Ready:
    """What a module computes with: a product or rows for torch. ``of``: the buffers that it is made of."""

    of: Snapshot
    choice: Choice
    product: Product | Rows
    has_input_zero: bool


class PackedProduct(TiledModule, PackedWeight):
    """A weight in packed codes that is multiplied with inputs, or where ``takes_codes`` with their int8 codes.

    ``weight``: as ``PackedWeight`` has it, until the first product rearranges it into tiles in its place; what
    ``state_dict``, copies and ``packed`` give is always the former. ``experts``: how many weights it holds, of which
    each has rows of its own; None: it is one. ``input_axis``: of the float weight.
    """

    input_axis: int
    experts: int | None = None

    def __init__(
        self,
        format: str,
        block: Sequence[int],
        shape: Sequence[int],
        row_axes: Sequence[int],
        dtype: torch.dtype,
        takes_codes: bool = False,
    ) -> None:
        super().__init__(format, block, shape, row_axes, dtype)
        self.graphq_form.settings["takes_codes"] = takes_codes
        self._graphq_ready: Ready | None = None

    @property
    def takes_codes(self) -> bool:
        """Whether its inputs are int8 codes."""
        return bool(self.graphq_form.settings["takes_codes"])

    @property
    def choice(self) -> Choice:
        """The kernel that computes it, and why it is not a better one."""
        if self._graphq_ready is not None:
            return self._graphq_ready.choice
        form = self.graphq_form
        size, columns = form.block[self.input_axis], form.shape[self.input_axis]
        return kernels.choose(
            "int8" if self.takes_codes else str(form.dtype).removeprefix("torch."),
            self.weight.device,
            size=math.prod(form.shape),
            group=columns if size < 0 else min(size, columns),
            is_integer=kernels.is_integer(form.format),
            is_supported=kernels.is_supported(scales_of(self), form.format),
        )

    @property
    def held_bias(self) -> Tensor | None:
        """The bias, as it is held."""
        return None

    @abstractmethod
    def rows(self, codes: Tensor) -> Rows:
        """The rows of the weight with these codes, packed."""

    def differentiated(self) -> Tensor:
        """The weight in its dtype, for products that torch differentiates or transforms: a constant of these."""
        with cast(Any, torch)._C._DisableFuncTorch():
            return dequantized(self)

    def product(self, has_input_zero: bool) -> Product | None:
        product = self.ready(has_input_zero).product
        return product if isinstance(product, Product) else None

    def ready(self, has_input_zero: bool) -> Ready:
        """What it computes with now."""
        ready = self._graphq_ready
        if ready is None or not ready.of.is_current() or ready.has_input_zero < has_input_zero:
            ready = self._prepare(has_input_zero)
        return ready

    def _prepare(self, has_input_zero: bool) -> Ready:
        with _PREPARING, torch.inference_mode(False), torch.no_grad():
            if self._graphq_ready is not None and not self._graphq_ready.of.is_current():
                self.release()  # tiles hold the scales that were
            choice, each = self.choice, self.experts or 1
            rows = self.rows(self.packed() if has_input_zero else self.weight)
            product: Product | Rows = rows
            if choice.kernel.level is not None:
                if not self.is_tiled:
                    self.weight = kernels.tile(rows, each)
                sums = kernels.group_sums(rows, each) if has_input_zero else None
                held = replace(rows, codes=self.weight)
                product = Product(choice.kernel, self.weight, held, self.held_bias, sums, self.experts)
            self._graphq_ready = ready = Ready(Snapshot(self), choice, product, has_input_zero)
            return ready

    def packed(self) -> Tensor:
        return kernels.untile(self.weight, self.rows(self.weight), self.experts or 1) if self.is_tiled else self.weight
