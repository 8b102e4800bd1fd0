"""A transformers model quantized where it stands, with AMCT's calls and an AMCT config; no graph is captured.

Usage: python examples/quantize_in_place.py
"""

from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM

import graphq
from graphq import evaluate

MODEL: Final = Path(__file__).resolve().parent / "models" / "stdlib-llama"
CONFIG: Final[dict[str, Any]] = {
    "batch_num": 2,
    "quant_cfg": {"weights": {"type": "int4", "symmetric": True, "strategy": "group", "group_size": 32}},
    "algorithm": {"awq": {"grids_num": 20}},
    "skip_layers": {"lm_head"},
}


@torch.inference_mode()
def main() -> None:
    """Calibrate on some texts, measure on another."""
    tokenizer = evaluate.load_tokenizer(MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16).eval()
    windows = evaluate.standard_library_windows(tokenizer, count=2)
    print(f"perplexity on {len(windows)} windows: {evaluate.perplexity(model, windows):.3f} in bfloat16")

    graphq.quantize(model, CONFIG)
    for batch in evaluate.calibration_windows(tokenizer, count=4).split(2):
        model(batch)  # as many calls as batch_num says calibrate, later ones quantize
    first = model.model.layers[0].mlp.down_proj
    factors = {name: f"{str(b.dtype).removeprefix('torch.')}{list(b.shape)}" for name, b in first.named_buffers()}
    print(f"factors of {tuple(first.weight.shape)}: {', '.join(f'{name} {what}' for name, what in factors.items())}")
    print(f"perplexity with quantized weights: {evaluate.perplexity(model, windows):.3f}")

    before, fake = sum(t.nbytes for t in model.model.layers.parameters()), model(windows).logits
    graphq.convert(model)
    after = sum(t.nbytes for t in model.model.layers.state_dict().values())
    print(f"the blocks: {before} bytes before, {after} packed")
    print(f"the packed model gives the same logits: {torch.equal(model(windows).logits, fake)}")
    print(next(line for line in str(graphq.in_place_report(model)).splitlines() if line.startswith("lm_head")))


if __name__ == "__main__":
    main()
