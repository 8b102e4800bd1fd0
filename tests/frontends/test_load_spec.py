"""Which dialect reads a source, and that no source makes anything but a spec or a ``SpecError``."""

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphq.errors import SpecError
from graphq.frontends import DIALECTS, load_spec
from graphq.frontends.yaml_text import read_file
from graphq.spec.match import Blocks
from graphq.spec.plan import Plan
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Rule, Spec

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def test_dialects():
    spec = Spec((Rule(Blocks(), Plan(parse_quant("int8/channel"))),))
    assert load_spec(spec) is spec
    assert load_spec({"graphq": 1, "weight": "int8/channel"}, "native") == spec
    looked_for = (
        "no dialect is recognised; looked for native: a top-level key graphq; llmc: a top-level quant with method or "
        "weight, or quant or sparse beside base and model; llm-compressor: a key that ends in _stage, _modifiers or "
        "Modifier, or a quantization_config with quant_method compressed-tensors; amct: a top-level quant_cfg; modelslim: "
        "a top-level apiversion, model_quant_type, or <layer>.weight with a type such as W8A8"
    )
    cases: list[tuple[Any, str | None, str]] = [
        ({"a": 1}, None, looked_for),
        ({"quant": {"bit": 4}}, None, looked_for),
        ({"weight": "int8/channel"}, "native", "graphq: is missing"),
        ({"graphq": 1}, "llm", f"'llm' is not a dialect; did you mean llmc? (known: {', '.join(DIALECTS)})"),
        ({"graphq": 1}, "gguf", f"'gguf' is not a dialect (known: {', '.join(DIALECTS)})"),
        ([1], None, "a spec is a path, a preset's name, a mapping or a Spec, not a list"),
    ]
    for source, dialect, problem in cases:
        with pytest.raises(SpecError) as caught:
            load_spec(source, dialect)
        assert caught.value.problems == (problem,)


def test_an_unrecognised_file_names_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("f.yaml").write_text("a: 1\na: 2\n")
    with pytest.raises(SpecError) as caught:
        load_spec("f.yaml")
    first, second = list(caught.value.problems)
    assert first == "f.yaml:2:a: the key stands twice, first in line 1"
    assert second.startswith("f.yaml: no dialect is recognised; looked for native: a top-level key graphq; llmc: ")


WORDS = st.sampled_from(
    [
        *("graphq", "rules", "match", "float", "input", "algorithms", "cache", "blocks", "int8/channel", "=a", "*.b"),
        *("base", "model", "quant", "method", "weight", "act", "kvcache", "special", "RTN", "Awq", "bit", "symmetric"),
        *("granularity", "per_group", "per_token", "group_size", "calib_algo", "static", "int_range"),
        *("mix_bits", "setting_0", "setting_1", "layer_name", "down_proj#0-1", "do_quant", "inherit", "none"),
        *("quant_stage", "quant_modifiers", "QuantizationModifier", "GPTQModifier", "scheme", "W4A16", "config_groups"),
        *("targets", "Linear", "weights", "num_bits", "quantization_config", "quant_method", "compressed-tensors"),
        *("ignored_layers", "block_ids", "0-3", "layer_names", "speical_names"),
    ]
)
LEAVES = WORDS | st.text() | st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([1, 4, 8, -1])
DATA = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(), inner, max_size=5)
)


@given(st.dictionaries(WORDS, DATA, max_size=5), st.sampled_from([None, "native", "llmc", "llm-compressor"]))
def test_any_data_is_read_or_refused(data, dialect):
    with contextlib.suppress(SpecError):
        load_spec(data, dialect)


ACT = {"bit": 8, "symmetric": True, "granularity": "per_tensor", "static": True}
IGNORED = {"block_ids": [0, "2-3"], "layer_names": ["mlp.down_proj"], "speical_names": ["model.layers.1.mlp.up_proj"]}
QUANT: Any = read_file(CONFIGS / "llmc" / "mix_bits_4_everything.yaml").root["quant"]
FULL = {"quant": {**QUANT, "kvcache": {"method": "Naive", **ACT}}, "ignored_layers": IGNORED}


def paths(data: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [at, *(path for key, value in items for path in paths(value, (*at, key)))]


@given(st.sampled_from(paths(FULL)[1:]), DATA)
def test_a_config_with_one_value_replaced_is_read_or_refused(path, value):
    config: Any = copy.deepcopy(FULL)
    section = config
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    with contextlib.suppress(SpecError):
        load_spec(config, "llmc")
