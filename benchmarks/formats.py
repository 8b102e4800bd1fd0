"""What each format costs to quantize to, and what it does to the shipped language model.

Usage: python benchmarks/formats.py [ROUNDS]             time and memory of a 4096 x 4096 weight (5 rounds: 2 minutes)
       python benchmarks/formats.py --model [WINDOWS]    perplexity in each format (320 windows: 15 to 30 minutes)

The first prints, for each format, the median time of quantizing and dequantizing a float32 weight, scales included, as
a multiple of two times measured in the same rounds: copying the weight, and torch's own round trip through
float8_e4m3fn; and the peak of extra memory, the result included, as a multiple of the weight's bytes. Exits 1 where
hifloat8 or float4 take more than 4 round trips, or any format more than 3 weights of memory.

The second compiles the model with every linear of its blocks in a format, without and with activations, and prints the
perplexities that docs/numbers.md shows. Activations with fixed scales are calibrated on text that is not measured.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

import graphq
from graphq import evaluate

MODEL: Final = Path(__file__).resolve().parents[1] / "examples" / "models" / "stdlib-llama"
TIMED: Final = (
    "int8/channel",
    "int8/asym/channel",
    "int4/g128",
    "int4/asym/g128",
    "float8_e4m3fn/channel",
    "float8_e4m3fn/128x128",
    "float8_e5m2/channel",
    "hifloat8/channel",
    "float6_e2m3/g32",
    "float4_e2m1/g32",
    "float4_e1m2/g32",
    "mxfp8_e4m3",
    "mxfp6_e3m2",
    "mxfp4",
    "mxfp4/even",
    "mxint8",
    "nvfp4",
    "int4/over_int8/g128",
    "float4_e2m1/over_float8/g32",
)
TRIPS_BOUND: Final = 4.0  # for hifloat8 and float4
MEMORY_BOUND: Final = 3.0
PLANS: Final = (  # (weight, input)
    (None, None),
    ("int8/channel", None),
    ("int8/half/channel", None),
    ("int8/by_sign/channel", None),
    ("uint8/channel", None),
    ("int4/g128", None),
    ("int4/g128/mse", None),
    ("int4/channel/ssz", None),
    ("int4/over_int8/g128", None),
    ("int2/asym/g64", None),
    ("float8_e4m3fn/channel", None),
    ("float8_e4m3fn/128x128", None),
    ("float8_e5m2/channel", None),
    ("hifloat8/channel", None),
    ("hifloat8/to15/channel", None),
    ("hifloat8/pow2/channel", None),
    ("hifloat8/channel/ofmr", None),
    ("float6_e2m3/channel", None),
    ("float6_e3m2/channel", None),
    ("float4_e2m1/g32", None),
    ("float4_e1m2/g32", None),
    ("float4_e2m1/over_float8/g32", None),
    ("mxfp8_e4m3", None),
    ("mxfp8_e5m2", None),
    ("mxfp6_e2m3", None),
    ("mxfp6_e3m2", None),
    ("mxint8", None),
    *((f"mxfp4{rule}", None) for rule in ("", "/even", "/amct", "/amct_llm", "/nearest", "/ceil", "/ascend")),
    ("nvfp4", None),
    ("int8/channel", "int8/token/dynamic"),
    ("int8/channel", "int8/tensor"),
    ("int8/channel", "uint8/tensor"),
    *(
        ("int8/channel", f"int8/asym/tensor/{method}")
        for method in ("ema", "percentile", "percentile99.999", "histogram", "entropy", "mse")
    ),
    ("int8/channel", "int8/tensor/ofmr"),
    ("int8/channel", "int16/tensor"),
    ("float8_e4m3fn/channel", "float8_e4m3fn/token/dynamic"),
    ("float8_e4m3fn/tensor", "float8_e4m3fn/tensor"),
    ("float8_e4m3fn/128x128", "float8_e4m3fn/g128/dynamic"),
    ("float8_e5m2/channel", "float8_e5m2/token/dynamic"),
    ("hifloat8/channel", "hifloat8/tensor"),
    ("hifloat8/channel", "hifloat8/to15/token/dynamic"),
    ("hifloat8/channel/ofmr", "hifloat8/tensor/ofmr"),
    ("float4_e2m1/over_float8/g32", "float8_e4m3fn/tensor"),
    ("int4/g128", "float8_e4m3fn/token/dynamic"),
    ("mxfp8_e4m3", "mxfp8_e4m3/dynamic"),
    ("mxfp6_e2m3", "mxfp6_e2m3/dynamic"),
    ("mxint8", "mxint8/dynamic"),
    ("mxfp4", "mxfp8_e4m3/dynamic"),
    ("mxfp4", "mxfp4/dynamic"),
    ("nvfp4", "nvfp4"),
    ("nvfp4", "nvfp4/dynamic"),
)


def _median_seconds(tasks: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median time of each task; in every round each runs once, so that a busy machine slows all."""
    for task in tasks.values():
        task()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


_PEAK: Final = """
import torch, graphq
def kilobytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))
torch.manual_seed(0)
w = torch.randn({size}, {size})
graphq.fake_quantize(torch.randn(64, 512), {quant!r})
with open("/proc/self/clear_refs", "w") as peak:
    peak.write("5")  # Linux: the peak starts anew
before = kilobytes("VmRSS")
kept = graphq.fake_quantize(w, {quant!r})
print((kilobytes("VmHWM") - before) * 1024 / (w.numel() * 4))
"""


def peak(quant: str, size: int) -> float:
    """The growth of a fresh process's peak memory as it quantizes and dequantizes, in sizes of the weight (Linux)."""
    code = _PEAK.format(quant=quant, size=size)
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def cost(rounds: int, size: int = 4096) -> int:
    """Print the table of times and memory; 0 when every bound holds."""
    torch.manual_seed(0)
    w = torch.randn(size, size)
    tasks: dict[str, Callable[[], object]] = {
        "copy": w.clone,
        "float8 round trip": lambda: w.to(torch.float8_e4m3fn).to(torch.float32),
    }
    tasks |= {quant: lambda quant=quant: graphq.fake_quantize(w, quant) for quant in TIMED}
    seconds = _median_seconds(tasks, rounds)
    copy, trip = seconds.pop("copy"), seconds.pop("float8 round trip")
    print(f"{size} x {size} float32: copy {copy * 1e3:.0f} ms, torch's float8 round trip {trip * 1e3:.0f} ms")
    print(f"{'format':<30}{'ms':>8}{'copies':>9}{'round trips':>13}{'extra memory':>14}", flush=True)
    wrong = 0
    for quant, value in seconds.items():
        memory = peak(quant, size)
        bound = TRIPS_BOUND if quant.startswith(("hifloat8", "float4", "mxfp4", "nvfp4")) else float("inf")
        wrong += value / trip > bound or memory > MEMORY_BOUND
        print(f"{quant:<30}{value * 1e3:>8.0f}{value / copy:>9.1f}{value / trip:>13.2f}{memory:>14.2f}", flush=True)
    return int(wrong > 0)


def model(count: int) -> int:
    """Print the perplexity of the shipped model in each format."""
    tokenizer = evaluate.load_tokenizer(MODEL)
    windows = evaluate.standard_library_windows(tokenizer, count=count)
    calibration = evaluate.calibration_windows(tokenizer).split(16)
    print(f"{count} windows of {windows.shape[1]} tokens, Python {sys.version.split()[0]}")
    print(f"{'weight':<30}{'input':<32}{'perplexity':>11}", flush=True)
    for weight, x in PLANS:
        decision = {"float": True} if weight is None else {"weight": weight} | ({"input": x} if x else {})
        spec = {"graphq": 1, "rules": [{"match": "blocks", **decision}]}
        compiled = graphq.compile(MODEL, spec, calibration=calibration)
        found = evaluate.perplexity(compiled.module, windows, batch_size=32)
        print(f"{weight or 'float':<30}{x or 'float':<32}{found:>11.3f}", flush=True)
    return 0


if __name__ == "__main__":
    if "--model" in sys.argv[1:]:
        sys.exit(model(int(sys.argv[2]) if len(sys.argv) > 2 else 320))
    sys.exit(cost(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
