"""torch's own translations of its ops to ONNX, made once a process.

``torch.onnx.export`` makes them at each call, and onnxscript reads the source of each of its 500 functions again for
that: more than half of the time that the export of a small model takes (torch 2.13, onnxscript 0.7).
"""

import contextlib
import functools
from collections.abc import Generator
from typing import Any, cast


@contextlib.contextmanager
def kept_translations() -> Generator[None]:
    """Inside, exports take copies of one table of translations for each opset; what one adds, the next does not see."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    registry = cast(Any, ONNXRegistry)
    made = registry.__dict__["from_torchlib"]

    def copied(cls: Any, opset_version: int) -> Any:
        found, copy = _table(made.__func__, cls, opset_version), cls()
        copy._opset_version = opset_version
        copy.functions = {op: list(translations) for op, translations in found.functions.items()}
        return copy

    registry.from_torchlib = classmethod(copied)
    try:
        yield
    finally:
        registry.from_torchlib = made


@functools.cache
def _table(make: Any, cls: Any, opset_version: int) -> Any:
    return make(cls, opset_version)
