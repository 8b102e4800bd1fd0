"""Attention and SiLU as their parts, where a consumer has those and not the whole: the same function."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.ir.views import ops_of, view
from graphq.lowering.profiles import PROFILES
from graphq.passes.decompose import Decompose, is_true_throughout
from graphq.pipelines import canonical_passes
from graphq.spec.profile import OpRule, Placed, Profile, int_activations, op_types
from graphq.spec.quant import parse_quant
from tests.graphs import assert_vals, run, targets
from tests.models import capture, captured

TYPES = op_types("uint8 -> uint8")
WHOLE = OpRule(TYPES)
Q = torch.randn(2, 4, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def table(**ops: OpRule) -> Profile:
    return Profile("test", "a test", int_activations("uint8"), parse_quant("int8/channel"), ops)


PARTS = dict.fromkeys(("MatMul", "Mul", "Add", "Softmax", "Sigmoid"), WHOLE)
BY_PARTS = table(**PARTS)


def decompose(gm: fx.GraphModule, profile: Profile = BY_PARTS) -> int:
    return Pipeline([Decompose(profile)], strict=True).run(gm)["decompose"]


class Attention(nn.Module):
    """Scaled dot product attention of x, and of x cut to fewer heads, with some of its options."""

    def __init__(self, kv: int = 4, masked: Any = None, **options: Any) -> None:
        super().__init__()
        self.kv, self.masked, self.options = kv, masked, options

    def forward(self, q: Tensor) -> Tensor:
        k = q.flip(2)[:, : self.kv]
        mask = None if self.masked is None else self.masked(q)
        return F.scaled_dot_product_attention(q, k, k * 2, attn_mask=mask, **self.options)


def hides_some(q: Tensor) -> Tensor:
    return q[:, :1] @ q[:, :1].transpose(-1, -2) > -1


def adds(q: Tensor) -> Tensor:
    return q[:, :1] @ q[:, :1].transpose(-1, -2)


CASES: dict[str, tuple[Attention, float]] = {
    "plain": (Attention(), 1e-12),
    "scale": (Attention(scale=0.3), 1e-12),
    "causal": (Attention(is_causal=True), 1e-12),
    "booleans": (Attention(masked=hides_some), 1e-12),
    "numbers": (Attention(masked=adds), 1e-12),
    "grouped": (Attention(kv=2, enable_gqa=True), 1e-12),
    "grouped alike": (Attention(enable_gqa=True), 1e-12),
    "grouped causal": (Attention(kv=1, enable_gqa=True, is_causal=True, scale=1.0), 1e-12),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_function(name: str) -> None:
    model, tolerance = CASES[name]
    gm = capture(model, Q)
    wanted = run(gm, Q)
    assert torch.equal(wanted, model(Q))
    assert decompose(gm) == 1
    assert not [target for target in targets(gm) if "attention" in target]
    assert (run(gm, Q) - wanted).abs().max() <= tolerance
    assert_vals(gm, Q[:1])
    assert decompose(gm) == 0


def test_heads_are_repeated_as_often_as_it_takes() -> None:
    q = torch.randn(2, 6, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gm = capture(Attention(kv=3, enable_gqa=True), q)
    wanted = run(gm, q)
    assert decompose(gm) == 1
    assert (run(gm, q) - wanted).abs().max() <= 1e-12
    assert targets(gm).count("aten.unsqueeze") == targets(gm).count("aten.expand") == 2
    one = capture(Attention(kv=1, enable_gqa=True), Q)
    decompose(one)
    assert targets(one).count("aten.expand") == 2
    assert "aten.unsqueeze" not in targets(one)
    alike = capture(Attention(enable_gqa=True), Q)
    decompose(alike)
    assert "aten.expand" not in targets(alike)


class Each(nn.Module):
    """What ``made`` gives of the input."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.made = made

    def forward(self, q: Tensor) -> Tensor:
        return self.made(q) * 2


MOVES = {**PARTS, **dict.fromkeys(("Unsqueeze", "Expand", "Reshape"), OpRule(TYPES, "same"))}
REPEATS: dict[str, tuple[Any, list[str]]] = {
    "each head": (lambda q: q.repeat_interleave(3, 1), ["unsqueeze", "expand", "reshape"]),
    "each channel": (lambda q: q.repeat_interleave(3, -1), ["unsqueeze", "expand", "reshape"]),
    "each of a batch": (lambda q: q.repeat_interleave(3, 0), ["unsqueeze", "expand", "reshape"]),
    "the only head": (lambda q: q[:, :1].repeat_interleave(3, 1), ["slice.Tensor", "expand"]),
}


@pytest.mark.parametrize("name", REPEATS)
def test_repeats_of_elements(name: str) -> None:
    made, wanted = REPEATS[name]
    gm = capture(Each(made), Q)
    assert decompose(gm, table(**MOVES)) == 1
    found = [target.removeprefix("aten.") for target in targets(gm) if "sym_size" not in target]
    assert found == [*wanted, "mul.Tensor"]
    assert torch.equal(run(gm, Q), made(Q) * 2)
    assert_vals(gm, Q[:1])
    without = {kind: rule for kind, rule in MOVES.items() if kind != "Expand"}
    assert decompose(capture(Each(made), Q), table(**without)) == 0


def test_repeats_that_are_no_moves_stay() -> None:
    assert decompose(capture(Each(lambda q: q.repeat_interleave(2)), Q), table(**MOVES)) == 0


ONE: dict[str, tuple[Any, int]] = {
    "behind": (lambda q: q[:, :1, None].expand(-1, -1, 3, -1, -1).reshape(q.shape[0], 3, 5, 8), 1),
    "in front": (lambda q: q[:, :1].unsqueeze(1).expand(-1, 3, -1, -1, -1).reshape(q.shape[0], 3, 5, 8), 1),
    "flattened": (lambda q: q[:, :1, None].expand(-1, -1, 3, -1, -1).flatten(1, 2), 1),
    "last": (lambda q: q[..., :1, None].expand(-1, -1, -1, -1, 3).reshape(q.shape[0], 4, 5, 3), 1),
    "the batch, too": (lambda q: q[:1, :1, None].expand(q.shape[0], -1, 3, -1, -1).reshape(q.shape[0], 3, 5, 8), 1),
    "two heads": (lambda q: q[:, :2, None].expand(-1, -1, 3, -1, -1).reshape(q.shape[0], 6, 5, 8), 0),
    "joined with another": (lambda q: q[:, :1, None].expand(-1, -1, 3, -1, -1).reshape(q.shape[0], 1, 15, 8), 0),
    "not joined": (lambda q: q[:, :1, None].expand(-1, -1, 3, -1, -1).reshape(q.shape[0], 3, 1, 5, 8), 0),
    "no new axis": (lambda q: q[:, :1].expand(-1, 3, -1, -1).reshape(q.shape[0], 3, 40), 0),
    "no repeat": (lambda q: q[:, :1, None].reshape(q.shape[0], 1, 5, 8), 0),
}


@pytest.mark.parametrize("name", ONE)
def test_an_axis_of_one_is_repeated_itself(name: str) -> None:
    """QNN reads elements of other places where the new axis stands beside one of size 1, and the batch is 1."""
    made, count = ONE[name]
    whole = replace(table(**MOVES), whole=True)
    gm = capture(Each(made), Q)
    before = dump(gm)
    assert decompose(gm, whole) == count
    assert torch.equal(run(gm, Q), made(Q) * 2)
    assert_vals(gm, Q[:1])
    if count:
        assert "aten.unsqueeze" not in targets(gm)
        assert decompose(gm, whole) == 0
    else:
        assert dump(gm) == before
    assert decompose(capture(Each(made), Q), table(**MOVES)) == 0


class Viewed(nn.Module):
    """Heads side by side again, by a view: torch lays out what attention gives with the heads inside."""

    def forward(self, x: Tensor) -> Tensor:
        heads = x.view(x.shape[0], 5, 4, 8).transpose(1, 2)
        made = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=(x[:, None, :, :1] > -1).mT)
        return made.transpose(1, 2).view(x.shape[0], 5, 32)


def test_what_attention_lays_out_in_its_own_way() -> None:
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    gm = capture(Viewed(), x)
    wanted = run(gm, x)
    assert decompose(gm) == 1
    assert (run(gm, x) - wanted).abs().max() <= 1e-6
    assert targets(gm).count("aten.reshape") == 2
    assert "aten.view" not in targets(gm)


def test_golden() -> None:
    gm = capture(Attention(is_causal=True), Q)
    decompose(gm)
    assert_expected_inline(
        dump(gm),
        """\
%q: f64[batch, 4, 5, 8] = input
%1: f64[batch, 4, 5, 8] = aten.flip(%q, [2])
%2: f64[batch, 4, 5, 8] = aten.alias(%1)
%3: f64[batch, 4, 5, 8] = aten.mul.Tensor(%2, 2)
%4: f64[batch, 4, 5, 8] = aten.mul.Tensor(%q, 0.35355339059327373)
%5: f64[batch, 4, 8, 5] = aten.transpose.int(%2, -2, -1)
%6: f64[batch, 4, 5, 5] = aten.matmul(%4, %5)
%7: int = aten.sym_size.int(%q, -2)
%8: int = aten.sym_size.int(%2, -2)
%9: bool[5, 5] = aten.ones([%7, %8], dtype=bool, device=cpu)
%10: bool[5, 5] = aten.tril(%9)
%11: bool[5, 5] = aten.bitwise_not(%10)
%12: f64[5, 5] = aten._to_copy(%11, dtype=f64)
%13: f64[5, 5] = aten.mul.Tensor(%12, -1000000000.0)
%14: f64[batch, 4, 5, 5] = aten.add.Tensor(%6, %13)
%15: f64[batch, 4, 5, 5] = aten.softmax.int(%14, -1)
%16: f64[batch, 4, 5, 8] = aten.matmul(%15, %3)
return [%16]
""",
    )


class Silu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x) + 1


def test_silu() -> None:
    gm = capture(Silu(), Q)
    wanted = run(gm, Q)
    assert decompose(gm) == 1
    assert_expected_inline(
        dump(gm),
        """\
%x: f64[batch, 4, 5, 8] = input
%1: f64[batch, 4, 5, 8] = aten.sigmoid(%x)
%2: f64[batch, 4, 5, 8] = aten.mul.Tensor(%x, %1)
%3: f64[batch, 4, 5, 8] = aten.add.Tensor(%2, 1)
return [%3]
""",
    )
    assert (run(gm, Q) - wanted).abs().max() <= 1e-15


def test_what_a_consumer_has_as_one_op_stays() -> None:
    for whole, model in (("Attention", Attention()), ("Silu", Silu())):
        assert decompose(capture(model, Q), table(**PARTS, **{whole: WHOLE})) == 0


@pytest.mark.parametrize("missing", ["MatMul", "Mul", "Add", "Softmax"])
def test_attention_stays_where_a_part_would_be_float(missing: str) -> None:
    places: tuple[Placed, ...] = ("never", "between", "through")
    others = {kind: rule for kind, rule in PARTS.items() if kind != missing}
    assert decompose(capture(Attention(), Q), table(**others)) == 0
    for placed in places:
        assert decompose(capture(Attention(), Q), table(**others, **{missing: OpRule(TYPES, placed=placed)})) == 0


def test_silu_stays_where_a_part_would_be_float() -> None:
    assert decompose(capture(Silu(), Q), table(Mul=WHOLE)) == 0
    assert decompose(capture(Silu(), Q), table(Sigmoid=WHOLE)) == 0


def test_attention_that_drops_at_random_stays() -> None:
    gm = capture(Attention(), Q)
    (op,) = (op for op in ops_of(gm) if "attention" in str(op.node.target))
    op.node.args = (*op.node.args[:3], None, 0.1)
    assert decompose(gm) == 0


# -- masks that hide nothing -------------------------------------------------------------------------------------------


def truth(mask: Any) -> bool:
    class Mask(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask(q))

    gm = capture(Mask(), Q)
    Pipeline(canonical_passes()).run(gm)
    (op,) = (op for op in ops_of(gm) if "attention" in str(op.node.target))
    return is_true_throughout(view(op.argument("attn_mask")))


def rows(q: Tensor, start: int = 0) -> Tensor:
    """0, 1, ... of each place, ``[1, 1, S, 1]``."""
    return (torch.arange(q.shape[2]) + start)[None, None, :, None]


def whole(mask: Tensor, q: Tensor) -> Tensor:
    return mask.expand(q.shape[0], 1, q.shape[2], q.shape[2])


@pytest.mark.parametrize(
    ("wanted", "mask"),
    [
        (True, lambda q: whole(rows(q) >= 0, q)),
        (True, lambda q: whole(rows(q, 2) >= 2, q)),
        (True, lambda q: whole(rows(q) >= -1, q)),
        (True, lambda q: whole(torch.add(rows(q), 2, alpha=3) >= 6, q)),
        (False, lambda q: whole(torch.add(rows(q), 2, alpha=-3) >= 2, q)),
        (False, lambda q: whole(rows(q) + rows(q) >= 0, q)),
        (False, lambda q: whole(rows(q).to(torch.int8) >= 0, q)),  # which may have become negative
        (False, lambda q: torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).to(q.dtype)),  # numbers, to be added
        (True, lambda q: torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)),
        (True, lambda q: whole(rows(q) >= 0, q) & torch.ones(q.shape[2], dtype=torch.bool)),
        (False, lambda q: whole(rows(q) >= 1, q)),
        (False, lambda q: whole(rows(q, -1) >= 0, q)),
        (False, lambda q: whole(rows(q) > 0, q)),
        (False, lambda q: torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()),
        (False, lambda q: torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool)),
        (False, lambda q: whole(rows(q) >= 0, q) & (q[:, :1, :, :1] > 0)),
        (False, lambda q: whole(rows(q) >= 0, q) | (q[:, :1, :, :1] > 0)),
        (False, lambda q: torch.ones(q.shape[2], q.shape[2], dtype=q.dtype)),
    ],
)
def test_what_is_known_to_be_true_throughout(wanted: bool, mask: Any) -> None:
    assert truth(mask) == wanted


def test_the_mask_of_a_vision_transformer_hides_nothing() -> None:
    gm = captured("vit")
    Pipeline(canonical_passes()).run(gm)
    x = torch.randn(2, 3, 32, 32)
    wanted = run(gm, x)
    assert decompose(gm, PROFILES["qnn-htp"]) == 14  # two attentions, twelve linears
    assert not {"aten.bitwise_not", "aten.ge.Scalar"} & {*targets(gm)}
    assert (run(gm, x) - wanted).abs().max() <= 1e-5


def test_the_mask_of_a_bert_is_data() -> None:
    gm = captured("bert")
    Pipeline(canonical_passes()).run(gm)
    assert decompose(gm, PROFILES["qnn-htp"]) == 14  # two attentions, twelve linears
    assert targets(gm).count("aten.bitwise_not") == 2


# -- rolls, norms of one channel, rows of linears ----------------------------------------------------------------------

X = torch.randn(3, 4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
ROLLS = table(Slice=OpRule(TYPES, output="same"), Concat=WHOLE)
NORMS = table(InstanceNormalization=WHOLE)
GEMM = replace(table(Linear=WHOLE, Reshape=OpRule(TYPES, output="same")), whole=True)


class Calls(nn.Module):
    """A function of the input, with a norm of its channels and a linear at hand."""

    def __init__(self, f: Any, groups: int = 4) -> None:
        super().__init__()
        self.f = f
        self.plain = nn.GroupNorm(4, 4, affine=False)
        self.norm, self.linear = nn.GroupNorm(groups, 4), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def other_form(f: Any, profile: Profile, groups: int = 4) -> list[str]:
    """The ops after the pass, which leaves the function alone; none where it changes nothing."""
    gm = capture(Calls(f, groups).double(), X)
    before = run(gm, X)
    if decompose(gm, profile) == 0:
        return []
    assert_vals(gm, X)
    torch.testing.assert_close(run(gm, X), before, rtol=1e-12, atol=1e-12)
    return targets(gm)


def test_a_roll_is_two_slices_joined() -> None:
    slices, joined = "aten.slice.Tensor", "aten.cat"
    assert other_form(lambda m, x: x.roll((1, -2), (1, 3)), ROLLS) == [slices, slices, joined] * 2
    assert other_form(lambda m, x: x.roll((0, 9), (1, 2)), ROLLS) == [slices, slices, joined]  # 9 of 6: 3; 0: nothing
    assert other_form(lambda m, x: x.roll(5), ROLLS) == []  # of the elements in a row
    assert other_form(lambda m, x: x.roll(1, 0), ROLLS) == []  # the batch, of any size
    assert other_form(lambda m, x: x.roll(1, 1), table(Concat=WHOLE)) == []


def test_a_stack_joins_what_has_an_axis_more() -> None:
    rows, longer, joined = table(Unsqueeze=OpRule(TYPES, output="same"), Concat=WHOLE), "aten.unsqueeze", "aten.cat"
    assert other_form(lambda m, x: torch.stack([x, x * 2], -1), rows) == ["aten.mul.Tensor", longer, longer, joined]
    assert other_form(lambda m, x: torch.stack([x, x.relu()], 1), rows) == ["aten.relu", longer, longer, joined]
    assert other_form(lambda m, x: torch.stack([x], 2), rows) == [longer]
    assert other_form(lambda m, x: torch.stack([x, x]), table(Concat=WHOLE)) == []


def test_groups_of_one_channel_are_instances() -> None:
    assert other_form(lambda m, x: m.norm(x), NORMS) == ["aten.instance_norm"]
    assert other_form(lambda m, x: m.norm(x), NORMS, groups=2) == []
    assert other_form(lambda m, x: m.plain(x), NORMS) == []  # which ONNX's norm of instances has to have a gain for
    assert other_form(lambda m, x: m.norm(x), table(GroupNormalization=WHOLE, InstanceNormalization=WHOLE)) == []


def test_linears_multiply_rows_where_a_gemm_is_wanted() -> None:
    found = other_form(lambda m, x: m.linear(x), GEMM)
    assert [name for name in found if "sym_size" not in name] == [
        "aten.reshape",
        "aten.linear",
        "aten.reshape",
    ]
    assert other_form(lambda m, x: m.linear(x[:, 0, 0]), GEMM) == []  # rows as they are
    assert other_form(lambda m, x: m.linear(x), replace(GEMM, linear="matmul")) == []
    assert other_form(lambda m, x: m.linear(x), replace(GEMM, whole=False)) == []


class Normed(nn.Module):
    """A batch norm that stands behind no layer, of a convolution's input."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, affine=affine)
        if affine:
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x).sin()


def test_a_batch_norm_scales_and_shifts() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gm = capture(Normed().double().eval(), x)
    wanted = run(gm, x)
    assert decompose(gm) == 1
    assert targets(gm) == ["aten.mul.Tensor", "aten.add.Tensor", "aten.sin"]
    assert sorted(gm.state_dict()) == ["norm.factor", "norm.shift"]
    assert (run(gm, x) - wanted).abs().max() <= 1e-12
    assert_vals(gm, x)
    assert decompose(gm) == 0
    assert decompose(capture(Normed(affine=False).double().eval(), x)) == 0  # which no consumer's table asks for
    assert decompose(capture(Normed().double().eval(), x), table(**PARTS, BatchNormalization=WHOLE)) == 0
