"""Queries and keys, and what ends an MLP, are rotated at run time, and the function is the same."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.algorithms import Request
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.numerics.hadamard import rotation
from graphq.passes.rotate import Rotate
from graphq.passes.rotate_online import RotateOnline
from graphq.state import tensor_of
from tests.decoder import TOKENS, Decoder
from tests.graphs import assert_vals, run, targets
from tests.lifted import lifted, run_lifted
from tests.models import capture, random_inputs
from tests.passes.test_fold_norms import perturbed
from tests.passes.test_rotate import assert_same, decoder, logits, rotate

R3: dict[str, Any] = {"r3": True}
R4: dict[str, Any] = {"r4": True}


def rotate_online(gm: fx.GraphModule, **options: Any) -> tuple[int, list[str]]:
    """The number of changes, and what stays as it is, and why."""
    notes: list[str] = []
    counts = Pipeline([RotateOnline(note=notes.append, **options)], strict=True).run(gm)
    return counts["rotate-online"], [note.removeprefix("rotate: ") for note in notes]


def test_golden() -> None:
    gm = decoder(folded=False)
    before = logits(gm)
    assert_expected_inline(
        dump(gm),
        """\
%tokens: i64[batch, sequence] = input
%1: int = aten.sym_size.int(%tokens, 0)
%2: int = aten.sym_size.int(%tokens, 1)
%3: f64[batch, sequence, 8] = aten.embedding(@embedding.weight, %tokens)
%4: f64[batch, sequence, 8] = aten.pow.Tensor_Scalar(%3, 2)
%5: f64[batch, sequence, 1] = aten.mean.dim(%4, [-1], True)
%6: f64[batch, sequence, 1] = aten.add.Tensor(%5, 1e-06)
%7: f64[batch, sequence, 1] = aten.rsqrt(%6)
%8: f64[batch, sequence, 8] = aten.mul.Tensor(%3, %7)
%9: f64[batch, sequence, 8] = aten.mul.Tensor(@norm_1.weight, %8)
%10: f64[batch, sequence, 8] = aten.linear(%9, @q.weight)
%11: f64[batch, sequence, 2, 4] = aten.view(%10, [%1, %2, 2, 4])
%12: f64[batch, 2, sequence, 4] = aten.transpose.int(%11, 1, 2)
%13: f64[batch, sequence, 4] = aten.linear(%9, @k.weight)
%14: f64[batch, sequence, 1, 4] = aten.view(%13, [%1, %2, 1, 4])
%15: f64[batch, 1, sequence, 4] = aten.transpose.int(%14, 1, 2)
%16: f64[batch, sequence, 4] = aten.linear(%9, @v.weight)
%17: f64[batch, sequence, 1, 4] = aten.view(%16, [%1, %2, 1, 4])
%18: f64[batch, 1, sequence, 4] = aten.transpose.int(%17, 1, 2)
%19: f64[batch, 2, sequence, 4] = aten.expand(%15, [%1, 2, %2, 4])
%20: f64[batch, 2, sequence, 4] = aten.expand(%18, [%1, 2, %2, 4])
%21: f64[batch, 2, sequence, 4] = aten.scaled_dot_product_attention(%12, %19, %20, None, 0.0, True)
%22: f64[batch, sequence, 2, 4] = aten.transpose.int(%21, 1, 2)
%23: f64[batch, sequence, 8] = aten.reshape(%22, [%1, %2, 8])
%24: f64[batch, sequence, 8] = aten.linear(%23, @o.weight)
%25: f64[batch, sequence, 8] = aten.add.Tensor(%3, %24)
%26: f64[batch, sequence, 8] = aten.pow.Tensor_Scalar(%25, 2)
%27: f64[batch, sequence, 1] = aten.mean.dim(%26, [-1], True)
%28: f64[batch, sequence, 1] = aten.add.Tensor(%27, 1e-06)
%29: f64[batch, sequence, 1] = aten.rsqrt(%28)
%30: f64[batch, sequence, 8] = aten.mul.Tensor(%25, %29)
%31: f64[batch, sequence, 8] = aten.mul.Tensor(@norm_2.weight, %30)
%32: f64[batch, sequence, 12] = aten.linear(%31, @gate.weight)
%33: f64[batch, sequence, 12] = aten.silu(%32)
%34: f64[batch, sequence, 12] = aten.linear(%31, @up.weight)
%35: f64[batch, sequence, 12] = aten.mul.Tensor(%33, %34)
%36: f64[batch, sequence, 8] = aten.linear(%35, @down.weight)
%37: f64[batch, sequence, 8] = aten.add.Tensor(%25, %36)
%38: f64[batch, sequence, 8] = aten.pow.Tensor_Scalar(%37, 2)
%39: f64[batch, sequence, 1] = aten.mean.dim(%38, [-1], True)
%40: f64[batch, sequence, 1] = aten.add.Tensor(%39, 1e-06)
%41: f64[batch, sequence, 1] = aten.rsqrt(%40)
%42: f64[batch, sequence, 8] = aten.mul.Tensor(%37, %41)
%43: f64[batch, sequence, 8] = aten.mul.Tensor(@norm_3.weight, %42)
%44: f64[batch, sequence, 16] = aten.linear(%43, @head.weight)
return [%44]
""",
    )
    assert rotate_online(gm, r3=True, r4=True) == (4, [])  # three products, one weight
    assert_expected_inline(
        dump(gm),
        """\
%tokens: i64[batch, sequence] = input
%1: int = aten.sym_size.int(%tokens, 0)
%2: int = aten.sym_size.int(%tokens, 1)
%3: f64[batch, sequence, 8] = aten.embedding(@embedding.weight, %tokens)
%4: f64[batch, sequence, 8] = aten.pow.Tensor_Scalar(%3, 2)
%5: f64[batch, sequence, 1] = aten.mean.dim(%4, [-1], True)
%6: f64[batch, sequence, 1] = aten.add.Tensor(%5, 1e-06)
%7: f64[batch, sequence, 1] = aten.rsqrt(%6)
%8: f64[batch, sequence, 8] = aten.mul.Tensor(%3, %7)
%9: f64[batch, sequence, 8] = aten.mul.Tensor(@norm_1.weight, %8)
%10: f64[batch, sequence, 8] = aten.linear(%9, @q.weight)
%11: f64[batch, sequence, 2, 4] = aten.view(%10, [%1, %2, 2, 4])
%12: f64[batch, sequence, 2, 4] = aten.matmul(%11, @hadamard_4)
%13: f64[batch, 2, sequence, 4] = aten.transpose.int(%12, 1, 2)
%14: f64[batch, sequence, 4] = aten.linear(%9, @k.weight)
%15: f64[batch, sequence, 4] = aten.matmul(%14, @hadamard_4)
%16: f64[batch, sequence, 1, 4] = aten.reshape(%15, [%1, %2, 1, 4])
%17: f64[batch, 1, sequence, 4] = aten.transpose.int(%16, 1, 2)
%18: f64[batch, sequence, 4] = aten.linear(%9, @v.weight)
%19: f64[batch, sequence, 1, 4] = aten.view(%18, [%1, %2, 1, 4])
%20: f64[batch, 1, sequence, 4] = aten.transpose.int(%19, 1, 2)
%21: f64[batch, 2, sequence, 4] = aten.expand(%17, [%1, 2, %2, 4])
%22: f64[batch, 2, sequence, 4] = aten.expand(%20, [%1, 2, %2, 4])
%23: f64[batch, 2, sequence, 4] = aten.scaled_dot_product_attention(%13, %21, %22, None, 0.0, True)
%24: f64[batch, sequence, 2, 4] = aten.transpose.int(%23, 1, 2)
%25: f64[batch, sequence, 8] = aten.reshape(%24, [%1, %2, 8])
%26: f64[batch, sequence, 8] = aten.linear(%25, @o.weight)
%27: f64[batch, sequence, 8] = aten.add.Tensor(%3, %26)
%28: f64[batch, sequence, 8] = aten.pow.Tensor_Scalar(%27, 2)
%29: f64[batch, sequence, 1] = aten.mean.dim(%28, [-1], True)
%30: f64[batch, sequence, 1] = aten.add.Tensor(%29, 1e-06)
%31: f64[batch, sequence, 1] = aten.rsqrt(%30)
%32: f64[batch, sequence, 8] = aten.mul.Tensor(%27, %31)
%33: f64[batch, sequence, 8] = aten.mul.Tensor(@norm_2.weight, %32)
%34: f64[batch, sequence, 12] = aten.linear(%33, @gate.weight)
%35: f64[batch, sequence, 12] = aten.silu(%34)
%36: f64[batch, sequence, 12] = aten.linear(%33, @up.weight)
%37: f64[batch, sequence, 12] = aten.mul.Tensor(%35, %36)
%38: f64[batch, sequence, 12] = aten.matmul(%37, @hadamard_12)
%39: f64[batch, sequence, 8] = aten.linear(%38, @down.weight)
%40: f64[batch, sequence, 8] = aten.add.Tensor(%27, %39)
%41: f64[batch, sequence, 8] = aten.pow.Tensor_Scalar(%40, 2)
%42: f64[batch, sequence, 1] = aten.mean.dim(%41, [-1], True)
%43: f64[batch, sequence, 1] = aten.add.Tensor(%42, 1e-06)
%44: f64[batch, sequence, 1] = aten.rsqrt(%43)
%45: f64[batch, sequence, 8] = aten.mul.Tensor(%40, %44)
%46: f64[batch, sequence, 8] = aten.mul.Tensor(@norm_3.weight, %45)
%47: f64[batch, sequence, 16] = aten.linear(%46, @head.weight)
return [%47]
""",
    )
    assert_same(logits(gm), before)
    assert_vals(gm, TOKENS)


def test_golden_in_blocks() -> None:
    gm = decoder(folded=False)
    before, old = logits(gm), tensor_of(gm, "down.weight").clone()
    assert rotate_online(gm, **R4, block_size=4) == (2, [])
    assert_expected_inline(
        "".join(line + "\n" for line in dump(gm).splitlines() if "flatten" in line or "hadamard" in line),
        """\
%36: f64[batch, sequence, 3, 4] = aten.unflatten.int(%35, -1, [3, 4])
%37: f64[batch, sequence, 3, 4] = aten.matmul(%36, @hadamard_4)
%38: f64[batch, sequence, 12] = aten.flatten.using_ints(%37, -2, -1)
""",
    )
    assert_same(logits(gm), before)
    assert_vals(gm, TOKENS)
    h = tensor_of(gm, "hadamard_4")
    torch.testing.assert_close(h.abs(), torch.full_like(h, 0.5), rtol=1e-15, atol=0)
    assert not isinstance(h, nn.Parameter)
    torch.testing.assert_close(tensor_of(gm, "down.weight"), old @ torch.block_diag(h, h, h), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("width", "block_size"), [(320, None), (512, None), (1024, 512)])
def test_a_large_matrix_is_two_small_ones(width: int, block_size: int | None) -> None:
    gm = decoder(width=width)
    before = logits(gm)
    assert rotate_online(gm, **R4, block_size=block_size) == (2, [])
    assert_same(logits(gm), before)
    assert_vals(gm, TOKENS)
    held = {name: t.shape[0] for name, t in gm.state_dict().items() if "hadamard" in name}
    assert list(held.values()) == [16, 20 if width == 320 else 32]
    assert targets(gm).count("aten.matmul") == 2


def test_together_with_what_is_folded() -> None:
    exact = decoder()
    before = logits(exact)
    assert rotate(exact) == (9, [])
    assert rotate_online(exact, r3=True, r4=True) == (3 + 1, [])
    assert_same(logits(exact), before)
    assert_vals(exact, TOKENS)
    assert rotate(exact) == (9, [])
    assert rotate_online(exact, r3=True, r4=True) == (2, [])  # with the same matrix; a product is no activation
    assert_same(logits(exact), before)
    assert [name for name in exact.state_dict() if "hadamard" in name] == ["hadamard_4", "hadamard_12"]


# Products put in for R3 and R4, and the weights that R4 changes.
@pytest.mark.parametrize(
    ("family", "r3", "r4"),
    [
        ("llama", 4, 4),
        ("qwen3", 4, 4),
        ("mixtral", 4, 4),
        ("deepseek", 4, 6),  # a dense block; a shared expert besides the others
        ("gemma3", 4, 4),
        ("opt", 4, 4),
        ("gpt2", 4, 4),
        ("bert", 4, 4),
        ("vit", 4, 4),
    ],
)
def test_families(family: str, r3: int, r4: int) -> None:
    before = lifted(perturbed(family))
    inputs = random_inputs(before)
    expected = run_lifted(before, inputs)
    for options, count in ((R3, r3), (R4, r4)):
        gm = copy.deepcopy(before)
        assert rotate_online(gm, **options) == (count, [])
        made = run_lifted(gm, inputs)
        assert_same(made[0], expected[0])
        for old, new in list(zip(expected, made, strict=True))[2::2]:  # values of caches
            assert_same(new, old)


def test_runs_as_captured() -> None:
    """In float32, where the order of rows in memory is the model's own."""
    for family in ("mixtral", "deepseek"):
        gm = perturbed(family)
        before = run(gm, *random_inputs(gm))
        rotate_online(gm, r3=True, r4=True)
        assert_vals(gm, *random_inputs(gm))
        torch.testing.assert_close(run(gm, *random_inputs(gm)), before, rtol=1e-4, atol=1e-4)


def test_neither_is_asked_for() -> None:
    assert rotate_online(decoder()) == (0, [])


def test_no_attention_and_no_residual_stream() -> None:
    gm = capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.ones(2, 8))
    assert rotate_online(gm, **R3, **R4) == (0, ["r3: no scaled_dot_product_attention is found"])


def test_the_algorithm_rotates_online_where_it_is_asked_to() -> None:
    def steps(**options: Any) -> list[Any]:
        return Request("rotate", options=options).make()[2:]

    assert steps() == [Rotate()]
    assert steps(r3=False, r4=False, block_size=4) == [Rotate(block_size=4)]
    assert steps(r4=True, kind="orthogonal") == [Rotate(kind="orthogonal"), RotateOnline(r4=True)]
    assert steps(r1=False, r3=True, block_size=4) == [
        Rotate(r1=False, block_size=4),
        RotateOnline(r3=True, block_size=4),
    ]


def test_a_weight_is_rounded_once() -> None:
    """Its rotation is computed in float64."""
    gm = capture(Decoder().bfloat16(), TOKENS)
    old = tensor_of(gm, "down.weight").clone()
    assert rotate_online(gm, **R4, block_size=4) == (2, [])
    h = rotation(4, "hadamard", 0)
    assert h is not None
    exact = old.double() @ torch.block_diag(*[h.matrix()] * 3)
    assert torch.equal(tensor_of(gm, "down.weight"), exact.bfloat16())


def test_keys_are_rotated_before_the_cache() -> None:
    gm = lifted(perturbed("llama"))
    inputs = random_inputs(gm)
    before = run_lifted(gm, inputs)
    rotate_online(gm, **R3)
    after = run_lifted(gm, inputs)
    h = tensor_of(gm, "hadamard_16")
    assert_same(after[1], before[1] @ h)
    assert (after[1] - before[1]).abs().max() > 0.1


KEYS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "returned": ({"returned": ("key",)}, ["scaled_dot_product_attention: output_1: the caller gets it"]),
    "queries returned": ({"returned": ("query",)}, ["scaled_dot_product_attention: output_1: the caller gets it"]),
    "read elsewhere": (
        {"attended": lambda m, x: x + m.seen["key"].transpose(1, 2).sum()},
        ["scaled_dot_product_attention: transpose_3: aten.transpose.int reads it, too"],
    ),
    "keys are values": (
        {"value": lambda m, x: m.seen["key"]},
        ["scaled_dot_product_attention: expand_1: aten.expand.default reads it, too"],
    ),
}


@pytest.mark.parametrize("name", KEYS)
def test_near_misses_of_keys(name: str) -> None:
    options, reasons = KEYS[name]
    assert rotate_online(decoder(**options), **R3) == (0, [f"r3: {reason}" for reason in reasons])


INPUTS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "a width without a matrix": ({"width": 6}, {}, ["down: graphq knows no Hadamard matrix of size 6"]),
    "blocks that do not fit": ({}, {"block_size": 8}, ["down: its 12 inputs are no multiple of 8"]),
    "blocks without a matrix": ({}, {"block_size": 6}, ["down: graphq knows no Hadamard matrix of size 6"]),
    "a weight that something else reads": (
        {"embedded": lambda m, x: x * m.down.weight.sum()},
        {},
        ["down.weight: sum_1 reads it, too"],
    ),
    "a computed weight": (
        {"last": lambda m, x: x + F.linear(F.silu(m.extra(x)), m.extra_2.weight * 2)},
        {},
        ["linear_8: its weight is computed"],
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_near_misses_of_inputs(name: str) -> None:
    decoded, options, reasons = INPUTS[name]
    count = 2 if name == "a computed weight" else 0  # for the other linear
    assert rotate_online(decoder(**decoded), **R4, **options) == (count, [f"r4: {reason}" for reason in reasons])


def test_no_activation_in_front() -> None:
    """What a linear gave, and what an attention gave to the other one, is not rotated."""
    gm = decoder(hidden=lambda m, x: m.up(m.seen["normed"]))
    assert rotate_online(gm, **R4) == (0, [])


def test_two_linears_read_one_product() -> None:
    def twice(m: Any, x: Tensor) -> Tensor:
        hidden = F.silu(m.extra(x))
        return x + m.extra_2(hidden) + F.linear(hidden, m.wide)

    class Twice(Decoder):
        def __init__(self) -> None:
            super().__init__(last=twice)
            self.wide = nn.Parameter(torch.empty(8, 8))

    gm = capture(Twice().double(), TOKENS)
    before = logits(gm)
    assert rotate_online(gm, **R4) == (2 + 3, [])
    assert_same(logits(gm), before)
    assert targets(gm).count("aten.matmul") == 2


def test_a_key_that_is_a_parameter() -> None:
    gm = decoder(key=lambda m, x: m.table.view(1, 1, 2, 4)[:, :, :1].expand(x.shape))
    before = logits(gm)
    assert rotate_online(gm, **R3) == (2, [])
    assert_same(logits(gm), before)
    assert_vals(gm, TOKENS)
