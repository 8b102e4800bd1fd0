"""``generic-int8``: every tensor between ops in eight bits, for a toolchain that has no profile of its own.

uint8 activations with a zero point, int8 weights by channel, an int32 bias at the scale of the products, one grid for
all that only moves elements: what the ONNX operator specification and all importers of QDQ models hold.
"""

from typing import Final

from graphq.spec.profile import FixedGrid, OpRule, Profile, int_activations, op_types, same_types
from graphq.spec.quant import parse_quant

_FORMATS: Final = ("uint8", "uint16")
_ANY: Final = same_types(_FORMATS)
_WEIGHTED: Final = op_types("uint8 x int8/channel -> uint8", "uint16 x int8/channel -> uint16")
_PAIRS: Final = op_types("uint8 x uint8 -> uint8", "uint16 x uint8 -> uint16", "uint16 x uint16 -> uint16")
_UNIT: Final = {"uint8": FixedGrid(1 / 256, 0), "uint16": FixedGrid(1 / 65536, 0)}

_OWN: Final = (
    *("Add", "Sub", "Mul", "Div", "Concat", "AveragePool", "GlobalAveragePool", "ReduceMean", "Pad"),
    *("LayerNormalization", "InstanceNormalization", "GroupNormalization", "BatchNormalization", "RMSNormalization"),
    *("Gelu", "HardSwish", "HardSigmoid", "LeakyRelu", "PRelu", "Elu", "Relu", "Clip", "Sqrt", "Exp", "Pow"),
    *("GridSample", "Resize", "Erf"),
)
_SAME: Final = (
    *("Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Expand", "Tile", "Gather", "MaxPool"),
    *("DepthToSpace", "SpaceToDepth", "Embedding"),
)

GENERIC_INT8: Final = Profile(
    name="generic-int8",
    consumer="any importer of QDQ models",
    activations=int_activations(*_FORMATS),
    weight=parse_quant("int8/channel"),
    ops={
        **{kind: OpRule(_WEIGHTED, bias="int32") for kind in ("Conv", "ConvTranspose", "Linear")},
        "MatMul": OpRule(_PAIRS),
        **{kind: OpRule(_ANY) for kind in _OWN},
        **{kind: OpRule(_ANY, output="same") for kind in _SAME},
        "Softmax": OpRule(_ANY, grids=_UNIT),
        "Sigmoid": OpRule(_ANY, grids=_UNIT),
        "Tanh": OpRule(_ANY, grids={"uint8": FixedGrid(1 / 128, 128), "uint16": FixedGrid(1 / 32768, 32768)}),
    },
    fuses=(("Conv", "Relu"), ("Conv", "Clip"), ("ConvTranspose", "Relu"), ("Linear", "Relu"), ("Add", "Relu")),
    sources=("ONNX operator specification, QuantizeLinear and DequantizeLinear",),
    whole=True,
)
