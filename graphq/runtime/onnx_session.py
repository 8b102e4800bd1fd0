"""An ONNX artifact in ONNX Runtime, called like the compiled torch model: torch tensors in and out, on the CPU."""

import ctypes
from pathlib import Path
from typing import Any, Final, cast, final

import torch
from torch import Tensor

from graphq.capture.source import Source
from graphq.errors import TargetError
from graphq.runtime.calls import Outputs, call

_FLOAT8: Final = {"tensor(float8e4m3fn)": 17, "tensor(float8e5m2)": 19}  # TensorProto.DataType


@final
class OnnxSession:
    """``model.onnx`` behind the source's inputs and outputs. Masks, positions and empty caches may be left out."""

    def __init__(self, file: Path, source: Source) -> None:
        """Raises ``TargetError`` for a file that ONNX Runtime cannot load, or with other inputs or outputs."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; the rest is advice on graph inputs
        try:
            self._session: Any = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library has a type for each status
            raise TargetError(f"{file}: ONNX Runtime cannot load it: {str(error).strip().splitlines()[0]}") from error
        taken, declared = [i.name for i in self._session.get_inputs()], [i.name for i in source.inputs]
        if taken != declared:
            raise TargetError(f"{file}: takes {', '.join(taken)}; the manifest says {', '.join(declared)}")
        for wanted, found in zip(source.inputs, self._session.get_inputs(), strict=True):
            sizes = source.sizes(wanted.shape)
            if [d for d in found.shape if isinstance(d, int)] != [d for d in sizes if isinstance(d, int)]:
                texts = (", ".join(map(str, shape)) for shape in (found.shape, sizes))
                raise TargetError(f"{file}: {wanted.name} is ({next(texts)}); the manifest says ({next(texts)})")
        given, promised = [o.name for o in self._session.get_outputs()], list(source.outputs)
        if given != promised:
            raise TargetError(f"{file}: gives {', '.join(given)}; the manifest says {', '.join(promised)}")
        self.source = source
        self._takes = {i.name: i.type for i in self._session.get_inputs()}

    def __call__(self, *args: object, **kwargs: object) -> Outputs:
        """See ``graphq.runtime.calls.call``."""
        return call(self.source, self._run, args, kwargs)

    def _run(self, batch: tuple[Tensor, ...]) -> list[Tensor]:
        arrays = {i.name: x.detach().cpu().contiguous().numpy() for i, x in zip(self.source.inputs, batch, strict=True)}
        if not _FLOAT8.keys() & self._takes.values():
            found = cast("list[Any]", self._session.run(list(self.source.outputs), arrays))
            return [torch.from_numpy(x) for x in found]
        from onnxruntime import OrtValue

        feeds = {
            name: OrtValue.ortvalue_from_numpy_with_onnx_type(x, kind)
            if (kind := _FLOAT8.get(self._takes[name]))
            else OrtValue.ortvalue_from_numpy(x)
            for name, x in arrays.items()
        }
        return [_tensor(y) for y in self._session.run_with_ort_values(list(self.source.outputs), feeds)]


def _tensor(value: Any) -> Tensor:
    """A copy; numpy has no float8, whose codes are bytes."""
    if value.data_type() not in _FLOAT8:
        return torch.from_numpy(value.numpy())
    import numpy as np

    held = np.frombuffer(ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes()), np.uint8)
    return torch.from_numpy(held.copy()).view(value.shape())
