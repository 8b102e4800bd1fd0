"""``lint``: what a consumer will run in integers of an ONNX model, whoever wrote it, predicted by its profile and seen.

The profile is the table by which graphq itself places quantizers; a prediction reads nothing but the file.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from graphq.errors import SpecError, TargetError
from graphq.linter.graph import DEQUANTIZE, Graph, TensorGrid
from graphq.linter.ops import ops_of
from graphq.linter.report import LintedOp, LintReport, Problem, Runs
from graphq.linter.rules import judge
from graphq.linter.warnings import warnings_of
from graphq.lowering.profiles import PROFILES, profile_named
from graphq.spec.profile import Profile

_MODEL: Final = "model.onnx"
_SUBGRAPHS: Final = ("If", "Loop", "Scan")


def lint(path: str | Path, profile: str | Profile, run: bool = False) -> LintReport:
    """How ``profile``'s consumer will run the model in ``path``, an .onnx file or a directory with ``model.onnx``.

    run: execute it, too, where the consumer is ONNX Runtime's CPU provider or OpenVINO's CPU plugin, and say what ran.
    Raises ``SpecError`` for a profile that there is not, or that nothing here runs; ``TargetError`` for a file that
    cannot be read or, with ``run``, loaded.
    """
    table = profile_named(profile) if isinstance(profile, str) else profile
    file = Path(path) / _MODEL if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise TargetError(f"{file}: no such file")
    graph = Graph(file, overridable=table.overridable, strips=table.strips)
    verdicts = {op: judge(graph, table, op) for op in ops_of(graph, table)}
    ran, observed = _observe(Graph(file) if table.strips else graph, table) if run else ({}, None)
    ops = tuple(
        LintedOp(
            op.node.name,
            op.kind,
            verdict.runs,
            verdict.counted,
            verdict.problem,
            next((ran[node.name] for node in op.nodes if node.name in ran), None),
            tuple(node.name for node in op.nodes),
        )
        for op, verdict in verdicts.items()
    )
    return LintReport(
        str(file),
        table.name,
        ops,
        tuple(_model_problems(graph, table)),
        tuple(warnings_of(graph, table, verdicts)),
        observed,
        tuple(_notes(graph)),
    )


def _model_problems(graph: Graph, profile: Profile) -> Iterator[Problem]:
    low, high = profile.reads or profile.opsets
    if not low <= graph.opset <= high:
        fix = f"write it in opset {low} to {high}"
        yield Problem("the model", f"{profile.name} reads opsets {low} to {high}, this is {graph.opset}", fix)
    read = [grid for node in graph.nodes if node.kind == DEQUANTIZE and (grid := graph.grid(node.outputs[0]))]
    refused = [grid for grid in read if grid.type in profile.refuses]
    if refused:
        kinds = ", ".join(sorted({grid.type for grid in refused}))
        reason = f"{profile.name} does not read {kinds} codes, and so not this file"
        yield Problem(refused[0].codes, reason, "store them in a wider type")
    wrong = [grid for grid in read if grid.scale is not None and not np.all((grid.scale > 0) & np.isfinite(grid.scale))]
    if wrong:
        where = wrong[0].tensor + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else "")
        yield Problem(where, "its scale is no positive number", "quantize it with one that is")
    if graph.defaults:
        where = graph.defaults[0] + (f" and {len(graph.defaults) - 1} more" if len(graph.defaults) > 1 else "")
        reason = f"it is an input, too, and so no constant to {profile.name}"
        yield Problem(where, reason, "take it out of the graph's inputs")
    cut = [grid for grid in read if profile.whole_blocks and _has_short_block(graph, grid)]
    if cut:
        reason = f"{profile.name} does not read a last block that is shorter than {cut[0].block}, and so not this file"
        yield Problem(cut[0].codes, reason, "use groups that divide the axis")
    unknown = graph.unknown_dimensions() if profile.static else ()
    if unknown:
        yield Problem(", ".join(unknown), f"{profile.name} wants every dimension an integer", "fix the shapes")
    operators = {kind for one in PROFILES.values() for kind in one.operators if kind.startswith(("QLinear", "QGemm"))}
    strange = [node for node in graph.nodes if node.kind in operators - {*profile.operators}]
    if strange:
        kinds = ", ".join(dict.fromkeys(node.kind for node in strange))
        reason = f"{profile.name} has no {kinds}"
        yield Problem(strange[0].name, reason, "write QuantizeLinear and DequantizeLinear around ops of ONNX")
    if not any(node.kind in (DEQUANTIZE, *profile.operators, *operators) for node in graph.nodes):
        yield Problem("the model", "nothing in it is quantized", "quantize it first")


def _has_short_block(graph: Graph, grid: TensorGrid) -> bool:
    size = graph.shapes.get(grid.codes, ())[grid.axis or 0 :][:1]
    return grid.block is not None and bool(size) and isinstance(size[0], int) and size[0] % grid.block != 0


def _notes(graph: Graph) -> Iterator[str]:
    for node in graph.nodes:
        if node.kind in _SUBGRAPHS:
            yield f"{node.name}: the ops inside this {node.kind} are not looked at"


def _observe(graph: Graph, profile: Profile) -> tuple[dict[str, Runs], str]:
    for name in graph.inputs:
        if graph.rank(name) is None:
            raise TargetError(f"{graph.path}: run: the input {name} has no shape, and there is nothing to run it on")
    match profile.name.partition("+")[0]:  # the consumer without its options
        case "ort-cpu":
            from graphq.linter import onnx_runtime

            return onnx_runtime.observe(graph)
        case "openvino":
            from graphq.linter import openvino

            return openvino.observe(graph)
        case name:
            raise SpecError(f"run: {name}: nothing here runs it; ort-cpu and openvino can be run")
