"""What an artifact says of itself, read from its manifest and the sizes of its files: no weights are loaded."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast, final

from graphq.artifacts import manifest
from graphq.artifacts.fields import entry, is_size, is_text, is_text_or_null
from graphq.capture.sizes import MAX_SIZE
from graphq.capture.source import Source
from graphq.errors import TargetError, printable

_SEEDS: Final = 1 << 64


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
    """An artifact's manifest in short. ``str`` of it is for people, with what is not printable escaped; ``to_json`` for
    programs.
    """

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
    activations: dict[str, Any] | None
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
            "inputs": {i.name: list(self.source.sizes(i.shape)) for i in self.source.inputs},
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
            "activations": self.activations,
            "files": {file.name: {"bytes": file.nbytes, "sha256": file.sha256} for file in self.files},
        }

    def _ops_in_integers(self) -> list[tuple[str, str]]:
        """A fact on the ops between layers, where a profile placed quantizers."""
        if self.activations is None:
            return []
        ops = self.activations["ops"]
        count = sum(op["types"] is not None for op in ops)
        return [("ops", f"{count} of {len(ops)} in integers, for {self.activations['profile']}")]

    def __str__(self) -> str:
        quantized = [layer for layer in self.layers if (layer.weight, layer.input) != ("float", "float")]
        computed = f", computed in {self.computed_in}" if self.computed_in else ""
        caches = sum(i.is_cache for i in self.source.inputs)
        kinds = dict.fromkeys(str(i.dtype).removeprefix("torch.") for i in self.source.inputs if i.is_cache)
        held = "" if len(kinds) < 2 and not {"int8", "uint8"} & kinds.keys() else f" of {' and '.join(kinds)}"
        inputs = [i.name for i in self.source.inputs if not i.is_cache] + (
            [f"{caches} cache tensors{held}"] if caches else []
        )
        sizes = [
            f"{name} {low}" if low == high else f"{name} {low} to {high}"
            for name, low, high in self.source.ranges
            if high < MAX_SIZE
        ]
        facts = [
            ("artifact", self.path),
            ("target", self.target),
            ("made with", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
            ("model", f"{self.model}, {_dtype(self.source)}{computed}"),
            ("inputs", ", ".join(inputs)),
            *([("sizes", ", ".join(sizes))] if sizes else []),
            ("algorithm", f"{self.algorithm}, seed {self.seed}"),
            ("layers", f"{len(quantized)} of {len(self.layers)} quantized"),
            *self._ops_in_integers(),
            ("bytes", str(self.nbytes)),
        ]
        files = [("file", "bytes", "sha256")]
        files += [(f.name, "missing" if f.nbytes is None else str(f.nbytes), f.sha256) for f in self.files]
        layers = [("layer", "weight", "input", "rule", "bytes", "why float")]
        layers += [(x.name, x.weight, x.input, x.rule, str(x.nbytes), x.reason) for x in self.layers]
        spec = [f"  {printable(line)}" for line in self.spec.splitlines()]
        return "\n".join([*aligned(facts), "spec", *spec, "", *aligned(layers), "", *aligned(files)])


def inspect(path: str | Path) -> Inspection:
    """What the artifact in the directory ``path`` says of itself, for any target.

    Raises ``TargetError`` for a directory that is not an artifact, and for a damaged manifest. Files are neither read
    nor compared with their digests: ``graphq verify`` does that.
    """
    directory = Path(path)
    described = manifest.read(directory)
    source = manifest.source_of_artifact(directory, described)
    try:
        named = {"graphq": "version", "torch": "torch"}
        seed = entry(described, "seed", lambda value: type(value) is int and abs(value) < _SEEDS, "a seed")
        report = entry(described, "report", lambda value: isinstance(value, list), "a list of layers")
        return Inspection(
            path=str(directory),
            target=entry(described, "target", is_text, "text"),
            versions={
                n: entry(described, k, is_text, "text") for n, k in named.items() if n == "graphq" or k in described
            },
            model=_model(source),
            source=source,
            computed_in=entry(described, "computed_in", is_text_or_null, "text or null"),
            spec=entry(described, "spec", is_text, "text"),
            algorithm=entry(described, "algorithm", is_text, "text"),
            seed=seed,
            layers=tuple(map(_layer, report)),
            activations=_activations(described.get("activations")),
            files=tuple(
                ArtifactFile(name, (directory / name).stat().st_size if (directory / name).is_file() else None, sha256)
                for name, sha256 in sorted(manifest.listed_files(directory, described).items())
            ),
        )
    except ValueError as error:
        raise TargetError(f"{directory / manifest.NAME}: damaged: {error}") from error


def _layer(data: object) -> ArtifactLayer:
    try:
        texts = {key: entry(data, key, is_text, "text") for key in ("layer", "source", "rule", "reason")}
        weight, activation = (_plan(data, key) for key in ("weight", "input"))
        nbytes = entry(data, "bytes", is_size, "a size")
    except ValueError as error:
        raise ValueError(f"report: {error}") from error
    rule = " ".join(part for part in (texts["source"], f"({texts['rule']})" if texts["rule"] else "") if part)
    return ArtifactLayer(texts["layer"], weight, activation, rule, nbytes, texts["reason"])


def _activations(data: object) -> dict[str, Any] | None:
    """What became of the tensors between layers; null, or missing, where no profile placed anything."""
    if data is None:
        return None
    try:
        entry(data, "profile", is_text, "text")
        entry(data, "tensors", lambda value: isinstance(value, dict), "counts by type")
        entry(data, "fallback", lambda value: value is None or isinstance(value, dict), "a fallback or null")
        for op in entry(data, "ops", lambda value: isinstance(value, list), "a list of ops"):
            for key in ("op", "kind", "reason"):
                entry(op, key, is_text, "text")
            entry(op, "types", is_text_or_null, "text or null")
    except ValueError as error:
        raise ValueError(f"activations: {error}") from error
    return cast(dict[str, Any], data)


def _plan(data: object, key: str) -> str:
    plan = entry(data, key, lambda value: value is None or isinstance(value, dict), "a plan or null")
    return "float" if plan is None else entry(plan, "text", is_text, "text")


def _model(source: Source) -> str:
    """The class of the source, where its configuration names it, or else its outputs' form."""
    config: dict[str, Any] = json.loads(source.config) if source.config is not None else {}
    classes: list[str] = config.get("architectures") or []
    return classes[0] if classes else str(config.get("model_type", "a torch module"))


def _dtype(source: Source) -> str:
    return str(source.dtype).removeprefix("torch.")


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of as many cells as lines of text, in columns, with what is not printable escaped."""
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
