"""Small drawings as inline SVG: well-formed, of numbers alone, without a script or a name of another place."""

import math
from collections.abc import Sequence

from graphq.pages.histograms import Histogram

_WIDTH, _HEIGHT = 220, 56
_SVG = 'xmlns="http://www.w3.org/2000/svg"'


def histogram_svg(found: Histogram) -> str:
    """The counts on a logarithmic scale; what lies outside of the quantizer's range is shaded, its ends are lines."""
    low, high = min(found.low, found.range[0]), max(found.high, found.range[1])
    span = (high - low) or 1.0
    top = math.log1p(max(found.counts, default=0)) or 1.0

    def x(value: float) -> float:
        return round(_WIDTH * (value - low) / span, 1)

    step = (found.high - found.low) / max(len(found.counts), 1)
    path = [f"M{x(found.low)} {_HEIGHT}"]
    for i, count in enumerate(found.counts):
        y = round(_HEIGHT * (1 - math.log1p(count) / top), 1)
        path.append(f"V{y}H{x(found.low + (i + 1) * step)}")
    path.append(f"V{_HEIGHT}Z")
    left, right = (x(end) for end in found.range)
    return (
        f'<svg {_SVG} viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img">'
        f'<path class="out" d="M0 0H{left}V{_HEIGHT}H0ZM{right} 0H{_WIDTH}V{_HEIGHT}H{right}Z"/>'
        f'<path class="bars" d="{"".join(path)}"/>'
        f'<path class="ends" d="M{left} 0V{_HEIGHT}M{right} 0V{_HEIGHT}"/></svg>'
    )


def front_svg(front: Sequence[Sequence[float]], size: float | None) -> str:
    """Sizes to the right, losses upwards, on a logarithmic scale where all are above 0; ``size``: of the chosen mix."""
    width, height, edge = 640, 240, 8
    sizes = [float(point[0]) for point in front]
    raw = [float(point[1]) for point in front]
    losses = [math.log(one) for one in raw] if min(raw) > 0 else raw

    def place(value: float, values: Sequence[float], room: int) -> float:
        span = (max(values) - min(values)) or 1.0
        return round(edge + (room - 2 * edge) * (value - min(values)) / span, 1)

    points = [
        f"{place(s, sizes, width)},{round(height - place(loss, losses, height), 1)}"
        for s, loss in zip(sizes, losses, strict=True)
    ]
    chosen = ""
    if size is not None and min(sizes) <= size <= max(sizes):
        at = place(size, sizes, width)
        chosen = f'<path class="ends" d="M{at} 0V{height}"/>'
    dots = "".join(
        f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="2"/>' for p in points[:: -(-len(points) // 200)]
    )
    return (
        f'<svg {_SVG} viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">'
        f'<polyline class="front" points="{" ".join(points)}"/>{dots}{chosen}</svg>'
    )
