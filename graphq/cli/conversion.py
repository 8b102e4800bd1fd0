"""``convert``: a quantized checkpoint in another format."""

from pathlib import Path
from typing import Annotated

import typer

from graphq.cli.arguments import Debug, ForConsumer, Json, Option
from graphq.cli.errors import one_line_errors
from graphq.cli.printing import print_report
from graphq.cli.progress import shown_progress


@one_line_errors
def convert(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A directory whose weights are quantized, whoever wrote it.")
    ],
    target: Annotated[str, typer.Option(metavar="NAME", help="The format to write, compressed-tensors or ascend.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write it, a directory.")],
    consumer: ForConsumer = None,
    option: Option = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that stands in DIR.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a quantized checkpoint in another format, with the same codes. Specs are converted by spec convert."""
    from graphq.conversion import convert_checkpoint
    from graphq.files import check_place
    from graphq.lowering.targets import read_options

    if checkpoint.is_file():
        raise typer.BadParameter(
            f"{checkpoint} is a file; a spec is converted by graphq spec convert", param_hint="CHECKPOINT"
        )
    flags = [*(["overwrite=true"] if overwrite else []), *([f"consumer={consumer}"] if consumer else [])]
    options = read_options(target, [*flags, *(option or [])])
    check_place(out, overwrite, [checkpoint])
    with shown_progress(as_json):
        report = convert_checkpoint(checkpoint, target, out, **options)
    print_report(report, as_json)
    typer.echo(f"{out}: {target} artifact, with the codes of {checkpoint}", err=True)
