"""The tensors that an ONNX file holds, as torch's."""

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from graphq.errors import TargetError

NAME: Final = "model.onnx"


def initializers(directory: Path) -> dict[str, Tensor]:
    """The initializers of ``model.onnx`` by name; UINT4, which stands for codes raised by 8, lowered.

    Raises ``TargetError`` for a file that is missing or damaged.
    """
    import onnx_ir as ir

    file = directory / NAME
    if not file.is_file():
        raise TargetError(f"{directory}: damaged or incomplete: {NAME} is missing")
    try:
        return {str(name): _tensor(value.const_value) for name, value in ir.load(file).graph.initializers.items()}
    except Exception as error:  # protobuf, onnx_ir and numpy raise many types for damaged files
        raise TargetError(f"{file}: damaged: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from error


def _tensor(value: Any) -> Tensor:
    import onnx_ir as ir

    if value is None:
        raise ValueError("an initializer without a value")
    array = value.numpy()
    match value.dtype:
        case ir.DataType.INT4:
            return torch.from_numpy(array.astype("int8"))
        case ir.DataType.UINT4:
            return torch.from_numpy(array.astype("int8")) - 8
        case ir.DataType.FLOAT8E4M3FN | ir.DataType.FLOAT8E5M2:
            return torch.from_numpy(array.view("uint8").copy())
        case ir.DataType.BFLOAT16:
            return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
        case _:
            return torch.from_numpy(array.copy())  # the file's own memory cannot be written to
