"""``report``: a quantized model on one page."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from graphq.cli.arguments import CalibrationField, Debug, ExampleInputs
from graphq.cli.errors import one_line_errors
from graphq.cli.models import example_inputs
from graphq.data.model_text import calibration_batches
from graphq.errors import TargetError

_FROM = "The JSON that graphq {} printed"


@one_line_errors
def report(
    given: Annotated[Path, typer.Argument(metavar="ARTIFACT|MODEL_DIR", help="An artifact, or a model with --spec.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Where to write the page, such as report.html.")
    ] = None,
    spec: Annotated[
        str | None, typer.Option(metavar="FILE|PRESET", help="How the model is quantized; an artifact has its own.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="MODEL_DIR", help="What the artifact is of, for histograms.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE|DIR", help="Text, for histograms of the inputs of layers.")
    ] = None,
    calibration_field: CalibrationField = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of it, fewer if the text ends before.")] = 8,
    sequence_length: Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens in a window.")] = 256,
    inputs: ExampleInputs = None,
    search: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"{_FROM.format('search --json')}: the front.")
    ] = None,
    evaluation: Annotated[
        list[Path] | None, typer.Option("--eval", metavar="FILE", help=f"{_FROM.format('eval --json')}, repeatable.")
    ] = None,
    diff: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"{_FROM.format('diff --json')}: errors of layers.")
    ] = None,
    command: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A command that the page shows, repeatable.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show a quantized model on one page of HTML, which needs nothing else: its plan by layer, errors, sizes,
    histograms, what was measured, files.
    """
    if out is None and not as_json:
        raise typer.BadParameter("none is given, and no --json", param_hint="--out")
    if out is not None and out.exists() and not overwrite:
        raise TargetError(f"{out}: exists already; remove it, or say --overwrite")
    from graphq.files import MANIFEST, write_text
    from graphq.pages.document import page_of, read_json
    from graphq.pages.html import to_html

    is_artifact = (given / MANIFEST).is_file()
    of = model if is_artifact else given
    tensors = example_inputs(inputs)
    batches = [] if tensors is None else [tensors]
    if calibration is not None:
        if of is None:
            raise typer.BadParameter("none is given, whose tokenizer reads the text", param_hint="--model")
        batches = list(calibration_batches(of, calibration, samples, sequence_length, calibration_field))
    made = page_of(
        given,
        spec,
        model=of,
        calibration=batches,
        inputs=tensors,
        search=None if search is None else read_json(search),
        evaluations=[read_json(file) for file in evaluation or ()],
        differences=None if diff is None else read_json(diff),
        commands=[*(command or ()), shlex.join(["graphq", *sys.argv[1:]])],
    )
    if out is not None:
        write_text(out, to_html(made), overwrite)
    if as_json:
        typer.echo(json.dumps(made.to_json(), indent=1, allow_nan=False))
