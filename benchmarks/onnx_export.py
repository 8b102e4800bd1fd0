"""Seconds and memory of writing a language model as ONNX: a Llama of 24 layers and 0.34 B parameters.

Usage: OMP_NUM_THREADS=1 python benchmarks/onnx_export.py [LAYERS] [--profile NAME]

Bounds: ``SECONDS`` of processor time for the file, which other work on the machine does not lengthen, and a peak of
resident memory, from compilation on, of ``MEMORY`` times the float weights (Linux). Weights are drawn; each spec has a
process of its own. Prints a line for each; exits 1 where one is above a bound.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

SECONDS: Final = 60
MEMORY: Final = 2.5
SPECS: Final = {"W4A16": {"weight": "int4/g32"}, "W8A8": {"weight": "int8/channel", "input": "int8/token/dynamic"}}


def resident(key: str) -> int:
    """Bytes of resident memory: ``VmRSS`` now, ``VmHWM`` at most since the last ``forget``."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) << 10


def forget() -> None:
    """The peak of resident memory is what there is now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measure(name: str, layers: int, profile: str | None) -> dict[str, float]:
    """Compiles and writes the model with this spec; seconds and bytes of each. Runs in a process of its own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import graphq

    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    before = resident("VmRSS")
    model = LlamaForCausalLM(config).eval()
    weights = sum(p.nbytes for p in model.parameters())
    forget()
    start = time.perf_counter()
    compiled = graphq.compile(model, {"graphq": 1, **SPECS[name]}, consume=True)
    del model
    compile_seconds, compile_peak = time.perf_counter() - start, resident("VmHWM")
    forget()
    start, busy = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as place:
        compiled.emit("onnx", Path(place) / "out", profile=profile)
        written = sum(file.stat().st_size for file in (Path(place) / "out").iterdir())
    return {
        "weights": weights,
        "before": before,
        "compile_seconds": compile_seconds,
        "compile_peak": compile_peak,
        "seconds": time.perf_counter() - start,
        "busy": time.process_time() - busy,
        "peak": resident("VmHWM"),
        "written": written,
    }


def main() -> int:
    """Print what each spec takes; 0 when all are within the bounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layers", nargs="?", type=int, default=24)
    parser.add_argument("--profile")
    parser.add_argument("--one", choices=SPECS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.layers, given.profile)))
        return 0
    within = True
    for name in SPECS:
        command = [sys.executable, __file__, str(given.layers), "--one", name]
        command += ["--profile", given.profile] if given.profile else []
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found: dict[str, float] = json.loads(said.splitlines()[-1])
        compiled, emitted = (found[key] / found["weights"] for key in ("compile_peak", "peak"))
        print(
            f"{name}, {given.layers} layers, {found['weights'] / 1e9:.2f} GB of float weights:"
            f" {found['written'] / 1e9:.2f} GB written in {found['seconds']:.0f} s,"
            f" {found['busy']:.0f} s of CPU (at most {SECONDS}),"
            f" peak {emitted:.2f} times the float weights (at most {MEMORY});"
            f" compiled in {found['compile_seconds']:.0f} s, peak {compiled:.2f};"
            f" Python and libraries are {found['before'] / 1e9:.2f} GB of each peak",
            flush=True,
        )
        within &= found["busy"] <= SECONDS and max(compiled, emitted) <= MEMORY
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
