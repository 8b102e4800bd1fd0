"""A quantized checkpoint in another format, code by code: nothing is rounded, and no data is needed.

The checkpoint's weights become the codes of a QDQ form, one at a time as they are written, by the same emitters that
write what is compiled. What the other format cannot hold is refused layer by layer.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import fx

from graphq.capture import hugging_face
from graphq.capture.source import KEY, record_stored, source_of
from graphq.capture.unread import capture_unread
from graphq.capture.weight_files import HeldTensor
from graphq.compiled import Compiled
from graphq.deferred import Deferred
from graphq.errors import PassError, TargetError
from graphq.ir.layers import sites
from graphq.ir.pipeline import Pipeline
from graphq.ir.stored_codes import StoredWeight, stored_weights
from graphq.lowering.checkpoints.sources.checkpoint import CodedMatrix, CodedStack, QuantizedCheckpoint
from graphq.lowering.checkpoints.sources.read import is_quantized, read_quantized
from graphq.lowering.targets import target_named, unheld
from graphq.numerics import Scales
from graphq.passes.annotate import Annotate, decide
from graphq.passes.carry_input_scales import CarryInputScales
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.pipelines import canonical_passes
from graphq.report import Report, make_report, spec_settings
from graphq.spec.formats import ExponentRule, Int, Mx
from graphq.spec.match import Exact
from graphq.spec.plan import Plan
from graphq.spec.quant import MinMax, Quant
from graphq.spec.rules import Rule, Spec
from graphq.state import deferred_of, held_tensor

_MX_INPUTS: Final[dict[str, ExponentRule]] = {"ascend": "ascend"}  # how their scales are chosen as they come


@final
@dataclasses.dataclass(frozen=True)
class _Kept:
    """The layers of a graph whose weights are stored as codes: each one's plan, and what is fixed of its input."""

    weights: dict[str, StoredWeight]
    plans: dict[str, Plan]
    inputs: dict[str, Scales]


def convert_checkpoint(
    path: str | os.PathLike[str], target: str, out: str | os.PathLike[str], **options: Any
) -> Report:
    """The quantized checkpoint in the directory ``path``, in the format of ``target`` in the directory ``out``, written
    whole or not at all: the same codes, scales and zero points of weights, the same static scales of inputs, the same
    other tensors. Gives the report on its layers.

    target: ``compressed-tensors`` or ``ascend``; ``options``: those of its ``emit``, such as ``consumer="any"`` and
    ``overwrite=True``. A weight or two are held at a time. Raises ``TargetError`` with a line for each layer that the
    target, or what is to load it, cannot hold as it is, and for a directory that is no quantized checkpoint;
    ``GraphError`` for a model that graphq cannot capture.
    """
    if not target_named(target).reads:
        raise TargetError(f"{target}: is no checkpoint that codes are carried over to; compile for it: graphq compile")
    directory = Path(path)
    if not directory.is_dir():
        raise TargetError(f"{directory}: no such directory")
    if not is_quantized(directory):
        raise TargetError(f"{directory}: is no quantized checkpoint; graphq compile quantizes float models")
    quantized = read_quantized(directory)
    if quantized.unkept:
        raise TargetError(
            "\n".join(f"{directory}: {line}: is not converted; {_anew(directory, target)}" for line in quantized.unkept)
        )
    used: list[StoredWeight] = []
    gm = _captured(quantized, used)
    kept = _kept(gm, target)
    anew = f"{target}: codes are carried over as they are; {_anew(directory, target)}"
    problems = [f"{target}: {line}" for line in _lost(used, kept)]
    if not kept.plans:
        raise TargetError("\n".join([*problems, f"{target}: the model has none of the quantized weights", anew]))
    spec = Spec(tuple(Rule(Exact(fqn), plan, group=kept.weights[fqn].group) for fqn, plan in kept.plans.items()))
    resolved, notes = decide(gm, spec)
    if problems := [*problems, *unheld(gm, target, resolved, spec, **options)]:
        raise TargetError("\n".join([*problems, anew]))
    passes = [Annotate(spec), CarryInputScales(kept.inputs), QuantizeWeights(_must_be_equal), QuantizeActivations()]
    with torch.no_grad():
        Pipeline(passes).run(gm)
    in_order = {fqn for fqn, weight in kept.weights.items() if weight.in_order}
    source = source_of(gm)
    report = make_report(
        resolved, [*source.notes, *notes], source.dtype.itemsize * 8, settings=spec_settings(spec), in_order=in_order
    )
    made = Compiled(gm, spec, report, seed=0)
    made.emit(target, out, **options)
    note = f"{len(kept.weights)} weights have the codes of {directory} ({quantized.format})"
    return dataclasses.replace(report, notes=(*report.notes, note))


def _anew(directory: Path, target: str) -> str:
    return f"to quantize it anew: graphq compile {directory} --target {target} --spec ..."


@final
@dataclasses.dataclass(frozen=True)
class _Watched:
    """A tensor of quantized weights, which are ``used`` when a model takes it."""

    held: CodedMatrix | CodedStack
    used: list[StoredWeight]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.held.shape

    def deferred(self, shape: tuple[int, ...], dtype: torch.dtype) -> Deferred | None:
        found = self.held.deferred(shape, dtype)
        self.used.extend(() if found is None else self.held.weights)
        return found


def _captured(quantized: QuantizedCheckpoint, used: list[StoredWeight]) -> fx.GraphModule:
    """The model's graph, none of whose matrices are read; ``used`` takes in the stored weights that it has."""
    watched: dict[str, HeldTensor] = {
        name: _Watched(one, used) if isinstance(one, CodedMatrix | CodedStack) else one
        for name, one in quantized.tensors.items()
    }
    unread = partial(capture_unread, quantized=watched)
    gm = hugging_face.capture_directory(quantized.directory, unread=unread, quantized=True)
    gm.meta[KEY] = dataclasses.replace(source_of(gm), dtype=quantized.dtype)
    Pipeline(canonical_passes()).run(gm)
    record_stored(gm)
    return gm


def _kept(gm: fx.GraphModule, target: str) -> _Kept:
    found = _Kept({}, {}, {})
    for site in sites(gm):
        stored = stored_weights(deferred_of(held_tensor(gm, site.param.fqn)))
        for fqn, weight in zip(site.fqns, stored, strict=False):
            grid = None if weight is None else weight.grid()
            if weight is None or grid is None or fqn in found.weights:
                continue
            given, scales = _input(weight, target)
            found.weights[fqn] = weight
            found.plans[fqn] = Plan(dataclasses.replace(grid, arithmetic="float32", method=MinMax()), given)
            if scales is not None:
                found.inputs[fqn] = scales
    return found


def _input(weight: StoredWeight, target: str) -> tuple[Quant | None, Scales | None]:
    """How an input is quantized, and what is fixed of its scales. How others are chosen at run time no file says, and
    is the consumer's.
    """
    given = weight.input
    if given is None:
        return None, None
    match given.format:
        case Int(bits, symmetric, joint=joint) if given.dynamic:
            return dataclasses.replace(given, format=Int(bits, symmetric, joint=joint)), None
        case Mx(element) if given.dynamic:
            return dataclasses.replace(given, format=Mx(element, _MX_INPUTS.get(target, "even"))), None
        case _ if given.dynamic:
            return given, None
        case _:
            pass
    given, scales = dataclasses.replace(given, method=MinMax()), weight.input_scales()
    if isinstance(given.format, Int) and scales is not None and scales.zero_point is None:
        given = dataclasses.replace(given, format=Int(given.format.bits))
    return given, scales


def _lost(used: Iterable[StoredWeight], kept: _Kept) -> Iterator[str]:
    """A line for each stored weight of the model that no layer of the graph has as it is."""
    planned = set(kept.weights.values())
    for weight in dict.fromkeys(used):
        if weight not in planned:
            order = "its groups are no neighbouring columns" if weight.grid() is None else "graphq has no layer for it"
            yield f"{weight.layer}: {weight.format}: {order}"


def _must_be_equal(layer: str, sqnr: float) -> None:
    if sqnr != math.inf:
        raise PassError(f"{layer}: its codes were rounded anew")
