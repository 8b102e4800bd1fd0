"""JSON files as documents: lines of keys, and what is refused with which message."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphq.errors import SpecError
from graphq.frontends import load_spec
from graphq.frontends.json_text import read_json, read_json_file


def test_values_and_lines():
    text = '\ufeff{ "a" : 1,\n\n"b": [true, null, {"c": -2.5e1}],"\\u00e9\\n": "x",\r\n\t"d": {}}\n'
    document = read_json(text[1:], "f.json")
    assert document.root == {"a": 1, "b": [True, None, {"c": -25.0}], "é\n": "x", "d": {}}
    inner = {("b", 0): 3, ("b", 1): 3, ("b", 2): 3, ("b", 2, "c"): 3}
    assert document.lines == {("a",): 1, ("b",): 3, **inner, ("é\n",): 3, ("d",): 4}
    nested = read_json('{"a": [1,\n[],\n{},\n[{\n"b": "]}\\"", "c\\u0041":\n[2, 3]}],\n4]}').lines
    assert nested == {
        ("a",): 1,
        ("a", 0): 1,
        ("a", 1): 2,
        ("a", 2): 3,
        ("a", 3): 4,
        ("a", 3, 0): 4,
        ("a", 4): 7,
        ("a", 3, 0, "b"): 5,
        ("a", 3, 0, "cA"): 5,
        ("a", 3, 0, "cA", 0): 6,
        ("a", 3, 0, "cA", 1): 6,
    }
    assert (document.path, document.problems) == ("f.json", [])
    assert read_json("{}").root == {}
    assert read_json(" { } ").root == {}


SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
DATA = st.recursive(
    SCALARS | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)


@given(st.dictionaries(st.text(), DATA, max_size=5), st.sampled_from([None, 0, 2]), st.booleans())
def test_reading_undoes_writing(data, indent, ascii_only):
    text = json.dumps(data, indent=indent, ensure_ascii=ascii_only)
    document = read_json(text)
    assert document.root == data
    if indent is not None:
        lines = text.split("\n")
        for key in data:
            assert lines[document.lines[(key,)] - 1].lstrip().startswith(json.dumps(key, ensure_ascii=ascii_only))


@given(st.text(alphabet='{}[]",:\\u0 1ae.-\n') | st.text())
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(SpecError):
        assert read_json(text).root == json.loads(text)


DEEP = "[" * 40 + "]" * 40


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "f.json: the file is not an object of keys to values"),
        ("[1]", "f.json: the file is not an object of keys to values"),
        ("{", "f.json:1: not JSON: Expecting value"),
        ('{"a": 1,}', "f.json:1: not JSON: Illegal trailing comma before end of object"),
        ('{"a": 1', "f.json:1: not JSON: Expecting ',' delimiter"),
        ('{"a": 1\n"b": 2}', "f.json:2: not JSON: Expecting ',' delimiter"),
        ('{"a"\n 1}', "f.json:2: not JSON: Expecting ':' delimiter"),
        ('{\n"a": x}', "f.json:2: not JSON: Expecting value"),
        ('{"a": 1}\n}', "f.json:2: not JSON: Extra data"),
        ('{"a": "x\n"}', "f.json:1: not JSON: Invalid control character at"),
        ("{1: 2}", "f.json:1: a key is not a string"),
        ('{\n"a": 1,\n"b": 2,\n"a": 3}', "f.json:4:a: the key stands twice, first in line 2"),
        ('{\n"a": {"b": 1, "b": 1}}', "f.json:2: the key 'b' stands twice in one object"),
        ('{"a": NaN}', "f.json:1: NaN is not a finite number"),
        ('{"a": [-Infinity]}', "f.json:1: -Infinity is not a finite number"),
        ('{"a": [1e999]}', "f.json:1:a: a number is not finite"),
        ('{"a": 1' + "0" * 30 + "}", "f.json:1:a: a number has more than 64 bits"),
        ('{"a": 1' + "0" * 5000 + "}", "f.json:1: a number has more than 64 bits"),
        ('{"a":\n' + DEEP + "}", "f.json:1:a: nested more than 32 deep"),
        ('{\n"a":' + "[" * 100_000 + "]" * 100_000 + "}", "f.json:2: nested more than 32 deep"),
        ('{"a": "\\ud800"}', "f.json: a string holds half of a surrogate pair"),
        ('{"a": [1, 2, 3], "b": 1}', "f.json:1:a: more than 3 values"),
        ('{"a": "", "b": "",\n "c": ""}', "f.json:2:c: more than 3 values"),
    ],
)
def test_what_is_refused(text, problem):
    with pytest.raises(SpecError) as caught:
        read_json(text, "f.json", max_values=3 if "more than 3" in problem else 1000)
    assert caught.value.problems == (problem,)


def test_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"graphq": 1, "weight": "int8/channel"}')
    assert str(load_spec("a.json").rules[0].match) == "blocks"
    (tmp_path / "B.JSON").write_text('{"graphq": 1,\n "wieght": "int8/channel"}')
    with pytest.raises(SpecError, match=r"^B.JSON:2:wieght: unknown key; did you mean weight\?"):
        load_spec(tmp_path.joinpath("B.JSON").name)
    (tmp_path / "c.json").write_bytes(b'{"a":\n"\xff"}')
    (tmp_path / "large.json").write_bytes(b" " * 64_000_001)
    for name, problem in (
        ("c.json", "c.json:2: byte 0xff is not UTF-8 text"),
        ("none.json", "none.json: no such file"),
        ("large.json", "large.json: the file is larger than 64,000,000 bytes"),
    ):
        with pytest.raises(SpecError) as caught:
            read_json_file(name)
        assert caught.value.problems == (problem,)
