"""What the tables of consumers share that run whole graphs of unsigned codes, with quantized outputs, in integers."""

from collections.abc import Mapping
from typing import Final

from graphq.spec.profile import FixedGrid, OpRule, op_types, same_types

FORMATS: Final = ("uint8", "uint16")
ANY: Final = same_types(FORMATS)
STEPS: Final = 64  # of recurrences: some 15 ops each
PAIRS: Final = op_types("uint8 x uint8 -> uint8", "uint16 x uint8 -> uint16", "uint16 x uint16 -> uint16")
_UNIT: Final = {"uint8": FixedGrid(1 / 256, 0), "uint16": FixedGrid(1 / 65536, 0)}
_BOTH_SIGNS: Final = {"uint8": FixedGrid(1 / 128, 128), "uint16": FixedGrid(1 / 32768, 32768)}

_OWN: Final = (
    *("Add", "Sub", "Mul", "Div", "Concat", "AveragePool", "GlobalAveragePool", "ReduceMean", "Pad"),
    *("Gelu", "HardSwish", "HardSigmoid", "LeakyRelu", "PRelu", "Elu", "Relu", "Clip", "Sqrt", "Exp", "Pow"),
    *("GridSample", "Resize"),
)
_SAME: Final = (
    *("Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Expand", "Tile", "Gather", "MaxPool"),
    *("DepthToSpace", "SpaceToDepth", "Embedding"),
)

# Products of activations, what computes element by element or over windows, what moves elements, fixed grids.
OPS: Final[Mapping[str, OpRule]] = {
    "MatMul": OpRule(PAIRS),
    **{kind: OpRule(ANY) for kind in _OWN},
    **{kind: OpRule(ANY, output="same") for kind in _SAME},
    "Softmax": OpRule(ANY, grids=_UNIT),
    "Sigmoid": OpRule(ANY, grids=_UNIT),
    "Tanh": OpRule(ANY, grids=_BOTH_SIGNS),
}
FUSES: Final = (("Conv", "Relu"), ("Conv", "Clip"), ("ConvTranspose", "Relu"), ("Linear", "Relu"), ("Add", "Relu"))
