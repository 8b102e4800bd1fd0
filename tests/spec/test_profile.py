"""Tables of consumers as data: combinations of types, as they are written and as ops ask for them."""

import pytest

from graphq.errors import SpecError
from graphq.spec.formats import parse_format
from graphq.spec.profile import OpRule, Profile, int_activations, op_types, same_types
from graphq.spec.quant import parse_quant


@pytest.mark.parametrize(
    "text",
    [
        "uint8 -> uint8",
        "uint8 x int8/channel -> uint8",
        "uint8 x uint16 -> uint16",
        "uint8 x uint8 x int8/tensor -> uint8",
        "uint16 x int4/g32 -> uint16",
        "int8/asym x int8/channel -> int8/asym",
    ],
)
def test_types_are_written_as_they_are_read(text: str) -> None:
    assert [str(one) for one in op_types(text)] == [text]


def test_what_is_an_activation_and_what_a_weight() -> None:
    (found,) = op_types("uint8 x uint16 x int8/channel -> uint16")
    assert found.inputs == (parse_format("uint8"), parse_format("uint16"))
    assert found.weight == parse_quant("int8/channel")
    assert found.output == parse_format("uint16")
    (grouped,) = op_types("uint16 x int4/g32 -> uint16")
    assert grouped.weight == parse_quant("int4/g32")


def test_the_last_input_is_that_of_all_that_follow() -> None:
    (pair,) = op_types("uint8 x uint16 -> uint16")
    assert [str(pair.input(position)) for position in range(4)] == ["uint8", "uint16", "uint16", "uint16"]


def test_types_without_an_output_are_refused() -> None:
    with pytest.raises(SpecError, match=r"^'uint8 x uint8' is not <type>\[ x <type>\] -> <type>$"):
        op_types("uint8 x uint8")


def test_same_types() -> None:
    assert same_types(["uint8", "int8"]) == op_types("uint8 -> uint8", "int8 -> int8")


def test_the_first_type_is_the_default() -> None:
    profile = Profile("p", "a consumer", int_activations("uint16", "uint8"), parse_quant("int8/channel"), {})
    assert str(profile.activation()) == "uint16/tensor"
    assert OpRule(same_types(["uint8"])).placed == "always"
