"""``vitis-ai``: AMD's Vitis AI execution provider on Ryzen AI, CNNs in XINT8.

Scales are powers of two, of least squared error unless a spec says otherwise, codes symmetric, one scale for a tensor,
weights too. What is not in integers runs on the CPU:
the provider cuts the graph. Transformers run there in bfloat16, which is no profile. None of it was run here.
"""

from typing import Final

from graphq.spec.profile import OpRule, Profile, int_activations, op_types, same_types
from graphq.spec.quant import Histogram, parse_quant

_TYPES: Final = ("int8", "uint8")
_ANY: Final = same_types(_TYPES)
_WEIGHTED: Final = op_types("int8 x int8/tensor -> int8", "uint8 x int8/tensor -> uint8")
_QUARK: Final = "Quark's XINT8 preset: symmetric, by power of two, per tensor"
_UNVERIFIED: Final = "unverified: Quark quantizes it, AMD publishes no list of ops of the NPU"

VITIS_AI: Final = Profile(
    name="vitis-ai",
    consumer="Vitis AI's execution provider on Ryzen AI",
    activations=int_activations(*_TYPES),
    weight=parse_quant("int8/pow2/tensor/mse0.2:100:2:5"),  # squared errors, as PowerOfTwoMethod.MinMSE
    ops={
        **{
            kind: OpRule(_WEIGHTED, bias="int32", because=_QUARK + "; a bias of int8 with VINT8 (unverified)")
            for kind in ("Conv", "ConvTranspose", "Linear")
        },
        **{kind: OpRule(_ANY, because=_QUARK) for kind in ("Add", "Mul", "AveragePool", "GlobalAveragePool")},
        **{
            kind: OpRule(_ANY, because=_UNVERIFIED)
            for kind in (
                "Sub",
                "Relu",
                "Clip",
                "LeakyRelu",
                "PRelu",
                "HardSigmoid",
                "HardSwish",
                "Softmax",
                "ReduceMean",
            )
        },
        "Concat": OpRule(_ANY, output="same", because="Quark: AlignConcat gives operands and output one scale"),
        **{kind: OpRule(_ANY, output="same", because=_QUARK) for kind in ("MaxPool", "Pad", "Resize")},
        **{
            kind: OpRule(_ANY, output="same", because="moves codes")
            for kind in (
                *("Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Flatten"),
                *("DepthToSpace", "SpaceToDepth"),
            )
        },
    },
    fuses=(("Conv", "Relu"), ("Conv", "Clip"), ("ConvTranspose", "Relu"), ("Linear", "Relu"), ("Add", "Relu")),
    power_of_two=True,
    range=Histogram(),
    static=True,
    opsets=(13, 17),
    sources=(
        "Ryzen AI documentation: Model Compatibility (opset 17 is recommended; CNNs in INT8 or BF16)",
        "AMD Quark: quark/onnx/quantization/config/custom_config.py, XINT8, VINT8, A8W8; quant_utils.py, MinMSE",
        "Vitis AI User Guide (UG1414): non-overflow saturates nothing, min-diffs takes the smallest difference",
    ),
    whole=True,
)
