"""A report's heat maps as a matplotlib figure, for notebooks."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from graphq.errors import GraphqError
from graphq.heat_map import Cell, heat_map

_INCHES: Final = 0.28  # a row or a column
_NAMED: Final = 60  # rows, more of which have every other name left out
_MAPS: Final[tuple[tuple[str, Callable[[Cell], float | None]], ...]] = (
    ("bits a weight", lambda cell: cell.bits),
    ("SQNR, dB", lambda cell: cell.sqnr_db),
    ("MB", lambda cell: cell.nbytes / 1e6),
)


def plot_rows(rows: Iterable[Mapping[str, Any]]) -> Any:
    """A ``matplotlib.figure.Figure`` of bits, error and bytes by block and role. Nothing is shown or written.

    Raises ``GraphqError`` where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise GraphqError("plot: matplotlib is not installed: pip install 'graphq[plots]'") from error
    found = heat_map(rows)
    height, width = (max(2.0, _INCHES * len(names)) for names in (found.rows, found.columns))
    figure: Any = Figure(figsize=(3 * (width + 2.5), min(height + 2.5, 200)), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(1, len(_MAPS), sharey=True), _MAPS, strict=True):
        table = [[float("nan")] * len(found.columns) for _ in found.rows]
        for (row, column), cell in found.cells.items():
            number = value(cell)
            table[row][column] = float("nan") if number is None else number
        image = axes.imshow(table, aspect="auto", interpolation="nearest", cmap="viridis")
        axes.set_title(title)
        axes.set_xticks(range(len(found.columns)), [_plain(name) for name in found.columns], rotation=90)
        step = -(-len(found.rows) // _NAMED) or 1
        axes.set_yticks(range(0, len(found.rows), step), [_plain(name) for name in found.rows[::step]])
        figure.colorbar(image, ax=axes)
    return figure


def _plain(name: str) -> str:
    """The name; a dollar sign would begin a formula."""
    return name.replace("$", r"\$")
