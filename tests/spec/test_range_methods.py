"""Range methods as text, and what their settings may be."""

from typing import Any, get_args

import pytest

from graphq.errors import SpecError
from graphq.spec.range_methods import Hqq, MinMax, MovingAverage, Mse, Percentile, RangeMethod, Ssz, parse_range_method


@pytest.mark.parametrize("method", [kind() for kind in get_args(RangeMethod) if kind is not MinMax], ids=str)
def test_a_method_reads_as_it_prints(method: RangeMethod) -> None:
    assert parse_range_method(str(method)) == method
    assert parse_range_method(f"{method}:") is None


def test_what_is_no_method() -> None:
    assert [parse_range_method(text) for text in ("minmax", "", "mse0.2", "hqq1:2:3", "Entropy")] == [None] * 5


def test_hqq_as_text() -> None:
    assert parse_range_method("hqq0.7:10:1.01:20") == Hqq()
    assert parse_range_method("hqq0.5:100:1.02:7") == Hqq(0.5, 100, 1.02, 7)
    assert str(Hqq(0.5, 100.0, 1.02, 7)) == "hqq0.5:100:1.02:7"


@pytest.mark.parametrize(
    ("kind", "settings", "problem"),
    [
        (MovingAverage, {"constant": 0}, "ema: 0 is not a number above 0 and up to 1"),
        (Percentile, {"percent": 50}, "percentile: 50 is not a number above 50 and up to 100"),
        (Mse, {"grid": 0}, "mse grid: 0 is not a positive integer"),
        (Ssz, {"steps": 1.5}, "ssz steps: 1.5 is not a positive integer"),
        (Hqq, {"norm": True}, "hqq norm: True is not a number above 0 and up to 1"),
    ],
)
def test_settings_out_of_range(kind: Any, settings: dict[str, float], problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        kind(**settings)
    assert str(caught.value) == problem
