"""The configs that AMCT comes with, by the names it gives them."""

from collections.abc import Mapping
from typing import Final

from graphq.errors import SpecError
from graphq.frontends.document import Plain, nearest, show

_INT4: Final[dict[str, Plain]] = {"type": "int4", "symmetric": True, "strategy": "channel"}
_INT8: Final[dict[str, Plain]] = {"type": "int8", "symmetric": True, "strategy": "channel"}
_HEAD: Final[list[Plain]] = ["lm_head"]


def _tensor(name: str) -> dict[str, Plain]:
    return {"type": name, "symmetric": True, "strategy": "tensor"}


def _mx(name: str) -> dict[str, Plain]:
    return {"type": name, "symmetric": True, "strategy": "group", "group_size": 32}


def _both(weights: str, inputs: str, weight_strategy: str = "tensor") -> dict[str, Plain]:
    return {"weights": _tensor(weights) | {"strategy": weight_strategy}, "inputs": _tensor(inputs)}


_AWQ: Final[dict[str, Plain]] = {"awq": {"grids_num": 20}}
_SMOOTH: Final[dict[str, Plain]] = {"smoothquant": {"smooth_strength": 0.5}}

# name -> quant_cfg, algorithm; each calibrates on one batch and skips lm_head, but where it says otherwise below
_CONFIGS: Final[Mapping[str, tuple[dict[str, Plain], Plain]]] = {
    "INT4_AWQ_WEIGHT_QUANT_CFG": ({"weights": _INT4}, _AWQ),
    "INT4_GPTQ_WEIGHT_QUANT_CFG": ({"weights": _INT4}, ["gptq"]),
    "INT8_SMOOTHQUANT_CFG": ({"weights": _INT8, "inputs": _tensor("int8")}, _SMOOTH),
    "INT8_MINMAX_WEIGHT_QUANT_CFG": ({"weights": _INT8}, ["minmax"]),
    "HIFP8_OFMR_CFG": (_both("hifloat8", "hifloat8"), ["ofmr"]),
    "FP8_OFMR_CFG": (_both("float8_e4m3fn", "float8_e4m3fn"), ["ofmr"]),
    "MXFP8_QUANT_CFG": (
        {"weights": _mx("mxfp8_e4m3fn"), "inputs": {"type": "mxfp8_e4m3fn", "symmetric": True, "strategy": "group"}},
        ["mxquant"],
    ),
    "MXFP4_AWQ_WEIGHT_QUANT_CFG": ({"weights": _mx("mxfp4_e2m1")}, _AWQ),
    "HIFP8_CAST_CFG": (_both("hifloat8", "hifloat8", "channel"), ["cast"]),
    "HIFP8_QUANTILE_CFG": (_both("hifloat8", "hifloat8"), ["quantile"]),
    "HIFP8_SMOOTHQUANT_CFG": (_both("hifloat8", "hifloat8", "channel"), _SMOOTH),
    "HIFP8_KVCACHE_CFG": ({"kvcache": _tensor("hifloat8")}, ["quantile"]),
}
_SKIPS_NOTHING: Final = ("HIFP8_OFMR_CFG", "HIFP8_KVCACHE_CFG")
_COUNTS_NOTHING: Final = ("HIFP8_CAST_CFG",)
PRESETS: Final = tuple(_CONFIGS)


def default_config() -> dict[str, Plain]:
    """The config that AMCT's ``quantize`` takes where none is given: int8 weights by channel."""
    return preset("INT8_MINMAX_WEIGHT_QUANT_CFG")


def preset(name: str) -> dict[str, Plain]:
    """One of AMCT's own configs by its name, such as ``INT4_AWQ_WEIGHT_QUANT_CFG``; a copy, to be changed at will."""
    if name not in PRESETS:
        raise SpecError(f"{show(name)} is not a config of AMCT's{nearest(str(name), PRESETS)}")
    quant_cfg, algorithm = _CONFIGS[name]
    found: dict[str, Plain] = {} if name in _COUNTS_NOTHING else {"batch_num": 1}
    found |= {"quant_cfg": _copy(quant_cfg), "algorithm": _copy(algorithm)}
    if name not in _SKIPS_NOTHING:
        found["skip_layers"] = _copy(_HEAD)
    return found


def _copy(value: Plain) -> Plain:
    match value:
        case dict():
            return {key: _copy(item) for key, item in value.items()}
        case list():
            return [_copy(item) for item in value]
        case _:
            return value
