"""The table of algorithms: it is whole, and nobody keeps a copy of a part of it."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import graphq
from graphq import algorithms
from graphq.algorithms import PASSES, PassContext, Request, preparations, quantization
from graphq.errors import SpecError
from graphq.frontends.convert_conventions import CONVENTIONS
from graphq.ir.pipeline import Pass
from graphq.spec.algorithms import ALGORITHMS, Entry, at_stage, defaults, problems
from graphq.spec.match import Layer, parse_match
from graphq.spec.plan import KeepFloat
from graphq.spec.rules import Algorithm, Rule, Spec
from tests import test_random_graphs, test_sharing
from tests.models import MLP
from tests.passes import test_axes

ONE = Entry("round", {}, needs_data=True, scope="layers", in_place=True)


def spec(*names: str) -> Spec:
    return Spec((Rule(parse_match("blocks"), KeepFloat("float")),), tuple(map(Algorithm, names)))


def fields_of(step: Pass) -> dict[str, Any]:
    """Its options with their defaults."""
    return {field.name: field.default for field in dataclasses.fields(cast(Any, step))}


def test_both_tables_have_the_same_names() -> None:
    assert [*PASSES] == [*ALGORITHMS]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_options_and_their_defaults_are_those_of_a_pass(name: str) -> None:
    everything = {key: True for key, option in ALGORITHMS[name].options.items() if option.allows(True)}
    made = Request(name, options=everything).make()  # with every flag, all of its passes
    fields = {key: default for step in made for key, default in fields_of(step).items()}
    options = defaults(name)
    assert {option: fields[option] for option in options} == options
    assert all(type(fields[option]) is type(value) for option, value in options.items())
    context = {"only", "unclipped", "folds", "note", "record", "seed", "choices"}
    assert fields.keys() - context == options.keys()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_default_is_allowed(name: str) -> None:
    nothing_fixed = {("auto-round", "lr")}  # None there is 1 / steps, which a spec leaves out
    for option, it in ALGORITHMS[name].options.items():
        assert it.allows(it.default) != ((name, option) in nothing_fixed)
        assert not it.allows("nonsense")


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_the_table_says_is_what_the_passes_take(name: str) -> None:
    entry, made = ALGORITHMS[name], Request(name, frozenset({"a layer"})).make()
    fields = {key for step in made for key in fields_of(step)}
    assert (entry.scope == "layers") == ("only" in fields)
    assert entry.folds == ("folds" in fields)
    assert entry.needs_data == (entry.stage in ("smooth", "round", "correct"))
    if entry.scope == "layers":
        assert [getattr(step, "only") for step in made] == [frozenset({"a layer"})]  # noqa: B009


def test_who_is_told() -> None:
    def note(_: str) -> None: ...

    def record(fqn: str, sqnr_db: float) -> None: ...

    for name in PASSES:
        chosen: dict[str, torch.Tensor] = {}
        request = Request(name, context=PassContext(record, note, 7, chosen=chosen), number=3)
        for step in request.make():
            given = {"note": note, "record": record, "seed": 7}
            choices = getattr(step, "choices", None)
            assert choices is None or (choices.algorithm, choices.tensors) == (f"3 {name}", chosen)
            for field in fields_of(step).keys() & given.keys():
                assert getattr(step, field) == given[field], (name, step.name, field)


def test_stages() -> None:
    assert at_stage("round") == ("gptq", "auto-round")
    assert at_stage("smooth") == ("smooth-quant", "awq")
    assert {name for name, entry in ALGORITHMS.items() if entry.in_place} == {"rtn", "smooth-quant", "awq", "gptq"}


def test_dialects_name_algorithms_and_options_that_there_are() -> None:
    for dialect, own in CONVENTIONS.items():
        for name, options in own.options.items():
            assert options.keys() <= ALGORITHMS[name].options.keys(), (dialect, name)
            assert all(ALGORITHMS[name].options[key].allows(v) for key, values in options.items() for v in values)


def test_the_documents_name_every_algorithm_and_option() -> None:
    text = (Path(__file__).parents[2] / "docs" / "algorithms.md").read_text(encoding="utf-8")
    for name, entry in ALGORITHMS.items():
        data = "yes" if entry.needs_data else "no"
        assert re.search(rf"^\| `{name}` \| [^|]+ \| {data} \|", text, re.MULTILINE), name
        assert all(f"`{option}`" in text for option in entry.options), name
    in_place = (Path(__file__).parents[2] / "docs" / "in_place.md").read_text(encoding="utf-8")
    assert [name for name in ALGORITHMS if f"`{name}`" not in in_place] == ["rtn"]  # which no spec need name


def test_what_all_algorithms_go_through_leaves_none_out() -> None:
    every = {name for name in ALGORITHMS if name != "rtn"}
    of_sharing = [algorithm for listed in test_sharing.ALGORITHMS.values() for algorithm in listed]
    assert names_of(of_sharing) == every - {"fold-batch-norm"}  # no batch norms there
    assert names_of(test_axes.ALGORITHMS) == every - {"fold-batch-norm", "rotate"}  # nor residual streams here
    assert {*test_random_graphs.ALGORITHMS} == every


def names_of(algorithms: Iterable[Any]) -> set[str]:
    return {algorithm if isinstance(algorithm, str) else next(iter(algorithm)) for algorithm in algorithms}


# -- a name that a table lacks


def test_a_row_without_a_pass_is_no_other_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, "fresh", ONE)  # pyright: ignore[reportArgumentType]
    layers = {"up": Layer("up", "linear", (8, 8), None)}
    for name in ("fresh", "gtpq"):
        with pytest.raises(KeyError, match=name):
            quantization(spec(name), layers, PassContext(), blocks=True)
        with pytest.raises(KeyError, match=name):
            Request(name).make()


@pytest.mark.parametrize("build", [preparations, quantization], ids=lambda build: build.__name__)
def test_a_name_that_there_is_not_stops_the_build(build: Callable[..., Any]) -> None:
    rest = {"layers": {}, "blocks": False} if "blocks" in inspect.signature(build).parameters else {}
    with pytest.raises(KeyError, match="gtpq"):
        build(spec("gtpq"), context=PassContext(), **rest)


def test_every_stage_has_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of each algorithm stands in the pipeline; rtn has none."""
    for name in ALGORITHMS:
        made: list[Any] = [*PASSES[name](Request(name))]
        monkeypatch.setitem(algorithms.PASSES, name, lambda it, made=made: made)  # pyright: ignore[reportArgumentType]
        asked = spec(name)
        passes = [*preparations(asked, PassContext()), *quantization(asked, {}, PassContext(), blocks=False)]
        assert [step for step in passes if any(step is one for one in made)] == made
        assert bool(made) == (name != "rtn")


def test_data_is_asked_for_by_the_table() -> None:
    for name, entry in ALGORITHMS.items():
        rules = {"graphq": 1, "weight": "int8/channel", "algorithms": [name]}
        if entry.needs_data:
            with pytest.raises(SpecError, match=f"calibration: none given, but the spec asks for {name}"):
                graphq.compile(MLP(), rules, inputs=torch.ones(2, 8))
    assert problems(spec("gtpq")) == [f"graphq has no algorithm gtpq; there are {', '.join(ALGORITHMS)}"]
