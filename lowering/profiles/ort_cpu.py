"""``ort-cpu``: ONNX Runtime's CPU execution provider on x86-64.

Rows were seen in optimized graphs of ONNX Runtime 1.31.1. "Of float's time": one thread, codes in and out, against the
float op (benchmarks/onnx_op_times.py, AVX-512 with VNNI): an op is placed where it is faster in integers. Activations
are uint8. What its passes do on the way: int8 that one op alone reads becomes uint8, and no kernel on x86 multiplies
int8 that stays; a MatMul and the Add of a vector become a Gemm; codes go through Reshape, Transpose, Squeeze,
Unsqueeze, Slice and MaxPool, either way, and not through what only moves elements besides.
"""

from typing import Final

from graphq.spec.profile import GEMM, OpRule, Profile, WeightsAlone, int_activations, op_types, same_types
from graphq.spec.quant import parse_quant

_TYPES: Final = ("uint8", "int8/asym", "int8")
_U8: Final = same_types(_TYPES)
_CONV: Final = op_types(
    "uint8 x int8/channel -> uint8",
    "uint8 x int8/tensor -> uint8",
    "int8/asym x int8/channel -> int8/asym",
    "int8 x int8/channel -> int8",
    "int8 x int8/tensor -> int8",
)
_CONV_ALSO: Final = op_types(
    *(f"uint8 x {w}/{g} -> uint8" for w in ("uint8", "int8/asym") for g in ("channel", "tensor"))
)
_MOVED: Final = same_types(["uint16", "int16/asym"])  # as they are: nothing is computed
_MATMUL: Final = op_types("uint8 x uint8 -> uint8", "uint8 x int8 -> uint8", "int8 x int8 -> int8")
_MATMUL_ALSO: Final = op_types("uint8 x int8/asym -> uint8")

ORT_CPU: Final = Profile(
    name="ort-cpu",
    consumer="ONNX Runtime's CPU execution provider on x86-64",
    activations=int_activations(*_TYPES),
    weight=parse_quant("int8/channel"),
    ops={
        "Conv": OpRule(
            _CONV,
            bias="int32",
            because="QLinearConv, 0.28 to 0.31 of float's time (depthwise 1.3); float without a quantized output",
            also=_CONV_ALSO,
            one_reader=True,
            retyped_alone=True,
            run_time_weights=True,
        ),
        "Linear": OpRule(
            _CONV,
            output="optional",
            because="MatMulIntegerToFloat, 0.28 of float's time; 0.43 in a ViT, whose quantizers count",
            also=_CONV_ALSO,
            retyped_alone=True,
            run_time_scales=True,
        ),
        GEMM: OpRule(
            _CONV,
            output="optional",
            bias="int32",
            because="QGemm, 0.31 of float's time; float, where neither the output nor the bias is quantized",
            also=_CONV_ALSO,
            retyped_alone=True,
            bias_needed="float output",
            bias_checked=False,
            attributes={"alpha": (1.0,), "beta": (1.0,)},
        ),
        "MatMul": OpRule(
            _MATMUL,
            output="optional",
            placed="never",
            because="QLinearMatMul, 0.75 to 0.81 of float's time, which quantizing both operands takes back",
            also=_MATMUL_ALSO,
            retyped_alone=True,
        ),
        "Add": OpRule(
            _U8,
            placed="between",
            because="QLinearAdd, as fast as float; a ViT's residual sums are slower",
            one_reader=True,
        ),
        "Mul": OpRule(_U8, placed="between", because="QLinearMul, 1.4 of float's time", one_reader=True),
        "Where": OpRule(_U8, placed="never", because="QLinearWhere", one_reader=True, float_constants=True),
        "Concat": OpRule(
            _U8,
            placed="between",
            because="QLinearConcat, 0.35 of float's time; its operands may have scales of their own",
            one_reader=True,
        ),
        "AveragePool": OpRule(
            _U8, placed="never", because="QLinearAveragePool, 10 times float's time", one_reader=True
        ),
        "GlobalAveragePool": OpRule(
            _U8, placed="between", because="QLinearGlobalAveragePool, 0.32 of float's time", one_reader=True
        ),
        "MaxPool": OpRule(
            _U8,
            output="same",
            placed="between",
            because="NHWC between convolutions; in NCHW 16 times float's time",
            passes=True,
            lifts=True,
            one_reader=True,
            outputs=1,
        ),
        "Resize": OpRule(
            _U8,
            output="same",
            placed="between",
            because="nearest takes uint8 as it is, 1.5 of float's time",
            one_reader=True,
            attributes={"mode": ("nearest",)},
        ),
        "Sigmoid": OpRule(_U8, placed="never", because="QLinearSigmoid, 0.84 of float's time", one_reader=True),
        "LeakyRelu": OpRule(_U8, placed="between", because="QLinearLeakyRelu, 1.5 of float's time", one_reader=True),
        "Softmax": OpRule(_U8, placed="never", because="QLinearSoftmax, 6.4 of float's time", one_reader=True),
        **{
            kind: OpRule(
                _U8,
                output="same",
                placed="between",
                because="moves codes, 0.4 to 0.6 of float's time",
                also=_MOVED,
                passes=True,
                lifts=True,
                one_reader=True,
            )
            for kind in ("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze")
        },
        **{
            kind: OpRule(
                _U8,
                output="same",
                placed="between",
                because="moves codes where both sides are quantized, 0.4 to 0.6 of float's time",
                also=_MOVED if kind in ("Expand", "Tile", "Gather", "Flatten") else (),
                one_reader=True,
            )
            for kind in ("Split", "Expand", "Tile", "Gather", "Flatten", "DepthToSpace", "ReduceMax", "ReduceMin")
        },
    },
    fuses=(("Conv", "Relu"), ("Conv", "Clip"), ("Linear", "Relu"), ("Add", "Relu")),
    linear="matmul",
    dynamic="matmul_integer",
    weight_only="matmul_nbits",
    sources=(
        "optimized graphs and times of ONNX Runtime 1.31.1",
        "onnxruntime: qdq_selectors.cc, matmul_add_fusion.cc",
    ),
    clamps="covered",
    folds_bias=True,
    retypes={"int8": "uint8"},
    weights_alone=WeightsAlone(
        types=("int2", "uint2", "int4", "uint4", "int8", "uint8"),
        gemm=False,
        smallest_block=16,
        power_of_two=True,
        dequantized=False,
        rounded="MatMulNBits in a default session rounds the activations to int8 by block (accuracy level 4)",
        exact="for float activations write com.microsoft.MatMulNBits with accuracy_level 0, or set"
        " session.qdq_matmulnbits_accuracy_level",
        because="DequantizeLinear and MatMul become MatMulNBits; Gemm's transposed weight does not",
    ),
    operators=(
        *("QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat"),
        *("DynamicQuantizeMatMul", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearAveragePool"),
        *("QLinearGlobalAveragePool", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "QLinearWhere"),
        *("MatMulNBits", "GatherBlockQuantized"),
    ),
    opset=17,  # LayerNormalization as one op: no pass of its fuses the parts that stand for it below
    splits_norms=True,
    saturates="on x86 without VNNI (AVX2, and AVX-512 before 2019)",
    reads=(10, 26),
    scales=("float32",),
    overridable=True,
    lacks={
        "LSTM": "float, 1.1 to 1.4 of its time where the weights are codes; DynamicQuantizeLSTM, 0.25 to 0.35, rounds"
        " states by what rows share a thread",
        "GRU": "float; it has no form in integers",
    },
)
