"""Tiny models of ``tests.models`` compiled, from captures that the tests of a process share."""

from typing import Any

import torch

from graphq.compiler import Compiled
from graphq.frontends import load_spec
from graphq.ir.pipeline import Pipeline
from graphq.passes.annotate import decide
from graphq.pipelines import canonical_passes, passes_for
from graphq.report import make_report
from graphq.spec.match import parse_match
from graphq.spec.plan import Plan
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Rule, Spec
from tests.models import captured, random_inputs


def blocks_spec(weight: str, input: str | None = None) -> Spec:
    """All layers of the repeated blocks in these formats."""
    return Spec((Rule(parse_match("blocks"), Plan(parse_quant(weight), parse_quant(input) if input else None)),))


def compile_captured(family: str, spec: Spec | dict[str, Any], batches: int = 2) -> Compiled:
    """What ``graphq.compile`` makes of ``tiny(family)``, without capturing it again; calibrated on random inputs."""
    gm, parsed = captured(family), spec if isinstance(spec, Spec) else load_spec(spec)
    canonical = canonical_passes()
    Pipeline(canonical).run(gm)
    resolved, notes = decide(gm, parsed)
    with torch.no_grad():
        Pipeline(passes_for(parsed)[len(canonical) :]).run(
            gm, [random_inputs(gm, seed=100 + i) for i in range(batches)]
        )
    return Compiled(gm, parsed, make_report(resolved, notes, 32), 0)
