"""The scales of caches as an Ascend checkpoint has them: C8, ``kv_cache_scale`` and ``kv_cache_offset`` of k and v.

Source: msModelSlim 26.1, ``processor/quant/attention.py``: q = round(x / scale + offset), for each channel of a head,
in the dtype of activations. vLLM-Ascend finds the layers by names with ``k_proj.kv_cache_scale``.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor

from graphq.capture.source import Source
from graphq.lowering.checkpoints.caches import CacheScales
from graphq.numerics import rounded_scales
from graphq.spec.formats import Int
from graphq.spec.quant import PerChannel, Quant

TAG: Final = "C8"
KEYS: Final[Mapping[str, Any]] = {"kv_cache_type": TAG, "kv_quant_type": TAG}
_SCALE: Final = "kv_cache_scale"
_OFFSET: Final = "kv_cache_offset"
_PROJECTIONS: Final = {"key": "k_proj", "value": "v_proj"}


def encode_cache(one: CacheScales, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a cache by their names, ``[heads * channels]`` in ``dtype``."""
    assert one.scales is not None, "no problem"
    scale, zero_point, _ = one.scales
    offset = torch.zeros_like(scale) if zero_point is None else zero_point
    return {
        f"{one.projection}.{suffix}": part.flatten().to(dtype) for suffix, part in ((_SCALE, scale), (_OFFSET, offset))
    }


def held_cache(one: CacheScales) -> dict[str, Tensor]:
    """The same as ``decode_caches`` gives it, of the QDQ form's numbers."""
    assert one.scales is not None, "no problem"
    scale, zero_point, _ = one.scales
    name = f"{one.attention}.{one.role}"
    held = {f"{name}_scale": scale.flatten()}
    return held if zero_point is None else held | {f"{name}_zero_point": zero_point.flatten()}


def decode_caches(tensors: Mapping[str, Tensor], tags: Mapping[str, str]) -> dict[str, Tensor]:
    """``tensors``, those of caches under the names of the QDQ form; an offset that is 0 throughout is none."""
    roles = {
        f"{projection}.{suffix}": (role, part)
        for role, projection in _PROJECTIONS.items()
        for suffix, part in ((_SCALE, "scale"), (_OFFSET, "zero_point"))
    }
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        attention, _, projection = path.rpartition(".")
        role = roles.get(f"{projection}.{last}") if tags.get(name) == TAG else None
        if role is None:
            found[name] = tensor
        elif role[1] == "scale":
            found[f"{attention}.{role[0]}_scale"] = tensor.float()
        elif bool(tensor.any()):
            found[f"{attention}.{role[0]}_zero_point"] = tensor.to(torch.int8)
    return found


def cache_problem(quant: Quant) -> str | None:
    """Why the format holds no cache that is quantized so; None if it does."""
    match quant:
        case Quant(Int(8, signed=True), PerChannel(), False):
            return None
        case _:
            return "an Ascend checkpoint has caches of int8/channel and int8/asym/joint/channel"


def cache_problems(caches: Iterable[CacheScales], source: Source, target: str) -> Iterator[str]:
    """A line for each cache that the format cannot hold."""
    for one in caches:
        reason = cache_problem(one.quant)
        if reason is None and one.projection.rpartition(".")[2] != _PROJECTIONS[one.role]:
            reason = f"it comes of {one.projection}, and vLLM-Ascend looks for {_PROJECTIONS[one.role]}"
        if reason is None and one.scales is not None:
            rounded = rounded_scales(one.scales, one.quant.format, source.dtype)
            if not torch.equal(rounded.scale, one.scales.scale):
                short = str(source.dtype).removeprefix("torch.")
                reason = f"its scales are no numbers of {short}, which stores them; compile with target={target!r}"
        if reason is not None:
            yield f"{one.attention}.{one.role}: {one.quant}: {reason}"
