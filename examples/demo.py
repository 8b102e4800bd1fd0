"""The main job: quantize the shipped language model as an LLMC config says, write both targets, compare all three.

Usage: python examples/demo.py        (writes build/demo in the current directory; reads nothing from the network)
"""

import os.path
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import graphq
from graphq import evaluate
from graphq.runtime.onnx_session import OnnxSession

EXAMPLES: Final = Path(__file__).resolve().parent
MODEL: Final = EXAMPLES / "models" / "stdlib-llama"
CONFIG: Final = EXAMPLES / "configs" / "llmc" / "stdlib_llama_w4_mixed.yaml"
OUT: Final = Path("build/demo")
SHOWN: Final = 8  # layers of the plan


def main(count: int = 320) -> None:
    """Compile, emit and print the comparison on the first ``count`` windows of the evaluation text."""
    start = time.perf_counter()
    compiled = graphq.compile(MODEL, CONFIG)
    compiled.emit("torch", OUT / "torch", overwrite=True)
    compiled.emit("onnx", OUT / "onnx", overwrite=True)
    print(
        f"{MODEL.name} by {CONFIG.name}: {OUT}/torch and {OUT}/onnx, in {time.perf_counter() - start:.0f} s", flush=True
    )

    logging.disable_progress_bar()
    source: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    onnx = OnnxSession(OUT / "onnx" / "model.onnx", compiled.module.source)
    windows = evaluate.standard_library_windows(evaluate.load_tokenizer(MODEL), count=count)
    print(f"\nperplexity on {windows.shape[0]} windows of {windows.shape[1]} held-out tokens; weights in 10^6 bytes\n")
    print(f"{'model':<26}{'weights':>9}{'perplexity':>13}{'seconds':>10}", flush=True)
    row("source, in bfloat16 (*)", [MODEL / "model.safetensors"], source, windows)
    row("torch, packed", [OUT / "torch" / "model.safetensors"], graphq.load(OUT / "torch"), windows)
    row("onnx, in ONNX Runtime", sorted((OUT / "onnx").glob("model.onnx*")), onnx, windows)
    print("(*) computed in float32, like the others; what stays float is held in bfloat16 by all three\n")

    layers = [layer for layer in compiled.report.layers if layer.weight is not None]
    before, after = sum(layer.float_nbytes for layer in layers), sum(layer.nbytes for layer in layers)
    print(f"the {len(layers)} quantized layers alone: {before / 1e6:.2f} in bfloat16, {after / 1e6:.2f} now\n")
    print("\n".join(str(compiled.report).splitlines()[: 1 + SHOWN]))
    more = len(compiled.report.layers) - SHOWN
    print(f"... {more} more: graphq explain {os.path.relpath(MODEL)} --spec {os.path.relpath(CONFIG)}")


def row(name: str, files: list[Path], model: Callable[..., Any], windows: torch.Tensor) -> None:
    """A line of the table: the size of the files that hold the weights, perplexity, and the time it took to find."""
    start = time.perf_counter()
    found = evaluate.perplexity(model, windows, batch_size=32)
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    print(f"{name:<26}{megabytes:>9.2f}{found:>13.4f}{time.perf_counter() - start:>10.1f}", flush=True)


if __name__ == "__main__":
    main()
