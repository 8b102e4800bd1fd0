"""What a layer must be for a rule: texts of constraints, what each says of a layer, and layers as they are read."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphq
from graphq import compiler
from graphq.errors import SpecError
from graphq.frontends import load_spec, print_spec
from graphq.ir.layers import layers
from graphq.spec.constraint import (
    AtMost,
    MoreThan,
    Multiple,
    NoBias,
    OfDtype,
    OfKind,
    ZeroPadding,
    broken,
    parse_constraint,
)
from graphq.spec.match import KINDS, Kind, Layer, parse_match
from graphq.spec.plan import KeepFloat, Plan
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Rule, Spec, resolve
from tests.models import capture, captured, tiny

LAYER = Layer("a", "linear", (48, 100), dtype="bfloat16", bias=True)
AXES = st.sampled_from(["N", "K"])
SIZES = st.integers(1, 10**9 - 1)
CONSTRAINTS = (
    st.builds(Multiple, AXES, SIZES, SIZES)
    | st.builds(AtMost, AXES, SIZES)
    | st.builds(MoreThan, AXES, SIZES)
    | st.just(NoBias())
    | st.just(ZeroPadding())
    | st.builds(OfDtype, st.lists(st.sampled_from(["float32", "bfloat16"]), min_size=1).map(tuple))
    | st.builds(OfKind, st.lists(st.sampled_from(["linear", "conv2d"]), min_size=1).map(tuple))
)


@given(CONSTRAINTS)
def test_a_constraint_reads_as_it_prints(constraint):
    assert parse_constraint(str(constraint)) == constraint


@given(st.lists(CONSTRAINTS, max_size=4).map(tuple))
def test_a_rule_with_constraints_reads_as_it_prints(constraints):
    spec = Spec((Rule(Kind("linear|conv2d"), Plan(parse_quant("int8/channel")), only_if=constraints),))
    assert load_spec(print_spec(spec)) == spec


@given(st.text() | st.from_regex(r"[NK](/\d+)? [%<>=]+ \d+|(dtype|kind) [a-z0-9|]+", fullmatch=True))
def test_reading_any_text_raises_nothing_but_spec_errors(text):
    with contextlib.suppress(SpecError):
        parse_constraint(text)


@pytest.mark.parametrize(
    ("text", "how"),
    [
        ("N % 16", ""),
        ("N % 32", "needs N % 32: N is 48"),
        ("K % 50", ""),
        ("K % 64", "needs K % 64: K is 100"),
        ("K/32 % 2", ""),  # 3 whole groups and a short one
        ("N/32 % 2", ""),
        ("K/64 % 4", "needs K/64 % 4: K is 100"),
        ("N <= 48", ""),
        ("K <= 99", "needs K <= 99: K is 100"),
        ("K > 99", ""),
        ("K > 100", "needs K > 100: K is 100"),
        ("dtype float16|bfloat16", ""),
        ("dtype float16", "needs dtype float16: the weight is bfloat16"),
        ("kind linear", ""),
        ("kind conv1d|conv2d", "needs kind conv1d|conv2d: its kind is linear"),
        ("no bias", "needs no bias: it has one"),
        ("zero padding", ""),
    ],
)
def test_what_a_layer_breaks(text: str, how: str) -> None:
    assert broken((parse_constraint(text),), LAYER) == how


def test_all_that_a_layer_breaks_is_named() -> None:
    conv = Layer("c", "conv2d", (8, 8, 3, 3), padding="reflect")
    assert (
        broken((OfKind(("linear",)), ZeroPadding(), NoBias(), Multiple("K", 16)), conv)
        == "needs kind linear: its kind is conv2d; needs zero padding: it pads by reflect; needs K % 16: K is 8"
    )
    assert broken((OfKind(("linear",)),), Layer("e.0.up", "expert", (8, 8))) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("K % 0", "0 is not a whole number from 1 to 999999999"),
        ("K/0 % 2", "0 is not a whole number from 1 to 999999999"),
        ("N <= 0", "0 is not a whole number from 1 to 999999999"),
        ("dtype int8", "dtype: 'int8' is not one of float64, float32, float16, bfloat16"),
        ("kind expert", f"kind: 'expert' is not one of {', '.join(KINDS)}"),
        ("kind ", ("'kind ' is not a constraint; write K % 64, K/32 % 2, N <= 65535, K > 128, "
         "dtype float16|bfloat16, kind linear|conv2d, no bias or zero padding")),
        ("K%64", ("'K%64' is not a constraint; write K % 64, K/32 % 2, N <= 65535, K > 128, dtype float16|bfloat16, "
         "kind linear|conv2d, no bias or zero padding")),
    ],
)  # fmt: skip
def test_bad_texts(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_constraint(text)
    assert caught.value.problems == (message,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Multiple("M", 2), "'M' is not one of N, K"),  # pyright: ignore[reportArgumentType]
        (lambda: AtMost("N", True), "True is not a whole number from 1 to 999999999"),
        (lambda: MoreThan("N", 10**9), "1000000000 is not a whole number from 1 to 999999999"),
        (lambda: OfDtype(()), "dtype: '' is not one of float64, float32, float16, bfloat16"),
        (lambda: OfKind(()), f"kind: '' is not one of {', '.join(KINDS)}"),
    ],
)
def test_bad_objects(make: Any, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        make()
    assert caught.value.problems == (message,)


# -- rules


TEXT = """\
graphq: 1
rules:
  - match: kind:linear|conv2d
    weight: int8/channel
    only_if:
      - K % 64
      - no bias
"""


def test_a_layer_that_breaks_a_constraint_stays_float() -> None:
    spec = load_spec(TEXT)
    assert print_spec(spec) == TEXT
    fits = Layer("fits", "linear", (8, 64))
    short = Layer("short", "linear", (8, 32), bias=True)
    resolved, notes = resolve(spec, {"fits": fits, "short": short})
    assert resolved["fits"].decision == Plan(parse_quant("int8/channel"))
    assert resolved["short"].decision == KeepFloat("needs K % 64: K is 32; needs no bias: it has one")
    assert resolved["short"].rule == spec.rules[0]
    assert notes == ()


def test_a_later_rule_decides_even_if_its_constraint_is_broken() -> None:
    first, last = Plan(parse_quant("int8/channel")), Plan(parse_quant("int4/channel"))
    rules = (Rule(Kind("linear"), first), Rule(parse_match("a"), last, only_if=(Multiple("K", 64),)))
    resolved, _ = resolve(Spec(rules), {"a": LAYER, "b": Layer("b", "linear", (8, 64))})
    assert [str(one.decision) for one in resolved.values()] == [
        "float (needs K % 64: K is 100)",
        "weight int8/channel",
    ]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("weight: int8/channel, only_if: K % 64", ("rules[0].only_if: 'K % 64' is not a list of constraints, "
         "such as [K % 64]")),
        ("weight: int8/channel, only_if: [1, K]", "rules[0].only_if: 1 is not a constraint, such as K % 64"),
        ("float: true, only_if: [no bias]", "rules[0].only_if: the rule keeps layers float, whatever they are"),
    ],
)  # fmt: skip
def test_bad_rules(rule: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(f"graphq: 1\nrules:\n  - {{match: a, {rule}}}\n")
    assert caught.value.problems[0].partition(":")[2] == message


# -- kinds


def test_kinds() -> None:
    match = parse_match("kind:linear|conv2d")
    assert match == Kind("linear|conv2d")
    assert str(match) == "kind:linear|conv2d"
    kinds = ("linear", "conv1d", "conv2d", "embedding", "expert")
    assert [kind for kind in kinds if match.matches(Layer("a", kind, (2, 2)))] == ["linear", "conv2d", "expert"]
    assert not match.matches(Layer("a", "linear", (2, 2), named_only="router"))
    assert match.matches(Layer("lm_head", "linear", (2, 2), named_only="output head"))
    with pytest.raises(SpecError, match=r"^kind:linear\|conv2d matches no layer$"):
        resolve(Spec((Rule(match, Plan(parse_quant("int8/channel"))),)), {"a": Layer("a", "embedding", (2, 2))})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind:linear|", f"kind: '' is not one of {', '.join(KINDS)}"),
        ("kind:linear|expert", f"kind: 'expert' is not one of {', '.join(KINDS)}"),
        ("kind:linear|linear", "kind:linear|linear: write different kinds, or kind:linear for one"),
    ],
)
def test_bad_kinds(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_match(text)
    assert caught.value.problems == (message,)


# -- layers of graphs


class Convolutions(nn.Module):
    """A convolution of each padding mode, one that is padded outside of it, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.zeros = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.reflect = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
        self.circular = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
        self.replicate = nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate")
        self.outside = nn.Conv2d(2, 2, 3)
        self.pad = nn.ReflectionPad2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.replicate(self.circular(self.reflect(self.zeros(self.linear(x)))))
        return self.outside(self.pad(x))


def test_what_is_read_of_a_layer() -> None:
    found = layers(capture(Convolutions().bfloat16(), torch.ones(1, 2, 8, 8).bfloat16()))
    assert [(one.fqn, one.dtype, one.bias, one.padding) for one in found.values()] == [
        ("linear", "bfloat16", True, "zeros"),
        ("zeros", "bfloat16", False, "zeros"),
        ("reflect", "bfloat16", True, "reflect"),
        ("circular", "bfloat16", True, "circular"),
        ("replicate", "bfloat16", True, "replicate"),
        ("outside", "bfloat16", True, "zeros"),
    ]


def test_the_dtype_of_a_directory_is_the_one_it_records(tmp_path: Path) -> None:
    """Captured in float32, whether its weights are read or not."""
    place = tmp_path / "llama"
    tiny("llama", num_hidden_layers=1).bfloat16().save_pretrained(place)
    for weights in (True, False):
        found = layers(compiler.capture(place, weights=weights))
        assert {one.dtype for one in found.values()} == {"bfloat16"}


def test_biases_of_families() -> None:
    assert not any(one.bias for one in layers(captured("llama")).values())
    assert {name.rpartition(".")[2] for name, one in layers(captured("gpt2")).items() if one.bias} == {
        "c_attn",
        "c_proj",
        "c_fc",
    }


def test_compile_leaves_a_layer_float_and_reports_why() -> None:
    x = torch.ones(1, 2, 8, 8)
    spec = Spec((Rule(Kind("linear|conv2d"), Plan(parse_quant("int8/channel")), "all", only_if=(ZeroPadding(),)),))
    made = graphq.compile(Convolutions().eval(), spec, inputs=x)
    reasons = {one.layer.fqn: one.reason for one in made.report.layers}
    assert reasons["reflect"] == "needs zero padding: it pads by reflect"
    assert reasons["outside"] == ""
