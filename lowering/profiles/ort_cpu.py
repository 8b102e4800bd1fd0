"""``ort-cpu``: ONNX Runtime's CPU execution provider on x86-64.

Rows were seen in optimized graphs and timed with ONNX Runtime 1.31.1, one thread, against the float op: an op is placed
where it is faster in integers. Activations are uint8: int8 ones run at a third of the speed.
"""

from typing import Final

from graphq.spec.profile import OpRule, Profile, int_activations, op_types, same_types
from graphq.spec.quant import parse_quant

_U8: Final = same_types(["uint8", "int8/asym", "int8"])
_CONV: Final = op_types(
    "uint8 x int8/channel -> uint8",
    "uint8 x int8/tensor -> uint8",
    "int8/asym x int8/channel -> int8/asym",
    "int8 x int8/channel -> int8",
    "int8 x int8/tensor -> int8",
)
_MATMUL: Final = op_types("uint8 x uint8 -> uint8", "uint8 x int8 -> uint8", "int8 x int8 -> int8")

ORT_CPU: Final = Profile(
    name="ort-cpu",
    consumer="ONNX Runtime's CPU execution provider on x86-64",
    activations=int_activations("uint8", "int8/asym", "int8"),
    weight=parse_quant("int8/channel"),
    ops={
        "Conv": OpRule(_CONV, bias="int32", because="QLinearConv, where its output is quantized, else float"),
        "Linear": OpRule(_CONV, output="optional", because="MatMulIntegerToFloat: 0.43 of float's time in a ViT"),
        "MatMul": OpRule(_MATMUL, output="optional", placed="never", because="QLinearMatMul; a ViT's are slower"),
        "Add": OpRule(_U8, placed="between", because="QLinearAdd; a ViT's residual sums are slower"),
        "Mul": OpRule(_U8, placed="between", because="QLinearMul"),
        "Concat": OpRule(_U8, placed="between", because="QLinearConcat, whose operands may have scales of their own"),
        "AveragePool": OpRule(_U8, placed="between", because="QLinearAveragePool"),
        "GlobalAveragePool": OpRule(_U8, placed="between", because="QLinearGlobalAveragePool"),
        "MaxPool": OpRule(_U8, output="same", placed="between", because="takes uint8 as it is"),
        "Resize": OpRule(_U8, output="same", placed="between", because="takes uint8 as it is"),
        "Sigmoid": OpRule(_U8, placed="never", because="QLinearSigmoid"),
        "LeakyRelu": OpRule(_U8, placed="between", because="QLinearLeakyRelu"),
        "Softmax": OpRule(_U8, placed="never", because="QLinearSoftmax"),
        **{
            kind: OpRule(_U8, output="same", placed="between", because="moves codes")
            for kind in ("Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Expand", "Tile", "Gather")
        },
    },
    fuses=(("Conv", "Relu"), ("Conv", "Clip"), ("Add", "Relu")),
    linear="matmul",
    dynamic="matmul_integer",
    weight_only="matmul_nbits",
    sources=("optimized graphs and times of ONNX Runtime 1.31.1", "onnxruntime: qdq_selectors.cc"),
)
