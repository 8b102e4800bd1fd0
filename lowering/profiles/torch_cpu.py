"""``torch-cpu``: graphq's own torch modules on x86-64, whose convolutions and linears are oneDNN's.

A kernel takes uint8 codes, and gives floats or codes of any grid: nothing but what a product reads has to be quantized.
"Of float's time": one thread, AVX-512 with VNNI, torch 2.13 in eager mode, codes in and out.
"""

from typing import Final

from graphq.spec.profile import OpRule, Profile, int_activations, op_types, same_types
from graphq.spec.quant import parse_quant

_TYPES: Final = ("uint8", "int8/asym", "int8")
_WEIGHTED: Final = op_types(*(f"{x} x int8/{g} -> {x}" for x in _TYPES for g in ("channel", "tensor")))
_MOVED: Final = (
    *("Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Expand", "Tile", "Gather"),
    *("DepthToSpace", "SpaceToDepth", "Concat", "Resize"),
)
_ENDS: Final = ("Relu", "Clip", "Silu", "HardSwish")

TORCH_CPU: Final = Profile(
    name="torch-cpu",
    consumer="graphq's torch target on x86-64",
    activations=int_activations(*_TYPES),
    weight=parse_quant("int8/channel"),
    ops={
        "Conv": OpRule(
            _WEIGHTED,
            output="optional",
            because="qconv_pointwise, 0.2 to 0.3 of float's time (depthwise 0.8 to 0.9); up to 0.5 where the picture is"
            " small and the zero point not 0",
        ),
        "Linear": OpRule(
            _WEIGHTED, output="optional", because="qlinear_pointwise, 0.25 of float's time", run_time_scales=True
        ),
        "MaxPool": OpRule(
            same_types(_TYPES),
            output="same",
            placed="through",
            because="quantized::max_pool2d, 0.2 of float's time",
            passes=True,
        ),
        **{
            kind: OpRule(
                same_types(_TYPES), output="same", placed="through", because="moves a quarter of the bytes", passes=True
            )
            for kind in _MOVED
        },
    },
    fuses=(
        *((kind, end) for kind in ("Conv", "Linear") for end in _ENDS),
        *(("Linear", end) for end in ("Gelu", "LeakyRelu", "Tanh")),
        ("Conv", "Add"),
        ("Conv", "Add", "Relu"),
    ),
    sources=("oneDNN's kernels in torch 2.13: aten/src/ATen/native/quantized/cpu/qconv.cpp, qlinear.cpp",),
    saturates="on x86 without VNNI (AVX2, and AVX-512 before 2019), where graphq computes in float",
)
