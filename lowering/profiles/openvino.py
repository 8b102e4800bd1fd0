"""``openvino``: OpenVINO's CPU plugin, which reads ONNX through its own frontend.

Rows were seen as precisions of the run-time model of OpenVINO 2026.4.1. Activations are uint8: int8 with a zero point
is no convolution's input, and int8 around a Concat is wrong.
"""

from typing import Final

from graphq.spec.profile import OpRule, Profile, int_activations, op_types, same_types
from graphq.spec.quant import parse_quant

_U8: Final = same_types(["uint8"])
_WEIGHTED: Final = op_types(
    "uint8 x int8/channel -> uint8",
    "uint8 x int8/tensor -> uint8",
    "int8 x int8/channel -> int8",
    "int8 x int8/tensor -> int8",
)

OPENVINO: Final = Profile(
    name="openvino",
    consumer="OpenVINO's CPU plugin",
    activations=int_activations("uint8"),
    weight=parse_quant("int8/channel"),
    ops={
        "Conv": OpRule(_WEIGHTED, output="optional", because="u8 convolution"),
        "ConvTranspose": OpRule(_WEIGHTED, output="optional", because="u8 deconvolution"),
        "Linear": OpRule(_WEIGHTED, output="optional", because="u8 FullyConnected"),
        "MatMul": OpRule(op_types("uint8 x uint8 -> uint8"), output="optional", placed="never"),
        "Concat": OpRule(_U8, output="same", placed="through", because="one grid for all operands"),
        "AveragePool": OpRule(_U8, output="same", placed="through"),
        "GlobalAveragePool": OpRule(_U8, output="same", placed="through"),
        "MaxPool": OpRule(_U8, output="same", placed="through"),
        "Resize": OpRule(_U8, output="same", placed="through"),
        **{
            kind: OpRule(_U8, output="same", placed="through", because="moves codes")
            for kind in ("Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Expand", "Tile", "Gather")
        },
    },
    fuses=(("Conv", "Relu"), ("Conv", "Clip"), ("Linear", "Relu"), ("Linear", "Gelu")),
    linear="matmul",
    sources=("run-time models of OpenVINO 2026.4.1", "OpenVINO: ONNX frontend, dequantize_linear.cpp"),
)
