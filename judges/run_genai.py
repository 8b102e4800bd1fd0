"""onnxruntime-genai serves ONNX language models: its Generator gives the greedy tokens of the QDQ form.

https://github.com/microsoft/onnxruntime-genai. Run by ``judges.py``, or as

    OMP_NUM_THREADS=1 .judges/genai/bin/python judges/run_genai.py

The language model of the examples is compiled and written, portable and for ``ort-cpu``; onnxruntime-genai reads the
``genai_config.json`` and the tokenizer that lie beside it. Exit status 1, with a reason, where it refuses the artifact,
where a token of ``LENGTH`` is another, or where the prompt's logits are further from those of the QDQ form than
``BOUNDS`` of the largest.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
MODEL: Final = ROOT / "examples" / "models" / "stdlib-llama"
PROMPT: Final = "def f(x):\n    return"
LENGTH: Final = 24
SPECS: Final = {"W8A8": {"weight": "int8/channel", "input": "int8/token/dynamic"}, "W4A16": {"weight": "int4/g32"}}
BOUNDS: Final = {"W8A8": 1e-4, "W4A16": 1e-4}


def main() -> int:
    """0 where all artifacts are served as they were compiled."""
    import torch
    from tokenizers import Tokenizer

    import graphq
    from graphq.runtime.model import CompiledModel

    ids: list[int] = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(PROMPT).ids
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as place, torch.inference_mode():
        for name, formats in SPECS.items():
            compiled = graphq.compile(MODEL, {"graphq": 1, "rules": [{"match": "kind:linear", **formats}]})
            form = CompiledModel(compiled.graph)  # the QDQ form, run by torch
            tokens = form.generate(torch.tensor([ids]), max_new_tokens=LENGTH, do_sample=False)[0].tolist()
            logits = form(torch.tensor([ids]))["logits"][0, -1]
            for profile in (None, "ort-cpu"):
                title = f"{name}, {profile or 'portable'}"
                folder = Path(place) / title
                compiled.emit("onnx", folder, profile=profile)
                found, theirs, prompt = served(folder, ids)
                error = float((torch.as_tensor(theirs) - logits).abs().max() / logits.abs().max())
                same = sum(a == b for a, b in zip(found, tokens, strict=False)) - len(ids)
                print(
                    f"{title}: {same} of {len(tokens) - len(ids)} tokens are the QDQ form's, logits within {error:.1e}"
                )
                if prompt != ids:
                    faults.append(f"{title}: the tokenizer gives {prompt}, not {ids}")
                if found != tokens:
                    faults.append(f"{title}: tokens {found}, not {tokens}")
                if not error <= BOUNDS[name]:
                    faults.append(f"{title}: logits {error:.1e} off, more than {BOUNDS[name]:.0e}")
    for fault in faults:
        print(fault, file=sys.stderr)
    return int(bool(faults))


def served(folder: Path, ids: list[int]) -> tuple[list[int], Any, list[int]]:
    """The tokens of a greedy search, the logits after the prompt, and the prompt as the served tokenizer encodes it."""
    import numpy as np
    import onnxruntime_genai  # pyright: ignore[reportMissingImports]

    model: Any = onnxruntime_genai.Model(str(folder))
    prompt = [int(one) for one in onnxruntime_genai.Tokenizer(model).encode(PROMPT)]
    settings: Any = onnxruntime_genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(ids) + LENGTH)
    generator: Any = onnxruntime_genai.Generator(model, settings)
    generator.append_tokens(np.array([ids], dtype=np.int32))
    logits = np.array(generator.get_output("logits"))[0, -1]
    while not generator.is_done():
        generator.generate_next_token()
    return [int(one) for one in generator.get_sequence(0)], logits, prompt


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
