"""The presets of compressed-tensors 0.19, quantization/quant_scheme.py, and a modifier's observers on top of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

from graphq.frontends.document import Section, nearest, show
from graphq.frontends.llm_compressor.args import weight_quant
from graphq.frontends.llm_compressor.observer import method_of
from graphq.spec.formats import Float, Int, Mx, Nvfp4
from graphq.spec.plan import Decision, KeepFloat, Plan
from graphq.spec.quant import PerBlock, PerChannel, PerGroup, PerTensor, PerToken, Quant

UNQUANTIZED: Final = KeepFloat("UNQUANTIZED")
_E4M3: Final = Float("float8_e4m3fn")
_NVFP4: Final = weight_quant(Nvfp4(), PerGroup(16))
_TOKEN_FP8: Final = Quant(_E4M3, PerToken(), dynamic=True)


def _int(bits: int, act_bits: int | None = None) -> Plan:
    act = None if act_bits is None else Quant(Int(act_bits, True, "half"), PerToken(), dynamic=True)
    return Plan(weight_quant(Int(bits, True, "half"), PerGroup(128)), act)


def _mx(format: Mx) -> tuple[Plan, Plan]:
    """Weights alone, and weights and activations."""
    weight = Quant(format, PerGroup(32))
    return Plan(weight), Plan(weight, Quant(format, PerGroup(32), dynamic=True))


_W8A8: Final = Plan(
    weight_quant(Int(8, True, "half"), PerChannel()), Quant(Int(8, True, "half"), PerToken(), dynamic=True)
)
PRESETS: Final[Mapping[str, Decision]] = {
    "UNQUANTIZED": UNQUANTIZED,
    **{f"W{bits}A16": _int(bits) for bits in range(2, 9)},
    "W4A16_ASYM": Plan(weight_quant(Int(4, symmetric=False, joint=True), PerGroup(128))),
    **{f"W{bits}A8": _int(bits, 8) for bits in range(2, 8)},
    **{f"W{bits}A4": _int(bits, 4) for bits in range(2, 5)},
    "W8A8": _W8A8,
    "INT8": _W8A8,
    "W4AFP8": Plan(weight_quant(Int(4, True, "half"), PerGroup(128)), _TOKEN_FP8),
    "FP8": Plan(weight_quant(_E4M3, PerTensor()), Quant(_E4M3, PerTensor())),
    "FP8_DYNAMIC": Plan(weight_quant(_E4M3, PerChannel()), _TOKEN_FP8),
    "FP8_BLOCK": Plan(weight_quant(_E4M3, PerBlock(128, 128)), Quant(_E4M3, PerGroup(128), dynamic=True)),
    "NVFP4A16": Plan(_NVFP4),
    "NVFP4": Plan(_NVFP4, Quant(Nvfp4(), PerGroup(16))),
    **dict(zip(("MXFP4A16", "MXFP4"), _mx(Mx("float4_e2m1", "even")), strict=True)),
    **dict(zip(("MXFP8A16", "MXFP8"), _mx(Mx("float8_e4m3fn", "even")), strict=True)),
}


@final
@dataclass(frozen=True)
class Observers:
    """What a modifier says of the observers of all its groups."""

    weights: str | None = None
    input: str | None = None


def is_preset(word: str) -> bool:
    """Whether this names a preset; case does not count."""
    return word.upper() in PRESETS


def read_preset(section: Section, word: str, key: str, observers: Observers) -> Decision | None:
    """The preset of this name, which stands at ``key``; an observer that the modifier names stands above its own."""
    if not is_preset(word):
        section.report(f"{show(word)} is not a preset{nearest(word, PRESETS)}", key)
        return None
    decision = PRESETS[word.upper()]
    return section.made(lambda: _observed(decision, observers), key)


def _observed(decision: Decision, observers: Observers) -> Decision:
    if not isinstance(decision, Plan):
        return decision
    weight, act = decision.weight, decision.input
    if weight is not None and observers.weights is not None:
        weight = weight_quant(weight.format, weight.granularity, method_of(observers.weights, "weights"))
    if act is not None and not act.dynamic and observers.input is not None:
        act = Quant(act.format, act.granularity, method=method_of(observers.input, "input_activations"))
    return Plan(weight, act)
