"""Lowering the opset: what later opsets only spell differently is rewritten, what they add is kept, numbers stay."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import parser
from onnx_ir.passes import common

from graphq.errors import TargetError
from graphq.lowering.onnx.opset import check_opset, lower_opset

X = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)


def model(
    body: str, opset: int = 18, inputs: str = "float[N,3,4] x", outputs: str = "float[A,B,C] y"
) -> onnx.ModelProto:
    """A model of these nodes, in ONNX's own textual form, with the shapes that can be inferred."""
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    return onnx.shape_inference.infer_shapes(parser.parse_model(text), check_type=True)


def lowered(given: onnx.ModelProto, may_be_empty: tuple[str, ...] = (), opset: int | None = None) -> onnx.ModelProto:
    made = ir.from_proto(given)
    opset = lower_opset(made, may_be_empty, opset)
    common.RemoveUnusedNodesPass()(made)
    proto = ir.to_proto(made)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", opset)]
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run(proto: onnx.ModelProto, **inputs: np.ndarray) -> list[Any]:
    outputs: Any = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, inputs or {"x": X})
    return outputs


def ops(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node if node.op_type != "Constant"]


def opset_of(proto: onnx.ModelProto) -> int:
    return proto.opset_import[0].version


# -- what is only spelled differently ----------------------------------------------------------------------------------

REWRITTEN = {
    "casts like another value": (
        "k = Constant <value_float = 2.0> () i = Cast <to = 7> (x) j = CastLike (i, k) y = Mul (j, k)",
        ["Cast", "Cast", "Mul"],
    ),
    "reductions take their axes as an attribute": (
        """a = Constant <value_ints = [-1]> () m = ReduceMax <keepdims = 1> (x, a)
        n = ReduceMean <keepdims = 1> (x, a) y = Add (m, n)""",
        ["ReduceMax", "ReduceMean", "Add"],
    ),
    "a part of a shape is a slice of it": (
        "s = Shape <start = 1, end = 2> (x) f = Cast <to = 1> (s) y = Mul (x, f)",
        ["Shape", "Slice", "Cast", "Mul"],
    ),
    "the end of a shape is a slice of it": (
        "s = Shape <start = -1> (x) f = Cast <to = 1> (s) y = Mul (x, f)",
        ["Shape", "Slice", "Cast", "Mul"],
    ),
    "even splits have sizes": (
        "p, q = Split <axis = 2, num_outputs = 2> (x) y = Sub (p, q)",
        ["Split", "Sub"],
    ),
    "given splits need no count": (
        "s = Constant <value_ints = [1, 3]> () p, q = Split <axis = 2, num_outputs = 2> (x, s) y = Mul (p, q)",
        ["Split", "Mul"],
    ),
    "shapes that are never empty need no allowzero": (
        "s = Constant <value_ints = [-1, 4, 3]> () y = Reshape <allowzero = 1> (x, s)",
        ["Reshape"],
    ),
    "defaults that older opsets lack": (
        """s = Constant <value_float = 0.5> () z = Constant <value = int8 {3}> ()
        q = QuantizeLinear <saturate = 1> (x, s, z) y = DequantizeLinear (q, s, z)""",
        ["QuantizeLinear", "DequantizeLinear"],
    ),
    "a resize that neither smooths nor keeps a ratio": (
        """r = Constant <value_floats = [1.0, 1.0, 2.0]> ()
        y = Resize <mode = "nearest", antialias = 0, keep_aspect_ratio_policy = "stretch"> (x, "", r)""",
        ["Resize"],
    ),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_what_is_only_spelled_differently_needs_no_later_opset(name: str) -> None:
    body, expected = REWRITTEN[name]
    opset = 21 if "defaults" in name else 18
    given = model(body, opset)
    made = lowered(given)
    assert opset_of(made) == 13
    assert ops(made) == expected
    alike = model(body.replace(", num_outputs = 2> (x, s)", "> (x, s)"), opset)  # ONNX refuses both at once
    assert np.array_equal(run(made)[0], run(alike)[0])


@pytest.mark.parametrize("what", ['antialias = 1, mode = "linear"', 'keep_aspect_ratio_policy = "not_larger"'])
def test_a_resize_that_older_opsets_lack_keeps_its_own(what: str) -> None:
    body = f's = Constant <value_ints = [2, 3, 2]> () y = Resize <{what}> (x, "", "", s)'
    assert opset_of(lowered(model(body))) == 18


def test_an_attribute_with_its_older_meaning_is_dropped() -> None:
    given = model(SCATTER % "none")
    made = lowered(given)
    assert opset_of(made) == 13
    assert [a.name for a in made.graph.node[-1].attribute] == ["axis"]
    assert np.array_equal(run(made)[0], run(given)[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("axis", [-1, 2, 1])
def test_layer_norms_are_defined(axis: int, bias: bool) -> None:
    size = "[4]" if axis != 1 else "[3,4]"
    inputs = f"float[N,3,4] x, float{size} s, float{size} b"
    given = model(f"y = LayerNormalization <axis = {axis}, epsilon = 0.01> (x, s{', b' if bias else ''})", 17, inputs)
    made = lowered(given)
    assert opset_of(made) == 13
    assert ops(made)[:4] == ["ReduceMean", "Sub", "Mul", "ReduceMean"]
    shape = (4,) if axis != 1 else (3, 4)
    rng = np.random.default_rng(1)
    feeds = {
        "x": X,
        "s": rng.standard_normal(shape).astype(np.float32),
        "b": rng.standard_normal(shape).astype(np.float32),
    }
    found, expected = run(made, **feeds)[0], run(given, **feeds)[0]
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()  # another order of sums


@pytest.mark.parametrize("axis", [-1, -2])
def test_rms_norms_are_defined(axis: int) -> None:
    size = "[4]" if axis == -1 else "[3,4]"
    inputs = f"float[N,3,4] x, float{size} s"
    given = model(f"y = RMSNormalization <axis = {axis}, epsilon = 0.01> (x, s)", 23, inputs)
    made = lowered(given)
    assert opset_of(made) == 13
    assert [op for op in ops(made) if op != "Constant"] == ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"]
    scale = np.random.default_rng(1).standard_normal((4,) if axis == -1 else (3, 4)).astype(np.float32)
    found, expected = (run(one, x=X, s=scale)[0] for one in (made, given))
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()  # another order of sums


def test_outputs_keep_their_names_and_shapes() -> None:
    given = model("k = Constant <value_float = 2.0> () y = CastLike (x, k)", outputs="float[N,3,4] y")
    made = lowered(given)
    assert [o.name for o in made.graph.output] == ["y"]
    assert [d.dim_param or d.dim_value for d in made.graph.output[0].type.tensor_type.shape.dim] == ["N", 3, 4]


# -- what later opsets add ---------------------------------------------------------------------------------------------

SCATTER = """
    i = Constant <value = int64[1,1,1] {0}> () u = Constant <value = float[1,1,1] {2.0}> ()
    y = ScatterElements <axis = 0, reduction = "%s"> (x, i, u)"""
ADDED = {
    "axes that are computed": """
        s = Shape (x) r = Size (s) i = Constant <value_int = -1> () m = Add (r, i) k = Constant <value_ints = [-1]> ()
        a = Reshape (m, k) y = ReduceMax <keepdims = 1> (x, a)""",
    "a layer norm whose mean is read": """
        k = Constant <value_floats = [1.0, 1.0, 1.0, 1.0]> () n, m = LayerNormalization (x, k) y = Sub (n, m)""",
    "an op of a later opset": "y = Mish (x)",
    "an attribute of a later opset": SCATTER % "add",
    "4 bits": """
        c = Constant <value = int8[4] {1, 2, 3, -8}> () i = Cast <to = 22> (c) s = Constant <value_float = 0.5> ()
        d = DequantizeLinear (i, s) y = Mul (x, d)""",
    "16 bits": """
        s = Constant <value_float = 0.5> () z = Constant <value = int16 {0}> ()
        q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z)""",
    "blocks": """
        c = Constant <value = int8[1,1,4] {1, 2, 3, -8}> () s = Constant <value = float[1,1,2] {1.0, 2.0}> ()
        d = DequantizeLinear <axis = 2, block_size = 2> (c, s) y = Mul (x, d)""",
}
SINCE = dict(zip(ADDED, (18, 17, 18, 16, 21, 21, 21), strict=True))


@pytest.mark.parametrize("name", ADDED)
def test_what_later_opsets_add_asks_for_them(name: str) -> None:
    given = model(ADDED[name], 21)
    made = lowered(given)
    assert opset_of(made) == SINCE[name]
    assert ops(made) == ops(given)
    assert np.array_equal(run(made)[0], run(given)[0])


def test_a_size_that_can_be_0_needs_allowzero() -> None:
    """Below opset 14 a 0 in a shape means "the size that the input has there"."""
    inputs = "float[N,3,4] x, int64[3] s"
    body = "y = Reshape <allowzero = 1> (x, s)"
    assert opset_of(lowered(model(body, 18, inputs, "float[N,4,3] y"))) == 13
    made = lowered(model(body, 18, inputs, "float[N,4,3] y"), ("N",))
    assert opset_of(made) == 14
    assert made.graph.node[0].attribute[0].name == "allowzero"
    empty = np.zeros((0, 3, 4), np.float32)
    assert run(made, x=empty, s=np.array([0, 4, 3]))[0].shape == (0, 4, 3)
    assert opset_of(lowered(model(body, 18, inputs, "float[A,B,C] y"), ("N",))) == 13  # others are never empty


@pytest.mark.parametrize("opset", [13, 16, 18, 21, 25, 26, 28])
def test_an_opset_can_be_asked_for(opset: int) -> None:
    body, _ = REWRITTEN["reductions take their axes as an attribute"]
    given = model(body)
    made = lowered(given, opset=opset)
    assert opset_of(made) == opset
    assert len(made.graph.node[1].input) == (1 if opset < 18 else 2)
    if opset <= 26:  # ONNX Runtime 1.31 reads none above
        assert np.array_equal(run(made)[0], run(given)[0])


@pytest.mark.parametrize("name", ADDED)
def test_an_opset_that_is_too_low_is_an_error(name: str) -> None:
    made = ir.from_proto(model(ADDED[name], 21))
    wrong = next(n for n in made.graph if n.op_type in NEEDS[name][0])
    with pytest.raises(TargetError) as caught:
        lower_opset(made, opset=SINCE[name] - 1)
    reason = NEEDS[name][1]
    end = f"needs opset {SINCE[name]}; opset {SINCE[name] - 1} was asked for"
    assert str(caught.value) == f"onnx: {wrong.op_type}: {wrong.op_type}{reason} {end}"
    wrong.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'block.up', 'linear']"
    with pytest.raises(TargetError, match=rf"^onnx: block\.up: {wrong.op_type}{reason} {end}$"):
        lower_opset(made, opset=SINCE[name] - 1)


NEEDS: dict[str, tuple[tuple[str, ...], str]] = {  # the op that is named, and why
    "axes that are computed": (("ReduceMax",), " as it is used here"),
    "a layer norm whose mean is read": (("LayerNormalization",), " as it is used here"),
    "an op of a later opset": (("Mish",), " as it is used here"),
    "an attribute of a later opset": (("ScatterElements",), " as it is used here"),
    "4 bits": (("Cast",), " of INT4"),
    "16 bits": (("QuantizeLinear",), " of INT16"),
    "blocks": (("DequantizeLinear",), " as it is used here"),
}


def test_what_needs_more_than_may_be_written() -> None:
    made = ir.from_proto(model(ADDED["blocks"], 21))
    with pytest.raises(TargetError) as caught:
        lower_opset(made, between=(13, 20))
    reason = "DequantizeLinear as it is used here needs opset 21; the highest to be written is 20"
    assert str(caught.value) == f"onnx: DequantizeLinear: {reason}"
    assert lower_opset(ir.from_proto(model("y = Neg (x)")), between=(17, 20)) == 17


@pytest.mark.parametrize(
    ("kind", "opset", "version"),
    [
        (ir.DataType.INT8, 13, 10),
        (ir.DataType.INT16, 13, 10),  # but as a quantizer's: above
        (ir.DataType.FLOAT8E4M3FN, 19, 10),
        (ir.DataType.INT4, 21, 10),
        (ir.DataType.FLOAT4E2M1, 23, 11),
        (ir.DataType.INT2, 25, 13),
        (ir.DataType.UINT2, 25, 13),
        (ir.DataType.FLOAT6E2M3, 28, 14),
    ],
)
def test_an_element_type_asks_for_its_opset_and_version(kind: ir.DataType, opset: int, version: int) -> None:
    made = ir.from_proto(model("y = Cast <to = 1> (x)", 21))
    made.graph.inputs[0].dtype = kind
    assert lower_opset(made) == opset
    assert made.ir_version == version


def test_no_opset_is_beyond_the_highest() -> None:
    with pytest.raises(TargetError) as caught:
        check_opset(29)
    assert str(caught.value) == "onnx: opset 29: the highest is 28"


def test_a_node_that_no_opset_has() -> None:
    made = ir.from_proto(model("y = Neg (x)"))
    made.graph[0].op_type, made.graph[0].name = "Negative", "the_node"
    with pytest.raises(TargetError) as caught:
        lower_opset(made)
    assert str(caught.value) == "onnx: the_node: no opset up to 28 has Negative as it is used here"


def test_branches_are_lowered_too() -> None:
    then = "then_branch = t () => (float[A,B,C] u) { a = Constant <value_ints = [-1]> () u = ReduceMax (x, a) }"
    other = "else_branch = e () => (float[A,B,C] v) { v = Identity (x) }"
    body = f"z = Constant <value_float = 0.0> () s = ReduceSum <keepdims = 0> (x) c = Greater (s, z) y = If (c) <{then}, {other}>"
    given = model(body)
    made = lowered(given)
    assert opset_of(made) < 18
    for x in (X, -np.abs(X)):
        assert np.array_equal(run(made, x=x)[0], run(given, x=x)[0])
