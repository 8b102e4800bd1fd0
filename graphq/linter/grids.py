"""The grid that a tensor has to a consumer: also behind and in front of ops that pass codes, and as it retypes them."""

from graphq.linter.graph import DEQUANTIZE, QUANTIZE, Graph, Node, TensorGrid
from graphq.linter.ops import first_op, only_reader
from graphq.spec.formats import Int, parse_format
from graphq.spec.profile import Profile


def source_grid(graph: Graph, profile: Profile, tensor: str) -> TensorGrid | None:
    """A tensor's grid, also behind ops through which this consumer passes codes."""
    grid = graph.grid(tensor)
    node = graph.producers.get(tensor)
    if grid is None and node is not None:
        rule = profile.ops.get(node.kind)
        if rule is not None and rule.output == "same" and rule.passes and tensor not in graph.constants:
            first, *others = (source_grid(graph, profile, name) for name in first_op(graph, node).inputs)
            alike = first is not None and all(other is not None and other.same(first) for other in others)
            return first if alike else None
    return grid


def output_grid(graph: Graph, profile: Profile, tensor: str) -> TensorGrid | None:
    """The grid that a tensor is quantized to, also behind ops in front of which this consumer moves quantizers."""
    readers = graph.readers.get(tensor, ())
    for node in readers:
        if node.kind == QUANTIZE:
            made = graph.readers.get(node.outputs[0], ())
            found = graph.grid(made[0].outputs[0]) if made and made[0].outputs else None
            return found or _quantizers_grid(graph, node)
    node = only_reader(graph, tensor)
    rule = profile.ops.get(node.kind) if node is not None else None
    if node is None or rule is None or not rule.lifts or len(node.outputs) != 1:
        return None
    return None if only_reader(graph, node.outputs[0]) is None else output_grid(graph, profile, node.outputs[0])


def effective_type(graph: Graph, profile: Profile, grid: TensorGrid) -> str:
    """The type of codes, as the consumer retypes them where one DequantizeLinear, for one op, alone reads them."""
    if grid.type not in profile.retypes or grid.constant:
        return grid.type
    readers = graph.readers.get(grid.codes, ())
    if len(readers) != 1 or readers[0].kind != DEQUANTIZE:
        return grid.type
    tensor = readers[0].outputs[0]
    once = len(graph.readers.get(tensor, ())) + (tensor in graph.outputs) == 1
    return profile.retypes[grid.type] if once else grid.type


def _quantizers_grid(graph: Graph, node: Node) -> TensorGrid:
    """The grid of a QuantizeLinear whose codes the model gives away."""
    codes = node.outputs[0]
    scale, zero_point = graph.array(node.input(1)), graph.array(node.input(2))
    return TensorGrid(
        node.inputs[0], codes, graph.code_type(codes, node.input(2)), scale, zero_point, None, None, False
    )


def code_range(element: str) -> tuple[int, int]:
    """The lowest and the highest code of a type."""
    format = parse_format(element)
    assert isinstance(format, Int)
    return (-(1 << format.bits - 1), (1 << format.bits - 1) - 1) if format.signed else (0, (1 << format.bits) - 1)
