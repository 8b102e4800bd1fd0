"""Perplexity of the shipped language model in each format, beside the numbers recorded when it was trained.

Usage: python benchmarks/reference_model.py [WINDOWS]        (320 windows: 5 to 10 minutes on 2 cores)

The expected numbers stand in examples/models/stdlib-llama/train.py and were not made with graphq. They hold for all 320
windows and for Python 3.11.7: the text is its standard library, and another patch release moves all rows alike. Exits 1
when a row deviates by more than its bound: 0.3 %, and 1 % where scales are calibrated: on what is not recorded.
"""

import sys
import time
from pathlib import Path
from typing import Final

import graphq
from graphq import evaluate

MODEL: Final = Path(__file__).resolve().parents[1] / "examples" / "models" / "stdlib-llama"
EXPECTED: Final = {  # (weight, input): perplexity
    (None, None): 13.408,
    ("int8/channel", None): 13.408,
    ("int4/g128", None): 13.802,
    ("int4/asym/g128", None): 13.629,
    ("int4/channel", None): 13.820,
    ("int3/asym/g128", None): 14.367,
    ("int3/asym/g64", None): 14.243,
    ("int2/asym/g64", None): 20.77,
    ("int8/channel", "int8/token/dynamic"): 13.414,
    ("int8/channel", "int8/tensor"): 13.512,
    ("int6/channel", "int6/token/dynamic"): 13.586,
    ("int4/channel", "int8/token/dynamic"): 13.831,
    ("int4/channel", "int4/token/dynamic"): 16.22,
}
BOUND: Final = 0.003
STATIC_BOUND: Final = 0.01


def spec_of(weight: str | None, x: str | None) -> dict[str, object]:
    """A native spec for all layers in the blocks."""
    decision = {"float": True} if weight is None else {"weight": weight} | ({"input": x} if x else {})
    return {"graphq": 1, "rules": [{"match": "blocks", **decision}]}


def main(count: int) -> int:
    """Print the table on the first ``count`` windows; 0 when every row is within its bound."""
    tokenizer = evaluate.load_tokenizer(MODEL)
    windows = evaluate.standard_library_windows(tokenizer, count=count)
    calibration = evaluate.calibration_windows(tokenizer).split(16)
    print(f"{count} windows of {windows.shape[1]} tokens, Python {sys.version.split()[0]}")
    print(f"{'weight':<16}{'input':<20}{'perplexity':>11}{'expected':>10}{'deviation':>11}{'seconds':>9}", flush=True)
    worst = 0.0
    for (weight, x), expected in EXPECTED.items():
        start = time.perf_counter()
        static = x is not None and not x.endswith("dynamic")
        compiled = graphq.compile(MODEL, spec_of(weight, x), calibration=calibration if static else None)
        found = evaluate.perplexity(compiled.module, windows, batch_size=32)
        deviation = found / expected - 1
        worst = max(worst, abs(deviation) / (STATIC_BOUND if static else BOUND))
        row = f"{weight or 'float':<16}{x or 'float':<20}{found:>11.3f}{expected:>10}{deviation:>z11.2%}"
        print(f"{row}{time.perf_counter() - start:>9.0f}", flush=True)
    return int(worst > 1)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 320))
