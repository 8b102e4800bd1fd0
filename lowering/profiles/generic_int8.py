"""``generic-int8``: every tensor between ops in eight bits, for a toolchain that has no profile of its own.

uint8 activations with a zero point, int8 weights by channel, an int32 bias at the scale of the products, one grid for
all that only moves elements: what the ONNX operator specification and all importers of QDQ models hold.
"""

from typing import Final

from graphq.lowering.profiles.whole_graph import ANY, FORMATS, FUSES, OPS, STEPS
from graphq.spec.profile import OpRule, Profile, int_activations, op_types
from graphq.spec.quant import parse_quant

_WEIGHTED: Final = op_types("uint8 x int8/channel -> uint8", "uint16 x int8/channel -> uint16")
_NORMS: Final = (
    *("LayerNormalization", "InstanceNormalization", "GroupNormalization", "BatchNormalization", "RMSNormalization"),
)

GENERIC_INT8: Final = Profile(
    name="generic-int8",
    consumer="any importer of QDQ models",
    activations=int_activations(*FORMATS),
    weight=parse_quant("int8/channel"),
    ops={
        **{kind: OpRule(_WEIGHTED, bias="int32") for kind in ("Conv", "ConvTranspose", "Linear")},
        **{kind: OpRule(ANY) for kind in (*_NORMS, "Erf")},
        **OPS,
    },
    fuses=FUSES,
    sources=("ONNX operator specification, QuantizeLinear and DequantizeLinear",),
    whole=True,
    steps=STEPS,
)
