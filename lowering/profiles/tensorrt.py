"""``tensorrt``: NVIDIA TensorRT, explicit quantization of INT8.

Symmetric codes alone: int8 with zero points of 0, one scale for an activation, one for each output channel of a weight.
TensorRT commutes a DequantizeLinear forward and a QuantizeLinear backward through what moves elements, and fuses them
with the op between; what a convolution or a product gives need not be quantized. None of it was run here.
"""

from typing import Final

from graphq.spec.profile import OpRule, Profile, int_activations, op_types, same_types
from graphq.spec.quant import parse_quant

_S8: Final = same_types(["int8"])
_WEIGHTED: Final = op_types("int8 x int8/channel -> int8", "int8 x int8/tensor -> int8")
_DOCS: Final = "TensorRT documentation, explicit quantization"
_MATRIX: Final = "onnx-tensorrt: docs/operators.md lists INT8"
_UNVERIFIED: Final = "unverified: ModelOpt's selection quantizes it beside others only"

TENSORRT: Final = Profile(
    name="tensorrt",
    consumer="TensorRT",
    activations=int_activations("int8"),
    weight=parse_quant("int8/channel"),
    ops={
        **{
            kind: OpRule(
                _WEIGHTED,
                output="optional",
                bias_needed="always",
                because=f"{_DOCS}; DequantizeLinear of int32 is not in onnx-tensorrt's table, so biases stay float",
            )
            for kind in ("Conv", "ConvTranspose", "Linear")
        },
        "MatMul": OpRule(
            op_types("int8 x int8 -> int8"),
            output="optional",
            placed="between",
            because="attention: both operands int8",
        ),
        "Add": OpRule(
            _S8,
            output="optional",
            placed="between",
            because=f"{_DOCS}: fused with its DequantizeLinear; behind a Conv the other operand's alone",
        ),
        "Mul": OpRule(_S8, output="optional", placed="never", because=_UNVERIFIED),
        "Concat": OpRule(
            _S8, output="same", placed="between", because=f"{_MATRIX}; ModelOpt gives its inputs one scale", passes=True
        ),
        **{
            kind: OpRule(_S8, output="optional", placed="between", because=_MATRIX)
            for kind in ("AveragePool", "GlobalAveragePool")
        },
        **{
            kind: OpRule(
                _S8,
                output="same",
                placed="between",
                because=f"{_DOCS}: it commutes",
                passes=True,
                lifts=True,
                regrids=True,
            )
            for kind in (
                *("MaxPool", "Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Flatten", "Gather"),
                *("Split", "Expand", "Tile", "Resize"),
            )
        },
        **{
            kind: OpRule(_S8, output="optional", placed="never", because=_UNVERIFIED)
            for kind in ("Sigmoid", "Tanh", "LeakyRelu", "Elu", "HardSigmoid")
        },
    },
    fuses=(
        *(("Conv", "Relu"), ("Conv", "Clip"), ("Conv", "Add"), ("Conv", "Add", "Relu"), ("ConvTranspose", "Relu")),
        *(("Linear", "Relu"), ("Linear", "Gelu"), ("Add", "Relu")),
    ),
    opsets=(13, 22),
    sources=(
        "NVIDIA TensorRT documentation: Working with Quantized Types, Explicit Quantization",
        "onnx-tensorrt: docs/operators.md, importer 10.1",
        "NVIDIA Model-Optimizer: onnx/quantization/int8.py, graph_utils.py",
    ),
)
