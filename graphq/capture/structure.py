"""The structure of what a model takes and returns: tensors in tuples, lists, dicts and records, by dotted names.

``{"pyramid": [p3, p4]}`` has the tensors ``pyramid.0`` and ``pyramid.1``. Records are dataclasses, named tuples and
transformers' ``ModelOutput``, told apart by their fields alone; what is no tensor and never changes is a constant.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, assert_never, cast, final

from torch import SymBool, SymFloat, SymInt, Tensor

from graphq.errors import GraphError

DEEPEST: Final = 32  # levels of tuples and dicts in each other


@final
@dataclass(frozen=True)
class Leaf:
    """A tensor, by its name."""

    name: str


@final
@dataclass(frozen=True)
class Constant:
    """A value that is the same for all inputs."""

    value: str | float | bool | None


@final
@dataclass(frozen=True)
class Items:
    """Parts by their positions."""

    kind: Literal["tuple", "list"]
    parts: tuple["Structure", ...]


@final
@dataclass(frozen=True)
class Fields:
    """Parts by their names."""

    kind: Literal["dict", "record"]
    parts: tuple[tuple[str, "Structure"], ...]


Structure = Leaf | Constant | Items | Fields


def flatten(
    value: Any, where: str, name: str | None = None, role: str = "output"
) -> tuple[Structure, dict[str, Tensor]]:
    """The structure of ``value``, and its tensors by name, in order.

    ``name``: what the names begin with; a tensor without one is ``output``, and the parts of a tuple without one are
    ``output_0``, ``output_1`` and so on. ``role``: what messages call a part. Raises ``GraphError``, beginning with
    ``where``, for two tensors of one name and for what no structure holds, by its dotted name.
    """
    found: dict[str, Tensor] = {}
    structure = _flatten(value, name, where, role, found, 0)
    return structure, found


def _flatten(value: Any, name: str | None, where: str, role: str, found: dict[str, Tensor], depth: int) -> Structure:
    shown = where if name is None else f"{where}: {role} {name}"
    if depth > DEEPEST:
        raise GraphError(f"{shown}: lies more than {DEEPEST} tuples and dicts deep")
    match value:
        case Tensor():
            name = "output" if name is None else name
            if name in found:
                raise GraphError(f"{where}: two {role}s are called {name}; rename one")
            found[name] = value
            return Leaf(name)
        case SymInt() | SymFloat() | SymBool():
            raise GraphError(f"{shown} is a number that depends on the inputs; {role}s must be tensors, or fixed")
        case float() if not math.isfinite(value):
            raise GraphError(f"{shown} is {value}; numbers among the {role}s must be finite")
        case None | bool() | int() | float() | str():
            return Constant(value)
        case _:
            pass
    fields = _fields(value)
    if fields is not None:
        named = {key: key if name is None else f"{name}.{key}" for key, _ in fields}
        if len(named) < len(fields):
            keys = [key for key, _ in fields]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise GraphError(f"{where}: two {role}s are called {named[twice]}; rename one")
        is_record = dataclasses.is_dataclass(value) or not isinstance(value, Mapping)
        parts = tuple((key, _flatten(part, named[key], where, role, found, depth + 1)) for key, part in fields)
        return Fields("record" if is_record else "dict", parts)
    if isinstance(value, list | tuple):
        values = cast(Sequence[Any], value)
        names = [f"output_{i}" if name is None else f"{name}.{i}" for i in range(len(values))]
        return Items(
            "list" if isinstance(value, list) else "tuple",
            tuple(_flatten(part, one, where, role, found, depth + 1) for one, part in zip(names, values, strict=True)),
        )
    verb = "returns" if name is None else "is a"
    is_cache = name == "past_key_values" or type(value).__name__.endswith("Cache")
    hint = "; pass cache=False to leave the cache out" if is_cache else ""
    raise GraphError(
        f"{shown} {verb} {type(value).__name__}; {role}s must be tensors, or tuples, lists, dicts and dataclasses of"
        f" them{hint}"
    )


def _fields(value: Any) -> list[tuple[str, Any]] | None:
    """The named parts of a dict or record; None for another value."""
    if isinstance(value, Mapping):  # a ModelOutput, too, which leaves out what is None
        return [(str(key), part) for key, part in cast(Mapping[Any, Any], value).items()]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    if isinstance(value, tuple) and hasattr(cast(object, value), "_fields"):
        return list(cast(Any, value)._asdict().items())
    return None


def restore(structure: Structure, tensors: Mapping[str, Any], record: Callable[[dict[str, Any]], Any]) -> Any:
    """The value of this structure that holds ``tensors``, which are by name; ``record`` makes one of its fields."""
    match structure:
        case Leaf(name):
            return tensors[name]
        case Constant(value):
            return value
        case Items(kind, parts):
            values = [restore(part, tensors, record) for part in parts]
            return values if kind == "list" else tuple(values)
        case Fields(kind, parts):
            fields = {key: restore(part, tensors, record) for key, part in parts}
            return fields if kind == "dict" else record(fields)
        case _:
            assert_never(structure)


def leaves(structure: Structure) -> tuple[str, ...]:
    """The names of the tensors, in order."""
    match structure:
        case Leaf(name):
            return (name,)
        case Constant():
            return ()
        case Items(_, parts):
            return tuple(name for part in parts for name in leaves(part))
        case Fields(_, named):
            return tuple(name for _, part in named for name in leaves(part))
        case _:
            assert_never(structure)


def kind_of(structure: Structure) -> Literal["tensor", "tuple", "dict", "structured"]:
    """What it is where tensors alone are its parts, and ``structured`` where it is more than that."""
    match structure:
        case Leaf():
            return "tensor"
        case Items("tuple", parts) if all(isinstance(part, Leaf) for part in parts):
            return "tuple"
        case Fields("dict", named) if all(isinstance(part, Leaf) for _, part in named):
            return "dict"
        case _:
            return "structured"
