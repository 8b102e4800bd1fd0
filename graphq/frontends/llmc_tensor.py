"""One tensor's section of an LLMC config (``weight``, ``act``, ``kvcache``) as a ``Quant``.

LLMC hands these keys to a quantizer that swallows those it does not know. Here a key that would change the numbers in a
way graphq does not have is refused by name, and a key without effect is noted.
"""

from collections.abc import Sequence
from typing import Final, Literal

from graphq.formats import MIN_BITS, Int
from graphq.frontends.document import Section, show
from graphq.plan import ACTIVATION_BITS, MAX_WEIGHT_BITS
from graphq.quant import PerChannel, PerGroup, PerTensor, PerToken, Quant

Role = Literal["weight", "act", "kvcache"]

_LEARNING: Final = ("Awq", "OmniQuant", "NormTweaking", "TesseraQ")  # calib_algo learnable and ste are part of these
_TENSOR: Final = ("bit", "symmetric", "granularity", "group_size", "calib_algo", "quant_type", "int_range", "round_zp")
_OF_ROLE: Final[dict[Role, tuple[str, ...]]] = {
    "weight": (),
    "act": ("static",),
    "kvcache": ("static", "method", "special", "residual_length"),
}
_BITS: Final[dict[Role, tuple[int, ...]]] = {
    "weight": tuple(range(MIN_BITS, MAX_WEIGHT_BITS + 1)),
    "act": ACTIVATION_BITS,
    "kvcache": tuple(range(MIN_BITS, MAX_WEIGHT_BITS + 1)),
}
_GRANULARITIES: Final[dict[Role, tuple[str, ...]]] = {
    "weight": ("per_tensor", "per_channel", "per_group"),
    "act": ("per_tensor", "per_token"),
    "kvcache": ("per_tensor", "per_token"),
}
_REFUSED: Final = {
    **dict.fromkeys(("w_1", "w_2", "bit4", "bit8"), "a weight of two levels"),
    **dict.fromkeys(("use_qtorch", "float_range"), "a float format"),
    **dict.fromkeys(("quant_attn", "quant_softmax", "quant_act_fn"), "quantization of anything but linear layers"),
}
_UNUSED: Final = {
    **dict.fromkeys(("need_pack", "pack_version", "pack_mode", "save_fp", "save_autogptq"), "the target decides"),
    **dict.fromkeys(("mse_b_num", "maxshrink", "mse_grid"), "an option of calib_algo mse"),
    **dict.fromkeys(("lp_norm", "beta", "kappa", "iters"), "an option of calib_algo hqq"),
    **dict.fromkeys(("head_num", "block_size"), "an option of another granularity"),
    "bins": "an option of calib_algo static_hist",
    "qmax_to_tensor": "LLMC does not read it",
}


def read_tensor(section: Section | None, role: Role, method: str | None, static: bool = False) -> Quant | None:
    """The format of one tensor. ``static``: what holds where the section does not say."""
    if section is None:
        return None
    section.only((*_TENSOR, *_OF_ROLE[role], "ste", "ste_all", *_REFUSED, *_UNUSED))
    bits, symmetric = _read_bits(section, role), section.boolean("symmetric", required=True)
    if "static" in _OF_ROLE[role] and "static" in section.values:
        static = section.boolean("static") or False
    granularity = section.text("granularity", required=True)
    if granularity is not None and granularity not in _GRANULARITIES[role]:
        allowed = _either(_GRANULARITIES[role])
        section.report(f"{show(granularity)} is not supported; {role} takes {allowed}", "granularity")
        granularity = None
    if granularity == "per_token" and static:
        section.report("one scale for each token exists only at run time; write granularity: per_tensor", "static")
    size = _read_group_size(section, granularity)
    _check_numbers(section, bits, symmetric, static, method)
    if bits is None or symmetric is None:
        return None
    match granularity:
        case "per_tensor":
            return Quant(Int(bits, symmetric), PerTensor(), dynamic=role != "weight" and not static)
        case "per_channel":
            return Quant(Int(bits, symmetric), PerChannel())
        case "per_token":
            return Quant(Int(bits, symmetric), PerToken(), dynamic=True)
        case _:
            return None if size is None else Quant(Int(bits, symmetric), size)


def _read_bits(section: Section, role: Role) -> int | None:
    if isinstance(section.values.get("bit"), str):
        section.report(f"{show(section.values['bit'])}: float formats are not supported; write a number", "bit")
        return None
    bits = section.integer("bit", required=True)
    if bits is None or bits in _BITS[role]:
        return bits
    why = "48 (int4 inside int8)" if bits == 48 else str(bits)
    section.report(f"{why} is not supported; {role} takes {_either(_BITS[role])}", "bit")
    return None


def _read_group_size(section: Section, granularity: str | None) -> PerGroup | None:
    size = section.integer("group_size", required=granularity == "per_group")
    if granularity == "per_group" and size is not None:
        return section.made(lambda: PerGroup(size), "group_size")
    if size not in (None, -1):  # LLMC's samples write -1 where there are no groups
        section.unused("group_size", "the granularity is not per_group")
    return None


def _check_numbers(
    section: Section, bits: int | None, symmetric: bool | None, static: bool, method: str | None
) -> None:
    """Reports what would change the numbers and is not supported; notes what has no effect."""
    for key, value in section.values.items():
        if key in _UNUSED:
            section.unused(key, _UNUSED[key])
        elif key in _REFUSED and value not in (False, None, {}):
            section.report(f"{_REFUSED[key]} is not supported", key)
    ranges = ["minmax", *["static_minmax"] * static]
    ranges += ["learnable"] * (method in _LEARNING) + ["hqq"] * (method == "HQQ")
    chosen = section.text("calib_algo")
    if chosen is not None and chosen not in ranges:
        section.report(f"{show(chosen)} is not supported; write {_either(ranges)}", "calib_algo")
    for key in ("ste", "ste_all"):
        if section.boolean(key) and method not in _LEARNING:
            section.report("straight-through rounding is part of methods that learn, and of no other", key)
    if section.boolean("round_zp") is False:
        section.report("a float zero point is not supported; write True, or leave it out", "round_zp")
    check_quant_type(section)
    if "int_range" in section.values and bits is not None and symmetric is not None:
        whole = [-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if symmetric else [0, 2**bits - 1]
        if section.values["int_range"] != whole:
            section.report(f"only the whole range is supported: {whole}", "int_range")


def check_quant_type(section: Section) -> None:
    """Reports a ``quant_type`` other than integers."""
    word = section.text("quant_type")
    if word is not None and word != "int-quant":
        section.report(f"{show(word)} is not supported; write int-quant", "quant_type")


def _either(words: Sequence[str | int]) -> str:
    return " or ".join(filter(None, (", ".join(map(str, words[:-1])), str(words[-1]))))
