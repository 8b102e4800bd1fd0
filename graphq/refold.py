"""A model's weights folded as an artifact's were, without calibration data, and compared with what the artifact holds.

What follows from the model alone is done again, and what algorithms chose by data is taken from ``graphq.choices``.
Codes that were chosen by data cannot be made again: they stand for the folded weight as well as they did when they were
made, which is their signal to quantization noise ratio.
"""

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast, final

import torch
from torch import Tensor, fx, nn

from graphq import numerics
from graphq.algorithms import PassContext
from graphq.artifacts.scratch import give_scratch
from graphq.errors import TargetError
from graphq.ir.choices import Choices
from graphq.ir.layers import BY, TURNED
from graphq.ir.pipeline import Pass, Pipeline
from graphq.ir.views import Dequantize, Op, Param, Quantize, ops_of
from graphq.lowering.checkpoints.content import graph_layers
from graphq.lowering.targets import TARGETS
from graphq.numerics import Scales
from graphq.passes.annotate import decide
from graphq.passes.auto_round import AutoRound
from graphq.passes.awq import AWQ
from graphq.passes.blockwise import Blockwise
from graphq.passes.cache_codes import CacheCodes
from graphq.passes.calibrate import Calibrate
from graphq.passes.correct_bias import CorrectBias
from graphq.passes.fall_back import FallBack
from graphq.passes.gptq import GPTQ
from graphq.passes.hold_weights import HoldWeights
from graphq.passes.observe import Observe
from graphq.passes.observe_means import ObserveMeans
from graphq.passes.place_quantizers import PlaceQuantizers
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.passes.quantize_attention import QuantizeAttention
from graphq.passes.quantize_biases import QuantizeBiases
from graphq.passes.quantize_cache import QuantizeCache
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.repeat_biases import RepeatBiases
from graphq.passes.repeat_factors import RepeatFactors
from graphq.passes.smooth_quant import SmoothQuant
from graphq.passes.stop_observing import StopObserving
from graphq.pipelines import canonical_passes, passes_for
from graphq.spec.algorithms import ALGORITHMS
from graphq.spec.formats import parse_format
from graphq.spec.rules import Spec
from graphq.state import deferred_tensors, first_names, read_tensor, tensor_of

# Passes that look at data, or change activations alone.
_OF_ACTIVATIONS: Final = (
    Observe, ObserveMeans, Calibrate, StopObserving, QuantizeCache, QuantizeAttention, CacheCodes, QuantizeActivations,
    PlaceQuantizers, FallBack, QuantizeBiases,
)  # fmt: skip
_CHOOSING: Final = ("smooth-quant", "awq", "correct-bias")  # what these choose is no code and no scale
_EXACT: Final = frozenset(
    step.name for step in canonical_passes()
)  # what these make of a model is bit for bit the same
_DECIBELS: Final = 0.1
_ROUNDING: Final = 1e-6  # of the largest number, for those that are 0 but for what sums leave
_EXACTLY: Final = 100.0  # decibels from which on a weight counts as represented exactly


@final
@dataclass(frozen=True)
class Folded:
    """The QDQ form in a target's terms with float weights in place of their codes (``HoldWeights``).

    held: the layers of each path of the QDQ form that holds such a weight. turned: float tensors that the target stores
    with their last two axes swapped.
    """

    form: fx.GraphModule = field(repr=False)
    held: Mapping[str, tuple[str, ...]]
    turned: frozenset[str] = frozenset()


def not_kept(spec: Spec) -> list[str]:
    """The algorithms of a spec whose choices an artifact must hold, to be made again."""
    return [algorithm.name for algorithm in spec.algorithms if algorithm.name in _CHOOSING]


def folded(gm: fx.GraphModule, spec: Spec, seed: int, chosen: Mapping[str, Tensor], target: str) -> Folded:
    """The model ``gm``, as it was captured, folded as ``spec`` says; ``chosen``: what was kept of algorithms' choices.

    Raises ``GraphError`` for choices that are of another model.
    """
    if deferred_tensors(gm):
        give_scratch(gm, None)
    resolved, _ = decide(gm, spec)
    layers = {fqn: one.layer for fqn, one in resolved.items()}
    context = PassContext(seed=seed, chosen=dict(chosen))
    held: dict[str, tuple[str, ...]] = {}
    blocks = any(ALGORITHMS[algorithm.name].needs_data for algorithm in spec.algorithms)
    with torch.no_grad():
        Pipeline(repeated(passes_for(spec, layers, context, blocks), held)).run(gm)
        form = TARGETS[target].form(gm)
    names = {old: new for new, old in graph_layers(form).items()}
    turned = (name.removesuffix(".weight") for name in form.meta.get(TURNED, ()))
    return Folded(form, held, frozenset(f"{names[name]}.weight" for name in turned if name in names))


def repeated(passes: Iterable[Pass], held: dict[str, tuple[str, ...]]) -> list[Pass]:
    """Passes without data that do to weights what ``passes`` did, but for codes: ``HoldWeights``."""
    found: list[Pass] = []
    for step in passes:
        match step:
            case Blockwise(inner, prefix):
                found.append(Blockwise(tuple(repeated(inner, held)), prefix))
            case SmoothQuant() | AWQ():
                found.append(RepeatFactors(_kept(step.choices), step.only, step.where, step.folds))
            case CorrectBias():
                found.append(RepeatBiases(_kept(step.choices)))
            case GPTQ() | AutoRound():
                found.append(HoldWeights(held, step.only, products=True))
            case QuantizeWeights():
                found.append(HoldWeights(held, step.only))
            case _ if not isinstance(step, _OF_ACTIVATIONS):
                found.append(step)
            case _:
                pass
    return found


def _kept(choices: Choices | None) -> Choices:
    assert choices is not None, "asked for"
    return choices


def weight_differences(
    made: Folded, held: Mapping[str, Tensor], recorded: Mapping[str, float | None]
) -> Iterator[tuple[str, str | None]]:
    """For each quantized weight its path, and how it differs from the folded one, if it does.

    ``held``: the tensors of the artifact; ``recorded``: the ratios of layers when they were compiled, in decibels.
    """
    form, first = made.form, first_names(made.form.state_dict(keep_vars=True))
    names = graph_layers(form)
    seen = set[str]()
    for op in ops_of(form):
        if not isinstance(op, Dequantize) or not isinstance(op.codes, Param) or op.codes.fqn in seen:
            continue
        fqn = op.codes.fqn
        seen.add(fqn)
        path = fqn.removesuffix(".weight")
        if fqn not in held:
            is_tied = any(first.get(other, other) == first.get(fqn, fqn) for other in held)
            yield path, None if is_tied else f"{fqn}: missing"
            continue
        layer = names.get(path, path)
        fqns = made.held.get(layer, (layer,))
        yield path, _weight_difference(form, op, held, {one: recorded.get(one) for one in fqns})


def _weight_difference(
    form: fx.GraphModule, op: Dequantize, held: Mapping[str, Tensor], recorded: Mapping[str, float | None]
) -> str | None:
    fqn = cast(Param, op.codes).fqn
    codes, w = held[fqn], tensor_of(form, fqn).detach()
    if codes.shape != w.shape:
        return f"{fqn}: {list(codes.shape)}, folded anew {list(w.shape)}"
    if codes.is_floating_point():  # an op that fell back has its weight as it is
        return _float_difference(fqn, w, codes, exact=False)
    own_axes = (0,) if len(recorded) > 1 else ()
    format = parse_format(op.format)
    parts: list[Tensor | None] = []
    for part, wanted in zip(
        (op.scale, op.zero_point, op.global_scale),
        numerics.empty_scales(w.shape, op.block, format, own_axes),
        strict=True,
    ):
        name = part.fqn if isinstance(part, Param) else None
        if name is None or wanted is None:
            parts.append(None)
            continue
        if name not in held:
            return f"{name}: missing"
        plain = unspelled(held[name], wanted.shape, op.block)
        if plain is None:
            return f"{name}: {list(held[name].shape)} are no scales of {list(w.shape)}"
        parts.append(plain)
    scale = parts[0]
    assert scale is not None
    found = numerics.dequantize(codes, Scales(scale, *parts[1:]), format, op.block)
    lines: list[str] = []
    for number, (layer, before) in enumerate(recorded.items()):
        pick: Any = number if own_axes else ...
        ratio = numerics.sqnr_db(w[pick], found[pick])
        if not _agrees(ratio, before):
            was = "exact" if before is None else f"{before:.2f} dB"
            lines.append(f"{layer}: {ratio:.2f} dB beside the weight folded anew, {was} when it was compiled")
    return "\n".join(lines) or None


def _agrees(found: float, recorded: float | None) -> bool:
    """Whether two ratios are one; None was recorded of a weight of zeros, too."""
    if recorded is None:
        return found > _EXACTLY or not math.isfinite(found)
    return abs(found - recorded) <= _DECIBELS


def unspelled(scale: Tensor, shape: Sequence[int], block: Sequence[int]) -> Tensor | None:
    """Scales of a target in the shape that they have in the QDQ form: some spell them out along axes that have one
    scale for several rows. None for those that cannot be read so.
    """
    if scale.numel() == math.prod(shape):
        return scale.reshape(list(shape))
    if scale.dim() != len(shape):
        return None
    for axis, (size, b) in enumerate(zip(shape, block, strict=True)):
        if scale.shape[axis] != size:
            scale = scale.index_select(axis, torch.arange(0, scale.shape[axis], b if b > 0 else scale.shape[axis]))
    return scale if tuple(scale.shape) == tuple(shape) else None


def float_differences(
    made: Folded, held: Mapping[str, Tensor], codes: Container[str]
) -> Iterator[tuple[str, str | None]]:
    """For each float tensor of the model that the artifact holds, its name, and how it differs, if it does. ``codes``:
    the tensors of the artifact that are quantized, such as biases of an integer product.

    What no algorithm touched is bit for bit the same; products in float64, which machines add up in different orders,
    may differ in the last places. Raises ``GraphError`` for a tensor that cannot be read any more.
    """
    state = made.form.state_dict(keep_vars=True)
    first = first_names(state)
    by: dict[str, set[str]] = {}
    for node in made.form.graph.find_nodes(op="get_attr"):
        by.setdefault(str(node.target), set()).update(cast(tuple[str, ...], node.meta.get(BY, ())))
    quantized = {part.fqn for op in ops_of(made.form) for part in _parts(op) if isinstance(part, Param)}
    for name, tensor in state.items():
        if name in quantized or name in codes:
            continue
        if name not in held:
            is_lost = isinstance(tensor, nn.Parameter) and not any(
                first.get(other, other) == first.get(name, name) for other in held
            )
            if is_lost:
                yield name, f"{name}: missing"
            continue
        x = read_tensor(tensor).detach()
        x = x.transpose(-2, -1) if name in made.turned else x
        yield name, _float_difference(name, x, held[name], exact=by.get(name, set()) <= _EXACT)


def _parts(op: Op) -> tuple[Op | None, ...]:
    match op:
        case Dequantize():
            return op.codes, op.scale, op.zero_point, op.global_scale
        case Quantize():
            return op.scale, op.zero_point, op.global_scale
        case _:
            return ()


def _float_difference(name: str, made: Tensor, held: Tensor, exact: bool) -> str | None:
    if made.shape != held.shape:
        return f"{name}: {list(held.shape)}, folded anew {list(made.shape)}"
    a, b = made.to(held.dtype), held
    differ = (a != b) & ~(a.isnan() & b.isnan())
    if not exact and held.is_floating_point() and held.numel():
        wide = b.double()
        bound = 2 * torch.finfo(held.dtype).eps * wide.abs() + _ROUNDING * wide.abs().amax()
        differ &= ~((a.double() - wide).abs() <= bound)
    count = int(differ.sum())
    return f"{name}: {count} of {held.numel()} elements differ" if count else None


def recorded_ratios(described: Mapping[str, Any], file: object) -> dict[str, float | None]:
    """Each quantized layer's ratio in decibels, None for an exact one. Raises ``TargetError`` where it is damaged."""
    try:
        rows = [row for row in described["report"] if row["weight"] is not None]
        found = {str(row["layer"]): row["sqnr_db"] for row in rows}
        if not all(ratio is None or isinstance(ratio, int | float) for ratio in found.values()):
            raise TypeError("a ratio is no number")
    except (KeyError, TypeError) as error:
        raise TargetError(f"{file}: damaged: report: {error}") from error
    return found
