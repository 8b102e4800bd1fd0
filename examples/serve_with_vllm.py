"""A quantized checkpoint that vLLM serves: written by a config, read by transformers and, where it is installed, vLLM.

Usage: python examples/serve_with_vllm.py        (writes build/serve_with_vllm in the current directory)
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer

import graphq

EXAMPLES: Final = Path(__file__).resolve().parent
MODEL: Final = EXAMPLES / "models" / "stdlib-llama"
CONFIG: Final = EXAMPLES / "configs" / "native" / "served_w4a16_w8a8.yaml"
OUT: Final = Path("build/serve_with_vllm")
PROMPT: Final = "def main(argv=None):\n"


def main() -> None:
    """Quantize, look at what was written, generate."""
    compiled = graphq.compile(MODEL, CONFIG, target="compressed-tensors")
    compiled.emit("compressed-tensors", OUT, overwrite=True)
    settings = json.loads((OUT / "config.json").read_text())["quantization_config"]
    for name, group in settings["config_groups"].items():
        print(f"{name}: {group['format']}, {group['weights']['num_bits']} bits, {len(group['targets'])} targets")
    sizes = [(place / "model.safetensors").stat().st_size for place in (MODEL, OUT)]
    print(f"model.safetensors: {sizes[0]} bytes before, {sizes[1]} now")

    tokenizer: Any = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(PROMPT).ids])
    wanted = compiled.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()
    print(repr(tokenizer.decode(wanted)))
    if find_spec("vllm") is None:
        print(f"vLLM is not installed here; where it is: vllm serve {OUT} --dtype bfloat16")
        return
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    model: Any = LLM(model=str(OUT), dtype="bfloat16", enforce_eager=True, max_model_len=512)
    asked = SamplingParams(max_tokens=12, temperature=0)
    (answer,) = model.generate([{"prompt_token_ids": ids[0].tolist()}], asked)
    print("the same from vLLM:", list(answer.outputs[0].token_ids) == wanted[ids.shape[1] :])


if __name__ == "__main__":
    main()
