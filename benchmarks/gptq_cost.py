"""Where GPTQ's time and memory go, by the width of a layer.

Usage: python benchmarks/gptq_cost.py [--widths 256,512,...] [--tokens N] [--rounds N]      (1 to 3 minutes)

For square weights of K inputs and outputs, int4 in groups of 128: median seconds of summing the Hessian over the
calibration tokens, of factoring its inverse in float64, and of rounding the columns with their errors fed back; the
peak of extra memory of the last two in a fresh process, in MB (Linux); and how long three such layers that read one
input take stacked, as the pass does it, beside one by one. Exits 1 where stacking does not pay at the largest width.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from graphq.numerics import gptq
from graphq.observers.statistics import HessianObserver
from graphq.spec.quant import parse_quant

QUANT = parse_quant("int4/g128")


def median(work: Callable[[], object], rounds: int) -> float:
    """Median seconds of ``work``."""
    found: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def rows_of(w: Tensor, first: int) -> gptq.Rows:
    """How the rows of one weight are rounded: each element's scale is that of its group."""
    groups = w.unflatten(1, (-1, 128)).abs().amax(-1) / 7
    scale = groups.repeat_interleave(128, 1)[None]
    return gptq.Rows(first, first + w.shape[0], QUANT.format, scale, None)


def compensate(weights: list[Tensor], hessian: Tensor) -> None:
    """One run of GPTQ over the weights, stacked."""
    stacked = torch.cat(weights)[None]
    first, rows = 0, list[gptq.Rows]()
    for w in weights:
        rows.append(rows_of(w, first))
        first += w.shape[0]
    gptq.compensate(stacked, hessian, rows, dampening=0.01, act_order=False, block_size=128)


_PEAK = """
import sys, torch
sys.path.insert(0, {folder!r})
from gptq_cost import compensate
def kilobytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))
x, w = torch.randn(2 * {width}, {width}), torch.randn({width}, {width})
hessian = (x.T @ x)[None]
compensate([torch.randn(128, 128)], torch.eye(128)[None])
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # Linux: the peak starts anew
before = kilobytes("VmRSS")
compensate([w], hessian)
print((kilobytes("VmHWM") - before) * 1024 / 1e6)
"""


def peak(width: int) -> float:
    """The growth of a fresh process's peak memory while a weight of this width is rounded, in MB."""
    code = _PEAK.format(folder=str(Path(__file__).parent), width=width)
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> int:
    """Print a row for each width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="256,512,1024,2048,4096")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{options.tokens} tokens, {torch.get_num_threads()} threads, median of {options.rounds}, seconds")
    print(f"{'K':>6}{'Hessian':>10}{'factor':>10}{'columns':>10}{'peak MB':>10}{'3 stacked':>11}{'3 apart':>9}")
    apart = stacked = 0.0
    for width in map(int, options.widths.split(",")):
        generator = torch.Generator().manual_seed(width)
        x = torch.randn(options.tokens, width, generator=generator)
        weights = [torch.randn(width, width, generator=generator) for _ in range(3)]
        observer = HessianObserver(("layer",), (1, width), lambda batch: [(0, batch)])
        hessian_time = median(lambda observer=observer, x=x: observer.update(x), options.rounds)
        hessian = observer.mean()
        factor_time = median(lambda hessian=hessian: gptq.factor(hessian, 0.01), options.rounds)
        one = median(lambda weights=weights, hessian=hessian: compensate(weights[:1], hessian), options.rounds)
        stacked = median(lambda weights=weights, hessian=hessian: compensate(weights, hessian), options.rounds)
        apart = 3 * one
        columns = max(one - factor_time, 0.0)
        times = "".join(f"{seconds:10.3f}" for seconds in (hessian_time, factor_time, columns))
        print(f"{width:6}{times}{peak(width):10.0f}{stacked:11.3f}{apart:9.3f}", flush=True)
    return int(stacked >= apart)


if __name__ == "__main__":
    sys.exit(main())
