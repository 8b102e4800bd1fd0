"""Programs of steps against the ops of torch, at every instruction set that is here."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphq.runtime import kernels
from graphq.runtime.kernels import native
from graphq.runtime.kernels.steps import Assembler, Buffer, Spread

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.NOT_BUILT)
LIMITS: list[kernels.Limit] = ["portable", "avx2", "avx512", "all"]
DTYPES = (torch.float32, torch.bfloat16)
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "copy": lambda x: x,
    "square": lambda x: x.pow(2),
    "rsqrt": torch.rsqrt,
    "neg": torch.neg,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"add": torch.add, "sub": torch.sub, "mul": torch.mul}


def run(build: Callable[[Assembler, list[int]], int], inputs: Sequence[Tensor], limit: kernels.Limit = "all") -> Tensor:
    """What one step makes of the inputs."""
    with kernels.using(limit):
        program = Assembler()
        places = [program.buffer(Buffer(tuple(x.shape), x.dtype)) for x in inputs]
        made = build(program, places)
        held = program.buffers[made]
        out = torch.empty(held.shape, dtype=held.dtype)
        assert program.assembled(places, [made]).run([*inputs, out])
    return out


def assert_near(found: Tensor, wanted: Tensor, ulps: float) -> None:
    """``found`` is ``wanted`` in float64 but for so many roundings of its dtype, and where that is not finite the same."""
    eps = torch.finfo(found.dtype).eps
    rounded = wanted.to(found.dtype)
    assert torch.equal(found.isnan(), rounded.isnan())
    finite = rounded.isfinite()
    assert torch.equal(found[~finite & ~rounded.isnan()], rounded[~finite & ~rounded.isnan()])
    off = (found.double() - wanted).abs()[finite]
    assert (off <= ulps * eps * wanted.abs()[finite] + torch.finfo(torch.float32).tiny).all()


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", UNARY)
@given(st.integers(1, 700), st.sampled_from([1e-30, 1e-3, 1.0, 20.0, 1e20]), st.sampled_from(DTYPES), st.integers(0, 9))
@settings(deadline=None, max_examples=10)
def test_steps_of_one_operand(
    name: str, limit: kernels.Limit, size: int, scale: float, dtype: torch.dtype, seed: int
) -> None:
    x = (numbers(size, seed=seed) * scale).to(dtype)
    x = x.abs() if name == "rsqrt" else x
    found = run(lambda program, at: program.unary(name, at[0], Buffer((size,), dtype)), [x], limit)
    if name == "gelu_tanh":  # of which the tail is the difference of two numbers
        assert (found.double() - UNARY[name](x.double())).abs().max() <= torch.finfo(dtype).eps * x.double().abs().max()
    else:
        assert_near(found, UNARY[name](x.double()), 4.0)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", ["sigmoid", "silu", "relu"])
def test_what_is_not_finite_comes_through(name: str, limit: kernels.Limit) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e38, -1e38, 88.5, -88.5, 104.0, -104.0])
    found = run(lambda program, at: program.unary(name, at[0], Buffer((11,), torch.float32)), [x], limit)
    assert_near(found, UNARY[name](x).double(), 4.0)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", BINARY)
@given(
    st.integers(1, 4), st.integers(1, 5), st.integers(1, 300), st.sampled_from(["all", "rows", "columns", "middle", "one"]),
    st.sampled_from(DTYPES), st.sampled_from(DTYPES),
)  # fmt: skip
@settings(deadline=None, max_examples=10)
def test_steps_of_two_operands(
    name: str, limit: kernels.Limit, n0: int, n1: int, n2: int, read: str, first: torch.dtype, second: torch.dtype
) -> None:
    shapes: dict[str, tuple[tuple[int, ...], Spread]] = {
        "all": ((n0, n1, n2), Spread(1, 1, n0 * n1 * n2)),
        "rows": ((n0, n1, 1), Spread(n0 * n1, 1, n2, n0 * n1, 1, 0, 0)),
        "columns": ((n2,), Spread(n0 * n1, 1, n2)),
        "middle": ((n0, 1, n2), Spread(n0, n1, n2, n0, n2)),
        "one": ((1,), Spread(1, 1, n0 * n1 * n2, t2=0)),
    }
    shape, how = shapes[read]
    a, b = numbers(n0, n1, n2, dtype=first), numbers(*shape, seed=1, dtype=second)
    out = Buffer((n0, n1, n2), torch.promote_types(first, second))
    found = run(lambda program, at: program.binary(name, at[0], at[1], how, out), [a, b], limit)
    assert torch.equal(found, BINARY[name](a, b))


def test_a_step_with_a_number() -> None:
    x = numbers(40, dtype=torch.bfloat16)
    how = Spread(1, 1, 40, t2=0)
    found = run(lambda program, at: program.binary("add", at[0], 0.1, how, Buffer((40,), torch.bfloat16)), [x])
    assert torch.equal(found, (x.float() + 0.1).bfloat16())


@pytest.mark.parametrize("limit", LIMITS)
@given(st.integers(1, 5), st.integers(1, 600), st.integers(-3, 3), st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=20)
def test_steps_of_rows(limit: kernels.Limit, rows: int, width: int, shift: int, dtype: torch.dtype) -> None:
    x = numbers(rows, width, seed=width, dtype=dtype)
    found = run(lambda program, at: program.roll(at[0], shift, Buffer((rows, width), dtype)), [x], limit)
    assert torch.equal(found, x.roll([shift], [-1]))
    found = run(lambda program, at: program.mean(at[0], width, Buffer((rows, 1), dtype)), [x], limit)
    wanted, most = x.double().mean(-1, True), x.double().abs().mean(-1, True)
    assert ((found.double() - wanted).abs() <= torch.finfo(dtype).eps * most).all()  # sums are float32's


@pytest.mark.parametrize("limit", LIMITS)
@given(
    st.integers(1, 17), st.integers(1, 40), st.integers(1, 200), st.booleans(),
    st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from([1, 2]),
)  # fmt: skip
@settings(deadline=None, max_examples=20)
def test_linears_with_weights_as_they_are(
    limit: kernels.Limit, m: int, n: int, k: int, has_bias: bool, x_type: torch.dtype, w_type: torch.dtype, threads: int
) -> None:
    x, w, b = numbers(m, k, dtype=x_type), numbers(n, k, seed=1, dtype=w_type), numbers(n, seed=2, dtype=x_type)
    inputs = [x, w, b] if has_bias else [x, w]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = run(
            lambda program, at: program.plain(at[0], at[1], at[2] if has_bias else -1, Buffer((m, n), x_type)),
            inputs,
            limit,
        )
    finally:
        torch.set_num_threads(before)
    bias = b.double() if has_bias else torch.zeros(n).double()
    most = x.double().abs() @ w.double().abs().t() + bias.abs()
    bound = torch.finfo(x_type).eps + k * 2.0**-24
    assert ((found.double() - (x.double() @ w.double().t() + bias)).abs() <= bound * most).all()


def test_a_row_that_is_not_finite_ends_the_program() -> None:
    x = torch.tensor([[1.0, float("inf")]])
    program = Assembler()
    at = program.buffer(Buffer((1, 2), torch.float32))
    codes, scale, _ = program.quantize(at, (1, 2), "int8", False)
    made = program.assembled([at], [codes, scale])
    out: list[Any] = [torch.empty(1, 2, dtype=torch.int8), torch.empty(1, 1)]
    assert not made.run([x, *out])
    assert made.run([x.clamp(max=3), *out])
    assert out[0].tolist() == [[42, 127]]


def test_buffers_share_memory_where_their_uses_do_not_overlap() -> None:
    program = Assembler()
    at = first = program.buffer(Buffer((64,), torch.float32))
    for _ in range(6):
        at = program.unary("neg", at, Buffer((64,), torch.float32))
    last = program.binary("add", at, first, Spread(1, 1, 64), Buffer((64,), torch.float32))
    made = program.assembled([first], [last])
    assert made._scratch == 2 * 256
    x, out = numbers(64), torch.empty(64)
    made.run([x, out])
    assert torch.equal(out, x + x)
