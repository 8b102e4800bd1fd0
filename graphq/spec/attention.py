"""How what attention reads is quantized: queries, keys, values, and the weights that a softmax gives the values."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from graphq.errors import SpecError
from graphq.spec.cache import check_cache_quant
from graphq.spec.quant import PerChannel, PerGroup, Quant


@final
@dataclass(frozen=True)
class AttentionOperands:
    """The quants of the operands, None for those that stay float; at least one is given.

    Granularities are those of caches: a token is a query's row. ``p``, the softmax's, has no channels.
    """

    q: Quant | None = None
    k: Quant | None = None
    v: Quant | None = None
    p: Quant | None = None

    def __post_init__(self) -> None:
        if not list(self.given()):
            raise SpecError("none is quantized; write q, k, v or p")
        for name, quant in self.given():
            try:
                check_cache_quant(quant)
            except SpecError as error:
                raise SpecError(f"{name}: {error}") from error
        if self.p is not None and isinstance(self.p.granularity, PerChannel | PerGroup):
            raise SpecError(f"p: {self.p}: its columns are tokens, no channels; write tensor, head or token")

    def given(self) -> Iterator[tuple[str, Quant]]:
        """Those that are quantized, by name."""
        for name in ("q", "k", "v", "p"):
            quant = getattr(self, name)
            if quant is not None:
                yield name, quant

    def __str__(self) -> str:
        return ", ".join(f"{name} {quant}" for name, quant in self.given())
