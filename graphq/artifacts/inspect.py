"""What an artifact says of itself, read from its manifest and the sizes of its files: no weights are loaded."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from graphq.artifacts import manifest
from graphq.capture.source import Source
from graphq.errors import TargetError


@final
@dataclass(frozen=True)
class ArtifactLayer:
    """A layer that a rule can name: its plan in the text form (``float``: not quantized), the rule, and its bytes."""

    name: str
    weight: str
    input: str
    rule: str
    nbytes: int
    reason: str


@final
@dataclass(frozen=True)
class ArtifactFile:
    """A file of an artifact: its bytes, None where it is missing, and the digest that it was written with."""

    name: str
    nbytes: int | None
    sha256: str


@final
@dataclass(frozen=True)
class Inspection:
    """An artifact's manifest in short. ``str`` of it is for people, ``to_json`` for programs."""

    path: str
    target: str
    versions: dict[str, str]
    model: str
    source: Source
    computed_in: str | None
    spec: str
    algorithm: str
    seed: int
    layers: tuple[ArtifactLayer, ...]
    files: tuple[ArtifactFile, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes or 0 for file in self.files)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "artifact": self.path,
            "target": self.target,
            "versions": self.versions,
            "model": self.model,
            "dtype": _dtype(self.source),
            "computed_in": self.computed_in,
            "inputs": {i.name: list(i.shape) for i in self.source.inputs},
            "outputs": list(self.source.outputs),
            "algorithm": self.algorithm,
            "seed": self.seed,
            "spec": self.spec,
            "bytes": self.nbytes,
            "layers": [
                {
                    "layer": layer.name,
                    "weight": layer.weight,
                    "input": layer.input,
                    "rule": layer.rule,
                    "bytes": layer.nbytes,
                    "reason": layer.reason,
                }
                for layer in self.layers
            ],
            "files": {file.name: {"bytes": file.nbytes, "sha256": file.sha256} for file in self.files},
        }

    def __str__(self) -> str:
        quantized = [layer for layer in self.layers if (layer.weight, layer.input) != ("float", "float")]
        computed = f", computed in {self.computed_in}" if self.computed_in else ""
        caches = sum(i.is_cache for i in self.source.inputs)
        inputs = [i.name for i in self.source.inputs if not i.is_cache] + (
            [f"{caches} cache tensors"] if caches else []
        )
        facts = [
            ("artifact", self.path),
            ("target", self.target),
            ("made with", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
            ("model", f"{self.model}, {_dtype(self.source)}{computed}"),
            ("inputs", ", ".join(inputs)),
            ("algorithm", f"{self.algorithm}, seed {self.seed}"),
            ("layers", f"{len(quantized)} of {len(self.layers)} quantized"),
            ("bytes", str(self.nbytes)),
        ]
        files = [("file", "bytes", "sha256")]
        files += [(f.name, "missing" if f.nbytes is None else str(f.nbytes), f.sha256) for f in self.files]
        layers = [("layer", "weight", "input", "rule", "bytes", "why float")]
        layers += [(x.name, x.weight, x.input, x.rule, str(x.nbytes), x.reason) for x in self.layers]
        spec = [f"  {line}" for line in self.spec.splitlines()]
        return "\n".join([*_aligned(facts), "spec", *spec, "", *_aligned(layers), "", *_aligned(files)])


def inspect(path: str | Path) -> Inspection:
    """What the artifact in the directory ``path`` says of itself, for any target.

    Raises ``TargetError`` for a directory that is not an artifact, and for a damaged manifest. Files are neither read
    nor compared with their digests: ``graphq verify`` does that.
    """
    directory = Path(path)
    described = manifest.read(directory)
    source = manifest.source_of_artifact(directory, described)
    try:
        versions = {"graphq": str(described["version"])}
        versions |= {"torch": str(described["torch"])} if "torch" in described else {}
        return Inspection(
            path=str(directory),
            target=str(described["target"]),
            versions=versions,
            model=_model(source),
            source=source,
            computed_in=described["computed_in"],
            spec=str(described["spec"]),
            algorithm=str(described["algorithm"]),
            seed=int(described["seed"]),
            layers=tuple(_layer(entry) for entry in described["report"]),
            files=tuple(
                _file(directory, name, sha256)
                for name, sha256 in sorted(manifest.listed_files(directory, described).items())
            ),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise TargetError(f"{directory / manifest.NAME}: damaged: {type(error).__name__}: {error}") from error


def _layer(entry: dict[str, Any]) -> ArtifactLayer:
    weight, activation = ("float" if entry[k] is None else str(entry[k]["text"]) for k in ("weight", "input"))
    rule = " ".join(part for part in (entry["source"], f"({entry['rule']})" if entry["rule"] else "") if part)
    return ArtifactLayer(str(entry["layer"]), weight, activation, rule, int(entry["bytes"]), str(entry["reason"]))


def _file(directory: Path, name: str, sha256: str) -> ArtifactFile:
    place = directory / name
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise ValueError(f"files: {name} is not in the artifact")
    return ArtifactFile(name, place.stat().st_size if place.is_file() else None, sha256)


def _model(source: Source) -> str:
    """The class of the source, where its configuration names it, or else its outputs' form."""
    config: dict[str, Any] = json.loads(source.config) if source.config is not None else {}
    classes: list[str] = config.get("architectures") or []
    return classes[0] if classes else str(config.get("model_type", "a torch module"))


def _dtype(source: Source) -> str:
    return str(source.dtype).removeprefix("torch.")


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
