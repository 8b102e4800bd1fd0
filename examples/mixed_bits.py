"""Bits by layer from an LLMC config: which rule decides for each layer, then what each plan costs and keeps.

Usage: python examples/mixed_bits.py
"""

from collections import defaultdict
from pathlib import Path
from typing import Final

import graphq
from graphq.report import LayerReport

EXAMPLES: Final = Path(__file__).resolve().parent
MODEL: Final = EXAMPLES / "models" / "stdlib-llama"
CONFIG: Final = EXAMPLES / "configs" / "llmc" / "stdlib_llama_w4_mixed.yaml"


def main() -> None:
    """Explain without the weights, compile with them."""
    explained = graphq.explain(MODEL, CONFIG)
    for name in ("layer", "model.layers.0.", "model.layers.1.mlp.down_proj"):
        print("\n".join(line for line in str(explained).splitlines() if line.startswith(name)))

    by_plan: dict[str, list[LayerReport]] = defaultdict(list)
    for layer in graphq.compile(MODEL, CONFIG).report.layers:
        by_plan[layer.plan].append(layer)
    print(f"\n{'layers':>6}{'bytes':>10}{'in bfloat16':>13}{'lowest SQNR':>13}  weight x input")
    for plan, layers in by_plan.items():
        sqnr = min((layer.sqnr_db for layer in layers if layer.sqnr_db is not None), default=None)
        shown = "" if sqnr is None else f"{sqnr:.1f} dB"
        stored, before = sum(layer.nbytes for layer in layers), sum(layer.float_nbytes for layer in layers)
        print(f"{len(layers):>6}{stored:>10}{before:>13}{shown:>13}  {plan}")


if __name__ == "__main__":
    main()
