"""The tensors that an ONNX file holds, as torch's, in the layout of the QDQ form whatever the file's spelling is."""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from graphq.errors import TargetError
from graphq.lowering.onnx.nbits import unpacked_codes, unpacked_zero_points

NAME: Final = "model.onnx"


@final
class Initializers(Mapping[str, Tensor]):
    """The initializers of ``model.onnx`` by name, each read when it is asked for, so that none but that one is in
    memory: codes that are stored raised or packed are those of the QDQ form, and weights that a MatMul reads without a
    Transpose the rows ``[out, in]``.

    Raises ``TargetError`` for a file that is missing or damaged, and where a tensor is.
    """

    def __init__(self, directory: Path) -> None:
        import onnx_ir as ir

        self.file = directory / NAME
        if not self.file.is_file():
            raise TargetError(f"{directory}: damaged or incomplete: {NAME} is missing")
        with _naming(self.file):
            graph = ir.load(self.file).graph
            self._held: dict[str, Any] = {str(name): value for name, value in graph.initializers.items()}
            self._restore = {name: restore for node in graph for name, restore in _spelled(node, self._held)}

    def __getitem__(self, name: str) -> Tensor:
        value = self._held[name].const_value
        with _naming(self.file):
            tensor = _tensor(value)
            if hasattr(value, "release"):  # the pages of the file that were read
                value.release()
            return self._restore[name](tensor) if name in self._restore else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


@contextlib.contextmanager
def _naming(file: Path) -> Generator[None]:
    """Inside, what protobuf, onnx_ir and numpy raise for damaged files is a ``TargetError`` that names the file."""
    try:
        yield
    except Exception as error:
        raise TargetError(f"{file}: damaged: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from error


def initializers(directory: Path) -> dict[str, Tensor]:
    """All of ``Initializers``, in memory. Raises ``TargetError`` for a file that is missing or damaged."""
    return dict(Initializers(directory))


def _spelled(node: Any, held: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The initializers that ``node`` reads in another layout than the QDQ form's, and what gives them that layout."""
    import onnx_ir as ir

    source: Any = node.inputs[1] if len(node.inputs) > 1 else None
    match node.domain, node.op_type:
        case "com.microsoft", "MatMulNBits":
            k, bits, size = (node.attributes[name].as_int() for name in ("K", "bits", "block_size"))
            yield str(source.name), lambda packed: unpacked_codes(packed, bits, k)
            zero_point: Any = node.inputs[3] if len(node.inputs) > 3 else None
            scale: Any = node.inputs[2]
            while scale.producer() is not None:  # one of a row or of the whole weight, spread over blocks
                scale = scale.producer().inputs[0]
            shape = list(held[scale.name].const_value.shape)
            if zero_point is not None:
                yield (
                    str(zero_point.name),
                    lambda packed: _of_shape(unpacked_zero_points(packed, bits, -(-k // size)), shape),
                )
        case "", "MatMul":
            read = source.producer()
            if read is not None and read.op_type == "DequantizeLinear" and read.inputs[0].name in held:
                yield str(read.inputs[0].name), _transposed
        case "", "MatMulInteger":
            widened = source.producer()
            yield str((source if widened is None else widened.inputs[0]).name), _transposed
        case "", "Cast" if node.inputs[0].dtype == ir.DataType.FLOAT8E4M3FN and node.inputs[0].name in held:
            yield str(node.inputs[0].name), lambda scale: scale.view(torch.float8_e4m3fn)
        case _:
            pass


def _of_shape(by_block: Tensor, shape: Sequence[object]) -> Tensor:
    """Zero points ``[N, blocks]`` as those of rows, or the one of the weight, where a scale of ``shape`` says so."""
    return by_block if len(shape) == 2 else by_block[:, 0].contiguous() if len(shape) == 1 else by_block[0, 0].clone()


def _transposed(weight: Tensor) -> Tensor:
    return weight.t().contiguous()


def _tensor(value: Any) -> Tensor:
    import onnx_ir as ir

    if value is None:
        raise ValueError("an initializer without a value")
    array = value.numpy()
    match value.dtype:
        case ir.DataType.INT2 | ir.DataType.INT4:
            return torch.from_numpy(array.astype("int8"))
        case ir.DataType.UINT2 | ir.DataType.UINT4:
            return torch.from_numpy(array.astype("int8")) - (8 if value.dtype == ir.DataType.UINT4 else 2)
        case (
            ir.DataType.FLOAT8E4M3FN
            | ir.DataType.FLOAT8E5M2
            | ir.DataType.FLOAT6E2M3
            | ir.DataType.FLOAT6E3M2
            | ir.DataType.FLOAT4E2M1
        ):
            return torch.from_numpy(array.view("uint8").copy())
        case ir.DataType.FLOAT8E8M0:
            return torch.from_numpy(array.view("uint8").copy()).view(torch.float8_e8m0fnu)
        case ir.DataType.BFLOAT16:
            return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
        case _:
            return torch.from_numpy(array.copy())  # the file's own memory cannot be written to
