"""ONNX files in ONNX Runtime: what a session makes of them, and what they compute."""

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor


def run(
    folder: Path, *inputs: Tensor, optimize: bool = True, sizes: dict[str, int] | None = None
) -> tuple[list[Tensor], Counter[str]]:
    """The outputs of ``model.onnx``, and the ops that the session runs; ``sizes``: of dimensions that become static."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder.with_suffix(".optimized"))
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for name, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    feeds = {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)}
    found: Any = session.run(None, feeds)
    ran = onnx.load(folder.with_suffix(".optimized"), load_external_data=False).graph.node
    return [torch.from_numpy(y) for y in found], Counter(node.op_type for node in ran)


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference in a row, by the row's largest magnitude."""
    rows = expected.abs().amax(-1, keepdim=True)
    return float(((found - expected).abs() / rows.where(rows > 0, 1.0)).max())
