"""What OpenVINO's CPU plugin ran in integers, read from its run-time model.

Each op of that has the names of the ops in the file that it stands for, and a run-time precision; whether a linear's
activations are codes, and not its weight alone, is told by the type of what it reads.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from graphq.errors import GraphqError, TargetError
from graphq.linter.graph import DEQUANTIZE, QUANTIZE, Graph, Node
from graphq.linter.onnx_runtime import FREE_SIZES, apart, random_array
from graphq.linter.ops import only_reader
from graphq.linter.report import Runs

_CODES: Final = ("u8", "i8")
_STORED: Final = ("u8", "i8", "u4", "i4", "u2", "i2")
_NO_OPS: Final = ("Input", "Output", "Const", "Reorder", "Convert")
_PARTS: Final = ("_original", "/WithoutBiases")  # what its transformations append to names
_FUSED: Final = (QUANTIZE, DEQUANTIZE, "Add", "Mul", "BatchNormalization", "Relu", "Clip", "Gelu")
_ANY_KIND: Final = ("Subgraph", "Eltwise", "Reduce", "Math", "MVN", "RMS")
_LAYERS: Final = {
    "Conv": ("Convolution",),
    "ConvTranspose": ("Deconvolution",),
    "Gemm": ("FullyConnected", "MatMul"),
    "MatMul": ("FullyConnected", "MatMul"),
    **{
        kind: (kind,)
        for kind in ("Reshape", "Transpose", "Split", "Gather", "DepthToSpace", "SpaceToDepth", "Tile", "Pad")
    },
    "Where": ("Select",),
    **dict.fromkeys(("ReduceMean", "ReduceMax", "ReduceMin"), ("Reduce",)),
    "Concat": ("Concatenation",),
    "Resize": ("Interpolate",),
    "Flatten": ("Reshape",),
    "Squeeze": ("Reshape",),
    "Unsqueeze": ("Reshape",),
    "Slice": ("StridedSlice", "Slice"),
    "Expand": ("Broadcast",),
    "MaxPool": ("Pooling",),
    "AveragePool": ("Pooling",),
    "GlobalAveragePool": ("Reduce", "Pooling"),
    "GlobalMaxPool": ("Reduce", "Pooling"),
}


@final
@dataclass(frozen=True)
class RunOp:
    """An op of the run-time model: what it stands for, its layer and precision, and the type of its first input."""

    names: tuple[str, ...]
    layer: str
    precision: str
    reads: str


def observe(graph: Graph) -> tuple[dict[str, Runs], str]:
    """How each node that can be told again ran, by name; and by whom.

    Raises ``TargetError`` where OpenVINO is not installed, or does not compile or run the file.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("openvino")
    except PackageNotFoundError as error:
        raise TargetError("run: openvino: it is not installed; pip install openvino==2026.4.1") from error
    return dict(_told_again(graph, run_apart(graph.path))), f"OpenVINO {installed}"


def run_apart(path: Path) -> list[RunOp]:
    """``run_here`` in a process of its own: a file that makes OpenVINO divide by zero (2026.4.1 does) ends that one."""
    printed, problem = apart("graphq.linter.openvino", path)
    if problem is not None:
        raise TargetError(f"{path}: OpenVINO cannot run it: {problem}")
    return [RunOp(tuple(names), *rest) for names, *rest in json.loads(printed.splitlines()[-1])]


def run_here(path: Path) -> list[RunOp]:
    """The run-time model of a file, once it has run on random inputs. Raises OpenVINO's ``RuntimeError``."""
    import numpy as np
    import openvino

    core: Any = openvino.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_NUM_THREADS": 1})
    ports = [
        (np.dtype(port.get_element_type().to_dtype()).name, [*port.get_partial_shape()]) for port in compiled.inputs
    ]
    for size in FREE_SIZES:
        random = np.random.default_rng(0)
        shapes = [[d.get_length() if d.is_static else size for d in shape] for _, shape in ports]
        feeds = [random_array(random, name, shape) for (name, _), shape in zip(ports, shapes, strict=True)]
        try:
            compiled(feeds)
        except RuntimeError:
            if size == FREE_SIZES[-1]:
                raise
        else:
            break
    return [_described(op) for op in compiled.get_runtime_model().get_ops()]


def _described(op: Any) -> RunOp:
    info = op.get_rt_info()
    names, layer, precision = (
        info[key].astype(str) for key in ("originalLayersNames", "layerType", "runtimePrecision")
    )
    reads = op.get_input_element_type(0).to_string() if op.get_input_size() else ""
    return RunOp(tuple(map(_plain, names.split(","))), layer, precision, reads)


def _told_again(graph: Graph, ops: list[RunOp]) -> Iterator[tuple[str, Runs]]:
    ran: dict[str, list[RunOp]] = {}
    for op in ops:
        for name in op.names if op.layer not in _NO_OPS else ():
            ran.setdefault(name, []).append(op)
    for node in graph.nodes:
        if node.kind in (QUANTIZE, DEQUANTIZE) or not node.outputs:
            continue
        found = [op for name in _names(graph, node) for op in ran.get(name, ())]
        likely = [op for op in found if op.layer in _LAYERS.get(node.kind, (node.kind,))]
        if not likely and node.kind not in _LAYERS:
            likely = [op for op in found if op.layer in _ANY_KIND]
        if likely:
            yield node.name, _how(likely[0])


def _names(graph: Graph, node: Node) -> Iterator[str]:
    """The names that a run-time op may have of a node's: its own, those of what was fused behind it, and that of the
    DequantizeLinear in front (a linear that dequantizes has no other).
    """
    yield node.name
    yield from node.outputs
    behind = only_reader(graph, node.outputs[0])
    fused = _FUSED if node.kind in ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add") else (QUANTIZE, DEQUANTIZE)
    while behind is not None and behind.kind in fused:
        yield behind.name
        yield from behind.outputs
        behind = only_reader(graph, behind.outputs[0])
    front = graph.producers.get(node.input(0) or "")
    if front is not None and front.kind == DEQUANTIZE and only_reader(graph, front.outputs[0]) is node:
        yield front.name


def _plain(name: str) -> str:
    for part in _PARTS:
        name = name.partition(part)[0]
    return name


def _how(op: RunOp) -> Runs:
    if op.layer in ("Subgraph", "Eltwise", "Select") or op.precision not in _STORED:
        return "float"  # the first two read codes, and compute with floats; a Select's precision is its condition's
    if op.layer in ("FullyConnected", "MatMul"):
        return "integers" if op.reads in _CODES else "weights"
    return "integers"


if __name__ == "__main__":
    try:
        found = [dataclasses.astuple(op) for op in run_here(Path(sys.argv[1]))]
    except (RuntimeError, GraphqError, TypeError) as error:  # TypeError: of an input that is no tensor of numbers
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        sys.exit(lines[-1] if lines else "it gives no reason")
    print(json.dumps(found))  # noqa: T201
