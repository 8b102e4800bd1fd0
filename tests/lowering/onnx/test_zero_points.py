"""Every quantizer of a written file has scale and zero point as initializers, a rank and a name of its own."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import graphq
from graphq.compiler import Compiled
from graphq.errors import PassError
from graphq.lowering.onnx.zero_points import complete
from tests.compiled import blocks_spec, compile_captured
from tests.models import MLP, ConvBnRelu

FORMATS = (
    ("int8/channel", "uint8/tensor"),
    ("int8/asym/tensor", "int8/tensor"),
    ("int4/g4", "int16/tensor"),
    ("int4/asym/g4", None),
    ("int8/channel", "int8/token/dynamic"),
    ("float8_e4m3fn/channel", "float8_e4m3fn/tensor"),
    ("nvfp4", None),
    ("int4/over_int8/g4", "int6/tensor"),
)


def quantizers(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    return (node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear"))


def check(made: Compiled, folder: Path, profile: str | None) -> onnx.ModelProto:
    made.emit("onnx", folder, profile=profile)
    model = onnx.shape_inference.infer_shapes(onnx.load(folder / "model.onnx"))
    held = {i.name: i for i in model.graph.initializer}
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    known = {v.name: (v.type.tensor_type.elem_type, v.type.tensor_type.HasField("shape")) for v in values}
    known |= {i.name: (i.data_type, True) for i in model.graph.initializer}
    for node in quantizers(model):
        x, scale, zero_point = node.input
        codes = x if node.op_type == "DequantizeLinear" else node.output[0]
        assert zero_point in held, node.name
        assert known[codes][0] == held[zero_point].data_type, node.name
        assert known[x][1], node.name  # its rank is static
        if scale in held:
            assert list(held[zero_point].dims) == list(held[scale].dims), node.name
        else:  # the product of two levels
            assert held[zero_point].dims
    names = [node.name for node in model.graph.node]
    assert all(node.op_type != "Constant" for node in model.graph.node)
    assert all(names)
    assert len({*names}) == len(names)
    assert graphq.verify(folder).ok
    return model


@pytest.mark.parametrize("profile", [None, "ort-cpu"])
@pytest.mark.parametrize(("weight", "input"), FORMATS)
def test_of_every_format(weight: str, input: str | None, profile: str | None, tmp_path: Path) -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    rule = {"match": "*", "weight": weight} | ({"input": input} if input else {})
    check(graphq.compile(MLP(), {"graphq": 1, "rules": [rule]}, inputs=x, calibration=[x]), tmp_path / "a", profile)


def test_those_of_zeros_are_shared_and_named_after_their_layers(tmp_path: Path) -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    rules = [{"match": "*", "weight": "int8/channel", "input": "int8/tensor"}]
    made = graphq.compile(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), {"graphq": 1, "rules": rules}, inputs=x, calibration=[x]
    )
    model = check(made, tmp_path / "a", None)
    assert [(node.name, *node.input[1:]) for node in quantizers(model)] == [
        ("0/QuantizeLinear", "0.input_scale", "zero_points.int8"),
        ("0/DequantizeLinear", "0.input_scale", "zero_points.int8"),
        ("0.weight/DequantizeLinear", "0.weight_scale", "zero_points.int8.8"),
        ("1/QuantizeLinear", "1.input_scale", "zero_points.int8"),
        ("1/DequantizeLinear", "1.input_scale", "zero_points.int8"),
        ("1.weight/DequantizeLinear", "1.weight_scale", "zero_points.int8.8"),
    ]
    zeros = [numpy_helper.to_array(i) for i in model.graph.initializer if i.name.startswith("zero_points")]
    assert [(z.dtype.name, z.shape, z.any()) for z in zeros] == [("int8", (), False), ("int8", (8,), False)]


@pytest.mark.parametrize("profile", [None, "ort-cpu"])
def test_of_convolutions(profile: str | None, tmp_path: Path) -> None:
    x = torch.randn(2, 4, 6, 6)
    rules = [{"match": "kind:conv2d", "weight": "int8/channel", "input": "uint8/tensor"}]
    made = graphq.compile(ConvBnRelu().eval(), {"graphq": 1, "rules": rules}, inputs=x, calibration=[x])
    check(made, tmp_path / "a", profile)


def test_of_a_language_model(tmp_path: Path) -> None:
    made = compile_captured("llama", blocks_spec("int4/g32", "int8/asym/tensor"))
    model = check(made, tmp_path / "a", None)
    assert "model.layers.0.mlp.down_proj/MatMul" in {node.name for node in model.graph.node}


# -- on models by hand -------------------------------------------------------------------------------------------------


def written(body: str, inputs: str = "float[N,4] x") -> Any:
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => (float[A,B] y) {{ {body} }}'
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def test_constants_become_initializers() -> None:
    made = written(
        """s = Constant <value = float {0.5}> () z = Constant <value = int8 {3}> ()
        q = QuantizeLinear (x, s, z) y = DequantizeLinear (q, s, z)"""
    )
    complete(made)
    assert {name: v.const_value.numpy().item() for name, v in made.graph.initializers.items()} == {
        "scales.float": 0.5,
        "zero_points.int8": 3,
    }
    assert [[i.name for i in node.inputs] for node in made.graph if node.op_type != "Constant"] == [
        ["x", "scales.float", "zero_points.int8"],
        ["q", "scales.float", "zero_points.int8"],
    ]


def test_one_name_for_each_value() -> None:
    made = written(
        """s = Constant <value = float {0.5}> () z = Constant <value = int8 {3}> () k = Constant <value = int8 {0}> ()
        q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) p = QuantizeLinear (d, s, k)
        y = DequantizeLinear (p, s)"""
    )
    complete(made)
    given = [node.inputs[2].name for node in made.graph if node.op_type != "Constant"]
    assert given == ["zero_points.int8", "zero_points.int8", "zero_points.int8_1", "zero_points.int8_1"]


def test_the_zero_point_of_a_computed_scale() -> None:
    body = "s = Mul (a, a) d = DequantizeLinear <axis = 1, block_size = 3> (c, s) y = MatMul (x, d)"
    made = written(body, "float[N,4] x, int4[4,8] c, float[4,3] a")
    complete(made)
    assert {name: list(v.shape) for name, v in made.graph.initializers.items()} == {"zero_points.int4.4x3": [4, 3]}


def test_a_scale_of_unknown_shape() -> None:
    made = written("s = Mul (a, a) y = DequantizeLinear (x, s)", "int8[N,4] x, float[M] a")
    with pytest.raises(PassError, match=r"^onnx: .*: the shape of its scale is not known$"):
        complete(made)


def test_those_of_two_axes_are_two(tmp_path: Path) -> None:
    """As many zeros, for the outputs of a convolution (axis 0) and of a transposed one (axis 1)."""
    layers = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3))
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    rules = [{"match": "*", "weight": "int8/channel", "input": "uint8/tensor"}]
    made = graphq.compile(layers, {"graphq": 1, "rules": rules}, inputs=x, calibration=[x])
    held = {node.name: node.input[2] for node in quantizers(check(made, tmp_path / "a", None))}
    assert [held[f"{i}.weight/DequantizeLinear"] for i in range(3)] == [
        "zero_points.int8.4",
        "zero_points.int8.4",
        "zero_points.int8.4_1",
    ]
