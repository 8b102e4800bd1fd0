"""Progress on the standard error: a bar on a terminal, lines elsewhere, JSON lines beside a report in JSON."""

import json
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Final

import typer

from graphq.progress import Progress, listening

_EVERY: Final = 10.0  # seconds between lines


@contextmanager
def shown_progress(as_json: bool) -> Generator[None]:
    """What is done is shown while it lasts; what takes a few seconds alone has no lines."""
    if as_json or not sys.stderr.isatty():
        with listening(_lines((lambda step: json.dumps(step.to_json())) if as_json else str)):
            yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def tell(step: Progress) -> None:
            if step.kind not in tasks:
                tasks[step.kind] = bar.add_task(step.kind, total=step.total)
            bar.update(tasks[step.kind], completed=step.done)

        with listening(tell):
            yield


def _lines(text: Callable[[Progress], str]) -> Callable[[Progress], None]:
    """Writes a line for a step, at most one every ten seconds."""
    last = time.monotonic()

    def tell(step: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _EVERY or step.is_resumed:
            last = now
            typer.echo(text(step), err=True)

    return tell
