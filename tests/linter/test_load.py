"""Files that lint loads, and those that it refuses with a line: whatever a file holds, there is a report or an error."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphq
from graphq.errors import GraphqError, TargetError
from graphq.linter.load import captured
from graphq.lowering.profiles import PROFILES
from tests.linter.cases import CASES, conv
from tests.qdq_models import QdqModel


def value(name: str, element: int = TensorProto.FLOAT, shape: Any = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element, shape)


def written(
    m: QdqModel, outputs: Sequence[str], path: Path, change: Callable[[Any], None] = lambda model: None
) -> Path:
    """The file of a model as it is, valid or not, once it is changed."""
    graph = helper.make_graph(m.nodes, "g", m.inputs, [value(name) for name in outputs], m.initializers)
    imports = [helper.make_opsetid("", m.opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    change(model)
    path.write_bytes(model.SerializeToString())
    return path


def nodes(*made: onnx.NodeProto, opset: int = 21) -> tuple[QdqModel, list[str]]:
    """A model of these nodes, of x [4] and codes [4]."""
    m = QdqModel(opset)
    m.inputs += [value("x", shape=[4]), value("codes", TensorProto.UINT8, [4])]
    m.nodes += made
    return m, ["y"]


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), outputs.split(), name=kind.lower(), **attributes)


BROKEN: dict[str, tuple[Callable[[], tuple[QdqModel, list[str]]], str]] = {
    "too few inputs": (lambda: nodes(node("DequantizeLinear", "codes", "y")), "dequantizelinear: DequantizeLinear has 2 to 3 inputs, this one 1"),
    "too many inputs": (lambda: nodes(node("Relu", "x x", "y")), "relu: Relu has 1 inputs, this one 2"),
    "an input that is left out": (lambda: nodes(helper.make_node("Add", ["", "x"], ["y"], name="add")), "add: Add needs the first 2 of its inputs"),
    "no outputs": (lambda: nodes(node("Relu", "x", "")), "relu: Relu has 1 outputs, this one 0"),
    "an attribute of another type": (lambda: nodes(node("Concat", "x x", "y", axis="0")), "concat: its axis is STRING"),
    "a tensor that nothing makes": (lambda: nodes(node("Add", "x z", "y")), "add: nothing in front of it makes z"),
    "a loop": (lambda: nodes(node("Add", "x z", "y"), node("Relu", "y", "z")), "add: nothing in front of it makes z"),
    "a tensor that is made twice": (lambda: nodes(node("Relu", "x", "y"), node("Erf", "x", "y")), "erf: y is made twice"),
    "an output that nothing makes": (lambda: nodes(node("Relu", "x", "z")), "nothing makes the output y"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_nothing_could_read_is_refused(name, tmp_path):
    make, said = BROKEN[name]
    with pytest.raises(TargetError) as caught:
        graphq.lint(written(*make(), tmp_path / "m.onnx"), "ort-cpu")
    assert str(caught.value) == f"{tmp_path / 'm.onnx'}: {said}"


def test_operands_of_contributed_quantizers(tmp_path):
    made = node("DequantizeLinear", "codes", "y", domain="com.microsoft")
    with pytest.raises(TargetError, match="has 2 to 3 inputs, this one 1"):
        graphq.lint(written(*nodes(made), tmp_path / "m.onnx"), "ort-cpu")


def _opset(number: int) -> Callable[[Any], None]:
    return lambda model: setattr(model.opset_import[0], "version", number)


def test_opsets(tmp_path):
    """Those that a consumer reads are more than those that its files are written in; none at all is said."""
    m, outputs = conv(axis=None)

    def problems(change: Callable[[Any], None], profile: str) -> list[str]:
        return [p.reason for p in graphq.lint(written(m, outputs, tmp_path / "m.onnx", change), profile).model]

    assert problems(_opset(11), "ort-cpu") == []
    assert problems(_opset(26), "ort-cpu") == []
    assert problems(_opset(27), "ort-cpu") == ["ort-cpu reads opsets 10 to 26, this is 27"]
    assert problems(_opset(28), "openvino") == []
    assert problems(_opset(9), "openvino") == ["openvino reads opsets 10 to 28, this is 9"]
    assert problems(lambda model: model.ClearField("opset_import"), "tensorrt") == [
        "tensorrt reads opsets 13 to 22, this is 0"
    ]
    for number in (-1, 2**40):
        with pytest.raises(TargetError, match="is no opset"):
            problems(_opset(number), "ort-cpu")


def test_a_file_that_ends_early(tmp_path):
    """No byte of a file can be missing without a line that says so."""
    m, outputs = conv(bias="int32")
    whole = written(m, outputs, tmp_path / "m.onnx").read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        (tmp_path / "m.onnx").write_bytes(whole[:length])
        with pytest.raises(TargetError, match="is no ONNX model"):
            graphq.lint(tmp_path / "m.onnx", "ort-cpu")


def _initializer(**fields: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        stored = next(i for i in model.graph.initializer if i.name == "w_scale")
        for name, one in fields.items():
            setattr(stored, name, one)

    return change


@pytest.mark.parametrize(
    "change", [_initializer(raw_data=b"123"), _initializer(data_type=0), _initializer(data_type=77)]
)
def test_tensors_that_cannot_be_read(change, tmp_path):
    m, outputs = conv(bias="int32")
    with pytest.raises(TargetError, match=r"m\.onnx: w_scale: its data cannot be read"):
        graphq.lint(written(m, outputs, tmp_path / "m.onnx", change), "ort-cpu")


def test_external_data_that_ends_early(tmp_path):
    m, outputs = conv(bias="int32")
    model = m.model(*outputs)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "m.data").write_bytes((tmp_path / "m.data").read_bytes()[:5])
    with pytest.raises(TargetError, match="w_scale: its data cannot be read"):
        graphq.lint(tmp_path / "m.onnx", "ort-cpu")


def test_grids_that_are_none(tmp_path):
    m = QdqModel()
    w = m.codes("int8", np.ones((16, 8)), "w")
    scales, zeros = m.constant(np.ones(16, np.float32)), m.codes("int8", np.zeros(16), "z")
    y = m.op("MatMul", m.qdq(m.input(4, 16)), m.op("DequantizeLinear", w, scales, zeros, axis=5))
    with pytest.raises(TargetError, match=r"dequantizelinear2: its axis is 5, and w has 2"):
        graphq.lint(written(m, [y], tmp_path / "m.onnx"), "ort-cpu")
    m = QdqModel()
    none = (m.constant(np.ones(0, np.float32)), m.codes("uint8", np.zeros(0), "z"))
    y = m.op("MatMul", m.dq((m.op("QuantizeLinear", m.input(4, 16), *none), *none)), m.weight(16, 8, axis=1))
    with pytest.raises(TargetError, match=r"dequantizelinear: its scale or zero point is empty"):
        graphq.lint(written(m, [y], tmp_path / "m.onnx"), "ort-cpu")


@pytest.mark.parametrize("scale", [0.0, -0.1, float("nan"), float("inf")])
def test_scales_that_are_no_positive_numbers(scale, tmp_path):
    m, outputs = conv(bias="float", scale=scale)
    (problem,) = graphq.lint(written(m, outputs, tmp_path / "m.onnx"), "ort-cpu").model
    assert (problem.tensor, problem.reason) == ("dequantizelinear_y and 1 more", "its scale is no positive number")


def test_names_that_are_no_text(tmp_path):
    m, outputs = conv()
    path = written(m, outputs, tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes().replace(b"conv_y", b"conv_\xff"))
    with pytest.raises(TargetError, match="a name in it is not UTF-8"):
        graphq.lint(path, "ort-cpu")


def test_functions_of_another_opset_and_of_themselves(tmp_path):
    def change(opset: int, inside: str) -> Callable[[Any], None]:
        def changed(model: Any) -> None:
            (made,) = [n for n in model.graph.node if n.op_type == "Conv"]
            inner = helper.make_node(inside, ["x", "w"], ["y"], name="inner", domain="" if inside == "Conv" else "ours")
            imports = [helper.make_opsetid("", opset), helper.make_opsetid("ours", 1)]
            model.functions.append(helper.make_function("ours", "Folded", ["x", "w"], ["y"], [inner], imports))
            model.opset_import.append(helper.make_opsetid("ours", 1))
            made.op_type, made.domain = "Folded", "ours"

        return changed

    m, outputs = conv()
    report = graphq.lint(written(m, outputs, tmp_path / "m.onnx", change(18, "Conv")), "ort-cpu", run=True)
    assert [(op.kind, op.runs, op.ran) for op in report.ops] == [("Conv", "integers", "integers")]
    with pytest.raises(TargetError, match="its functions cannot be written out: Cycle detected"):
        graphq.lint(written(m, outputs, tmp_path / "m.onnx", change(21, "Folded")), "ort-cpu")


def test_what_a_graph_inside_reads_is_read(tmp_path):
    """A branch reads the convolution in float, which a QuantizeLinear reads, too: ONNX Runtime computes it in float."""
    m, outputs = conv()
    inner = helper.make_graph([helper.make_node("Relu", ["conv_y"], ["deep"])], "inner", [], [value("deep")])
    twice = [helper.make_node("If", ["c"], ["r"], then_branch=inner, else_branch=inner, name="nested")]
    branch = helper.make_graph(twice, "branch", [], [value("r")])
    m.constant(np.array(True), "c")
    m.nodes.append(helper.make_node("If", ["c"], ["picked"], name="if", then_branch=branch, else_branch=branch))
    assert list(captured(m.nodes[-1])) == ["c", "conv_y", "c", "conv_y"]
    report = graphq.lint(written(m, [*outputs, "picked"], tmp_path / "m.onnx"), "ort-cpu", run=True)
    assert [(op.runs, op.ran, op.problem and op.problem.reason) for op in report.counted] == [
        ("float", "float", "if reads it, too, not quantized")
    ]


def test_initializers_that_are_inputs(tmp_path):
    """From IR version 4 on they are defaults, which ONNX Runtime does not fold; OpenVINO takes them for constants."""

    def change(version: int) -> Callable[[Any], None]:
        def changed(model: Any) -> None:
            model.ir_version = version
            model.graph.input.extend(value(i.name, i.data_type, list(i.dims)) for i in model.graph.initializer)

        return changed

    m, outputs = conv(bias="int32")
    new = written(m, outputs, tmp_path / "new.onnx", change(10))
    report = graphq.lint(new, "ort-cpu", run=True)
    assert [(op.runs, op.ran) for op in report.ops] == [("float", "float")]
    assert [(p.tensor, p.reason) for p in report.model] == [
        ("scale and 9 more", "it is an input, too, and so no constant to ort-cpu")
    ]
    report = graphq.lint(new, "openvino", run=True)
    assert report.ok
    assert [(op.runs, op.ran) for op in report.ops] == [("integers", "integers")]
    m, outputs = conv(axis=None)
    m.opset = 10
    old = written(m, outputs, tmp_path / "old.onnx", change(3))
    assert [(op.runs, op.ran) for op in graphq.lint(old, "ort-cpu", run=True).ops] == [("integers", "integers")]


def mutated(model: onnx.ModelProto, draw: random.Random) -> bytes:
    """The file with a few of its operands, attributes, shapes, types, nodes or bytes changed."""
    graph = model.graph
    for _ in range(draw.randint(1, 3)):
        one = draw.choice(graph.node)
        tensors = [name for n in graph.node for name in (*n.input, *n.output)]
        match draw.randrange(8):
            case 0 if one.input:
                one.input[draw.randrange(len(one.input))] = draw.choice(tensors)
            case 1 if one.input:
                one.input[draw.randrange(len(one.input))] = ""
            case 2:
                one.op_type = draw.choice(["MatMul", "Gemm", "Clip", "Split", "Transpose", "QuantizeLinear", "Concat"])
            case 3:
                name, given = draw.choice(["axis", "perm", "block_size", "mode"]), draw.choice([-1, 9, [1, 0], "x"])
                one.attribute.append(helper.make_attribute(name, given))
            case 4:
                stored = draw.choice(graph.initializer)
                stored.dims[:] = [draw.randint(0, 4) for _ in range(draw.randint(0, 4))]
            case 5:
                draw.choice(graph.initializer).data_type = draw.randrange(24)
            case 6 if one.output:
                one.output[0] = ""
            case _:
                del graph.value_info[:]
    data = bytearray(model.SerializeToString())
    for _ in range(draw.randint(1, 8) if draw.random() < 0.3 else 0):
        data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data)


def _survives(first: int, count: int, path: Path) -> int:
    reports = 0
    for seed in range(first, first + count):
        draw = random.Random(seed)
        m, outputs = CASES[draw.choice(list(CASES))].make()
        path.write_bytes(mutated(m.model(*outputs), draw))
        for profile in PROFILES:
            try:
                str(graphq.lint(path, profile))
                reports += 1
            except GraphqError:
                pass
    return reports


def test_any_file_gives_a_report_or_an_error(tmp_path):
    assert _survives(0, 150, tmp_path / "m.onnx") > 100


@pytest.mark.slow
def test_more_files_give_a_report_or_an_error(tmp_path):
    assert _survives(1000, 5000, tmp_path / "m.onnx") > 3000


def test_constants_by_their_attribute(tmp_path):
    """A Constant's single number has the type that its attribute's name says."""
    from graphq.linter.graph import Graph

    m = QdqModel()
    given: dict[str, Any] = {
        "value_float": 0.03, "value_floats": [1.0, 2.0], "value_int": 3, "value": numpy_helper.from_array(np.array(2, np.float16)),
    }  # fmt: skip
    for name, one in given.items():
        m.nodes.append(helper.make_node("Constant", [], [name], **{name: one}))
    graph = Graph(written(m, ["value"], tmp_path / "m.onnx"))
    types = [array.dtype.name for name in given if (array := graph.array(name)) is not None]
    assert types == ["float32", "float32", "int64", "float16"]
