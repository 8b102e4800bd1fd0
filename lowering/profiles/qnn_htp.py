"""``qnn-htp``: Qualcomm's Hexagon Tensor Processor, through QNN as onnxruntime-qnn drives it.

A whole static graph in integers: what is not quantized is float16 there or refused. Linears are Gemm with an int32
bias: a MatMul and an Add take a second requantization.
"""

from typing import Final

from graphq.lowering.profiles.whole_graph import ANY, FORMATS, FUSES, OPS, STEPS
from graphq.spec.profile import OpRule, Profile, int_activations, op_types
from graphq.spec.quant import parse_quant

_WEIGHTED: Final = op_types(
    "uint8 x int8/channel -> uint8",
    "uint8 x int8/tensor -> uint8",
    "uint16 x int8/channel -> uint16",
    "uint16 x int8/tensor -> uint16",
    "uint16 x int4/channel -> uint16",
)
_PAIRS: Final = op_types("uint8 x uint8 -> uint8", "uint16 x uint8 -> uint16")
_NORM: Final = op_types("uint8 x uint8/tensor -> uint8", "uint16 x uint8/tensor -> uint16")

QNN_HTP: Final = Profile(
    name="qnn-htp",
    consumer="Qualcomm QNN's Hexagon Tensor Processor, through onnxruntime-qnn",
    activations=int_activations(*FORMATS),
    weight=parse_quant("int8/channel"),
    ops={
        **OPS,
        "Neg": OpRule(ANY),
        **{kind: OpRule(_WEIGHTED, bias="int32") for kind in ("Conv", "ConvTranspose", "Linear")},
        "MatMul": OpRule(
            _PAIRS,
            because="a second operand of 16 bits is converted to 8 by onnxruntime-qnn, on a grid of its own making;"
            " columns of uint8 with codes further than 127 from the zero point are rounded again, of int8 none",
            also=op_types("uint16 x int8 -> uint16", "uint16 x uint16 -> uint16"),
        ),
        "LayerNormalization": OpRule(_NORM, bias="int32"),
        "RMSNormalization": OpRule(
            op_types(
                "uint8 x uint8/tensor -> uint8", "uint16 x uint8/tensor -> uint16", "uint16 x uint16/tensor -> uint16"
            ),
            because="one op from opset 23 on, along the last axis of up to four; a gain of 16 bits beside 16 alone",
        ),
        "InstanceNormalization": OpRule(_NORM, bias="int32"),
        # No BatchNormalization: what it makes of gain and variance is rounded to 8 bits, up to 9 % off beside 16.
    },
    fuses=FUSES,
    static=True,
    opsets=(20, 25),  # LayerNormalization and Gelu as ops of their own
    sources=(
        "onnxruntime: quantization/execution_providers/qnn/quant_config.py",
        "onnxruntime-qnn: op builders",
        "compiled graphs of onnxruntime-qnn 2.7's simulator",
    ),
    whole=True,
    steps=STEPS,
    lacks={"LSTM": "onnxruntime-qnn hands it to QNN in float16", "GRU": "onnxruntime-qnn has no builder for it"},
    least_multiplier=2.0**-21,  # channels by 7e-8 give nothing but code 0, those by 2.6e-7 what they should (2.7)
)
