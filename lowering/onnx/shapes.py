"""ONNX files of fixed sizes: dimensions as numbers, with nothing left to compute from them."""

from collections.abc import Mapping

from torch import fx

from graphq.capture.sizes import fixed_sizes
from graphq.capture.source import source_of
from graphq.errors import TargetError
from graphq.passes.fix_sizes import FixSizes


def fix_sizes(gm: fx.GraphModule, shapes: Mapping[str, int]) -> None:
    """``gm`` is the graph for these sizes of its dimensions, and for those that capture fixed.

    Raises ``TargetError`` with a line for each dimension that there is not, and for each size out of its range.
    """
    source = source_of(gm)
    sizes, problems = fixed_sizes(shapes, source.ranges)
    if problems:
        raise TargetError("\n".join(f"onnx: {problem}" for problem in problems))
    FixSizes({name: low for name, low, high in source.ranges if low == high} | sizes).run(gm)
