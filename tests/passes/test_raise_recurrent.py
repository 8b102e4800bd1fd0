"""An LSTM, GRU or RNN is linears of its inputs and recurrences of its states, whose weights are layers."""

import copy
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
from graphq.ir.views import Linear, Recurrence, ops_of
from graphq.passes.raise_recurrent import RaiseRecurrent
from tests.graphs import assert_vals, without_data

X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Recurrent(nn.Module):
    """All that a recurrent layer gives, flat; ``starts``: from states that are inputs."""

    def __init__(self, layer: nn.Module, starts: bool = False) -> None:
        super().__init__()
        self.r = layer
        self.starts = starts

    def forward(self, x: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> tuple[Tensor, ...]:
        states: Any = None
        if self.starts:
            h, c = (s if s is None or isinstance(self.r, nn.RNNCellBase) else s.transpose(0, 1) for s in (h, c))
            states = (h, c) if isinstance(self.r, nn.LSTM | nn.LSTMCell) else h
        x = x if getattr(self.r, "batch_first", True) else x.transpose(0, 1)
        return tuple(_flat(self.r(x, states)))


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in _flat(part)]


def raised(model: nn.Module, *inputs: Tensor, changes: int = 1) -> fx.GraphModule:
    """The graph of ``model`` in float64 with recurrences, which computes what it did."""
    torch.manual_seed(0)
    for parameter in model.double().eval().parameters():
        parameter.data.normal_()
    gm = capture_module(model, inputs)
    wanted = gm(*inputs)
    blank = without_data(copy.deepcopy(gm))
    for one in (gm, blank):
        assert Pipeline([RaiseRecurrent()], strict=True).run(one) == {"raise-recurrent": changes}
        assert Pipeline([RaiseRecurrent()], strict=True).run(one) == {"raise-recurrent": 0}
    assert dump(blank) == dump(gm)
    assert_vals(gm, *inputs)
    for found, expected in zip(gm(*inputs), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # sums in another order
    return gm


def test_golden() -> None:
    gm = raised(Recurrent(nn.LSTM(6, 4, bidirectional=True, batch_first=True)), X)
    assert_expected_inline(
        dump(gm),
        """\
%x: f64[batch, 5, 6] = input
%1: int = aten.sym_size.int(%x, 0)
%2: f64[5, batch, 6] = aten.transpose.int(%x, 0, 1)
%3: f64[batch, 4] = aten.zeros([%1, 4], dtype=f64, device=cpu, pin_memory=False)
%4: f64[batch, 4] = aten.zeros([%1, 4], dtype=f64, device=cpu, pin_memory=False)
%5: f64[5, batch, 16] = aten.linear(%2, @r.weight_ih_l0, @r.bias_ih_l0)
%6: (f64, f64, f64) = graphq.recurrence(%5, @r.weight_hh_l0, @r.bias_hh_l0, %3, %4, 'lstm', False)
%7: f64[5, batch, 4] = item(%6, 0)
%8: f64[batch, 4] = item(%6, 1)
%9: f64[batch, 4] = item(%6, 2)
%10: f64[batch, 4] = aten.zeros([%1, 4], dtype=f64, device=cpu, pin_memory=False)
%11: f64[batch, 4] = aten.zeros([%1, 4], dtype=f64, device=cpu, pin_memory=False)
%12: f64[5, batch, 16] = aten.linear(%2, @r.weight_ih_l0_reverse, @r.bias_ih_l0_reverse)
%13: (f64, f64, f64) = graphq.recurrence(%12, @r.weight_hh_l0_reverse, @r.bias_hh_l0_reverse, %10, %11, 'lstm', True)
%14: f64[5, batch, 4] = item(%13, 0)
%15: f64[batch, 4] = item(%13, 1)
%16: f64[batch, 4] = item(%13, 2)
%17: f64[5, batch, 8] = aten.cat([%7, %14], -1)
%18: f64[batch, 5, 8] = aten.transpose.int(%17, 0, 1)
%19: f64[2, batch, 4] = aten.stack([%8, %15], 0)
%20: f64[2, batch, 4] = aten.stack([%9, %16], 0)
return [%18, %19, %20]
""",
    )
    assert [(name, layer.kind, layer.shape, layer.bias, layer.reads_state) for name, layer in layers(gm).items()] == [
        ("r.weight_ih_l0", "recurrent", (16, 6), True, False),
        ("r.weight_hh_l0", "recurrent", (16, 4), True, True),
        ("r.weight_ih_l0_reverse", "recurrent", (16, 6), True, False),
        ("r.weight_hh_l0_reverse", "recurrent", (16, 4), True, True),
    ]


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"bias": False, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"num_layers": 3, "dropout": 0.5},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_layers_and_directions(kind: Any, options: dict[str, Any]) -> None:
    gm = raised(Recurrent(kind(6, 4, **options)), X)
    count = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    assert len(layers(gm)) == 2 * count
    assert [layer.reads_state for layer in layers(gm).values()] == [False, True] * count


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_states_that_are_given(kind: Any) -> None:
    model = Recurrent(kind(6, 4, num_layers=2, batch_first=True), starts=True)
    states = [torch.randn(3, 2, 4).double() for _ in range(2 if kind is nn.LSTM else 1)]
    raised(model, X, *states)


def test_relu() -> None:
    gm = raised(Recurrent(nn.RNN(6, 4, nonlinearity="relu", batch_first=True)), X)
    assert "'rnn_relu'" in dump(gm)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind: Any) -> None:
    states = [torch.randn(3, 4).double() for _ in range(2 if kind is nn.LSTMCell else 1)]
    gm = raised(Recurrent(kind(6, 4), starts=True), X[:, 0], *states)
    assert list(layers(gm)) == ["r.weight_ih", "r.weight_hh"]


def test_consumers_see_one_op() -> None:
    for kind, name in ((nn.LSTM, "LSTM"), (nn.GRU, "GRU"), (nn.RNN, "RNN")):
        gm = raised(Recurrent(kind(6, 4, batch_first=True)), X)
        kinds = [kind_of(op) for op in ops_of(gm) if isinstance(op, Linear | Recurrence)]
        assert kinds == [name, name]  # no quantizer stands between the linear and its recurrence


def test_a_projection_stays() -> None:
    raised(Recurrent(nn.LSTM(6, 4, proj_size=2, batch_first=True)), X, changes=0)


def test_the_state_stays_float_and_a_note_says_so() -> None:
    model = Recurrent(nn.GRU(6, 4, batch_first=True)).float().eval()
    rules = [{"match": "*", "weight": "int8/channel", "input": "int8/tensor"}]
    made = graphq.compile(model, {"graphq": 1, "rules": rules}, inputs=X.float(), calibration=[X.float()])
    note = "r.weight_hh_l0: input int8/tensor: its input is the state inside of a recurrence, which stays float"
    assert [n for n in made.report.notes if "state" in n] == [note]
    assert {one.layer.fqn: (str(one.weight), str(one.input)) for one in made.report.layers} == {
        "r.weight_ih_l0": ("int8/channel", "int8/tensor"),
        "r.weight_hh_l0": ("int8/channel", "None"),
    }
    rules = [{"match": "weight_hh_l0", "input": "int8/tensor"}, {"match": "weight_ih_l0", "weight": "int8/channel"}]
    made = graphq.compile(model, {"graphq": 1, "rules": rules}, inputs=X.float(), calibration=[X.float()])
    assert {one.layer.fqn: one.reason for one in made.report.layers} == {
        "r.weight_ih_l0": "",
        "r.weight_hh_l0": "its input is the state inside of a recurrence, which stays float",
    }


@pytest.mark.parametrize("algorithm", ["gptq", "awq", "smooth-quant", "equalize", "auto-round", "correct-bias"])
def test_every_algorithm_leaves_the_states_function_alone(algorithm: str) -> None:
    """In 8 bits, whatever is folded, outputs stay within what rounding does; layers that it leaves are told."""
    torch.manual_seed(0)
    layers = nn.LSTM(6, 8, num_layers=2, batch_first=True)
    model = Recurrent(layers).eval()
    spec = {"graphq": 1, "rules": [{"match": "*", "weight": "int8/channel"}], "algorithms": [algorithm]}
    made = graphq.compile(model, spec, inputs=X.float(), calibration=[X.float(), X.float().flip(0)])
    for found, expected in zip(made.graph(X.float()), model(X.float()), strict=True):
        assert (found - expected).norm() <= 0.02 * expected.norm()  # rounding alone: 0.003
    told = {
        "gptq": "r.weight_hh_l0: rounded to nearest: the states that it multiplies are not observed",
        "correct-bias": "r.weight_hh_l0: its bias is not corrected: its output is inside of a recurrence",
    }
    assert algorithm not in told or told[algorithm] in made.report.notes
