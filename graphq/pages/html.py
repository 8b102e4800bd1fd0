"""A page as one file of HTML: no script, no font, no picture from elsewhere; it opens without a network.

It is well-formed XML, too, and its policy forbids browsers to load anything. Names of layers, notes and specs are text
of the user's, or of whoever made the checkpoint: all of it is escaped.
"""

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from graphq.errors import SpecError, printable
from graphq.heat_map import Cell, HeatMap, heat_map, place_of, plan_of
from graphq.pages.document import Page
from graphq.pages.svg import front_svg, histogram_svg

_STYLE: Final = """
body{font:14px/1.4 system-ui,sans-serif;margin:1.5rem;color:#222;background:#fff}
h1{font-size:1.4rem}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse}th,td{padding:.15rem .5rem;text-align:left;vertical-align:top}
th{font-weight:600}thead th{position:sticky;top:0;background:#fff}
.num{text-align:right;font-variant-numeric:tabular-nums}
.map{overflow:auto;max-height:80vh;border:1px solid #ddd}
.map td{text-align:right;border:1px solid #fff;font-size:12px;font-variant-numeric:tabular-nums}
.map tbody th{position:sticky;left:0;background:#fff;font-weight:400;white-space:nowrap}
.map td.float{color:#777;background:#f2f2f2}
details{margin:.3rem 0}summary{cursor:pointer}
pre,code{font:12px/1.4 ui-monospace,monospace}pre{background:#f6f6f6;padding:.6rem;overflow:auto}
figure{display:inline-block;margin:.3rem .8rem .3rem 0}figcaption{font-size:12px;max-width:220px;overflow-wrap:anywhere}
svg{background:#fafafa}.bars{fill:#4878a8}.out{fill:#f3dcd6}.ends{stroke:#b03020;stroke-width:1.5;fill:none}
.front{fill:none;stroke:#4878a8}circle{fill:#4878a8}
"""
_POLICY: Final = "default-src 'none'; style-src 'unsafe-inline'"


def to_html(page: Page) -> str:
    """The page."""
    parts = [
        f"<h1>{_text(page.title)}</h1>",
        _table((), page.facts),
        *_maps(page),
        *_foreign("eval", lambda: _evaluations(page.evaluations)),
        *_foreign("search", lambda: _search(page.search)),
        *_foreign("diff", lambda: _layers(page)),
        "<h2>Spec</h2>",
        f"<pre>{_text(page.spec, keep_lines=True)}</pre>",
        *_files(page.files),
    ]
    if page.commands:
        lines = "\n".join(_text(command) for command in page.commands)
        parts += ["<h2>Commands</h2>", f"<pre>{lines}</pre>"]
    if page.notes:
        parts += ["<h2>Notes</h2>", f"<ul>{''.join(f'<li>{_text(note)}</li>' for note in page.notes)}</ul>"]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html xmlns="http://www.w3.org/1999/xhtml" lang="en">',
            '<head><meta charset="utf-8"/>',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>',
            f"<title>{_text(page.title)}</title>",
            f"<style>{_STYLE}</style></head>",
            "<body>",
            *parts,
            "</body></html>",
            "",
        ]
    )


def _foreign(command: str, draw: Callable[[], list[str]]) -> list[str]:
    """What is drawn of a command's JSON. Raises ``SpecError`` where that is not what the command prints."""
    try:
        return draw()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise SpecError(f"{command}: not what graphq {command} --json prints: {reason}") from error


def _text(value: object, keep_lines: bool = False) -> str:
    """The text with what is markup, or not printable, escaped."""
    lines = str(value).split("\n") if keep_lines else [str(value)]
    return "\n".join(html.escape(printable(line)) for line in lines)


def _table(header: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    """Rows of cells; the places ``numbers`` hold numbers. Without a header the first cell of a row is one."""
    found: list[str] = []
    for row in rows:
        cells = [
            f'<td class="num">{_text(cell)}</td>' if i in numbers else f"<td>{_text(cell)}</td>"
            for i, cell in enumerate(row)
        ]
        if not header and row:
            cells[0] = f'<th scope="row">{_text(row[0])}</th>'
        found.append(f"<tr>{''.join(cells)}</tr>")
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in header)
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if header else ''}<tbody>{''.join(found)}</tbody></table>"


# -- heat maps


def _maps(page: Page) -> list[str]:
    found = heat_map(page.rows)
    largest = max((cell.nbytes for cell in found.cells.values() if not cell.is_float), default=0)
    unit, name = (1e6, "MB") if largest >= 1e6 else (1e3, "kB")
    return [
        *_map(found, "Bits for each weight, scales included", lambda cell: cell.bits, "{:.2f}", 16.0),
        *_map(found, "Error: signal to noise ratio of the weights, dB (the lowest in a cell)", _ratio, "{:.1f}", None),
        *_map(found, f"Size, {name}", lambda cell: cell.nbytes / unit, "{:.3g}", None),
    ]


def _ratio(cell: Cell) -> float | None:
    return cell.sqnr_db


def _map(found: HeatMap, title: str, value: Callable[[Cell], float | None], form: str, most: float | None) -> list[str]:
    """A table with a colour for each number: the redder, the fewer bits, the lower the ratio, the fewer bytes."""
    numbers = {place: value(cell) for place, cell in found.cells.items()}
    quantized = [numbers[place] for place, cell in found.cells.items() if not cell.is_float]
    known = [one for one in quantized if one is not None and math.isfinite(one)]
    if not known:
        return []
    low, high = (0.0 if most else min(known)), most or max(known)
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in found.columns)
    body: list[str] = []
    for i, row in enumerate(found.rows):
        cells: list[str] = []
        for j in range(len(found.columns)):
            cell, number = found.cells.get((i, j)), numbers.get((i, j))
            if cell is None:
                cells.append("<td></td>")
                continue
            about = f"{cell.layers} x {', '.join(cell.plans)}" if cell.layers > 1 else ", ".join(cell.plans)
            text = "" if number is None else form.format(number)
            if cell.is_float:
                cells.append(f'<td class="float" title="{_text(about)}">{text or "float"}</td>')
            else:
                style = "" if number is None else f' style="background:{_colour(number, low, high)}"'
                cells.append(f'<td title="{_text(about)}"{style}>{text}</td>')
        body.append(f'<tr><th scope="row">{_text(row)}</th>{"".join(cells)}</tr>')
    return [
        f"<h2>{_text(title)}</h2>",
        f'<div class="map"><table><thead><tr><td></td>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>',
    ]


def _colour(value: float, low: float, high: float) -> str:
    """From red over yellow to blue, all light enough for black text."""
    share = 0.0 if high <= low else min(max((value - low) / (high - low), 0.0), 1.0)
    return f"hsl({10 + 200 * share:.0f} 70% 78%)"


# -- what was measured


def _evaluations(found: Sequence[Mapping[str, Any]]) -> list[str]:
    rows: list[tuple[object, ...]] = []
    for one in found:
        name = one["model"]
        for value, of in zip(one.get("perplexity") or (), (name, one.get("against")), strict=False):
            rows.append((of, "perplexity", _measured(value)))
        agreement = one.get("agreement") or {}
        rows += [
            (name, f"{key} beside {one.get('against')}", f"{value:.6g}")
            for key, value in agreement.items()
            if value is not None
        ]
        for task, metrics in (one.get("tasks") or {}).items():
            for metric, values in metrics.items():
                for value, of in zip(values, (name, one.get("against")), strict=False):
                    rows.append((of, f"{task}: {metric}", _measured(value)))
    return ["<h2>Evaluation</h2>", _table(("model", "measure", "value"), rows, (2,))] if rows else []


def _measured(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"  # as JSON has it


def _search(search: Mapping[str, Any] | None) -> list[str]:
    if search is None:
        return []
    parts = ["<h2>Search</h2>"]
    if search["front"]:
        chosen = [group["options"][group["option"]]["size"] for group in search["groups"]]
        parts.append(f"<figure>{front_svg(search['front'], sum(chosen))}")
        parts.append(
            "<figcaption>size and predicted loss of the best mixes; the line: the chosen one</figcaption></figure>"
        )
    rows = [
        (one["origin"], f"{one['size']:,.0f}", "" if one["loss"] is None else f"{one['loss']:.6g}")
        for one in search["trials"]
    ]
    return [*parts, _table(("mix", "size", "measured loss"), rows, (1, 2))]


# -- layers


def _layers(page: Page) -> list[str]:
    beside = {one["layer"]: one for one in (page.differences or {}).get("layers", ())}
    blocks: dict[str, list[Mapping[str, Any]]] = {}
    for row in page.rows:
        blocks.setdefault(place_of(row["layer"])[0], []).append(row)
    names = set(page.weights) | set(page.activations)
    header = [
        "layer",
        "plan",
        "rule",
        "bytes",
        "SQNR dB",
        *(["local dB", "cumulative dB", "clipped"] if beside else []),
    ]
    parts = ["<h2>Layers</h2>"]
    drawn: set[str] = set()
    for block, rows in blocks.items():
        table = _table(header, (_row(row, beside) for row in rows), range(3, len(header)))
        here = [name for name in names if place_of(name)[0] == block]
        drawn |= set(here)
        figures = "".join(_figures(page, name) for name in sorted(here, key=lambda one: _order(rows, one)))
        size = sum(row["bytes"] for row in rows)
        parts.append(
            f"<details><summary>{_text(block)}: {len(rows)} layers, {size:,} bytes</summary>{table}{figures}</details>"
        )
    parts += [_figures(page, name) for name in sorted(names - drawn)]
    return parts


def _order(rows: Sequence[Mapping[str, Any]], name: str) -> int:
    return next((i for i, row in enumerate(rows) if row["layer"] == name), len(rows))


def _row(row: Mapping[str, Any], beside: Mapping[str, Mapping[str, Any]]) -> list[object]:
    plan = plan_of(row)
    why = f"float: {row['reason']}" if plan == "float" and row["reason"] else plan
    rule = " ".join(part for part in (row["source"], f"({row['rule']})" if row["rule"] else "") if part)
    cells: list[object] = [row["layer"], why, rule, f"{row['bytes']:,}", _number(row.get("sqnr_db"))]
    if beside:
        found = beside.get(row["layer"], {})
        cells += [_number((found.get(key) or {}).get("sqnr_db")) for key in ("local", "cumulative")]
        clipped = found.get("clipped")
        cells.append("" if clipped is None else f"{clipped:.3%}")
    return cells


def _number(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else ""


def _figures(page: Page, name: str) -> str:
    found = [(what, held.get(name)) for what, held in (("weight", page.weights), ("input", page.activations))]
    return "".join(
        f"<figure>{histogram_svg(one)}<figcaption>{_text(name)}: {what}, {one.low:.4g} to {one.high:.4g};"
        f" range {one.range[0]:.4g} to {one.range[1]:.4g}</figcaption></figure>"
        for what, one in found
        if one is not None
    )


def _files(files: Mapping[str, tuple[int | None, str]]) -> list[str]:
    if not files:
        return []
    rows = [(name, "missing" if size is None else f"{size:,}", digest) for name, (size, digest) in files.items()]
    return ["<h2>Files</h2>", _table(("file", "bytes", "SHA-256"), rows, (1,))]
