"""The structure of outputs as the manifest holds it, and back.

A model that returns a tensor and a number has ``["tuple", [["tensor", "output_0"], ["constant", 3]]]``.
"""

from typing import Any, assert_never, cast

from graphq.artifacts.fields import is_text
from graphq.capture.structure import DEEPEST, Constant, Fields, Items, Leaf, Structure, leaves


def structure_json(structure: Structure) -> list[Any]:
    """A ``Structure`` as plain data."""
    match structure:
        case Leaf(name):
            return ["tensor", name]
        case Constant(value):
            return ["constant", value]
        case Items(kind, parts):
            return [kind, [structure_json(part) for part in parts]]
        case Fields(kind, named):
            return [kind, [[key, structure_json(part)] for key, part in named]]
        case _:
            assert_never(structure)


def structure_from_json(data: object, outputs: tuple[str, ...]) -> Structure:
    """The ``Structure`` that ``structure_json`` wrote, of these tensors in their order. Raises ``ValueError``."""
    found = _read(data, 0)
    if leaves(found) != outputs:
        raise ValueError("structure: it is not one of the outputs, in their order")
    return found


def _read(data: object, depth: int) -> Structure:
    if depth <= DEEPEST:
        match data:
            case ["tensor", str(name)]:
                return Leaf(name)
            case ["constant", None | bool() | int() | float() | str() as value]:
                return Constant(value)
            case ["tuple" | "list" as kind, [*parts]]:
                return Items(kind, tuple(_read(part, depth + 1) for part in cast(list[object], parts)))
            case ["dict" | "record" as kind, [*parts]] if _are_named(parts):
                return Fields(kind, tuple((key, _read(part, depth + 1)) for key, part in cast(list[Any], parts)))
            case _:
                pass
    raise ValueError(f"structure: {data!r:.80} is no structure of outputs")


def _are_named(parts: list[Any]) -> bool:
    pairs = all(isinstance(part, list) and len(cast(list[Any], part)) == 2 and is_text(part[0]) for part in parts)
    return pairs and len({part[0] for part in parts}) == len(parts)
