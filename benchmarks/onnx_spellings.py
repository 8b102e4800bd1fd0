"""What the spellings of linears cost in ONNX Runtime: CPU time against the float model, one thread.

A stack of linears with 128 rows, as in an encoder, and the same with one row, as in a decoder. Each is compiled with
graphq, written portably and as ``ort-cpu`` spells it, and run in turn with the float file, so that what else the
machine does meets all of them alike; the smallest CPU time of each is compared.

    OMP_NUM_THREADS=1 python benchmarks/onnx_spellings.py [WIDTH]
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

import graphq

LAYERS, ROUNDS = 4, 15
PLANS: dict[str, tuple[str, str | None]] = {
    "W8A8 static": ("int8/channel", "uint8/tensor"),
    "W8A8 by token": ("int8/channel", "int8/token/dynamic"),
    "W4A8 by token, by channel": ("int4/channel", "int8/token/dynamic"),
    "W4A8 by token, g32": ("int4/g32", "int8/token/dynamic"),
    "W4A16 g32": ("int4/g32", None),
    "W4A16 asym g128": ("int4/asym/g128", None),
    "W2A16 g32": ("int2/g32", None),
    "W8A16": ("int8/channel", None),
}


def stack(width: int) -> nn.Module:
    """Linears of ``width`` by ``width`` with activations between them."""
    torch.manual_seed(0)
    layers = [part for _ in range(LAYERS) for part in (nn.Linear(width, width), nn.GELU())]
    return nn.Sequential(*layers).eval()


def session(folder: Path) -> Any:
    """The artifact in ONNX Runtime's default session, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def written(model: nn.Module, plan: tuple[str, str | None] | None, x: Tensor, folder: Path, profile: str | None) -> Any:
    """A session of the model, float without a plan."""
    rule: dict[str, Any] = {"match": "*", "float": True}
    if plan is not None:
        rule = {"match": "*", "weight": plan[0]} | ({"input": plan[1]} if plan[1] else {})
    made = graphq.compile(model, {"graphq": 1, "rules": [rule]}, inputs=x, calibration=[x])
    made.emit("onnx", folder, profile=profile)
    return session(folder)


def cpu_times(sessions: dict[str, Any], x: Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of each session for one call, in rounds over all of them."""
    feeds = {next(iter(sessions.values())).get_inputs()[0].name: x.numpy()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(ROUNDS):
        for name, one in sessions.items():
            before = time.process_time()
            for _ in range(repeats):
                one.run(None, feeds)
            times[name].append((time.process_time() - before) / repeats)
    return times


def main() -> None:
    """Print the table."""
    width = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    model = stack(width)
    for rows, repeats in ((128, 1), (1, 10)):
        x = torch.randn(2, max(rows // 2, 2), width)
        run_on = x if rows > 1 else x[:1, :1]
        with tempfile.TemporaryDirectory() as folder:
            sessions = {"float": written(model, None, x, Path(folder) / "float", None)}
            for name, plan in PLANS.items():
                for profile in (None, "ort-cpu"):
                    key = f"{name}, {profile or 'portable'}"
                    sessions[key] = written(model, plan, x, Path(folder) / key.replace(" ", "_"), profile)
            times = cpu_times(sessions, run_on, repeats)
        print(f"{LAYERS} linears of {width} x {width}, {rows} rows: CPU time against float (smallest, median)")
        least, middle = min(times["float"]), statistics.median(times["float"])
        for name, found in times.items():
            print(f"  {name:38} {min(found) / least:6.2f} {statistics.median(found) / middle:6.2f}")
        print(f"  float: {least * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
