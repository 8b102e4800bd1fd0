"""Numbers that a spec may hold, and how its text form writes them."""

from typing import Final

from graphq.errors import SpecError

MAX_SIZE: Final = 10**9 - 1  # what the text form writes, in nine digits


def check_size(size: object, name: str = "group_size") -> None:
    """Raises ``SpecError`` that names it for what is no positive integer that the text form holds."""
    if type(size) is not int or not 0 < size <= MAX_SIZE:
        raise SpecError(f"{name}: {size!r} is not a positive integer")


def check_share(name: str, value: object, above: float, up_to: float) -> None:
    """Raises ``SpecError`` that names it for what is no number above ``above`` and up to ``up_to``."""
    if not (isinstance(value, float | int) and not isinstance(value, bool) and above < value <= up_to):
        raise SpecError(f"{name}: {value!r} is not a number above {above:g} and up to {up_to:g}")


def number_text(value: float) -> str:
    """The number; without a fraction where it has none."""
    return repr(int(value)) if value == int(value) else repr(value)


def suffix(value: float, default: float) -> str:
    """The number where it is not the default, which the text form leaves out."""
    return "" if value == default else number_text(value)
