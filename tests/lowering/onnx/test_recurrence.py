"""Recurrences in ONNX's terms, where their weights have one reader, several, or others beside them."""

from collections import Counter
from pathlib import Path
from typing import Any, final

import onnx
import pytest
import torch
from torch import Tensor, fx, nn

import graphq
from graphq.capture.modules import capture_module
from graphq.ir.views import Recurrence, ops_of
from graphq.lowering.onnx.form import onnx_form
from graphq.lowering.onnx.recurrence import onnx_recurrence
from graphq.runtime import ops
from graphq.state import tensor_of
from tests.lowering.onnx.test_every_layer import relative, sessions

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


class Written(nn.Module):
    """What ``call`` makes of its input with a recurrent layer ``r``."""

    def __init__(self, call: Any, layer: nn.Module) -> None:
        super().__init__()
        self.r, self.call = layer, call

    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


def compiled(call: Any, layer: nn.Module, weight: str = "int8/channel", x: Tensor = X) -> Any:
    torch.manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_()
    spec = {"graphq": 1, "rules": [{"match": "*", "weight": weight}]}
    return graphq.compile(Written(call, layer).eval(), spec, inputs=x)


def emitted(made: Any, folder: Path, x: Tensor = X) -> onnx.ModelProto:
    """The file, which ONNX Runtime runs as the QDQ form."""
    made.emit("onnx", folder / "onnx")
    for session in sessions(folder / "onnx"):
        (given,) = session.get_inputs()
        assert relative(session.run(None, {given.name: x.numpy()}), made.graph(x)) <= 1e-5  # sums in another order
    return onnx.load(folder / "onnx" / "model.onnx")


def gru(**options: Any) -> nn.Module:
    return nn.GRU(6, 4, batch_first=True, **options)


def test_initializers_are_in_onnx_order(tmp_path: Path) -> None:
    made = compiled(lambda m, x: m.r(x)[0], nn.LSTM(6, 4, batch_first=True))
    held = {t.name: onnx.numpy_helper.to_array(t) for t in emitted(made, tmp_path).graph.initializer}
    assert sorted(name for name in held if not name.startswith("constants.")) == [
        "r.bias_l0",
        "r.weight_hh_l0.weight",
        "r.weight_hh_l0.weight_scale",
        "r.weight_ih_l0.weight",
        "r.weight_ih_l0.weight_scale",
        "zero_points.int8.16",
    ]  # and the sizes of states
    for name in ("r.weight_ih_l0.weight", "r.weight_hh_l0.weight"):
        i, f, g, o = tensor_of(made.graph, name).chunk(4)
        assert torch.equal(torch.from_numpy(held[name]), torch.cat([i, o, f, g])[None])
        i, f, g, o = tensor_of(made.graph, f"{name}_scale").flatten().chunk(4)
        assert torch.equal(torch.from_numpy(held[f"{name}_scale"]), torch.cat([i, o, f, g]))
    biases = [tensor_of(made.graph, f"r.bias_{one}_l0").chunk(4) for one in ("ih", "hh")]
    wanted = torch.cat([part for i, f, g, o in biases for part in (i, o, f, g)])[None]
    assert torch.equal(torch.from_numpy(held["r.bias_l0"]), wanted)


def test_a_layer_called_twice_has_its_weights_once(tmp_path: Path) -> None:
    model = emitted(compiled(lambda m, x: m.r(x)[0] + m.r(x.flip(1) * 2)[0], gru()), tmp_path)
    assert Counter(node.op_type for node in model.graph.node)["DequantizeLinear"] == 2
    assert len([t for t in model.graph.initializer if t.name.endswith(".weight")]) == 2


@pytest.mark.parametrize("weight", ["int8/channel", "int8/2x2"])
def test_a_weight_that_others_read_is_put_in_order_by_the_graph(weight: str, tmp_path: Path) -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        return m.r(x)[0].sum(-1) + torch.nn.functional.linear(x, m.r.weight_ih_l0).sum(-1)

    model = emitted(compiled(call, gru(), weight), tmp_path)
    assert "r.weight_ih_l0.weight" in [t.name for t in model.graph.initializer]


def test_float_weights_and_one_bias_alone(tmp_path: Path) -> None:
    spec = {"graphq": 1, "rules": [{"match": "weight_hh_l0", "weight": "int8/channel"}]}
    layer = gru(bias=False)
    layer.bias = nn.Parameter(torch.randn(12))

    def call(m: Any, x: Tensor) -> Tensor:
        gates = torch.nn.functional.linear(x.transpose(0, 1), m.r.weight_ih_l0)
        h = x.new_zeros(x.shape[0], 4)
        return ops.recurrence(gates, m.r.weight_hh_l0, m.r.bias, h, None, "gru", True)[0]

    made = graphq.compile(Written(call, layer).eval(), spec, inputs=X)
    emitted(made, tmp_path)


def test_gates_that_no_linear_gives(tmp_path: Path) -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        gates = x.transpose(0, 1).repeat(1, 1, 2)
        return ops.recurrence(gates, m.r.weight_hh_l0, m.r.bias_hh_l0 * 2, x[:, 0, :4], None, "gru", False)[0]

    emitted(compiled(call, gru()), tmp_path)


def test_the_form_has_no_recurrence_of_torchs() -> None:
    def spelled(gm: fx.GraphModule) -> list[Any]:
        return [
            op.node.target
            for op in ops_of(onnx_form(gm))
            if op.node.target is onnx_recurrence or isinstance(op, Recurrence)
        ]

    made = compiled(lambda m, x: m.r(x)[0], gru(num_layers=2, bidirectional=True))
    assert spelled(made.graph) == [onnx_recurrence] * 4
    assert spelled(capture_module(Written(lambda m, x: x + 1, gru()), X)) == []


HALF = {
    "graphq": 1,
    "rules": [
        {"match": "kind:recurrent", "weight": "int8/channel"},
        {"match": "head", "weight": "int8/channel", "input": "uint8/tensor"},
    ],
}


@final
class Headed(nn.Module):
    """A recurrent layer of two directions, and a linear of its states."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.r, self.head = kind(6, 4, batch_first=True, bidirectional=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.r(x)[0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_openvino_loads_recurrent_weights_beside_quantized_activations(kind: Any, tmp_path: Path) -> None:
    """Those of an LSTM and a GRU as floats, which their codes stand for; nothing else differs."""
    openvino = pytest.importorskip("openvino")
    torch.manual_seed(0)
    made = graphq.compile(Headed(kind).eval(), HALF, inputs=X, calibration=[X])
    made.emit("onnx", tmp_path / "a", profile="openvino")
    names = ", ".join(f"r.weight_{one}_l0{way}" for way in ("", "_reverse") for one in ("ih", "hh"))
    note = f"onnx: {names}: written as the floats that their codes stand for, which alone are read there"
    assert (note in made.report.notes) == (kind is not nn.RNN)
    opened = openvino.Core().compile_model(
        str(tmp_path / "a" / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    (found,) = opened(X.numpy()).values()
    assert relative([found], made.graph(X)) <= 1e-5  # sums in another order
    held = {t.name: t.data_type for t in onnx.load(tmp_path / "a" / "model.onnx").graph.initializer}
    assert [n for n, t in held.items() if "weight_hh" in n and t == onnx.TensorProto.INT8 and "zero" not in n] == (
        ["r.weight_hh_l0.weight", "r.weight_hh_l0_reverse.weight"] if kind is nn.RNN else []
    )
    assert held["head.weight"] == onnx.TensorProto.INT8
    assert not [one for one in graphq.lint(tmp_path / "a", "openvino").warnings if "does not load" in one.reason]


@pytest.mark.parametrize(
    ("kind", "profile", "refused"),
    [(nn.GRU, "openvino", True), (nn.RNN, "openvino", False), (nn.GRU, "ort-cpu", False)],
)
def test_lint_names_codes_that_openvino_does_not_load(kind: Any, profile: str, refused: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = graphq.compile(Headed(kind).eval(), HALF, inputs=X, calibration=[X])
    made.emit("onnx", tmp_path / "a")
    told = [str(one) for one in graphq.lint(tmp_path / "a", profile).warnings if "does not load" in one.reason]
    if refused:
        why = "openvino does not load codes as weights of GRU beside quantized activations"
        assert told == [f"r/GRU, r/GRU_1: {why}; write these weights as floats, as graphq's profile openvino does"]
    else:
        assert not told


def test_weights_alone_stay_codes(tmp_path: Path) -> None:
    """Nothing is quantized beside them: OpenVINO computes the floats itself."""
    openvino = pytest.importorskip("openvino")
    torch.manual_seed(0)
    spec = {"graphq": 1, "rules": [{"match": "*", "weight": "int4/channel"}]}
    made = graphq.compile(Headed(nn.LSTM).eval(), spec, inputs=X)
    made.emit("onnx", tmp_path / "a", profile="openvino")
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    opened = openvino.Core().compile_model(str(tmp_path / "a" / "model.onnx"), "CPU", exact)
    (found,) = opened(X.numpy()).values()
    assert relative([found], made.graph(X)) <= 1e-5  # sums in another order
    held = {t.name: t.data_type for t in onnx.load(tmp_path / "a" / "model.onnx").graph.initializer}
    assert held["r.weight_hh_l0.weight"] == onnx.TensorProto.INT4
