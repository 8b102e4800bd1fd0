"""onnxruntime-genai serves ONNX language models: its Generator gives the greedy tokens of the QDQ form.

https://github.com/microsoft/onnxruntime-genai. Run by ``judges.py``, or as

    OMP_NUM_THREADS=1 .judges/genai/bin/python judges/run_genai.py

The language model of the examples is compiled and written, portable and for ``ort-cpu``; onnxruntime-genai reads the
``genai_config.json`` and the tokenizer that lie beside it. Exit status 1, with a reason, where it refuses the artifact,
where a token of ``LENGTH`` is another, or where the prompt's logits are further from those of the QDQ form than
``BOUND`` of the largest. Tiny models of ``FAMILIES`` are served, too: a sliding window, shared keys and values,
experts, biases in place of positions, types that onnxruntime-genai does not know.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for the tests' models

MODEL: Final = ROOT / "examples" / "models" / "stdlib-llama"
PROMPT: Final = "def f(x):\n    return"
LENGTH: Final = 24
SPECS: Final = {"W8A8": {"weight": "int8/channel", "input": "int8/token/dynamic"}, "W4A16": {"weight": "int4/g32"}}
BOUND: Final = 1e-4
FAMILIES: Final = ("gemma3", "qwen3", "mixtral", "gpt_oss", "opt", "gpt2", "bloom")


def main() -> int:
    """0 where all artifacts are served as they were compiled."""
    from tokenizers import Tokenizer

    import graphq
    from tests.models import tiny

    ids: list[int] = Tokenizer.from_file(str(MODEL / "tokenizer.json")).encode(PROMPT).ids
    faults: list[str] = []
    for name, formats in SPECS.items():
        compiled = graphq.compile(MODEL, {"graphq": 1, "rules": [{"match": "kind:linear", **formats}]})
        for profile in (None, "ort-cpu"):
            faults += judge(f"{name}, {profile or 'portable'}", compiled, profile, ids, PROMPT)
    for family in FAMILIES:
        compiled = graphq.compile(tiny(family), {"graphq": 1, "weight": "int8/channel"})
        faults += judge(family, compiled, None, [5, 9, 17, 33, 41, 77, 3], None)
    for fault in faults:
        print(fault, file=sys.stderr)
    return int(bool(faults))


def judge(title: str, compiled: Any, profile: str | None, ids: list[int], text: str | None) -> list[str]:
    """What is wrong with the artifact as it is served with a prompt; its tokenizer encodes ``text``. Prints a line."""
    import numpy as np
    import onnxruntime_genai  # pyright: ignore[reportMissingImports]
    import torch

    from graphq.runtime.model import CompiledModel

    form = CompiledModel(compiled.graph)  # the QDQ form, run by torch
    with torch.inference_mode():
        tokens = form.generate(torch.tensor([ids]), max_new_tokens=LENGTH, do_sample=False)[0].tolist()
        wanted = form(torch.tensor([ids]))["logits"][0, -1].numpy()
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        compiled.emit("onnx", Path(place) / "out", profile=profile)
        model: Any = onnxruntime_genai.Model(str(Path(place) / "out"))
        if text is not None:
            encoded = [int(one) for one in onnxruntime_genai.Tokenizer(model).encode(text)]
            faults += [f"{title}: the tokenizer gives {encoded}, not {ids}"] if encoded != ids else []
        settings: Any = onnxruntime_genai.GeneratorParams(model)
        settings.set_search_options(max_length=len(ids) + LENGTH)
        generator: Any = onnxruntime_genai.Generator(model, settings)
        generator.append_tokens(np.array([ids], dtype=np.int32))
        logits = np.array(generator.get_output("logits"))[0, -1]
        while not generator.is_done():
            generator.generate_next_token()
        found = [int(one) for one in generator.get_sequence(0)]
    error = float(np.abs(logits - wanted).max() / np.abs(wanted).max())
    same = sum(a == b for a, b in zip(found, tokens, strict=False)) - len(ids)
    print(
        f"{title}: {same} of {len(tokens) - len(ids)} tokens are the QDQ form's, logits within {error:.1e}", flush=True
    )
    faults += [f"{title}: tokens {found}, not {tokens}"] if found != tokens else []
    return faults + ([] if error <= BOUND else [f"{title}: logits {error:.1e} off, more than {BOUND:.0e}"])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
