"""One tensor's section of an LLMC config (``weight``, ``act``, ``kvcache``) as a ``Quant``, and back.

LLMC hands these keys to a quantizer that swallows those it does not know. Here a key that would change the numbers in a
way graphq does not have is refused by name, and a key without effect is noted.
"""

import dataclasses
from typing import Final

from graphq.frontends.document import Plain, Section, show
from graphq.frontends.llmc.format import BITS, TWO_LEVELS_BIT, Around, Role, either, read_format, write_format
from graphq.spec.formats import Float, Int, is_asymmetric
from graphq.spec.quant import (
    Granularity,
    Histogram,
    Hqq,
    MinMax,
    MovingAverage,
    Mse,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    Quant,
    RangeMethod,
    granularity_name,
)

LEARNING: Final = ("Awq", "OmniQuant", "NormTweaking", "TesseraQ")  # calib_algo learnable and ste are part of these
_HQQ_FIELDS: Final = {"lp_norm": "norm", "beta": "beta", "kappa": "growth", "iters": "steps"}
HQQ_OPTIONS: Final = tuple(_HQQ_FIELDS)
MSE_NORM: Final = 2.4  # LLMC's, which cannot be set
_MSE_OPTIONS: Final = ("maxshrink", "mse_grid")
_TENSOR: Final = ("bit", "symmetric", "granularity", "group_size", "calib_algo", "quant_type", "int_range", "round_zp")
_OF_ROLE: Final[dict[Role, tuple[str, ...]]] = {
    "weight": (),
    "act": ("static",),
    "kvcache": ("static", "method", "special", "residual_length"),
}
_GRANULARITIES: Final[dict[Role, tuple[str, ...]]] = {
    "weight": ("per_tensor", "per_channel", "per_group", "per_block"),
    "act": ("per_tensor", "per_token", "per_group"),
    "kvcache": ("per_tensor", "per_token", "per_group"),
}
_TWO_LEVELS: Final = ("w_1", "w_2", "bit4", "bit8")
_REFUSED: Final = {
    **dict.fromkeys(_TWO_LEVELS, "a weight of two levels"),
    **dict.fromkeys(("quant_attn", "quant_softmax", "quant_act_fn"), "quantization of anything but linear layers"),
}
_UNUSED: Final = {
    **dict.fromkeys(("need_pack", "pack_version", "pack_mode", "save_fp", "save_autogptq"), "the target decides"),
    "mse_b_num": "it divides LLMC's search into parts",
    "bins": "graphq's histograms have 4096 bins",
    "head_num": "an option of another granularity",
    "qmax_to_tensor": "LLMC does not read it",
}
_KEYS: Final = ("block_size", "use_qtorch", "float_range", "ste", "ste_all", *HQQ_OPTIONS, *_MSE_OPTIONS)


def read_tensor(section: Section | None, role: Role, around: Around, static: bool = False) -> Quant | None:
    """The format of one tensor. ``static``: what holds where the section does not say."""
    if section is None:
        return None
    section.only((*_TENSOR, *_OF_ROLE[role], *_KEYS, *_REFUSED, *_UNUSED))
    two_levels = next((key for key in _TWO_LEVELS if section.values.get(key) not in (None, {}, False)), None)
    if two_levels and section.values.get("bit") in (None, TWO_LEVELS_BIT):  # what else it says stands at each level
        section.report(f"{_REFUSED[two_levels]} is not supported", two_levels)
        return None
    format = read_format(section, role, around)
    if "static" in _OF_ROLE[role] and "static" in section.values:
        static = section.boolean("static") or False
    granularity = _read_granularity(section, role, static)
    method = _read_range(section, role, static, format, around)
    _check_others(section, around)
    if isinstance(granularity, PerBlock) and (
        method not in (None, MinMax()) or (isinstance(format, Int) and not format.symmetric)
    ):
        section.report("per_block takes symmetric formats and calib_algo minmax", "granularity")
    if format is None or granularity is None or method is None:
        return None
    dynamic = role != "weight" and not static
    return section.made(lambda: Quant(format, granularity, dynamic, method))


def _read_granularity(section: Section, role: Role, static: bool) -> Granularity | None:
    word = section.text("granularity", required=True)
    if word is not None and word not in _GRANULARITIES[role]:
        allowed = either(_GRANULARITIES[role])
        section.report(f"{show(word)} is not supported; {role} takes {allowed}", "granularity")
        word = None
    if static and word in ("per_token", "per_group"):
        each = word.removeprefix("per_")
        section.report(f"one scale for each {each} exists only at run time; write granularity: per_tensor", "static")
        word = None if word == "per_token" else word
    size = _read_size(section, "group_size", "per_group", word)
    rows = _read_size(section, "block_size", "per_block", word)
    match word:
        case "per_tensor":
            return PerTensor()
        case "per_channel":
            return PerChannel()
        case "per_token":
            return PerToken()
        case "per_group":
            return None if size is None or static else section.made(lambda: PerGroup(size), "group_size")
        case "per_block":
            return None if rows is None else section.made(lambda: PerBlock(rows, rows), "block_size")
        case _:
            return None


def _read_size(section: Section, key: str, its: str, word: str | None) -> int | None:
    size = section.integer(key, required=word == its)
    if word != its and size not in (None, -1):  # LLMC's samples write -1 where there are no groups
        section.unused(key, f"the granularity is not {its}")
    return size if word == its else None


def _read_range(
    section: Section, role: Role, static: bool, format: Int | Float | None, around: Around
) -> RangeMethod | None:
    """The ``calib_algo``. Options of the others are noted."""
    allowed = ["minmax"]
    if role == "weight":
        allowed += ["hqq"] if around.weight_range else ["mse", "hqq"]
    elif static:
        allowed += ["static_minmax", "static_hist", "static_moving_minmax"]
    allowed += ["learnable"] * (around.method in LEARNING)
    chosen = section.text("calib_algo")
    if chosen is not None and chosen not in allowed:
        section.report(f"{show(chosen)} is not supported; write {either(allowed)}", "calib_algo")
        return None
    own = around.weight_range if role == "weight" else None
    for algorithm, options in (("mse", _MSE_OPTIONS), ("hqq", HQQ_OPTIONS)):
        for key in options:
            if key in section.values and chosen != algorithm:
                section.unused(key, f"an option of calib_algo {algorithm}")
            elif key in section.values and own:
                section.unused(key, "special has the options of HQQ")
    if own is not None:
        return own
    match chosen:
        case "mse":
            return _read_mse(section)
        case "hqq":
            return read_hqq(section)
        case "static_hist":
            if isinstance(format, Float) or (format and not format.symmetric):
                section.report("static_hist is for symmetric integers", "calib_algo")
            section.note("the same error is made least, by another search than LLMC's", "calib_algo")
            return Histogram()
        case "static_moving_minmax":
            return MovingAverage()
        case _:
            if static:
                section.note("the extremes of all batches are taken; LLMC takes the mean of each batch's", "calib_algo")
            return MinMax()


def _read_mse(section: Section) -> Mse | None:
    shrink, grid = _number(section, "maxshrink", 0.8), section.integer("mse_grid")
    grid = 100 if grid is None else grid
    if shrink is None or section.made(lambda: Mse(shrink), "maxshrink") is None:
        return None
    return section.made(lambda: mse(shrink, grid), "mse_grid")


def _number(section: Section, key: str, default: float) -> float | None:
    value = section.values.get(key, default)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    section.report(f"{show(value)} is not a number", key)
    return None


def mse(shrink: float, grid: int) -> Mse:
    """LLMC's search, which tries all candidates: it never gives up. Raises ``SpecError``."""
    tried = Mse(shrink, grid, MSE_NORM, 1)  # so that what is multiplied is known to be in bounds
    return Mse(shrink, grid, MSE_NORM, max(1, int(tried.shrink * tried.grid)))


def read_hqq(section: Section) -> Hqq:
    """The options of HQQ, which stand under ``special`` with the method, else beside ``calib_algo: hqq``."""
    found = Hqq()
    for key, name in _HQQ_FIELDS.items():
        value = section.integer(key) if key == "iters" else _number(section, key, getattr(found, name))
        if value is not None and section.made(lambda k=name, v=value: dataclasses.replace(Hqq(), **{k: v}), key):
            found = dataclasses.replace(found, **{name: value})
    if found.growth != 1 and "kappa" in section.values:
        section.note("beta grows by it, as documented; in LLMC's code it has no effect", "kappa")
    return found


def _check_others(section: Section, around: Around) -> None:
    """Reports what would change the numbers and is not supported; notes what has no effect."""
    for key, value in section.values.items():
        if key in _UNUSED:
            section.unused(key, _UNUSED[key])
        elif key in _REFUSED and value not in (False, None, {}):
            section.report(f"{_REFUSED[key]} is not supported", key)
    for key in ("ste", "ste_all"):
        if section.boolean(key) and around.method not in LEARNING:
            section.report("straight-through rounding is part of methods that learn, and of no other", key)
    if section.boolean("round_zp") is False:
        if around.method == "HQQ":
            section.note("zero points are integers here; the search knows it", "round_zp")
        else:
            section.report("a float zero point is not supported; write True, or leave it out", "round_zp")


def write_tensor(quant: Quant, role: Role, *, static: bool = False, hqq: bool = False) -> dict[str, Plain] | str:
    """The section that ``read_tensor`` reads ``quant`` from; or why there is none.

    ``static``: what holds where the section does not say. ``hqq``: the method is HQQ, which has the range's options.
    """
    if quant.granularity == PerToken() and not quant.dynamic:
        return "one scale for each token exists only at run time"
    keys = write_format(quant.format)
    if isinstance(keys, str):
        return keys
    if isinstance(quant.format, Int) and quant.format.bits not in BITS[role]:
        return f"{role} takes {either(BITS[role])} bits"
    match quant.granularity:
        case PerGroup(size):
            keys |= {"granularity": "per_group", "group_size": size}
        case PerBlock(rows, columns):
            if rows != columns or quant.method != MinMax() or is_asymmetric(quant.format):
                return "LLMC's blocks are square and symmetric, of min-max range"
            keys |= {"granularity": "per_block", "block_size": rows}
        case other:
            keys["granularity"] = f"per_{granularity_name(other)}"
    if keys["granularity"] not in _GRANULARITIES[role]:
        return f"{role} takes {either(_GRANULARITIES[role])}"
    if role != "weight" and not quant.dynamic and quant.granularity != PerTensor():
        return "one scale for each group exists only at run time"
    if role != "weight" and static == quant.dynamic:
        keys["static"] = not quant.dynamic
    found = _write_range(quant, role, hqq)
    return found if isinstance(found, str) else keys | found


def _write_range(quant: Quant, role: Role, hqq: bool) -> dict[str, Plain] | str:
    match quant.method:
        case MinMax():
            return {}
        case Mse(shrink, grid) as method if role == "weight" and method == mse(shrink, grid):
            options: dict[str, Plain] = {"maxshrink": shrink, "mse_grid": grid} if method != mse(0.8, 100) else {}
            return {"calib_algo": "mse", **options}
        case Hqq() as method if role == "weight":
            return {} if hqq else {"calib_algo": "hqq", **write_hqq(method)}
        case Histogram() if role != "weight" and isinstance(quant.format, Int) and quant.format.symmetric:
            return {"calib_algo": "static_hist"}
        case MovingAverage() as method if role != "weight" and method == MovingAverage():
            return {"calib_algo": "static_moving_minmax"}
        case method:
            return f"LLMC has no range {method} for it"


def write_hqq(method: Hqq) -> dict[str, Plain]:
    """The options that ``read_hqq`` reads."""
    return {key: getattr(method, name) for key, name in _HQQ_FIELDS.items()}
