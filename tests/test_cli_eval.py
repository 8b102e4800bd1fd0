"""``graphq eval`` beside another model: agreement, text side by side, tasks; the same for every form of a model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import graphq
from graphq.data import evaluate, lm_eval_tasks
from tests.checkpoints import save_checkpoint, text
from tests.test_cli import graphq_

TARGETS = {"torch": {}, "onnx": {}, "compressed-tensors": {}, "ascend": {"consumer": "any"}}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(text(60))
    return file


@pytest.fixture(scope="module")
def artifacts(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    for target, options in TARGETS.items():
        graphq.compile(model, {"graphq": 1, "weight": "int8/channel"}, target=target).emit(
            target, folder / target, **options
        )
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_every_artifact_beside_its_model(target, model, words, artifacts):
    done = graphq_(
        *("eval", artifacts / target, "--against", model, "--text", words, "--sequence-length", 12),
        *("--generate", "w5 w9", "--tokens", 4, "--json"),
    )
    found = json.loads(done.stdout)
    assert found["perplexity"][0] == pytest.approx(found["perplexity"][1], rel=0.01)
    assert found["perplexity"][0] != found["perplexity"][1]
    assert 0 < found["agreement"]["kl"] < 1e-3
    assert found["agreement"]["top1"] > 0.9
    assert found["agreement"]["tokens"] == 12 * found["windows"] == 60
    (written,) = found["texts"]
    assert written["prompt"] == "w5 w9"
    assert len(written["texts"]) == 2
    assert [len(one.split()) for one in written["texts"]] == [4, 4]


def test_a_fault_in_a_checkpoint_is_seen(model, words, artifacts, tmp_path):
    folder = Path(shutil.copytree(artifacts / "ascend", tmp_path / "ascend"))
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj.weight_scale"
    save_file(tensors | {name: tensors[name] * 20}, file)
    done = graphq_("eval", folder, "--against", model, "--text", words, "--sequence-length", 12, "--json")
    assert json.loads(done.stdout)["agreement"]["kl"] > 0.01


def test_as_lines(model, words, artifacts):
    done = graphq_(
        *("eval", artifacts / "torch", "--against", model, "--text", words, "--sequence-length", 12),
        *("--generate", "w5", "--tokens", 2),
    )
    perplexity, agreement, parts, this, other = done.stdout.splitlines()
    assert perplexity.endswith(f" of {model} (5 windows of 12 tokens)")
    assert agreement.startswith("KL divergence ")
    assert agreement.endswith(" (60 tokens)")
    assert parts.startswith("'w5': ")
    assert (this[:11], other[:11]) == ("  this     ", "  against  ")


def test_a_model_beside_itself(model, words):
    done = graphq_("eval", model, "--against", model, "--text", words, "--sequence-length", 12, "--generate", "w5")
    assert "KL divergence 0, top-1 agreement 100.00% (60 tokens)" in done.stdout
    assert "'w5': both write the same" in done.stdout


def test_tasks_alone(model, artifacts, monkeypatch):
    asked: list[Any] = []

    def run_tasks(lm: Any, tasks: Any, limit: Any, shots: Any) -> Any:
        asked.append((type(lm.call).__name__, tasks, limit, shots))
        return {"mine": {"acc": 0.5 / len(asked), "acc_stderr": 0.1}}

    monkeypatch.setattr(lm_eval_tasks, "run_tasks", run_tasks)
    done = graphq_("eval", artifacts / "onnx", "--against", model, "--task", "mine", "--limit", 5)
    assert done.stdout == "mine: acc 0.5000, 0.2500\n"
    assert asked == [("OnnxSession", ["mine"], 5, None), ("LlamaForCausalLM", ["mine"], 5, None)]


def test_another_that_cannot_read_the_tokens(model, words, tmp_path):
    """What is compared reads the same tokens, or is refused by name, before anything runs."""
    other = save_checkpoint(tmp_path / "small", vocab_size=50)
    options = ("--text", words, "--sequence-length", 12)
    done = graphq_("eval", model, "--against", other, *options, status=1)
    assert done.stderr.startswith(f"{other}: the tokenizer gives token ")
    assert done.stderr.endswith(", the model knows 50\n")
    short = save_checkpoint(tmp_path / "short", max_position_embeddings=8)
    done = graphq_("eval", model, "--against", short, *options, status=1)
    assert done.stderr == f"{short}: a window of 12 tokens is longer than the 8 that it reads\n"
    done = graphq_("eval", other, "--generate", "w5 w90", status=1)
    assert done.stderr == f"{other}: the tokenizer gives token 92, the model knows 50\n"


def test_no_number_is_null_in_json(model, words, monkeypatch):
    monkeypatch.setattr(evaluate, "perplexity", lambda *_: float("inf"))
    done = graphq_("eval", model, "--text", words, "--sequence-length", 12, "--json")
    assert '"perplexity": [\n  null\n ]' in done.stdout
    assert graphq_("eval", model, "--text", words, "--sequence-length", 12).stdout.startswith("perplexity inf (")


def test_text_that_is_none(model):
    done = graphq_("eval", model, "--generate", "w1 \udcff", status=1)
    assert done.stderr == "prompt: not UTF-8 text: surrogates not allowed\n"


def test_options_of_tasks_without_any(model):
    for option in ("--limit", "--shots"):
        done = graphq_("eval", model, option, 3, "--windows", 1, status=2)
        assert f"Invalid value for {option}: is of tasks, and no --task is given" in done.stderr


def test_refused(model, artifacts):
    done = graphq_("eval", artifacts / "ascend", status=1)
    assert "--against MODEL_DIR reads it back into its model's graph" in done.stderr
    done = graphq_("eval", model, "--task", "nothing", status=1)
    assert "lm-eval" in done.stderr


def test_agreement_in_python(model):
    windows = torch.randint(0, 100, (3, 8), generator=torch.Generator().manual_seed(0))
    made: Any = graphq.compile(model, {"graphq": 1, "weight": "int4/channel"})
    from graphq.capture.hugging_face import load_model

    source: Any = load_model(model)
    found = evaluate.agreement(source, made, windows, batch_size=2)
    with torch.inference_mode():
        p, q = (m(windows).logits.double().log_softmax(-1) for m in (source, made))
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-6)
    assert found.top1 == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert found.tokens == 24
