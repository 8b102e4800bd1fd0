"""Which reader a directory is for: a table of them, by what its configuration calls its quantization."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, cast

from graphq.artifacts.headers import StoredTensor, read_headers
from graphq.errors import GraphError, TargetError, printable
from graphq.lowering.checkpoints.ascend.read import DESCRIPTION, stem_of
from graphq.lowering.checkpoints.sources import compressed_tensors, float8, modelslim, mxfp4
from graphq.lowering.checkpoints.sources.checkpoint import QuantizedCheckpoint

Read = Callable[[Path, Mapping[str, Any], Mapping[str, StoredTensor]], QuantizedCheckpoint]
_CONFIG: Final = "config.json"
READERS: Final[Mapping[str, Read]] = {  # by quant_method of quantization_config
    "compressed-tensors": compressed_tensors.read,
    "fp8": float8.read,
    "mxfp4": mxfp4.read,
}


def is_quantized(directory: Path) -> bool:
    """Whether the directory says that its weights are quantized, in whatever way."""
    if (directory / DESCRIPTION).is_file():
        return True
    try:
        return _config(directory / _CONFIG).get("quantization_config") is not None
    except TargetError:  # which is told where it is read
        return False


def quantized_source(directory: Path) -> QuantizedCheckpoint | None:
    """The checkpoint that a model in ``directory`` is read from, None where its weights are float.

    Raises ``GraphError`` for what ``read_quantized`` refuses.
    """
    try:
        return read_quantized(directory) if is_quantized(directory) else None
    except TargetError as error:
        raise GraphError(str(error)) from error


def read_quantized(directory: Path) -> QuantizedCheckpoint:
    """The quantized checkpoint in ``directory``, of whose files the headers alone are read.

    Raises ``TargetError`` for a directory that is none, for a way of quantization that is not read, and for what is
    damaged, with the file and the key, the layer or the tensor.
    """
    if (directory / DESCRIPTION).is_file():
        config = _config(directory / _CONFIG) if (directory / _CONFIG).is_file() else {}
        return modelslim.read(directory, config, read_headers(directory, stem_of(directory)))
    file = directory / _CONFIG
    if not file.is_file():
        raise TargetError(f"{file}: no such file")
    config = _config(file)
    settings: object = config.get("quantization_config")
    if settings is None:
        raise TargetError(f"{file}: has no quantization_config: this is no quantized checkpoint")
    if not isinstance(settings, dict):
        raise TargetError(f"{file}: damaged: quantization_config: is no object")
    method = cast(dict[str, Any], settings).get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        names, said = f"{', '.join(READERS)} and msModelSlim's", printable(str(method))[:40]
        raise TargetError(
            f"{file}: quantization_config: quant_method: {said}: is not read; checkpoints of {names} are; dequantize it"
            " with the tool that made it"
        )
    return READERS[method](directory, config, read_headers(directory))


def _config(file: Path) -> dict[str, Any]:
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise TypeError("no object")
        return cast(dict[str, Any], found)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise TargetError(f"{file}: damaged: {type(error).__name__}: {error}") from error
