"""How far a fallback may go: what it may be, as a mapping, as NAME=VALUE, and in the native form."""

from typing import Any

import pytest

from graphq.errors import SpecError
from graphq.frontends import load_spec, print_spec, write_spec
from graphq.spec.fallback import Fallback, fallback_of, parse_fallback

BASE = {"graphq": 1, "rules": [{"match": "*", "weight": "int8/channel", "input": "uint8/tensor"}], "profile": "qnn-htp"}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "it says nothing: give max_ops, min_sqnr, or both"),
        ({"max_ops": 0}, "max_ops: 0 is not a whole number from 1"),
        ({"max_ops": True}, "max_ops: True is not a whole number from 1"),
        ({"max_ops": 1.5}, "max_ops: 1.5 is not a whole number from 1"),
        ({"min_sqnr": 0}, "min_sqnr: 0 is not a number of decibels above 0 and up to 300"),
        ({"min_sqnr": 301}, "min_sqnr: 301 is not a number of decibels above 0 and up to 300"),
        ({"min_sqnr": float("nan")}, "min_sqnr: nan is not a number of decibels above 0 and up to 300"),
        ({"min_sqnr": True}, "min_sqnr: True is not a number of decibels above 0 and up to 300"),
        ({"max_ops": 1, "min_sqnr": "much"}, "min_sqnr: 'much' is not a number of decibels above 0 and up to 300"),
        ({"ops": 3}, "ops: no such key; there are max_ops, min_sqnr"),
    ],
)
def test_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError) as raised:
        fallback_of(given)
    assert raised.value.problems == (f"fallback: {problem}",)


def test_a_mapping_is_wanted() -> None:
    with pytest.raises(SpecError, match="fallback: 3 is not a mapping of max_ops and min_sqnr"):
        fallback_of(3)  # type: ignore[arg-type]
    found = Fallback(1)
    assert fallback_of(found) is found


def test_texts() -> None:
    assert parse_fallback([]) is None
    assert parse_fallback(["max_ops=3"]) == Fallback(3)
    assert parse_fallback(["max_ops=3", "min_sqnr=30.5"]) == Fallback(3, 30.5)
    assert str(parse_fallback(["min_sqnr=30.0", "max_ops=3"])) == "max_ops 3, min_sqnr 30"
    for texts, problem in (
        (["max_ops"], "fallback: 'max_ops' is not NAME=VALUE, such as max_ops=3 or min_sqnr=30"),
        (["max_ops=1", "max_ops=2"], "fallback: max_ops: is given twice"),
        (["max_ops=few"], "fallback: max_ops: 'few' is not a whole number from 1"),
        (["max_ops=2.0"], "fallback: max_ops: 2.0 is not a whole number from 1"),
    ):
        with pytest.raises(SpecError) as raised:
            parse_fallback(texts)
        assert raised.value.problems == (problem,)


def test_the_native_form() -> None:
    spec = load_spec(BASE | {"fallback": {"max_ops": 2, "min_sqnr": 35.5}})
    assert spec.fallback == Fallback(2, 35.5)
    assert "profile: qnn-htp\nfallback:\n  max_ops: 2\n  min_sqnr: 35.5\n" in print_spec(spec)
    assert load_spec(print_spec(spec)) == spec
    assert "min_sqnr: 30\n" in print_spec(load_spec(BASE | {"fallback": {"min_sqnr": 30.0}}))
    assert load_spec(BASE).fallback is None
    assert "fallback" not in print_spec(load_spec(BASE))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (3, "fallback: 3 is not a mapping"),
        ({"max_op": 3}, "fallback.max_op: unknown key; did you mean max_ops?"),
        ({"max_ops": "3"}, "fallback: max_ops: '3' is not a whole number from 1"),
        ({}, "fallback: it says nothing: give max_ops, min_sqnr, or both"),
    ],
)
def test_refused_in_the_native_form(given: object, problem: str) -> None:
    with pytest.raises(SpecError) as raised:
        load_spec(BASE | {"fallback": given})
    assert raised.value.problems[0] == problem


def test_other_dialects_cannot_say_it() -> None:
    spec = load_spec({"graphq": 1, "weight": "int8/channel", "fallback": {"max_ops": 2}})
    with pytest.raises(SpecError) as raised:
        write_spec(spec, "llmc")
    assert raised.value.problems == ("llmc cannot say fallback; leave it out",)
