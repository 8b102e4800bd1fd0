"""What lm-eval asks of a model, a stand-in of lm-eval's asks here; ``judges/run_lm_eval.py`` has the real one."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from graphq.data.language_model import LanguageModel, language_model
from graphq.data.lm_eval_tasks import run_tasks
from graphq.errors import SpecError
from tests.checkpoints import WORDS, write_tokenizer
from tests.data.test_language_model import SUCCESSORS, Bigrams, walk


@pytest.fixture
def model(tmp_path: Path) -> LanguageModel:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 4, "eos_token_id": 1}))
    return language_model(Bigrams(), tmp_path)


class Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``lm_eval.simple_evaluate`` was given, and what it is to give."""
    held: dict[str, Any] = {"results": {"mine": {"alias": "mine", "acc,none": 0.5, "acc_stderr,none": "N/A"}}}

    def simple_evaluate(model: Any, **options: Any) -> Any:
        held.update(options, model=model)
        if held["results"] is None:
            raise ValueError("no such task\nat all")
        return {"results": held["results"]}

    class TaskManager:
        def __init__(self, **options: Any) -> None:
            held["manager"] = options

    def windows(tokens: list[int], prefix: int, longest: int, context: int) -> Any:
        held["windows"] = (tokens, prefix, longest, context)
        yield [prefix], tokens[:1]
        yield tokens[:1], tokens[1:]

    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.utils": {"get_rolling_token_windows": windows, "make_disjoint_window": lambda pair: pair},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.api": {},
        "lm_eval.api.model": {"TemplateLM": object},
    }
    for name, held_by in modules.items():
        made = types.ModuleType(name)
        vars(made).update(held_by)
        monkeypatch.setitem(sys.modules, name, made)
    sys.modules["lm_eval"].utils = sys.modules["lm_eval.utils"]  # pyright: ignore[reportAttributeAccessIssue]
    return held


def test_local_files_and_own_tasks(harness, model, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("task: mine\n")
    assert run_tasks(model, [str(file)], limit=3, shots=1) == {"mine": {"acc": 0.5}}
    assert harness["manager"] == {"include_path": [str(tmp_path)], "include_defaults": False}
    assert (harness["tasks"], harness["limit"], harness["num_fewshot"]) == (["mine"], 3, 1)
    run_tasks(model, ["arc_easy"])
    assert harness["manager"] == {"include_path": None, "include_defaults": True}


def test_what_the_model_answers(harness, model):
    run_tasks(model, ["any"])
    made, p = harness["model"], SUCCESSORS.double().log_softmax(-1)
    assert made.tok_encode(f"{WORDS[5]} {WORDS[7]}") == [5, 7]
    assert (made.prefix_token_id, made.eot_token_id) == (0, 1)
    (answer,) = made._loglikelihood_tokens([(("a", "b"), [5], [7])])
    assert answer == (pytest.approx(float(p[5, 7]), rel=1e-6), False)
    (rolled,) = made.loglikelihood_rolling([Request(" ".join(WORDS[i] for i in (5, 7, 9)))])
    assert harness["windows"] == ([5, 7, 9], 0, 4, 1)
    assert rolled == pytest.approx(float(p[0, 5] + p[5, 7] + p[7, 9]), rel=1e-6)
    (text,) = made.generate_until([Request(WORDS[5], {"until": ["\n"], "max_gen_toks": 3})])
    assert text.split() == [WORDS[i] for i in walk(5, 3)]
    with pytest.raises(ValueError, match="the task samples its text"):
        made.generate_until([Request(WORDS[5], {"do_sample": True})])


def test_refused(harness, model, tmp_path, monkeypatch):
    with pytest.raises(SpecError, match=r"gone\.yaml: no such file"):
        run_tasks(model, [str(tmp_path / "gone.yaml")])
    harness["results"] = None
    with pytest.raises(SpecError, match=r"tasks: one, two: lm-eval: no such task$"):
        run_tasks(model, ["one", "two"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SpecError, match=r"lm-eval is not installed: pip install 'graphq\[lm-eval\]'"):
        run_tasks(model, ["one"])
