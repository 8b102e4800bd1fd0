"""The layers of a key/value cache as a graph's outputs, by their names."""

from collections.abc import Mapping
from typing import Final

from torch import Tensor

Layer = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Mapping[str, Tensor]]
BESIDE: Final = tuple(f"{part}_{of}" for part in ("key", "value") for of in ("scale", "zero_point"))
"""What a layer of a cache of codes may hold beside its keys and values."""


def pairs_of(outputs: Mapping[str, Tensor]) -> list[Layer]:
    """``present.{i}.key`` and ``present.{i}.value`` of each layer, and what it holds beside them by name."""
    pairs: list[Layer] = []
    while (name := f"present.{len(pairs)}") + ".key" in outputs:
        pair = (outputs[f"{name}.key"], outputs[f"{name}.value"])
        beside = {part: outputs[found] for part in BESIDE if (found := f"{name}.{part}") in outputs}
        pairs.append((*pair, beside) if beside else pair)
    return pairs
