"""``spec convert`` and ``spec presets``: specs in other dialects, and those that have a name."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphq.cli.arguments import Debug, Dialect
from graphq.cli.errors import one_line_errors

if TYPE_CHECKING:
    from graphq.spec.match import Layer


@one_line_errors
def convert(
    spec: Annotated[str, typer.Argument(metavar="FILE|PRESET", help="A spec, in any dialect, or a preset.")],
    to: Annotated[str, typer.Option(metavar="DIALECT", help="The dialect to write, such as llmc.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write it; default: the standard output.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(metavar="MODEL_DIR", help="Where the rules cannot be said, name the layers of this model."),
    ] = None,
    adapt: Annotated[
        bool, typer.Option("--adapt", help="Round as the other tool does, with its options; a note tells each change.")
    ] = False,
    dialect: Dialect = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it exists.")] = False,
    debug: Debug = False,
) -> None:
    """Write a spec in another dialect. What that dialect cannot hold is an error that names it."""
    if Path(spec).is_dir():
        raise typer.BadParameter(
            f"{spec} is a directory; a checkpoint is converted by graphq convert", param_hint="FILE"
        )
    from graphq.files import write_text
    from graphq.frontends import convert_spec, load_spec

    parsed = load_spec(spec, dialect)
    found = convert_spec(parsed, to, None if model is None else _layers(model), adapt)
    for note in (*parsed.notes, *found.notes):
        typer.echo(f"note: {note}", err=True)
    if out is None:
        typer.echo(found.text, nl=False)
    else:
        write_text(out, found.text, overwrite)


@one_line_errors
def presets(debug: Debug = False) -> None:
    """List the presets: name, weight, input."""
    from graphq.frontends.presets import SCHEMES

    for name, (weight, activation) in SCHEMES.items():
        typer.echo(f"{name:12}  {weight:22}  {activation or 'float'}")


def _layers(model: Path) -> "dict[str, Layer]":
    """The layers of the model in a directory, whose weights are not read."""
    from graphq.compiler import capture
    from graphq.ir.layers import layers

    return layers(capture(model, weights=False))
