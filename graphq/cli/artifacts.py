"""``inspect`` and ``verify``: what is done with an artifact."""

import json
from pathlib import Path
from typing import Annotated

import typer

from graphq.cli.arguments import Debug
from graphq.cli.errors import fail, one_line_errors
from graphq.errors import printable

Artifact = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A directory that graphq compile wrote.")]
Inspected = Annotated[
    Path,
    typer.Argument(metavar="ARTIFACT", help="A directory that graphq compile wrote, or another quantized checkpoint."),
]


@one_line_errors
def inspect(
    artifact: Inspected,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one object.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Also show what computes each layer here, of a torch artifact, and why.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Show what an artifact holds: layers and their formats, source, spec, versions, files. Loads no weights."""
    from graphq.artifacts.inspect import aligned, inspect
    from graphq.files import MANIFEST
    from graphq.lowering.checkpoints.ascend.read import DESCRIPTION
    from graphq.lowering.checkpoints.inspect import inspect_checkpoint

    others = ("config.json", DESCRIPTION)
    is_other = not (artifact / MANIFEST).exists() and any((artifact / name).is_file() for name in others)
    found = inspect_checkpoint(artifact) if is_other else inspect(artifact)
    chosen: dict[str, str] = {}
    if kernels:
        from graphq.lowering.torch.module import load

        chosen = load(artifact, verify=False).kernels  # which leaves large weights in their file
    if as_json:
        typer.echo(json.dumps(found.to_json() | ({"kernels": chosen} if kernels else {}), indent=1))
        return
    typer.echo(str(found))
    if kernels:
        typer.echo("\n".join(["", *aligned([("layer", "computed here by"), *chosen.items()])]))


@one_line_errors
def verify(
    artifact: Artifact,
    against: Annotated[
        Path | None,
        typer.Option(metavar="MODEL_DIR", help="Compare with this model, whose weights are folded or rounded anew."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Compare an artifact's integers, scales and files, bit for bit, with what was compiled. Exit 1 on a difference."""
    from graphq.verifier import verify

    found = verify(artifact, against)
    for line in (*found.differences, *(f"note: {note}" for note in found.notes)):
        typer.echo(printable(line))
    if not found.ok:
        fail(f"{artifact}: {len(found.differences)} differences from what was compiled")
    place = printable(str(artifact))
    typer.echo(f"{place}: {found.compared} tensors of codes, scales and zero points are as they were compiled")
