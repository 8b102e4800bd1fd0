"""What every artifact says of itself in ``graphq.json``: spec, source, and digests of codes, scales, zero points."""

import hashlib
import json
import math
import reprlib
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, fx

from graphq.artifacts.choices import CHOICES_FILE, write_choices
from graphq.artifacts.companions import copy_companions
from graphq.artifacts.fields import entry, is_text
from graphq.artifacts.shards import in_bytes
from graphq.artifacts.source import source_from_json, source_json
from graphq.capture.source import Source, source_of
from graphq.errors import TargetError
from graphq.files import FORMAT, MANIFEST
from graphq.ir.choices import CHOICES
from graphq.ir.views import Dequantize, Op, Param, Quantize, ops_of
from graphq.state import first_names, tensor_of

NAME: Final = MANIFEST
Record = Mapping[str, Any]  # of a tensor: dtype, shape and digest
_LONGEST: Final = 255  # bytes of a file's name on Linux's and macOS's file systems


@final
@dataclass(frozen=True)
class QuantizedTensor:
    """Codes, scales and zero point of one weight or bias (or what is fixed of an activation's, without codes) of the
    QDQ form. ``role``: ``weight``, ``bias``, or the tensor of the layer that it is, such as ``input``.
    """

    path: str
    role: str
    format: str
    codes: Tensor | None
    scale: Tensor | None
    zero_point: Tensor | None
    global_scale: Tensor | None

    def named(self) -> dict[str, Tensor]:
        """The tensors by their names in the QDQ form."""
        named = {f"{self.path}.{self.role}": self.codes} if self.codes is not None else {}
        named |= {
            f"{self.path}.{self.role}_scale": self.scale,
            f"{self.path}.{self.role}_zero_point": self.zero_point,
            f"{self.path}.{self.role}_global_scale": self.global_scale,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@final
class Digest:
    """SHA-256 of a tensor's dtype, shape and elements in row-major order, by its parts along the first axis."""

    def __init__(self, dtype: torch.dtype, shape: Iterable[int]) -> None:
        self._found = hashlib.sha256(f"{str(dtype).removeprefix('torch.')}{list(shape)}:".encode())

    def add(self, part: Tensor) -> None:
        """The next part."""
        if part.numel():
            self._found.update(in_bytes(part))

    def text(self) -> str:
        """The digest of all parts, in hexadecimal."""
        return self._found.hexdigest()


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and elements in row-major order."""
    found = Digest(tensor.dtype, tensor.shape)
    found.add(tensor)
    return found.text()


def quantized_tensors(gm: fx.GraphModule) -> dict[str, QuantizedTensor]:
    """The quantized weights and static input scales of a QDQ form, by the path that holds them."""
    found: dict[str, QuantizedTensor] = {}
    for op in ops_of(gm):
        match op:
            case Dequantize() if isinstance(op.codes, Param):
                path, _, role = op.codes.fqn.rpartition(".")
                key = path if role == "weight" else op.codes.fqn
                found[key] = QuantizedTensor(path, role, op.format, tensor_of(gm, op.codes.fqn), *_fixed(gm, op))
            case Quantize() if isinstance(op.scale, Param):
                path, _, name = op.scale.fqn.rpartition(".")
                role = name.removesuffix("_scale")
                found[f"{path} {role}"] = QuantizedTensor(path, role, op.format, None, *_fixed(gm, op))
            case Quantize() if isinstance(op.global_scale, Param):
                path, _, name = op.global_scale.fqn.rpartition(".")
                role = name.removesuffix("_global_scale")
                found[f"{path} {role}"] = QuantizedTensor(path, role, op.format, None, *_fixed(gm, op))
            case _:
                pass
    return found


def _fixed(gm: fx.GraphModule, op: Dequantize | Quantize) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Scale, zero point and global scale, those that the model holds."""

    def held(part: Op | None) -> Tensor | None:
        return tensor_of(gm, part.fqn) if isinstance(part, Param) else None

    return held(op.scale), held(op.zero_point), held(op.global_scale)


def named_tensors(tensors: Mapping[str, QuantizedTensor]) -> dict[str, Tensor]:
    """All tensors by their names in the QDQ form."""
    return {name: tensor for quantized in tensors.values() for name, tensor in quantized.named().items()}


def stored_names(tensors: Mapping[str, Tensor], held: Container[str]) -> dict[str, Tensor]:
    """``tensors`` without those that an artifact, which holds the names ``held``, stores under another name alone."""
    first = first_names(tensors)
    kept = {name for name in tensors if name in held}
    of_kept = {first.get(name, name) for name in kept}
    return {name: t for name, t in tensors.items() if name in kept or first.get(name, name) not in of_kept}


def record(tensor: Tensor) -> dict[str, Any]:
    """What the manifest says of a tensor: its dtype, shape and digest."""
    return record_of(tensor.dtype, tensor.shape, digest(tensor))


def record_of(dtype: torch.dtype, shape: Iterable[int], sha256: str) -> dict[str, Any]:
    """What the manifest says of a tensor with this digest."""
    return {"dtype": str(dtype).removeprefix("torch."), "shape": list(shape), "sha256": sha256}


def _records(tensors: Mapping[str, Tensor | Record]) -> dict[str, Record]:
    return {name: record(t) if isinstance(t, Tensor) else t for name, t in tensors.items()}


def recorded(directory: Path, described: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """What the manifest says of the tensors under ``key``. Raises ``TargetError`` where it is damaged."""
    try:
        return {str(k): {f: v[f] for f in ("dtype", "shape", "sha256")} for k, v in described[key].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise TargetError(f"{directory / NAME}: damaged: {key}: {error}") from error


def difference(name: str, wanted: Mapping[str, Any] | None, tensor: Tensor | None) -> str | None:
    """How a tensor differs from its record; None if it does not."""
    if tensor is None or wanted is None:
        return f"{name}: missing" if tensor is None else f"{name}: not in the manifest"
    found = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    if any(found[key] != wanted[key] for key in found):
        return f"{name}: {found['dtype']}{found['shape']}, not {wanted['dtype']}{wanted['shape']}"
    return None if wanted["sha256"] == digest(tensor) else f"{name}: differs from its digest in the manifest"


def computed_in(gm: fx.GraphModule) -> torch.dtype | None:
    """The dtype that weights are dequantized to, which is the one that they were quantized from."""
    reads = (op for op in ops_of(gm) if isinstance(op, Dequantize) and isinstance(op.codes, Param))
    return next((op.val.dtype for op in reads), None)


def source_of_artifact(directory: Path, described: Mapping[str, Any]) -> Source:
    """The ``Source`` in an artifact's manifest. Raises ``TargetError`` where it is damaged."""
    try:
        return source_from_json(described.get("source"))
    except ValueError as error:
        raise TargetError(f"{directory / NAME}: damaged: source: {error}") from error


def write(
    directory: Path,
    gm: fx.GraphModule,
    target: str,
    made_from: Mapping[str, Any],
    held: Mapping[str, Tensor | Record],
    quantized: Mapping[str, Tensor | Record] | None = None,
    config: Mapping[str, Any] | None = None,
) -> None:
    """``graphq.json`` and the files that go with a model (tokenizer, configuration) in ``directory``.

    ``gm``: the QDQ form, as the target spells it; ``held``: all tensors of the artifact, by name, and ``quantized``
    those that belong to quantized tensors, where these are not those of ``gm``: tensors, or records of those that were
    written and are gone, no two of which were one. ``config``: the model's settings, where
    these are not the source's. The target's own files are there already: the manifest lists them.
    """
    source = source_of(gm)
    dtype = computed_in(gm)
    if quantized is None:
        quantized = named_tensors(quantized_tensors(gm))
    tensors = {name: t for name, t in quantized.items() if isinstance(t, Tensor)}
    kept = stored_names(tensors, held)
    quantized = {name: t for name, t in quantized.items() if name in kept or name not in tensors}
    manifest: dict[str, Any] = {
        "graphq": FORMAT,
        "target": target,
        "version": _version(),
        "torch": torch.__version__,
        **made_from,
        "source": source_json(source),
        "computed_in": str(dtype).removeprefix("torch.") if dtype is not None else None,
        "stored": str(source.stored).removeprefix("torch.") if source.stored is not None else None,
        "choices": CHOICES_FILE if gm.meta.get(CHOICES) else None,
        "tensors": _records(quantized),
        "other_tensors": _records({name: t for name, t in held.items() if name not in quantized}),
    }
    if gm.meta.get(CHOICES):
        write_choices(directory, gm.meta[CHOICES])
    if source.files is not None:
        copy_companions(Path(source.files), directory)
    if source.config is not None:
        if config is None:
            config = settings(source.config)
        _write_json(directory / "config.json", config)
    manifest["files"] = file_digests(directory)
    _write_json(directory / NAME, manifest)


def settings(config: str) -> dict[str, Any]:
    """A model's settings as ``config.json`` has them: transformers writes what is not finite so."""
    return json.loads(config, parse_constant=lambda word: {"__float__": word})


def _write_json(file: Path, data: object) -> None:
    file.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def sources(gm: fx.GraphModule) -> tuple[str, ...]:
    """The directories that an artifact of ``gm`` is made from, which it must not replace."""
    files = source_of(gm).files
    return () if files is None else (files,)


def file_digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file in an artifact, by its path in it; the manifest, which holds them, is left out."""
    return {
        file.relative_to(directory).as_posix(): file_digest(file)
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file != directory / NAME
    }


def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def listed_files(directory: Path, described: Mapping[str, Any]) -> dict[str, str]:
    """The digests of an artifact's files by their names. Raises ``TargetError`` where the manifest is damaged."""
    try:
        listed: dict[str, Any] = entry(described, "files", lambda value: isinstance(value, dict), "digests by name")
        for name in listed:
            if not _is_inside(name):
                raise ValueError(f"files: {reprlib.repr(name)} is not the name of a file in the artifact")
            entry(listed, name, is_text, "a digest")
    except ValueError as error:
        raise TargetError(f"{directory / NAME}: damaged: {error}") from error
    return dict(listed)


def _is_inside(name: str) -> bool:
    """Whether a file of an artifact can be called so: below its directory, in names that file systems hold."""
    parts = name.split("/")
    return "\0" not in name and all(
        part not in ("", ".", "..") and len(part.encode(errors="surrogatepass")) <= _LONGEST for part in parts
    )


def check_files(directory: Path, described: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises ``TargetError`` for one of these files that is missing, has no digest, or is not what was written."""
    listed = listed_files(directory, described)
    for name in names:
        try:
            found = file_digest(directory / name)
        except OSError as error:
            raise TargetError(f"{directory / name}: {error.strerror}") from error
        if name not in listed:
            raise TargetError(f"{directory / name}: the manifest has no digest of it")
        if found != listed[name]:
            raise TargetError(f"{directory / name}: differs from its digest in {NAME}: damaged, or changed since")


def _version() -> str:
    try:
        return version("graphq")
    except PackageNotFoundError:
        return "0"


def _finite(written: str) -> float:
    """The number. Raises ``ValueError`` for one that is not finite: no manifest holds any."""
    if not math.isfinite(found := float(written)):
        raise ValueError(f"{written:.20} is not a finite number")
    return found


def read(directory: Path) -> dict[str, Any]:
    """The manifest of an artifact. Raises ``TargetError`` naming what is missing or wrong."""
    path = directory / NAME
    if not path.is_file():
        raise TargetError(f"{directory}: not a graphq artifact: {NAME} is missing")
    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise TargetError(f"{path}: damaged: {error}") from error
    if not isinstance(found, dict) or found.get("graphq") != FORMAT:
        raise TargetError(f"{path}: not a graphq artifact of format {FORMAT}")
    return found
