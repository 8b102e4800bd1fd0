"""transformers loads compressed-tensors checkpoints with an earlier release than ours, and gives the QDQ form's logits.

https://github.com/huggingface/transformers, whose 5.17 with compressed-tensors 0.19 also loads packed zero points,
which 5.23 does not. Run by ``judges.py``, or as

    OMP_NUM_THREADS=1 .venv/bin/python judges/run_transformers.py .judges/transformers/bin/python [SCHEME ...]

The language model of the examples, and small models of other families, with weights in float32, are compiled in each
scheme here; the client's Python runs this script once more, loads each checkpoint and computes its logits. With float
activations the largest difference is at most 1e-4 of the largest logit; with quantized ones, where a code that rounds
the other way moves all that follows, 3e-2. No tensor may be missing, unexpected or of another shape. nvfp4 and mx
formats, which transformers dequantizes to bfloat16 whatever the model's dtype, are left to the tests.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
MODEL: Final = ROOT / "examples" / "models" / "stdlib-llama"
TOKENS: Final = 64
_DOWN: Final = "rules: [{match: down_proj, weight: int8/half/channel, input: int8/half/token/dynamic}]"
SCHEMES: Final = {  # the spec, and the bound on logits
    "W4A16": ("weight: int4/half/g32", 1e-4),
    "W4A16 asymmetric": ("weight: int4/asym/joint/g32", 1e-4),
    "W4A16 by channel": ("weight: int4/half/channel", 1e-4),
    "W3A16": ("weight: int3/half/g32", 1e-4),
    "W8A16": ("weight: int8/half/g32", 1e-4),
    "FP8 weights": ("weight: float8_e4m3fn/channel", 1e-4),
    "W8A8, dynamic": ("weight: int8/half/channel\ninput: int8/half/token/dynamic", 3e-2),
    "W8A8, static": ("weight: int8/half/channel\ninput: int8/half/tensor", 3e-2),
    "FP8, dynamic": ("weight: float8_e4m3fn/channel\ninput: float8_e4m3fn/token/dynamic", 3e-2),
    "W4A16, W8A8 down_proj": (f"weight: int4/half/g32\n{_DOWN}", 3e-2),
}
SMALL: Final = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "Llama": {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2},
    "Qwen3": {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16},
    "Gemma3Text": {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 8},
    "OPT": {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64, "max_position_embeddings": 128},
}


def sources(place: Path) -> dict[str, Path]:
    """Model directories in float32 by name: the examples' model, and one of each family."""
    import torch
    import transformers

    found = {"examples' model": place / "stdlib"}
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model.save_pretrained(found["examples' model"])
    for family, options in FAMILIES.items():
        torch.manual_seed(0)
        kind = getattr(transformers, f"{family.removesuffix('Text')}ForCausalLM")
        made = kind(getattr(transformers, f"{family}Config")(**options)).eval()
        found[family] = place / family
        made.save_pretrained(found[family])
    return found


def main(client: str, names: list[str]) -> int:
    """0 where transformers computes what was compiled, for every model and scheme."""
    import torch

    import graphq
    from graphq.runtime.model import CompiledModel

    wanted: dict[Path, tuple[str, torch.Tensor, float]] = {}
    with tempfile.TemporaryDirectory() as root:
        place = Path(root)
        for model, source in sources(place).items():
            size = json.loads((source / "config.json").read_text())["vocab_size"]
            ids = (torch.arange(TOKENS) * 7919 % size)[None]
            schemes = names or (list(SCHEMES) if model == "examples' model" else ["W4A16", "W8A8, static"])
            for name in schemes:
                spec, bound = SCHEMES[name]
                options = {"consumer": "any"}
                made = graphq.compile(
                    source, f"graphq: 1\n{spec}", target="compressed-tensors", target_options=options, calibration=[ids]
                )
                out = place / "out" / str(len(wanted))
                made.emit("compressed-tensors", out, consumer="any")
                run: Callable[..., Any] = CompiledModel(made.graph).eval()
                with torch.no_grad():
                    wanted[out] = (f"{model}, {name}", run(input_ids=ids).logits, bound)
                (out / "ids.json").write_text(json.dumps(ids.tolist()))
        told = json.dumps([str(path) for path in wanted])
        subprocess.run([client, __file__, "--client", told], stdout=sys.stderr, check=False)
        faults = 0
        for out, (name, logits, bound) in wanted.items():
            if not (out / "logits.json").exists():
                print(f"{name}: not loaded", flush=True)
                faults += 1
                continue
            found = torch.tensor(json.loads((out / "logits.json").read_text()))
            apart = float((found - logits).abs().max() / logits.abs().max())
            print(f"{name}: within {apart:.1e} of the largest logit, at most {bound:.0e}", flush=True)
            faults += not apart <= bound
    return int(faults > 0)


def score(told: str) -> int:
    """Writes the logits of each checkpoint as JSON, unless a tensor has no place. Runs in the client's Python."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    for folder in map(Path, json.loads(told)):
        try:
            load: Any = transformers.AutoModelForCausalLM.from_pretrained
            model, report = load(folder, dtype=torch.float32, output_loading_info=True)
            if any(report.values()):
                print(f"{folder}: {report}")
                continue
            with torch.no_grad():
                logits = model(torch.tensor(json.loads((folder / "ids.json").read_text()))).logits.float()
        except Exception as error:  # noqa: BLE001  # of whatever kind: it was not loaded
            print(f"{folder}: {type(error).__name__}: {error}")
            continue
        (folder / "logits.json").write_text(json.dumps(logits.tolist()))
    return 0


if __name__ == "__main__":
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    sys.exit(score(sys.argv[2]) if sys.argv[1] == "--client" else main(sys.argv[1], sys.argv[2:]))
