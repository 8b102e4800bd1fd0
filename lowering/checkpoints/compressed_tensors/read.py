"""Which group of a ``quantization_config`` each layer of a checkpoint is in, by its name.

Source: compressed-tensors 0.20, ``utils/match.py``: exact names come before patterns, patterns before classes, each in
alphabetical order.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast, final

from graphq.errors import SpecError, TargetError
from graphq.frontends.document import Document, Section, show
from graphq.frontends.llm_compressor.args import read_args
from graphq.frontends.llm_compressor.targets import matches_at_once
from graphq.lowering.checkpoints.compressed_tensors.settings import VERSION
from graphq.spec.formats import Int
from graphq.spec.match import Regex
from graphq.spec.quant import Quant

_CLASSES: Final = ("Linear", "Embedding")
_ACROSS_WORDS: Final = (3, 5, 6, 7)  # bits of codes that lie across words
_SINCE: Final = (0, 18)


@final
@dataclass(frozen=True)
class Scheme:
    """How the layers of a group are stored and quantized. ``in_order``: their columns were rounded in the order of
    their activations. ``group``: its name.
    """

    format: str
    weight: Quant
    input: Quant | None
    in_order: bool = False
    group: str = ""


@final
@dataclass(frozen=True)
class Schemes:
    """The groups' schemes by their targets."""

    by_target: Mapping[str, Scheme]
    patterns: Mapping[str, Regex]

    def of(self, layer: str) -> Scheme | None:
        """That of a quantized layer of this name; None where no target matches it.

        Raises ``TargetError`` for a pattern that would take too long: files of strangers have them.
        """
        if layer in self.by_target:
            return self.by_target[layer]
        for target in sorted(self.patterns):
            found = matches_at_once(self.patterns[target], layer)
            if found is None:
                raise TargetError(f"targets: {show(target)}: might take very long to match {show(layer)}")
            if found:
                return self.by_target[target]
        return next((self.by_target[name] for name in _CLASSES if name in self.by_target), None)


def read_schemes(directory: Path) -> Schemes:
    """The schemes that ``config.json`` of a checkpoint says. Raises ``TargetError`` naming the key that is wrong."""
    file = directory / "config.json"
    if not file.is_file():
        raise TargetError(f"{file}: no such file")
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
        settings = config["quantization_config"]
        model_format, groups = settings["format"], settings["config_groups"]
        if settings.get("quant_method") != "compressed-tensors" or not isinstance(groups, dict):
            raise TargetError(f"{file}: quantization_config: is none of compressed-tensors")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TargetError(f"{file}: damaged: {type(error).__name__}: {error}") from error
    release = _release(file, settings.get("version", VERSION))
    document = Document(str(file), {"config_groups": groups})
    found: dict[str, Scheme] = {}
    patterns: dict[str, Regex] = {}
    for name in cast(dict[str, Any], groups):
        section = Section(document, groups, ("config_groups",)).section(name)
        weights = None if section is None else section.section("weights")
        weight = read_args(weights, "weights")
        given = None if section is None or section.values.get("input_activations") is None else section
        inputs = None if given is None else read_args(given.section("input_activations"), "input_activations")
        if document.problems or section is None or weight is None:
            raise TargetError("\n".join(document.problems) or f"{file}: config_groups.{name}: has no weights")
        if isinstance(weight.format, Int) and weight.format.bits in _ACROSS_WORDS and release < _SINCE:
            raise TargetError(
                f"{file}: config_groups.{name}: {weight.format}: its codes lie otherwise in files of compressed-tensors"
                f" before {_SINCE[0]}.{_SINCE[1]}, which are not read"
            )
        for target in section.items("targets"):
            pattern = str(target)
            if pattern.startswith("re:"):
                try:
                    patterns[pattern] = Regex(pattern.removeprefix("re:"))
                except SpecError as error:
                    raise TargetError(f"{file}: config_groups.{name}: targets: {show(pattern)}: {error}") from error
            format = str(section.values.get("format") or model_format)
            in_order = bool(weights is not None and weights.values.get("actorder"))
            found[pattern] = Scheme(format, weight, inputs, in_order, name)
    return Schemes(found, patterns)


def _release(file: Path, version: object) -> tuple[int, int]:
    """The release of compressed-tensors that wrote a file. Raises ``TargetError`` for one that is not known."""
    found = re.match(r"0\.(\d{1,4})\b", version) if isinstance(version, str) else None
    if found is None:
        raise TargetError(f"{file}: quantization_config: version: {show(version)}: is not known; 0.x is read")
    return 0, int(found[1])
