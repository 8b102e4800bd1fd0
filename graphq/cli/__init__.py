"""The command line: ``compile``, ``convert``, ``search``, ``explain``, ``spec``, ``dump``, ``eval``, ``diff``,
``report``, ``inspect``, ``verify`` and ``lint``.

Results go to the standard output, everything else to the standard error. Exit status: 0; 1 for errors, a line each;
2 for wrong usage; 130 when interrupted. Heavy libraries are imported when a command runs: ``--help`` answers at once.
"""

from typing import Annotated, Final

import typer

from graphq.cli.artifacts import inspect, verify
from graphq.cli.conversion import convert as convert_checkpoint
from graphq.cli.differences import diff
from graphq.cli.evaluation import eval_
from graphq.cli.lint import lint
from graphq.cli.models import compile_, dump, explain
from graphq.cli.pages import report
from graphq.cli.search import search
from graphq.cli.specs import convert, presets

app: Final = typer.Typer(
    help="Compile PyTorch models into quantized artifacts: any spec dialect in, any target out.",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """The ``graphq`` command."""
    app()


def _print_version(wanted: bool) -> None:
    """Graphq's version, and of each library that results depend on the one that is installed; none is imported."""
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        for name in ("graphq", "torch", "transformers", "onnxruntime"):
            try:
                typer.echo(f"{name} {version(name)}")
            except PackageNotFoundError:
                if name == "graphq":  # run from its sources
                    typer.echo("graphq, not installed")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print graphq's version, and torch's."),
    ] = False,
) -> None: ...


spec_app: Final = typer.Typer(help="Read and write specs.", no_args_is_help=True, rich_markup_mode=None)

app.command(name="compile")(compile_)  # in the order of ``--help``
app.command(name="convert")(convert_checkpoint)
app.command()(search)
app.command()(explain)
app.command()(dump)
app.command(name="eval")(eval_)
app.command()(diff)
app.command()(report)
app.command()(inspect)
app.command()(verify)
app.command()(lint)
app.add_typer(spec_app, name="spec")
spec_app.command()(convert)
spec_app.command()(presets)
