"""Presets: each is a spec, with or without algorithms; a name that there is not; a file beside a preset of its name."""

from pathlib import Path
from typing import Any

import pytest
import torch

import graphq
from graphq.errors import SpecError
from graphq.frontends import load_spec
from graphq.frontends.presets import SCHEMES
from graphq.spec.match import Blocks
from graphq.spec.plan import Plan
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Algorithm, Rule, Spec


@pytest.mark.parametrize("name", SCHEMES)
def test_every_preset_is_a_spec(name):
    weight, activation = SCHEMES[name]
    plan = Plan(parse_quant(weight), None if activation is None else parse_quant(activation))
    assert load_spec(name) == Spec((Rule(Blocks(), plan),))


def test_algorithms_in_order():
    spec = load_spec("w4a4+rotate+gptq")
    assert spec == Spec(
        (Rule(Blocks(), Plan(parse_quant("int4/channel"), parse_quant("int4/token/dynamic"))),),
        (Algorithm("rotate"), Algorithm("gptq")),
    )


def test_names_that_there_are_not():
    with pytest.raises(SpecError, match=r"^w4a17: no preset of this name; did you mean w4a16\? \(there are w8a8, .*"):
        load_spec("w4a17")
    with pytest.raises(SpecError, match=r"^w4a16\.yaml: no such file$"):
        load_spec("w4a16.yaml")
    with pytest.raises(SpecError, match=r"^w4a16: no such file$"):
        load_spec("w4a16", "llmc")


def test_a_file_beside_a_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w4a16").write_text("graphq: 1\nweight: int2/g32\n")
    (tmp_path / "own").write_text("graphq: 1\nweight: int2/g32\n")
    assert load_spec("w4a16").rules[0].decision == Plan(parse_quant("int4/g128"))
    for path in ("./w4a16", "own"):
        assert load_spec(path).rules[0].decision == Plan(parse_quant("int2/g32"))


def test_the_documentation_lists_them():
    text = (Path(__file__).parents[2] / "docs" / "specs.md").read_text()
    for name, (weight, activation) in SCHEMES.items():
        assert f"| `{name}` | `{weight}` | {f'`{activation}`' if activation else 'float'} |\n" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_every_preset_compiles(name):
    model, x = (
        torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32)),
        torch.ones(3, 128),
    )
    made = graphq.compile(model, name, inputs=x, calibration=[x])
    assert all(layer.weight is not None for layer in made.report.layers)
    found: Any = made(x)
    assert found.shape == (3, 32)
