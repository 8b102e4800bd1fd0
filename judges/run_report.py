"""A report of a thousand layers with hostile names, in a headless Chromium: it is drawn, and nothing is loaded or run.

Qt WebEngine is Chromium. Run by ``judges.py``, or as

    .judges/report/bin/python judges/run_report.py [PICTURE]

PICTURE: where a picture of the page is kept. Exit status 1, with a reason, where the page asks for anything beside
itself, holds an element that scripts or loads, is wider than the window, lacks a block or a histogram, or is drawn
blank.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {
    "QT_QPA_PLATFORM": "offscreen",
    "QTWEBENGINE_DISABLE_SANDBOX": "1",
    "QTWEBENGINE_CHROMIUM_FLAGS": "--disable-gpu --single-process",
}

from PyQt6.QtCore import QTimer, QUrl  # pyright: ignore[reportMissingImports]
from PyQt6.QtWebEngineCore import QWebEngineUrlRequestInterceptor  # pyright: ignore[reportMissingImports]
from PyQt6.QtWebEngineWidgets import QWebEngineView  # pyright: ignore[reportMissingImports]
from PyQt6.QtWidgets import QApplication  # pyright: ignore[reportMissingImports]

from graphq.pages.document import Page
from graphq.pages.histograms import Histogram
from graphq.pages.html import to_html

BLOCKS, ROLES = 125, ("q", "k", "v", "o", "gate", "up", "<script>document.title='run'</script>", "'\"><img src=x>")
SEEN = """JSON.stringify({
  title: document.title,
  active: document.querySelectorAll('script,img,iframe,link,object,embed,form,[onclick],[onerror],[src],[href]').length,
  blocks: document.querySelectorAll('details').length,
  drawings: document.querySelectorAll('svg path.bars').length,
  wide: document.documentElement.scrollWidth > window.innerWidth,
})"""


def page() -> str:
    """The page, of drawn numbers."""
    rows: list[dict[str, Any]] = [
        {
            "layer": f"model.layers.{i}.{role}",
            "weight": {"text": "int4/g128", "dynamic": False},
            "input": None,
            "rule": role,
            "source": "",
            "reason": "",
            "shape": [64, 64],
            "bytes": 2048 + 7 * i,
            "float_bytes": 16384,
            "sqnr_db": 10 + (i * 7 + j * 3) % 20,
        }
        for i in range(BLOCKS)
        for j, role in enumerate(ROLES)
    ]
    histogram = Histogram(-1.0, 1.0, tuple(range(32)) + tuple(reversed(range(32))), (-0.5, 0.75))
    drawn = {row["layer"]: histogram for row in rows}
    return to_html(Page("a report", (), tuple(rows), "graphq: 1\n", drawn, notes=ROLES))


class Requests(QWebEngineUrlRequestInterceptor):  # pyright: ignore[reportUntypedBaseClass]
    """What the page asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def interceptRequest(self, info: Any) -> None:  # noqa: N802
        self.urls.append(info.requestUrl().toString())


def main(picture: Path | None) -> list[str]:
    """A line for each thing that is wrong."""
    import json

    application: Any = QApplication(sys.argv[:1])
    view: Any = QWebEngineView()
    view.resize(1300, 1000)
    requests = Requests()
    view.page().profile().setUrlRequestInterceptor(requests)
    found: dict[str, Any] = {"loaded": False}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.html"
        file.write_text(page(), encoding="utf-8")

        def look() -> None:
            image = view.grab().toImage()
            points = [(x, y) for x in range(0, image.width(), 7) for y in range(0, image.height(), 7)]
            found["colours"] = len({image.pixel(*point) for point in points})
            if picture is not None:
                image.save(str(picture))
            view.page().runJavaScript(SEEN, read)

        def read(text: str) -> None:
            found.update(json.loads(text))
            application.quit()

        def loaded(well: bool) -> None:
            found["loaded"] = well
            QTimer.singleShot(3000, look)

        view.loadFinished.connect(loaded)
        view.load(QUrl.fromLocalFile(str(file)))
        view.show()
        QTimer.singleShot(120_000, application.quit)
        application.exec()
        others = [url for url in requests.urls if url != QUrl.fromLocalFile(str(file)).toString()]
    print(found)
    wanted = {"loaded": True, "title": "a report", "active": 0, "blocks": BLOCKS, "wide": False}
    wanted["drawings"] = BLOCKS * len(ROLES)
    wrong = [f"{key}: {found.get(key)}, not {value}" for key, value in wanted.items() if found.get(key) != value]
    wrong += [f"asks for {url}" for url in others]
    return [*wrong, *(["is drawn blank"] if found.get("colours", 0) < 10 else [])]


if __name__ == "__main__":
    problems = main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    print("\n".join(problems) or "a report is drawn, and loads and runs nothing")
    sys.exit(1 if problems else 0)
