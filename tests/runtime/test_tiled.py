"""A weight lies in tiles once it has been multiplied with, and alone; outside of the module it is what it was."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

import graphq
from graphq import numerics
from graphq.numerics import Scales
from graphq.runtime import kernels
from graphq.runtime.kernels import KERNELS, features, native
from graphq.runtime.modules import Int8Linear, codes_of, hold_linear
from graphq.runtime.tiled import Snapshot
from graphq.spec.formats import Int
from tests.models import MLP

N, K = 40, 96
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def with_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of the table that this machine has, also where oneDNN's would be chosen."""
    if not features():
        pytest.skip(native.NOT_BUILT)
    best = next(kernel for kernel in KERNELS if kernel.product == "int8" and kernel.level in features())
    monkeypatch.setattr(kernels, "integer_kernel", lambda weight: best)


def linear(seed: int = 0, symmetric: bool = True, transposed: bool = False) -> tuple[Int8Linear, Tensor]:
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)) + (0 if symmetric else 0.5)
    w, block = (w.t(), [-1, 1]) if transposed else (w, [1, -1])
    scales = numerics.choose_scale(w, Int(8, symmetric), block)
    codes = numerics.quantize(w, scales, Int(8, symmetric), block)
    module = Int8Linear((N, K), True, symmetric, True, torch.float32, transposed)
    return hold_linear(module, codes, scales.scale, scales.zero_point, torch.ones(N)), codes


def call(module: Int8Linear, zero: int | None = None) -> Tensor:
    q = torch.arange(4 * K).reshape(4, K).to(torch.int8)
    return module(q, torch.full((4, 1), 0.1), None if zero is None else torch.full((4, 1), zero, dtype=torch.int8))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_tiles_take_the_place_of_codes(symmetric: bool, transposed: bool) -> None:
    module, codes = linear(symmetric=symmetric, transposed=transposed)
    assert not module.is_tiled
    first = call(module, 3)
    assert module.is_tiled
    held = sum(b.numel() * b.itemsize for b in module.buffers()) - 4 * 4 * N  # beside the weight: scales, bias
    assert held <= 1.4 * N * K + 1024  # 40 rows fill 48
    assert torch.equal(codes_of(module), codes)
    assert torch.equal(call(module, 3), first)
    module.release()
    assert torch.equal(codes_of(module), codes)
    assert not module.is_tiled


@pytest.mark.parametrize("ran", [False, True])
def test_state_and_copies_are_plain(ran: bool) -> None:
    module, other = linear()[0], linear(7)[0]
    plain = {name: t.clone() for name, t in module.state_dict().items()}
    if ran:
        call(module)
        call(other)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    assert all(torch.equal(state[name], plain[name]) for name in plain)
    other.load_state_dict(state)
    assert torch.equal(call(other), call(module))
    copied = copy.deepcopy(module)
    assert copied.weight.dim() == 2
    assert torch.equal(call(copied), call(module))
    copied.load_state_dict(linear(7)[0].state_dict())
    assert not torch.equal(call(copied), call(module))
    assert torch.equal(call(module.to(torch.bfloat16)), call(module))


@pytest.mark.parametrize("name", ["weight_scale", "bias"])
def test_what_changes_in_place_counts(name: str) -> None:
    module, _ = linear()
    before = call(module)
    with torch.no_grad():
        module.get_buffer(name).mul_(2)
    after = call(module)
    assert not torch.equal(after, before)
    fresh, _ = linear()
    with torch.no_grad():
        fresh.get_buffer(name).mul_(2)
    assert torch.equal(after, call(fresh))


def test_codes_that_are_put_in_later_count() -> None:
    module, (other, codes) = linear()[0], linear(7)
    call(module)
    hold_linear(module, codes, other.weight_scale, None, torch.ones(N))
    assert torch.equal(call(module), call(other))


def test_a_snapshot_sees_changes() -> None:
    module, _ = linear()
    held = Snapshot(module)
    assert held.is_current()
    module.weight_scale.mul_(1)
    assert not held.is_current()
    held = Snapshot(module)
    module.weight = module.weight.clone()
    assert not held.is_current()
    with torch.inference_mode():
        module.weight_scale = module.weight_scale.clone()  # of which torch counts no changes
        held = Snapshot(module)
        assert held.is_current()


def test_a_compiled_model_holds_each_weight_once() -> None:
    spec: dict[str, Any] = {"graphq": 1, "weight": "int8/channel", "input": "int8/token/dynamic"}
    model = graphq.compile(MLP().eval(), spec, inputs=X).module
    state = {name: t.clone() for name, t in model.state_dict().items()}
    before = model.kernels
    model(X)
    assert all(m.weight.dim() == 1 for m in model.modules() if isinstance(m, Int8Linear))
    assert model.kernels == before
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_scales_as_they_are_stored() -> None:
    module, codes = linear(symmetric=False)
    call(module)
    wanted = numerics.dequantize(
        codes, Scales(module.weight_scale, module.get_buffer("weight_zero_point")), Int(8, False), [1, -1]
    )
    q = torch.arange(4 * K).reshape(4, K).to(torch.int8)
    y = (q.double() * 0.1) @ wanted.double().t() + 1
    assert (call(module).double() - y).abs().max() <= 1e-5 * y.abs().max()
