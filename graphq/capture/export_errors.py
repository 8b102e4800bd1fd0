"""What ``torch.export`` says of a model's code, as errors of one line that name the layer and the line of source."""

import linecache
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import nn

from graphq.capture.sizes import bounds_of
from graphq.errors import GraphError

_OWN_CODE: Final = str(Path(__file__).parents[1])


class SpecializedError(GraphError):
    """A dimension declared dynamic is a constant in the model's code, or bounded by it.

    ``bounds``: the smallest and largest size of the dimension of this name, where that is all that the code asks for.
    ``guard``: what export found that it asks for.
    """

    def __init__(
        self,
        message: str,
        dimension: str | None = None,
        bounds: tuple[int, int] | None = None,
        guard: str | None = None,
    ) -> None:
        super().__init__(message)
        self.dimension = dimension
        self.bounds = bounds
        self.guard = guard


def explain(error: Exception, model: nn.Module, inputs: Sequence[str]) -> GraphError:
    """``error`` of an export of ``model`` in one line, with the layer and the user's own source line where a frame has
    them. ``inputs``: the names of the model's inputs.
    """
    names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}
    where = f"{type(model).__name__}: "
    for frame, line in traceback.walk_tb(error.__traceback__):  # the innermost frame of a module's own code wins
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if id(owner) in names and not code.co_filename.startswith((torch.__path__[0], _OWN_CODE)):
            source = linecache.getline(code.co_filename, line).strip()
            where = f"{names[id(owner)]} ({code.co_filename}:{line}: {source}): "
    lines = [text.strip() for text in str(error).splitlines() if text.strip()] or [type(error).__name__]
    text = " ".join(lines)
    if found := re.search(r"You marked (\w+) as dynamic but your code specialized it to be a constant \((\d+)\)", text):
        return SpecializedError(f"{where}the model's code fixes dimension {found[1]} at {found[2]}", found[1])
    if found := re.search(
        r"Not all values of (\w+) = .*? satisfy the generated guard (.*?)(?= - |\. The error above|\. ?$|$)", text
    ):
        return SpecializedError(
            f"{where}the model's code restricts dimension {found[1]}: {_plain_sizes(found[2], inputs)}",
            found[1],
            bounds_of(guard := found[2].partition("Suggested fixes")[0].strip().rstrip(".")),
            guard,
        )
    if "Constraints violated" in text:
        return SpecializedError(
            f"{where}the model's code restricts a dynamic dimension: {_plain_sizes(lines[1], inputs)}"
        )
    if "data-dependent" in lines[0]:
        return GraphError(f"{where}the path taken depends on the values of a tensor, which a graph cannot hold")
    return GraphError(f"{where}cannot be captured: {lines[0]}")


def _plain_sizes(text: str, inputs: Sequence[str]) -> str:
    def size(found: re.Match[str]) -> str:
        return f"size {found[2]} of {inputs[int(found[1])]}"

    return re.sub(r"L\['tensors'\]\[(\d+)\]\.size\(\)\[(\d+)\]", size, text.partition("Suggested fixes")[0].strip())
