"""Attention of a token over a cache: torch's and graphq's, in turn, in one process; medians of the process's CPU time.

python benchmarks/attention.py [--rounds 20] [--threads 1] [--tokens 1]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from graphq.runtime import kernels

SHAPES: Final = ((4, 2, 16), (14, 2, 64), (16, 8, 64), (32, 8, 128))  # heads, those of keys and values, width


def main() -> None:
    """Prints a row for each dtype, shape and length."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rounds", 20), ("threads", 1), ("tokens", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{options.threads} thread(s), {', '.join(sorted(kernels.features()))}; {options.tokens} token(s)")
    print(f"{'dtype':10} {'heads':>8} {'width':>6} {'cached':>7} {'torch us':>9} {'graphq us':>10} {'ratio':>6}")
    for dtype in (torch.float32, torch.bfloat16):
        for heads, kv_heads, width in SHAPES:
            for cached in (32, 512, 2048):
                q = torch.randn(1, heads, options.tokens, width).to(dtype)
                k, v = (torch.randn(1, kv_heads, cached, width).to(dtype) for _ in range(2))
                mask = torch.ones(1, 1, options.tokens, cached, dtype=torch.bool)
                calls = [F.scaled_dot_product_attention, kernels.scaled_dot_product_attention]
                found = measured(calls, q, k, v, mask, options.rounds)
                theirs, ours = (statistics.median(one) for one in found)
                ratio = statistics.median(a / b for a, b in zip(*found, strict=True))
                row = f"{str(dtype)[6:]:10} {heads:>4}/{kv_heads:<3} {width:>6} {cached:>7}"
                print(f"{row} {theirs:9.0f} {ours:10.0f} {ratio:6.2f}", flush=True)


def measured(
    calls: list[Callable[..., Tensor]], q: Tensor, k: Tensor, v: Tensor, mask: Tensor, rounds: int
) -> list[list[float]]:
    """Microseconds of each call, which take turns."""
    times: list[list[float]] = [[] for _ in calls]
    with torch.inference_mode():
        for number in range(rounds + 3):
            for call, own in zip(calls, times, strict=True):
                start = time.process_time_ns()
                call(q, k, v, mask, enable_gqa=True)
                if number >= 3:  # the first ones are slower
                    own.append((time.process_time_ns() - start) / 1e3)
    return times


if __name__ == "__main__":
    main()
