"""The search for ops that fall back: in which order, how many, by which measure."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphq import compiler
from graphq.data.masks import MaskedBatch
from graphq.ir.pipeline import Pipeline
from graphq.passes.annotate import Annotate
from graphq.passes.fall_back import MEASURED, FallBack, reference_outputs
from graphq.report import ActivationsReport, FallbackReport
from graphq.spec.activations import ActivationRule
from graphq.spec.fallback import Fallback
from graphq.spec.match import parse_match
from graphq.spec.plan import Plan
from graphq.spec.profile import OpRule, Profile, int_activations, op_types
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Rule, Spec
from tests.models import capture

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
BOTH = OpRule(op_types("uint8 -> uint8", "uint16 -> uint16"))
EIGHT = OpRule(op_types("uint8 -> uint8"))
MOVES = OpRule(BOTH.types, "same")
ROWS = {"Mul": BOTH, "Add": BOTH, "Tanh": BOTH, "Relu": BOTH, "Concat": BOTH, "Slice": MOVES}


def search(
    model: nn.Module,
    fallback: Fallback,
    batches: Sequence[tuple[Tensor, ...]] = ((X,),),
    wanted: Sequence[MaskedBatch] | None = None,
    rules: tuple[ActivationRule, ...] = (),
    mask: str | None = None,
    **rows: OpRule,
) -> FallbackReport:
    """What the search does for a consumer with these rows beside ``ROWS``."""
    return searched(model, fallback, batches, wanted, rules, mask, **rows)[1]


def searched(
    model: nn.Module,
    fallback: Fallback,
    batches: Sequence[tuple[Tensor, ...]] = ((X,),),
    wanted: Sequence[MaskedBatch] | None = None,
    rules: tuple[ActivationRule, ...] = (),
    mask: str | None = None,
    **rows: OpRule,
) -> tuple[ActivationsReport, FallbackReport]:
    """The same, beside what runs in which types in the end."""
    gm = capture(model, *batches[0]) if mask is None else compiler.capture(model, batches[0], mask=mask)
    nothing = Rule(parse_match("*"), Plan(parse_quant("int8/channel")), may_match_nothing=True)
    Annotate(Spec((nothing,)), placed=True).run(gm)
    told: list[ActivationsReport] = []
    profile = Profile(
        "test", "a test", int_activations("uint8", "uint16"), parse_quant("int8/channel"), {**ROWS, **rows}
    )
    Pipeline([FallBack(profile, rules, fallback, wanted, placed=told.append)], strict=True).run(gm, list(batches))
    assert told[0].fallback is not None
    return told[0], told[0].fallback


class Made(nn.Module):
    """What ``made`` gives."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: Tensor) -> Any:
        return self.made(x)


def column(x: Tensor, size: float) -> Tensor:
    """A product whose first column is ``size`` times as large as the others, and then cut off: its rounding is an error
    of so many steps in what is left.
    """
    gain = torch.cat([torch.full((1,), size), torch.ones(7)])
    return (x * gain)[:, 1:]


def graded(x: Tensor) -> tuple[Tensor, ...]:
    """Four culprits, an output each, the worst neither first nor last."""
    return tuple(column(x, size) for size in (4.0, 32.0, 12.0, 2.0))


def test_the_worst_come_first_and_a_floor_takes_no_more_than_it_needs() -> None:
    model = Made(graded)
    found = [search(model, Fallback(max_ops=most)) for most in range(1, 5)]
    assert [len(report.ops) for report in found] == [1, 2, 3, 4]
    assert all(few.after < more.after for few, more in itertools.pairwise(found[:3]))
    for report in found[:3]:
        again = search(model, Fallback(min_sqnr=report.after))  # met to the last digit
        assert again.ops == report.ops
        assert again.is_met
        assert again.after == report.after
        beyond = search(model, Fallback(min_sqnr=report.after + 0.01))
        assert len(beyond.ops) > len(report.ops)
        limited = search(model, Fallback(min_sqnr=report.after + 0.01, max_ops=len(report.ops)))
        assert limited.ops == report.ops
        assert not limited.is_met


def test_a_floor_that_is_just_met_takes_nothing() -> None:
    before = search(Made(graded), Fallback(max_ops=1)).before
    report = search(Made(graded), Fallback(min_sqnr=before))
    assert report.ops == ()
    assert report.is_met
    assert search(Made(graded), Fallback(min_sqnr=before + 0.01)).ops != ()


def test_what_rounds_nothing_stays() -> None:
    """Of tensors of two numbers each, which any grid holds, nothing is gained by 16 bits."""
    model = Made(lambda x: torch.cat([column(x, 300.0), (x > 0).float()[:, 1:] * 255.0 + 0.0], 1))
    report = search(model, Fallback(min_sqnr=250.0))
    assert not report.is_met
    assert "Add" not in {name for name, _ in report.ops}


def test_the_worst_output_counts() -> None:
    good = search(Made(lambda x: (x * 0.5).tanh()), Fallback(min_sqnr=1.0)).before
    bad = search(Made(lambda x: column(x, 300.0).tanh()), Fallback(min_sqnr=1.0)).before
    assert good > bad + 10
    for outputs in (
        lambda x: ((x * 0.5).tanh(), column(x, 300.0).tanh()),
        lambda x: (column(x, 300.0).tanh(), (x * 0.5).tanh()),
    ):
        both = search(Made(outputs), Fallback(min_sqnr=1.0)).before
        assert both == pytest.approx(bad, abs=1)


def test_outputs_of_zeros_and_infinities() -> None:
    """Elements that are infinite in the float model are not counted, and outputs that are 0 and stay so are no error."""
    plain = search(Made(lambda x: column(x, 300.0).tanh()), Fallback(min_sqnr=1.0)).before
    hidden = search(
        Made(lambda x: torch.cat([column(x, 300.0).tanh(), torch.full_like(x, -torch.inf)], 1)), Fallback(min_sqnr=1.0)
    )
    assert hidden.before == pytest.approx(plain, abs=0.5)
    zeros = search(Made(lambda x: (column(x, 300.0).tanh(), (x * 0.0).tanh())), Fallback(min_sqnr=1.0))
    assert zeros.before == pytest.approx(plain, abs=0.5)


def test_batches_are_measured_together_and_no_more_than_a_few() -> None:
    """A batch among the first few counts, one behind them has no part in the figures but for ranges."""
    model = Made(lambda x: column(x, 30.0).tanh())
    calm = [(X * 0.01 * (1 + i / 10),) for i in range(MEASURED)]
    few = search(model, Fallback(max_ops=1), [*calm[:-1], (X,)])
    assert few.batches == MEASURED
    more = search(model, Fallback(max_ops=1), [*calm, (X,)])
    assert more.batches == MEASURED
    assert more.before < few.before - 10  # small numbers on the grid of large ones, which are not measured


class Bordered(nn.Module):
    """A product that reads a culprit and gives a worse one to an op without 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.cat([x[:, :1] * 30.0, x[:, 1:]], 1)
        gain = torch.cat([torch.full((1,), 30.0), torch.ones(7)])
        return (wide * gain).tanh()[:, 1:]


def test_an_op_that_is_float_for_one_tensor_is_not_told_to_be_in_16_bits() -> None:
    report = search(Bordered(), Fallback(min_sqnr=250.0), Tanh=EIGHT)
    ops = dict(report.ops)
    assert "uint16" in ops.values()
    assert [name for name, format in report.ops if format == "float"][-1].startswith("Tanh")
    product = [name for name in ops if name.startswith("Mul")][-1]
    assert ops[product] == "float"


def test_nothing_to_gain_is_nothing_to_tell() -> None:
    report = search(Made(lambda x: (x > 0).float() * 255.0), Fallback(max_ops=3))
    assert report.ops == ()
    assert report.before == report.after
    assert [count for count, _ in report.tried] == [0]


class Pooled(nn.Module):
    """The mean of valid tokens, integers of them, and the tokens."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        counts = mask[..., None].to(x.dtype)
        return (x * counts).sum(1) / counts.sum(1), x.argmax(-1), x * 0.5


def test_each_output_of_floats_has_its_own_valid_elements() -> None:
    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    gm = compiler.capture(Pooled(), {"x": x, "mask": mask}, mask="mask")
    (found,) = reference_outputs(gm, [(x, mask)])
    counted = [int(valid.full(y).sum()) for y, valid in zip(found, found.validity, strict=True)]
    assert counted == [2 * 8, (3 + 5) * 8]


def test_what_is_given_as_wanted_is_what_is_measured_by() -> None:
    """Such as what the model gave before its weights were rounded."""
    gm = capture(Made(lambda x: column(x, 30.0).tanh()), X)
    wanted = reference_outputs(gm, [(X,)])
    other = [type(one)([y + 0.5 for y in one], one.validity) for one in wanted]
    own, given = (search(Made(lambda x: column(x, 30.0).tanh()), Fallback(max_ops=1), wanted=w) for w in (None, other))
    assert given.before < 10 < own.before
    assert given.weights < 10 < own.weights


def test_what_masks_hide_is_not_measured() -> None:
    class Tokens(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return column(x * mask[..., None].to(x.dtype) + x * 0.5, 30.0).tanh()

    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    other = torch.where(mask[..., None] == 0, x * 40, x)
    found = [search(Tokens(), Fallback(max_ops=1), [(given, mask)], mask="mask") for given in (x, other)]
    assert found[0].before == found[1].before
    assert found[0].after == found[1].after


def test_what_is_no_number_any_more_is_an_error() -> None:
    """0 / 0, where a product that is small rounds to 0; and what is not 0, where the float model has nothing else."""
    report = search(Made(lambda x: (x * x) / (x * x)), Fallback(max_ops=1))
    assert report.before == -torch.inf
    report = search(Made(lambda x: column(x, 300.0) - (x * 1.0)[:, 1:]), Fallback(max_ops=1))
    assert report.before == -torch.inf


WIDE = parse_quant("uint16/tensor")


def test_what_is_in_16_bits_already_is_no_candidate() -> None:
    report = search(Made(graded), Fallback(max_ops=9), rules=(ActivationRule(WIDE),))
    assert report.ops == ()
    assert torch.inf > report.before == report.after


def test_what_others_read_in_16_bits_stays_in_8() -> None:
    """A sum that a product reads anew in 16 bits gives 8 bits before and after another op falls back."""
    rules = (ActivationRule(parse_quant("uint8/tensor")), ActivationRule(WIDE, ops=("Mul",)))

    def made(x: Tensor) -> tuple[Tensor, ...]:
        y = (x + 0.25).tanh()
        return y * 0.5, torch.cat([y, x], 1), torch.cat([(x.relu() + 400.0)[:, :1], x], 1)[:, 1:]

    for most in (0.5, 60.0):
        report, fallen = searched(Made(made), Fallback(min_sqnr=most, max_ops=1), rules=rules)
        assert len(fallen.ops) == (most > 1)
        assert "Tanh" not in dict(fallen.ops)
        assert {op.types for op in report.ops if op.kind == "Tanh"} == {"uint8 -> uint8"}


def test_what_moves_elements_in_16_bits_on_the_way_follows() -> None:
    moves = OpRule(op_types("uint8 -> uint8"), "same", also=op_types("uint16 -> uint16"))
    report = search(Made(lambda x: column(x, 30.0).tanh()), Fallback(max_ops=2), Slice=moves)
    assert set(dict(report.ops).values()) == {"uint16"}


def test_what_gives_8_bits_alone_is_float() -> None:
    report = search(Made(lambda x: column(x, 30.0).tanh()), Fallback(max_ops=2), Mul=EIGHT)
    assert dict(report.ops) == {"Mul": "float", "Tanh": "float"}


def test_what_may_give_floats_stays_where_its_output_falls_back() -> None:
    """Of a product whose output need not be quantized, what reads that falls back alone."""
    report = search(
        Made(lambda x: column(x, 30.0).tanh()), Fallback(max_ops=1), Mul=OpRule(BOTH.types, output="optional")
    )
    assert report.ops == (("Tanh", "uint16"),)


def test_what_reads_one_wide_tensor_of_two_is_wide() -> None:
    """Whatever it gave before."""
    report, fallen = searched(Made(lambda x: (column(x, 30.0) + x[:, 1:].tanh()).tanh()), Fallback(max_ops=2))
    assert fallen.ops == (("Mul", "uint16"), ("Add", "uint16"))
    assert [op.types for op in report.ops if op.kind == "Add"] == ["uint16 -> uint16"]
