"""What an algorithm may fold factors into, in a spec: by kinds of subgraphs and by names of their sources."""

from typing import Any

import pytest

import graphq
from graphq.errors import SpecError
from graphq.frontends import load_spec, print_spec
from graphq.spec.folds import EVERYWHERE, NORMS, SUBGRAPHS, Folds, kinds_among
from graphq.spec.rules import Algorithm
from tests.models import tiny


def test_takes() -> None:
    assert all(EVERYWHERE.takes(kind, "model.norm") for kind in SUBGRAPHS)
    assert [kind for kind in SUBGRAPHS if NORMS.takes(kind, "model.norm")] == ["norm-linear"]
    some = Folds(("norm-linear", "ov"), ("*self_attn*", "*.input_layernorm"), ("*.3.*",))
    assert some.takes("ov", "model.layers.0.self_attn.v_proj")
    assert some.takes("norm-linear", "model.layers.30.input_layernorm")
    assert not some.takes("up-down", "model.layers.0.self_attn.v_proj")
    assert not some.takes("norm-linear", "model.layers.0.input_layernorm_2")
    assert not some.takes("ov", "model.layers.3.self_attn.v_proj")


def test_words() -> None:
    assert str(EVERYWHERE) == "everything"
    assert str(NORMS) == "norm-linear"
    assert str(Folds(("ov", "up-down"), ("*a", "b"), ("c",))) == "ov, up-down of *a b but c"
    assert str(Folds(exclude=("c", "d*"))) == "everything but c d*"
    assert kinds_among(["ov", "x", "norm-linear"]) == ("norm-linear", "ov")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"kinds": ("norm_linear",)}, "kinds: 'norm_linear' is not one of norm-linear, linear-linear, ov, up-down"),
        ({"kinds": ()}, "kinds: write some of norm-linear, linear-linear, ov, up-down, each once and in this order"),
        ({"kinds": ("ov", "ov")}, "kinds: write some of norm-linear, linear-linear, ov, up-down, each once and in this order"),
        ({"kinds": ("ov", "norm-linear")}, "kinds: write some of norm-linear, linear-linear, ov, up-down, each once and in this order"),
        ({"include": ()}, "include: is empty; leave it out for every source"),
        ({"include": ("a b",)}, "include: 'a b' is not a pattern of names, such as *input_layernorm"),
        ({"exclude": ("",)}, "exclude: '' is not a pattern of names, such as *input_layernorm"),
    ],
)  # fmt: skip
def test_bad_fields(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError) as caught:
        Folds(**fields)
    assert list(caught.value.problems) == [problem]


def test_no_option() -> None:
    with pytest.raises(SpecError, match=r"awq: folds is no option; give it as Algorithm\(\.\.\., folds=\.\.\.\)"):
        Algorithm("awq", (("folds", 1),))


def spec(**algorithms: Any) -> dict[str, Any]:
    return {
        "graphq": 1,
        "weight": "int8/channel",
        "algorithms": [{name.replace("_", "-"): options} for name, options in algorithms.items()],
    }


def test_the_native_form() -> None:
    text = """\
graphq: 1
rules:
  - match: blocks
    weight: int8/channel
algorithms:
  - smooth-quant:
      alpha: 0.8
      match: mlp
      folds:
        kinds:
          - norm-linear
          - up-down
        exclude:
          - '*.0.*'
  - awq:
      folds:
        include:
          - '*layernorm'
"""
    read = load_spec(text)
    assert [a.folds for a in read.algorithms] == [
        Folds(("norm-linear", "up-down"), exclude=("*.0.*",)),
        Folds(include=("*layernorm",)),
    ]
    assert print_spec(read) == text
    assert load_spec(spec(awq={"folds": {}})).algorithms[0].folds == EVERYWHERE


@pytest.mark.parametrize(
    ("folds", "problems"),
    [
        (["norm-linear"], ["algorithms[0].awq.folds: a list is not a mapping"]),
        ({"kind": "ov"}, ["algorithms[0].awq.folds.kind: unknown key; did you mean kinds?"]),
        ({"kinds": "ov"}, ["algorithms[0].awq.folds.kinds: 'ov' is not a list"]),
        ({"kinds": ["up_down", 3]}, [
            "algorithms[0].awq.folds.kinds[0]: 'up_down' is not one of norm-linear, linear-linear, ov, up-down; did you mean up-down?",
            "algorithms[0].awq.folds.kinds[1]: 3 is not a text"]),
        ({"kinds": [], "include": []}, [
            "algorithms[0].awq.folds.kinds: is empty; leave it out for all",
            "algorithms[0].awq.folds.include: is empty; leave it out for all"]),
        ({"include": ["a b"]}, ["algorithms[0].awq.folds: include: 'a b' is not a pattern of names, such as *input_layernorm"]),
    ],
)  # fmt: skip
def test_what_the_native_form_refuses(folds: object, problems: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(spec(awq={"folds": folds}))
    assert list(caught.value.problems) == problems


def test_what_compile_refuses() -> None:
    asked = spec(
        gptq={"folds": {"kinds": ["ov"]}},
        awq={"where": "multiply", "folds": {"kinds": ["ov"]}},
        smooth_quant={"folds": {"include": ["*input_layernrm", "*"], "exclude": ["nothing"]}},
    )
    with pytest.raises(SpecError) as caught:
        graphq.compile(tiny("llama"), asked, calibration=[])
    assert list(caught.value.problems) == [
        "algorithms[0]: gptq has no choice of what to fold into; leave out folds",
        "algorithms[1]: awq: folds: where is not fold, so that layers need no source",
    ]
    with pytest.raises(SpecError) as caught:
        graphq.compile(tiny("llama"), {**asked, "algorithms": asked["algorithms"][2:]}, calibration=[])
    assert list(caught.value.problems) == [
        "algorithms[0]: smooth-quant: folds: *input_layernrm matches no norm and no layer; did you mean input_layernorm?"
    ]


def test_the_difference_says_it() -> None:
    plain, chosen = spec(awq={}), spec(awq={"folds": {"kinds": ["ov"]}})
    assert "algorithms: awq -> awq into ov" in str(graphq.compare(tiny("llama"), plain, chosen)).splitlines()[0]


def test_explain_says_it() -> None:
    asked = spec(gptq={"match": ["mlp", "lm_head"], "block_size": 64}, awq={"folds": {"kinds": ["ov"]}}, rtn={})
    notes = graphq.explain(tiny("llama"), asked).notes
    assert [note for note in notes if "algorithm" in note] == [
        "algorithms[0]: algorithm gptq(block_size=64) for mlp or lm_head",
        "algorithms[1]: algorithm awq into ov",
        "algorithms[2]: algorithm rtn",
    ]


def test_in_place_nothing_is_folded() -> None:
    with pytest.raises(SpecError, match=r"awq: folds: nothing is folded in place; use graphq\.compile"):
        graphq.quantize(tiny("llama"), spec(awq={"folds": {"kinds": ["ov"]}}))
