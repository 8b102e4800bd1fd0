"""What ONNX Runtime's CPU provider ran in integers, read from the graph that its default session runs.

The optimized graph keeps the names of most nodes and tensors: an op is found by its own name, by the tensor that it
gave, or by what QuantizeLinear made of it.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from graphq.errors import TargetError
from graphq.linter.graph import DEQUANTIZE, QUANTIZE, Graph, Node
from graphq.linter.ops import only_reader
from graphq.linter.report import Runs

FREE_SIZES: Final = (2, 16, 224)  # tried in turn: a kernel may be wider than two, and a table shorter than a hundred
INTEGERS: Final = frozenset(
    ("QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "ConvInteger", "NhwcMaxPool")
)
WEIGHTS: Final = frozenset(("MatMulNBits", "GatherBlockQuantized", "MatMulBnb4"))
_NO_CODES: Final = (INTEGERS | WEIGHTS | {DEQUANTIZE, "Cast"}) - {"NhwcMaxPool"}
_QGEMM_OUTPUT: Final = 8  # its zero point's place
_RENAMED: Final = ("_token_", "_nchwc", "/MatMulAddFusion", "/MatMulScaleFusion")  # what its passes append to names
_BLOCKED: Final = "com.microsoft.nchwc."  # the domain of float convolutions and pools in blocks of channels
_LAYOUT: Final = ("Transpose", f"{_BLOCKED}ReorderOutput")


def observe(graph: Graph) -> tuple[dict[str, Runs], str]:
    """How each node that can be told again ran, by name; and by whom.

    Raises ``TargetError`` for a file that ONNX Runtime does not load or run on random inputs.
    """
    by = f"ONNX Runtime {version('onnxruntime')}"
    with TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        if (problem := run_apart(graph.path, optimized)) is not None:
            raise TargetError(f"{graph.path}: {by} cannot run it: {problem}")
        ran = Graph(optimized, checked=False)
    return dict(_told_again(graph, ran)), by


def run_apart(path: Path, optimized: Path) -> str | None:
    """``run_here`` in a process of its own: a file on which ONNX Runtime aborts (1.31.1 does) ends that one."""
    return apart("graphq.linter.onnx_runtime", path, optimized)[1]


def apart(module: str, *arguments: Path) -> tuple[str, str | None]:
    """What a module prints as a program, in a process of its own; and what is wrong, if it ends otherwise than well."""
    command = [sys.executable, "-P", "-m", module, *map(str, arguments)]  # -P: nothing from where it is called
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode < 0:
        return "", f"its process ended with {signal.Signals(-done.returncode).name}"
    lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
    return done.stdout, lines[-1] if done.returncode else None


def run_here(path: Path, optimized: Path) -> str | None:
    """What keeps a default session from running the file on random inputs; None where it has, and has written the
    graph that it ran.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(optimized)
    problem = None
    try:
        session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - the library has a type for each status
        return first_line(error)
    for size in FREE_SIZES:
        try:
            session.run(None, random_inputs(session, size))
        except Exception as error:  # noqa: BLE001
            problem = problem or first_line(error)
        else:
            return None
    return problem


def first_line(error: Exception) -> str:
    """What an exception says, in a line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def random_inputs(session: Any, free: int = 2) -> dict[str, Any]:
    """Seeded inputs of the declared shapes, ``free`` where these are. Integers are 0 and 1, masks are true.

    Raises ``TargetError`` for an input that is no tensor of numbers.
    """
    import numpy as np

    random = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for one in session.get_inputs():
        shape = [size if isinstance(size, int) else free_size(size, free) for size in one.shape]
        found[one.name] = random_array(random, one.type.removeprefix("tensor(").removesuffix(")"), shape)
    return found


def free_size(name: str | None, free: int = 2) -> int:
    """``free`` for a dimension, and its sum for one that is named by a sum (``past_sequence + sequence``)."""
    parts = [part.strip() for part in (name or "").split("+")]
    return sum(int(part) if part.isdigit() else free for part in parts)


def random_array(random: Any, name: str, shape: list[int]) -> Any:
    """An array of ONNX Runtime's name of a type. Raises ``TargetError`` for what is none of numpy's numbers."""
    import numpy as np

    dtype = {"float": "float32", "double": "float64"}.get(name, name)
    if not dtype.startswith(("float", "int", "uint", "bool")) or dtype.startswith("float8"):
        raise TargetError(f"lint makes no inputs of {name}")
    if dtype.startswith("float"):
        return random.standard_normal(shape).astype(dtype)
    return np.ones(shape, dtype) if dtype == "bool" else random.integers(0, 2, shape).astype(dtype)


def _told_again(graph: Graph, ran: Graph) -> Iterator[tuple[str, Runs]]:
    in_codes = _codes(ran)
    others = [node for node in ran.nodes if node.kind not in (QUANTIZE, DEQUANTIZE)]
    by_name = {_plain(node.name): node for node in others} | {node.name: node for node in others}
    for node in graph.nodes:
        if node.kind in (QUANTIZE, DEQUANTIZE) or not node.outputs:
            continue
        behind = list(_names_behind(graph, node.outputs[0]))
        made = (*_makers(ran, behind), *(by_name.get(tensor) for tensor in behind))
        likely = (found for found in (by_name.get(node.name), *made) if found is not None and _is_like(found, node))
        if (found := next(likely, None)) is not None:
            yield node.name, _how(found, in_codes)


def _makers(ran: Graph, tensors: Sequence[str]) -> Iterator[Node | None]:
    """What made the tensors in the optimized graph, also in front of what changes their layout back."""
    for tensor in tensors:
        node = ran.producers.get(tensor)
        yield node
        if node is not None and node.kind in _LAYOUT:
            yield ran.producers.get(node.inputs[0])


def _plain(name: str) -> str:
    for mark in _RENAMED:
        name = name.partition(mark)[0]
    return name


def _names_behind(graph: Graph, tensor: str) -> Iterator[str]:
    """The tensor, and what is made of it by only readers that may run with its maker."""
    yield tensor
    node = only_reader(graph, tensor)
    while node is not None and node.kind in (QUANTIZE, DEQUANTIZE, "BatchNormalization", "Mul", "Add", "Relu", "Clip"):
        yield node.outputs[0]
        node = only_reader(graph, node.outputs[0])


_MADE_OF: Final = {
    "MatMul": (
        "Gemm",
        "FusedMatMul",
        "FusedGemm",
        "QGemm",
        "MatMulNBits",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
    ),
    "Gemm": ("FusedGemm", "QGemm", "MatMulNBits"),
    "Conv": ("FusedConv", "NhwcFusedConv"),
    "MaxPool": ("NhwcMaxPool",),
}


def _is_like(made: Node, node: Node) -> bool:
    """Whether an optimized node may be the one in the file, by its type."""
    return made.kind.removeprefix(_BLOCKED) in (node.kind, f"QLinear{node.kind}", *_MADE_OF.get(node.kind, ()))


def _codes(ran: Graph) -> set[str]:
    """The tensors of codes in the optimized graph."""
    found = {name for name, number in ran.types.items() if number in (2, 3)}  # UINT8, INT8
    for node in ran.nodes:
        makes = node.kind == QUANTIZE or node.kind.startswith("QLinear")
        requantizes = node.kind == "QGemm" and node.input(_QGEMM_OUTPUT) is not None
        passes = node.inputs and node.inputs[0] in found and node.kind not in _NO_CODES
        if makes or requantizes or passes:
            found.update(node.outputs)
    return found


def _how(node: Node, in_codes: set[str]) -> Runs:
    if node.kind.startswith("QLinear") or node.kind in INTEGERS:
        return "integers"
    if node.kind in WEIGHTS:
        return "weights"
    return "integers" if node.inputs and node.inputs[0] in in_codes else "float"


if __name__ == "__main__":
    sys.exit(run_here(Path(sys.argv[1]), Path(sys.argv[2])))
