"""The quantization types of msModelSlim's checkpoints, as tags say them, and which of them vLLM-Ascend loads.

Source: msModelSlim 26.1, ``core/quant_service/modelslim_v1/save`` and ``ir``; vLLM-Ascend (August 2026),
``quantization/methods``, which has a method for a tag and a kind of layer, or has none.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

from graphq.errors import TargetError
from graphq.spec.formats import MX_BLOCK, Float, Int, Mx, TwoLevel
from graphq.spec.quant import PerChannel, PerGroup, PerTensor, PerToken, Quant

Consumer = Literal["vllm-ascend", "any"]
Layout = Literal["v1", "v0"]
Prefill = Literal["static", "dynamic"]
FLOAT: Final = "FLOAT"
SLICES: Final = 16  # of a row-parallel layer's inputs, each with a sum of its own: 16 ranks at most
_WORD_ROWS: Final = 8  # int4 rows in an int32, as vLLM-Ascend reads them
_MX_PAIR: Final = 2 * MX_BLOCK

# What vLLM-Ascend has methods for: tag -> kinds of layers. Its W4A16 reads the tensors of compressed-tensors instead.
_LOADED: Final[Mapping[str, tuple[str, ...]]] = {
    "W8A8": ("linear",),
    "W8A8_MIX": ("linear",),
    "W8A8_DYNAMIC": ("linear", "expert"),
    "W8A16": ("linear",),
    "W4A8_DYNAMIC": ("expert",),
    "W4A4_DYNAMIC": ("linear",),
    "W8A8FP8_DYNAMIC": ("linear", "expert"),
    "W8A8_MXFP8": ("linear", "expert"),
    "W4A8_MXFP": ("linear", "expert"),
    "W4A4_MXFP4": ("linear", "expert"),
    "W4A16_MXFP4": ("expert",),
}
# In a file with several tags the last of these is that of the whole. W4A8_DYNAMIC is none of them.
_OF_WHOLE: Final = (
    *(FLOAT, "W8A16", "W4A16", "W8A8_DYNAMIC", "W8A8_MIX", "W8A8", "WFP8AFP8_DYNAMIC", "W8A8FP8_DYNAMIC"),
    *("W8A8_MXFP8", "W4A8_MXFP", "W4A16_MXFP4", "W4A4_DYNAMIC", "W4A4_MXFP4"),
)
TAGS: Final = frozenset({*_OF_WHOLE, "W4A8_DYNAMIC"}) - {FLOAT}
MX_TAGS: Final = frozenset({"W8A8_MXFP8", "W4A8_MXFP", "W4A4_MXFP4", "W4A16_MXFP4"})
_INSTEAD: Final[Mapping[str, Mapping[str, str]]] = {
    "linear": {
        "float": "int8/channel (W8A16)",
        "static": "int8/channel with int8/tensor or int8/asym/joint/tensor (W8A8)",
        "dynamic": "int8/channel with int8/token/dynamic (W8A8_DYNAMIC)",
    },
    "expert": {
        "float": "mxfp4 (W4A16_MXFP4)",
        "static": "int8/channel with int8/token/dynamic (W8A8_DYNAMIC)",
        "dynamic": "int8/channel or int4/channel with int8/token/dynamic (W8A8_DYNAMIC, W4A8_DYNAMIC)",
    },
}


@final
@dataclass(frozen=True)
class Wanted:
    """What an artifact is written for: the target's options. tp: of tensor parallelism, how many ranks."""

    consumer: Consumer = "vllm-ascend"
    layout: Layout = "v1"
    prefill: Prefill = "static"
    tp: int = 1

    def __post_init__(self) -> None:
        if self.tp < 1:
            raise TargetError(f"ascend: tp: {self.tp} is not a positive number of ranks")


def tag_of(weight: Quant, given: Quant | None, wanted: Wanted = Wanted()) -> str | None:
    """The tag of a layer whose weight and input are quantized so; None where msModelSlim has none."""
    rows = isinstance(weight.granularity, PerChannel | PerGroup)
    channel = isinstance(weight.granularity, PerChannel)
    match weight.format, None if given is None else given.format:
        case Int(8, symmetric=True, signed=True), Int(8, signed=True) if channel and _is_static(given):
            return "W8A8_MIX" if wanted.prefill == "dynamic" else "W8A8"
        case Int(8, symmetric=True, signed=True), Int(8, symmetric=True, signed=True) if rows and _by_token(given):
            return "W8A8_DYNAMIC"
        case Int(8, signed=True), None if rows:
            return "W8A16"
        case Int(4), None if rows:
            return "W4A16"
        case ((Int(4, symmetric=True) | TwoLevel("int4")), Int(8, symmetric=True, signed=True)) if _by_token(given):
            return "W4A8_DYNAMIC" if channel or isinstance(weight.format, TwoLevel) else None
        case Int(4), Int(4, symmetric=True) if rows and _by_token(given):
            return "W4A4_DYNAMIC"
        case Float("float8_e4m3fn"), Float("float8_e4m3fn") if channel and _by_token(given):
            return "W8A8FP8_DYNAMIC" if wanted.consumer == "vllm-ascend" else "WFP8AFP8_DYNAMIC"
        case Mx("float8_e4m3fn"), Mx("float8_e4m3fn") if _is_dynamic(given):
            return "W8A8_MXFP8"
        case Mx("float4_e2m1"), Mx("float8_e4m3fn") if _is_dynamic(given):
            return "W4A8_MXFP"
        case Mx("float4_e2m1"), Mx("float4_e2m1") if _is_dynamic(given):
            return "W4A4_MXFP4"
        case Mx("float4_e2m1"), None:
            return "W4A16_MXFP4"
        case _:
            return None


def _is_static(given: Quant | None) -> bool:
    return given is not None and not given.dynamic and isinstance(given.granularity, PerTensor)


def _is_dynamic(given: Quant | None) -> bool:
    return given is not None and given.dynamic


def _by_token(given: Quant | None) -> bool:
    return given is not None and given.dynamic and isinstance(given.granularity, PerToken)


def group_size_of(weight: Quant) -> int:
    """The group size that a file with such a layer says; 0: none."""
    return weight.granularity.size if isinstance(weight.granularity, PerGroup) else 0


def quant_type(tags: Sequence[str]) -> str:
    """``model_quant_type`` of a file with these tags."""
    return max((tag for tag in tags if tag in _OF_WHOLE), key=_OF_WHOLE.index, default=FLOAT)


def layer_problem(
    kind: str, weight: Quant, given: Quant | None, shape: Sequence[int], is_row: bool, wanted: Wanted
) -> str | None:
    """Why no artifact for ``wanted`` holds a layer of this kind with a weight ``[rows, columns]`` that is quantized so
    beside such inputs; None if one does. ``is_row``: whether its inputs are split among ranks, and not its outputs.
    """
    inputs = "float inputs" if given is None else f"{given} inputs"
    tag = tag_of(weight, given, wanted)
    if kind == "embedding":
        return "msModelSlim and vLLM-Ascend quantize no embedding; keep it float"
    if tag is None:
        return f"{weight} with {inputs}: msModelSlim has no type for it; write {_instead(kind, given)}"
    rows, columns = shape
    if isinstance(weight.format, TwoLevel) and wanted.layout == "v1":
        return f"{weight} ({tag}): version 1 has no groups of int4 over int8; say layout=v0, or write int4/channel"
    if isinstance(weight.granularity, PerGroup) and tag not in MX_TAGS and columns % weight.granularity.size:
        return f"{weight} ({tag}): {columns} inputs are no multiple of {weight.granularity.size}; write another group"
    if tag == "W4A8_DYNAMIC" and rows % 2:
        return f"{weight} ({tag}): its rows are packed in pairs, and there are {rows}; write int8/channel"
    if tag == "W4A8_DYNAMIC" and is_row and columns % SLICES and not isinstance(weight.format, TwoLevel):
        return f"{weight} ({tag}): {columns} inputs are no multiple of {SLICES}, the slices of scale_bias; " + _8BIT
    if weight.format in (Int(4), Int(4, symmetric=False)) and tag == "W4A16":
        packed, axis = (columns, "inputs") if isinstance(weight.granularity, PerChannel) else (rows, "outputs")
        if packed % 2:
            return f"{weight} ({tag}): codes are packed in pairs along {packed} {axis}; write int8/channel"
    if isinstance(weight.format, Mx) and weight.format.element == "float4_e2m1" and columns % 2:
        return f"{weight} ({tag}): codes are packed in pairs along {columns} inputs; write mxfp8_e4m3"
    return _consumer_problem(kind, tag, weight, given, shape, is_row, wanted)


_8BIT: Final = "write int8/channel with int8/token/dynamic (W8A8_DYNAMIC)"


def _consumer_problem(
    kind: str, tag: str, weight: Quant, given: Quant | None, shape: Sequence[int], is_row: bool, wanted: Wanted
) -> str | None:
    """Why vLLM-Ascend does not load a layer that the format holds."""
    if wanted.consumer != "vllm-ascend":
        return None
    what, instead = f"{weight} ({tag})", f"write {_instead(kind, given)}, or say consumer=any"
    if tag == "W4A16":
        return f"{what}: vLLM-Ascend reads it from files of compressed-tensors alone, in experts; {instead}"
    if kind not in _LOADED.get(tag, ()):
        return f"{what}: vLLM-Ascend loads it in no {kind}; {instead}"
    if isinstance(weight.format, Int) and not weight.format.symmetric:
        return f"{what}: vLLM-Ascend loads no offsets of weights; {instead}"
    if isinstance(weight.granularity, PerGroup) and tag not in MX_TAGS:
        return f"{what}: vLLM-Ascend loads a scale for each channel alone; {instead}"
    if given is not None and isinstance(given.format, Int) and given.dynamic and given.format != Int(given.format.bits):
        return f"input {given}: vLLM-Ascend divides by {2 ** (given.format.bits - 1) - 1}; {instead}"
    rows, columns = (shape[0], shape[1] / wanted.tp) if is_row else (shape[0] / wanted.tp, shape[1])
    parts = f" of {wanted.tp} ranks" if wanted.tp > 1 else ""
    if tag == "W4A8_DYNAMIC" and rows % _WORD_ROWS:
        return f"{what}: vLLM-Ascend takes outputs{parts} that are a multiple of {_WORD_ROWS}, not {rows:g}; {_8BIT}"
    if tag in MX_TAGS and columns % _MX_PAIR:
        return f"{what}: vLLM-Ascend takes inputs{parts} that are a multiple of {_MX_PAIR}, not {columns:g}; {instead}"
    return None


def file_problems(layers: Mapping[str, tuple[Quant, Quant | None]], wanted: Wanted) -> Iterator[str]:
    """A line for each layer that does not fit beside the others of ``layers`` in one file."""
    grouped = {name: weight for name, (weight, _) in layers.items() if group_size_of(weight)}
    first = next(iter(grouped), "")
    for name, weight in grouped.items():
        if group_size_of(weight) != group_size_of(grouped[first]):
            yield f"{name}: {weight}, but {first}: {grouped[first]}; a file has one group size, write one for both"
    for name, (weight, given) in layers.items():
        if tag_of(weight, given, wanted) != "W4A8_DYNAMIC" or isinstance(weight.format, TwoLevel):
            continue
        if SLICES % wanted.tp:
            yield f"{name}: {weight} (W4A8_DYNAMIC): tp: {wanted.tp}: it has sums for 1, 2, 4, 8 or {SLICES} ranks"
        if grouped and wanted.consumer == "vllm-ascend":
            yield (
                f"{name}: {weight} (W4A8_DYNAMIC), but {first}: {grouped[first]}; vLLM-Ascend takes no W4A8_DYNAMIC in"
                f" a file with a group size; {_8BIT}, or say consumer=any"
            )


def _instead(kind: str, given: Quant | None) -> str:
    """What vLLM-Ascend loads that is nearest to such inputs."""
    how = "float" if given is None else "dynamic" if given.dynamic else "static"
    return _INSTEAD["expert" if kind == "expert" else "linear"][how]
