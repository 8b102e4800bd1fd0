"""Constants as initializers: compilers of NPUs, and tools that edit models, look for constants among those alone."""

import onnx_ir as ir

from graphq.lowering.onnx.zero_points import initializer


def hold_constants(model: ir.Model) -> int:
    """Every Constant of numbers is an initializer, equal ones are one, named after their type and shape; the number of
    Constants that are gone. One that a subgraph gives stays: its outputs are nodes' own.
    """
    count = 0
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.op_type != "Constant" or node.domain != "" or node.graph is None:
            continue
        (value,) = node.outputs
        tensor = ir.convenience.get_const_tensor(value)
        inner = node.graph is not model.graph and value.is_graph_output()
        if tensor is None or tensor.dtype == ir.DataType.STRING or inner:
            continue
        held = initializer(model.graph, tensor, "constants")
        for place, given in enumerate(model.graph.outputs):
            if given is value:  # its name is the output's
                read = ir.node("Identity", [held])
                read.outputs[0].name, read.outputs[0].type, read.outputs[0].shape = value.name, held.type, held.shape
                node.graph.insert_before(node, read)
                model.graph.outputs[place] = read.outputs[0]
        ir.convenience.replace_all_uses_with(value, held)
        node.graph.remove(node, safe=True)
        count += 1
    return count
