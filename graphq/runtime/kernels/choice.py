"""The table of kernels: of the rows that can compute a layer on this machine, the first.

``GRAPHQ_KERNELS`` (an environment variable, read once) and ``using`` take rows away: ``torch`` leaves torch's own,
``portable``, ``avx2`` and ``avx512`` the rows up to that instruction set.
"""

import os
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, final

import torch
from torch import Tensor

from graphq.errors import GraphqError
from graphq.runtime.kernels import native

Limit = Literal["torch", "portable", "avx2", "avx512", "all"]
LIMITS: Final[dict[str, tuple[str, ...]]] = {
    "torch": (),
    "portable": ("portable",),
    "avx2": ("portable", "avx2"),
    "avx512": ("portable", "avx2", "avx512"),
    "all": native.LEVELS,
}
VARIABLE: Final = "GRAPHQ_KERNELS"
_SHORTEST: Final = 8  # tiles hold groups of as many codes at least
_LONGEST: Final = 1 << 15  # codes of a group whose products int32 sums hold: 255 * 255 * 2^15 < 2^31


@final
@dataclass(frozen=True)
class Kernel:
    """How a linear is computed: what is multiplied, and by which instructions of the library (None: by torch)."""

    name: str
    product: Literal["float32", "bfloat16", "int8"]
    level: str | None
    inputs: tuple[str, ...]


_FLOATS: Final = ("float32", "bfloat16", "float16")
KERNELS: Final = (  # the best first
    Kernel("int8 tiles (AVX-512 VNNI)", "int8", "avx512_vnni", ("int8",)),
    Kernel("int8 tiles (AVX2)", "int8", "avx2", ("int8",)),
    Kernel("int8 tiles (portable)", "int8", "portable", ("int8",)),
    Kernel("bfloat16 tiles (AVX-512 BF16)", "bfloat16", "avx512_bf16", ("bfloat16",)),
    Kernel("float32 tiles (AVX-512)", "float32", "avx512", _FLOATS),
    Kernel("float32 tiles (AVX2)", "float32", "avx2", _FLOATS),
    Kernel("float32 tiles (portable)", "float32", "portable", _FLOATS),
)
TORCH: Final = Kernel("rows expanded by torch", "float32", None, (*_FLOATS, "int8", "float64"))


@final
@dataclass(frozen=True)
class Choice:
    """A layer's kernel, and why it is not a better one ("": nothing stands above it)."""

    kernel: Kernel
    why: str

    def __str__(self) -> str:
        return f"{self.kernel.name}: {self.why}" if self.why else self.kernel.name


_limit: ContextVar[str | None] = ContextVar("graphq_kernels", default=None)


@cache
def _from_environment() -> str:
    given = os.environ.get(VARIABLE) or "all"
    if given not in LIMITS:
        raise GraphqError(f"{VARIABLE}: {given} is not one of {', '.join(LIMITS)}")
    return given


@contextmanager
def using(limit: Limit) -> Generator[None]:
    """Within it, layers whose kernels are chosen get none beyond ``limit``. Layers keep what they have chosen."""
    token = _limit.set(limit)
    try:
        yield
    finally:
        _limit.reset(token)


def features() -> frozenset[str]:
    """The instruction sets that kernels may use here and now."""
    return _within(native.levels(), _limit.get() or _from_environment())


@cache
def _within(known: frozenset[str], limit: str) -> frozenset[str]:
    return known & frozenset(LIMITS[limit])


def choose(inputs: str, device: torch.device, *, size: int, group: int, is_integer: bool, is_supported: bool) -> Choice:
    """The kernel for a linear on packed weights. ``inputs``: the dtype of what is multiplied, ``int8`` for codes.

    ``size``: its codes; ``group``: those of a scale. ``is_supported``: whether its scales are in float32's range
    (``graphq.runtime.kernels.rows``).
    """
    if device.type != "cpu":
        return Choice(TORCH, f"no kernel for {device.type}")
    if native.library() is None:
        return Choice(TORCH, native.absence())
    limit = _limit.get() or _from_environment()
    if limit == "torch":
        return Choice(TORCH, "asked for")
    if inputs == "float64" or not is_supported:
        return Choice(TORCH, "float32 does not hold its numbers")
    if not size:
        return Choice(TORCH, "it has no codes")
    if group < _SHORTEST:
        return Choice(TORCH, f"tiles of groups of {group} would be mostly padding")
    if inputs == "int8" and (not is_integer or group > _LONGEST):
        return Choice(TORCH, f"int32 does not hold sums of {group} products" if is_integer else "its codes are floats")
    known = features()
    found = next(kernel for kernel in KERNELS if inputs in kernel.inputs and kernel.level in known)
    better = next(kernel for kernel in KERNELS if inputs in kernel.inputs)
    if found is better:
        return Choice(found, "")
    return Choice(found, f"no {better.level}" if limit == "all" else f"{limit} was asked for")


def integer_kernel(weight: Tensor) -> Kernel | None:
    """The kernel for int8 inputs and this int8 weight ``[N, K]`` by channel.

    None where oneDNN's is faster: with AMX, and without VNNI.
    """
    if not weight.is_cpu or not weight.numel() or weight.shape[1] > _LONGEST or "avx512_vnni" not in features():
        return None
    return None if torch.cpu._is_amx_tile_supported() else KERNELS[0]  # pyright: ignore[reportPrivateUsage]
