"""The ONNX types of codes and scales: torch's exporter knows bytes, and types of 2, 4 and 6 bits are none of torch's.

Integers of 5 to 8 bits are INT8, of 3 and 4 INT4, of 2 INT2 where the opset has it, else INT4. With a zero point those
of at most 4 bits are unsigned, codes and zero points raised by half the range, which changes no difference of the two:
ONNX Runtime and the compilers of NPUs take UINT4 with a zero point, and few take INT4 with one.
"""

from typing import Any, Final

import onnx_ir as ir
from torch import fx

from graphq import numerics
from graphq.ir.views import Dequantize, Param, ops_of
from graphq.lowering.onnx.trace_ops import integer_matmul
from graphq.numerics.scales import scale_dtype
from graphq.spec.formats import Format, Int, element_name

INT2_SINCE: Final = 25
FLOATS: Final = {
    "float8_e4m3fn": ir.DataType.FLOAT8E4M3FN,
    "float8_e5m2": ir.DataType.FLOAT8E5M2,
    "float6_e2m3": ir.DataType.FLOAT6E2M3,
    "float6_e3m2": ir.DataType.FLOAT6E3M2,
    "float4_e2m1": ir.DataType.FLOAT4E2M1,
}
"""The types of floating-point elements."""
RAISED: Final = {ir.DataType.UINT4: 8, ir.DataType.UINT2: 2}
"""By how much the stored codes of these types are above the QDQ form's."""


def type_of_codes(format: Format, raised: bool, opset: int) -> ir.DataType | None:
    """The type that codes of ``format`` are stored in, None where it is that of the bytes that hold them."""
    match format:
        case Int(bits) if bits <= 4:
            if bits == 2 and opset >= INT2_SINCE:
                return ir.DataType.UINT2 if raised else ir.DataType.INT2
            return ir.DataType.UINT4 if raised else ir.DataType.INT4
        case _:
            name = element_name(format)
            return ir.DataType.INT4 if name == "int4" else FLOATS.get(name)


def set_types(model: ir.Model, gm: fx.GraphModule, opset: int) -> None:
    """Initializers and values of ``model``, exported from ``gm``, have their element types; ``opset``: the highest."""
    for node in model.graph:
        if node.op_type == "Cast" and (kind := ir.DataType(node.attributes["to"].as_int())) in FLOATS.values():
            node.outputs[0].dtype = kind
    inputs = dict(zip(gm.graph.find_nodes(op="placeholder"), model.graph.inputs, strict=True))
    for op in ops_of(gm):
        if isinstance(op, Dequantize) and op.codes.node in inputs:
            kind = FLOATS.get(element_name(numerics.parse_format(op.format)))
            if kind is not None:
                _take_floats(model, inputs[op.codes.node], kind)
        elif isinstance(op, Dequantize) and isinstance(op.codes, Param):
            format = numerics.parse_format(op.format)
            zero_point = op.zero_point.fqn if isinstance(op.zero_point, Param) else None
            kind = type_of_codes(format, zero_point is not None, opset)
            _set(model, op.codes.fqn, kind)
            _set(model, zero_point, kind)
            if isinstance(op.scale, Param):
                _set(model, op.scale.fqn, _SCALES.get(str(scale_dtype(format))))
        elif op.node.target is integer_matmul:
            _, weight, zero_point, _, text = op.node.args
            for held in (weight, zero_point):
                if isinstance(held, fx.Node):
                    _set(model, str(held.target), type_of_codes(numerics.parse_format(str(text)), False, opset))


def _take_floats(model: ir.Model, value: ir.Value, kind: ir.DataType) -> None:
    """An input that the exporter took for bytes is of this type. Its sizes are those of its values, which are read
    anyhow: ONNX Runtime 1.31 has no Shape of float8.
    """
    if value.dtype == kind:
        return
    value.dtype = kind
    readers = [node for node, _ in value.uses() if node.op_type == "Shape"]
    if readers:
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
        cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.FLOAT, value.shape
        model.graph.insert_before(model.graph[0], cast)
        for node in readers:
            node.replace_input_with(0, cast.outputs[0])


_SCALES: Final = {
    "torch.float8_e8m0fnu": ir.DataType.FLOAT8E8M0,
    "torch.float8_e4m3fn": ir.DataType.FLOAT8E4M3FN,
}


def _set(model: ir.Model, name: str | None, kind: ir.DataType | None) -> None:
    """The initializer of this name, bytes until now, is of this type. One that is, or is none, is left alone."""
    value = model.graph.initializers.get(name or "")
    if value is None or kind is None or value.dtype == kind or value.const_value is None:
        return
    codes: Any = value.const_value.numpy()
    if kind in (ir.DataType.INT2, ir.DataType.INT4, *RAISED):
        made = (
            (codes + RAISED[kind]).astype("uint8").astype(kind.numpy())
            if kind in RAISED
            else codes.astype(kind.numpy())
        )
    else:
        made = codes.view("uint8").view(kind.numpy())
    value.const_value = ir.tensor(made, dtype=kind, name=value.name)
    value.dtype = kind
