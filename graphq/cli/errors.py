"""A command's exceptions as lines on the standard error and an exit status."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Final, NoReturn, ParamSpec, TypeVar

import typer

from graphq.errors import GraphqError, PassError, printable

P = ParamSpec("P")
T = TypeVar("T")

_REPORT: Final = "please report it, with the traceback that --debug shows"


def one_line_errors(command: Callable[P, T]) -> Callable[P, T]:
    """``command`` with its exceptions turned into lines on the standard error and an exit status."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise  # typer's own
        except KeyboardInterrupt as error:
            fail("\n".join(["interrupted", *notes_of(error)]), 130)
        except Exception as error:
            if kwargs.get("debug"):
                raise
            fail("\n".join([_in_words(error), *notes_of(error)]))

    return run


def notes_of(error: BaseException) -> list[str]:
    """What was added to an error that the user should know."""
    return list(getattr(error, "__notes__", ()))


def _in_words(error: Exception) -> str:
    match error:
        case PassError():
            return f"internal error: {error}; {_REPORT}"
        case GraphqError():
            return str(error)
        case OSError(filename=str() | bytes() | Path()):
            return f"{error.filename}: {error.strerror}"
        case _:
            first = (str(error).strip().splitlines() or [""])[0]
            return f"internal error: {type(error).__name__}: {first}; {_REPORT}"


def fail(text: str, status: int = 1) -> NoReturn:
    """``text`` stands on the standard error, line by line, and the command ends with ``status``."""
    for line in text.split("\n"):
        typer.echo(printable(line), err=True)
    raise typer.Exit(status)
