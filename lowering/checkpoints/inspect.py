"""What a quantized checkpoint says of itself, whoever wrote it: by its configuration and the headers of its files.

llm-compressor's, and what else compressed-tensors reads: ``quantization_config`` of ``config.json``, and the tensors of
each of its formats (``compressed_tensors/layouts.py``). msModelSlim's: the description, with a tag for each tensor.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from graphq.artifacts.fields import are_texts
from graphq.artifacts.headers import StoredTensor, read_headers
from graphq.artifacts.inspect import aligned
from graphq.errors import SpecError, TargetError
from graphq.frontends import load_spec
from graphq.lowering.checkpoints.ascend.read import DESCRIPTION, read_description, stem_of
from graphq.lowering.checkpoints.compressed_tensors.read import read_schemes
from graphq.spec.match import Exact
from graphq.spec.plan import Plan

# What a layer of each format has, beside zero points and scales of inputs.
_PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "pack-quantized": ("weight_packed", "weight_scale", "weight_shape"),
    "int-quantized": ("weight", "weight_scale"),
    "float-quantized": ("weight", "weight_scale"),
    "naive-quantized": ("weight", "weight_scale"),
    "nvfp4-pack-quantized": ("weight_packed", "weight_scale", "weight_global_scale"),
    "mxfp4-pack-quantized": ("weight_packed", "weight_scale"),
    "mxfp8-quantized": ("weight", "weight_scale"),
}


@final
@dataclass(frozen=True)
class CheckpointLayer:
    """A quantized layer: its plan in the text form (``float``: not quantized), how it is stored, and its bytes."""

    name: str
    weight: str
    input: str
    format: str
    nbytes: int


@final
@dataclass(frozen=True)
class CheckpointInspection:
    """A checkpoint in short. ``str`` of it is for people, with what is not printable escaped; ``to_json`` for programs.

    others: how many tensors belong to no quantized layer, and their bytes. files: of weights, by name, with the bytes
    of their tensors.
    """

    path: str
    format: str
    model: str
    layers: tuple[CheckpointLayer, ...]
    others: tuple[int, int]
    files: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "checkpoint": self.path,
            "format": self.format,
            "model": self.model,
            "layers": [
                {"layer": x.name, "weight": x.weight, "input": x.input, "format": x.format, "bytes": x.nbytes}
                for x in self.layers
            ],
            "others": {"tensors": self.others[0], "bytes": self.others[1]},
            "files": dict(self.files),
        }

    def __str__(self) -> str:
        facts = [
            ("checkpoint", self.path),
            ("format", self.format),
            ("model", self.model),
            ("layers", f"{len(self.layers)} quantized"),
            ("others", f"{self.others[0]} tensors, {self.others[1]} bytes"),
        ]
        layers = [("layer", "weight", "input", "stored as", "bytes")]
        layers += [(x.name, x.weight, x.input, x.format, str(x.nbytes)) for x in self.layers]
        files = [("file", "bytes"), *((name, str(nbytes)) for name, nbytes in self.files.items())]
        return "\n".join([*aligned(facts), "", *aligned(layers), "", *aligned(files)])


def inspect_checkpoint(directory: Path) -> CheckpointInspection:
    """What the checkpoint in ``directory`` says of itself. Loads no weights.

    Raises ``TargetError`` for a directory that is no quantized checkpoint, and names the file, the tensor or the layer
    that is damaged.
    """
    if (directory / DESCRIPTION).is_file():
        return _ascend(directory)
    schemes = read_schemes(directory)
    config: Any = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    held = read_headers(directory)
    layers: list[CheckpointLayer] = []
    for name, parts in _by_layer(held).items():
        if not any(suffix in parts for suffix in ("weight_scale", "weight_packed")):
            continue
        scheme = schemes.of(name)
        if scheme is None:
            raise TargetError(f"{directory}: {name}: has quantized tensors, and no group of config.json is for it")
        if scheme.format not in _PARTS:
            raise TargetError(f"{directory}: {name}: {scheme.format}: is no format that is read")
        if missing := [part for part in _PARTS[scheme.format] if part not in parts]:
            raise TargetError(f"{directory}: {name}: {scheme.format}: has no {missing[0]}")
        nbytes = sum(tensor.nbytes for suffix, tensor in parts.items() if suffix != "bias")
        weight = str(dataclasses.replace(scheme.weight, arithmetic="float32"))
        layers.append(CheckpointLayer(name, weight, str(scheme.input or "float"), scheme.format, nbytes))
    settings, version = config["quantization_config"], config["quantization_config"].get("version")
    format = f"compressed-tensors{f' {version}' if version else ''}, {settings['format']}"
    return _inspection(directory, format, config, layers, held)


def _ascend(directory: Path) -> CheckpointInspection:
    """msModelSlim's: the plans of its description, and the tensors that this has tags for."""
    description = read_description(directory)
    try:
        spec = load_spec(directory / DESCRIPTION, "modelslim")
    except SpecError as error:
        raise TargetError(str(error)) from error
    held = read_headers(directory, stem_of(directory))
    if missing := held.keys() ^ description.tags.keys():
        where = "has no tag" if min(missing) in held else "is in no file of weights"
        raise TargetError(f"{directory / DESCRIPTION}: {min(missing)}: {where}")
    plans = {rule.match.fqn: rule.decision for rule in spec.rules if isinstance(rule.match, Exact)}
    layers: list[CheckpointLayer] = []
    for name, parts in _by_layer(held).items():
        plan = plans.get(name)
        if isinstance(plan, Plan) and plan.weight is not None:
            nbytes = sum(tensor.nbytes for suffix, tensor in parts.items() if suffix != "bias")
            weight = str(dataclasses.replace(plan.weight, arithmetic="float32"))
            tag = description.tags[f"{name}.weight"]
            layers.append(CheckpointLayer(name, weight, str(plan.input or "float"), tag, nbytes))
    file = directory / "config.json"
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise TargetError(f"{file}: damaged: {error}") from error
    version, whole = (description.keys.get(key, "unknown") for key in ("version", "model_quant_type"))
    return _inspection(directory, f"msModelSlim {version}, {whole}", config, layers, held)


def _by_layer(held: Mapping[str, StoredTensor]) -> dict[str, dict[str, StoredTensor]]:
    """Tensors by the part of their names that is their layer's, and by the rest."""
    named: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in held.items():
        layer, _, suffix = name.rpartition(".")
        named.setdefault(layer, {})[suffix] = tensor
    return named


def _inspection(
    directory: Path, format: str, config: Any, layers: Sequence[CheckpointLayer], held: Mapping[str, StoredTensor]
) -> CheckpointInspection:
    quantized = {layer.name for layer in layers}
    apart = [name for name in held if name.rpartition(".")[0] not in quantized or name.endswith(".bias")]
    files: dict[str, int] = {}
    for tensor in held.values():
        files[tensor.file] = files.get(tensor.file, 0) + tensor.nbytes
    config = config if isinstance(config, dict) else {}
    classes = config.get("architectures")
    model = classes[0] if are_texts(classes) and classes else config.get("model_type", "a model")
    return CheckpointInspection(
        str(directory),
        format,
        f"{model}, {config.get('dtype') or config.get('torch_dtype') or 'dtype unknown'}",
        tuple(layers),
        (len(apart), sum(held[name].nbytes for name in apart)),
        dict(sorted(files.items())),
    )
