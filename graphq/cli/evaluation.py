"""``eval``: how good a language model in a directory or an artifact is, by itself and beside another."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphq.cli.arguments import Debug, Length
from graphq.cli.errors import one_line_errors
from graphq.data.model_text import check_fit, file_windows
from graphq.errors import GraphError, TargetError, printable

if TYPE_CHECKING:
    from torch import Tensor

    from graphq.data.language_model import LanguageModel


@one_line_errors
def eval_(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR_OR_ARTIFACT", help="A model directory or an artifact.")],
    against: Annotated[
        Path | None,
        typer.Option(metavar="MODEL_DIR_OR_ARTIFACT", help="Compare with this, such as the float model."),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Text, repeatable; default: modules of Python's standard library."),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows of text; default: 320, or all of the given text.")
    ] = None,
    sequence_length: Length = 256,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME|FILE", help="A task of lm-eval, or a YAML file with one, repeatable."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task; default: all.")] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="Examples in front of each; default: the task's.")] = None,
    generate: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Continue this text, word for word likeliest, repeatable.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to continue it by.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one object.")] = False,
    debug: Debug = False,
) -> None:
    """Measure a causal language model: perplexity (lower is better), tasks of lm-eval, text, and how far it agrees
    with another.

    With --task or --generate and neither --text nor --windows, no perplexity is measured.
    """
    from graphq.data import evaluate
    from graphq.data.language_model import language_model

    for option, value in (("--limit", limit), ("--shots", shots)):
        if value is not None and not task:
            raise typer.BadParameter("is of tasks, and no --task is given", param_hint=option)
    calls = [(model, _language_model(model, against))]
    if against is not None:
        calls.append((against, _language_model(against, None)))
    found: dict[str, Any] = {"model": str(model), "against": None if against is None else str(against)}
    lines: list[str] = []
    if text or windows or not (task or generate):
        read = _windows(model, text, windows, sequence_length)
        for path, _ in calls:
            check_fit(path, read)
        numbers = [evaluate.perplexity(call, read) for _, call in calls]
        found |= {
            "perplexity": _finite(numbers),
            "windows": len(read),
            "sequence_length": sequence_length,
        }
        beside = f", {numbers[1]:.4f} of {against}" if against is not None else ""
        lines.append(f"perplexity {numbers[0]:.4f}{beside} ({len(read)} windows of {sequence_length} tokens)")
        if against is not None:
            agreement = evaluate.agreement(calls[1][1], calls[0][1], read)
            found["agreement"] = agreement.to_json()
            lines.append(str(agreement))
    if task or generate:
        models = [language_model(call, path) for path, call in calls]
        measured, told = _tasks(models, task or [], limit, shots)
        found["tasks"] = {name: {key: _finite(x) for key, x in row.items()} for name, row in measured.items()}
        found["texts"], written = _texts(models, generate or [], tokens)
        lines += told + written
    for line in [json.dumps(found, indent=1, allow_nan=False)] if as_json else map(printable, lines):
        typer.echo(line)


def _finite(numbers: list[float]) -> list[float | None]:
    """The numbers as JSON has them, which knows no others."""
    return [one if math.isfinite(one) else None for one in numbers]


def _windows(model: Path, text: list[Path] | None, count: int | None, length: int) -> "Tensor":
    from graphq.data import evaluate

    tokenizer = evaluate.load_tokenizer(model)
    if text:
        read = file_windows(tokenizer, text, length, count)
    else:
        read = evaluate.standard_library_windows(tokenizer, count=count or 320, length=length)
    return read


def _tasks(
    models: "list[LanguageModel]", tasks: list[str], limit: int | None, shots: int | None
) -> tuple[dict[str, dict[str, list[float]]], list[str]]:
    """The metrics of each task, of each model; and a line for each."""
    if not tasks:
        return {}, []
    from graphq.data.lm_eval_tasks import run_tasks

    results = [run_tasks(model, tasks, limit, shots) for model in models]
    found = {
        name: {metric: [one[name][metric] for one in results] for metric in metrics}
        for name, metrics in results[0].items()
    }
    lines = [
        f"{name}: {metric} {', '.join(f'{value:.4f}' for value in values)}"
        for name, metrics in found.items()
        for metric, values in metrics.items()
        if "_stderr" not in metric
    ]
    return found, lines


def _texts(models: "list[LanguageModel]", prompts: list[str], tokens: int) -> tuple[list[dict[str, Any]], list[str]]:
    """What each model writes behind each prompt; and lines that show where two of them part."""
    found: list[dict[str, Any]] = []
    lines: list[str] = []
    for prompt in prompts:
        texts = [model.continued(prompt, tokens) for model in models]
        found.append({"prompt": prompt, "texts": texts})
        if len(texts) == 1:
            lines.append(f"{prompt!r}: {texts[0]!r}")
            continue
        same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
        where = "both write the same" if texts[0] == texts[1] else f"they part after {same} characters"
        lines += [f"{prompt!r}: {where}", f"  this     {texts[0]!r}", f"  against  {texts[1]!r}"]
    return found, lines


def _language_model(path: Path, source_model: Path | None) -> Callable[..., Any]:
    """The causal language model in a model directory or an artifact. An artifact that nothing here runs is read back
    into the graph of ``source_model``. Raises ``GraphError`` for another model.
    """
    from graphq.artifacts import manifest

    if not (path / manifest.NAME).is_file():
        from graphq.capture.hugging_face import load_model
        from graphq.capture.language_models import is_causal_lm

        loaded = load_model(path)
        if not is_causal_lm(loaded):
            raise GraphError(f"{path}: {type(loaded).__name__} is not a causal language model; it has no perplexity")
        return loaded
    described = manifest.read(path)
    source = manifest.source_of_artifact(path, described)
    if not source.is_causal_lm:
        raise GraphError(f"{path}: not a causal language model; it has no perplexity")
    from graphq.lowering.targets import target_named

    if described.get("target") == "ascend":
        if source_model is None or (source_model / manifest.NAME).is_file():
            raise TargetError(f"{path}: runs on an NPU; --against MODEL_DIR reads it back into its model's graph")
        return _read_back(path, source_model)
    return target_named(str(described.get("target"))).open(path, source)


def _read_back(path: Path, model: Path) -> Callable[..., Any]:
    """What the artifact holds, in the graph of the model that it is of."""
    import torch

    from graphq.comparison.sides import Sources, artifact_side
    from graphq.lowering.torch.pack import pack
    from graphq.runtime.model import CompiledModel

    side = artifact_side(path, Sources(model, [torch.zeros(1, 2, dtype=torch.int64)]))
    return CompiledModel(pack(side.graph)).eval()
