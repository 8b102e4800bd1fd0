"""Budgets as text."""

import pytest

from graphq.errors import SpecError
from graphq.mixed_precision.budget import Budget, parse_budget


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("4.5bits", "bits", 4.5),
        (" 4 bits ", "bits", 4.0),
        ("600MB", "bytes", 6e8),
        ("123456B", "bytes", 123456),
        ("1.5GiB", "bytes", 1.5 * 2**30),
        ("1.2x-latency", "latency", 1.2),
    ],
)
def test_read(text, kind, value):
    assert parse_budget(text) == Budget(kind, value)
    assert parse_budget(str(parse_budget(text))) == parse_budget(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4.5", "budget: '4.5' is none: write 4.5bits, 600MB, 123456B or 1.2x-latency"),
        ("-1bits", "budget: '-1bits' is none"),
        ("600mb", "budget: '600mb' is none"),
        ("0MB", "budget: 0MB is nothing"),
        ("0.9x-latency", "budget: 0.9x-latency: the fastest choice has 1x-latency"),
    ],
)
def test_refused(text, message):
    with pytest.raises(SpecError) as caught:
        parse_budget(text)
    assert str(caught.value).startswith(message)
