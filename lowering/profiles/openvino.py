"""``openvino``: OpenVINO's CPU plugin, which reads ONNX through its own frontend.

Rows were seen as precisions of the run-time model of OpenVINO 2026.4.1. Activations are uint8: int8 with a zero point
is no convolution's input, and int8 around a Concat is wrong.
"""

from typing import Final

from graphq.spec.profile import Fault, OpRule, Profile, WeightsAlone, int_activations, op_types, same_types
from graphq.spec.quant import parse_quant

_U8: Final = same_types(["uint8"])
_S8: Final = same_types(["int8/asym"])
_WEIGHTED: Final = op_types(
    "uint8 x int8/channel -> uint8",
    "uint8 x int8/tensor -> uint8",
    "int8 x int8/channel -> int8",
    "int8 x int8/tensor -> int8",
)
_WEIGHTED_ALSO: Final = op_types("int8/asym x int8/channel -> uint8", "int8/asym x int8/tensor -> uint8")
_SIGNED: Final = int_activations("int8/asym")

OPENVINO: Final = Profile(
    name="openvino",
    consumer="OpenVINO's CPU plugin",
    activations=int_activations("uint8"),
    weight=parse_quant("int8/channel"),
    ops={
        "Conv": OpRule(
            _WEIGHTED,
            output="optional",
            because="u8 convolution; weights with zero points are multiplied in float",
            also=_WEIGHTED_ALSO,
            faults=(
                Fault(
                    tuple(f for f in _SIGNED),
                    "with a zero point does not compile on CPUs with AMX (no suitable implementation)",
                    "quantize activations to uint8",
                ),
            ),
        ),
        "ConvTranspose": OpRule(
            _WEIGHTED, output="optional", because="u8 deconvolution, where the zero point is 0", zero_points="zero"
        ),
        "Linear": OpRule(
            _WEIGHTED,
            output="optional",
            because="u8 FullyConnected; float where activations with zero point 0 meet a bias of more axes",
            also=_WEIGHTED_ALSO,
            bias_axes="zero point",
        ),
        "MatMul": OpRule(
            op_types("uint8 x int8 -> uint8", "int8 x int8 -> int8"),
            output="optional",
            placed="never",
            because="int8 with zero point 0 on the right, zero points of 0 on both sides; else float",
            zero_points="zero",
        ),
        "Concat": OpRule(
            _U8,
            output="same",
            placed="through",
            because="one grid for all operands; a quantizer behind it comes in front of it",
            also=_S8,
            passes=True,
            lifts=True,
            regrids=True,
            faults=(
                Fault(
                    int_activations("int8"),
                    "is wrong by 0.1 to 0.6 of the largest element behind convolutions (2026.4.1)",
                    "quantize activations to uint8",
                ),
            ),
        ),
        **{
            kind: OpRule(_U8, output="same", placed="through", because="u8 Reduce or Pooling", also=_S8, regrids=True)
            for kind in ("GlobalAveragePool", "ReduceMean")
        },
        **{
            kind: OpRule(
                _U8,
                output="same",
                placed="through",
                because="u8 Pooling or Reduce",
                also=_S8,
                passes=True,
                regrids=True,
            )
            for kind in ("MaxPool", "AveragePool", "ReduceMax", "ReduceMin")
        },
        "Resize": OpRule(
            _U8,
            output="same",
            placed="through",
            because="u8 Interpolate for nearest; linear is float",
            also=_S8,
            passes=True,
            regrids=True,
            attributes={"mode": ("nearest",)},
        ),
        **{
            kind: OpRule(
                _U8, output="same", placed="through", because="moves codes", also=_S8, passes=True, regrids=True
            )
            for kind in (
                *("Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Expand", "Gather", "Flatten"),
                "DepthToSpace",
            )
        },
    },
    fuses=(("Conv", "Relu"), ("Conv", "Clip"), ("Linear", "Relu"), ("Linear", "Gelu")),
    linear="matmul",
    linear_of_rows="gemm",  # a bias of three axes is added in bfloat16 otherwise
    sources=("run-time models of OpenVINO 2026.4.1", "OpenVINO: ONNX frontend, dequantize_linear.cpp"),
    weights_alone=WeightsAlone(
        types=("int4", "uint4", "int8", "uint8"),
        rounded="FullyConnected with a stored weight rounds the activations to int8 by group at run time",
        exact="for float activations compile with EXECUTION_MODE_HINT=ACCURACY or DYNAMIC_QUANTIZATION_GROUP_SIZE=0",
        because="FullyConnected i8, u8, i4 or u4, on either layout; with one column in float",
        columns=2,
    ),
    refuses=("int2", "uint2"),
    whole_blocks=True,
    saturates="on x86 without VNNI (AVX2, and AVX-512 before 2019)",
    reads=(10, 28),
    lacks=dict.fromkeys(("LSTM", "GRU"), "RNNSeq in float; codes as weights do not compile beside quantized tensors"),
    float_weights=("LSTM", "GRU"),  # rnn.cpp: "expects Constant for port 4"
    strips=("uint16", "int16"),  # qdq_stripping.cpp, where all are on one grid on both sides
)
