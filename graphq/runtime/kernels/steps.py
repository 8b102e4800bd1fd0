"""Straight-line programs of the library of kernels: steps on rows of activations, in one call (native/steps.h)."""

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from math import prod
from typing import Any, Final, final

import torch
from torch import Tensor

from graphq.runtime.kernels import native
from graphq.runtime.kernels.choice import features
from graphq.runtime.kernels.quantize import RULES
from graphq.runtime.kernels.tiles import Product

BINARY: Final = {"add": 0, "sub": 1, "mul": 2}
UNARY: Final = {
    "copy": 3, "square": 4, "rsqrt": 5, "neg": 6, "relu": 7, "sigmoid": 8, "silu": 9, "gelu_tanh": 10,
}  # fmt: skip
_MEAN, _ROLL, _QUANTIZE, _PACKED, _PLAIN, _GROUPED = 11, 12, 13, 14, 15, 16
TYPES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.int32: 3, torch.int64: 4}
_NONE: Final = -1
_ALIGNED: Final = 64


class Step(ctypes.Structure):
    """``Step`` of native/steps.h."""

    _fields_ = (
        *((name, c_int32) for name in ("op", "a_type", "b_type", "c_type", "d_type", "out_type")),
        *((name, c_int32) for name in ("rule", "product", "level", "unused")),
        *((name, c_int64) for name in ("a", "b", "c", "d", "out", "out2", "out3")),
        *((name, c_int64) for name in ("n0", "n1", "n2", "modulus", "t0", "t1", "t2")),
        ("number", c_double),
        ("weight", c_void_p),
    )


_PLACES: Final = ("a", "b", "c", "d", "out", "out2", "out3")


@final
@dataclass(frozen=True)
class Spread:
    """How the second operand of a step is read: at ``(i % modulus) * t0 + j * t1 + k * t2`` for element ``[i, j, k]``
    of ``[n0, n1, n2]``.
    """

    n0: int
    n1: int
    n2: int
    modulus: int = 1
    t0: int = 0
    t1: int = 0
    t2: int = 1


@final
@dataclass(frozen=True)
class Buffer:
    """A tensor of a program: ``shape`` and ``dtype`` of contiguous memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@final
class Assembler:
    """Collects the steps of a program; buffers are numbered in the order in which they come up."""

    def __init__(self) -> None:
        known = features()
        self.level = next((i for i in (2, 1) if native.LEVELS[i] in known), 0)
        self.best = native.LEVELS.index("avx512_bf16") if "avx512_bf16" in known else self.level
        self.buffers: list[Buffer] = []
        self.steps: list[Step] = []
        self.held: list[object] = []  # what the steps point to

    def buffer(self, held: Buffer) -> int:
        """Its number."""
        self.buffers.append(held)
        return len(self.buffers) - 1

    def _made(self, op: int, out: int, **fields: Any) -> int:
        given = dict.fromkeys(("b", "c", "d", "out2", "out3"), _NONE) | {"n1": 1, "modulus": 1, "level": self.level}
        for operand in ("a", "b", "c", "d"):
            if fields.get(operand, _NONE) >= 0:
                given[f"{operand}_type"] = TYPES[self.buffers[fields[operand]].dtype]
        given["out_type"] = TYPES[self.buffers[out].dtype]
        self.steps.append(Step(op=op, out=out, **(given | fields)))
        return out

    def binary(self, name: str, a: int, b: int | float, how: Spread, out: Buffer) -> int:
        """``a`` and what ``how`` reads of the buffer ``b``, or the number ``b``."""
        other = {"b": b} if isinstance(b, int) else {"number": b}
        return self._made(BINARY[name], self.buffer(out), a=a, **other, **vars(how))

    def unary(self, name: str, a: int, out: Buffer) -> int:
        """Each number of ``a``."""
        return self._made(UNARY[name], self.buffer(out), a=a, n0=1, n2=prod(out.shape))

    def mean(self, a: int, width: int, out: Buffer) -> int:
        """The mean of each row of so many numbers."""
        return self._made(_MEAN, self.buffer(out), a=a, n0=prod(out.shape), n2=width)

    def roll(self, a: int, by: int, out: Buffer) -> int:
        """Each row, turned to the right."""
        width = out.shape[-1]
        return self._made(_ROLL, self.buffer(out), a=a, n0=prod(out.shape[:-1]), n2=width, modulus=by % width)

    def quantize(self, a: int, shape: Sequence[int], format: str, is_whole: bool) -> tuple[int, int, int]:
        """Codes, scales and zero points of ``a``, one for each row or one for all."""
        *lead, width = shape
        rows = (*([1] * len(lead) if is_whole else lead), 1)
        codes, scale, zero = (
            self.buffer(Buffer(*held))
            for held in ((tuple(shape), torch.int8), (rows, torch.float32), (rows, torch.int8))
        )
        n0, n2 = (1, prod(shape)) if is_whole else (prod(lead), width)
        level = min(self.level, 1)
        self._made(_QUANTIZE, codes, a=a, out2=scale, out3=zero, n0=n0, n2=n2, rule=RULES[format], level=level)
        return codes, scale, zero

    def packed(self, product: Product, a: int, scale: int, zero: int, out: Buffer, offsets: int = _NONE) -> int:
        """A linear by a weight in tiles. ``scale``, ``zero``: of int8 codes, else -1; ``offsets``: of experts."""
        code, level = product.codes
        self.held.append(product)
        operands = {"a": a, "b": scale, "c": zero, "weight": ctypes.addressof(product.weight)}
        op, experts = (_PACKED, 1) if product.experts is None else (_GROUPED, product.experts)
        sizes = {"d": offsets, "n0": prod(out.shape[:-1]), "n1": experts}
        return self._made(op, self.buffer(out), **operands, **sizes, product=code, level=level)

    def plain(self, a: int, w: int, bias: int, out: Buffer) -> int:
        """A linear by a weight as it is, with a bias or -1."""
        n, k = self.buffers[w].shape
        sizes = {"n0": prod(out.shape[:-1]), "n1": n, "n2": k}
        return self._made(_PLAIN, self.buffer(out), a=a, b=w, c=bias, **sizes, level=self.best)

    def assembled(self, inputs: Sequence[int], outputs: Sequence[int]) -> "Program":
        """The program whose caller gives the memory of these buffers; the others share what they need."""
        external = {number: place for place, number in enumerate([*inputs, *outputs])}
        offsets, size = self._placed(external)

        def place(number: int) -> int:
            return number if number < 0 else external[number] if number in external else -2 - offsets[number]

        for step in self.steps:
            for name in _PLACES:
                setattr(step, name, place(getattr(step, name)))
        return Program((Step * len(self.steps))(*self.steps), len(external), size, self.held)

    def _placed(self, external: dict[int, int]) -> tuple[dict[int, int], int]:
        """Where each buffer lies in the scratch memory: those whose uses overlap do not."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        for time, step in enumerate(self.steps):
            for number in (getattr(step, name) for name in _PLACES):
                first.setdefault(number, time)
                last[number] = time
        placed: list[tuple[int, int, int]] = []  # buffers: first byte, end, number
        size = 0
        for number in sorted((n for n in first if n >= 0 and n not in external), key=lambda n: first[n]):
            nbytes = -(-self.buffers[number].nbytes // _ALIGNED) * _ALIGNED
            start = 0
            for begin, end, other in sorted(placed):
                if last[other] >= first[number] and begin < start + nbytes and end > start:
                    start = end
            placed.append((start, start + nbytes, number))
            size = max(size, start + nbytes)
        return {number: start for start, _, number in placed}, size


@final
class Program:
    """Steps, ready to run."""

    def __init__(self, steps: Any, count: int, scratch: int, held: Sequence[object]) -> None:
        self._steps, self._count, self._scratch = steps, len(steps), scratch
        self._held = held
        self._array = c_void_p * count
        self._function = native.library().graphq_steps

    def run(self, buffers: Sequence[Tensor]) -> bool:
        """Whether all steps were computed: no row that is quantized holds what is not finite. ``buffers``: inputs, then
        outputs, contiguous on the CPU. Raises ``MemoryError``.
        """
        places = self._array(*[x.data_ptr() for x in buffers])
        failed = self._function(self._steps, self._count, places, self._scratch, torch.get_num_threads())
        if failed == 1:
            raise MemoryError(f"{self._count} steps: {native.OUT_OF_MEMORY}")
        return not failed
