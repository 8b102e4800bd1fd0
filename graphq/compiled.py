"""A compiled model, and what can be done with it."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import fx

from graphq.artifacts.journal import journal_of
from graphq.capture.source import source_of
from graphq.capture.unread import read_all
from graphq.files import check_place
from graphq.frontends.native import print_spec
from graphq.ir.cache_plans import CachePlan
from graphq.lowering.targets import check_options, options_of, target_named
from graphq.lowering.torch.pack import pack
from graphq.memory import check_disk
from graphq.phases import PhaseTimer
from graphq.report import ActivationsReport, Report
from graphq.runtime.calls import Outputs
from graphq.runtime.model import CompiledModel
from graphq.runtime.pickling import NotPickled
from graphq.spec.rules import Spec

_OF_ITS_MODULE: Final = (
    "can_generate", "config", "device", "dtype", "eval", "generate", "generation_config", "input_modalities",
    "output_modalities", "tie_weights", "to",
)  # fmt: skip


@final
class _MadeFrom(Mapping[str, Any]):
    """What an artifact's manifest says it was made from; the report is asked for when it is written, last."""

    def __init__(
        self,
        spec: Spec,
        seed: int,
        report: Callable[[], Report],
        activations: ActivationsReport | None,
        caches: Sequence[CachePlan],
    ) -> None:
        self._found: dict[str, Callable[[], Any]] = {
            "spec": lambda: print_spec(spec),
            "algorithm": lambda: "+".join(a.name for a in spec.algorithms) or "rtn",
            "seed": lambda: seed,
            "report": lambda: report().rows(),
        }
        if activations is not None:
            self._found["activations"] = activations.to_json
        if caches:
            self._found["caches"] = lambda: [cache.to_json() for cache in caches]

    def __getitem__(self, key: str) -> Any:
        return self._found[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


@final
class Compiled(NotPickled):
    """A compiled model. ``graph`` is the QDQ form, the truth that every artifact equals; ``report`` says what became of
    each layer; ``spec`` is what was compiled. Calling it runs the packed torch module, whose ``config``, ``device``,
    ``dtype``, ``generate`` and the like are its own, too: lm-eval and transformers' pipelines take it as a model.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        spec: Spec,
        report: Report,
        seed: int,
        sqnr: Mapping[str, float] | None = None,
    ) -> None:
        """``sqnr``: the layers' ratios where tensors of ``graph`` are deferred, known when these are read."""
        self.spec = spec
        self.seed = seed
        self._graph = graph
        self._report = report
        self._sqnr = sqnr
        self._is_read = sqnr is None
        self._packed: CompiledModel | None = None

    @property
    def graph(self) -> fx.GraphModule:
        """The QDQ form, which holds all of its tensors."""
        if not self._is_read:
            with torch.no_grad():
                read_all(self._graph)
            self._is_read = True
        self._learn()
        return self._graph

    @property
    def report(self) -> Report:
        """What became of each layer; tensors that are deferred are read for it."""
        if self._sqnr is not None:
            _ = self.graph
        return self._report

    @report.setter
    def report(self, report: Report) -> None:
        self._report = report

    def _learn(self) -> Report:
        """The report, whose layers know their ratios as far as their tensors were read."""
        if self._sqnr is None:
            return self._report
        known = self._report.with_sqnr(self._sqnr)
        if self._is_read or all(one.layer.fqn in self._sqnr for one in known.layers if one.weight is not None):
            self._report, self._sqnr = known, None
        return known

    @property
    def module(self) -> CompiledModel:
        """The packed torch module. When it is made, ``report`` learns what computes its layers on this machine."""
        if self._packed is None:
            self._packed = CompiledModel(pack(self.graph)).eval()
            self.report = dataclasses.replace(self.report, kernels=self._packed.kernels)
        return self._packed

    def __call__(self, *args: object, **kwargs: object) -> Outputs:
        """See ``CompiledModel.forward``."""
        with torch.inference_mode():
            return self.module(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_ITS_MODULE:
            return getattr(self.module, name)
        raise AttributeError(f"{type(self).__name__} has no attribute {name}")

    def emit(self, target: str, path: str | os.PathLike[str], **options: Any) -> None:
        """Write the artifact for ``target`` (``"torch"``, ``"onnx"``) into the directory ``path``, whole or not at all.

        ``options`` are the keywords of the target's own ``emit``; every target has ``overwrite=True``, which replaces
        an existing artifact. What the user should know of the artifact joins the report's notes. Raises
        ``TargetError`` for a layer that the target cannot hold, for an option that it does
        not have, for an existing ``path``, and for a disk without room for the codes.
        """
        if self.spec.profile and "profile" in options_of(target):
            options = {"profile": self.spec.profile} | options
        check_options(target, options)
        files = source_of(self._graph).files
        check_place(path, options.get("overwrite", False), [files] if files is not None else [])
        stored = sum(layer.nbytes for layer in self._report.layers if layer.weight is not None)
        check_disk(Path(path), stored)
        timer = PhaseTimer()
        row = target_named(target)
        graph = self._graph if row.reads else self.graph
        made_from = _MadeFrom(self.spec, self.seed, self._learn, self._report.activations, self._report.caches)
        with torch.no_grad():
            notes = row.emit(graph, Path(path), made_from, **options)
        timer.end(f"emit {target}")
        if (journal := journal_of(self._graph)) is not None:
            journal.is_done = True
        notes = tuple(dict.fromkeys((*self.report.notes, *notes)))
        self.report = dataclasses.replace(self.report, notes=notes, phases=(*self.report.phases, *timer.phases))

    def release(self) -> None:
        """Another process may have the ``work_dir``. If an artifact was emitted what it holds is gone, and with it the
        tensors that are read from there.
        """
        if (journal := journal_of(self._graph)) is not None:
            journal.close()

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the torch artifact, which ``graphq.load`` reads."""
        self.emit("torch", path, overwrite=overwrite)
