"""Guards that the declared dimensions imply, near misses, and no guard accepted that fails anywhere."""

import itertools
import operator
from collections.abc import Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphq.capture.guards import unproved
from graphq.capture.source import TOTAL

RANGES = {"batch": (1, 1 << 20), "sequence": (1, 4096), "past_sequence": (0, 1 << 20), "groups": (2, 1 << 20)}
# Inputs as a causal language model declares them: ids, mask, and one cache.
SHAPES = (("batch", "sequence"), ("batch", TOTAL), ("batch", 4, "past_sequence", 8))
BATCH, SEQUENCE, TOTALS, PAST, HEADS = (
    f"L['tensors'][{tensor}].size()[{axis}]" for tensor, axis in ((0, 0), (0, 1), (1, 1), (2, 2), (2, 1))
)


@pytest.mark.parametrize(
    "guard",
    [
        f"{BATCH} == L['tensors'][2].size()[0]",
        f"{TOTALS} == {SEQUENCE} + {PAST}",
        f"{SEQUENCE} + {PAST} + ((-1)*{TOTALS}) <= 0",
        f"({HEADS}*{SEQUENCE}) == 4*{SEQUENCE}",
        f"{HEADS} == 4",
        # Both from Llama: the mask's stride, whichever factor is the smaller one.
        f"min(8*{SEQUENCE} + 8*{PAST}, 16*{SEQUENCE} + 16*{PAST}) == (8*{SEQUENCE} + 8*{PAST})",
        f"{TOTALS} <= {SEQUENCE} + {PAST}",
        # Both from GPT-2: the mask as [batch, -1].
        f"(({BATCH}*{TOTALS}) % {BATCH}) == 0",
        f"({BATCH}*{TOTALS}) == ({BATCH}*(({BATCH}*{TOTALS}) // {BATCH}))",
    ],
)
def test_guards_of_captured_models_are_implied(guard: str) -> None:
    assert unproved([guard], SHAPES, RANGES) == []


@pytest.mark.parametrize(
    "guard",
    [
        "sequence <= 4096",
        "sequence < 4097",
        "1 <= sequence",
        "0 < sequence",
        "1 <= sequence <= 4096",
        "0 <= past_sequence",
        "sequence != 0",
        "sequence != 4097",
        "not sequence == 0",
        "not (sequence > 4096 or sequence < 1)",
        "sequence == 1 or sequence >= 2",
        "sequence < 100 or sequence > 50",
        "sequence >= 1 and sequence <= 4096",
        "past_sequence < 1 or 2 * past_sequence > 1",
        "min(sequence, 4096) == sequence",
        "max(sequence, 1) == sequence",
        "max(1, sequence, 0) == sequence",
        "min(sequence, past_sequence) >= 0",
        "min(sequence, past_sequence) <= 4096",
        "max(sequence, past_sequence, batch) >= 1",
        "(8 * batch) % 8 == 0",
        "(8 * batch + 3) % 8 == 3",
        "(8 * batch * sequence - 1) % 8 == 7",
        "(-batch) % 1 == 0",
        "batch % 8 <= 7",
        "batch % 8 >= 0",
        "8 * (batch // 8) <= batch",
        "batch < 8 * (batch // 8) + 8",
        "8 * ((batch + 7) // 8) >= batch",
        "8 * (batch // 8) + batch % 8 == batch",
        "(16 * batch) // 8 == 2 * batch",
        "(16 * batch + 5) // 8 == 2 * batch",
        "sequence // 4097 == 0",
        "sequence % 4097 == sequence",
        "batch * batch >= batch",
        "10 * batch < batch * batch + 26",
        "batch ** 2 * sequence ** 2 - batch * sequence >= 0",
        "batch ** 2 + 2 * batch + 1 == (batch + 1) ** 2",
        "batch * sequence <= 4096 * batch",
        f"batch * sequence * 32 < {1 << 40}",
        "groups * groups - groups != 0",
        "(batch * groups) // groups == batch",
        "(batch * (groups - 1)) % (groups - 1) == 0",
        "3 == 3",
        "True",
    ],
)
def test_guards_that_the_ranges_imply(guard: str) -> None:
    assert unproved([guard], (), RANGES) == []


@pytest.mark.parametrize(
    "guard",
    [
        "sequence <= 4095",
        "sequence < 4096",
        "2 <= sequence",
        "1 < sequence",
        "2 <= sequence <= 4096",
        "1 <= past_sequence",
        "batch <= 4096",
        "sequence == 8",
        "sequence == batch",
        "past_sequence != 524289",  # fails at one point, which no short list of samples would hold
        "batch != sequence",
        "not sequence == 4096",
        "not sequence <= 4096",
        "sequence == 1 or sequence >= 3",
        "sequence < 50 or sequence > 50",
        "sequence >= 1 and sequence <= 4095",
        "min(sequence, 4095) == sequence",
        "max(sequence, 2) == sequence",
        "min(sequence, past_sequence) >= 1",
        "(8 * batch) % 16 == 0",
        "(4 * batch + 3) % 8 == 3",
        "batch % 8 == 0",
        "batch % 8 <= 6",
        "batch % 524287 < 524286",
        "8 * (batch // 8) == batch",
        "8 * (batch // 8) < batch",
        "(16 * batch + 8) // 8 == 2 * batch",
        "sequence // 4096 == 0",
        "sequence % 4096 == sequence",
        "batch * batch > batch",
        "batch * batch + 24 >= 10 * batch",  # holds at both ends, fails at 5
        "batch ** 2 + 2 * batch == (batch + 1) ** 2",
        "batch * sequence <= 4095 * batch",
        "batch * sequence * 32 < 2147483648",
        "(batch * groups + 2) // groups == batch",  # fails where groups is 2
        "groups * groups - 2 * groups != 0",
        "3 == 4",
        "False",
    ],
)
def test_near_misses_are_not_implied(guard: str) -> None:
    assert unproved([guard], (), RANGES) == [guard]


@pytest.mark.parametrize(
    "guard",
    [
        "",
        "sequence >=",
        "sequence \0",
        "sequence",
        "heads >= 0",  # no declared dimension
        "sequence >= 0.0",
        "sequence / 2 >= 0",
        "sequence >= -1.0",
        "-1 < True",
        "sequence ** batch >= 0",
        "sequence ** -1 >= 0",
        "sequence ** 9 >= 0",
        "sequence is sequence",
        "sequence in (1, 2)",
        "abs(sequence) >= 0",
        "min() >= 0",
        "min(sequence, key=1) >= 0",
        "math.min(sequence, 1) >= 0",
        "sequence % past_sequence >= 0",  # divides by 0 where the cache is empty
        "past_sequence // past_sequence <= 1",
        "sequence % -8 <= 0",
        "sequence % 0 == 0",
        "sequence if sequence else 1",
        "L['tensors'][0].stride()[0] >= 0",
        "L['tensors'][7].size()[0] == L['tensors'][7].size()[0]",
        "L['tensors'][0].size()[7] == L['tensors'][0].size()[7]",
    ],
)
def test_what_is_no_comparison_of_sizes_is_not_implied(guard: str) -> None:
    assert unproved([guard], SHAPES, RANGES) == [guard]


def test_reports_each_guard_once_in_the_names_of_the_dimensions() -> None:
    guards = [f"{TOTALS} <= 5", f"{BATCH} == 2", f"{TOTALS} <= 5", f"{BATCH} == {BATCH}", f"2*{TOTALS} == {HEADS}"]
    assert unproved(guards, SHAPES, RANGES) == ["total_sequence <= 5", "batch == 2", "2*total_sequence == 4"]


def test_a_range_of_one_size_is_that_size() -> None:
    ranges = {"batch": (3, 3), "sequence": (1, 9)}
    implied = [
        "batch == 3",
        "sequence % batch <= 2",
        "batch * (sequence // batch) <= sequence",
        "(6 * sequence) % batch == 0",
    ]
    assert unproved([*implied, "sequence % batch <= 1"], (), ranges) == ["sequence % batch <= 1"]


def test_a_guard_that_is_too_hard_is_not_implied() -> None:
    guard = "(batch * (batch + 1)) % 2 == 0"  # true, but not by bounds
    assert unproved([guard], (), {"batch": (1, 30)}) == []
    assert unproved([guard], (), RANGES) == [guard]


Values = Mapping[str, int]
Expression = tuple[str, Callable[[Values], int]]
BINARY: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
DIVISIONS: dict[str, Callable[[int, int], int]] = {"//": operator.floordiv, "%": operator.mod}
EXTREMES: dict[str, Callable[[int, int], int]] = {"min": min, "max": max}
COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def constant(value: int) -> Expression:
    return str(value), lambda _: value


def dimension(name: str) -> Expression:
    return name, lambda values: values[name]


def joined(text: str, f: Callable[[int, int], int], a: Expression, b: Expression) -> Expression:
    return text.format(a[0], b[0]), lambda values: f(a[1](values), b[1](values))


leaves = st.integers(-3, 9).map(constant) | st.sampled_from("st").map(dimension)
expressions = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(
            lambda o, a, b: joined(f"({{}} {o} {{}})", BINARY[o], a, b), st.sampled_from(sorted(BINARY)), inner, inner
        ),
        st.builds(
            lambda o, a, b: joined(f"({{}} {o} {{}})", DIVISIONS[o], a, b),
            st.sampled_from(sorted(DIVISIONS)),
            inner,
            st.integers(1, 5).map(constant) | st.just(dimension("s")),
        ),
        st.builds(
            lambda o, a, b: joined(f"{o}({{}}, {{}})", EXTREMES[o], a, b),
            st.sampled_from(sorted(EXTREMES)),
            inner,
            inner,
        ),
    ),
    max_leaves=6,
)
comparisons = st.builds(
    lambda o, a, b: joined(f"{{}} {o} {{}}", COMPARISONS[o], a, b),
    st.sampled_from(sorted(COMPARISONS)),
    expressions,
    expressions,
)
guards = comparisons | st.builds(
    lambda o, a, b: joined(f"({{}}) {o} ({{}})", (lambda x, y: x and y) if o == "and" else (lambda x, y: x or y), a, b),
    st.sampled_from(["and", "or"]),
    comparisons,
    comparisons,
)


@given(guards, st.integers(1, 3), st.integers(0, 6), st.integers(-1, 1), st.integers(0, 4))
def test_small_ranges_are_decided_as_by_trying_every_size(
    guard: Expression, low: int, width: int, second_low: int, second_width: int
) -> None:
    ranges = {"s": (low, low + width), "t": (second_low, second_low + second_width)}
    text, holds_at = guard
    points = itertools.product(*(range(first, last + 1) for first, last in ranges.values()))
    holds = all(holds_at(dict(zip(ranges, point, strict=True))) for point in points)
    assert unproved([text], (), ranges) == ([] if holds else [text])
