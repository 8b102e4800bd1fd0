"""lm-eval takes a compiled model, and a loaded artifact, for a transformers model: one task, without a network.

https://github.com/EleutherAI/lm-evaluation-harness, ``lm_eval.models.huggingface.HFLM``. The task gives a line of
Python and four lines that may follow; both forms of the model score alike, and better than chance.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import lm_eval  # pyright: ignore[reportMissingImports]
from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
from transformers import AutoTokenizer

import graphq

MODEL: Final = Path(__file__).resolve().parents[1] / "examples" / "models" / "stdlib-llama"
ROWS: Final = (
    ("def size(self):\n", "    return len(self)", "import", "else:", "x = = 3"),
    ("try:\n    import json\n", "except ImportError:", "    except in json", "def try(", "json.json.json"),
    ("for key in self.keys():\n", "    yield key", "class yield", "from for", ") ) )"),
    ("import os\n", "import sys", "    return", "os os os", "else:"),
)
TASK: Final = """\
task: next_line
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def accuracy(model: Any, folder: Path) -> float:
    """The share of lines that the model tells from three others."""
    lm = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(MODEL), batch_size=2, max_length=256)
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(model=lm, tasks=["next_line"], task_manager=tasks, bootstrap_iters=0)
    assert found is not None
    return float(found["results"]["next_line"]["acc,none"])


def main() -> int:
    """0 where both forms run, agree, and are better than chance."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [json.dumps({"text": text, "choices": choices}) for text, *choices in ROWS]
        (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        (folder / "next_line.yaml").write_text(TASK.format(file=folder / "rows.jsonl"), encoding="utf-8")
        compiled = graphq.compile(MODEL, "w8a16")
        compiled.save(folder / "artifact")
        scores = [accuracy(model, folder) for model in (compiled, graphq.load(folder / "artifact"))]
    print(f"accuracy: compiled {scores[0]}, loaded {scores[1]}; chance is 0.25")
    return int(not scores[0] == scores[1] > 0.25)


if __name__ == "__main__":
    sys.exit(main())
