"""``eval``: the perplexity of a model directory or of an artifact."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from graphq.cli.arguments import Debug, Length
from graphq.cli.errors import one_line_errors
from graphq.data.model_text import check_fit, file_windows
from graphq.errors import GraphError


@one_line_errors
def eval_(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR_OR_ARTIFACT", help="A model directory or an artifact.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Text, repeatable; default: modules of Python's standard library."),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows of text; default: 320, or all of the given text.")
    ] = None,
    sequence_length: Length = 256,
    debug: Debug = False,
) -> None:
    """Measure the perplexity of a causal language model: lower is better."""
    from graphq.data import evaluate

    call = _language_model(model)
    tokenizer = evaluate.load_tokenizer(model)
    if text:
        read = file_windows(tokenizer, text, sequence_length, windows)
    else:
        read = evaluate.standard_library_windows(tokenizer, count=windows or 320, length=sequence_length)
    check_fit(model, read)
    found = evaluate.perplexity(call, read)
    typer.echo(f"perplexity {found:.4f} ({len(read)} windows of {sequence_length} tokens)")


def _language_model(path: Path) -> Callable[..., Any]:
    """The causal language model in a model directory or an artifact. Raises ``GraphError`` for another model."""
    from graphq.artifacts import manifest

    if not (path / manifest.NAME).is_file():
        from graphq.capture.hugging_face import is_causal_lm, load_model

        loaded = load_model(path)
        if not is_causal_lm(loaded):
            raise GraphError(f"{path}: {type(loaded).__name__} is not a causal language model; it has no perplexity")
        return loaded
    described = manifest.read(path)
    source = manifest.source_of_artifact(path, described)
    if not source.is_causal_lm:
        raise GraphError(f"{path}: not a causal language model; it has no perplexity")
    from graphq.lowering.targets import target_named

    return target_named(str(described.get("target"))).open(path, source)
