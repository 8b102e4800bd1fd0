"""What ``graphq.diff`` compares, as graphs: a model as it is, a spec on it, an artifact of it, a compiled model."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, final

import torch
from torch import fx, nn

from graphq import compiler
from graphq.algorithms import PassContext, preparations
from graphq.artifacts import manifest
from graphq.capture.source import source_of
from graphq.comparison.artifact_graph import computed_in, spec_of_artifact, structure_of, take_numbers
from graphq.comparison.folded import scaled_outputs
from graphq.compiler import Compiled, Inputs
from graphq.data.batches import complete_all
from graphq.errors import SpecError
from graphq.frontends import load_spec
from graphq.ir.edit import copy_graph
from graphq.ir.layers import layers
from graphq.ir.pipeline import Pipeline
from graphq.passes.annotate import Annotate
from graphq.spec.algorithms import ALGORITHMS
from graphq.spec.match import Blocks
from graphq.spec.plan import KeepFloat
from graphq.spec.rules import Algorithm, Rule, Spec

Model = nn.Module | str | os.PathLike[str]
Given = Compiled | Spec | Mapping[str, Any] | Model
Kind = Literal["model", "artifact", "compiled", "spec"]
_FLOAT = Spec((Rule(Blocks(), KeepFloat("compared as it is")),))


@final
@dataclass(frozen=True)
class Side:
    """One of the two: its graph, and the spec (None: the model as it is) and the seed that made it."""

    graph: fx.GraphModule
    spec: Spec | None
    seed: int = 0
    notes: tuple[str, ...] = ()

    @property
    def prepared_by(self) -> tuple[object, ...]:
        """What decides in which basis the values between layers are: algorithms of the whole graph, and their draws."""
        steps = _preparing(self.spec)
        return (*steps, self.seed) if any(step.name == "rotate" for step in steps) else tuple(steps)


@final
@dataclass(frozen=True)
class Sources:
    """The model that both sides are of, and how it is captured and calibrated."""

    model: Model | None
    batches: Sequence[object]
    inputs: Inputs | None = None
    dtype: torch.dtype | None = None
    cache: bool = True
    mask: str | None = None
    shapes: Mapping[str, int] | None = None
    trust_remote_code: bool = False
    _captured: list[fx.GraphModule] = field(default_factory=list[fx.GraphModule])

    def needed(self, what: str) -> Model:
        """The model. Raises ``SpecError`` where there is none."""
        if self.model is None:
            raise SpecError(f"{what}: give the model that it is of (model=, --model)")
        return self.model

    def captured(self, what: str) -> fx.GraphModule:
        """A graph of the model that may be changed; the model is captured once."""
        if not self._captured:
            model = self.needed(what)
            keywords = dict(self._keywords(), trust_remote_code=self.trust_remote_code)
            self._captured.append(compiler.capture(model, self.inputs, self.dtype, **keywords))
        return copy_graph(self._captured[0])

    def compiled(self, spec: Spec, seed: int, dtype: torch.dtype | None, cache: bool, what: str) -> Compiled:
        """What ``compile`` makes of the model by ``spec``, calibrated on the batches."""
        keywords = dict(self._keywords(), cache=cache, trust_remote_code=self.trust_remote_code)
        return compiler.compile(
            self.needed(what),
            spec,
            inputs=self.inputs,
            calibration=self.batches or None,
            dtype=dtype,
            seed=seed,
            check_capture=False,
            **keywords,
        )

    def beside(self, other: Side) -> fx.GraphModule:
        """The graph of the model as it is, in the basis of the other side."""
        gm = self.captured("a model")
        _prepare(gm, replace(_FLOAT, algorithms=tuple(_preparing(other.spec))), other.seed)
        return gm

    def _keywords(self) -> dict[str, Any]:
        return {"cache": self.cache, "mask": self.mask, "shapes": self.shapes}


def kind_of(given: Given) -> Kind:
    """What is given: a path is an artifact where a manifest stands in it, a model where a configuration does."""
    if isinstance(given, Compiled):
        return "compiled"
    if isinstance(given, nn.Module):
        return "model"
    if isinstance(given, Spec | Mapping):
        return "spec"
    path = Path(given)
    if (path / manifest.NAME).is_file():
        return "artifact"
    return "model" if path.is_dir() else "spec"


def sides_of(a: Given, b: Given, sources: Sources) -> tuple[Side, Side]:
    """Both as graphs whose values between layers are in one basis. Raises ``SpecError`` where they cannot be."""
    first, second = (None if kind_of(one) == "model" else _quantized(one, sources) for one in (a, b))
    if first is None and second is None:
        raise SpecError("diff: both are models as they are; give a spec, an artifact or a compiled model")
    if first is not None and second is not None and first.prepared_by != second.prepared_by:
        raise SpecError(
            "diff: A and B are prepared in unlike ways (rotate, fold-batch-norm), so that the values between their"
            " layers are not in one basis; compare each of them with the model"
        )
    if first is not None and second is not None:
        return first, second
    other = cast(Side, first or second)
    beside = Side(sources.beside(other), None)
    return (beside, other) if first is None else (other, beside)


def folds_of(side: Side, sources: Sources) -> dict[str, tuple[str, ...]]:
    """The layers whose output the side's algorithms may scale, with those that read it."""
    if side.spec is None or all(ALGORITHMS[a.name].stage not in ("smooth", "equalize") for a in side.spec.algorithms):
        return {}
    gm = sources.captured(f"{side.spec.algorithms[0].name} folds factors of channels into layers")
    _prepare(gm, side.spec, side.seed)
    return scaled_outputs(gm, side.spec, layers(gm))


def _quantized(given: Given, sources: Sources) -> Side:
    if isinstance(given, Compiled):
        return Side(given.graph, given.spec, given.seed)
    if kind_of(given) == "artifact":
        return artifact_side(Path(cast(str, given)), sources)
    return spec_side(given, sources)[1]


def spec_side(given: Any, sources: Sources) -> tuple[Compiled, Side]:
    """What ``compile`` makes of the model by a spec, in any form that it takes."""
    spec = load_spec(given)
    seed = spec.run.seed or 0
    made = sources.compiled(spec, seed, sources.dtype, sources.cache, "a spec")
    return made, Side(made.graph, spec, seed)


def artifact_side(directory: Path, sources: Sources) -> Side:
    """The QDQ form of an artifact, with the numbers that it holds. Raises ``SpecError`` without the model that it is
    of, ``TargetError`` where it cannot be read.
    """
    described = manifest.read(directory)
    spec = spec_of_artifact(directory, described)
    structure = structure_of(directory, spec)
    source = manifest.source_of_artifact(directory, described)
    seed = described.get("seed")
    seed = seed if type(seed) is int else 0
    dtype = sources.dtype or computed_in(directory, described)
    gm = sources.compiled(structure, seed, dtype, sources.cache and bool(source.caches), str(directory)).graph
    return Side(gm, spec, seed, tuple(take_numbers(gm, directory, described)))


def _prepare(gm: fx.GraphModule, spec: Spec, seed: int) -> None:
    """The spec's decisions stand on the layers of ``gm``, behind what rewrites it before there are any."""
    with torch.no_grad():
        Pipeline([*preparations(spec, PassContext(seed=seed)), Annotate(spec)]).run(gm)


def _preparing(spec: Spec | None) -> list[Algorithm]:
    return [] if spec is None else [one for one in spec.algorithms if ALGORITHMS[one.name].stage == "prepare"]


def batches_for(side: Side, batches: Iterable[object]) -> list[tuple[Any, ...]]:
    """The batches as the side's graph takes them. Raises ``SpecError`` where there are none."""
    found = list(complete_all(source_of(side.graph), batches))
    if not found:
        raise SpecError("calibration: no batches; a comparison needs at least one")
    return found
