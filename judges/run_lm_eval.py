"""lm-eval runs its tasks with compiled models, offline, and finds them as good as transformers' float model.

https://github.com/EleutherAI/lm-evaluation-harness, ``lm_eval.models.huggingface.HFLM``. Run by ``judges.py``, or as

    OMP_NUM_THREADS=1 .judges/lm-eval/bin/python judges/run_lm_eval.py [MODEL_DIR]

MODEL_DIR: a small causal language model of Python code; default: examples/models/stdlib-llama. Three local tasks are
written into a temporary folder: multiple choice by log-likelihood, rolling perplexity, and generation until a stop
word. The float model, W8A8, W4A16 and a loaded W4A16 artifact run them. Exit status 1, with a reason, where a number of
a compiled model is further from the float model's than the bounds below, or an artifact differs from its model, or
``graphq eval --task`` gives other numbers for the model directory than lm-eval's own model does.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

MODEL: Final = Path(__file__).parents[1] / "examples" / "models" / "stdlib-llama"
CHOICES: Final = (
    ("import os\nimport ", ["sys", "banana", "def"], 0),
    ("def __init__(", ["elephant", "self", "return"], 1),
    ("    if x is not ", ["None", "while", "import"], 0),
    ("    raise ValueError", ["[", "(", "@"], 1),
    ("class Error(", ["for", "in", "Exception"], 2),
    ("for key, value in self.items", ["()", "[]", "{}"], 0),
    ("    return self.", ["_", "(", "]"], 0),
    ("    try:\n        value = int(value)\n    ", ["except", "import", "class"], 0),
)
TEXTS: Final = (
    "def copy(self):\n    return self.__class__(self)\n",
    "import os\nimport sys\n\n\nclass Error(Exception):\n    pass\n",
    "    if not isinstance(other, type(self)):\n        return NotImplemented\n",
    "for name in sorted(names):\n    print(name)\n",
)
TASKS: Final[dict[str, dict[str, Any]]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "bypass"}],
    },
}
PERPLEXITY_WITHIN: Final = {"w8a8": 0.01, "w4a16": 0.02}  # of the float model's, relative, by byte
ACCURACY_WITHIN: Final = 0.26  # two of eight questions


def write_tasks(folder: Path) -> None:
    """The tasks as lm-eval reads them, and their documents."""
    rows = {
        "choices": [{"text": text, "choices": options, "label": label} for text, options, label in CHOICES],
        "rolling": [{"text": text} for text in TEXTS],
        "writing": [{"text": text.split("\n")[0] + "\n"} for text in TEXTS],
    }
    for name, task in TASKS.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        said = {"task": name, "dataset_path": "json", "test_split": "test", **task}
        said["dataset_kwargs"] = {"data_files": {"test": str(file)}}
        (folder / f"{name}.yaml").write_text(json.dumps(said))  # JSON is YAML


def measure(model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Accuracy, perplexity by byte, and the texts written."""
    import lm_eval  # pyright: ignore[reportMissingImports]
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    judge = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    found: Any = lm_eval.simple_evaluate(judge, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)
    return {
        "accuracy": found["results"]["choices"]["acc,none"],
        "perplexity": found["results"]["rolling"]["byte_perplexity,none"],
        "texts": [sample["resps"][0][0] for sample in found["samples"]["writing"]],
    }


def of_graphq(directory: Path, folder: Path) -> dict[str, Any]:
    """Accuracy and perplexity by byte, by ``graphq eval``."""
    from graphq.capture.hugging_face import load_model
    from graphq.data.language_model import language_model
    from graphq.data.lm_eval_tasks import run_tasks

    files = [str(folder / f"{name}.yaml") for name in ("choices", "rolling")]
    found = run_tasks(language_model(load_model(directory), directory), files)
    return {"accuracy": found["choices"]["acc"], "perplexity": found["rolling"]["byte_perplexity"]}


def main(directory: Path) -> list[str]:
    """A line for each thing that is wrong."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import graphq

    tokenizer = AutoTokenizer.from_pretrained(directory)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        write_tasks(folder)
        source = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        expected = measure(source, tokenizer, folder)
        print("float", expected)
        own = of_graphq(directory, folder)
        print("graphq eval", own)
        if not all(abs(value / expected[name] - 1) <= 1e-5 for name, value in own.items()):
            wrong.append(f"graphq eval gives {own}, lm-eval {expected}")
        for preset, within in PERPLEXITY_WITHIN.items():
            compiled = graphq.compile(directory, preset)
            found = measure(compiled, tokenizer, folder)
            print(preset, found)
            ratio = found["perplexity"] / expected["perplexity"]
            if not abs(ratio - 1) <= within:
                wrong.append(f"{preset}: perplexity {ratio:.4f} times the float model's, not within {within}")
            if not abs(found["accuracy"] - expected["accuracy"]) <= ACCURACY_WITHIN:
                wrong.append(f"{preset}: accuracy {found['accuracy']}, the float model's {expected['accuracy']}")
            if not any(found["texts"]):
                wrong.append(f"{preset}: nothing was written")
            compiled.save(folder / preset)
            loaded = measure(graphq.load(folder / preset), tokenizer, folder)
            if loaded != found:
                wrong.append(f"{preset}: the artifact gives {loaded}, the compiled model {found}")
    return wrong


if __name__ == "__main__":
    problems = main(Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL)
    print("\n".join(problems) or "lm-eval: as good as the float model, within the bounds")
    sys.exit(1 if problems else 0)
