"""From dialect to dialect: every example, written in every dialect that can hold it, plans every layer alike."""

from pathlib import Path
from typing import Any

import pytest

from graphq.errors import SpecError
from graphq.frontends import DIALECTS, convert_spec, load_spec, write_spec
from graphq.spec.activations import ActivationRule
from graphq.spec.constraint import parse_constraint
from graphq.spec.match import Blocks, Kind, Layer
from graphq.spec.plan import Plan
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Rule, Spec, resolve

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
FILES = sorted(path for folder in CONFIGS.iterdir() for path in folder.iterdir())


def decoder(blocks: int) -> dict[str, Layer]:
    """The layers of a Llama of so many blocks, with an odd one beside them."""
    names = (*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))
    layers = [
        Layer("model.embed_tokens", "embedding", (256, 128), named_only="embedding"),
        *(Layer(f"model.layers.{b}.{name}", "linear", (256, 256), b) for b in range(blocks) for name in names),
        Layer("lm_head", "linear", (256, 256), named_only="output head"),
    ]
    return {layer.fqn: layer for layer in layers}


def plans(spec: Spec, layers: dict[str, Layer]) -> dict[str, Plan | None]:
    """The plan of every layer; None: float."""
    resolved, _ = resolve(spec, layers)
    return {fqn: found.decision if isinstance(found.decision, Plan) else None for fqn, found in resolved.items()}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_layer_keeps_its_plan(path, dialect):
    spec = load_spec(path)
    assert spec.dialect == path.parent.name
    try:
        text = write_spec(spec, dialect)
    except SpecError:
        assert dialect not in ("native", spec.dialect), "a dialect holds what was read from it"
        return
    again = load_spec(text + "\n", dialect)
    assert again.dialect == dialect
    layers = decoder(32)
    try:
        expected = plans(spec, layers)
    except SpecError:  # for a model with other layers
        with pytest.raises(SpecError):
            plans(again, layers)
        return
    assert plans(again, layers) == expected
    assert (again.pipeline, again.prefix, again.cache) == (spec.pipeline, spec.prefix, spec.cache)
    assert [(a.name, dict(a.options)) for a in again.algorithms] == [(a.name, dict(a.options)) for a in spec.algorithms]
    if dialect == spec.dialect:
        assert again.run == spec.run


def test_some_examples_go_everywhere():
    """Converting is of use: how many of the examples each dialect can hold."""
    held = dict.fromkeys(DIALECTS, 0)
    for path in FILES:
        for dialect in DIALECTS:
            try:
                write_spec(load_spec(path), dialect)
                held[dialect] += 1
            except SpecError:
                pass
    assert held["native"] == len(FILES)
    assert all(count >= 10 for count in held.values()), held


@pytest.mark.parametrize("dialect", [dialect for dialect in DIALECTS if dialect != "native"])
@pytest.mark.parametrize("word", ["only_if", "exclusive"])
def test_a_flag_of_a_rule_is_kept_or_refused(dialect, word):
    flag: dict[str, Any] = {"only_if": (parse_constraint("K % 64"),)} if word == "only_if" else {"exclusive": "word"}
    match = Blocks() if dialect == "llmc" else Kind("linear")
    spec = Spec((Rule(match, Plan(parse_quant("int8/channel")), **flag),))
    if dialect == "amct" and word == "only_if":  # its combinations have constraints of their own
        word = "no such combination"
    with pytest.raises(SpecError) as caught:
        write_spec(spec, dialect)
    assert any(word in line for line in caught.value.problems), caught.value


@pytest.mark.parametrize("dialect", [dialect for dialect in DIALECTS if dialect != "native"])
def test_what_is_said_of_tensors_between_layers_is_refused_by_name(dialect):
    u8 = parse_quant("uint8/tensor")
    rule = Rule(Kind("linear"), Plan(parse_quant("int8/channel"), u8, u8))
    spec = Spec((rule,), activations=(ActivationRule(u8),), profile="ort-cpu")
    wanted = (
        f"{dialect} cannot say activations; leave them out",
        f"{dialect} cannot say profile: ort-cpu; leave it out",
        f"kind:linear: output uint8/tensor: {dialect} cannot say an output; leave it out",
    )
    for write in (write_spec, lambda spec, dialect: convert_spec(spec, dialect, adapt=True)):
        with pytest.raises(SpecError) as caught:
            write(spec, dialect)
        assert caught.value.problems == wanted
    assert load_spec(write_spec(spec, "native")) == spec
