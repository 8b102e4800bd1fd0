"""``search``: which of several formats each layer gets, within a budget."""

import json
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from graphq.cli.arguments import CalibrationField, Debug, Model
from graphq.cli.errors import one_line_errors
from graphq.data.model_text import calibration_batches, check_fit, file_windows
from graphq.errors import TargetError


@one_line_errors
def search(
    model: Model,
    options: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Presets, weight formats such as int3/asym/g64, or spec files, and float, with commas between.",
        ),
    ],
    calibration: Annotated[Path, typer.Option(metavar="FILE|DIR", help="Text to measure on.")],
    budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Such as 4.5bits, 600MB, 123456B or 1.2x-latency.")
    ] = None,
    max_drop: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="The smallest mix whose perplexity rises by no more, such as 0.5%."),
    ] = None,
    eval_text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Text for --max-drop; default: modules of Python's standard library."),
    ] = None,
    eval_windows: Annotated[int, typer.Option(min=1, help="Windows of it.")] = 64,
    calibration_field: CalibrationField = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of the calibration text.")] = 16,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 256,
    sensitivity: Annotated[
        str, typer.Option(metavar="NAME", help="gradient, output-error, or divergence (slow).")
    ] = "gradient",
    exchanges: Annotated[int, typer.Option(min=0, help="How many neighbours of the best mix are measured.")] = 16,
    rows: Annotated[int, typer.Option(min=1, help="Tokens at a time, for a budget of latency.")] = 1,
    scores: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keeps sensitivities: a search again measures what is new.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to write the spec; default: printed.")] = None,
    to: Annotated[str, typer.Option(metavar="DIALECT", help="The dialect to write it in.")] = "native",
    adapt: Annotated[bool, typer.Option("--adapt", help="As for spec convert.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it exists.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the layers' options, and what was measured, as JSON.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Choose a format for each layer, so that the model loses least within a budget, or is smallest for a loss."""
    from graphq.data import evaluate
    from graphq.files import write_text
    from graphq.frontends import DIALECTS, convert_spec
    from graphq.mixed_precision.driver import find

    if to not in DIALECTS:
        raise typer.BadParameter(f"{to!r} is not one of {', '.join(DIALECTS)}", param_hint="--to")
    if out is not None and out.exists() and not overwrite:
        raise TargetError(f"{out}: exists already; remove it, or say --overwrite")
    windows = None
    if max_drop is not None:
        tokenizer = evaluate.load_tokenizer(model)
        if eval_text:
            windows = file_windows(tokenizer, eval_text, sequence_length, eval_windows)
        else:
            windows = evaluate.standard_library_windows(tokenizer, count=eval_windows, length=sequence_length)
        check_fit(model, windows)
    found = find(
        model,
        options,
        budget,
        calibration=calibration_batches(model, calibration, samples, sequence_length, calibration_field),
        max_drop=max_drop,
        evaluate=windows,
        sensitivity=cast(Any, sensitivity),
        exchanges=exchanges,
        rows=rows,
        scores=scores,
        seed=seed,
    )
    written = convert_spec(found.spec, to, found.layers, adapt)
    for note in (*found.spec.notes, *written.notes):
        typer.echo(f"note: {note}", err=True)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1, allow_nan=False))
    elif out is not None:
        for line in found.lines():
            typer.echo(line)
    else:
        typer.echo(written.text, nl=False)
    if out is not None:
        write_text(out, written.text, overwrite)
