"""Structures of outputs: tensors under dotted names, and the same values made of them again."""

import dataclasses
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from graphq.artifacts.structure import structure_from_json, structure_json
from graphq.capture.structure import (
    DEEPEST,
    Constant,
    Fields,
    Items,
    Leaf,
    Structure,
    flatten,
    kind_of,
    leaves,
    restore,
)
from graphq.errors import GraphError

A, B, C = (torch.full((2,), float(i)) for i in range(3))


@dataclasses.dataclass
class Record:
    first: Any
    rest: Any = None


class Pair(NamedTuple):
    x: Tensor
    y: int


CASES: list[tuple[Any, dict[str, Tensor], str, Any]] = [
    (A, {"output": A}, "tensor", A),
    ((A, B), {"output_0": A, "output_1": B}, "tuple", (A, B)),
    ([A, B], {"output_0": A, "output_1": B}, "structured", [A, B]),
    ({"a": A, 1: B}, {"a": A, "1": B}, "dict", {"a": A, "1": B}),
    ({"a": A, "none": None}, {"a": A}, "structured", {"a": A, "none": None}),
    ((A, [B, C]), {"output_0": A, "output_1.0": B, "output_1.1": C}, "structured", (A, [B, C])),
    (
        {"pyramid": [A, (B,)], "size": 3},
        {"pyramid.0": A, "pyramid.1.0": B},
        "structured",
        {"pyramid": [A, (B,)], "size": 3},
    ),
    ((A, None, 1.5, True, "text", ()), {"output_0": A}, "structured", (A, None, 1.5, True, "text", ())),
    (Record(A), {"first": A}, "structured", SimpleNamespace(first=A, rest=None)),
    (
        Record(Record(A, [B]), {"z": Pair(C, 4)}),
        {"first.first": A, "first.rest.0": B, "rest.z.x": C},
        "structured",
        SimpleNamespace(first=SimpleNamespace(first=A, rest=[B]), rest={"z": SimpleNamespace(x=C, y=4)}),
    ),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_names_and_values(number: int) -> None:
    value, named, kind, restored = CASES[number]
    structure, found = flatten(value, "Model")
    assert list(found) == list(leaves(structure)) == list(named)
    assert all(found[name] is tensor for name, tensor in named.items())
    assert kind_of(structure) == kind
    assert same(restore(structure, found, lambda fields: SimpleNamespace(**fields)), restored)
    assert structure_from_json(structure_json(structure), leaves(structure)) == structure


def same(a: Any, b: Any) -> bool:
    """Whether two values are of one structure with the same tensors."""
    if isinstance(a, SimpleNamespace):
        return isinstance(b, SimpleNamespace) and same(vars(a), vars(b))
    if type(a) is not type(b) or isinstance(a, Tensor):
        return a is b
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list | tuple) else a == b


def test_a_model_output_of_transformers_is_a_record() -> None:
    from transformers.modeling_outputs import BaseModelOutput

    structure, found = flatten(BaseModelOutput(last_hidden_state=A, hidden_states=(B, C)), "Model")  # pyright: ignore[reportArgumentType]
    assert list(found) == ["last_hidden_state", "hidden_states.0", "hidden_states.1"]
    assert isinstance(structure, Fields)
    assert structure.kind == "record"
    assert [key for key, _ in structure.parts] == ["last_hidden_state", "hidden_states"]  # what is None is left out


def nested(levels: int) -> Any:
    return A if not levels else [nested(levels - 1)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {1: A, "1": None}}, "Model: two outputs are called a.1; rename one"),
        ((A, torch.float32), "Model: output output_1 is a dtype; outputs must be tensors, or tuples, lists, dicts and"),
        ({"a": float("nan")}, "Model: output a is nan; numbers among the outputs must be finite"),
        (
            nested(DEEPEST + 1),
            f"Model: output output_0{'.0' * DEEPEST}: lies more than {DEEPEST} tuples and dicts deep",
        ),
    ],
)
def test_what_no_structure_holds(value: Any, message: str) -> None:
    with pytest.raises(GraphError) as caught:
        flatten(value, "Model")
    assert str(caught.value).startswith(message)
    flatten(nested(DEEPEST), "Model")


GOOD = Items("tuple", (Leaf("a"), Fields("record", (("x", Leaf("b")), ("n", Constant(None))))))


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        ["tensor"],
        ["tensor", 3],
        ["constant", [1]],
        ["set", [["tensor", "a"]]],
        ["tuple", {"a": 1}],
        ["dict", [["tensor", "a"]]],
        ["dict", [["x", ["tensor", "a"]], ["x", ["constant", 1]]]],
        ["tuple", [["tensor", "a"]]],  # one output is missing
        ["tuple", [["tensor", "b"], ["tensor", "a"]]],
    ],
)
def test_a_damaged_structure(data: Any) -> None:
    assert structure_from_json(structure_json(GOOD), ("a", "b")) == GOOD
    with pytest.raises(ValueError, match=r"^structure: "):
        structure_from_json(data, ("a", "b"))


def test_a_structure_without_end() -> None:
    deep: Structure = Leaf("a")
    for _ in range(DEEPEST + 1):
        deep = Items("list", (deep,))
    with pytest.raises(ValueError, match=r"^structure: "):
        structure_from_json(structure_json(deep), ("a",))
