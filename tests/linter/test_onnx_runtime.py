"""What is read from ONNX Runtime's optimized graph, and the inputs that a model is run on."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import graphq
from graphq.errors import TargetError
from graphq.linter.graph import Graph
from graphq.linter.onnx_runtime import free_size, observe, random_array, run_apart
from tests.linter.cases import conv
from tests.qdq_models import QdqModel


@pytest.mark.parametrize(
    ("name", "size"),
    [("batch", 2), ("past_sequence + sequence", 4), ("sequence+1", 3), (None, 2), ("", 2), ("2 + 3", 5)],
)
def test_a_dimension_that_is_a_sum_is_that_of_its_parts(name, size):
    assert free_size(name) == size
    assert free_size("past + sequence", 16) == 32


def test_inputs_are_seeded_and_of_their_type():
    random = np.random.default_rng(0)
    assert random_array(random, "float", [2, 3]).dtype == np.float32
    assert random_array(random, "float16", [2]).dtype == np.float16
    assert random_array(random, "bool", [2]).tolist() == [True, True]
    whole = random_array(random, "int64", [100])
    assert whole.dtype == np.int64
    assert set(whole.tolist()) == {0, 1}


def test_who_ran_it_and_how(tmp_path):
    m, outputs = conv()
    ran, by = observe(Graph(m.save(tmp_path / "m.onnx", *outputs)))
    assert ran == {"conv": "integers"}
    assert by.startswith("ONNX Runtime 1.")


def test_masks_and_caches_whose_sizes_belong_together(tmp_path):
    m = QdqModel()
    x, past, mask = m.input("batch", "sequence", 8), m.input("batch", "past", 8), m.input("batch", "past + sequence", 1)
    joined = m.op("Mul", m.op("Concat", past, x, axis=1), mask)
    path = m.save(tmp_path / "m.onnx", m.op("MatMul", m.qdq(joined), m.weight(8, 4, axis=1)))
    assert graphq.lint(path, "ort-cpu", run=True).ok


def test_names_that_onnx_runtime_s_passes_have_written(tmp_path):
    """A file that was optimized before has their marks in its own names: these come first, without them otherwise."""
    m = QdqModel()
    x = m.qdq(m.input(4, 32))
    for name, bias in (("linear", (16,)), ("linear/MatMulAddFusion", None), ("linear_token_1", None)):
        y = m.op("MatMul", x, m.weight(32, 16, axis=1))
        m.nodes[-1].name = name
        m.qdq(m.op("Add", y, m.constant(np.ones(bias, np.float32))) if bias else y)
    path = m.save(tmp_path / "m.onnx", "dequantizelinear3_y", "dequantizelinear5_y", "dequantizelinear7_y")
    report = graphq.lint(path, "ort-cpu", run=True)
    assert [(op.name, op.runs, op.ran) for op in report.ops] == [
        ("linear", "integers", "integers"),
        ("linear/MatMulAddFusion", "integers", "integers"),
        ("linear_token_1", "integers", "integers"),
    ]


@pytest.mark.parametrize("channels", [4, 16])  # 16: in blocks of channels
def test_a_frozen_batch_norm_is_fused_into_the_convolution_in_front(tmp_path, channels):
    m = QdqModel()
    y = m.op("Conv", m.input(1, channels, 8, 8), m.constant(np.ones((channels, channels, 3, 3), np.float32)))
    m.nodes[-1].name = "conv"
    for kind in ("Mul", "Add"):
        y = m.op(kind, y, m.constant(np.full((1, channels, 1, 1), 0.5, np.float32)))
    ran, _ = observe(Graph(m.save(tmp_path / "m.onnx", m.op("Relu", y))))
    assert ran["conv"] == "float"


def test_a_file_that_it_does_not_load(tmp_path):
    nodes = [helper.make_node("Absent", ["x"], ["y"], domain="nowhere")]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("nowhere", 1)]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(TargetError, match=r"m\.onnx: ONNX Runtime 1\.\d+\.\d+ cannot run it: .*nowhere"):
        graphq.lint(tmp_path / "m.onnx", "ort-cpu", run=True)


def test_a_difference_is_a_finding(tmp_path, monkeypatch):
    """Where a consumer no longer does what its table says, lint says so and fails."""
    from graphq.linter import onnx_runtime

    m, outputs = conv()
    path = m.save(tmp_path / "m.onnx", *outputs)
    monkeypatch.setattr(onnx_runtime, "observe", lambda graph: ({"conv": "float"}, "ONNX Runtime 9"))
    report = graphq.lint(path, "ort-cpu", run=True)
    assert not report.ok
    assert str(report).splitlines()[0] == "conv (Conv): ran in float, predicted: integers"
    assert str(report).splitlines()[-1] == "0 of 1 ops ran in integers in ONNX Runtime 9"


def test_what_left_no_trace_is_said(tmp_path, monkeypatch):
    from graphq.linter import onnx_runtime

    m, outputs = conv()
    path = m.save(tmp_path / "m.onnx", *outputs)
    monkeypatch.setattr(onnx_runtime, "observe", lambda graph: ({}, "ONNX Runtime 9"))
    report = graphq.lint(path, "ort-cpu", run=True)
    assert report.ok
    assert report.observation() == "0 of 0 ops ran in integers in ONNX Runtime 9; 1 left no trace in it"


def test_sizes_that_are_free_are_tried_in_turn(tmp_path):
    """Two rows are too few for a kernel of three, sixteen are enough; one that nothing fits says why of the first."""
    m, outputs = conv(shape=(1, 8, "height", "width"))
    assert graphq.lint(m.save(tmp_path / "m.onnx", *outputs), "ort-cpu", run=True).ok
    m, outputs = conv(shape=(1, 8, "height", "width"), kernel=(16, 8, 300, 300))
    with pytest.raises(TargetError, match=r"cannot run it: .*QLinearConv"):
        graphq.lint(m.save(tmp_path / "m.onnx", *outputs), "ort-cpu", run=True)


def test_nodes_without_names_leave_traces(tmp_path):
    """In integers behind a change of layout, and in float in blocks of channels."""
    m, outputs = conv()
    y = m.op("Conv", m.input(1, 8, 8, 8), m.constant(np.ones((16, 8, 3, 3), np.float32)))
    for node in m.nodes:
        node.name = ""
    report = graphq.lint(m.save(tmp_path / "m.onnx", *outputs, m.op("Relu", y)), "ort-cpu", run=True)
    assert [(op.kind, op.runs, op.ran) for op in report.ops] == [
        ("Conv", "integers", "integers"),
        ("Conv", "float", "float"),
    ]


def test_inputs_that_are_no_tensors_of_numbers(tmp_path):
    m = QdqModel()
    text = m.input(2, element=TensorProto.STRING)
    path = m.save(tmp_path / "m.onnx", m.op("Relu", m.qdq(m.input(4))), m.op("Identity", text))
    model = onnx.load(path)
    model.graph.output[1].type.tensor_type.elem_type = TensorProto.STRING
    onnx.save(model, path)
    for profile in ("ort-cpu", "openvino"):
        assert graphq.lint(path, profile).ops
        with pytest.raises(TargetError, match=r"m\.onnx: .* cannot run it: lint makes no inputs of "):
            graphq.lint(path, profile, run=True)


def test_an_input_without_a_shape(tmp_path):
    m, outputs = conv()
    path = m.save(tmp_path / "m.onnx", *outputs)
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    onnx.save(model, path)
    for profile in ("ort-cpu", "openvino"):
        with pytest.raises(TargetError, match=r"m\.onnx: run: the input x has no shape"):
            graphq.lint(path, profile, run=True)


def test_a_file_that_ends_its_process(tmp_path):
    """ONNX Runtime 1.31 aborts on a convolution of tensors without shapes that gets a scalar; graphq goes on."""
    m, outputs = conv()
    path = m.save(tmp_path / "m.onnx", *outputs)
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.ClearField("shape")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    onnx.save(model, path)
    assert run_apart(path, tmp_path / "ran.onnx") == "its process ended with SIGABRT"
