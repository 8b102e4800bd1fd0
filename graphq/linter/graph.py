"""An ONNX file as lint sees it: nodes, who makes and reads each tensor, constants, shapes, and grids.

A grid is what a DequantizeLinear says of a tensor: the type of its codes, scale, zero point, axis, block
(ONNX operator specification, QuantizeLinear and DequantizeLinear).
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from graphq.errors import TargetError

DOMAINS: Final = ("", "ai.onnx", "com.microsoft")
QUANTIZE: Final = "QuantizeLinear"
DEQUANTIZE: Final = "DequantizeLinear"
RUN_TIME_QUANTIZE: Final = "DynamicQuantizeLinear"
_RESHAPING: Final = ("Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Cast")


@final
@dataclass(frozen=True, eq=False)
class Node:
    """One node. Its name is that in the file, or that of its first output."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict[str, Any])

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
    """The main graph of an ONNX file; what it calls is written out. Weights are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Raises ``TargetError`` for what is no ONNX file."""
        import onnx
        import onnx.inliner

        self.path = path
        try:
            model = onnx.load(str(path), load_external_data=False)
        except OSError:
            raise
        except Exception as error:  # protobuf's own, which is not ours to import
            raise TargetError(f"{path}: is no ONNX model") from error
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        with suppress(onnx.shape_inference.InferenceError, ValueError):  # ValueError: beyond 2 GiB
            model = onnx.shape_inference.infer_shapes(model)  # what the file does not give stays unknown
        graph = model.graph
        self.opset = next((i.version for i in model.opset_import if i.domain in ("", "ai.onnx")), 0)
        self.nodes = tuple(
            Node(
                n.name or next(filter(None, n.output), n.op_type),
                n.op_type if n.domain in DOMAINS else f"{n.domain}.{n.op_type}",
                tuple(n.input),
                tuple(n.output),
                {a.name: onnx.helper.get_attribute_value(a) for a in n.attribute},
            )
            for n in graph.node
        )
        self._initializers = {i.name: i for i in graph.initializer}
        self._grids: dict[str, TensorGrid | None] = {}
        self.outputs = tuple(o.name for o in graph.output)
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
        self.inputs = tuple(i.name for i in graph.input if i.name not in self._initializers)
        self.producers = {output: node for node in self.nodes for output in node.outputs if output}

    @cached_property
    def readers(self) -> dict[str, tuple[Node, ...]]:
        """Each tensor's readers, once for each time that they read it."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for name in filter(None, node.inputs):
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
            if stored.data_location == onnx.TensorProto.EXTERNAL:
                stored = onnx.TensorProto()
                stored.CopyFrom(self._initializers[tensor])
                try:
                    onnx.external_data_helper.load_external_data_for_tensor(stored, str(self.path.parent))
                except (OSError, onnx.checker.ValidationError) as error:
                    raise TargetError(f"{self.path}: {tensor}: its data cannot be read: {error}") from error
                stored.data_location = onnx.TensorProto.DEFAULT
            return onnx.numpy_helper.to_array(stored)
        node = self.producers.get(tensor)
        if node is None:
            return None
        if node.kind == "Constant":
            value = next(iter(node.attributes.values()))
            return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)
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
