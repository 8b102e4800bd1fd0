"""The memory of a tensor is not all there is of it where ops are traced, transformed or differentiated, or where a view
holds the negatives: what reads memory gives then what ops of torch give.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from graphq import numerics
from graphq.runtime import kernels
from graphq.runtime.kernels import attention, native
from graphq.runtime.modules import Int8Linear, hold_linear
from graphq.runtime.program import Program
from graphq.spec.formats import parse_format
from tests.runtime.test_experts import cut, experts
from tests.runtime.test_linear import assert_near, linear, random
from tests.runtime.test_regions import W8A8, packed

Run = Callable[[Tensor], Tensor]

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason=native.NOT_BUILT),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # vmap's loops
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LEAST", dict.fromkeys(attention.LEAST, 0))


def of_experts() -> Run:
    module, offsets = experts(k=32), cut([2, 0, 1])
    return lambda x: module(x, offsets)


def of_region() -> Run:
    program = Program(packed())
    return lambda x: program(x)[0]


def of_quantized_region() -> Run:
    program = Program(packed(W8A8))
    return lambda x: program(x)[0]


def of_integers() -> Run:
    module = Int8Linear((40, 32), True, True, False, torch.float32)
    codes = (random(40, 32) * 40).clamp(-127, 127).to(torch.int8)
    hold_linear(module, codes, random(40, 1).abs() + 0.1, None, None)
    return lambda x: module((x * 40).clamp(-127, 127).round().to(torch.int8), torch.full((3, 1), 0.1), None)


def of_attention() -> Run:
    keys, values = random(1, 1, 20, 32, seed=5), random(1, 1, 20, 32, seed=6)

    def run(x: Tensor) -> Tensor:
        y = kernels.scaled_dot_product_attention(x[None, None], keys, values)
        return y[0, 0]

    return run


SMOOTH = {"linear": lambda: linear(k=32, bias=False), "experts": of_experts, "region": of_region}
ALL = SMOOTH | {"integers": of_integers, "quantized region": of_quantized_region, "attention": of_attention}


@pytest.fixture(params=ALL)
def run(request: pytest.FixtureRequest) -> Run:
    """After a first call, which prepares what it has."""
    made = ALL[request.param]()
    with torch.no_grad():
        made(random(3, 32))
    return made


@torch.no_grad()
def test_a_trace_holds_the_ops(run: Run) -> None:
    traced: Any = torch.jit.trace(run, (random(3, 32),), check_trace=False)
    x = random(3, 32, seed=8)
    assert_near(traced(x), run(x).double(), 1e-5)


@torch.no_grad()
def test_is_mapped_over_a_batch(run: Run) -> None:
    x = random(2, 3, 32)
    assert_near(torch.func.vmap(run)(x), torch.stack([run(one) for one in x]).double(), 1e-5)


@torch.no_grad()
def test_a_view_of_the_negatives_is_these(run: Run) -> None:
    x = random(3, 32)
    view: Tensor = torch.ops.aten._neg_view(x)
    assert view.is_neg()
    assert_near(run(view), run(-x).double())


@pytest.mark.parametrize("name", SMOOTH)
def test_derivatives_are_those_of_the_ops(name: str) -> None:
    made, x, along = SMOOTH[name](), random(3, 32), random(3, 32, seed=9)
    step = 1e-3 * along
    with torch.no_grad():
        wanted = ((made(x + step).double() - made(x - step).double()) / 2e-3).double()
    assert_near(torch.func.jvp(made, (x,), (along,))[1], wanted, 1e-3)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(made(forward_ad.make_dual(x, along))).tangent
    assert tangent is not None
    assert_near(tangent, wanted, 1e-3)
    slope = torch.func.grad(lambda x: made(x).sum())(x)
    assert abs(float((slope * along).sum() - wanted.sum())) <= 1e-3 * float(wanted.abs().sum())


def test_derivatives_are_those_of_codes_where_inputs_are_codes() -> None:
    module, format = linear(k=32, bias=False, takes_codes=True), parse_format("int8")
    scales = numerics.choose_scale(random(3, 32), format, [1, -1])
    q = numerics.quantize(random(3, 32), scales, format, [1, -1])
    y, slope, *_ = torch.func.jvp(lambda scale: module(q, scale), (scales.scale,), (scales.scale,))
    assert_near(slope, y.double())
