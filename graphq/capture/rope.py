"""Rotary frequencies that transformers computes anew for longer texts, held at those of the length that was trained.

``rope_type: dynamic`` asks in Python how long the text is, and keeps what it finds for later calls: no graph does. Up
to ``original_max_position_embeddings``, or else ``max_position_embeddings``, frequencies are what they were.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn


def growing_frequencies(model: nn.Module) -> int | None:
    """The most tokens for which all rotary embeddings have the frequencies that they begin with; None for any."""
    limits = [int(module.original_max_seq_len) for module in _growing(model)]
    return min(limits, default=None)


@contextmanager
def frequencies_held(model: nn.Module) -> Generator[None]:
    """Inside, rotary embeddings leave their frequencies as they are."""
    found = [(module, module.rope_type) for module in _growing(model)]
    for module, _ in found:
        module.rope_type = "default"
    try:
        yield
    finally:
        for module, own in found:
            module.rope_type = own


def _growing(model: nn.Module) -> list[Any]:
    found: list[Any] = list(model.modules())
    return [
        module
        for module in found
        if isinstance(getattr(module, "rope_type", None), str)
        and "dynamic" in module.rope_type
        and isinstance(getattr(module, "original_max_seq_len", None), int)
    ]
