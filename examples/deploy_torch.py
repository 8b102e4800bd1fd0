"""8 bit weights and activations: compile, save, and generate text from the artifact in a process that knows no more.

Usage: python examples/deploy_torch.py        (writes build/deploy_torch in the current directory)
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch

import graphq
from graphq import evaluate

MODEL: Final = Path(__file__).resolve().parent / "models" / "stdlib-llama"
SPEC: Final = {"graphq": 1, "weight": "int8/channel", "input": "int8/token/dynamic"}
OUT: Final = Path("build/deploy_torch")
PROMPT: Final = "def main(argv=None):\n    parser = argparse."


def generate(model: Any, tokenizer: evaluate.Tokenizer) -> str:
    """``PROMPT`` and the 24 tokens that the model thinks most likely."""
    ids = torch.tensor([tokenizer.encode(PROMPT)])
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    return tokenizer.vocabulary.decode(found[0].tolist())


def deployed(artifact: Path) -> str:
    """What a process gives that has the artifact alone; the tokenizer is part of it."""
    return generate(graphq.load(artifact), evaluate.load_tokenizer(artifact))


def main() -> None:
    """Compile here, generate there."""
    compiled = graphq.compile(MODEL, SPEC)
    compiled.save(OUT, overwrite=True)
    print(f"{OUT}: {', '.join(sorted(file.name for file in OUT.iterdir()))}")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        text = fresh.submit(deployed, OUT).result()
    print(f"--- from a fresh process\n{text}\n---")
    print(f"the same text from the compiled model: {generate(compiled, evaluate.load_tokenizer(MODEL)) == text}")


if __name__ == "__main__":
    main()
