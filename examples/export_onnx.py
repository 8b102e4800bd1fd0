"""8 bit weights and activations with calibrated scales, as ONNX: run by ONNX Runtime alone, compared with the QDQ form.

Usage: python examples/export_onnx.py        (writes build/export_onnx in the current directory)
"""

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
import torch

import graphq
from graphq import evaluate
from graphq.runtime.model import CompiledModel

EXAMPLES: Final = Path(__file__).resolve().parent
MODEL: Final = EXAMPLES / "models" / "stdlib-llama"
CONFIG: Final = EXAMPLES / "configs" / "native" / "w8a8_static.yaml"
OUT: Final = Path("build/export_onnx")


def main() -> None:
    """Calibrate on some texts, compare on another."""
    tokenizer = evaluate.load_tokenizer(MODEL)
    calibration = evaluate.calibration_windows(tokenizer, count=32).split(8)
    compiled = graphq.compile(MODEL, CONFIG, calibration=calibration)
    compiled.emit("onnx", OUT, overwrite=True)

    windows = evaluate.standard_library_windows(tokenizer, count=4)
    session: Any = onnxruntime.InferenceSession(OUT / "model.onnx")
    shapes: dict[str, Any] = {i.name: i.shape for i in session.get_inputs()}
    print(f"inputs: {', '.join(list(shapes)[:5])}, ... ({len(shapes)} in all)")
    feeds: dict[str, Any] = {
        "input_ids": windows.numpy(),
        "attention_mask": np.ones((4, 256), np.int64),
        "position_ids": np.arange(256)[None].repeat(4, 0),
    }
    for name, (_, heads, _, width) in list(shapes.items())[3:]:  # the key/value caches: nothing went before
        feeds[name] = np.zeros((4, heads, 0, width), np.float32)
    logits = torch.from_numpy(session.run(["logits"], feeds)[0])

    with torch.inference_mode():
        wanted = CompiledModel(compiled.graph)(windows)["logits"]  # the QDQ form, run by torch
    largest = (logits - wanted).abs().max() / wanted.abs().max()
    print(f"largest difference of a logit: {largest:.2%} of the largest logit (a code off by one is a whole step)")
    print(f"the same next token: {(logits.argmax(-1) == wanted.argmax(-1)).float().mean():.2%} of {windows.numel()}")
    perplexity = [evaluate.perplexity(lambda _, found=found: found, windows) for found in (logits, wanted)]
    print(f"perplexity on these {len(windows)} windows: {perplexity[0]:.4f}, of the QDQ form {perplexity[1]:.4f}")


if __name__ == "__main__":
    main()
