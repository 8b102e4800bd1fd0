"""Whole models in the QDQ form, as text: a refactor leaves these files as they are, byte for byte.

``make golden`` rewrites them; read the difference before you keep it.
"""

import os
from pathlib import Path

import pytest

from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.pipelines import passes_for
from graphq.spec.match import Blocks, Name
from graphq.spec.plan import KeepFloat, Plan
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Rule, Spec
from tests.models import captured, random_inputs

GOLDEN = Path(__file__).with_name("golden")
MIXED = Spec(
    (
        Rule(Blocks(), Plan(parse_quant("int4/asym/g32"))),
        Rule(Blocks((1,)), Plan(parse_quant("int8/channel"), parse_quant("int8/asym/tensor"))),
    )
)
EXPERTS = Spec(
    (
        *MIXED.rules,
        Rule(Name("experts.1"), Plan(parse_quant("int6/channel"), parse_quant("int8/token/dynamic"))),
        Rule(Name("experts.2.down_proj"), KeepFloat("as an example")),
    )
)


@pytest.mark.parametrize(
    ("family", "spec"), [("llama", MIXED), ("gpt2", MIXED), ("bert", MIXED), ("resnet", MIXED), ("mixtral", EXPERTS)]
)
def test_a_whole_model_reads_as_it_did(family: str, spec: Spec) -> None:
    gm = captured(family)
    Pipeline(passes_for(spec), strict=True).run(gm, [random_inputs(gm)])
    text, file = dump(gm), GOLDEN / f"{family}.txt"
    if os.environ.get("EXPECTTEST_ACCEPT"):
        file.write_text(text)
    assert text == file.read_text(), f"{file.name} differs; make golden accepts the new text"
