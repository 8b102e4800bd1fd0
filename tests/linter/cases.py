"""One tiny QDQ model for each row of the matrix of what consumers run in integers: its main op, and how that runs.

``CASES``: name -> what makes it, the main op's node, how ONNX Runtime runs it, how OpenVINO does. None: it refuses the
file. What is said here was seen with ONNX Runtime 1.31.1 and OpenVINO 2026.4.1, and is what tests hold both the
profiles and the consumers to.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import numpy as np

from tests.qdq_models import QdqModel

Ran = Literal["integers", "weights", "float"]
Made = tuple[QdqModel, Sequence[str]]
INT, WEIGHT, FLOAT = "integers", "weights", "float"
U8, U16, S8, S8Z = ("uint8", 128), ("uint16", 32768), ("int8", 0), ("int8", -5)


@final
@dataclass(frozen=True)
class Case:
    make: Callable[[], Made]
    node: str
    onnx_runtime: Ran | None
    openvino: Ran | None


def conv(
    x: Any = U8,
    w="int8",
    w_zero=0,
    out: Any = U8,
    bias: Any = None,
    after=None,
    between=False,
    axis: int | None = 0,
    scale: Any = 0.03,
    shape=(1, 8, 8, 8),
    kernel=(16, 8, 3, 3),
    kind="Conv",
    **attributes,
) -> Made:
    m = QdqModel()
    inputs = [m.qdq(m.input(*shape), *x, scale=scale), m.weight(*kernel, element=w, axis=axis, zero_point=w_zero)]
    if bias == "float":
        inputs.append(m.constant(np.ones(kernel[0], np.float32), "b"))
    if bias in ("int32", "off"):
        inputs.append(m.bias32(kernel[0], (0.03 if bias == "int32" else 0.05) * m.array("w_scale")))
    y = m.op(kind, *inputs, **attributes)
    if between:
        y = m.qdq(y)
    if after == "Relu":
        y = m.op("Relu", y)
    if after == "Clip":
        y = m.op("Clip", y, m.constant(np.float32(0)), m.constant(np.float32(6)))
    return m, [m.qdq(y, *out, scale=scale) if out else y]


def linear(
    form: Literal["MatMul", "Gemm", "GemmKN", "Transpose"] = "MatMul",
    x: Any = U8,
    w="int8",
    w_zero: int | None = 0,
    out: Any = U8,
    bias: Any = None,
    after=None,
    shape: Sequence[int | str] = (4, 32),
    scales: Literal["channel", "tensor", "input"] = "channel",
    block=None,
    opset=21,
    **attributes,
) -> Made:
    """``bias``: int32, or the shape of one in float. ``scales``: of the weight; ``input``: along its input axis."""
    m = QdqModel(opset)
    name = m.input(*shape)
    name = m.qdq(name, *x) if x else name
    rows = form in ("Gemm", "Transpose")
    axis = None if scales == "tensor" else int(rows == (scales == "input"))
    weight = m.weight(*((16, 32) if rows else (32, 16)), element=w, axis=axis, block=block, zero_point=w_zero)
    if form == "Transpose":
        weight = m.op("Transpose", weight, perm=[1, 0])
    b: list[str] = []
    if bias == "int32":
        b = [m.bias32(16, 0.03 * m.array("w_scale"))]
    elif bias is not None:
        b = [m.constant(np.ones(bias, np.float32), "b")]
    if form in ("Gemm", "GemmKN"):
        y = m.op("Gemm", name, weight, *b, **({"transB": 1} if rows else {}), **attributes)
    else:
        y = m.op("MatMul", name, weight)
        y = m.op("Add", y, *b) if b else y
    y = m.op(after, y) if after else y
    return m, [m.qdq(y, *out) if out else y]


def one(kind, x=U8, out=U8, step=0.03, more=(), shape=(1, 8, 8, 8), outputs=1, **attributes) -> Made:
    """An op of one activation. ``out=None``: its output stays float; ``step``: the output's scale, the input's is 0.03."""
    m = QdqModel()
    y = m.op(
        kind,
        m.qdq(m.input(*shape), *x),
        *(m.constant(c) if c is not None else "" for c in more),
        outputs=outputs,
        **attributes,
    )
    made = [y] if outputs == 1 else [y, y.removesuffix("0") + "1"]
    return m, [m.qdq(name, *out, scale=step) if out else name for name in made]


def two(kind, x: Any = U8, y: Any = None, step=0.03, out: Any = U8, after=None, constant=None, **attributes) -> Made:
    """An op of two activations; ``step``: the second's scale. ``constant``: the second is one, in codes or float."""
    m = QdqModel()
    first = m.qdq(m.input(1, 8, 8, 8), *x)
    if constant is None:
        second = m.qdq(m.input(1, 8, 8, 8), *(y or x), scale=step)
    elif constant == "float":
        second = m.constant(np.ones((1, 8, 1, 1), np.float32))
    else:
        second = m.weight(1, 8, 1, 1, element=x[0], zero_point=x[1])
    r = m.op(kind, first, second, **attributes)
    r = m.op(after, r) if after else r
    return m, [m.qdq(r, *out) if out else r]


def norm(kind) -> Made:
    m = QdqModel()
    x = m.qdq(m.input(1, 8, 8, 8))
    return m, [m.qdq(m.op(kind, x, m.weight(8, element="uint8"), m.constant(np.ones(8, np.float32))))]


def read_twice(second: str) -> Made:
    """A convolution whose output is quantized and read otherwise, too."""
    m = QdqModel()
    c = m.op("Conv", m.qdq(m.input(1, 8, 8, 8)), m.weight(16, 8, 3, 3, axis=0))
    return m, [m.op("Add", m.qdq(c), m.op("Sigmoid", c) if second == "op" else m.qdq(c, scale=0.05))]


def weight_through_quantize() -> Made:
    m = QdqModel()
    x, grid = m.qdq(m.input(1, 8, 8, 8)), m.grid("int8", 0, 0.01)
    w = m.op("QuantizeLinear", m.constant(m.random.standard_normal((16, 8, 3, 3)).astype(np.float32) / 10), *grid)
    return m, [m.qdq(m.op("Conv", x, m.op("DequantizeLinear", w, *grid)))]


def without_zero_points() -> Made:
    m = QdqModel()
    step = m.constant(np.float32(0.03))
    x = m.op("DequantizeLinear", m.op("QuantizeLinear", m.input(1, 8, 8, 8), step), step)
    y = m.op("Conv", x, m.weight(16, 8, 3, 3, axis=0, zero_point=None))
    return m, [m.op("DequantizeLinear", m.op("QuantizeLinear", y, step), step)]


def two_convolutions(x: Any) -> Made:
    """Both read one tensor, so that its codes are read twice."""
    m = QdqModel()
    name = m.qdq(m.input(1, 8, 8, 8), *x)
    return m, [m.qdq(m.op("Conv", name, m.weight(16, 8, 3, 3, axis=0)), *x) for _ in range(2)]


def moved(kind, behind: bool, more=(), **attributes) -> Made:
    """A convolution behind what moves codes and has no quantizer of its own, or in front of it."""
    m = QdqModel()
    x, w = m.qdq(m.input(1, 8, 8, 8)), m.weight(16, 8, 1, 1, axis=0)
    extra = [m.constant(c) for c in more]
    if behind:
        return m, [m.qdq(m.op("Conv", m.op(kind, x, *extra, **attributes), w))]
    return m, [m.qdq(m.op(kind, m.op("Conv", x, w), *extra, **attributes))]


def pooled_relu(read_twice: bool) -> Made:
    """Conv, Relu, MaxPool, quantized; ``read_twice``: what the pool gives is read in float, too."""
    m = QdqModel()
    y = m.op("Relu", m.op("Conv", m.qdq(m.input(1, 8, 8, 8)), m.weight(16, 8, 1, 1, axis=0)))
    y = m.op("MaxPool", y, kernel_shape=[2, 2])
    return m, [m.qdq(y, "uint8", 0), *([m.op("Sigmoid", y)] if read_twice else [])]


def concat_of_unlike(out: bool) -> Made:
    """Two convolutions on unlike grids, joined, with a third behind; ``out``: what is joined is quantized."""
    m = QdqModel()
    x = m.qdq(m.input(1, 8, 8, 8))
    parts = [m.qdq(m.op("Conv", x, m.weight(16, 8, 3, 3, axis=0), pads=[1] * 4), scale=s) for s in (0.03, 0.05)]
    joined = m.op("Concat", *parts, axis=1)
    return m, [m.qdq(m.op("Conv", m.qdq(joined) if out else joined, m.weight(8, 32, 1, 1, axis=0)))]


def products(x: Any, y: Any, out: Any = U8) -> Made:
    m = QdqModel()
    r = m.op("MatMul", m.qdq(m.input(2, 4, 8, 16), *x), m.qdq(m.input(2, 4, 16, 8), *y))
    return m, [m.qdq(r, *out) if out else r]


def dynamic(form: Literal["matmul_integer", "qdq"]) -> Made:
    m = QdqModel()
    m.op("DynamicQuantizeLinear", m.input(4, 32), outputs=3)
    codes, scale, zero = (f"dynamicquantizelinear_y{i}" for i in range(3))
    if form == "qdq":
        return m, [m.op("MatMul", m.op("DequantizeLinear", codes, scale, zero), m.weight(32, 16, axis=1))]
    w = m.codes("int8", m.random.integers(-127, 128, (32, 16)), "w")
    y = m.op("Cast", m.op("MatMulInteger", codes, w, zero, m.codes("int8", 0, "w_zero")), to=1)
    return m, [m.op("Mul", y, m.op("Mul", scale, m.constant(np.float32(0.01))))]


def case(maker: Callable[..., Made], node: str, onnx_runtime: Any, openvino: Any, *args: Any, **kwargs: Any) -> Case:
    return Case(lambda: maker(*args, **kwargs), node, onnx_runtime, openvino)


def ints(*values: int) -> Any:
    return np.array(values, np.int64)


CONVOLUTIONS = {
    "conv": case(conv, "conv", INT, INT, bias="int32"),
    "conv float bias": case(conv, "conv", INT, INT, bias="float"),
    "conv float bias float output": case(conv, "conv", FLOAT, INT, bias="float", out=None),
    "conv no bias": case(conv, "conv", INT, INT),
    "conv bias off its scale": case(conv, "conv", FLOAT, INT, bias="off"),
    "conv float output": case(conv, "conv", FLOAT, INT, out=None),
    "conv s8": case(conv, "conv", INT, INT, x=S8, out=S8),
    "conv s8 with zero point": case(conv, "conv", INT, INT, x=S8Z, out=("int8", 3)),
    "conv s8 read twice": case(two_convolutions, "conv", FLOAT, INT, S8),
    "conv u8 read twice": case(two_convolutions, "conv", INT, INT, U8),
    "conv u8 to s8": case(conv, "conv", INT, INT, out=S8),
    "conv u8 weight": case(conv, "conv", INT, FLOAT, w="uint8", w_zero=128),
    "conv s8 by u8 weight": case(conv, "conv", INT, FLOAT, x=S8, w="uint8", w_zero=128, out=S8),
    "conv weight with zero points": case(conv, "conv", INT, FLOAT, w_zero=3),
    "conv weight per tensor": case(conv, "conv", INT, INT, axis=None),
    "conv weight through quantize": case(weight_through_quantize, "conv", INT, INT),
    "conv 4-bit weight": case(conv, "conv", FLOAT, FLOAT, w="int4"),
    "conv relu from the lowest code": case(conv, "conv", INT, INT, after="Relu", out=("uint8", 0)),
    "conv relu s8 from the lowest code": case(conv, "conv", INT, INT, x=S8, after="Relu", out=("int8", -128)),
    "conv relu mid-range": case(conv, "conv", FLOAT, INT, after="Relu"),
    "conv relu s8 mid-range": case(conv, "conv", FLOAT, INT, x=S8, after="Relu", out=S8),
    "conv quantized in front of relu": case(conv, "conv", INT, INT, between=True, after="Relu"),
    "conv clip within its range": case(conv, "conv", INT, INT, after="Clip", out=("uint8", 0), scale=6 / 255),
    "conv clip beyond its range": case(conv, "conv", FLOAT, INT, after="Clip", out=("uint8", 0)),
    "conv scale of shape 1": case(conv, "conv", INT, INT, scale=[0.03]),
    "conv u16": case(conv, "conv", FLOAT, FLOAT, x=U16, out=U16),
    "conv float input": case(lambda: (m := QdqModel(), [m.qdq(m.op("Conv", m.input(1, 8, 8, 8), m.weight(16, 8, 3, 3, axis=0)))]), "conv", FLOAT, FLOAT),
    "conv depthwise": case(conv, "conv", INT, INT, kernel=(8, 1, 3, 3), group=8),
    "conv 1d": case(conv, "conv", INT, INT, shape=(1, 8, 16), kernel=(16, 8, 3)),
    "conv 3d": case(conv, "conv", INT, INT, shape=(1, 8, 4, 8, 8), kernel=(16, 8, 3, 3, 3)),
    "conv without zero points": case(without_zero_points, "conv", INT, INT),
    "conv read by an op, too": case(read_twice, "conv", FLOAT, INT, "op"),
    "conv read by two quantizers": case(read_twice, "conv", FLOAT, INT, "quantizer"),
    "conv transpose": case(conv, "convtranspose", FLOAT, FLOAT, kind="ConvTranspose", kernel=(8, 16, 2, 2), axis=1, strides=[2, 2]),
    "conv transpose zero point 0": case(conv, "convtranspose", FLOAT, INT, x=("uint8", 0), kind="ConvTranspose", kernel=(8, 16, 2, 2), axis=1, strides=[2, 2]),
    "conv transpose s8": case(conv, "convtranspose", FLOAT, INT, x=S8, kind="ConvTranspose", kernel=(8, 16, 2, 2), axis=1, strides=[2, 2]),
    "transpose in front of conv": case(moved, "conv", INT, INT, "Transpose", True, perm=[0, 1, 3, 2]),
    "transpose behind conv": case(moved, "conv", INT, INT, "Transpose", False, perm=[0, 1, 3, 2]),
    "max pool in front of conv": case(moved, "conv", INT, INT, "MaxPool", True, kernel_shape=[2, 2]),
    "max pool behind conv": case(moved, "conv", INT, INT, "MaxPool", False, kernel_shape=[2, 2]),
    "conv relu max pool": case(pooled_relu, "conv", INT, INT, False),
    "conv relu max pool read twice": case(pooled_relu, "conv", FLOAT, INT, True),
    "tile in front of conv": case(moved, "conv", FLOAT, FLOAT, "Tile", True, [ints(1, 1, 2, 2)]),
    "unlike grids joined": case(concat_of_unlike, "conv3", INT, INT, True),
    "unlike grids joined in float": case(concat_of_unlike, "conv3", FLOAT, FLOAT, False),
}  # fmt: skip
B = (16,)
LINEARS = {
    "matmul": case(linear, "matmul", INT, INT),
    "matmul float output": case(linear, "matmul", INT, INT, out=None),
    "matmul 2-d vector bias": case(linear, "matmul", FLOAT, INT, out=None, bias=B),
    "matmul 2-d bias [1, N]": case(linear, "matmul", FLOAT, INT, out=None, bias=(1, 16)),
    "matmul 2-d bias [1, 1, N]": case(linear, "matmul", INT, INT, out=None, bias=(1, 1, 16)),
    "matmul 2-d vector bias output": case(linear, "matmul", INT, INT, bias=B),
    "matmul 2-d dynamic vector bias": case(linear, "matmul", FLOAT, INT, out=None, bias=B, shape=("batch", 32)),
    "matmul 3-d vector bias": case(linear, "matmul", FLOAT, INT, out=None, bias=B, shape=(2, 4, 32)),
    "matmul 3-d bias [1, N]": case(linear, "matmul", INT, INT, out=None, bias=(1, 16), shape=(2, 4, 32)),
    "matmul 3-d bias [1, 1, N]": case(linear, "matmul", INT, INT, out=None, bias=(1, 1, 16), shape=(2, 4, 32)),
    "matmul 3-d int32 bias": case(linear, "matmul", INT, INT, out=None, bias="int32", shape=(2, 4, 32)),
    "matmul 3-d vector bias output": case(linear, "matmul", INT, INT, bias=B, shape=(2, 4, 32)),
    "matmul 3-d dynamic vector bias": case(linear, "matmul", INT, INT, out=None, bias=B, shape=("batch", 4, 32)),
    "matmul 3-d dynamic bias [1, 1, N]": case(linear, "matmul", INT, INT, out=None, bias=(1, 1, 16), shape=("b", "s", 32)),
    "matmul 4-d vector bias": case(linear, "matmul", FLOAT, INT, out=None, bias=B, shape=(2, 3, 4, 32)),
    "matmul relu": case(linear, "matmul", INT, INT, bias=(1, 1, 16), shape=(2, 4, 32), after="Relu", out=("uint8", 0)),
    "matmul gelu": case(linear, "matmul", INT, INT, bias=(1, 1, 16), shape=(2, 4, 32), after="Gelu", out=None),
    "matmul s8": case(linear, "matmul", INT, INT, x=S8, out=S8),
    "matmul s8 float output": case(linear, "matmul", INT, INT, x=S8Z, out=None),
    "matmul per tensor": case(linear, "matmul", INT, INT, scales="tensor", out=None),
    "matmul u8 weight": case(linear, "matmul", INT, WEIGHT, w="uint8", w_zero=128),
    "matmul u8 weight float output": case(linear, "matmul", INT, WEIGHT, w="uint8", w_zero=128, out=None),
    "matmul weight without zero point": case(linear, "matmul", INT, INT, w_zero=None, out=None),
    "matmul u16": case(linear, "matmul", FLOAT, WEIGHT, x=U16, out=U16),
    "matmul W4A8": case(linear, "matmul", FLOAT, WEIGHT, w="int4", out=None),
    "matmul W4A8 in blocks": case(linear, "matmul", FLOAT, WEIGHT, w="int4", scales="input", block=16, out=None),
    "matmul transposed weight": case(linear, "matmul", INT, INT, "Transpose", out=None, shape=(2, 4, 32)),
    "matmul transposed weight bias": case(linear, "matmul", FLOAT, INT, "Transpose", out=None, bias=B, shape=(2, 4, 32)),
    "matmul transposed weight bias output": case(linear, "matmul", INT, INT, "Transpose", bias=B, shape=(2, 4, 32)),
    "gemm float bias output": case(linear, "gemm", INT, INT, "Gemm", bias=B),
    "gemm float bias": case(linear, "gemm", FLOAT, INT, "Gemm", bias=B, out=None),
    "gemm int32 bias": case(linear, "gemm", INT, INT, "Gemm", bias="int32", out=None),
    "gemm no bias": case(linear, "gemm", INT, INT, "Gemm", out=None),
    "gemm alpha": case(linear, "gemm", FLOAT, INT, "Gemm", bias=B, alpha=0.5),
    "gemm beta": case(linear, "gemm", FLOAT, INT, "Gemm", bias=B, beta=0.5),
    "gemm transposed input": case(linear, "gemm", INT, INT, "Gemm", shape=(32, 4), transA=1),
    "gemm s8": case(linear, "gemm", INT, INT, "Gemm", x=S8, out=S8, bias=B),
    "gemm relu": case(linear, "gemm", INT, INT, "Gemm", bias=B, after="Relu", out=("uint8", 0)),
    "gemm relu mid-range": case(linear, "gemm", FLOAT, INT, "Gemm", bias=B, after="Relu"),
    "gemm u8 weight": case(linear, "gemm", INT, WEIGHT, "Gemm", w="uint8", w_zero=128),
    "gemm u16": case(linear, "gemm", FLOAT, WEIGHT, "Gemm", x=U16, out=U16),
    "dynamic as matmul integer": case(dynamic, "matmulinteger", INT, None, "matmul_integer"),
    "dynamic as QDQ": case(dynamic, "matmul", INT, WEIGHT, "qdq"),
}  # fmt: skip
WEIGHTS_ALONE = {
    **{
        f"weight {w} {scales}{f' {block}' if block else ''}": case(
            linear, "matmul", FLOAT if block == 8 else WEIGHT, None if w.endswith("int2") else WEIGHT,
            x=None, out=None, w=w, w_zero=zero, scales=scales, block=block, opset=25 if w.endswith("int2") else 21,
        )
        for w, zero in (("int8", 0), ("int8", 3), U8, ("int4", 0), ("uint4", 8), ("int2", 0), ("uint2", 2))
        for scales, block in (("channel", None), ("tensor", None), ("input", 16), ("input", 8), ("input", 32))
    },
    "weight int4 vector bias": case(linear, "matmul", WEIGHT, WEIGHT, x=None, out=None, w="int4", scales="input", block=16, bias=B),
    "weight int4 3-d vector bias": case(linear, "matmul", WEIGHT, WEIGHT, x=None, out=None, w="int4", scales="input", block=16, bias=B, shape=(2, 4, 32)),
    "weight int4 gemm": case(linear, "gemm", FLOAT, WEIGHT, "Gemm", x=None, out=None, w="int4", scales="input", block=16),
    "weight int4 gemm [K, N]": case(linear, "gemm", WEIGHT, WEIGHT, "GemmKN", x=None, out=None, w="int4", scales="input", block=16, bias=B),
    "weight int4 transposed": case(linear, "matmul", FLOAT, WEIGHT, "Transpose", x=None, out=None, w="int4", scales="input", block=16),
    "weight int8 transposed": case(linear, "matmul", WEIGHT, WEIGHT, "Transpose", x=None, out=None),
    "weight int8 gemm": case(linear, "gemm", FLOAT, WEIGHT, "Gemm", x=None, out=None),
    "weight int8 opset 13": case(linear, "matmul", WEIGHT, WEIGHT, x=None, out=None, opset=13),
    "weight of conv": case(lambda: (m := QdqModel(), [m.op("Conv", m.input(1, 8, 8, 8), m.weight(16, 8, 3, 3, axis=0))]), "conv", FLOAT, FLOAT),
}  # fmt: skip
_POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}
_MOVES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "Reshape": ([ints(1, -1)], {}),
    "Transpose": ([], {"perm": [0, 2, 3, 1]}),
    "Slice": ([ints(0), ints(4), ints(1)], {}),
    "Squeeze": ([ints(0)], {}),
    "Unsqueeze": ([ints(0)], {}),
    "Expand": ([ints(2, 8, 8, 8)], {}),
    "Gather": ([ints(0, 1)], {"axis": 1}),
    "Flatten": ([], {}),
    "DepthToSpace": ([], {"blocksize": 2}),
    "Resize": ([None, np.array([1, 1, 2, 2], np.float32)], {"mode": "nearest"}),
    "MaxPool": ([], _POOL),
    "ReduceMax": ([ints(2, 3)], {}),
}
_PASSED = ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "MaxPool")
OTHERS = {
    **{f"{kind} same grid": case(one, kind.lower(), INT, INT, kind, more=c, **a) for kind, (c, a) in _MOVES.items()},
    **{f"{kind} other grid": case(one, kind.lower(), FLOAT, INT, kind, more=c, step=0.05, **a) for kind, (c, a) in _MOVES.items()},
    **{
        f"{kind} float output": case(one, kind.lower(), INT if kind in _PASSED else FLOAT, INT, kind, more=c, out=None, **a)
        for kind, (c, a) in _MOVES.items()
    },
    "Split same grid": case(one, "split", INT, INT, "Split", outputs=2, axis=1, num_outputs=2),
    "Split other grid": case(one, "split", FLOAT, INT, "Split", step=0.05, outputs=2, axis=1, num_outputs=2),
    "Tile": case(one, "tile", INT, FLOAT, "Tile", more=[ints(2, 1, 1, 1)]),
    "Pad": case(one, "pad", FLOAT, FLOAT, "Pad", more=[ints(0, 0, 1, 1, 0, 0, 1, 1)]),
    "SpaceToDepth": case(one, "spacetodepth", FLOAT, FLOAT, "SpaceToDepth", blocksize=2),
    "Resize linear": case(one, "resize", FLOAT, FLOAT, "Resize", more=[None, np.array([1, 1, 2, 2], np.float32)], mode="linear"),
    "AveragePool": case(one, "averagepool", INT, INT, "AveragePool", step=0.05, **_POOL),
    "AveragePool s8": case(one, "averagepool", INT, INT, "AveragePool", x=S8, out=S8, **_POOL),
    "AveragePool float output": case(one, "averagepool", FLOAT, INT, "AveragePool", out=None, **_POOL),
    "GlobalAveragePool": case(one, "globalaveragepool", INT, INT, "GlobalAveragePool"),
    "GlobalAveragePool u16": case(one, "globalaveragepool", FLOAT, FLOAT, "GlobalAveragePool", x=U16, out=U16),
    "ReduceMean": case(one, "reducemean", FLOAT, INT, "ReduceMean", more=[ints(2, 3)]),
    **{
        kind: case(one, kind.lower(), INT if kind in ("Sigmoid", "Softmax", "LeakyRelu") else FLOAT, FLOAT, kind)
        for kind in ("Sigmoid", "Softmax", "LeakyRelu", "Tanh", "Gelu", "HardSigmoid", "Elu", "Erf", "Sqrt", "Exp")
    },
    "Sigmoid float output": case(one, "sigmoid", FLOAT, FLOAT, "Sigmoid", out=None),
    "Softmax u16": case(one, "softmax", FLOAT, FLOAT, "Softmax", x=U16, out=U16),
    **{kind: case(two, kind.lower(), INT if kind in ("Add", "Mul") else FLOAT, FLOAT, kind, step=0.05) for kind in ("Add", "Mul", "Sub", "Div", "Pow")},
    "Add float output": case(two, "add", FLOAT, FLOAT, "Add", out=None),
    "Add relu": case(two, "add", INT, FLOAT, "Add", after="Relu", out=("uint8", 0)),
    "Add relu mid-range": case(two, "add", FLOAT, FLOAT, "Add", after="Relu"),
    "Add s8": case(two, "add", INT, FLOAT, "Add", x=S8, out=S8),
    "Add u8 and s8": case(two, "add", INT, FLOAT, "Add", y=S8),
    "Add u16": case(two, "add", FLOAT, FLOAT, "Add", x=U16, out=U16),
    "Add constant codes": case(two, "add", INT, FLOAT, "Add", constant="codes"),
    "Add constant float": case(two, "add", FLOAT, FLOAT, "Add", constant="float"),
    "Concat": case(two, "concat", INT, INT, "Concat", axis=1),
    "Concat other grids": case(two, "concat", INT, INT, "Concat", step=0.05, axis=1),
    "Concat s8": case(two, "concat", INT, INT, "Concat", x=S8, out=S8, axis=1),
    "Concat float output": case(two, "concat", FLOAT, INT, "Concat", out=None, axis=1),
    "LayerNormalization": case(norm, "layernormalization", FLOAT, FLOAT, "LayerNormalization"),
    "InstanceNormalization": case(norm, "instancenormalization", FLOAT, FLOAT, "InstanceNormalization"),
    "products": case(products, "matmul", INT, FLOAT, U8, U8),
    "products float output": case(products, "matmul", INT, FLOAT, U8, U8, None),
    "products s8": case(products, "matmul", INT, INT, S8, S8, S8),
    "products s8 with zero point": case(products, "matmul", INT, FLOAT, S8Z, S8Z, S8),
    "products u8 from 0 by s8": case(products, "matmul", INT, INT, ("uint8", 0), S8),
    "products u8 by s8": case(products, "matmul", INT, FLOAT, U8, S8),
    "products s8 by u8 from 0": case(products, "matmul", INT, FLOAT, S8, ("uint8", 0)),
    "products u16": case(products, "matmul", FLOAT, FLOAT, U16, U16, U16),
}  # fmt: skip
CASES = CONVOLUTIONS | LINEARS | WEIGHTS_ALONE | OTHERS
