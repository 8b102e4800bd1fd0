"""Names of submodules and tensors that no graph can hold, since torch.fx writes a graph as the code of one module."""

import keyword
from typing import Final

from torch import fx, nn

from graphq.errors import GraphError

_MODULE: Final = frozenset(dir(nn.Module()))
_GRAPH_MODULE: Final = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))


def check_names(model: nn.Module) -> None:
    """Raises ``GraphError`` naming the first submodule, parameter or buffer that no graph can hold under its name."""
    for path, _ in model.named_modules(remove_duplicate=False):
        if path.rpartition(".")[2] in _MODULE:
            raise _refusal(path, "every module of torch has an attribute of this name")
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for fqn, _ in tensors:
        segments = fqn.split(".")
        for depth, name in enumerate(segments):
            path = ".".join(segments[: depth + 1])
            if keyword.iskeyword(name):
                raise _refusal(path, "this is a word of Python's grammar")
            if not name.isprintable() or '"' in name or "\\" in name:
                raise _refusal(path, "it has a character that ends a line or a text")
            if name in (_MODULE if depth else _GRAPH_MODULE):
                raise _refusal(path, "graphs have an attribute of this name")


def _refusal(path: str, reason: str) -> GraphError:
    return GraphError(f"{path!r} cannot be a name in a graph: {reason}; rename it")
