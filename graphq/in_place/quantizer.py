"""``graphq.quantize`` and ``graphq.convert``: quantization of a module tree where it stands, as AMCT has it.

No graph of the model is needed, and so none of what needs one is done: each layer is quantized for itself, by the
passes that ``graphq.compile`` runs, on a graph of the layer alone. Factors of SmoothQuant and AWQ are multiplied by at
run time.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any, Final, cast, final

import torch
from torch import nn

from graphq.algorithms import PassContext, quantization, unmatched
from graphq.capture.modules import unwrapped
from graphq.checks import is_calibrated, refusals
from graphq.errors import GraphError, GraphqError, PassError, SpecError
from graphq.frontends import amct, load_spec
from graphq.in_place.graph import Layer
from graphq.in_place.layer import FACTORS, InPlaceLayer
from graphq.in_place.tree import check_weights, describe, float_layers, notes_on, why_not
from graphq.passes.annotate import decide_on
from graphq.report import Report, make_report
from graphq.runtime.layers import QuantizedLayer
from graphq.spec.algorithms import ALGORITHMS
from graphq.spec.folds import EVERYWHERE
from graphq.spec.plan import KeepFloat, Plan
from graphq.spec.rules import Algorithm, Resolved, Spec

_STATE: Final = "_graphq_in_place"
_HOOKS: Final = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs"),
    *("_forward_hooks_always_called",),
)


def quantize(model: nn.Module, config: Spec | Mapping[str, Any] | str | os.PathLike[str] | None = None) -> None:
    """The linears and two-dimensional convolutions of ``model`` that ``config`` quantizes are watched, in place.

    The first ``batch_num`` calls of ``model`` calibrate and give what the float model gives; in later ones, each layer
    gives what it will give when it is converted. ``config``: an AMCT config (None: AMCT's default, int8 weights by
    channel), or a spec in any dialect, whose ``run`` says how many batches there are (1 where it does not).

    Layers hold their factors as buffers from then on: ``quantized_weight``, ``scale_w``, ``offset_w``, ``scale_d``,
    ``offset_d``, ``scale_factor`` and ``global_scale_w``, None where there is none. A state dict with factors that is
    loaded takes the place of calibration. Raises ``SpecError`` and ``GraphError``, and leaves the model as it was.
    """
    _check_model(model)
    spec = load_spec(amct.default_config() if config is None else cast(Any, config))
    problems = [*refusals(spec), *_beyond(spec)]
    if problems:
        raise SpecError(problems)
    found = _found(model)
    resolved, notes = _decide(model, spec, found)
    planned = _planned(resolved)
    taken = [f"{fqn}.{name}" for fqn in planned for name in FACTORS if hasattr(found[fqn], name)]
    if taken:
        raise GraphError(f"{taken[0]}: the model has this name already, which graphq gives to a factor; rename it")
    check_weights(planned, found)
    state = _Calibration(type(model).__name__, spec, resolved, [*notes, *notes_on(model, planned, found)])
    for fqn, plan in planned.items():
        own = dataclasses.replace(spec, algorithms=tuple(_own(spec, resolved[fqn])))
        needs_data = is_calibrated(plan) or any(ALGORITHMS[a.name].needs_data for a in own.algorithms)
        passes = quantization(own, {}, state.context(), False)
        state.layers[fqn] = InPlaceLayer(fqn, found[fqn], plan, passes, needs_data)
    state.attach(model)


def convert(model: nn.Module) -> None:
    """The quantized layers of ``model`` are replaced by packed ones, in place, and nothing is watched any more.

    Raises ``SpecError`` where calibration is not finished, which leaves the model as it was.
    """
    state = _state_of(model)
    if state.is_converted:
        raise GraphError(f"model: {state.name} is converted already")
    state.check_finished()
    made = {id(layer.layer): layer.quantized() for layer in state.layers.values()}
    for layer in state.layers.values():
        _keep_hooks(layer, made[id(layer.layer)])
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in made:
            parent, _, last = name.rpartition(".")
            model.get_submodule(parent).add_module(last, made[id(module)])
    state.detach()


def in_place_report(model: nn.Module) -> Report:
    """What became of each layer of a model that ``quantize`` was given, and why others stayed float."""
    return _state_of(model).report()


@final
class _Calibration:
    """The calibration of one model: how many of its calls have come through, and its layers."""

    def __init__(self, name: str, spec: Spec, resolved: Mapping[str, Resolved], notes: list[str]) -> None:
        self.name, self.resolved, self.notes = name, dict(resolved), notes
        self.wanted = spec.run.batches or 1
        self.count = 0
        self.layers: dict[str, InPlaceLayer] = {}
        self.sqnr: dict[str, float] = {}
        self.failed = ""
        self.is_converted = False
        self.handles: list[Any] = []

    def context(self) -> PassContext:
        """Its own methods, so that what a copied model finds goes to the copy."""
        return PassContext(self._record, self._note)

    def _record(self, fqn: str, sqnr_db: float) -> None:
        self.sqnr[fqn] = sqnr_db

    def _note(self, note: str) -> None:
        self.notes.append(note)

    def attach(self, model: nn.Module) -> None:
        for layer in self.layers.values():
            layer.attach()
        self.handles = [model.register_forward_pre_hook(self.begin), model.register_forward_hook(self.end)]
        setattr(model, _STATE, self)

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.layers, self.handles, self.is_converted = {}, [], True

    def begin(self, model: nn.Module, args: Any) -> None:
        """A batch is on its way."""
        if self.failed:
            raise SpecError(f"{self.failed}; calibration ended there: quantize a fresh model")
        for layer in self._unsettled():
            layer.begin(self.count)

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """A batch is through, and counts; a layer that has seen enough is settled."""
        unsettled = list(self._unsettled())
        if not unsettled:
            return
        device = unsettled[0].layer.weight.device.type
        try:
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                for layer in unsettled:
                    layer.take()
                self.count += 1
                for layer in unsettled:
                    if self.count >= self.wanted and layer.is_reached:
                        layer.settle()
        except (GraphqError, MemoryError, torch.OutOfMemoryError) as error:
            self.failed = str(error)
            raise
        except Exception as error:
            self.failed = f"{type(error).__name__}: {error}"
            raise PassError(f"quantize: batch {self.count}: {self.failed}") from error

    def _unsettled(self) -> Iterator[InPlaceLayer]:
        return (layer for layer in self.layers.values() if not layer.is_settled)

    def check_finished(self) -> None:
        """Raises ``SpecError`` that says what is missing."""
        unsettled = list(self._unsettled())
        if self.failed:
            raise SpecError(f"{self.failed}; calibration ended there: quantize a fresh model")
        if unsettled and self.count < self.wanted:
            raise SpecError(
                f"calibration: {self.count} of {self.wanted} batches; call the model on {self.wanted - self.count} more"
                f" before graphq.convert (calls of {self.name} itself count, not those of its parts)"
            )
        if unsettled:
            problem = f"calibration: no data reached {{}} in {self.count} batches; calibrate with data that uses it"
            raise SpecError([problem.format(layer.fqn) for layer in unsettled])

    def report(self) -> Report:
        dtypes = [layer.layer.dtype for layer in self.resolved.values()]
        bits = torch.finfo(getattr(torch, max(set(dtypes), key=dtypes.count))).bits
        return make_report(self.resolved, self.notes, bits, self.sqnr)


def _found(model: nn.Module) -> dict[str, Layer]:
    """The layers of ``model``. Raises ``GraphError`` where there are none, and where it is one itself."""
    found = float_layers(model)
    if "" in found:
        raise GraphError(f"model: a {type(model).__name__} alone cannot be replaced in place; put it into a module")
    if not found:
        raise GraphError(f"model: {type(model).__name__} has no nn.Linear and no nn.Conv2d to quantize")
    return found


def _decide(model: nn.Module, spec: Spec, found: dict[str, Layer]) -> tuple[dict[str, Resolved], list[str]]:
    """What becomes of each layer, and lines for the report."""
    layers = describe(model, found)
    resolved, notes = decide_on(layers, spec)
    if problems := unmatched(spec, layers, ()):
        raise SpecError(problems)
    for fqn, one in resolved.items():
        if isinstance(one.decision, Plan) and (why := why_not(model, fqn, found[fqn])):
            resolved[fqn] = dataclasses.replace(one, decision=KeepFloat(why))
    folded = [(a, w) for a in spec.algorithms if (w := dict(a.options).get("where", "multiply")) != "multiply"]
    folds = [f"{a.name}: where: {where}: in place, factors are multiplied by at run time" for a, where in folded]
    return resolved, [*notes, *folds]


def _planned(resolved: Mapping[str, Resolved]) -> dict[str, Plan]:
    """The plans of the layers that have one. Raises ``SpecError`` where none has, or one is none for a layer here."""
    planned = {fqn: one.decision for fqn, one in resolved.items() if isinstance(one.decision, Plan)}
    if not planned:
        reasons = [f"{fqn}: stays float: {cast(KeepFloat, one.decision).reason}" for fqn, one in resolved.items()]
        raise SpecError(["the config quantizes no layer of this model", *reasons])
    alone = [(fqn, plan.input) for fqn, plan in planned.items() if plan.weight is None]
    if alone:
        problem = "{}: input {}: graphq.quantize quantizes weights, alone or with inputs; give a weight, too"
        raise SpecError([problem.format(fqn, quant) for fqn, quant in alone])
    return planned


def _state_of(model: nn.Module) -> _Calibration:
    state = getattr(model, _STATE, None) if isinstance(cast(object, model), nn.Module) else None
    if isinstance(state, _Calibration):
        return state
    what = f"{type(model).__name__} was not given to graphq.quantize"
    if isinstance(cast(object, model), nn.Module):
        inner = next((name for name, module in model.named_modules() if hasattr(module, _STATE)), None)
        what += f"; its part {inner} was" if inner else ""
    raise GraphError(f"model: {what}")


def _check_model(model: nn.Module) -> None:
    if not isinstance(cast(object, model), nn.Module):
        raise GraphError(f"model: a {type(model).__name__} is no module")
    if unwrapped(model) is not model:
        raise GraphError(f"model: a {type(model).__name__} wraps the model; quantize what it wraps, and wrap it again")
    for name, module in model.named_modules():
        if hasattr(module, _STATE):
            raise GraphError(f"model: {name or type(model).__name__} is quantized already; quantize a fresh model")
        if isinstance(module, QuantizedLayer):
            raise GraphError(f"{name}: is quantized already; quantize a fresh model")


_CACHE: Final = "in place, layers alone are quantized; leave it out of the spec, or use graphq.compile"


def _beyond(spec: Spec) -> list[str]:
    """A line for each algorithm that changes more than one layer, or more than weights' codes, and for what no layer
    reads.
    """
    lines = [
        f"{f'{a.source}: ' if a.source else ''}{a.name} needs the graph of the model; use graphq.compile"
        for a in spec.algorithms
        if a.name in ALGORITHMS and not ALGORITHMS[a.name].in_place
    ]
    lines += [
        f"{f'{a.source}: ' if a.source else ''}{a.name}: folds: nothing is folded in place; use graphq.compile"
        for a in spec.algorithms
        if a.folds != EVERYWHERE
    ]
    asked = (("cache", spec.cache), ("attention", spec.attention))
    return lines + [f"{name}: {value}: {_CACHE}" for name, value in asked if value is not None]


def _own(spec: Spec, found: Resolved) -> Iterator[Algorithm]:
    """The algorithms that are for a layer, with their options for a layer alone: nothing is folded."""
    for algorithm in spec.algorithms:
        if algorithm.match and not any(match.matches(found.layer) for match in algorithm.match):
            continue
        options = dict(algorithm.options)
        if ALGORITHMS[algorithm.name].folds:
            options["where"] = "multiply"
        yield dataclasses.replace(algorithm, options=tuple(options.items()), match=())


def _keep_hooks(layer: InPlaceLayer, made: QuantizedLayer) -> None:
    """The user's own hooks of a layer are those of what takes its place; their handles stay good."""
    layer.detach()
    for name in _HOOKS:
        setattr(made, name, getattr(layer.layer, name))
