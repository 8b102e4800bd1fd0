"""What YAML text is read as, what is refused, and where each message points."""

import os
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphq.errors import SpecError
from graphq.frontends import load_spec
from graphq.frontends.document import Section, read_mapping, show, spell
from graphq.frontends.yaml_text import read_file, read_text


def test_plain_data_and_its_lines():
    document = read_text("a: 1\nb:\n  - x\n  - c: [yes, 1e3, 1_0, 010, ~, 0.5]\nd: 'no'\n", "f.yaml")
    assert document.root == {"a": 1, "b": ["x", {"c": [True, "1e3", 10, 8, None, 0.5]}], "d": "no"}
    assert document.lines[("b", 1, "c")] == 4
    assert document.problems == []
    assert document.prefix(("b", 1, "c", "missing")) == "f.yaml:4:b[1].c.missing: "
    assert document.origin(("d",), "d") == "d (line 5)"


def test_aliases_are_expanded():
    assert read_text("a: &x {b: [1]}\nc: *x\n").root == {"a": {"b": [1]}, "c": {"b": [1]}}


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 25))
AMPLE = "[" + "x, " * 10_000 + "x]"


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("", ["f.yaml: the file is empty"]),
        ("# only a comment\n", ["f.yaml: the file is empty"]),
        ("---\n", ["f.yaml: the file is empty"]),
        ("- a\n", ["f.yaml: the file is not a mapping of keys to values"]),
        ("just text", ["f.yaml: the file is not a mapping of keys to values"]),
        ("a: 1\nb: [1, 2\nc: 3\n", ["f.yaml:3: while parsing a flow sequence expected ',' or ']', but got ':'"]),
        ("a: 1\n\tb: 2\n", ["f.yaml:2: while scanning for the next token found character '\\t' that cannot start any token"]),
        ("a: *x\n", ["f.yaml:1: found undefined alias 'x'"]),
        ("a: 1\n---\nb: 2\n", ["f.yaml:2: expected a single document in the stream but found another document"]),
        ("a: 1\nb: \x00\n", ["f.yaml:2: text does not hold the character 0x0"]),
        ('a: "\\UFFFFFFFF"\n', ["f.yaml: not YAML: Python int too large to convert to C int"]),
        ("a: !!python/object/apply:os.system [ls]\nb: !mine x\n", [
            "f.yaml:1: tags are not read: 'tag:yaml.org,2002:python/object/apply:os.system'",
            "f.yaml:2: tags are not read: '!mine'",
        ]),
        ("a: !!int '1'\n", ["f.yaml:1: tags are not read: 'tag:yaml.org,2002:int'"]),
        ("a: !!bool maybe\n", ["f.yaml:1: tags are not read: 'tag:yaml.org,2002:bool'", "f.yaml:1:a: 'maybe' is not a number"]),
        ("a: 1\nb:\n  c: 1\n  c: 2\na: 3\n", [
            "f.yaml:4:b.c: the key stands twice, first in line 3",
            "f.yaml:5:a: the key stands twice, first in line 1",
        ]),
        ("on: 1\n", ["f.yaml:1: the key 'on' does not read as a string; quote it"]),
        ("a:\n  1: x\n  ? [b]\n  : y\n", [
            "f.yaml:2:a: the key '1' does not read as a string; quote it",
            "f.yaml:3:a: the key a list does not read as a string; quote it",
        ]),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", ["f.yaml:3:c: merge keys (<<) are not read; write the keys out"]),
        ("a: 2024-01-01\n", ["f.yaml:1:a: 2024-01-01 reads as a date; quote it"]),
        ("a: 0b_\n", ["f.yaml:1:a: '0b_' is not a number"]),
        (f"a: 1{'0' * 20}\n", ["f.yaml:1:a: '100000000000000000000' has more than 64 bits"]),
        (f"a: {'9' * 5000}\n", [f"f.yaml:1:a: '{'9' * 60}'... is not a number"]),
        (f"a: {'[' * 40}{']' * 40}\n", ["f.yaml:1: nested more than 32 deep"]),
        ("\n".join(" " * i + "a:" for i in range(40)), ["f.yaml:32: nested more than 32 deep"]),
        ("b: 1\na: &x [*x]\n", ["f.yaml:2:a: nested more than 32 deep"]),
        (f"b: 1\na: {AMPLE}\n", ["f.yaml:2: more than 10,000 values, aliases expanded"]),
        (BOMB, ["f.yaml:12:a11: more than 10,000 values, aliases expanded"]),
    ],
)  # fmt: skip
def test_refused_text(text, problems):
    with pytest.raises(SpecError) as caught:
        document = read_text(text, "f.yaml")
        document.finish()
    assert list(caught.value.problems) == problems


def test_refused_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"a: 1\nb: \xff\n")
    (tmp_path / "large.yaml").write_bytes(b"a: 1\n" + b"#" * 1_000_000)
    (tmp_path / "empty.yaml").touch()
    os.mkfifo(tmp_path / "pipe")
    for path, message in {
        "bytes.yaml": "bytes.yaml:2: byte 0xff is not UTF-8 text",
        "large.yaml": "large.yaml: the file is larger than 1,000,000 bytes",
        "empty.yaml": "empty.yaml: the file is empty",
        "none.yaml": "none.yaml: no such file",
        ".": ".: is a folder; name the YAML file in it",
        "pipe": "pipe: is not a regular file",
        "bytes.yaml/x": "'bytes.yaml/x': Not a directory",
        "a\0b": "'a\\x00b' is not a path",
        "\ud800": "'\\ud800' is not a path",
        "a" * 300: f"{'a' * 60!r}...: File name too long",
    }.items():
        with pytest.raises(SpecError, match=f"^{re.escape(message)}$"):
            load_spec(path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "bom.yaml").write_bytes("\ufeffé: 1\n".encode())
    assert read_file(tmp_path / "bom.yaml").root == {"é": 1}


def test_a_mapping_is_copied():
    source: dict[Any, Any] = {"a": [{"b": 1}], "t": (1, 2.5, None)}
    document = read_mapping(source)
    source["a"][0]["b"] = 2
    assert document.root == {"a": [{"b": 1}], "t": [1, 2.5, None]}


RECURSIVE: dict[str, object] = {}
RECURSIVE["a"] = [RECURSIVE]


@pytest.mark.parametrize(
    ("source", "problems"),
    [
        ({"a": {1: 2}, "b": {1, 2}, "c": 2**64}, [
            "a: the key 1 is not a string",
            "b: a value of type set holds more than strings",
            "c: the number has more than 64 bits",
        ]),
        (RECURSIVE, ["a: nested more than 32 deep"]),
        ({"a": [0] * 10_000}, ["a: more than 10,000 values, aliases expanded"]),
    ],
)  # fmt: skip
def test_refused_mappings(source, problems):
    with pytest.raises(SpecError) as caught:
        read_mapping(source)
    assert list(caught.value.problems) == problems


def test_wrong_types_are_named():
    values = read_mapping({"i": True, "j": 4.0, "b": "False", "t": 3, "s": [1], "l": "x", "e": None}).root
    section = Section(document := read_mapping({}), values, ("at",))
    assert section.integer("i") is section.integer("j") is section.boolean("b") is section.text("t") is None
    assert section.section("s") is section.text("gone", required=True) is section.boolean("gone") is None
    assert section.items("l") == section.items("gone") == ()
    section.section("e")
    section.only(("i", "b", "t", "s", "l", "else", "jj"))
    assert document.problems == [
        "at.i: True is not an integer",
        "at.j: 4.0 is not an integer",
        "at.b: 'False' is not true or false",
        "at.t: 3 is not a string",
        "at.s: a list is not a mapping",
        "at.gone: is missing",
        "at.l: 'x' is not a list",
        "at.e: an empty value is not a mapping",
        "at.j: unknown key; did you mean jj?",
        "at.e: unknown key",
    ]


def test_keys_and_values_in_messages_are_short_and_on_one_line():
    assert spell(("a", 2, "b-c", "x\ny", "k" * 99)) == f"a[2].b-c.'x\\ny'.'{'k' * 60}'..."
    assert [show(value) for value in (None, True, 1.5, "a\nb", {}, [], 10**30, object())] == [
        *(
            "an empty value",
            "True",
            "1.5",
            r"'a\nb'",
            "a mapping",
            "a list",
            "a value of type int",
            "a value of type object",
        )
    ]


@given(st.text() | st.lists(st.sampled_from(["a", ":", " ", "\n", "- ", "[", "]", "{", "&x ", "*x", "!", '"', "'", "|", "1", "%", "<<", "?", "\\x", "---"])).map("".join))  # fmt: skip
def test_any_text_is_read_or_refused(text):
    problems = ()
    try:
        read_text(text, "f.yaml")
    except SpecError as error:
        problems = error.problems
    assert all("\n" not in problem for problem in problems)
