"""An ONNX artifact in ONNX Runtime, called like the compiled torch model: torch tensors in and out, on the CPU."""

from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor

from graphq.capture.source import Source
from graphq.errors import TargetError
from graphq.runtime.calls import Outputs, call


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

    def __call__(self, *args: object, **kwargs: object) -> Outputs:
        """See ``graphq.runtime.calls.call``."""
        return call(self.source, self._run, args, kwargs)

    def _run(self, batch: tuple[Tensor, ...]) -> list[Tensor]:
        feeds = {i.name: x.detach().cpu().numpy() for i, x in zip(self.source.inputs, batch, strict=True)}
        found = cast("list[Any]", self._session.run(list(self.source.outputs), feeds))
        return [torch.from_numpy(x) for x in found]
