"""A recurrence of few steps, as these: the same function, in ops that consumers of whole graphs run in integers."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

import graphq
from graphq.capture.modules import capture_module
from graphq.ir.layers import layers
from graphq.ir.op_kinds import kind_of
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.ir.views import Recurrence, ops_of
from graphq.lowering.profiles import GENERIC_INT8, ORT_CPU, PROFILES
from graphq.passes.raise_recurrent import RaiseRecurrent
from graphq.passes.unroll_recurrent import UnrollRecurrent
from tests.graphs import assert_vals, without_data
from tests.passes.test_raise_recurrent import Recurrent

X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def unrolled(model: nn.Module, *inputs: Tensor, changes: int = 1, steps: int = 64) -> fx.GraphModule:
    """The graph of ``model`` in float64 with steps in the place of recurrences, which computes what it did."""
    torch.manual_seed(0)
    for parameter in model.double().eval().parameters():
        parameter.data.normal_()
    gm = capture_module(model, inputs)
    RaiseRecurrent().run(gm)
    gm.recompile()
    wanted = gm(*inputs)
    blank = without_data(copy.deepcopy(gm))
    found = layers(gm)
    unroll = UnrollRecurrent(dataclasses.replace(GENERIC_INT8, steps=steps))
    for one in (gm, blank):
        assert Pipeline([unroll], strict=True).run(one) == {"unroll-recurrent": changes}
        assert Pipeline([unroll], strict=True).run(one) == {"unroll-recurrent": 0}
    assert dump(blank) == dump(gm)
    assert_vals(gm, *inputs)
    assert [(name, layer.kind) for name, layer in layers(gm).items()] == [(n, one.kind) for n, one in found.items()]
    for made, expected in zip(gm(*inputs), wanted, strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-12, atol=1e-12)  # sums in another order
    return gm


def test_golden() -> None:
    """Nothing of the first step's state and forget gate is left; the weight is read by the second step alone."""
    gm = unrolled(Recurrent(nn.LSTM(6, 4, batch_first=True)), X[:, :2])
    assert_expected_inline(
        dump(gm),
        """\
%x: f64[batch, 2, 6] = input
%1: f64[2, batch, 6] = aten.transpose.int(%x, 0, 1)
%2: f64[2, batch, 16] = aten.linear(%1, @r.weight_ih_l0, @r.bias_ih_l0)
%3: f64[batch, 16] = aten.select.int(%2, 0, 0)
%4: f64[batch, 16] = aten.add.Tensor(%3, @r.bias_hh_l0)
%5: f64[batch, 4] = aten.slice.Tensor(%4, -1, 0, 4)
%6: f64[batch, 4] = aten.slice.Tensor(%4, -1, 8, 12)
%7: f64[batch, 4] = aten.slice.Tensor(%4, -1, 12, 16)
%8: f64[batch, 4] = aten.sigmoid(%5)
%9: f64[batch, 4] = aten.tanh(%6)
%10: f64[batch, 4] = aten.mul.Tensor(%8, %9)
%11: f64[batch, 4] = aten.tanh(%10)
%12: f64[batch, 4] = aten.sigmoid(%7)
%13: f64[batch, 4] = aten.mul.Tensor(%12, %11)
%14: f64[batch, 16] = aten.select.int(%2, 0, 1)
%15: f64[batch, 16] = aten.linear(%13, @r.weight_hh_l0, @r.bias_hh_l0)
%16: f64[batch, 16] = aten.add.Tensor(%14, %15)
%17: f64[batch, 4] = aten.slice.Tensor(%16, -1, 0, 4)
%18: f64[batch, 4] = aten.slice.Tensor(%16, -1, 4, 8)
%19: f64[batch, 4] = aten.slice.Tensor(%16, -1, 8, 12)
%20: f64[batch, 4] = aten.slice.Tensor(%16, -1, 12, 16)
%21: f64[batch, 4] = aten.sigmoid(%17)
%22: f64[batch, 4] = aten.tanh(%19)
%23: f64[batch, 4] = aten.mul.Tensor(%21, %22)
%24: f64[batch, 4] = aten.sigmoid(%18)
%25: f64[batch, 4] = aten.mul.Tensor(%24, %10)
%26: f64[batch, 4] = aten.add.Tensor(%25, %23)
%27: f64[batch, 4] = aten.tanh(%26)
%28: f64[batch, 4] = aten.sigmoid(%20)
%29: f64[batch, 4] = aten.mul.Tensor(%28, %27)
%30: f64[1, batch, 4] = aten.unsqueeze(%13, 0)
%31: f64[1, batch, 4] = aten.unsqueeze(%29, 0)
%32: f64[2, batch, 4] = aten.cat([%30, %31], 0)
%33: f64[batch, 2, 4] = aten.transpose.int(%32, 0, 1)
%34: f64[1, batch, 4] = aten.stack([%29], 0)
%35: f64[1, batch, 4] = aten.stack([%26], 0)
return [%33, %34, %35]
""",
    )
    assert {layer.reads_state for layer in layers(gm).values()} == {False}


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"bias": False},
    {"num_layers": 2, "bidirectional": True},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_layers_and_directions(kind: Any, options: dict[str, Any]) -> None:
    count = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    gm = unrolled(Recurrent(kind(6, 4, batch_first=True, **options)), X, changes=count)
    assert not any(isinstance(op, Recurrence) for op in ops_of(gm))
    kinds = [kind_of(op) for op in ops_of(gm)]
    assert kinds.count("Linear") == count * 5  # the input's, and the state's of all steps but the first


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_states_that_are_given(kind: Any) -> None:
    model = Recurrent(kind(6, 4, batch_first=True), starts=True)
    states = [torch.randn(3, 1, 4).double() for _ in range(2 if kind is nn.LSTM else 1)]
    gm = unrolled(model, X, *states)
    assert [kind_of(op) for op in ops_of(gm)].count("Linear") == 6


def test_a_cell_that_is_given_beside_a_state_of_zeros() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r: Any = nn.LSTM(6, 4, batch_first=True)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            zeros = torch.zeros(c.shape[0], 4, dtype=x.dtype)
            gates = torch.nn.functional.linear(x.reshape(-1, 5, 6).transpose(0, 1), self.r.weight_ih_l0)
            given = (gates, self.r.weight_hh_l0, self.r.bias_hh_l0, zeros, c, "lstm", True)
            return torch.ops.graphq.recurrence(*given)[2]

    gm = unrolled(Cell(), X, torch.randn(3, 4).double())
    assert [kind_of(op) for op in ops_of(gm)].count("Linear") == 5


def test_relu_and_cells() -> None:
    gm = unrolled(Recurrent(nn.RNN(6, 4, nonlinearity="relu", batch_first=True)), X)
    assert [kind_of(op) for op in ops_of(gm)].count("Relu") == 5
    for kind, states in ((nn.LSTMCell, 2), (nn.GRUCell, 1)):
        given = [torch.randn(3, 4).double() for _ in range(states)]
        unrolled(Recurrent(kind(6, 4), starts=True), X[:, 0], *given)


def test_near_misses() -> None:
    """One step more than is written out, a number that is not known, and a consumer that wants none."""
    unrolled(Recurrent(nn.GRU(6, 4, batch_first=True)), X, changes=1, steps=5)
    unrolled(Recurrent(nn.GRU(6, 4, batch_first=True)), X, changes=0, steps=4)
    unrolled(Recurrent(nn.GRU(6, 4, batch_first=True)), X, changes=0, steps=0)

    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.r: Any = nn.GRU(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.graphq.recurrence(
                torch.nn.functional.linear(x, self.r.weight_ih_l0), self.r.weight_hh_l0, None, x[0, :, :4], None, "gru", False
            )[0]  # fmt: skip

    gm = capture_module(Steps().double().eval(), X)
    assert not isinstance(next(op for op in ops_of(gm) if isinstance(op, Recurrence)).gates.val.shape[0], int)
    assert UnrollRecurrent(GENERIC_INT8).run(gm) == 0
    assert ORT_CPU.steps == 0


@pytest.mark.parametrize("name", [name for name, profile in PROFILES.items() if profile.steps])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_all_of_it_runs_in_integers(name: str, kind: Any) -> None:
    torch.manual_seed(0)
    model = Recurrent(kind(6, 4, batch_first=True, bidirectional=True)).eval()
    x = torch.randn(2, 4, 6)
    made = graphq.compile(model, profile=name, inputs=x, calibration=[x])
    assert not [note for note in made.report.notes if "in float" in note]
    decided = {one.layer.fqn: (str(one.weight), str(one.input)) for one in made.report.layers}
    assert decided == dict.fromkeys(decided, ("int8/channel", "uint8/tensor"))
    assert len(decided) == 4
    assert graphq.explain(model, profile=name, inputs=x).notes == (*made.report.notes, "dialect: native")
    for found, wanted in zip(made.graph(x), model(x), strict=True):
        assert (found - wanted).norm() <= 0.05 * wanted.norm()  # 8 bits of each sum and state: 0.02


@pytest.mark.parametrize("algorithm", ["gptq", "awq", "smooth-quant", "equalize", "correct-bias"])
def test_algorithms_see_the_states(algorithm: str) -> None:
    torch.manual_seed(0)
    model = Recurrent(nn.LSTM(6, 8, batch_first=True)).eval()
    x = [torch.randn(4, 4, 6) for _ in range(2)]
    spec = {
        "graphq": 1,
        "profile": "generic-int8",
        "rules": [{"match": "kind:recurrent", "weight": "int8/channel", "input": "uint8/tensor"}],
        "algorithms": [algorithm],
    }
    made = graphq.compile(model, spec, inputs=x[0], calibration=x)
    assert not [note for note in made.report.notes if "inside of a recurrence" in note or "not observed" in note]
    for found, wanted in zip(made.graph(x[0]), model(x[0]), strict=True):
        assert (found - wanted).norm() <= 0.05 * wanted.norm()  # 8 bits of each sum and state
