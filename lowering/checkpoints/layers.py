"""The quantized layers of a QDQ form as checkpoints name them: one linear each, experts by their own names."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, cast, final

import torch
from torch import Tensor, fx

from graphq.errors import PassError
from graphq.ir import edit
from graphq.ir.edit import copy_graph
from graphq.ir.layers import BY, layer_path, weight_param
from graphq.ir.views import Dequantize, Embedding, Linear, Op, Param, Quantize, ops_of, view
from graphq.lowering.checkpoints.caches import cached_codes
from graphq.lowering.experts import expert_linears, split_experts
from graphq.numerics import Scales, rounded_scales
from graphq.spec.algorithms import ALGORITHMS
from graphq.spec.formats import Nvfp4, parse_format
from graphq.spec.quant import Granularity, PerBlock, PerChannel, PerGroup, PerTensor, PerToken, Quant
from graphq.state import deferred_of, held_tensor, put_tensor, read_tensor, tensor_of

# Passes that may leave arithmetic in the graph that the source's modules do not have.
_PASSES: Final = frozenset(
    {"rotate-online", *(n for n, e in ALGORITHMS.items() if e.stage not in ("default", "round"))}
)


LinearKind = Literal["linear", "embedding", "expert"]


@final
@dataclass(frozen=True)
class QuantizedLinear:
    """A linear or an embedding whose weight ``[N, K]`` is codes.

    weight: how it is quantized, but for where its scales came from.
    scales: ``[N or 1, groups]``; blocks ``[ceil(N / rows), ceil(K / columns)]``. Where the graph is not read yet, codes
        and scales are fake until ``read``.
    input: how its input is quantized, None where that is float; ``input_scales`` of an input whose scales are fixed
        (of nvfp4 its global scale, as ``scale``).
    """

    name: str
    kind: LinearKind
    codes: Tensor
    scales: Scales
    weight: Quant
    input: Quant | None
    input_scales: Scales | None

    @property
    def is_read(self) -> bool:
        """Whether codes and scales have numbers."""
        return deferred_of(self.codes) is None

    def read(self) -> "QuantizedLinear":
        """The same with numbers, of which deferred codes and scales have none until they are read."""
        if self.is_read:
            return self
        scales = (None if part is None else read_tensor(part) for part in self.scales)
        return replace(self, codes=read_tensor(self.codes), scales=Scales(*cast(Any, tuple(scales))))


def unstacked(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the QDQ form ``gm`` in which every expert is a linear of its own."""
    made = copy_graph(gm)
    split_experts(made)
    made.graph.lint()
    made.recompile()
    return made


def rename(gm: fx.GraphModule, names: Mapping[str, str]) -> None:
    """The tensors of ``gm`` have the names that ``names`` gives them, and so have the scales of quantized ones."""
    paths = {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in names.items()}
    renamed: list[tuple[Op, str, Tensor]] = []  # all are read before any is put where another may be
    for op in ops_of(gm):
        if not isinstance(op, Param):
            continue
        path, _, name = op.fqn.rpartition(".")
        new = names.get(op.fqn) or (f"{paths[path]}.{name}" if path in paths else op.fqn)
        if new != op.fqn:
            renamed.append((op, new, held_tensor(gm, op.fqn)))
    for op, new, tensor in renamed:
        put_tensor(gm, new, tensor)
        op.node.target = new
    edit.drop_unused(gm)
    gm.recompile()


def quantized_linears(form: fx.GraphModule) -> dict[str, QuantizedLinear]:
    """The quantized layers of an ``unstacked`` graph by name; ``beyond`` tells what of it is none."""
    found: dict[str, QuantizedLinear] = {}
    for op, weight, x in weight_uses(form):
        name = cast(Param, weight.codes).fqn.removesuffix(".weight")
        if name not in found:
            codes, scales = _held(form, weight)
            level, fixed = _input(form, x)
            quant = Quant(parse_format(weight.format), _granularity(weight.block, weight.codes.val.shape))
            found[name] = QuantizedLinear(name, _kind(op), codes, scales, quant, level, fixed)
    return found


def is_stored(layer: QuantizedLinear, dtype: torch.dtype) -> bool:
    """Whether the scales are numbers of ``dtype``."""
    rounded = rounded_scales(layer.scales, layer.weight.format, dtype)
    same = torch.equal(rounded.scale.float(), layer.scales.scale.float())
    if layer.input is None or layer.input_scales is None:
        return same
    given = rounded_scales(layer.input_scales, layer.input.format, dtype)
    return same and torch.equal(given.scale, layer.input_scales.scale)


def float_linears(form: fx.GraphModule) -> list[str]:
    """The names of the linears that stay float, whatever class of module they are of: routers have one of their own."""
    weights = [weight_param(op) for op in ops_of(form) if isinstance(op, Linear)]
    return list(dict.fromkeys(layer_path(param.fqn) for param in weights if param is not None))


def beyond(form: fx.GraphModule) -> Iterator[tuple[Op, str]]:
    """The nodes of an ``unstacked`` graph that compute what no checkpoint of linears says, each with the reason."""
    uses = list(weight_uses(form))
    linears = {weight for _, weight, _ in uses}
    inputs = {x.codes for _, _, x in uses if isinstance(x, Dequantize)}
    inputs |= cached_codes(form)
    for op in ops_of(form):
        by = [name for name in cast(tuple[str, ...], op.node.meta.get(BY, ())) if name in _PASSES]
        match op:
            case Dequantize() if isinstance(op.codes, Param):
                if op not in linears or not op.codes.fqn.endswith(".weight"):
                    kinds = sorted({type(user).__name__ for user in op.users})
                    yield op, f"its quantized weight is read by {', '.join(kinds)}; linears and embeddings are held"
            case Quantize() if op not in inputs:
                yield op, "a tensor that is no linear's input is quantized; only inputs of linears and caches are held"
            case Param():
                pass
            case _ if by:
                yield op, f"{by[0]} computes it when the model runs, which the architecture does not"
            case _:
                pass


def weight_uses(form: fx.GraphModule) -> Iterator[tuple[Op, Dequantize, Op]]:
    """Each use of a quantized weight as rows of a product or a table: the op, the weight and what it multiplies."""
    for op in ops_of(form):
        match op:
            case Linear() | Embedding():
                weight = op.weight_op
                if isinstance(weight, Dequantize) and isinstance(weight.codes, Param):
                    yield op, weight, op.input_op
            case _ if op.node.target is expert_linears:
                x, weights, _ = op.node.args
                for node in cast(Sequence[fx.Node], weights):
                    weight = view(node)
                    if isinstance(weight, Dequantize) and isinstance(weight.codes, Param):
                        yield op, weight, view(cast(fx.Node, x))
            case _:
                pass


def _kind(op: Op) -> LinearKind:
    match op:
        case Embedding():
            return "embedding"
        case Linear():
            return "linear"
        case _:
            return "expert"


def _held(form: fx.GraphModule, op: Dequantize) -> tuple[Tensor, Scales]:
    scale, zero_point, global_scale = (
        None if part is None else held_tensor(form, cast(Param, part).fqn)
        for part in (op.scale, op.zero_point, op.global_scale)
    )
    assert scale is not None
    return held_tensor(form, cast(Param, op.codes).fqn), Scales(scale, zero_point, global_scale)


def _input(form: fx.GraphModule, x: Op) -> tuple[Quant | None, Scales | None]:
    """How an input is quantized, and its fixed scales. None for a float one."""
    if not isinstance(x, Dequantize) or not isinstance(x.codes, Quantize):
        return None, None
    format = parse_format(x.format)
    parts = (x.scale, x.zero_point, x.global_scale)
    scale, zero_point, global_scale = (tensor_of(form, part.fqn) if isinstance(part, Param) else None for part in parts)
    if isinstance(format, Nvfp4):
        is_fixed = global_scale is not None
        fixed = Scales(global_scale) if global_scale is not None else None
    else:
        is_fixed = scale is not None
        fixed = Scales(scale, zero_point) if scale is not None else None
    return Quant(format, _activation_granularity(x.block), dynamic=not is_fixed), fixed


def _granularity(block: Sequence[int], shape: Sequence[int]) -> Granularity:
    """Of the scales of a weight ``[N, K]`` by blocks."""
    match list(block):
        case [-1, -1]:
            return PerTensor()
        case [1, -1]:
            return PerChannel()
        case [1, size]:
            return PerGroup(size)
        case [rows, columns]:
            return PerBlock(rows, columns)
        case other:
            raise PassError(f"blocks {other} of a weight {list(shape)}")


def _activation_granularity(block: Sequence[int]) -> Granularity:
    if block[-1] != -1:
        return PerGroup(block[-1])
    return PerToken() if any(size == 1 for size in block) else PerTensor()
