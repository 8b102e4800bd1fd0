"""Which of a checkpoint's schemes vLLM has no kernel for.

Source: ``CompressedTensorsConfig._get_scheme_from_parts`` of vLLM 0.32 and the kernels that it chooses from
(``model_executor/kernels/linear``), those for the CPU and Marlin, Machete and Cutlass; Humming, which is installed
apart, is left out.
"""

from typing import Final

from graphq.spec.formats import Float, Int, Mx, Nvfp4
from graphq.spec.quant import PerChannel, PerGroup, PerTensor, PerToken, Quant

_PACKED_BITS: Final = (4, 8)


def unserved(weight: Quant, given: Quant | None) -> str | None:
    """Why vLLM serves no linear with such a weight and input, and the nearest that it serves; None if it does."""
    match weight.format:
        case Int(bits) if bits < 8 or given is None:
            return _packed(weight, weight.format, given)
        case Int() as format:
            return _int8(weight, format, given)
        case Float():
            return _float8(weight, given)
        case Nvfp4() if given is not None and not isinstance(given.format, Nvfp4):
            return f"{weight} beside input {given}: vLLM takes nvfp4 inputs, or float ones"
        case Mx() as format if given is not None:
            is_float8 = format.element == "float4_e2m1" and isinstance(given.format, Float) and given.dynamic
            is_same = isinstance(given.format, Mx) and given.format.element == format.element
            if not (is_same or (is_float8 and not isinstance(given.granularity, PerTensor))):
                return f"{weight} beside input {given}: vLLM takes inputs {weight}/dynamic, or float ones"
        case _:
            pass
    return None


def _packed(weight: Quant, format: Int, given: Quant | None) -> str | None:
    """Packed integers: weight-only kernels, and those for integer inputs whose scales are found as they come."""
    if format.bits not in _PACKED_BITS:
        near = "int4" if format.bits < 4 else "int8"
        return f"{weight}: vLLM has kernels for packed weights of 4 and 8 bits; write {near}"
    if not isinstance(weight.granularity, PerChannel | PerGroup):
        return f"{weight}: vLLM takes packed weights by channel or group; write channel"
    if not format.symmetric and (format.bits == 8 or given is not None):
        return f"{weight}: vLLM takes zero points of packed weights with 4 bits and float inputs; write a symmetric one"
    if given is None:
        return None
    if not isinstance(given.format, Int):
        return f"{weight} beside input {given}: vLLM takes integer inputs of integer weights; write int8/token/dynamic"
    is_by_token = given.dynamic and isinstance(given.granularity, PerToken | PerGroup)
    if not is_by_token or not given.format.symmetric or given.format.bits not in _PACKED_BITS:
        return f"input {given}: beside packed weights vLLM takes int8/token/dynamic"
    return None


def _int8(weight: Quant, format: Int, given: Quant | None) -> str | None:
    """Codes of 8 bits beside integer inputs."""
    assert given is not None
    if not isinstance(given.format, Int) or given.format.bits != 8:
        return f"{weight} beside input {given}: vLLM takes integer inputs of 8 bits; write int8/token/dynamic"
    if not format.symmetric or not isinstance(weight.granularity, PerTensor | PerChannel):
        return f"{weight}: beside integer inputs vLLM takes symmetric weights by tensor or channel; write int8/channel"
    if not isinstance(given.granularity, PerToken if given.dynamic else PerTensor):
        return f"input {given}: vLLM takes int8/token/dynamic, or static int8/tensor"
    return None


def _float8(weight: Quant, given: Quant | None) -> str | None:
    if isinstance(weight.granularity, PerGroup):
        return f"{weight}: vLLM takes float8 weights by tensor, channel or block; write float8_e4m3fn/channel"
    if given is not None and not isinstance(given.format, Float):
        return (
            f"{weight} beside input {given}: vLLM takes float8 inputs, or float ones; write float8_e4m3fn/token/dynamic"
        )
    return None
