"""The ops of an ONNX graph by the kinds that profiles have rows for, with what a consumer runs together as one op."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, final

from graphq.linter.graph import DEQUANTIZE, QUANTIZE, RUN_TIME_QUANTIZE, Graph, Node
from graphq.spec.profile import GEMM, LINEAR, OpRule, Profile

_NO_OPS: Final = frozenset(
    (
        *(QUANTIZE, DEQUANTIZE, RUN_TIME_QUANTIZE, "Constant", "ConstantOfShape", "Shape", "Size", "Identity"),
        *("Dropout", "Cast", "CastLike", "Range"),
    )
)
_ALL_INPUTS: Final = ("Concat", "Max", "Min", "Sum", "Mean")
_DATA: Final = dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "MatMul"), (0, 1)) | {"Where": (1, 2)}
_NORMS: Final = ("LayerNormalization", "InstanceNormalization", "BatchNormalization", "RMSNormalization")
_WEIGHTED: Final = ("Conv", "ConvTranspose", LINEAR, GEMM, *_NORMS, "GroupNormalization")
_FLOATS: Final = (0, 1, 10, 16)  # unknown, FLOAT, FLOAT16, BFLOAT16
_MATRIX: Final = 2


@final
@dataclass(frozen=True, eq=False)
class Op:
    """One op as a consumer runs it: its first node, and those that run with it.

    inputs: its activations. weight, bias: those of the first node, or of the Add behind it. outputs: of the last node.
    """

    nodes: tuple[Node, ...]
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weight: str | None = None
    bias: str | None = None

    @property
    def node(self) -> Node:
        """The first node."""
        return self.nodes[0]

    @property
    def clamp(self) -> Node | None:
        """The Relu or Clip that it ends with, if it does and begins with something else."""
        last = self.nodes[-1]
        return last if len(self.nodes) > 1 and last.kind in ("Relu", "Clip") else None


def row(profile: Profile, kind: str) -> OpRule | None:
    """A kind's row; a Gemm without one of its own is any linear."""
    return profile.ops.get(kind, profile.ops.get(LINEAR) if kind == GEMM else None)


def ops_of(graph: Graph, profile: Profile) -> Iterator[Op]:
    """The graph's ops in order: no quantizers, no constants, no arithmetic on shapes but what ``operators`` names."""
    taken: set[Node] = set()
    for node in graph.nodes:
        if node in taken or not (_computes(graph, node) or node.kind in profile.operators):
            continue
        op = _fused(graph, profile, _with_bias(graph, profile, first_op(graph, node)))
        taken.update(op.nodes)
        yield op


def _computes(graph: Graph, node: Node) -> bool:
    """Whether a node computes with floats that are not known beforehand."""
    made = [output for output in node.outputs if output]
    if node.kind in _NO_OPS or all(output in graph.constants for output in made):
        return False
    return graph.types.get(made[0], 0) in _FLOATS


def first_op(graph: Graph, node: Node) -> Op:
    """The op that a node is by itself."""
    kind = node.kind
    if kind in ("MatMul", GEMM):
        kind = (LINEAR if kind == "MatMul" else GEMM) if node.inputs[1] in graph.constants else "MatMul"
    weighted = kind in _WEIGHTED or (kind == "PRelu" and node.inputs[1] in graph.constants)
    positions = range(len(node.inputs)) if kind in _ALL_INPUTS else _DATA.get(kind, (0,))
    inputs = tuple(name for i in positions if (name := node.input(i)) is not None)
    weight, bias = (node.input(1), node.input(2)) if weighted else (None, None)
    return Op((node,), kind, inputs, tuple(filter(None, node.outputs)), weight, bias)


def only_reader(graph: Graph, tensor: str) -> Node | None:
    """The one node that reads a tensor, once; None where there is another, or where the model gives it."""
    readers = graph.readers.get(tensor, ())
    return readers[0] if len(readers) == 1 and tensor not in graph.outputs else None


def _with_bias(graph: Graph, profile: Profile, op: Op) -> Op:
    """A MatMul by a weight with the Add of its bias; a Gemm, where the consumer makes one of the two."""
    add = only_reader(graph, op.outputs[0])
    if op.kind != LINEAR or op.node.kind != "MatMul" or add is None or add.kind != "Add":
        return op
    other = next((name for name in add.inputs if name != op.outputs[0]), None)
    if other is None:
        return op
    gemm = profile.folds_bias and _is_gemm(graph, op, other)
    if not gemm and other not in graph.constants:
        return op
    return Op((op.node, add), GEMM if gemm else LINEAR, op.inputs, add.outputs, op.weight, other)


def _is_gemm(graph: Graph, op: Op, bias: str) -> bool:
    """Whether ONNX Runtime makes a Gemm of a MatMul and an Add (matmul_add_fusion.cc, 1.31)."""
    x, made, added = (graph.shapes.get(name) for name in (op.inputs[0], op.outputs[0], bias))
    if x is None or added is None or graph.rank(op.weight or "") != _MATRIX:
        return False
    if len(x) == _MATRIX:
        rows, columns = made if made is not None and len(made) == _MATRIX else (x[0], None)
        return added in ((columns,), (1, columns), (rows, 1), (rows, columns))
    return len(added) == 1 and added != (1,) and all(isinstance(size, int) for size in x)


def _fused(graph: Graph, profile: Profile, op: Op) -> Op:
    """The op with what runs with it, by the longest chain of the profile's that fits."""
    kind = LINEAR if op.kind == GEMM else op.kind
    best: Sequence[Node] = ()
    for first, *others in profile.fuses:
        found = _chain(graph, op.outputs, others) if first == kind else ()
        best = max(best, found, key=len)
    if not best:
        return op
    inside = {output for node in (*op.nodes, *best) for output in node.outputs}
    more = [name for node in best for name in first_op(graph, node).inputs if name not in inside]
    inputs = (*op.inputs, *(name for name in more if name not in graph.constants))
    return Op((*op.nodes, *best), op.kind, inputs, best[-1].outputs, op.weight, op.bias)


def _chain(graph: Graph, outputs: tuple[str, ...], kinds: Sequence[str]) -> Sequence[Node]:
    found: list[Node] = []
    for kind in kinds:
        node = only_reader(graph, outputs[0]) if len(outputs) == 1 else None
        if node is None or node.kind != kind:
            return ()
        found.append(node)
        outputs = node.outputs
    return found
