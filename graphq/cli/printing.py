"""A report on the standard output: a table on a terminal, aligned text elsewhere, or JSON."""

import json
import sys
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from graphq.report import Report


def print_report(report: "Report", as_json: bool) -> None:
    """``report`` stands on the standard output; its notes, for which the JSON has no place, on the standard error.

    In JSON, what a compile took stands under ``phases``.
    """
    if as_json:
        phases = [phase.to_json() for phase in report.phases]
        typer.echo(json.dumps(report.to_json() | ({"phases": phases} if phases else {}), indent=1, allow_nan=False))
        for note in report.notes:
            typer.echo(f"note: {note}", err=True)
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        from graphq.ir.cache_plans import lines_of

        header, *rows = report.table()
        table = Table(*header, box=None, header_style="bold")
        for row in rows:
            table.add_row(*map(Text, row))
        console = Console()
        console.print(table)
        for line in lines_of(report.caches):
            console.print(Text(line))
        for note in report.notes:
            console.print(Text(f"note: {note}"))
    else:
        typer.echo(str(report))
