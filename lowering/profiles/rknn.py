"""``rknn``: Rockchip's NPUs (RK3562, RK3566, RK3568, RK3576, RK3588), through RKNN-Toolkit2.

``asymmetric_quantized-8``: int8 activations with a zero point, int8 weights by output channel. The toolkit calibrates
by itself; it also reads models that are quantized already, of which its changelog says no more than that support of
QAT models of PyTorch and ONNX is improved (2.0.0). None of it was run here:
every row is unverified but for types.
"""

from typing import Final

from graphq.spec.profile import OpRule, Profile, int_activations, op_types, same_types
from graphq.spec.quant import parse_quant

_S8: Final = same_types(["int8/asym"])
_WEIGHTED: Final = op_types("int8/asym x int8/channel -> int8/asym", "int8/asym x int8/tensor -> int8/asym")
_LISTED: Final = "unverified: the changelog names it among ops of the NPU"
_TYPES: Final = "int8 by output channel since 1.0.0; reading QDQ is unverified"

RKNN: Final = Profile(
    name="rknn",
    consumer="RKNN-Toolkit2",
    activations=int_activations("int8/asym"),
    weight=parse_quant("int8/channel"),
    ops={
        **{kind: OpRule(_WEIGHTED, bias="int32", because=_TYPES) for kind in ("Conv", "ConvTranspose", "Linear")},
        "MatMul": OpRule(op_types("int8/asym x int8/asym -> int8/asym"), because=_LISTED),
        **{
            kind: OpRule(_S8, because=_LISTED)
            for kind in (
                *("Add", "Mul", "Sub", "Div", "Max", "Min", "Where", "AveragePool", "GlobalAveragePool"),
                *(
                    "Sigmoid",
                    "Softmax",
                    "HardSigmoid",
                    "HardSwish",
                    "Elu",
                    "Gelu",
                    "LayerNormalization",
                    "Relu",
                    "Clip",
                ),
                *("LeakyRelu", "PRelu", "ReduceMax", "ReduceMean"),
            )
        },
        "Concat": OpRule(_S8, output="same", because="unverified: one grid needs no second rounding on any hardware"),
        **{
            kind: OpRule(_S8, output="same", because=_LISTED)
            for kind in ("MaxPool", "Resize", "Pad", "Reshape", "Transpose", "Gather")
        },
        **{
            kind: OpRule(_S8, output="same", because="unverified: moves codes")
            for kind in ("Slice", "Split", "Squeeze", "Unsqueeze", "Flatten", "Expand", "DepthToSpace", "SpaceToDepth")
        },
    },
    fuses=(
        *(("Conv", "Relu"), ("Conv", "Clip"), ("Conv", "Sigmoid"), ("Conv", "HardSwish"), ("Conv", "Gelu")),
        *(("ConvTranspose", "Relu"), ("Linear", "Relu"), ("Add", "Relu")),
    ),
    static=True,
    opsets=(13, 19),
    sources=(
        "airockchip/rknn-toolkit2: CHANGELOG.md (1.0 per channel, 1.5.0 fused activations, 1.6.0 opsets 12 to 19)",
        "airockchip/rknn-toolkit2: issues 292, 515",
    ),
    whole=True,
)
