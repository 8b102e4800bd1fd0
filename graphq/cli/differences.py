"""``diff``: where two forms of a model differ, layer by layer."""

import json
from pathlib import Path
from typing import Annotated

import typer

from graphq.cli.arguments import CalibrationField, Debug, ExampleInputs, TrustRemoteCode
from graphq.cli.errors import one_line_errors
from graphq.cli.models import example_inputs
from graphq.data.model_text import calibration_batches

_HELP = "An artifact, a model directory, or a spec on the model: a file in any dialect, or a preset."


@one_line_errors
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help=f"The reference. {_HELP}")],
    b: Annotated[str, typer.Argument(metavar="B", help="What is compared with it; as for A.")],
    model: Annotated[
        Path | None,
        typer.Option(metavar="MODEL_DIR", help="What specs and artifacts are of, where neither A nor B is the model."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE|DIR", help="Text to compare on: a file, or all files in a directory.")
    ] = None,
    calibration_field: CalibrationField = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows of it, fewer if the text ends before.")] = 8,
    sequence_length: Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens in a window.")] = 256,
    inputs: ExampleInputs = None,
    worst: Annotated[int, typer.Option(min=0, help="Tokens of the largest errors kept of each layer.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one object.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Compare two forms of a model layer by layer, the largest local error first.

    With --inputs and no --calibration, the two are compared on the inputs.
    """
    from graphq.comparison.driver import diff
    from graphq.comparison.sides import kind_of

    directories = [Path(one) for one in (a, b) if kind_of(one) == "model"]
    place = model or (directories[0] if directories else None)
    given = example_inputs(inputs)
    if calibration is not None:
        if place is None:
            raise typer.BadParameter("none is given, whose tokenizer reads the text", param_hint="--model")
        batches = calibration_batches(place, calibration, samples, sequence_length, calibration_field)
    elif given is not None:
        batches = [given]
    else:
        raise typer.BadParameter("none is given, and no --inputs", param_hint="--calibration")
    found = diff(a, b, calibration=batches, model=model, inputs=given, trust_remote_code=trust_remote_code, worst=worst)
    typer.echo(json.dumps(found.to_json(), indent=1, allow_nan=False) if as_json else str(found))
