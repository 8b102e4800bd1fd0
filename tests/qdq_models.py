"""Tiny QDQ models, spelled op by op as any tool might spell them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CODES: dict[str, tuple[int, int, int]] = {
    "uint8": (TensorProto.UINT8, 0, 255),
    "int8": (TensorProto.INT8, -128, 127),
    "uint16": (TensorProto.UINT16, 0, 65535),
    "int16": (TensorProto.INT16, -32768, 32767),
    "int4": (TensorProto.INT4, -8, 7),
    "uint4": (TensorProto.UINT4, 0, 15),
    "int2": (TensorProto.INT2, -2, 1),
    "uint2": (TensorProto.UINT2, 0, 3),
    "int32": (TensorProto.INT32, -1000, 1000),
}
DTYPES = {"uint8": np.uint8, "int8": np.int8, "uint16": np.uint16, "int16": np.int16, "int32": np.int32}


@final
class QdqModel:
    """A model that grows node by node; each method gives the name of the tensor that it makes.

    ``relu``, ``conv``, ... are the names of nodes: the op's type in small letters, and a number from the second on.
    """

    def __init__(self, opset: int = 21, seed: int = 0) -> None:
        self.opset = opset
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.counts: dict[str, int] = {}

    def unique(self, stem: str) -> str:
        self.counts[stem] = self.counts.get(stem, 0) + 1
        return stem if self.counts[stem] == 1 else f"{stem}{self.counts[stem]}"

    def input(self, *shape: int | str, element: int = TensorProto.FLOAT) -> str:
        name = self.unique("x")
        self.inputs.append(helper.make_tensor_value_info(name, element, list(shape)))
        return name

    def constant(self, values: Any, stem: str = "c") -> str:
        name = self.unique(stem)
        self.initializers.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def codes(self, element: str, values: Any, stem: str) -> str:
        """An initializer of integers of that type."""
        name, array = self.unique(stem), np.asarray(values)
        self.initializers.append(helper.make_tensor(name, CODES[element][0], array.shape, array.reshape(-1).tolist()))
        return name

    def op(self, kind: str, *inputs: str, outputs: int = 1, domain: str = "", **attributes: Any) -> str:
        name = self.unique(kind.lower())
        made = [f"{name}_y"] if outputs == 1 else [f"{name}_y{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), made, name=name, domain=domain, **attributes))
        return made[0]

    def grid(self, element: str, zero_point: Any, scale: Any) -> tuple[str, str]:
        return self.constant(np.asarray(scale, np.float32), "scale"), self.codes(element, zero_point, "zero")

    def q(
        self, x: str, element: str = "uint8", zero_point: int = 128, scale: float | list[float] = 0.03
    ) -> tuple[str, str, str]:
        """The codes of x and their grid; what ``dq`` takes."""
        grid = self.grid(element, zero_point if not isinstance(scale, list) else [zero_point], scale)
        return (self.op("QuantizeLinear", x, *grid), *grid)

    def dq(self, quantized: tuple[str, str, str]) -> str:
        return self.op("DequantizeLinear", *quantized)

    def qdq(self, x: str, element: str = "uint8", zero_point: int = 128, scale: float | list[float] = 0.03) -> str:
        return self.dq(self.q(x, element, zero_point, scale))

    def weight(
        self,
        *shape: int,
        element: str = "int8",
        axis: int | None = None,
        block: int | None = None,
        zero_point: int | None = 0,
        scale: float = 0.01,
    ) -> str:
        """A dequantized constant: per tensor, per ``axis``, or in blocks along it."""
        low, high = CODES[element][1:]
        low = low if low == 0 or element.endswith(("4", "2")) else -high
        codes = self.codes(element, self.random.integers(low, high + 1, shape), "w")
        sizes: Sequence[int] = () if axis is None else [shape[axis]]
        if axis is not None and block is not None:
            sizes = [-(-size // block) if i == axis else size for i, size in enumerate(shape)]
        scales = self.constant((scale * self.random.uniform(0.5, 1, sizes)).astype(np.float32), "w_scale")
        zeros = [] if zero_point is None else [self.codes(element, np.full(sizes, zero_point), "w_zero")]
        attributes: dict[str, Any] = ({} if axis is None else {"axis": axis}) | (
            {} if block is None else {"block_size": block}
        )
        return self.op("DequantizeLinear", codes, scales, *zeros, **attributes)

    def bias32(self, size: int, scales: Any) -> str:
        """A dequantized int32 bias."""
        codes = self.codes("int32", self.random.integers(-1000, 1000, size), "b")
        grid = np.asarray(scales, np.float32)
        zeros = self.codes("int32", np.zeros(grid.shape, np.int32), "b_zero")
        attributes: dict[str, Any] = {"axis": 0} if grid.ndim else {}
        return self.op("DequantizeLinear", codes, self.constant(grid, "b_scale"), zeros, **attributes)

    def array(self, name: str) -> np.ndarray:
        """The values of an initializer."""
        return numpy_helper.to_array(next(one for one in self.initializers if one.name == name))

    def model(self, *outputs: str) -> onnx.ModelProto:
        outs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "tiny", self.inputs, outs, self.initializers)
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        made = helper.make_model(graph, opset_imports=imports, ir_version=10 if self.opset < 23 else 12)
        return onnx.shape_inference.infer_shapes(made)

    def save(self, path: Path, *outputs: str) -> Path:
        onnx.save(self.model(*outputs), path)
        return path
