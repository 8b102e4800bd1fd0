"""Globs: braces written out, and which patterns have names in common."""

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphq.frontends.modelslim.globs import expand, is_inside, is_name, may_meet


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("*", "*"),
        ("a.b", "a.b"),
        ("*.{q,k,v}_proj", "*.q_proj *.k_proj *.v_proj"),
        ("l.{3..6}.*", "l.3.* l.4.* l.5.* l.6.*"),
        ("l.{6..3..2}.*", "l.6.* l.4.*"),
        ("{08..10}*", "08* 09* 10*"),
        ("{0..10..5}*", "0* 5* 10*"),
        ("*{a,b{1,2}c,}x", "*ax *b1cx *b2cx *x"),
        ("{a,b}{1..2}*", "a1* a2* b1* b2*"),
        ("*{a,a}", "*a"),
        ("[!a-c]?*", "[!a-c]?*"),
    ],
)
def test_braces(text, expanded):
    assert expand(text) == tuple(expanded.split(" "))


NAMES = st.text("ab.", max_size=6)
PATTERNS = st.text("ab.*?", min_size=1, max_size=6)


@given(PATTERNS, PATTERNS, NAMES)
def test_patterns_that_both_match_a_name_may_meet(one, other, name):
    if fnmatch.fnmatchcase(name, one) and fnmatch.fnmatchcase(name, other):
        assert may_meet(one, other)


@given(PATTERNS, PATTERNS, NAMES)
def test_what_is_inside_matches_no_less(one, other, name):
    if is_inside(one, other) and fnmatch.fnmatchcase(name, one):
        assert fnmatch.fnmatchcase(name, other)


@pytest.mark.parametrize(
    ("one", "other", "meet", "inside"),
    [
        ("*", "*", True, True),
        ("a.*", "*", True, True),
        ("*", "a.*", True, False),
        ("a.*", "b.*", False, False),
        ("*.up", "*.down", False, False),
        ("*a*", "*b*", True, False),
        ("a.b", "a.*", True, True),
        ("a.b", "a.b", True, True),
        ("a.b", "a.c", False, False),
        ("a.*", "a.b", True, False),
        ("a.?", "a.*", True, True),
        ("a.*", "a.?", True, False),
        ("a.b", "a.?", True, True),
        ("a.?b", "a.?", False, False),
        ("a.?", "a.?", True, True),
        ("[ab].c", "b.*", True, False),  # brackets: any character
        ("x*.mlp.*", "*mlp*", True, True),
    ],
)
def test_meeting(one, other, meet, inside):
    assert (may_meet(one, other), may_meet(other, one), is_inside(one, other)) == (meet, meet, inside)


def test_names():
    assert is_name("a.b")
    assert not any(is_name(pattern) for pattern in ("a*", "a?", "[a]"))
