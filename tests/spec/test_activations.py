"""Rules for the tensors between layers: which op they are for, and what such a tensor can be."""

import pytest

from graphq.errors import SpecError
from graphq.spec.activations import ActivationRule, check_tensor_quant, is_tensor_quant, rule_for
from graphq.spec.plan import Plan
from graphq.spec.quant import parse_quant

U8, U16 = parse_quant("uint8/tensor"), parse_quant("uint16/tensor")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("int4/tensor", "int4/tensor: tensors between ops hold integers of 8 or 16 bits"),
        ("float8_e4m3fn/tensor", "float8_e4m3fn/tensor: tensors between ops hold integers of 8 or 16 bits"),
        ("mxfp8_e4m3", "mxfp8_e4m3: tensors between ops hold integers of 8 or 16 bits"),
        (
            "int8/token/dynamic",
            "int8/token/dynamic: tensors between ops have one scale, from calibration; write int8/tensor",
        ),
        ("uint8/channel", "uint8/channel: tensors between ops have one scale, from calibration; write uint8/tensor"),
        ("int8/tensor/ofmr", "int8/tensor/ofmr: ofmr is for layers"),
    ],
)
def test_what_a_tensor_between_ops_cannot_be(text: str, problem: str) -> None:
    quant = parse_quant(text)
    assert not is_tensor_quant(quant)
    for refused in (lambda: check_tensor_quant(quant), lambda: ActivationRule(quant), lambda: Plan(U8, U8, quant)):
        with pytest.raises(SpecError) as raised:
            refused()
        assert str(raised.value) == problem


@pytest.mark.parametrize(
    "text", ["uint8/tensor", "int8/tensor", "int8/asym/tensor", "uint16/tensor", "uint8/tensor/mse"]
)
def test_what_it_can_be(text: str) -> None:
    assert is_tensor_quant(parse_quant(text))
    assert ActivationRule(parse_quant(text)).quant == parse_quant(text)


def test_the_last_rule_that_matches_decides() -> None:
    everything = ActivationRule(U8)
    softmax = ActivationRule(U16, ("Softmax", "Sigmoid"))
    head = ActivationRule(None, (), "head.*")
    rules = (everything, softmax, head)
    assert rule_for(rules, "Add", "body") is everything
    assert rule_for(rules, "Sigmoid", "body") is softmax
    assert rule_for(rules, "Softmax", "head.3") is head
    assert rule_for(rules, "Softmax", "head") is softmax
    assert rule_for((softmax,), "Add", "") is None
    assert rule_for((everything,), "Input", "") is everything


def test_modules_match_by_case() -> None:
    assert not ActivationRule(U8, (), "Head*").matches("Add", "head.1")


def test_words() -> None:
    texts = map(str, (ActivationRule(U8), ActivationRule(U16, ("Softmax", "Add")), ActivationRule(None, (), "head.*")))
    assert [*texts] == ["all: uint8/tensor", "Softmax|Add: uint16/tensor", "all in head.*: float"]


def test_where_a_rule_stands_is_no_part_of_it() -> None:
    assert ActivationRule(U8, source="a line") == ActivationRule(U8)
