"""How long a linear with a packed weight takes, beside torch's own.

Usage: python benchmarks/linear.py [--sizes 4096x4096,11008x4096] [--rows 1,16,128] [--formats w4a16,w8a8] [--threads 1]
                                   [--rounds 15]

Prints the processor's instruction sets, the threads and the bandwidth with which the same process reads memory; then,
for each size (outputs x inputs) and number of input rows, the time of ``F.linear`` in float32 and bfloat16, of torch's
own products with 4- and 8-bit weights (where they take the shape), and of graphq's linear in each format: microseconds
and how many times as fast as bfloat16. Every row is the median of rounds in which all columns take turns. With up to 4
rows weights come from memory: each column cycles through more copies than four times the last cache holds. Quantizing
the activations is part of the time. One thread is measured in processor time, which another process does not lengthen.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from graphq import numerics
from graphq.runtime import kernels, ops
from graphq.runtime.kernels import native
from graphq.runtime.linear import PackedLinear, kernel_of
from graphq.runtime.modules import Int8Linear, hold_linear, hold_weight
from graphq.spec.formats import parse_format

# name: weight, elements of a scale along K, input codes, dtype that is computed in
FORMATS: Final[dict[str, tuple[str, int, str | None, torch.dtype]]] = {
    "w4a16": ("int4", 128, None, torch.bfloat16),
    "w4a16 g32": ("int4", 32, None, torch.bfloat16),
    "w4a16 asym": ("int4/asym", 128, None, torch.bfloat16),
    "w4a32": ("int4", 128, None, torch.float32),
    "w8a16": ("int8", -1, None, torch.bfloat16),
    "w8a32": ("int8", -1, None, torch.float32),
    "w8a8": ("int8", -1, "int8", torch.bfloat16),
    "w8a8 g128": ("int8", 128, "int8", torch.bfloat16),
    "w4a8": ("int4", 128, "int8", torch.bfloat16),
    "w2a8": ("int2", 128, "int8", torch.bfloat16),
    "w2a16": ("int2", 64, None, torch.bfloat16),
    "w3a16": ("int3", 64, None, torch.bfloat16),
    "w5a16": ("int5", 64, None, torch.bfloat16),
    "w6a16": ("int6", 64, None, torch.bfloat16),
    "float8": ("float8_e4m3fn", -1, None, torch.bfloat16),
    "hifloat8": ("hifloat8", -1, None, torch.bfloat16),
    "float6": ("float6_e2m3", 32, None, torch.bfloat16),
    "mxfp8": ("mxfp8_e4m3", 32, None, torch.bfloat16),
    "mxfp4": ("mxfp4", 32, None, torch.bfloat16),
    "nvfp4": ("nvfp4", 16, None, torch.bfloat16),
    "int4/over_int8": ("int4/over_int8", 128, "int8", torch.bfloat16),
}
COLD_ROWS: Final = 4
Call = Callable[[int], object]  # of the copy with this number


def last_cache() -> int:
    """Bytes of the processor's last cache; 32 MB where the system does not say."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(p.read_text().strip().removesuffix("K")) << 10 for p in sizes), default=32 << 20)


def bandwidth() -> float:
    """GB/s with which all threads together read memory."""
    block = torch.zeros(max(256 << 20, 4 * last_cache()) // 8, dtype=torch.int64)
    best = min(_seconds(block.sum) for _ in range(5))
    return block.numel() * 8 / best / 1e9


def _seconds(call: Callable[[], object]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def copies_of(tensor: Tensor, rows: int) -> list[Tensor]:
    """The tensor, and where weights are to come from memory as many copies as drive each other from the caches."""
    nbytes = tensor.numel() * tensor.itemsize
    count = 1 if rows > COLD_ROWS else max(2, 4 * last_cache() // max(nbytes, 1) + 1)
    return [tensor, *(tensor.clone() for _ in range(count - 1))]


def floats(n: int, k: int, x: Tensor) -> Call:
    """Torch's linear in the dtype of ``x``."""
    weights = copies_of(torch.randn(n, k).to(x.dtype), x.shape[0])
    return lambda i: F.linear(x, weights[i % len(weights)])


def torch_int4(n: int, k: int, x: Tensor) -> Call:
    """Torch's own product with 4-bit weights in groups of 128."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(torch.randint(0, 16, (n, k), dtype=torch.int32), 1)
    scales = torch.rand(k // 128, n, 2).bfloat16()
    weights = copies_of(packed, x.shape[0])
    return lambda i: torch.ops.aten._weight_int4pack_mm_for_cpu(x, weights[i % len(weights)], 128, scales)


def torch_int8(n: int, k: int, x: Tensor) -> Call:
    """Torch's own product with 8-bit weights by channel."""
    weights = copies_of(torch.randint(-127, 128, (n, k), dtype=torch.int8), x.shape[0])
    scales = torch.rand(n).bfloat16()
    return lambda i: torch.ops.aten._weight_int8pack_mm(x, weights[i % len(weights)], scales)


def graphq_linear(name: str, n: int, k: int, rows: int) -> tuple[Call, str, int]:
    """Graphq's linear, its kernel, and the bytes of its weight."""
    weight, group, input, dtype = FORMATS[name]
    format, block = parse_format(weight), [1, group]
    w = torch.randn(n, k)
    scales = numerics.choose_scale(w, format, block)
    codes = numerics.quantize(w, scales, format, block)
    x = torch.randn(rows, k).to(dtype)
    if weight == "int8" and group == -1 and input is not None:
        count = len(copies_of(torch.empty(n, k, dtype=torch.int8), rows))
        form = ((n, k), True, True, False, dtype)
        integer = [hold_linear(Int8Linear(*form), codes.clone(), scales.scale, None, None) for _ in range(count)]
        for module in integer:
            module(*_codes(x, input))
        return lambda i: integer[i % count](*_codes(x, input)), kernel_of(integer[0]), codes.numel() + 4 * n
    first = hold_weight(PackedLinear(weight, block, (n, k), (0,), dtype, False, None, input is not None), codes, scales)
    arguments = _codes(x, input) if input else (x,)
    first(*arguments)
    modules = [first]
    for _ in copies_of(first.weight, rows)[1:]:
        other = PackedLinear(weight, block, (n, k), (0,), dtype, False, None, input is not None)
        modules.append(hold_weight(other, codes, scales))
        other(*arguments)
    if input is None:
        return lambda i: modules[i % len(modules)](x), first.choice.kernel.name, first.weight.numel()
    return lambda i: modules[i % len(modules)](*_codes(x, input)), first.choice.kernel.name, first.weight.numel()


def _codes(x: Tensor, format: str) -> tuple[Tensor, Tensor, None]:
    codes, scale, _ = ops.quantize_dynamic(x, format, [1, -1])
    return codes, scale, None


def measured(calls: dict[str, Call], rounds: int) -> dict[str, float]:
    """The median microseconds of each; they take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            times[name].append(_seconds(functools.partial(call, i)) * 1e6)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def row(n: int, k: int, rows: int, names: list[str], rounds: int, read: float) -> None:
    """Measures and prints one size with one number of rows."""
    half = torch.randn(rows, k).bfloat16()
    calls: dict[str, Call] = {"float32": floats(n, k, half.float()), "bfloat16": floats(n, k, half)}
    if k % 128 == 0 and n % 16 == 0:
        calls |= {"torch int4pack": torch_int4(n, k, half), "torch int8pack": torch_int8(n, k, half)}
    notes: dict[str, tuple[str, int]] = {}
    for name in names:
        calls[name], kernel, nbytes = graphq_linear(name, n, k, rows)
        notes[name] = (kernel, nbytes)
    found = measured(calls, rounds)
    print(f"\n{n} x {k}, {rows} rows" + (", weights from memory" if rows <= COLD_ROWS else ""))
    for name, taken in found.items():
        line = f"  {name:16}{taken:10.0f} us{found['bfloat16'] / taken:8.2f} x bfloat16"
        if name in notes:
            kernel, nbytes = notes[name]
            of_read = f"{nbytes / taken / 1e3 / read:6.0%} of the bandwidth" if rows <= COLD_ROWS else ""
            line += f"  {kernel}{of_read}"
        print(line, flush=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="1024x1024,4096x4096,11008x4096")
    parser.add_argument("--rows", default="1,4,16,32,128,512")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    args: Any = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    read = bandwidth()
    known = ", ".join(sorted(native.levels())) or native.NOT_BUILT
    print(f"{known}; used: {', '.join(sorted(kernels.features())) or 'none'}")
    print(
        f"{args.threads} threads, reads {read:.1f} GB/s, last cache {last_cache() >> 20} MB, torch {torch.__version__}"
    )
    for size in args.sizes.split(","):
        n, k = map(int, size.split("x"))
        for rows in map(int, args.rows.split(",")):
            row(n, k, rows, args.formats.split(","), args.rounds, read)


if __name__ == "__main__":
    main()
