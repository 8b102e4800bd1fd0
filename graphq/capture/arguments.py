"""The example inputs of a model as flat tensors by name, and how the model is called with them.

A list, tuple or dict of tensors is one argument with several inputs: ``features=[a, b]`` is ``features.0`` and
``features.1``.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from graphq.capture.structure import Constant, Fields, Items, Leaf, Structure, flatten, restore
from graphq.errors import GraphError


def named_inputs(
    model: nn.Module, inputs: Tensor | Sequence[Any] | Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Structure]]:
    """The inputs by name, in the order of the model's ``forward``, and the structure of each of its arguments.

    Raises ``GraphError`` for arguments that ``forward`` does not have, and for what is no tensor.
    """
    parameters = inspect.signature(model.forward).parameters
    where = f"{type(model).__name__}.forward"
    by_position = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    endless = [n for n, p in parameters.items() if p.kind is p.VAR_POSITIONAL]
    named: dict[str, Any]
    if isinstance(inputs, Mapping):
        named = {n: inputs[n] for n in parameters if n in inputs} | dict(inputs)
    else:
        given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        if len(given) > len(by_position):
            if endless:
                raise _nameless(where, endless[0])
            if not by_position and parameters:
                raise GraphError(f"inputs: {where} takes none by position; pass a dict by argument name")
            raise GraphError(f"inputs: {len(given)} given, {where} takes {len(by_position)}: {', '.join(by_position)}")
        named = dict(zip(by_position, given, strict=False))
    if not named:
        raise GraphError(f"inputs: none given; pass example inputs of {where} as a tuple or dict")
    accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    tensors: dict[str, Tensor] = {}
    structures: dict[str, Structure] = {}
    for name, value in named.items():
        if name in endless:
            raise _nameless(where, name)
        if name not in parameters and not accepts_any:
            raise GraphError(f"inputs: {where} has no argument {name}; it takes {', '.join(parameters)}")
        if not isinstance(value, Tensor | list | tuple | dict):
            raise GraphError(f"inputs: {name} is a {type(value).__name__}; graphs take tensors")
        structures[name], found = flatten(value, "inputs", name, "input")
        _refuse_others(name, structures[name])
        if twice := tensors.keys() & found.keys():
            raise GraphError(f"inputs: two are called {min(twice)}; rename one")
        tensors |= found
    nameless = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
    left_out = [n for i, n in enumerate(nameless) if n not in named and any(later in named for later in nameless[i:])]
    if left_out:
        raise GraphError(f"inputs: {where} takes {', '.join(nameless)} by position alone: give {left_out[0]}, too")
    return tensors, structures


def _refuse_others(name: str, structure: Structure) -> None:
    """Raises ``GraphError`` for a part of an argument that is neither a tensor nor a list, tuple or dict of them."""
    parts: list[tuple[str, Structure]] = []
    match structure:
        case Leaf():
            pass
        case Constant(value):
            raise GraphError(f"inputs: {name} is a {type(value).__name__}; graphs take tensors")
        case Fields("record"):
            raise GraphError(f"inputs: {name} is neither a tensor nor a list, tuple or dict of tensors")
        case Items(_, items):
            parts = [(str(i), part) for i, part in enumerate(items)]
        case Fields(_, fields):
            parts = list(fields)
    if not isinstance(structure, Leaf) and not parts:
        raise GraphError(f"inputs: {name} is empty; leave it out")
    for key, part in parts:
        _refuse_others(f"{name}.{key}", part)


def caller(
    model: nn.Module, structures: Mapping[str, Structure], options: Mapping[str, Any]
) -> Callable[[nn.Module, dict[str, Tensor]], Any]:
    """How the model is called with inputs by name: arguments that have no name for its callers, by their positions."""
    parameters = inspect.signature(model.forward).parameters
    nameless = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]

    def call(module: nn.Module, tensors: dict[str, Tensor]) -> Any:
        given = {name: restore(structure, tensors, dict) for name, structure in structures.items()}
        first = [given.pop(name) for name in nameless if name in given]
        return module(*first, **given, **options)

    return call


def _nameless(where: str, name: str) -> GraphError:
    return GraphError(
        f"inputs: {where} takes any number of tensors (*{name}), which have no names for a graph; wrap the model in a"
        " module whose forward names each"
    )
