"""The errors a user can meet. Each message names the key, the layer or the file, and what to do about it."""

from collections.abc import Sequence
from typing import final


def printable(text: str) -> str:
    """``text`` as one line that a terminal shows and does not obey: control characters, line breaks, lone surrogates
    and whatever else is not printable are escaped as Python writes them.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class GraphqError(Exception):
    """Every error graphq raises on purpose; the command line prints its lines and exits 1."""


@final
class SpecError(GraphqError):
    """What the user asked for cannot be: the spec, its calibration data, or an option.

    ``problems`` holds one line a problem (``path:key: message``); all problems of a file are reported at once.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class GraphError(GraphqError):
    """A model graphq cannot handle; names the layer and, where there is one, the user's own source line."""


@final
class TargetError(GraphqError):
    """A limit of an artifact's format or place; names the layer or the file."""


@final
class PassError(GraphqError):
    """A defect of graphq itself: a pass broke an invariant it promised to keep."""
