"""What `import graphq` costs beside `import torch`, which it cannot do without: the ratio of their times, at most 1.5.

Usage: python benchmarks/import_time.py [RUNS]

Each import runs in a process of its own; the two take turns, so that a busy machine slows both. Prints the medians and
their ratio; exits 1 when the ratio is above the bound.
"""

import statistics
import subprocess
import sys
from typing import Final

BOUND: Final = 1.5
CLOCK: Final = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def seconds(module: str) -> float:
    """Seconds that importing ``module`` takes in a fresh process, without the start of Python itself."""
    command = [sys.executable, "-c", CLOCK.format(module)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(runs: int) -> int:
    """Print the medians over ``runs`` pairs; 0 when their ratio is within the bound."""
    seconds("graphq")  # compiles the sources and fills the file cache
    pairs = [(seconds("torch"), seconds("graphq")) for _ in range(runs)]
    torch, graphq = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"import torch {torch:.2f} s, import graphq {graphq:.2f} s, ratio {graphq / torch:.2f} (at most {BOUND})")
    return 0 if graphq / torch <= BOUND else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 7))
