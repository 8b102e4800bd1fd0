"""The fixed scales of a QDQ form's caches as checkpoints want them: by attention, for keys and for values."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast, final

from torch import Tensor, fx

from graphq.errors import PassError
from graphq.ir.index import GraphIndex
from graphq.ir.layers import layer_path, weight_param
from graphq.ir.views import Op, Param, Quantize, Weighted, view
from graphq.numerics import Scales
from graphq.spec.formats import parse_format
from graphq.spec.quant import Granularity, PerChannel, PerHead, PerTensor, PerToken, Quant
from graphq.state import tensor_of


@final
@dataclass(frozen=True)
class CacheScales:
    """How the keys or the values of one attention are cached as codes.

    attention: the path of the attention's module; projection: that of the linear that the keys or values come from.
    scales: ``[1]`` of a tensor, ``[heads]``, or ``[heads, channels]``; None where each token has its own at run time.
    name: that of the scales in the QDQ form, without the ending that says which they are.
    """

    attention: str
    projection: str
    role: Literal["key", "value"]
    quant: Quant
    scales: Scales | None
    heads: int
    channels: int
    name: str


def cache_scales(form: fx.GraphModule) -> list[CacheScales]:
    """Those of all caches of a graph that hold codes, in the order of the caches."""
    found: list[CacheScales] = []
    for codes, role in _appended(form):
        heads, channels = int(codes.x.val.shape[1]), int(codes.x.val.shape[3])
        is_static = isinstance(codes.scale, Param)
        quant = Quant(parse_format(codes.format), _granularity(codes.block, not is_static), dynamic=not is_static)
        projection = _projection(codes.x)
        attention = projection.rpartition(".")[0]
        name, scales = "", None
        if isinstance(codes.scale, Param):
            name = codes.scale.fqn.removesuffix("_scale")
            zero = tensor_of(form, codes.zero_point.fqn) if isinstance(codes.zero_point, Param) else None
            held = tensor_of(form, codes.scale.fqn)
            scales = Scales(_shaped(held, heads), None if zero is None else _shaped(zero, heads))
        found.append(CacheScales(attention, projection, role, quant, scales, heads, channels, name))
    return found


def cached_codes(form: fx.GraphModule) -> set[Op]:
    """The ops that quantize what is put behind caches."""
    return {codes for codes, _ in _appended(form)}


def _appended(form: fx.GraphModule) -> Iterator[tuple[Quantize, Literal["key", "value"]]]:
    index = GraphIndex(form)
    for present, past in index.caches.items():
        tensors = view(present).argument("tensors") if len(present.args) and isinstance(present.args[0], list) else ()
        if len(tensors) == 2 and tensors[0] is past and isinstance(codes := view(tensors[1]), Quantize):
            yield codes, "value" if index.input_names[past].endswith("value") else "key"


def _granularity(block: Sequence[int], dynamic: bool) -> Granularity:
    match [b for axis, b in enumerate(block) if axis in (1, 3)]:
        case [-1, -1]:
            return PerTensor()
        case [1, -1]:
            return PerToken() if dynamic else PerHead()
        case [1, 1]:
            return PerChannel()
        case _:
            raise PassError(f"blocks {list(block)} of a cache")


def _shaped(part: Tensor, heads: int) -> Tensor:
    """``[1]``, ``[heads]`` or ``[heads, channels]``."""
    if part.numel() == 1:
        return part.reshape(1)
    return part.reshape(heads) if part.numel() == heads else part.reshape(heads, -1)


def _projection(x: Op) -> str:
    """The layer that a value comes from, by the shortest way; empty where there is none."""
    seen, pending = {x.node}, [x.node]
    while pending:
        node = pending.pop(0)
        op = view(node)
        if isinstance(op, Weighted):
            param = weight_param(op)
            if param is not None:
                return layer_path(param.fqn)
            codes = cast(Op, getattr(op.weight_op, "codes", None))
            return layer_path(codes.fqn) if isinstance(codes, Param) else ""
        for read in node.all_input_nodes:
            if read not in seen:
                seen.add(read)
                pending.append(read)
    return ""
