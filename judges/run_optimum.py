"""optimum's ORTModelForCausalLM loads ONNX language models, and generates the greedy tokens of the QDQ form.

https://github.com/huggingface/optimum-onnx, which needs an older transformers than graphq. Run by ``judges.py``, or as

    OMP_NUM_THREADS=1 .venv/bin/python judges/run_optimum.py .judges/optimum/bin/python

The language model of the examples is compiled and written here, portable and for ``ort-cpu``; the client's Python runs
this script once more, to load and generate. Exit status 1, with a reason, where it cannot, or where a token of
``LENGTH`` is another.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
MODEL: Final = ROOT / "examples" / "models" / "stdlib-llama"
PROMPT: Final = "def f(x):\n    return"
LENGTH: Final = 24
SPECS: Final = {"W8A8": {"weight": "int8/channel", "input": "int8/token/dynamic"}, "W4A16": {"weight": "int4/g32"}}


def main(client: str) -> int:
    """0 where the client generates the same from all artifacts."""
    import torch
    from tokenizers import Tokenizer

    import graphq
    from graphq.runtime.model import CompiledModel

    ids: list[int] = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(PROMPT).ids
    wanted: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as place:
        for name, formats in SPECS.items():
            compiled = graphq.compile(MODEL, {"graphq": 1, "rules": [{"match": "kind:linear", **formats}]})
            form = CompiledModel(compiled.graph)  # the QDQ form, run by torch
            tokens = form.generate(torch.tensor([ids]), max_new_tokens=LENGTH, do_sample=False)[0].tolist()
            for profile in (None, "ort-cpu"):
                title = f"{name}, {profile or 'portable'}"
                compiled.emit("onnx", Path(place) / title, profile=profile)
                wanted[title] = tokens
        told = json.dumps({str(Path(place) / title): ids for title in wanted})
        ran = subprocess.run([client, __file__, "--client", told], stdout=subprocess.PIPE, check=False)
    if ran.returncode:
        print(f"the client ended with exit status {ran.returncode}", file=sys.stderr)
        return 1
    found: dict[str, list[int]] = json.loads(ran.stdout.splitlines()[-1])
    faults = 0
    for (title, tokens), given in zip(wanted.items(), found.values(), strict=True):
        same = sum(a == b for a, b in zip(given, tokens, strict=False)) - len(ids)
        print(f"{title}: {same} of {len(tokens) - len(ids)} tokens are the QDQ form's")
        if given != tokens:
            print(f"{title}: tokens {given}, not {tokens}", file=sys.stderr)
            faults += 1
    return int(faults > 0)


def generate(told: str) -> int:
    """Prints, as JSON, what optimum generates from each prompt with the artifact in each folder. Runs in its Python."""
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM  # pyright: ignore[reportMissingImports]

    found: dict[str, list[int]] = {}
    for folder, ids in json.loads(told).items():
        model: Any = ORTModelForCausalLM.from_pretrained(folder)
        prompt = torch.tensor([ids])
        mask = torch.ones_like(prompt)
        made = model.generate(input_ids=prompt, attention_mask=mask, max_new_tokens=LENGTH, do_sample=False)
        found[folder] = made[0].tolist()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    sys.exit(generate(sys.argv[2]) if sys.argv[1] == "--client" else main(sys.argv[1]))
