"""What a quantized checkpoint says of itself, whoever wrote it: by its configuration and the headers of its files.

The readers are those of ``sources``, on which compilation and conversion stand, too.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from graphq.artifacts.fields import are_texts
from graphq.artifacts.inspect import aligned
from graphq.lowering.checkpoints.sources.read import read_quantized


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
    found = read_quantized(directory)
    layers = tuple(
        CheckpointLayer(
            name,
            str(dataclasses.replace(weight.quant, arithmetic="float32")),
            str(weight.input or "float"),
            weight.format,
            weight.nbytes,
        )
        for name, weight in found.weights.items()
    )
    apart = [tensor.nbytes for name, tensor in found.headers.items() if name not in found.parts]
    files: dict[str, int] = {}
    for tensor in found.headers.values():
        files[tensor.file] = files.get(tensor.file, 0) + tensor.nbytes
    classes = found.config.get("architectures")
    model = classes[0] if are_texts(classes) and classes else found.config.get("model_type", "a model")
    dtype = found.config.get("dtype") or found.config.get("torch_dtype") or "dtype unknown"
    return CheckpointInspection(
        str(directory),
        found.format,
        f"{model}, {dtype}",
        layers,
        (len(apart), sum(apart)),
        dict(sorted(files.items())),
    )
