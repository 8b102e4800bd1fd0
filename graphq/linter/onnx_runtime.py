"""What ONNX Runtime's CPU provider ran in integers, read from the graph that its default session runs.

The optimized graph keeps the names of most nodes and tensors: an op is found by its own name, by the tensor that it
gave, or by what QuantizeLinear made of it.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from graphq.errors import TargetError
from graphq.linter.graph import DEQUANTIZE, QUANTIZE, Graph, Node
from graphq.linter.ops import only_reader
from graphq.linter.report import Runs

INTEGERS: Final = frozenset(
    ("QGemm", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "ConvInteger", "NhwcMaxPool")
)
WEIGHTS: Final = frozenset(("MatMulNBits", "GatherBlockQuantized", "MatMulBnb4"))
_NO_CODES: Final = (INTEGERS | WEIGHTS | {DEQUANTIZE, "Cast"}) - {"NhwcMaxPool"}
_QGEMM_OUTPUT: Final = 8  # its zero point's place
_RENAMED: Final = ("_token_", "/MatMulAddFusion", "/MatMulScaleFusion")  # what its transformers append to names


def observe(graph: Graph) -> tuple[dict[str, Runs], str]:
    """How each node that can be told again ran, by name; and by whom.

    Raises ``TargetError`` for a file that ONNX Runtime does not load or run on random inputs.
    """
    import onnxruntime

    with TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(optimized)
        try:
            session: Any = onnxruntime.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])
            session.run(None, random_inputs(session))
        except Exception as error:  # the library has a type for each status
            said = str(error).strip().splitlines()[0]
            raise TargetError(f"{graph.path}: ONNX Runtime {onnxruntime.__version__} cannot run it: {said}") from error
        ran = Graph(optimized)
    return dict(_told_again(graph, ran)), f"ONNX Runtime {onnxruntime.__version__}"


def random_inputs(session: Any) -> dict[str, Any]:
    """Seeded inputs of the declared shapes. Integers are 0 and 1, masks are true."""
    import numpy as np

    random = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for one in session.get_inputs():
        shape = [size if isinstance(size, int) else free_size(size) for size in one.shape]
        found[one.name] = random_array(random, one.type.removeprefix("tensor(").removesuffix(")"), shape)
    return found


def free_size(name: str | None) -> int:
    """2 for a dimension that is free, and its sum for one that is named by a sum (``past_sequence + sequence``)."""
    parts = [part.strip() for part in (name or "").split("+")]
    return sum(int(part) if part.isdigit() else 2 for part in parts)


def random_array(random: Any, name: str, shape: list[int]) -> Any:
    """An array of ONNX Runtime's name of a type."""
    import numpy as np

    dtype = {"float": "float32", "double": "float64"}.get(name, name)
    if dtype.startswith("float"):
        return random.standard_normal(shape).astype(dtype)
    return np.ones(shape, dtype) if dtype == "bool" else random.integers(0, 2, shape).astype(dtype)


def _told_again(graph: Graph, ran: Graph) -> Iterator[tuple[str, Runs]]:
    in_codes = _codes(ran)
    others = [node for node in ran.nodes if node.kind not in (QUANTIZE, DEQUANTIZE)]
    by_name = {_plain(node.name): node for node in others} | {node.name: node for node in others}
    for node in graph.nodes:
        if node.kind in (QUANTIZE, DEQUANTIZE):
            continue
        made = (ran.producers.get(tensor) for tensor in _names_behind(graph, node.outputs[0]))
        likely = (found for found in (by_name.get(node.name), *made) if found is not None and _is_like(found, node))
        if (found := next(likely, None)) is not None:
            yield node.name, _how(found, in_codes)


def _plain(name: str) -> str:
    for mark in _RENAMED:
        name = name.partition(mark)[0]
    return name


def _names_behind(graph: Graph, tensor: str) -> Iterator[str]:
    """The tensor, and what is made of it by only readers that may run with its maker."""
    yield tensor
    node = only_reader(graph, tensor)
    while node is not None and node.kind in (QUANTIZE, DEQUANTIZE, "Add", "Relu", "Clip"):
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
    return made.kind in (node.kind, f"QLinear{node.kind}", *_MADE_OF.get(node.kind, ()))


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
