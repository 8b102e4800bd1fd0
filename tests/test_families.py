"""Families of transformers, each by a tiny model: captured, equal to the model, quantized and generating as before.

``python -m tests.families NAME`` keeps what has changed in ``tests/golden/families.json``; read the difference.
"""

from pathlib import Path

import pytest

from tests import families
from tests.family_models import FAMILIES, Family

SAMPLE = ("qwen3", "lfm2", "electra", "deit")  # a few seconds each in CI; all others are slow
_ERROR = 0.3  # how far a W8A8 error may be from the one that is kept, on another processor


KEPT = families.known()
# Families without a row, each with its reason.
UNMEASURED: dict[str, str] = {}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(one, id=one.name, marks=[] if one.name in SAMPLE else pytest.mark.slow)
        for one in FAMILIES
        if one.name in KEPT
    ],
)
def test_what_comes_of_a_family(family: Family) -> None:
    wanted, found = KEPT[family.name], families.measure(family)
    if wanted.error is not None and found.error is not None:
        assert found.error == pytest.approx(wanted.error, rel=_ERROR)
    assert families.without_error(found) == families.without_error(wanted)
    assert found.equal == found.sizes, "a graph that is captured gives what the model does"
    assert found.generates is not False


def test_families_have_names_of_their_own_and_rows_or_a_reason() -> None:
    names = [one.name for one in FAMILIES]
    assert len(set(names)) == len(names)
    assert set(KEPT) | UNMEASURED.keys() == set(names)
    assert not KEPT.keys() & UNMEASURED.keys()


def test_most_families_are_captured() -> None:
    assert sum(row.is_captured for row in KEPT.values()) >= 165


def test_what_is_refused_says_what_to_do() -> None:
    """Each error names a module or a class of the model, and is no raw exception."""
    for name, row in KEPT.items():
        if not row.is_captured:
            assert len(row.captured) > 40, name
            assert "Traceback" not in row.captured


def test_the_document_is_printed_from_what_is_kept() -> None:
    page = Path(__file__).parents[1] / "docs" / "families.md"
    assert page.read_text() == families.document(KEPT)
