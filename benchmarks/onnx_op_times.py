"""ONNX Runtime's time for one op in integers, relative to float: what ``lowering/profiles/ort_cpu.py`` says of rows.

One thread, uint8 activations and int8 weights by channel, both sides quantized; the model's own Quantize- and
DequantizeLinear at its ends are left out of the time by giving it codes and taking codes. The least CPU time of many
runs, float and integer in turn, so that a busy machine changes little.

    python benchmarks/onnx_op_times.py [--runs 200] [KIND ...]
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, final

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

_OPSET: Final = 21


@final
@dataclass(frozen=True)
class Row:
    """One op: its activations' shapes, its weight's shape with the axis of the scales, more inputs, attributes."""

    name: str
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    weight: tuple[int, ...] | None = None
    axis: int = 0
    bias: bool = False
    more: tuple[Any, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    float_output: bool = False


_IMAGE: Final = (1, 64, 56, 56)
_TOKENS: Final = (1, 196, 384)
_TWICE: Final = np.array([1, 1, 2, 2], np.float32)
ROWS: Final = (
    Row("Conv 64 3x3", "Conv", (_IMAGE,), (64, 64, 3, 3), attributes={"pads": [1] * 4}),
    Row("Conv 256 1x1", "Conv", ((1, 256, 14, 14),), (256, 256, 1, 1)),
    Row("Conv depthwise", "Conv", (_IMAGE,), (64, 1, 3, 3), attributes={"pads": [1] * 4, "group": 64}),
    Row("Linear 384x384", "MatMul", (_TOKENS,), (384, 384), 1, float_output=True),
    Row("Linear 384x1536", "MatMul", (_TOKENS,), (384, 1536), 1, float_output=True),
    Row("Linear 384x384 requantized", "MatMul", (_TOKENS,), (384, 384), 1),
    Row("Gemm 196x384x384", "Gemm", (_TOKENS[1:],), (384, 384), 0, bias=True, attributes={"transB": 1}),
    Row("MatMul QK", "MatMul", ((1, 6, 196, 64), (1, 6, 64, 196))),
    Row("MatMul PV", "MatMul", ((1, 6, 196, 196), (1, 6, 196, 64))),
    Row("Add", "Add", (_IMAGE, _IMAGE)),
    Row("Mul", "Mul", (_IMAGE, _IMAGE)),
    Row("Concat", "Concat", (_IMAGE, _IMAGE), attributes={"axis": 1}),
    Row("AveragePool", "AveragePool", (_IMAGE,), attributes={"kernel_shape": [2, 2], "strides": [2, 2]}),
    Row("GlobalAveragePool", "GlobalAveragePool", (_IMAGE,)),
    Row("MaxPool", "MaxPool", (_IMAGE,), attributes={"kernel_shape": [2, 2], "strides": [2, 2]}),
    Row("ReduceMax", "ReduceMax", (_IMAGE,), more=(np.array([2, 3]),)),
    Row("Resize nearest", "Resize", (_IMAGE,), more=(None, _TWICE), attributes={"mode": "nearest"}),
    Row("Sigmoid", "Sigmoid", (_IMAGE,)),
    Row("LeakyRelu", "LeakyRelu", (_IMAGE,)),
    Row("Softmax", "Softmax", ((1, 6, 196, 196),)),
    Row("Transpose", "Transpose", (_IMAGE,), attributes={"perm": [0, 2, 3, 1]}),
    Row("Reshape", "Reshape", (_IMAGE,), more=(np.array([1, 64, -1]),)),
    Row("Slice", "Slice", (_IMAGE,), more=(np.array([0]), np.array([32]), np.array([1]))),
    Row("Split", "Split", (_IMAGE,), attributes={"axis": 1, "num_outputs": 2}),
    Row("Expand", "Expand", ((1, 64, 1, 56),), more=(np.array([1, 64, 56, 56]),)),
    Row("Tile", "Tile", (_IMAGE,), more=(np.array([1, 1, 2, 1]),)),
    Row("Gather", "Gather", (_IMAGE,), more=(np.arange(0, 64, 2),), attributes={"axis": 1}),
)  # fmt: skip


def model(row: Row, quantized: bool) -> bytes:
    """The op alone: on floats, or with DequantizeLinear in front of its operands and QuantizeLinear behind."""
    random = np.random.default_rng(0)
    inputs: list[onnx.ValueInfoProto] = []
    initializers: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, values: Any) -> str:
        initializers.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    scale, zero = constant("scale", np.float32(0.03)), constant("zero", np.uint8(128))
    operands: list[str] = []
    for i, shape in enumerate(row.shapes):
        element = TensorProto.UINT8 if quantized else TensorProto.FLOAT
        inputs.append(helper.make_tensor_value_info(f"x{i}", element, shape))
        if quantized:
            nodes.append(helper.make_node("DequantizeLinear", [f"x{i}", scale, zero], [f"dx{i}"], name=f"dx{i}"))
        operands.append(f"dx{i}" if quantized else f"x{i}")
    if row.weight is not None:
        codes = random.integers(-127, 128, row.weight).astype(np.int8)
        channels = row.weight[row.axis]
        if quantized:
            parts = [constant("w", codes), constant("w_scale", np.full(channels, 0.01, np.float32))]
            parts.append(constant("w_zero", np.zeros(channels, np.int8)))
            nodes.append(helper.make_node("DequantizeLinear", parts, ["dw"], name="dw", axis=row.axis))
        operands.append("dw" if quantized else constant("w", codes.astype(np.float32) * np.float32(0.01)))
        if row.bias:
            operands.append(constant("b", np.ones(channels, np.float32)))
    operands += ["" if one is None else constant(f"c{i}", one) for i, one in enumerate(row.more)]
    made = [f"y{i}" for i in range(row.attributes.get("num_outputs", 1))]
    nodes.append(helper.make_node(row.kind, operands, made, name="op", **row.attributes))
    outputs = made
    if quantized and not row.float_output:
        outputs = [f"q{name}" for name in made]
        nodes += [
            helper.make_node("QuantizeLinear", [y, scale, zero], [q], name=q)
            for y, q in zip(made, outputs, strict=True)
        ]
    element = TensorProto.UINT8 if outputs != made else TensorProto.FLOAT
    values = [helper.make_tensor_value_info(name, element, None) for name in outputs]
    graph = helper.make_graph(nodes, row.name, inputs, values, initializers)
    imports = [helper.make_opsetid("", _OPSET)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


def session(data: bytes) -> Any:
    """One thread, which does not spin; the graph's transformations are those of a default session."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def bound(made: Any, row: Row, quantized: bool) -> Any:
    """Inputs and outputs in place, so that nothing is copied."""
    random, binding = np.random.default_rng(1), made.io_binding()
    for i, shape in enumerate(row.shapes):
        x = random.standard_normal(shape).astype(np.float32)
        codes = np.clip(np.round(x / 0.03) + 128, 0, 255).astype(np.uint8)
        binding.bind_ortvalue_input(f"x{i}", onnxruntime.OrtValue.ortvalue_from_numpy(codes if quantized else x))
    for output in made.get_outputs():
        binding.bind_output(output.name, "cpu")
    return binding


def measure(row: Row, runs: int) -> tuple[float, float]:
    """The least CPU time of a run in microseconds: float, integer."""
    pairs = [(made, bound(made, row, q)) for q in (False, True) for made in [session(model(row, q))]]
    least = [float("inf"), float("inf")]
    for _ in range(runs):
        for i, (made, binding) in enumerate(pairs):
            start = time.thread_time_ns()
            made.run_with_iobinding(binding)
            least[i] = min(least[i], (time.thread_time_ns() - start) / 1000)
    return least[0], least[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each op: both times, and integer's relative to float's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help="such as Conv; default: all")
    parser.add_argument("--runs", type=int, default=200)
    wanted = parser.parse_args(arguments)
    print(f"ONNX Runtime {onnxruntime.__version__}\n{'op':28}{'float us':>10}{'int us':>10}{'ratio':>8}")
    for row in ROWS:
        if not wanted.kinds or row.kind in wanted.kinds:
            x, q = measure(row, wanted.runs)
            print(f"{row.name:28}{x:10.1f}{q:10.1f}{q / x:8.2f}", flush=True)


if __name__ == "__main__":
    main()
