"""A page is one well-formed file that refers to nothing outside of it, whatever layers are called and however many."""

import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from graphq.errors import SpecError
from graphq.pages.document import Page
from graphq.pages.histograms import Histogram
from graphq.pages.html import to_html

XHTML = "{http://www.w3.org/1999/xhtml}"
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a' onmouseover='alert(1)",
    "]]>&<!--",
    "nul\x00 esc\x1b[31m bell\x07 \ud800 \u202e",
    "{{7*7}} ${x} `x`",
    "x" * 5000,
)
# what a page is made of: nothing that a browser loads, runs or sends
ELEMENTS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "p",
        "ul",
        "li",
        "pre",
        "div",
        "figure",
        "figcaption",
    ),
    *("table", "thead", "tbody", "tr", "th", "td", "details", "summary"),
    *("svg", "path", "polyline", "circle"),
}
ATTRIBUTES = {
    *("lang", "charset", "http-equiv", "content", "class", "scope", "title", "style"),
    *("viewBox", "width", "height", "role", "d", "points", "cx", "cy", "r"),
}


def row(layer: str, **more: Any) -> dict[str, Any]:
    return {
        "layer": layer,
        "weight": {"text": "int4/g32", "dynamic": False},
        "input": None,
        "rule": "blocks",
        "source": "weight (line 2)",
        "reason": "",
        "shape": [64, 64],
        "bytes": 2560,
        "float_bytes": 16384,
        "sqnr_db": 21.5,
        **more,
    }


def strictly(page: Page) -> ET.Element:
    """The page's root. Fails where it is not well-formed, and for all that is not drawn by itself."""
    text = to_html(page)
    assert text.startswith("<!DOCTYPE html>\n<html")
    assert "\ud800" not in text
    text.encode("utf-8")
    root = ET.fromstring(text)
    for element in root.iter():
        name = element.tag.removeprefix(XHTML).removeprefix(SVG)
        assert name in ELEMENTS, name
        assert set(element.attrib) <= ATTRIBUTES, element.attrib
        style = element.get("style", "")
        assert not style or re.fullmatch(r"background:hsl\(\d+ 70% 78%\)", style), style
    (style,) = root.iter(f"{XHTML}style")
    assert not re.search(r"url|import|@|expression|//", style.text or "")
    policies = [meta.get("content") for meta in root.iter(f"{XHTML}meta") if meta.get("http-equiv")]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]
    return root


def words(root: ET.Element) -> str:
    return " ".join(root.itertext())


def full(names: tuple[str, ...] = HOSTILE) -> Page:
    rows = tuple(row(f"model.layers.{i}.{name}", rule=name, reason=name) for i, name in enumerate(names))
    floats = tuple(row(f"{name}.head", weight=None, reason=name, sqnr_db=None) for name in names)
    histogram = Histogram(-1.0, 1.0, (1, 5, 2), (-0.5, 0.5))
    search = {
        "groups": [{"layers": list(names), "option": "int4", "options": {"int4": {"size": 10, "loss": 1.0}}}],
        "trials": [{"origin": name, "size": 10, "loss": None} for name in names],
        "front": [[8, 2.0], [10, 1.0], [20, 0.5]],
    }
    evaluation = {
        "model": names[0],
        "against": names[1],
        "perplexity": [12.5, 12.25],
        "agreement": {"kl": 0.01, "top1": 0.98, "tokens": 512},
        "tasks": {name: {name: [0.5, 0.625]} for name in names},
    }
    differences = {
        "layers": [
            {"layer": rows[0]["layer"], "local": {"sqnr_db": 19.5}, "cumulative": None, "clipped": 0.015},
        ],
        "outputs": {},
    }
    return Page(
        names[0],
        tuple((name, name) for name in names),
        (*rows, *floats),
        "\n".join(names),
        {rows[0]["layer"]: histogram},
        {rows[0]["layer"]: histogram, names[1]: histogram},
        search,
        (evaluation,),
        differences,
        {name: (None if i else 7, "0" * 64) for i, name in enumerate(names)},
        names,
        names,
    )


def test_hostile_names_are_text():
    root = strictly(full())
    shown = words(root)
    for name in HOSTILE[:4]:
        assert name in shown
    assert "nul\\x00 esc\\x1b[31m" in shown
    assert len(list(root.iter(f"{SVG}svg"))) == 1 + 2 + 1  # the front, one weight and two inputs


def test_what_it_shows():
    root = strictly(full(tuple("abcdefg")))
    titles = [element.text for element in root.iter(f"{XHTML}h2")]
    assert titles == [
        "Bits for each weight, scales included",
        "Error: signal to noise ratio of the weights, dB (the lowest in a cell)",
        "Size, kB",
        "Evaluation",
        "Search",
        "Layers",
        "Spec",
        "Files",
        "Commands",
        "Notes",
    ]
    shown = words(root)
    for text in ("12.5000", "12.2500", "0.98", "0.6250", "19.5", "1.500%", "5.00", "21.5", "missing", "-0.5 to 0.5"):
        assert text in shown, text


def test_no_number_is_said():
    page = Page("t", (), (), "", evaluations=({"model": "m", "perplexity": [None], "tasks": {"t": {"acc": [None]}}},))
    assert words(strictly(page)).count("not finite") == 2


def test_colours_follow_the_numbers():
    rows = tuple(row(f"m.{i}.up", sqnr_db=10.0 * i) for i in range(3))
    root = strictly(Page("t", (), rows, ""))
    (table,) = [t for t in root.iter(f"{XHTML}table") if "10.0" in words(t) and t.find(f"{XHTML}thead") is not None and "layer" not in words(t)]  # fmt: skip
    styles = [cell.get("style") for cell in table.iter(f"{XHTML}td") if cell.get("style")]
    assert styles == [f"background:hsl({hue} 70% 78%)" for hue in (10, 110, 210)]


def test_what_stays_float_has_no_part_in_the_scales():
    """An embedding of gigabytes leaves the colours, and the unit, to the layers that differ."""
    rows = (row("m.0.up"), row("m.1.up", bytes=5120), row("embed", weight=None, bytes=2_000_000_000))
    root = strictly(Page("t", (), rows, ""))
    assert "Size, kB" in words(root)
    styles = [cell.get("style") for cell in root.iter(f"{XHTML}td") if cell.get("style")]
    assert styles[-2:] == [f"background:hsl({hue} 70% 78%)" for hue in (10, 210)]


def test_a_thousand_layers():
    roles = ("q", "k", "v", "o", "gate", "up", "down", "router")
    rows = tuple(row(f"model.layers.{i}.{role}") for i in range(125) for role in roles)
    histogram = Histogram(-1.0, 1.0, (3,) * 64, (-0.5, 0.5))
    page = Page("large", (), rows, "", {one["layer"]: histogram for one in rows})
    root = strictly(page)
    assert len(to_html(page)) < 3e6
    blocks = list(root.iter(f"{XHTML}details"))
    assert len(blocks) == 125  # closed: the page begins with the maps
    assert all(block.get("open") is None for block in blocks)
    assert all(len(list(block.iter(f"{SVG}svg"))) == 8 for block in blocks)
    heads = [list(table.iter(f"{XHTML}th")) for table in root.iter(f"{XHTML}table") if "gate" in words(table)][:3]
    assert all(len(head) == 8 + 125 for head in heads)


@pytest.mark.parametrize(
    ("page", "command"),
    [
        (Page("t", (), (), "", evaluations=({"model": "m", "perplexity": ["much"]},)), "eval"),
        (Page("t", (), (), "", search={"groups": [], "trials": [{}], "front": []}), "search"),
        (Page("t", (), (row("a.0.b"),), "", differences={"layers": [{"layer": "a.0.b", "local": 3}]}), "diff"),
    ],
)
def test_json_of_something_else(page, command):
    with pytest.raises(SpecError, match=f"{command}: not what graphq {command} --json prints"):
        to_html(page)
