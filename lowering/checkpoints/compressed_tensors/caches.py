"""The scales of caches as compressed-tensors has them: ``k_scale`` and ``v_scale`` of each attention.

Source: compressed-tensors 0.20, ``lifecycle/initialize.py``: ``[1]`` of a tensor, ``[heads, 1, 1]`` of heads.
"""

from collections.abc import Iterable, Iterator
from typing import Final

import torch
from torch import Tensor

from graphq.capture.source import Source
from graphq.lowering.checkpoints.caches import CacheScales
from graphq.lowering.checkpoints.compressed_tensors.settings import Consumer, cache_problem, latent_problem
from graphq.numerics import rounded_scales
from graphq.spec.quant import PerTensor

_SUFFIXES: Final = {"key": "k_scale", "value": "v_scale"}
_ROLES: Final = {suffix: role for role, suffix in _SUFFIXES.items()}


def encode_cache(one: CacheScales, dtype: torch.dtype) -> tuple[str, Tensor]:
    """The tensor of a cache in the checkpoint, under its name."""
    return f"{one.attention}.{_SUFFIXES[one.role]}", held_cache(one)[1].to(dtype)


def held_cache(one: CacheScales) -> tuple[str, Tensor]:
    """The same as ``decode_cache`` gives it, of the QDQ form's numbers."""
    assert one.scales is not None, "no problem"
    scale = one.scales.scale
    held = scale if isinstance(one.quant.granularity, PerTensor) else scale.reshape(-1, 1, 1)
    return f"{one.attention}.{one.role}_scale", held


def is_of_cache(name: str) -> bool:
    """Whether a tensor of this name is the scales of a cache."""
    return name.rpartition(".")[2] in _ROLES


def decode_cache(name: str, tensor: Tensor) -> tuple[str, Tensor] | None:
    """The scales of a cache under the QDQ form's name; None for a tensor of another kind."""
    path, _, suffix = name.rpartition(".")
    return (f"{path}.{_ROLES[suffix]}_scale", tensor.to(torch.float32)) if suffix in _ROLES else None


def cache_problems(caches: Iterable[CacheScales], source: Source, consumer: Consumer, target: str) -> Iterator[str]:
    """A line for each cache that the format, or what is to load it, cannot hold."""
    for one in caches:
        reason = cache_problem(one.quant, consumer) or latent_problem(source)
        if reason is None and one.scales is not None:
            rounded = rounded_scales(one.scales, one.quant.format, source.dtype)
            if not torch.equal(rounded.scale, one.scales.scale):
                short = str(source.dtype).removeprefix("torch.")
                reason = f"its scales are no numbers of {short}, which stores them; compile with target={target!r}"
        if reason is not None:
            yield f"{one.attention}.{one.role}: {one.quant}: {reason}"
