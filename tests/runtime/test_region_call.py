"""A region in one call gives what its ops give, and gives way to them where it must."""

import copy
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import graphq
from graphq.capture.source import source_of
from graphq.lowering.torch.pack import pack
from graphq.runtime import kernels
from graphq.runtime.kernels import native
from graphq.runtime.kernels.steps import Program as Steps
from graphq.runtime.program import Program
from graphq.runtime.region_steps import MOST_ROWS
from tests.compiled import compile_captured
from tests.models import DECODERS
from tests.runtime.test_program import inputs_of
from tests.runtime.test_regions import W4, W8A8, Gated, packed

pytestmark = pytest.mark.skipif(native.library() is None, reason=native.NOT_BUILT)
SPECS: list[dict[str, Any]] = [
    W8A8,
    W4,
    {"graphq": 1, "weight": "int4/g16", "input": "int8/asym/token/dynamic"},
    {"graphq": 1, "weight": "float8_e4m3fn/channel"},
]


@contextmanager
def calls() -> Generator[list[int]]:
    """How many programs of steps ran within it."""
    found: list[int] = []
    run = Steps.run

    def counted(self: Steps, buffers: Any) -> bool:
        found.append(1)
        return run(self, buffers)

    Steps.run = counted
    try:
        yield found
    finally:
        Steps.run = run


def near(found: Tensor, wanted: Tensor, bound: float) -> bool:
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    return not found.numel() or bool((found - wanted).abs().max() <= bound * wanted.abs().max())


@pytest.mark.parametrize("spec", SPECS, ids=["w8a8", "w4a16", "w4a8", "float8"])
@pytest.mark.parametrize(
    "family", [f if f not in ("deepseek", "mixtral") else pytest.param(f, marks=pytest.mark.slow) for f in DECODERS]
)
def test_a_decoder_gives_what_its_ops_give(family: str, spec: dict[str, Any]) -> None:
    gm = pack(compile_captured(family, spec).graph)
    program = Program(gm, source_of(gm))
    # Sums of norms and of linears in float are in another order. An activation that lies between two codes may then
    # get the other one: 1/127 of the largest of its row.
    bound = 1e-5 if "input" not in spec else 2e-2
    for sizes in ((1, 1, 4), (2, 1, 3), (1, 3, 2), (2, 3, 4)):
        batch = inputs_of(gm, *sizes)
        with torch.inference_mode(), calls() as ran:
            found = program(*batch)
            wanted = gm(*batch)
        assert all(near(ours, its, bound) for ours, its in zip(found, wanted, strict=True))
        assert ran


def test_a_bfloat16_decoder_gives_what_its_ops_give() -> None:
    from tests.models import tiny

    gm = graphq.compile(tiny("llama").bfloat16(), W4).module.graph
    batch = inputs_of(gm, 1, 1)
    with torch.inference_mode(), calls() as ran:
        found, wanted = Program(gm, source_of(gm))(*batch), gm(*batch)
    assert len(ran) == 3
    assert all(near(ours.float(), its.float(), 2.0**-6) for ours, its in zip(found, wanted, strict=True))


class Normed(nn.Module):
    """Norms in one op, with what they may lack, and activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(32, 32) for _ in range(4))
        self.layer, self.rms = nn.LayerNorm(32), nn.RMSNorm(32, eps=1e-5)
        self.bare, self.plain = nn.LayerNorm(32, elementwise_affine=False), nn.RMSNorm(32, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(torch.relu(self.a(x)))
        y = self.rms(torch.sigmoid(self.b(y)) - 0.5 * y)
        y = self.bare(-self.c(y)) + y
        return self.plain(nn.functional.gelu(self.d(y), approximate="tanh"))


@pytest.mark.parametrize("spec", [W4, {"graphq": 1, "rules": [{"match": "a", "weight": "int4/g16"}]}])
def test_norms_and_activations(spec: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    gm = packed(spec, Normed(), x)
    with torch.inference_mode(), calls() as ran:
        found, wanted = Program(gm)(x)[0], gm(x)[0]
    assert len(ran) == 1
    assert near(found, wanted, 1e-5)


# -- where it gives way ------------------------------------------------------------------------------------------------


@pytest.fixture
def gated() -> tuple[Program, fx.GraphModule]:
    gm = packed(W8A8, Gated())
    return Program(gm), gm


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Passing(TorchDispatchMode):
    """Sees each op."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def hooked(gm: fx.GraphModule, call: Callable[[], Tensor]) -> Tensor:
    handle = gm.get_submodule("up").register_forward_hook(lambda *_: None)
    try:
        return call()
    finally:
        handle.remove()


def test_what_steps_do_not_hold(gated: tuple[Program, fx.GraphModule]) -> None:
    """The same numbers as its ops', to the bit, as they are its ops."""
    program, gm = gated
    x = random(3, 32)
    with torch.inference_mode():
        odd = random(2, 32)
        odd[1, 3] = float("inf")
        for given in (random(MOST_ROWS + 1, 32), random(0, 32), random(3, 32).double()):
            with calls() as ran:
                assert torch.equal(program(given)[0], gm(given)[0])
            assert not ran
        assert torch.equal(program(odd)[0].isfinite(), gm(odd)[0].isfinite())
        with calls() as ran:
            program(x)
            assert len(ran) == 1
            with Passing():
                program(x)
            with torch.autocast("cpu", torch.bfloat16):
                program(x)
            hooked(gm, lambda: program(x)[0])
            assert len(ran) == 1
            program(x)
            assert len(ran) == 2


def test_gradients_go_through_the_ops() -> None:
    gm = packed()
    x = random(3, 32).requires_grad_()
    with calls() as ran:
        Program(gm)(x)[0].sum().backward()
        assert x.grad is not None
        assert not ran
        Program(gm)(x.detach())
    assert len(ran) == 1


def test_inputs_of_other_layouts(gated: tuple[Program, fx.GraphModule]) -> None:
    program, gm = gated
    x = random(32, 3).t()
    with torch.inference_mode(), calls() as ran:
        assert near(program(x)[0], gm(x)[0], 1e-2)
        assert near(program(nn.Parameter(x, requires_grad=False))[0], gm(x)[0], 1e-2)
    assert len(ran) == 2


def test_weights_of_now_are_used(gated: tuple[Program, fx.GraphModule]) -> None:
    program, gm = gated
    x = random(3, 32)
    before = program(x)[0].clone()
    state = {name: t.clone() for name, t in gm.state_dict().items()}
    gm.get_buffer("up.weight_scale").mul_(2)
    assert near(program(x)[0], gm(x)[0], 1e-2)
    assert not near(program(x)[0], before, 1e-1)
    gm.load_state_dict(state)
    assert torch.equal(program(x)[0], before)
    down = gm.get_submodule("down")
    gm.down = copy.deepcopy(gm.get_submodule("down"))
    assert torch.equal(program(x)[0], before)
    gm.get_buffer("down.weight_scale").zero_()
    assert near(program(x)[0], gm(x)[0], 1e-2)
    gm.down = down
    assert torch.equal(program(x)[0], before)
    gm.to(torch.bfloat16)  # which leaves packed modules alone
    assert torch.equal(program(x)[0], before)


def test_steps_are_kept_for_some_shapes(gated: tuple[Program, fx.GraphModule]) -> None:
    program, gm = gated
    for rows in [*range(1, MOST_ROWS + 1), *range(1, 4)]:
        x = random(1, rows, 32, seed=rows)
        assert near(program(x[0])[0], gm(x[0])[0], 1e-2)


def test_no_library_no_region(gated: tuple[Program, fx.GraphModule]) -> None:
    with kernels.using("torch"):
        assert "ops0" not in Program(packed()).code
    assert "ops0" in gated[0].code


def test_what_it_gives_may_be_written_to(gated: tuple[Program, fx.GraphModule]) -> None:
    program, _ = gated
    x = random(3, 32)
    first = program(x)[0]
    kept = first.clone()
    first.zero_()
    assert torch.equal(program(x)[0], kept)
