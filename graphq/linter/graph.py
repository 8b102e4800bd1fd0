"""An ONNX file as lint sees it: nodes, who makes and reads each tensor, constants, shapes, and grids.

A grid is what a DequantizeLinear says of a tensor: the type of its codes, scale, zero point, axis, block
(ONNX operator specification, QuantizeLinear and DequantizeLinear).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from graphq.errors import TargetError
from graphq.linter.load import captured, default_opset, load

DOMAINS: Final = ("", "ai.onnx", "com.microsoft")
QUANTIZE: Final = "QuantizeLinear"
DEQUANTIZE: Final = "DequantizeLinear"
RUN_TIME_QUANTIZE: Final = "DynamicQuantizeLinear"
_DEFAULTS: Final = 4  # the IR version from which on an initializer that is an input, too, is only its default
_QGEMM_OUTPUT: Final = 8  # the place of its output's zero point
_UINT8: Final = 2
_RESHAPING: Final = ("Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Cast")


@final
@dataclass(frozen=True, eq=False)
class Node:
    """One node. Its name is that in the file, or that of its first output.

    captured: the tensors around it that the graphs in it (of an If, a Loop) read.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    captured: tuple[str, ...] = ()

    def input(self, position: int) -> str | None:
        """The tensor at that position; None where it is left out."""
        return self.inputs[position] if position < len(self.inputs) and self.inputs[position] else None


@final
@dataclass(frozen=True, eq=False)
class TensorGrid:
    """How a tensor is quantized; ``scale`` is None if computed at run time, ``zero_point`` if left out.

    tensor: the dequantized tensor. codes: the tensor of its codes. constant: whether these are stored.
    axis: None for one scale. block: how many codes along the axis share a scale.
    """

    tensor: str
    codes: str
    type: str
    scale: np.ndarray[Any, Any] | None
    zero_point: np.ndarray[Any, Any] | None
    axis: int | None
    block: int | None
    constant: bool

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is 0."""
        return self.zero_point is None or not np.any(self.zero_point)

    def same(self, other: "TensorGrid") -> bool:
        """Whether both take the same numbers to the same codes."""
        if self.scale is None or other.scale is None or self.type != other.type:
            return False
        ours, theirs = (0 if grid.zero_point is None else grid.zero_point for grid in (self, other))
        return bool(np.array_equal(self.scale.reshape(-1), other.scale.reshape(-1)) and np.all(ours == theirs))


@final
class Graph:
    """The main graph of an ONNX file; what it calls is written out. Weights are read when they are asked for.

    ``stripped``: of each tensor whose quantizers are left out, the name that it had behind them, and their type.
    ``defaults``: the initializers that are inputs, too (from IR version 4 on), if these are not taken for constants.
    """

    def __init__(self, path: Path, checked: bool = True, overridable: bool = False, strips: Sequence[str] = ()) -> None:
        """Raises ``TargetError`` for what is no ONNX file or, if it is ``checked``, for one that nothing could read.

        overridable: whether initializers that are inputs, too, are the defaults of these, and no constants.
        strips: the types of codes whose quantizers are left out, with what dequantizes them.
        """
        import onnx

        self.path = path
        model = load(path, checked)
        graph = model.graph
        self.opset = default_opset(model)
        self.nodes = tuple(
            Node(
                n.name or next(filter(None, n.output), n.op_type),
                n.op_type if n.domain in DOMAINS else f"{n.domain}.{n.op_type}",
                tuple(n.input),
                tuple(n.output),
                {a.name: onnx.helper.get_attribute_value(a) for a in n.attribute if not a.ref_attr_name},
                tuple(captured(n)),
            )
            for n in graph.node
        )
        inputs = {i.name for i in graph.input} if overridable and model.ir_version >= _DEFAULTS else set[str]()
        self.defaults = tuple(i.name for i in graph.initializer if i.name in inputs)
        self._initializers = {i.name: i for i in graph.initializer if i.name not in inputs}
        self._grids: dict[str, TensorGrid | None] = {}
        self.outputs: tuple[str, ...] = tuple(str(o.name) for o in graph.output)
        values = [*graph.value_info, *graph.input, *graph.output]
        self.types: dict[str, int] = {v.name: v.type.tensor_type.elem_type for v in values}
        self.types |= {i.name: i.data_type for i in graph.initializer}
        self.shapes: dict[str, tuple[int | str, ...]] = {
            v.name: tuple(
                d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in v.type.tensor_type.shape.dim
            )
            for v in values
            if v.type.tensor_type.HasField("shape")
        }
        self.shapes |= {i.name: tuple(i.dims) for i in graph.initializer}
        stored = {i.name for i in graph.initializer}
        self.inputs = tuple(i.name for i in graph.input if i.name not in stored)
        self.producers = {output: node for node in self.nodes for output in node.outputs if output}
        self._type_codes()
        self.stripped: dict[str, tuple[str, str]] = {}
        if strips:
            self._strip(strips)

    def _type_codes(self) -> None:
        """Give codes their type where inference has none: those of contributed ops, and behind what moves elements."""
        for node in self.nodes:
            for output in node.outputs[:1]:
                if self.types.get(output) or not node.inputs:
                    continue
                if node.kind.startswith("QLinear") or (node.kind == "QGemm" and node.input(_QGEMM_OUTPUT) is not None):
                    self.types[output] = _UINT8
                elif node.kind in (*_RESHAPING, "Slice", "Split", "Gather", "MaxPool") and node.kind != "Cast":
                    self.types[output] = self.types.get(str(node.inputs[0]), 0)

    def _strip(self, types: Sequence[str]) -> None:
        """Take out the quantizers to these types, of one scale each, and what dequantizes their codes."""
        passed: dict[str, str] = {}
        for node in self.nodes:
            maker = self.producers.get(node.inputs[0]) if node.kind == DEQUANTIZE else None
            grid = self.grid(node.outputs[0]) if maker is not None and maker.kind == QUANTIZE else None
            if maker is None or grid is None or grid.type not in types or grid.scale is None or grid.axis is not None:
                continue
            source = passed.get(maker.inputs[0], maker.inputs[0])
            passed[node.outputs[0]] = source
            self.stripped[source] = node.outputs[0], grid.type
        kept = (node for node in self.nodes if not (node.kind == DEQUANTIZE and node.outputs[0] in passed))
        self.nodes = tuple(
            replace(
                node,
                inputs=tuple(passed.get(name, name) for name in node.inputs),
                captured=tuple(passed.get(name, name) for name in node.captured),
            )
            for node in kept
        )
        read = {name for node in self.nodes for name in (*node.inputs, *node.captured)} | set(self.outputs)
        self.nodes = tuple(node for node in self.nodes if node.kind != QUANTIZE or node.outputs[0] in read)
        self.outputs = tuple(passed.get(name, name) for name in self.outputs)
        self.producers = {output: node for node in self.nodes for output in node.outputs if output}
        self._grids.clear()

    @cached_property
    def readers(self) -> dict[str, tuple[Node, ...]]:
        """Each tensor's readers, once for each time that they read it; one with graphs inside once for all of these."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in filter(None, (*node.inputs, *node.captured)):
                found.setdefault(name, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    @cached_property
    def constants(self) -> frozenset[str]:
        """The tensors that follow from the file alone."""
        found = set(self._initializers)
        for node in self.nodes:
            if all(name in found for name in node.inputs if name) and (node.inputs or node.kind.startswith("Constant")):
                found.update(node.outputs)
        return frozenset(found)

    def rank(self, tensor: str) -> int | None:
        """The number of dimensions, where it is known."""
        return len(self.shapes[tensor]) if tensor in self.shapes else None

    def array(self, tensor: str | None) -> np.ndarray[Any, Any] | None:
        """A stored tensor's values, also behind what only reshapes it; None where it is computed or left out."""
        import onnx
        import onnx.external_data_helper

        if tensor is None:
            return None
        if tensor in self._initializers:
            stored = self._initializers[tensor]
            try:
                if stored.data_location == onnx.TensorProto.EXTERNAL:
                    stored = onnx.TensorProto()
                    stored.CopyFrom(self._initializers[tensor])
                    onnx.external_data_helper.load_external_data_for_tensor(stored, str(self.path.parent))
                    stored.data_location = onnx.TensorProto.DEFAULT
                return onnx.numpy_helper.to_array(stored)
            except (OSError, ValueError, TypeError, KeyError, onnx.checker.ValidationError) as error:
                raise TargetError(f"{self.path}: {tensor}: its data cannot be read: {error}") from error
        node = self.producers.get(tensor)
        if node is None:
            return None
        if node.kind == "Constant":
            name, value = next(iter(node.attributes.items()))
            if isinstance(value, onnx.TensorProto):
                return onnx.numpy_helper.to_array(value)
            return np.asarray(value, np.float32 if name.startswith("value_float") else None)
        return self.array(node.input(0)) if node.kind in ("Identity", "Reshape", "Squeeze", "Unsqueeze") else None

    def grid(self, tensor: str | None) -> TensorGrid | None:
        """The grid of a tensor that a DequantizeLinear gives; of a constant, also behind what reshapes it."""
        if tensor is None or tensor not in self.producers:
            return None
        if tensor not in self._grids:
            self._grids[tensor] = self._grid(tensor, self.producers[tensor])
        return self._grids[tensor]

    def _grid(self, tensor: str, node: Node) -> TensorGrid | None:
        if node.kind != DEQUANTIZE:
            if tensor in self.constants and node.kind in _RESHAPING:
                return self._moved(self.grid(node.input(0)), node, tensor)
            return None
        codes = node.inputs[0]
        scale, zero_point = self.array(node.input(1)), self.array(node.input(2))
        spread = scale is not None and scale.size > 1
        rank = self.rank(codes)
        axis = int(node.attributes.get("axis", 1)) if spread else None
        if axis is not None and axis < 0 and rank is not None:
            axis += rank
        if axis is not None and rank is not None and not 0 <= axis < rank:
            raise TargetError(f"{self.path}: {node.name}: its axis is {axis}, and {codes} has {rank}")
        if (scale is not None and not scale.size) or (zero_point is not None and not zero_point.size):
            raise TargetError(f"{self.path}: {node.name}: its scale or zero point is empty")
        return TensorGrid(
            tensor,
            codes,
            self.code_type(codes, node.input(2)),
            scale,
            zero_point,
            axis,
            node.attributes.get("block_size") or None,
            codes in self.constants,
        )

    def code_type(self, codes: str, zero_point: str | None) -> str:
        """The type of codes, as ``parse_format`` would name it: ``uint8``."""
        import onnx

        maker = self.producers.get(codes)
        number = self.types.get(zero_point or "") or self.types.get(codes) or 0
        if not number and maker is not None and maker.kind in (QUANTIZE, RUN_TIME_QUANTIZE):
            zeros = self.array(maker.input(2))
            name = maker.attributes.get("output_dtype")
            number = name or (onnx.helper.np_dtype_to_tensor_dtype(zeros.dtype) if zeros is not None else 2)
        return onnx.TensorProto.DataType.Name(number).lower()

    def _moved(self, grid: TensorGrid | None, node: Node, tensor: str) -> TensorGrid | None:
        """A constant's grid behind a node that moves its elements; its axis is moved along."""
        if grid is None or node.kind == "Cast" or grid.axis is None:
            return grid
        axis: int | None = grid.axis
        if node.kind == "Transpose":
            rank = self.rank(node.inputs[0]) or 2
            axis = list(node.attributes.get("perm", range(rank)[::-1])).index(grid.axis)
        elif node.kind != "Identity":
            axis = -1  # somewhere else
        return TensorGrid(tensor, grid.codes, grid.type, grid.scale, grid.zero_point, axis, grid.block, grid.constant)

    def unknown_dimensions(self) -> Sequence[str]:
        """The inputs with a dimension that is no integer, with these dimensions."""
        named = {name: [str(d) for d in self.shapes.get(name, ()) if not isinstance(d, int)] for name in self.inputs}
        return [f"{name} ({', '.join(dims)})" for name, dims in named.items() if dims]
