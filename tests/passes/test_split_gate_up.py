"""Experts' fused gate and up projections are two layers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

from graphq.ir.layers import layers
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.passes.split_gate_up import SplitGateUp
from graphq.runtime import ops
from graphq.state import tensor_of
from tests.graphs import assert_vals, run
from tests.models import MoE, capture, route

aten = torch.ops.aten
X = torch.randn(9, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
EXAMPLE = torch.ones(2, 8, dtype=torch.float64)


def split(gm: fx.GraphModule) -> int:
    """The number of changes; a second run finds nothing."""
    counts = Pipeline([SplitGateUp()], strict=True).run(gm)
    assert Pipeline([SplitGateUp()], strict=True).run(gm) == {"split-gate-up": 0}
    return counts["split-gate-up"]


def test_golden() -> None:
    gm = capture(MoE().double(), EXAMPLE)
    before, fused = run(gm, X), tensor_of(gm, "experts.gate_up_proj").detach()
    assert split(gm) == 1
    assert_expected_inline(
        dump(gm),
        """\
%x: f64[batch, 8] = input
%1: f64[batch, 4] = aten.linear(%x, @router.weight)
%2: i64[batch] = aten.argmax(%1, -1)
%3: (i64, i64) = aten.sort(%2)
%4: i64[batch] = item(%3, 0)
%5: i64[batch] = item(%3, 1)
%6: i64[batch, 1] = aten.unsqueeze(%4, -1)
%7: i64[4] = aten.arange(4, device=cpu, pin_memory=False)
%8: bool[batch, 4] = aten.eq.Tensor(%6, %7)
%9: i64[4] = aten.sum.dim_IntList(%8, [0])
%10: i32[4] = aten.cumsum(%9, 0, dtype=i32)
%11: f64[batch, 8] = aten.index.Tensor(%x, [%5])
%12: f64[batch, 6] = graphq.grouped_linear(%11, @experts.gate_proj, %10)
%13: f64[batch, 6] = graphq.grouped_linear(%11, @experts.up_proj, %10)
%14: f64[batch, 6] = aten.silu(%12)
%15: f64[batch, 6] = aten.mul.Tensor(%14, %13)
%16: f64[batch, 8] = graphq.grouped_linear(%15, @experts.down_proj, %10)
%17: i64[batch] = aten.argsort(%5)
%18: f64[batch, 8] = aten.index.Tensor(%16, [%17])
return [%18]
""",
    )
    torch.testing.assert_close(run(gm, X), before, rtol=1e-12, atol=1e-12)  # the same sums, in another order
    assert_vals(gm, X)
    state = gm.state_dict()
    assert list(state) == ["router.weight", "experts.down_proj", "experts.gate_proj", "experts.up_proj"]
    assert torch.equal(torch.cat([state["experts.gate_proj"], state["experts.up_proj"]], 1), fused)
    assert isinstance(tensor_of(gm, "experts.gate_proj"), nn.Parameter)
    assert state["experts.up_proj"].untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()  # no copy
    assert [name for name in layers(gm) if ".1." in name] == [
        "experts.1.gate_proj",
        "experts.1.up_proj",
        "experts.1.down_proj",
    ]


class Fused(nn.Module):
    """4 experts' ``[2N, K]`` weights under ``name``, whose products ``use`` puts together."""

    def __init__(self, use: Any, name: str = "gate_up_proj") -> None:
        super().__init__()
        self.experts = nn.ParameterDict({name: nn.Parameter(torch.empty(4, 12, 8))})
        self.use, self.name = use, name

    def forward(self, x: Tensor) -> Any:
        _, offsets = route(x[:, :4])
        w = self.experts[self.name]
        return self.use(ops.grouped_linear(x, w, offsets), w, offsets)


def halves(y: Tensor, *_: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def half_used_twice(y: Tensor, *_: Tensor) -> Tensor:
    gate, up = y.split([6, 6], 1)
    return F.silu(gate) * gate + up


def cut_twice(y: Tensor, *_: Tensor) -> Tensor:
    gate, up = y.chunk(2, -1)
    return gate * up + y.chunk(2, -1)[0]


@pytest.mark.parametrize("use", [halves, half_used_twice, cut_twice])
def test_halves(use: Any) -> None:
    gm = capture(Fused(use).double(), EXAMPLE)
    before = run(gm, X)
    assert split(gm) == 1
    torch.testing.assert_close(run(gm, X), before, rtol=1e-12, atol=1e-12)  # the same sums, in another order
    assert list(gm.state_dict()) == ["experts.gate_proj", "experts.up_proj"]


def weight_read_elsewhere(y: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    return halves(y) + w.sum()


def product_read_elsewhere(y: Tensor, *_: Tensor) -> Tensor:
    return halves(y) + y.sum()


def uneven(y: Any, *_: Tensor) -> Tensor:
    gate, up = y.split([5, 7], -1)
    return F.silu(gate).sum() * up


def thirds(y: Tensor, *_: Tensor) -> Tensor:
    parts: Any = y.chunk(3, -1)
    return parts[0] * parts[1] + parts[2]


def rows(y: Tensor, *_: Tensor) -> Tensor:
    return y.t().reshape(12, -1).narrow(0, 0, 6)


def interleaved(y: Tensor, *_: Tensor) -> Tensor:
    return F.silu(y[:, ::2]) * y[:, 1::2]


def gate_alone(y: Tensor, *_: Tensor) -> Tensor:
    return F.silu(y.chunk(2, -1)[0])


def whole(y: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    return halves(y), y


@pytest.mark.parametrize(
    "use", [weight_read_elsewhere, product_read_elsewhere, uneven, thirds, rows, interleaved, gate_alone, whole]
)
def test_near_misses(use: Any) -> None:
    gm = capture(Fused(use), torch.ones(2, 8))
    assert split(gm) == 0
    assert list(gm.state_dict()) == ["experts.gate_up_proj"]


@pytest.mark.parametrize(
    ("target", "arguments", "count"),
    [
        (aten.split.Tensor, (6, -1), 1),
        (aten.split.Tensor, (6, 1), 1),
        (aten.split.Tensor, (6,), 0),  # along the rows
        (aten.split.Tensor, (6, 0), 0),
        (aten.split.Tensor, (4, -1), 0),  # not in half, though two parts are read
        (aten.chunk.default, (2, 1), 1),
        (aten.chunk.default, (2,), 0),
        (aten.chunk.default, (2, 0), 0),
        (aten.chunk.default, (3, -1), 0),
        (aten.split_with_sizes.default, ([6, 6], -1), 1),
        (aten.split_with_sizes.default, ([6, 6], 1), 1),
        (aten.split_with_sizes.default, ([6, 6],), 0),
        (aten.split_with_sizes.default, ([5, 7], -1), 0),
        (aten.split_with_sizes.default, ([6, 3, 3], -1), 0),
    ],
)
def test_cuts(target: Any, arguments: tuple[Any, ...], count: int) -> None:
    gm = capture(MoE(), torch.ones(2, 8))
    cut = next(n for n in gm.graph.nodes if n.target is aten.chunk.default)
    cut.target, cut.args = target, (cut.args[0], *arguments)
    assert SplitGateUp().run(gm) == count


def test_chunks_of_an_odd_width_are_no_halves() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ParameterDict({"gate_up_proj": torch.empty(4, 11, 8)})

        def forward(self, x: Tensor) -> Tensor:
            _, offsets = route(x[:, :4])
            gate, up = ops.grouped_linear(x, self.experts["gate_up_proj"], offsets).chunk(2, -1)
            return gate.sum() * up

    assert split(capture(Odd(), torch.ones(2, 8))) == 0


@pytest.mark.parametrize("name", ["down_proj", "my_gate_up_proj", "gate_up_proj_2", "up_gate_proj"])
def test_other_names(name: str) -> None:
    assert split(capture(Fused(halves, name), torch.ones(2, 8))) == 0


class Taken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ParameterDict({"gate_up_proj": torch.empty(4, 12, 8), "up_proj": torch.empty(6)})

    def forward(self, x: Tensor) -> Tensor:
        _, offsets = route(x[:, :4])
        return halves(ops.grouped_linear(x, self.experts["gate_up_proj"], offsets)) * self.experts["up_proj"]


def test_a_half_whose_name_is_taken() -> None:
    assert split(capture(Taken(), torch.ones(2, 8))) == 0


def test_without_weights_the_graph_is_the_same() -> None:
    from graphq.capture.hugging_face import capture_config
    from graphq.passes.raise_grouped_linear import RaiseGroupedLinear
    from tests.models import captured, tiny_config

    cls, config = tiny_config("mixtral")
    fake, real = capture_config(config, cls), captured("mixtral")
    steps = [RaiseGroupedLinear(), SplitGateUp()]
    assert Pipeline(steps, strict=True).run(fake) == Pipeline(steps, strict=True).run(real)
    assert dump(fake) == dump(real)
    assert sum(name.endswith("gate_proj") for name in real.state_dict()) == 2
