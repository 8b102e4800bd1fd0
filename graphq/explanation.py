"""``graphq.explain`` and ``graphq.compare``: what a compile would do; and the graph in the middle of one."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from graphq.algorithms import unmatched
from graphq.capture import hugging_face
from graphq.capture.source import source_of
from graphq.checks import asks_for_nothing, check_calibration, none_quantized, refusals
from graphq.compiler import NOTHING_QUANTIZED, Inputs, capture, modules_of, spec_for, stored_bits
from graphq.data.batches import complete_all
from graphq.errors import SpecError
from graphq.ir.cache_plans import notes_of, plan_caches, problems_of
from graphq.ir.pipeline import Pipeline
from graphq.ir.unnamed import unnamed
from graphq.lowering.checkpoints.sources.read import is_quantized
from graphq.lowering.targets import unheld
from graphq.passes.annotate import decide
from graphq.passes.calibrate import Calibrate
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.pipelines import (
    attention_problems,
    cache_problems,
    canonical_passes,
    fallback_problems,
    passes_for,
    placement,
    unmatched_activations,
    with_steps,
)
from graphq.report import Difference, Report, algorithm_text, difference, make_report, spec_settings
from graphq.spec.rules import Spec


def explain(
    model: nn.Module | str | os.PathLike[str],
    spec: Spec | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    profile: str | None = None,
    target: str | None = None,
    target_options: Mapping[str, Any] | None = None,
    inputs: Inputs | None = None,
    dialect: str | None = None,
    cache: bool = True,
    mask: str | None = None,
    shapes: Mapping[str, int] | None = None,
    trust_remote_code: bool = False,
) -> Report:
    """What ``compile``, given the same, would do with each layer, and by which rule. Reads no weights of a directory.

    Each parameter of two or more axes that is multiplied with an activation and is no layer has its reason. What
    ``compile`` would refuse is a note that says so. ``profile``: as ``compile`` takes it; notes say how many tensors
    are quantized then, and which ops run in integers. ``target``, ``target_options``: as ``compile`` takes them; notes
    say what the target cannot hold.
    """
    parsed = spec_for(spec, profile, dialect)
    gm = _captured(model, inputs, cache, mask, shapes, trust_remote_code)
    return _explained(gm, parsed, target, target_options or {})


def compare(
    model: nn.Module | str | os.PathLike[str],
    spec: Spec | Mapping[str, Any] | str | os.PathLike[str],
    other: Spec | Mapping[str, Any] | str | os.PathLike[str],
    *,
    inputs: Inputs | None = None,
    dialect: str | None = None,
    cache: bool = True,
    mask: str | None = None,
    shapes: Mapping[str, int] | None = None,
    trust_remote_code: bool = False,
) -> Difference:
    """What would change for each layer of ``model`` with ``other`` in place of ``spec``. Reads no weights.

    ``dialect`` names that of ``spec`` where it cannot be recognised; that of ``other`` is recognised.
    """
    before, after = spec_for(spec, None, dialect), spec_for(other, None, None)
    gm = _captured(model, inputs, cache, mask, shapes, trust_remote_code)
    return difference(_explained(gm, before), _explained(gm, after))


def _captured(
    model: nn.Module | str | os.PathLike[str],
    inputs: Inputs | None,
    cache: bool,
    mask: str | None,
    shapes: Mapping[str, int] | None,
    trust: bool,
) -> fx.GraphModule:
    """The graph, which nothing is run to check: no weights of a directory are read."""
    return capture(model, inputs, None, False, cache, mask, shapes, check_capture=False, trust_remote_code=trust)


def _explained(
    gm: fx.GraphModule, spec: Spec, target: str | None = None, options: Mapping[str, Any] | None = None
) -> Report:
    gm = with_steps(gm, spec)
    resolved, notes = decide(gm, spec)
    source = source_of(gm)
    without_layers, kept_nothing = unmatched_activations(gm, spec)
    without_layers += unmatched(spec, {fqn: found.layer for fqn, found in resolved.items()}, modules_of(gm))
    asked = [f"dialect: {spec.dialect}"]
    asked += [f"{f'{a.source}: ' if a.source else ''}algorithm {algorithm_text(a)}" for a in spec.algorithms]
    others = unnamed(gm)
    cached = plan_caches(gm, spec.cache)
    asked += notes_of(source, cached) if cached else []
    nothing = none_quantized(spec, resolved, others)[:1]  # the table has the rest
    asked_for = [*refusals(spec), *fallback_problems(spec), *cache_problems(spec)]
    lacks, attention_notes = attention_problems(gm, spec)
    asked += attention_notes
    without_layers += [*problems_of(cached, spec.cache), *lacks]
    if target is not None:
        asked_for += unheld(gm, target, resolved, spec, **(options or {}))
    refused = [f"compile refuses: {problem}" for problem in (*nothing, *asked_for, *without_layers)]
    loud = [NOTHING_QUANTIZED] if asks_for_nothing(spec) else []
    bits = source.dtype.itemsize * 8
    placed, between = placement(gm, spec)
    lines = [*loud, *source.notes, *notes, *kept_nothing, *placed, *asked, *refused]
    made = make_report(resolved, lines, bits, None, spec_settings(spec), stored_bits(gm), others, between)
    return dataclasses.replace(made, caches=cached)


def graph_after(
    model: str | os.PathLike[str],
    spec: Spec | Mapping[str, Any] | str | os.PathLike[str],
    after: str | None = None,
    *,
    calibration: Iterable[object] | None = None,
    dialect: str | None = None,
) -> fx.GraphModule:
    """The graph of a model directory right after the pass named ``after`` (None: the last).

    The weights are loaded where a pass up to there needs them. Raises what ``compile`` raises; algorithms are ignored.
    """
    parsed = dataclasses.replace(spec_for(spec, None, dialect), algorithms=())
    passes = passes_for(parsed)
    names = [step.name for step in passes]
    if after is None:
        after = names[-1]
    if after not in names:
        raise SpecError(f"{after}: no such pass; there are {', '.join(names)}")
    passes = passes[: names.index(after) + 1]
    needed = any(isinstance(step, Calibrate | QuantizeWeights) for step in passes)
    is_coded = is_quantized(Path(model))
    gm = capture(model, weights=needed) if is_coded else hugging_face.capture_directory(Path(model), weights=needed)
    source = source_of(gm)
    if needed:
        Pipeline(canonical_passes()).run(gm)
        check_calibration(parsed, decide(gm, parsed)[0], calibration)
    with torch.no_grad():
        Pipeline(passes).run(gm, complete_all(source, calibration) if calibration is not None else None)
    return gm
