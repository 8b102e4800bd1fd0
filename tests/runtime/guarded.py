"""Ops called with arguments that do not fit, their tensors between pages that cannot be read or written.

Run as ``python -m tests.runtime.guarded MUTATIONS SEED [OP]``: an op that reads or writes beyond its tensors ends the
process by a signal, after its name on the standard error. Each call is one that capture made, with one to three changes,
or with another length of an axis for each of several tensors. ``OP`` is the name of the one op to try, such as ``stft``.
"""

import ctypes
import math
import mmap
import random
import resource
import sys
from typing import Any

import torch
from torch import Tensor, fx

from graphq.runtime.graph_json import allowed
from tests.runtime.functions import EXPRESSIONS
from tests.runtime.test_allowed_ops import INPUTS, captured_functions

PAGE = mmap.PAGESIZE
INTS = (-1, 0, 1, 2, 3, -2, -3, 5, 7, 8, 16, -8, 64, -100, 1000, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63))
FLOATS = (0.0, -1.0, 1.0, 0.5, 2.0, 1e-300, 1e30, 1e300, math.inf, -math.inf, math.nan)
DTYPES = (torch.float32, torch.int64, torch.int32, torch.bool, torch.float64, torch.int8, torch.bfloat16)
libc = ctypes.CDLL(None)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Calls(fx.Interpreter):
    """The calls of ops that running a graph makes, with their arguments."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.made: list[tuple[str, Any, list[Any], dict[str, Any]]] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        from graphq.runtime.checked_ops import SUBSTITUTES

        # What makes tensors of nothing has no bounds to leave, and the integers here make large ones.
        makes = not any(
            isinstance(a, Tensor) or (isinstance(a, list) and a and isinstance(a[0], Tensor)) for a in args
        ) or str(target).startswith("aten.new_")
        if allowed(target) and str(target).startswith("aten.") and not makes and "softmax" not in str(target):
            op = SUBSTITUTES.get(str(target), target)
            self.made.append((str(target).split(".")[1], op, list(args), dict(kwargs)))
        return super().call_function(target, args, kwargs)


def guarded(x: Tensor, at_end: bool, pages: list[tuple[Any, int, int]]) -> Tensor:
    """The tensor at the end, or the start, of memory between two pages without access."""
    data = x.contiguous().flatten().view(torch.uint8)
    if not data.numel():
        return x
    count = -(-data.numel() // PAGE)
    memory = mmap.mmap(-1, (count + 2) * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    offset = PAGE + (count * PAGE - data.numel() if at_end else 0)
    held = torch.frombuffer(memory, dtype=torch.uint8, count=data.numel(), offset=offset).copy_(data)
    for page in (base, base + (count + 1) * PAGE):
        libc.mprotect(page, PAGE, 0)
    pages.append((memory, base, (count + 2) * PAGE))
    return held.view(x.dtype).view(x.shape)


def placed(value: Any, draw: random.Random, pages: list[tuple[Any, int, int]]) -> Any:
    """The argument with its tensors guarded."""
    if isinstance(value, Tensor):
        return guarded(value, draw.random() < 0.5, pages)
    return type(value)(placed(v, draw, pages) for v in value) if isinstance(value, list | tuple) else value


def changed(value: Any, draw: random.Random) -> Any:
    """The argument with one change."""
    match value:
        case Tensor():
            return changed_tensor(value, draw)
        case bool():
            return not value
        case int():
            return draw.choice(INTS)
        case float():
            return draw.choice(FLOATS)
        case list() | tuple() if value:
            items: list[Any] = list(value)
            if draw.random() < 0.25:
                return items[:-1]
            place = draw.randrange(len(items))
            items[place] = changed(items[place], draw)
            return items
        case _:
            return value


def changed_tensor(x: Tensor, draw: random.Random) -> Tensor:
    """A tensor of another shape, dtype or of other elements."""
    shape = list(x.shape)
    match draw.randrange(5):
        case 0 if shape:
            shape[draw.randrange(len(shape))] = draw.choice((0, 1, 2, 3, 5, 9))
        case 1:
            shape.insert(draw.randrange(len(shape) + 1), draw.choice((1, 2, 3)))
        case 2 if shape:
            shape.pop(draw.randrange(len(shape)))
        case 3:
            return x.to(draw.choice(DTYPES))
        case _ if x.numel() and not x.is_complex() and x.dtype != torch.bool:
            filled = x.clone().flatten()
            drawn = torch.tensor(draw.choice(FLOATS if x.is_floating_point() else INTS))
            filled[draw.randrange(filled.numel())] = drawn.to(x.dtype)
            return filled.view(x.shape)
        case _:
            pass
    return torch.randint(0, 5, shape).to(x.dtype)


def unlike(args: list[Any], draw: random.Random) -> list[Any]:
    """The arguments, where they have several tensors each of these with another length of one of its axes, which often
    is the same axis of them all.
    """
    axis, lengths = draw.choice((-1, -2, -3)), draw.sample((1, 2, 3, 5, 60, 600), 6)

    def resized(value: Any) -> Any:
        if isinstance(value, list):
            return [resized(v) for v in value]
        if not isinstance(value, Tensor) or not value.dim() or draw.random() < 0.25:
            return value
        shape = list(value.shape)
        shape[max(axis, -len(shape))] = lengths.pop() if lengths else 4
        return torch.randint(0, 5, shape).to(value.dtype)

    tensors = [v for a in args for v in (a if isinstance(a, list) else [a]) if isinstance(v, Tensor)]
    return [resized(a) for a in args] if len(tensors) > 1 else args


def main(mutations: int, seed: int, only: str | None = None) -> None:
    """Prints how many calls an op took."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # a size of 2^31 is an error, not a killed process
    taken = 0
    for group in EXPRESSIONS:
        calls = Calls(captured_functions(group))
        calls.run(*INPUTS)
        for number, (name, op, args, kwargs) in enumerate(calls.made):
            if only not in (None, name):
                continue
            draw = random.Random(f"{seed} {op} {number}")
            for _ in range(mutations):
                given = list(args)
                for _ in range(draw.choice((1, 1, 2, 3)) if given else 0):
                    place = draw.randrange(len(given))
                    given[place] = changed(given[place], draw)
                if draw.random() < 0.25:
                    given = unlike(args, draw)
                pages: list[tuple[Any, int, int]] = []
                print(op, number, file=sys.stderr, flush=True)
                try:
                    op(*placed(given, draw, pages), **kwargs)
                    taken += 1
                except Exception:  # noqa: BLE001
                    pass  # whatever an op says of its arguments: that it says something is the point
                for _, base, size in pages:
                    libc.mprotect(base, size, 3)
    print(taken)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:4])
