"""What lint says: a line for each op that will not run in integers, its exit, warnings, and files that it cannot read."""

import json
from typing import Any

import numpy as np
import onnx
import pytest
from expecttest import assert_expected_inline
from onnx import helper

import graphq
from graphq.errors import SpecError, TargetError
from tests.linter.cases import CASES, S8, S8Z, U16, conv, linear, norm, one, read_twice, two
from tests.qdq_models import QdqModel


@pytest.fixture
def said(tmp_path):
    """The report on a model, as text."""

    def report(made, profile="ort-cpu") -> Any:
        m, outputs = made
        path = m.save(tmp_path / "model.onnx", *outputs)
        return graphq.lint(path, profile)

    return report


def test_a_finding_names_the_op_the_tensor_the_rule_and_the_fix(said):
    report = said(conv(out=None))
    assert_expected_inline(
        str(report),
        """\
conv (Conv): conv_y: it is not quantized; quantize it to uint8, for all that reads it
0 of 1 ops run in integers on ort-cpu""",
    )
    (op,) = report.ops
    assert (op.name, op.kind, op.runs, op.counted, op.nodes) == ("conv", "Conv", "float", True, ("conv",))
    assert op.problem.tensor == "conv_y"
    assert not report.ok


def test_all_in_integers(said):
    report = said(conv(bias="int32"))
    assert_expected_inline(
        str(report),
        """\
warning: conv: products of uint8 and int8 saturate on x86 without VNNI (AVX2, and AVX-512 before 2019); quantize weights to 7 bits (profile ort-cpu+reduce_range) where such machines count
1 of 1 ops run in integers on ort-cpu""",
    )
    assert report.ok


ORT = [
    "conv float input", "conv u16", "conv 4-bit weight", "conv bias off its scale", "conv relu mid-range",
    "conv clip beyond its range", "conv read by an op, too", "conv read by two quantizers", "conv s8 read twice",
    "conv transpose", "matmul 2-d vector bias", "matmul u16", "gemm float bias", "gemm alpha",
    "weight int4 gemm", "weight int4 input 8", "weight int4 transposed", "matmul W4A8", "MaxPool other grid",
    "Gather float output", "Add constant float", "Add relu mid-range", "Resize linear", "Tanh",
]  # fmt: skip


def test_the_rules_of_onnx_runtime(said):
    lines = []
    for name in ORT:
        report = said(CASES[name].make())
        lines += [f"{name} | {line}" for line in (str(op) for op in report.findings)] or [
            f"{name} | {report.summary()}"
        ]
    assert_expected_inline(
        "\n".join(lines),
        """\
conv float input | conv (Conv): x: it is not quantized; quantize it to uint8
conv u16 | conv (Conv): dequantizelinear_y: it is uint16, not uint8; quantize it to uint8
conv 4-bit weight | conv (Conv): dequantizelinear2_y: the weight is int4/channel, not int8/channel, int8/tensor, uint8/channel, uint8/tensor, int8/asym/channel or int8/asym/tensor; quantize it to int8/channel
conv bias off its scale | conv (Conv): dequantizelinear3_y: the bias's scale is not scale x times scale w; requantize the bias
conv relu mid-range | conv (Conv): dequantizelinear3_y: Relu stays in front of it: its grid reaches from -3.84 to 3.81; give it zero point 0
conv clip beyond its range | conv (Conv): dequantizelinear3_y: Clip stays in front of it: its grid reaches from 0 to 7.65; give it zero point 0, and a range within the Clip's
conv read by an op, too | conv (Conv): conv_y: sigmoid reads it, too, not quantized; let all read what is dequantized again
conv read by an op, too | add (Add): sigmoid_y: it is not quantized; quantize it to uint8
conv read by two quantizers | conv (Conv): conv_y: two QuantizeLinear read it; let one grid do for all that reads it
conv read by two quantizers | add (Add): add_y: it is not quantized; quantize it to uint8, for all that reads it
conv s8 read twice | conv (Conv): dequantizelinear_y: it is int8, not uint8; quantize all activations to uint8
conv s8 read twice | conv2 (Conv): dequantizelinear_y: it is int8, not uint8; quantize all activations to uint8
conv transpose | 0 of 0 ops run in integers on ort-cpu; 1 other is left in float: 1 ConvTranspose
matmul 2-d vector bias | matmul (Gemm): b: the bias is in float and the output is not quantized; shape the bias [1, 1, N], so that MatMul and Add stay apart
matmul u16 | matmul (Linear): dequantizelinear_y: it is uint16, not uint8; quantize it to uint8
gemm float bias | gemm (Gemm): b: the bias is in float and the output is not quantized; write the bias in int32 with scale x times scale w, or quantize the output
gemm alpha | gemm (Gemm): gemm_y: its alpha is 0.5; make it 1.0
weight int4 gemm | gemm (Gemm): dequantizelinear_y: the weight is dequantized to float: it is Gemm's and transposed; write a MatMul by a weight [in, out]
weight int4 input 8 | matmul (Linear): dequantizelinear_y: the weight is dequantized to float: 8 codes share a scale; use groups of 16 or more, a power of two
weight int4 transposed | matmul (Linear): transpose_y: the weight is dequantized to float: it is transposed behind its blocks; store it [in, out], in blocks along axis 0
matmul W4A8 | matmul (Linear): dequantizelinear2_y: the weight is int4/channel, not int8/channel, int8/tensor, uint8/channel, uint8/tensor, int8/asym/channel or int8/asym/tensor; quantize it to int8/channel
MaxPool other grid | maxpool (MaxPool): maxpool_y: its grid is not that of dequantizelinear_y; give both the same scale and zero point
Gather float output | gather (Gather): gather_y: it is not quantized; quantize it to uint8, for all that reads it
Add constant float | add (Add): c: it is a constant in float; quantize it to uint8
Add relu mid-range | add (Add): dequantizelinear3_y: Relu stays in front of it: its grid reaches from -3.84 to 3.81; give it zero point 0
Resize linear | resize (Resize): resize_y: its mode is linear; make it nearest
Tanh | 0 of 0 ops run in integers on ort-cpu; 1 other is left in float: 1 Tanh""",
    )


OPENVINO = [
    "conv u8 weight", "conv weight with zero points", "conv u16", "conv transpose", "products", "products s8 by u8 from 0",
    "unlike grids joined in float", "Resize linear", "Add",
]  # fmt: skip


def test_the_rules_of_openvino(said):
    lines = []
    for name in OPENVINO:
        report = said(CASES[name].make(), "openvino")
        lines += [f"{name} | {line}" for line in (str(op) for op in report.findings)] or [
            f"{name} | {report.summary()}"
        ]
    assert_expected_inline(
        "\n".join(lines),
        """\
conv u8 weight | conv (Conv): dequantizelinear2_y: the weight is uint8/channel, not int8/channel or int8/tensor; quantize it to int8/channel
conv weight with zero points | conv (Conv): dequantizelinear2_y: the weight is int8/channel, with zero points, not int8/channel or int8/tensor; quantize it to int8/channel
conv u16 | conv (Conv): dequantizelinear_y: it is uint16, which openvino leaves in float, not uint8, int8 or int8/asym; quantize it to uint8
conv transpose | convtranspose (ConvTranspose): dequantizelinear_y: its zero point is not 0; quantize it to int8, or to uint8 with zero point 0
products | matmul (MatMul): dequantizelinear_y: its zero point is not 0; quantize it to int8, or to uint8 with zero point 0
products s8 by u8 from 0 | matmul (MatMul): dequantizelinear2_y: it is uint8, not int8 like dequantizelinear_y; quantize it to int8
unlike grids joined in float | conv3 (Conv): concat_y: it is not quantized; quantize it to uint8
Resize linear | resize (Resize): resize_y: its mode is linear; make it nearest
Add | 0 of 0 ops run in integers on openvino; 1 other is left in float: 1 Add""",
    )


def test_a_weight_along_its_inputs(said):
    report = said(linear(scales="input"))
    assert_expected_inline(
        str(report.findings[0]),
        """matmul (Linear): dequantizelinear2_y: the weight's scales are along axis 0; its scales belong to axis 1""",
    )


def test_neither_operand_is_quantized(said):
    m = QdqModel()
    x = m.input(4, 32)
    y = m.op("MatMul", m.qdq(x), m.weight(32, 16, axis=1))
    z = m.op("MatMul", y, m.constant(np.ones((16, 8), np.float32)))
    assert_expected_inline(
        str(said((m, [z]))),
        """\
matmul2 (Linear): matmul_y: neither it nor the weight is quantized; quantize it to uint8, and the weight
warning: matmul: products of uint8 and int8 saturate on x86 without VNNI (AVX2, and AVX-512 before 2019); quantize weights to 7 bits (profile ort-cpu+reduce_range) where such machines count
1 of 2 ops run in integers on ort-cpu""",
    )


def test_a_weight_computed_at_run_time(said):
    m = QdqModel()
    x, w = m.qdq(m.input(1, 8, 8, 8)), m.op("Mul", m.weight(16, 8, 3, 3, axis=0), m.input(16, 1, 1, 1))
    _, finding = said((m, [m.qdq(m.op("Conv", x, w))])).findings
    assert_expected_inline(
        str(finding), """conv (Conv): mul_y: the weight is computed at run time; fold it to a constant"""
    )


def test_scales_of_run_time(said):
    """A convolution wants them calibrated; ONNX Runtime's linears do not."""

    def made(kind):
        m = QdqModel()
        m.op("DynamicQuantizeLinear", m.input(1, 8, 8, 8), outputs=3)
        x = m.op("DequantizeLinear", *(f"dynamicquantizelinear_y{i}" for i in range(3)))
        w = m.weight(16, 8, 3, 3, axis=0) if kind == "Conv" else m.weight(8, 16, axis=1)
        return m, [m.op(kind, x, w)]

    assert_expected_inline(
        str(said(made("Conv")).findings[0]),
        """conv (Conv): dequantizelinear_y: its scale is computed at run time; give it a scale of calibration""",
    )
    assert said(made("MatMul")).ok


def test_a_whole_profile_lists_what_it_has_no_row_for(said):
    """An NPU computes all of a graph, or another device does; ONNX Runtime's CPU provider runs the rest in float."""
    made = one("Erf")
    assert said(made).ok
    assert_expected_inline(
        str(said(made, "qnn-htp")),
        """\
erf (Erf): erf_y: qnn-htp has no form of Erf in integers; replace it, or keep it outside of what this consumer runs
0 of 1 ops run in integers on qnn-htp""",
    )


def test_what_is_not_placed_is_no_finding_while_nothing_of_it_is_quantized(said):
    m = QdqModel()
    x = m.input(1, 8, 8, 8)
    y = m.op("Add", m.op("Reshape", x, m.constant(np.array([1, 8, 64]))), m.constant(np.ones((1, 8, 64), np.float32)))
    w = m.op("MatMul", m.qdq(y), m.weight(64, 16, axis=1))
    report = said((m, [w]))
    assert report.ok
    assert_expected_inline(
        str(report),
        """\
warning: matmul: products of uint8 and int8 saturate on x86 without VNNI (AVX2, and AVX-512 before 2019); quantize weights to 7 bits (profile ort-cpu+reduce_range) where such machines count
1 of 1 ops run in integers on ort-cpu; 2 others are left in float: 1 Reshape, 1 Add""",
    )


def test_half_quantized_sums(said):
    m = QdqModel()
    (op,) = said((m, [m.qdq(m.op("Add", m.qdq(m.input(4, 8)), m.input(4, 8)))])).findings
    assert_expected_inline(str(op), """add (Add): x2: it is not quantized; quantize it to uint8""")


@pytest.mark.parametrize(
    ("profile", "make"),
    [
        ("tensorrt", lambda: conv()), ("tensorrt", lambda: conv(x=S8, bias="int32")), ("tensorrt", lambda: two("Add", x=S8, y=S8Z, out=S8)),
        ("qnn-htp", lambda: conv(x=S8)), ("qnn-htp", lambda: linear(shape=("batch", 32))),
        ("vitis-ai", lambda: conv(x=S8, out=S8)), ("vitis-ai", lambda: conv(x=S8, out=S8, axis=None)), ("rknn", lambda: conv(x=U16, out=U16)),
    ],
)  # fmt: skip
def test_the_rules_of_consumers_that_are_not_here(said, profile, make):
    assert not said(make(), profile).ok


def test_their_rules_in_words(said):
    lines = [
        *map(str, said(conv(), "tensorrt").findings),
        *map(str, said(conv(x=S8, bias="int32"), "tensorrt").findings),
        *map(str, said(conv(bias="off"), "qnn-htp").findings),
        *map(str, said(norm("LayerNormalization"), "qnn-htp").findings),
        *map(str, said(conv(x=S8, out=S8, axis=None), "vitis-ai").findings),
        *map(str, said(_by_powers_of_two(0.3), "vitis-ai").findings),
        *map(str, said(conv(x=S8Z, out=S8Z, w_zero=3), "rknn").findings),
    ]
    assert_expected_inline(
        "\n".join(lines),
        """\
conv (Conv): dequantizelinear_y: it is uint8, not int8; quantize it to int8
conv (Conv): dequantizelinear3_y: the bias is int32; write the bias in float
conv (Conv): dequantizelinear3_y: the bias's scale is not scale x times scale w; requantize the bias
conv (Conv): dequantizelinear_y: its scale is no power of two; choose scales of powers of two
conv (Conv): dequantizelinear2_y: the weight's scale is no power of two; choose scales of powers of two
conv (Conv): dequantizelinear2_y: the weight is int8/channel, with zero points, not int8/channel or int8/tensor; quantize it to int8/channel""",
    )


def _by_powers_of_two(weight: float) -> Any:
    m = QdqModel(opset=17)
    scale = m.constant(np.float32(weight), "w_scale")
    codes, zero = m.codes("int8", np.ones((16, 8, 3, 3), int), "w"), m.codes("int8", 0, "w_zero")
    y = m.op("Conv", m.qdq(m.input(1, 8, 8, 8), *S8, scale=0.25), m.op("DequantizeLinear", codes, scale, zero))
    return m, [m.qdq(y, *S8, scale=0.125)]


def test_powers_of_two(said):
    assert said(_by_powers_of_two(0.5), "vitis-ai").ok
    assert not said(_by_powers_of_two(0.3), "vitis-ai").ok


def test_the_file_as_a_whole(said, tmp_path):
    """Opset, dimensions that are no integers, types of codes, and a file in which nothing is quantized."""
    lines = [*said(linear(shape=("batch", 32), opset=23), "vitis-ai").model]
    lines += said(linear(x=None, out=None, w="int2", opset=25), "openvino").model
    m = QdqModel()
    lines += said((m, [m.op("Relu", m.input(1))])).model
    assert_expected_inline(
        "\n".join(f"{p.tensor}: {p.reason}; {p.fix}" for p in lines),
        """\
the model: vitis-ai reads opsets 13 to 17, this is 23; write it in opset 13 to 17
x (batch): vitis-ai wants every dimension an integer; fix the shapes
w: openvino does not read int2 codes, and so not this file; store them in a wider type
the model: nothing in it is quantized; quantize it first""",
    )


def test_warnings(said):
    warned = [
        *said(CASES["conv without zero points"].make()).warnings,
        *said(conv(bias="int32")).warnings,
        *said(CASES["weight int4 input 16"].make()).warnings,
        *said(CASES["weight int4 input 16"].make(), "openvino").warnings,
        *said(conv(x=S8Z), "openvino").warnings,
        *said(two("Concat", x=S8, out=S8, axis=1), "openvino").warnings,
        *said(conv(bias="off"), "openvino").warnings,
        *said(one("Softmax", step=0.01, out=("uint8", 3)), "qnn-htp").warnings,
        *said(linear(bias="int32", shape=(2, 4, 32)), "qnn-htp").warnings,
    ]
    assert_expected_inline(
        "\n".join(map(str, warned)),
        """\
quantizelinear, dequantizelinear, dequantizelinear2 and 2 more: no zero point: two vendors' compilers refuse or misread QuantizeLinear and DequantizeLinear without one; write zero points of 0, in the codes' type
conv: products of uint8 and int8 saturate on x86 without VNNI (AVX2, and AVX-512 before 2019); quantize weights to 7 bits (profile ort-cpu+reduce_range) where such machines count
conv: products of uint8 and int8 saturate on x86 without VNNI (AVX2, and AVX-512 before 2019); quantize weights to 7 bits (profile ort-cpu+reduce_range) where such machines count
matmul: MatMulNBits in a default session rounds the activations to int8 by block (accuracy level 4); for float activations write com.microsoft.MatMulNBits with accuracy_level 0, or set session.qdq_matmulnbits_accuracy_level
matmul: FullyConnected with a stored weight rounds the activations to int8 by group at run time; for float activations compile with EXECUTION_MODE_HINT=ACCURACY or DYNAMIC_QUANTIZATION_GROUP_SIZE=0
conv: Conv of int8 with a zero point does not compile on CPUs with AMX (no suitable implementation); quantize activations to uint8
concat: Concat of int8 is wrong by 0.1 to 0.6 of the largest element behind convolutions (2026.4.1); quantize activations to uint8
conv: products of uint8 and int8 saturate on x86 without VNNI (AVX2, and AVX-512 before 2019); quantize weights to 7 bits (profile openvino+reduce_range) where such machines count
conv: dequantizelinear3_y: the bias's scale is not scale x times scale w, by which kernels in integers read it; requantize the bias
softmax: softmax_y: the output has scale 0.01 and zero point 3; qnn-htp computes with scale 0.00390625 and zero point 0; give it scale 0.00390625 and zero point 0
matmul: a MatMul and an Add are two ops to qnn-htp; write a Gemm with a bias""",
    )


def test_a_bias_that_is_lost(said):
    """A channel of zeros has any scale; with 1 the consumer's int32 bias has steps of scale x, and loses what is less."""

    def made(scale):
        m = QdqModel()
        x, w = m.qdq(m.input(1, 4, 8, 8), scale=0.03), m.weight(4, 4, 1, 1, axis=0)
        scales = next(i for i in m.initializers if i.name == "w_scale")
        scales.CopyFrom(onnx.numpy_helper.from_array(np.array([0.01, scale, 0.01, 0.01], np.float32), "w_scale"))
        y = m.op("Conv", x, w, m.constant(np.full(4, 0.011, np.float32), "b"))
        return m, [m.qdq(y, scale=0.001)]

    lost = [w for w in said(made(1.0)).warnings if "rounded" in w.reason]
    assert_expected_inline(
        "\n".join(map(str, lost)),
        """conv: b: the bias is rounded to int32 with scale x times scale w, which takes up to 0.011 from 1 of 4 channels (channel 1 first); choose the weight's scales of these channels by their bias""",
    )
    assert not [w for w in said(made(0.01)).warnings if "rounded" in w.reason]


def test_no_saturation_by_seven_bits(said):
    m, outputs = conv()
    codes = next(i for i in m.initializers if i.name == "w")
    codes.CopyFrom(
        helper.make_tensor("w", codes.data_type, codes.dims, np.clip(m.array("w"), -64, 64).reshape(-1).tolist())
    )
    assert said((m, outputs)).warnings == ()


def test_what_a_warning_lists_is_cut_short(said):
    m = QdqModel()
    x = m.input(4, 8)
    for _ in range(5):
        x = m.op("MatMul", x, m.weight(8, 8, axis=1))
    (warning,) = said((m, [x])).warnings
    assert warning.where == "matmul, matmul2, matmul3 and 2 more"


def test_json(said):
    found = json.loads(json.dumps(said(read_twice("op")).to_json()))
    assert found["profile"] == "ort-cpu"
    assert found["ok"] is False
    assert found["ops"][0] == {
        "name": "conv", "kind": "Conv", "counted": True, "runs": "float", "ran": None, "tensor": "conv_y",
        "reason": "sigmoid reads it, too, not quantized", "fix": "let all read what is dequantized again",
    }  # fmt: skip
    assert found["observed"] is None
    assert {"model", "model_problems", "warnings", "notes"} <= found.keys()


def test_ops_in_subgraphs_are_noted(said, tmp_path):
    m, outputs = conv()
    branch = helper.make_graph(
        [helper.make_node("Relu", [outputs[0]], ["r"])], "b", [], [helper.make_tensor_value_info("r", 1, None)]
    )
    name = m.constant(np.array(True), "c")
    m.nodes.append(helper.make_node("If", [name], ["picked"], name="if", then_branch=branch, else_branch=branch))
    assert said((m, ["picked"])).notes == ("if: the ops inside this If are not looked at",)


def test_a_directory_and_external_data(tmp_path):
    """An artifact's directory will do, and tensors beside the file are read when they are needed."""
    m, outputs = conv(bias="int32")
    model = m.model(*outputs)
    for tensor in model.graph.initializer:
        if not tensor.raw_data:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    report = graphq.lint(tmp_path, "ort-cpu")
    assert report.ok
    assert report.path == str(tmp_path / "model.onnx")
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(TargetError, match="its data cannot be read"):
        graphq.lint(tmp_path, "ort-cpu")


def test_local_functions_are_written_out(said, tmp_path):
    m, outputs = conv()
    model = m.model(*outputs)
    (node,) = [n for n in model.graph.node if n.op_type == "Conv"]
    inner = helper.make_node("Conv", ["x", "w"], ["y"], name="inner")
    model.functions.append(
        helper.make_function("ours", "Folded", ["x", "w"], ["y"], [inner], [helper.make_opsetid("", 21)])
    )
    model.opset_import.append(helper.make_opsetid("ours", 1))
    node.op_type, node.domain = "Folded", "ours"
    onnx.save(model, tmp_path / "f.onnx")
    assert [op.kind for op in graphq.lint(tmp_path / "f.onnx", "ort-cpu").ops] == ["Conv"]


def test_nodes_without_names(said, tmp_path):
    m, outputs = conv(out=None)
    for node in m.nodes:
        node.name = ""
    assert [op.name for op in said((m, outputs)).ops] == ["conv_y"]


def test_two_nodes_of_one_name(said):
    m, outputs = conv(out=None)
    (made,) = [node for node in m.nodes if node.op_type == "Conv"]
    other = helper.make_node("Conv", list(made.input), ["other"], name="conv")
    m.nodes.append(other)
    assert [op.name for op in said((m, [*outputs, "other"])).findings] == ["conv", "conv"]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(TargetError, match=r"absent\.onnx: no such file"):
        graphq.lint(tmp_path / "absent.onnx", "ort-cpu")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(TargetError, match=r"text\.onnx: is no ONNX model"):
        graphq.lint(tmp_path / "text.onnx", "ort-cpu")
    with pytest.raises(SpecError, match="no such profile"):
        graphq.lint(tmp_path / "text.onnx", "hailo")


def test_nothing_here_runs_the_other_consumers(tmp_path):
    m, outputs = conv()
    path = m.save(tmp_path / "model.onnx", *outputs)
    with pytest.raises(SpecError, match="run: tensorrt: nothing here runs it; ort-cpu and openvino can be run"):
        graphq.lint(path, "tensorrt", run=True)
