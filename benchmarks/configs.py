"""Perplexity of the shipped language model, compiled from each example config of every dialect.

Usage: python benchmarks/configs.py [--windows N] [--samples N] [CONFIG ...]   (all of examples/configs by default)

A config for another model, or one that asks for what graphq refuses, is listed with the reason. Seconds are those of
``graphq.compile``.
"""

import argparse
import time
from pathlib import Path
from typing import Final

import graphq
from graphq import evaluate
from graphq.errors import GraphqError

ROOT: Final = Path(__file__).resolve().parents[1]
CONFIGS: Final = ROOT / "examples" / "configs"
MODEL: Final = ROOT / "examples" / "models" / "stdlib-llama"


def main() -> None:
    """Print a row for each config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", type=Path, help="config files")
    parser.add_argument("--windows", type=int, default=64, help="windows of text to measure on")
    parser.add_argument("--samples", type=int, default=128, help="windows of text to calibrate on")
    options = parser.parse_args()
    tokenizer = evaluate.load_tokenizer(MODEL)
    windows = evaluate.standard_library_windows(tokenizer, count=options.windows)
    calibration = evaluate.calibration_windows(tokenizer)[: options.samples].split(1)
    everything = sorted(path for folder in CONFIGS.iterdir() for path in folder.iterdir())
    print(f"{'config':55} {'quantized':>10} {'perplexity':>10} {'s':>6}")
    for path in options.configs or everything:
        name = str(path.resolve().relative_to(CONFIGS)) if path.resolve().is_relative_to(CONFIGS) else str(path)
        start = time.perf_counter()
        try:
            made = graphq.compile(MODEL, graphq.load_spec(path), calibration=calibration)
        except GraphqError as error:
            print(f"{name:55} {str(error).splitlines()[0]}", flush=True)
            continue
        seconds = time.perf_counter() - start
        quantized = sum(layer.weight is not None or layer.input is not None for layer in made.report.layers)
        found = evaluate.perplexity(made.module, windows, batch_size=32)
        share = f"{quantized}/{len(made.report.layers)}"
        print(f"{name:55} {share:>10} {found:10.3f} {seconds:6.1f}", flush=True)


if __name__ == "__main__":
    main()
