"""``lint``: what a consumer runs in integers of an ONNX model."""

import json
from pathlib import Path
from typing import Annotated

import typer

from graphq.cli.arguments import Debug
from graphq.cli.errors import one_line_errors
from graphq.errors import printable


@one_line_errors
def lint(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An .onnx file, or a directory with model.onnx.")],
    profile: Annotated[str, typer.Option(metavar="NAME", help="The consumer, such as ort-cpu or openvino.")],
    run: Annotated[
        bool, typer.Option("--run", help="Execute it, too (ort-cpu, openvino), and say what ran in integers.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one object.")] = False,
    debug: Debug = False,
) -> None:
    """Show each op that a consumer will not run in integers, with the rule that it breaks, the tensor, and what mends
    it. Any tool's QDQ model. Exit 1 where there is one, or where an op ran otherwise than predicted.
    """
    from graphq.linter.lint import lint

    found = lint(model, profile, run)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        for line in str(found).splitlines():
            typer.echo(printable(line))
    if not found.ok:
        raise typer.Exit(1)
