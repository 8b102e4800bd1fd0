"""More of the matrix, kind by kind: int8 alone and read twice, codes through an op and in front of it, outputs read twice."""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from onnx import TensorProto, helper

from tests.linter.cases import FLOAT, INT, S8, S8Z, U8, U16, WEIGHT, Case, Made, case, conv, ints, linear, one, products
from tests.qdq_models import QdqModel

_POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}
_TWICE = np.array([1, 1, 2, 2], np.float32)
# Of [1, 8, 8, 8]: what else it reads, attributes, and the last axis of what it gives.
MOVES: dict[str, tuple[list[Any], dict[str, Any], int]] = {
    "Reshape": ([ints(1, -1)], {}, 512),
    "Transpose": ([], {"perm": [0, 2, 3, 1]}, 8),
    "Slice": ([ints(0), ints(4), ints(1)], {}, 8),
    "Squeeze": ([ints(0)], {}, 8),
    "Unsqueeze": ([ints(0)], {}, 8),
    "Expand": ([ints(2, 8, 8, 8)], {}, 8),
    "Gather": ([ints(0, 1)], {"axis": 1}, 8),
    "Flatten": ([], {}, 512),
    "DepthToSpace": ([], {"blocksize": 2}, 16),
    "Resize": ([None, _TWICE], {"mode": "nearest"}, 16),
    "MaxPool": ([], _POOL, 4),
    "ReduceMax": ([ints(2)], {}, 8),
    "ReduceMin": ([ints(2)], {}, 8),
    "Tile": ([ints(2, 1, 1, 1)], {}, 8),
}
UNARY: dict[str, tuple[list[Any], dict[str, Any], int]] = {
    "AveragePool": ([], _POOL, 4),
    "GlobalAveragePool": ([], {}, 1),
    "ReduceMean": ([ints(2)], {}, 8),
    "Sigmoid": ([], {}, 8),
    "LeakyRelu": ([], {}, 8),
    "Softmax": ([], {}, 8),
}
BINARY: dict[str, dict[str, Any]] = {"Add": {}, "Mul": {}, "Concat": {"axis": 1}}


def _op(m: QdqModel, kind: str, x: str) -> str:
    if kind in BINARY:
        return m.op(kind, x, x, **BINARY[kind])
    more, attributes, _ = (MOVES | UNARY)[kind]
    return m.op(kind, x, *(m.constant(one) if one is not None else "" for one in more), **attributes)


def plain(kind: str, grid: Any, step: float = 0.03) -> Made:
    """The op between two quantizers; ``step``: the scale of the second."""
    m = QdqModel()
    return m, [m.qdq(_op(m, kind, m.qdq(m.input(1, 8, 8, 8), *grid)), *grid, scale=step)]


def read_twice(kind: str, grid: Any) -> Made:
    """As ``plain``, and the dequantized tensors on both sides have another reader."""
    m = QdqModel()
    x = m.qdq(m.input(1, 8, 8, 8), *grid)
    y = m.qdq(_op(m, kind, x), *grid)
    return m, [m.op("Erf", x), m.op("Sin", y), m.op("Cos", y)]


def output_read_twice(kind: str) -> Made:
    m = QdqModel()
    y = _op(m, kind, m.qdq(m.input(1, 8, 8, 8)))
    return m, [m.qdq(y), m.op("Erf", y)]


def in_front(kind: str) -> Made:
    """The op between a quantizer and a linear, which has none of its own: whether it reads codes."""
    m = QdqModel()
    last = 8 if kind in BINARY else (MOVES | UNARY)[kind][2]
    return m, [m.op("MatMul", _op(m, kind, m.qdq(m.input(1, 8, 8, 8))), m.weight(last, 16, axis=1))]


def behind(kind: str, grid: Any = U8) -> Made:
    """The op between float and a quantizer."""
    m = QdqModel()
    return m, [m.op("Erf", m.qdq(_op(m, kind, m.op("Erf", m.input(1, 8, 8, 8))), *grid))]


def behind_what_is_read_twice(kind: str) -> Made:
    """The op between float that something else reads, too, and a quantizer."""
    m = QdqModel()
    x = m.op("Erf", m.input(1, 8, 8, 8))
    return m, [m.op("Erf", m.qdq(_op(m, kind, x))), m.op("Sin", x)]


def layer_s8(kind: str, weight: Sequence[int], axis: int | None, grid: Any) -> Made:
    """A layer of int8, whose tensors are read twice."""
    m = QdqModel()
    x = m.qdq(m.input(1, weight[0] if kind == "MatMul" else weight[1], 8, weight[0]), *grid)
    y = m.qdq(m.op(kind, x, m.weight(*weight, axis=axis)), *grid)
    return m, [m.op("Erf", x), m.op("Sin", y), m.op("Cos", y)]


def choice(second: str) -> Made:
    """A Where of codes, whose second operand is a constant in float, codes, or whose output is read twice."""
    m = QdqModel()
    x = m.qdq(m.input(1, 8, 8, 8))
    other = m.constant(np.float32(0)) if second == "float" else m.qdq(m.input(1, 8, 8, 8))
    y = m.op("Where", m.constant(np.ones((1, 8, 8, 8), bool)), x, other)
    return m, [m.qdq(y), *([m.op("Erf", y)] if second == "twice" else [])]


def products_read_twice(grid: Any) -> Made:
    m = QdqModel()
    x, y = m.qdq(m.input(2, 8, 8), *grid), m.qdq(m.input(2, 8, 8), *grid)
    r = m.qdq(m.op("MatMul", x, y), *grid)
    return m, [m.op("Erf", x), m.op("Erf", y), m.op("Sin", r), m.op("Cos", r)]


def weight_of_run_time(kind: str, float_weight: bool = False) -> Made:
    """A layer whose weight is an input, in codes or quantized at run time."""
    m = QdqModel()
    shapes: Any = {"Conv": ((1, 8, 8, 8), (16, 8, 3, 3)), "MatMul": ((4, 32), (32, 8)), "Gemm": ((4, 32), (32, 8))}[
        kind
    ]
    x = m.qdq(m.input(*shapes[0]))
    if float_weight:
        w = m.qdq(m.input(*shapes[1]), "int8", 0)
    else:
        w = m.dq((m.input(*shapes[1], element=TensorProto.INT8), *m.grid("int8", 0, 0.01)))
    return m, [m.qdq(m.op(kind, x, w))]


def clip_of_run_time() -> Made:
    m = QdqModel()
    y = m.op("Conv", m.qdq(m.input(1, 8, 8, 8)), m.weight(16, 8, 3, 3, axis=0))
    return m, [m.qdq(m.op("Clip", y, m.input()), "uint8", 0)]


def joined_in_16_bits(second: tuple[Any, ...], out: Any) -> Made:
    """Two convolutions on grids of 16 bits, or of these and others, joined in front of a convolution in 8."""
    m = QdqModel()
    x = m.qdq(m.input(1, 8, 8, 8))
    parts = [
        m.qdq(m.op("Conv", x, m.weight(16, 8, 1, 1, axis=0)), *grid, scale=1e-4 if grid == U16 else 0.03)
        for grid in cast(tuple[tuple[Any, ...], ...], (U16, second))
    ]
    y = m.op("Concat", *parts, axis=1)
    y = m.qdq(y, *out, scale=1e-4) if out else y
    return m, [m.qdq(m.op("Conv", m.qdq(y), m.weight(8, 32, 1, 1, axis=0)))]


def moved_in_16_bits(kind: str, grid: Any) -> Made:
    m = QdqModel()
    y = m.qdq(_op(m, kind, m.qdq(m.input(1, 8, 8, 8), *grid, scale=1e-4)), *grid, scale=1e-4)
    return m, [m.op("Erf", y)]


def joined_with_float() -> Made:
    m = QdqModel()
    x = m.input(1, 8, 8, 8)
    return m, [m.qdq(m.op("Concat", m.qdq(x), m.op("Erf", x), axis=1))]


def pool_with_places() -> Made:
    m = QdqModel()
    m.op("MaxPool", m.qdq(m.input(1, 8, 8, 8)), outputs=2, kernel_shape=[2, 2], strides=[2, 2])
    return m, [m.qdq("maxpool_y0")]


def split_of_which_one_is_read() -> Made:
    m = QdqModel()
    m.op("Split", m.qdq(m.input(1, 8, 8, 8)), outputs=2, axis=1, num_outputs=2)
    m.nodes[-1].output[0] = ""
    return m, [m.qdq("split_y1")]


def linear_of_one_column(element: str) -> Made:
    m = QdqModel()
    return m, [m.op("MatMul", m.input(4, 32), m.weight(32, 1, element=element, axis=1))]


def half_precision() -> Made:
    m = QdqModel()
    step, zero = m.constant(np.float16(0.03)), m.codes("uint8", 128, "zero")
    x = m.op("QuantizeLinear", m.input(4, 32, element=TensorProto.FLOAT16), step, zero)
    w = m.codes("int8", m.random.integers(-127, 128, (32, 16)), "w")
    scales, zeros = m.constant(np.full(16, 0.01, np.float16)), m.codes("int8", np.zeros(16), "zeros")
    y = m.op("MatMul", m.op("DequantizeLinear", x, step, zero), m.op("DequantizeLinear", w, scales, zeros, axis=1))
    return m, [m.op("Cast", y, to=TensorProto.FLOAT)]


def scale_of_a_constant_node() -> Made:
    m = QdqModel()
    m.nodes.append(helper.make_node("Constant", [], ["step"], value_float=0.03))
    zero = m.codes("uint8", 128, "zero")
    x = m.op("DequantizeLinear", m.op("QuantizeLinear", m.input(4, 32), "step", zero), "step", zero)
    return m, [m.op("MatMul", x, m.weight(32, 16, axis=1))]


PASSED = ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "MaxPool")  # by ONNX Runtime, without a quantizer
MOVED = ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Expand", "Gather", "Flatten", "Tile")  # of any type


def _moves(kind: str) -> dict[str, Case]:
    node, passed = kind.lower(), INT if kind in PASSED else FLOAT
    ours = FLOAT if kind == "Tile" else INT
    found = {
        f"{kind} s8 alone": case(plain, node, INT, ours, kind, S8Z),
        f"{kind} s8 alone other grid": case(plain, node, FLOAT, ours, kind, S8Z, 0.05),
        f"{kind} s8 read twice": case(read_twice, node, INT, ours, kind, S8Z),
        f"{kind} symmetric s8 read twice": case(read_twice, node, INT, ours, kind, S8),
        f"{kind} u8 read twice": case(read_twice, node, INT, ours, kind, U8),
        f"{kind} output read twice": case(output_read_twice, node, FLOAT, ours, kind),
        f"{kind} in front of a linear": case(
            in_front, "matmul", INT if kind in PASSED else WEIGHT, WEIGHT if kind == "Tile" else INT, kind
        ),
    }
    if kind != "Transpose":  # OpenVINO moves some quantizers in front of a Transpose, and not others
        found[f"{kind} behind float"] = case(behind, node, passed, FLOAT, kind)
    return found


def _computes(kind: str, onnx_runtime: str, openvino: str) -> dict[str, Case]:
    node = kind.lower()
    return {
        f"{kind} s8 alone other grid": case(plain, node, onnx_runtime, openvino, kind, S8Z, 0.05),
        f"{kind} s8 read twice": case(read_twice, node, onnx_runtime, openvino, kind, S8Z),
        f"{kind} symmetric s8 read twice": case(read_twice, node, onnx_runtime, openvino, kind, S8),
        f"{kind} output read twice": case(output_read_twice, node, FLOAT, openvino, kind),
        f"{kind} behind float": case(behind, node, FLOAT, FLOAT, kind),
    }


MORE: dict[str, Case] = {
    **{name: one for kind in MOVES for name, one in _moves(kind).items()},
    **_computes("AveragePool", INT, INT),
    **_computes("GlobalAveragePool", INT, INT),
    **_computes("ReduceMean", FLOAT, INT),
    **_computes("Sigmoid", INT, FLOAT),
    **_computes("LeakyRelu", INT, FLOAT),
    **_computes("Softmax", INT, FLOAT),
    **{f"{kind} output read twice": case(output_read_twice, kind.lower(), FLOAT, INT if kind == "Concat" else FLOAT, kind) for kind in BINARY},
    "Where": case(choice, "where", INT, FLOAT, "codes"),
    "Where constant float": case(choice, "where", INT, FLOAT, "float"),
    "Where output read twice": case(choice, "where", FLOAT, FLOAT, "twice"),
    "products s8 read twice": case(products_read_twice, "matmul", FLOAT, INT, S8),
    "products s8 float output": case(products, "matmul", INT, INT, S8, S8, None),
    "products by s8 with zero point": case(products, "matmul", INT, FLOAT, U8, S8Z),
    "matmul weight with zero points": case(linear, "matmul", INT, WEIGHT, w_zero=3),
    "matmul weight with zero point per tensor": case(linear, "matmul", INT, WEIGHT, w_zero=3, scales="tensor"),
    "matmul u8 weight per tensor": case(linear, "matmul", INT, WEIGHT, w="uint8", w_zero=128, scales="tensor"),
    "gemm weight per tensor": case(linear, "gemm", INT, INT, "Gemm", scales="tensor"),
    "gemm weight with zero points": case(linear, "gemm", INT, WEIGHT, "Gemm", w_zero=3),
    "gemm s8 output without bias": case(linear, "gemm", INT, INT, "Gemm", x=S8, out=S8),
    "weight int4 input 24": case(linear, "matmul", FLOAT, None, x=None, out=None, w="int4", scales="input", block=24),
    "Split s8": case(one, "split", INT, INT, "Split", x=S8Z, out=S8Z, outputs=2, axis=1, num_outputs=2),
    "conv transpose per tensor": case(conv, "convtranspose", FLOAT, INT, x=("uint8", 0), kind="ConvTranspose", kernel=(8, 16, 2, 2), axis=None, strides=[2, 2]),
    **{
        f"matmul {word} bias {bias}": case(
            linear, "matmul", ort, FLOAT if bias == "[1, 1, N]" else INT, x=x, out=None, bias=shape
        )
        for word, x in (("u8 from 0", ("uint8", 0)), ("s8", S8))
        for bias, shape, ort in (("[N]", (16,), FLOAT), ("[1, N]", (1, 16), FLOAT), ("[1, 1, N]", (1, 1, 16), INT))
    },
    **{
        f"{kind} behind float that is read twice": case(behind_what_is_read_twice, kind.lower(), FLOAT, FLOAT, kind)
        for kind in PASSED
        if kind != "Transpose"
    },
    "Concat behind float that is read twice": case(behind_what_is_read_twice, "concat", FLOAT, INT, "Concat"),
    "Concat behind float": case(behind, "concat", FLOAT, INT, "Concat"),
    "Concat beside float": case(joined_with_float, "concat", FLOAT, INT),
    "Concat u16 in front of conv": case(joined_in_16_bits, "concat", FLOAT, INT, U16, U16),
    "Concat u16 to u8": case(joined_in_16_bits, "concat", FLOAT, INT, U16, None),
    "Concat u16 and u8": case(joined_in_16_bits, "concat", FLOAT, INT, U8, None),
    "conv behind Concat u16": case(joined_in_16_bits, "conv3", INT, INT, U16, U16),
    **{
        f"{kind} {name}": case(moved_in_16_bits, kind.lower(), INT if kind in MOVED else FLOAT, FLOAT, kind, grid)
        for kind in MOVES
        for name, grid in (("u16", U16), ("s16", ("int16", 5)))
    },
    **{f"{kind} u16 behind float": case(behind, kind.lower(), INT if kind in PASSED and kind != "MaxPool" else FLOAT, FLOAT, kind, U16) for kind in MOVES},
    "conv weight of run time": case(weight_of_run_time, "conv", INT, FLOAT, "Conv"),
    "conv weight quantized at run time": case(weight_of_run_time, "conv", INT, None, "Conv", True),
    "matmul weight of run time": case(weight_of_run_time, "matmul", INT, FLOAT, "MatMul"),
    "gemm weight of run time": case(weight_of_run_time, "gemm", INT, FLOAT, "Gemm"),
    "conv clip of run time": case(clip_of_run_time, "conv", FLOAT, INT),
    "MaxPool with places": case(pool_with_places, "maxpool", FLOAT, INT),
    "Split of which one is read": case(split_of_which_one_is_read, "split", INT, INT),
    "matmul in half precision": case(half_precision, "matmul", FLOAT, INT),
    "matmul by a scale of a Constant": case(scale_of_a_constant_node, "matmul", INT, INT),
    **{
        f"weight {w} of one column": case(linear_of_one_column, "matmul", WEIGHT, FLOAT, w) for w in ("int8", "uint8", "int4")
    },
    "AveragePool in front of a linear": case(in_front, "matmul", WEIGHT, INT, "AveragePool"),
    **{
        f"{kind} {word}s8 {where}": case(
            make, kind.lower(), INT if make is read_twice else FLOAT, INT if kind == "Concat" else FLOAT, kind, grid
        )
        for kind in BINARY
        for word, grid in (("", S8Z), ("symmetric ", S8))
        for where, make in (("read by both operands", plain), ("read twice", read_twice))
    },
    **{
        f"{kind} {word}s8 read twice, weight per {'tensor' if axis is None else 'channel'}": case(
            layer_s8, kind.lower(), FLOAT, INT, kind, weight, axis, grid
        )
        for kind, weight, channel in (("Conv", (16, 8, 3, 3), 0), ("MatMul", (8, 16), 1))
        for axis in (channel, None)
        for word, grid in (("", S8Z), ("symmetric ", S8))
    },
}  # fmt: skip
