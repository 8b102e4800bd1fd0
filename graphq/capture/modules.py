"""Capture of any module from example inputs, as one functional graph with flat tensors in and out."""

import contextlib
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from graphq.capture.export import FlatModel, SpecializedError, export_flat
from graphq.capture.source import BATCH, KEY, SEQUENCE, Source, TensorInput
from graphq.capture.token_axes import has_tokens, problem_of, token_axes
from graphq.errors import GraphError, PassError, SpecError


def capture_module(
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    cache: bool = True,
    mask: str | None = None,
) -> fx.GraphModule:
    """The graph of any module, from example inputs (a tensor, a tuple, or a dict by argument name).

    ``cache=False``: transformers models, and those in the module, are asked for no cache.

    The first dimension of every input is the dynamic ``batch``; the second dimension of ``[batch, n]`` integer and
    ``[batch, n, features]`` inputs is the dynamic ``sequence`` where the model allows it; a note says where not.
    ``mask`` names the input ``[batch, tokens]`` that is 1 where a token counts and 0 where it is padding; with it,
    ``sequence`` is the dimension of an input that is as large as the mask (``token_axes``). Raises ``GraphError`` for
    inputs or outputs that are not tensors, a specialized batch, and untraceable code; ``SpecError`` for a mask that is
    none: one of other numbers, or of the tokens of no input.
    """
    model = unwrapped(model)
    named = _name_inputs(model, inputs)
    _check_mask(mask, named)
    with contextlib.nullcontext() if cache else _without_cache(model):
        gm = _capture(model, named, {} if cache else _no_cache(model, named), mask)
    _check_examples(gm, model, named)
    source: Source = gm.meta[KEY]
    undeclared = () if mask else (name for name, x in named.items() if name.endswith("mask") and x.dim() == 2)
    notes = [
        f"{name}: is not declared as the mask of padding: all tokens calibrate (compile takes mask={name!r})"
        for name in undeclared
    ]
    size = {one.name: one.shape for one in source.inputs}[mask][1] if mask else None
    square = [one.name for one in source.inputs if isinstance(size, int) and one.shape[1:] == (size, size)]
    notes += [
        f"{name}: dimensions 1 and 2 are as large as {mask}: dimension 1 is taken for its tokens" for name in square
    ]
    gm.meta[KEY] = replace(source, mask=mask, notes=(*source.notes, *notes))
    return gm


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Generator[None]:
    """The configurations in the model say that no cache is used."""
    found = {id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "use_cache")}
    before = [(config, cast(Any, config).use_cache) for config in found.values()]
    for config, _ in before:
        cast(Any, config).use_cache = False
    try:
        yield
    finally:
        for config, own in before:
            cast(Any, config).use_cache = own


def _no_cache(model: nn.Module, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """The argument by which the model's caller says so, where it has one."""
    taken = "use_cache" in inspect.signature(model.forward).parameters and "use_cache" not in named
    return {"use_cache": False} if taken else {}


def _check_mask(mask: str | None, named: Mapping[str, Tensor]) -> None:
    if mask is None:
        return
    if mask not in named:
        raise SpecError(f"mask: the model has no input {mask}; it takes {', '.join(named)}")
    given = named[mask]
    if given.dim() != 2:
        raise SpecError(f"mask: {mask} has shape {tuple(given.shape)}; a mask of tokens is (batch, tokens)")
    if not token_axes(_declared(named), mask):
        others = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items() if name != mask)
        raise SpecError(
            f"mask: no input has the {given.shape[1]} tokens of {mask} {tuple(given.shape)}; there"
            f" {f'are {others}' if others else 'is no other'}"
        )
    if not (given.is_meta or isinstance(given, FakeTensor)) and (problem := problem_of(given)):
        raise SpecError(f"mask: {mask} {problem}")


def _declared(named: Mapping[str, Tensor], tokens: Mapping[str, int] | None = None) -> tuple[TensorInput, ...]:
    """The inputs, with a dynamic batch and a dynamic size of these axes, the others as in the examples."""
    axes = {} if tokens is None else tokens
    return tuple(
        TensorInput(
            name,
            x.dtype,
            tuple(
                BATCH if axis == 0 else SEQUENCE if axis == axes.get(name) else size
                for axis, size in enumerate(x.shape)
            ),
        )
        for name, x in named.items()
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` or a data-parallel module was given, whose names are the user's."""
    while True:
        inner = dict(model.named_children()).get("_orig_mod")
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        elif type(model).__name__ != "OptimizedModule":
            return model
        if inner is None:
            return model
        model = inner


def _check_examples(gm: fx.GraphModule, model: nn.Module, named: Mapping[str, Tensor]) -> None:
    """Raises ``GraphError`` if the model cannot be run on the examples: export looks at few dtypes and no values.

    Raises ``PassError`` if the graph alone cannot.
    """
    if any(isinstance(x, FakeTensor) for x in (*named.values(), *gm.state_dict(keep_vars=True).values())):
        return
    try:
        with torch.no_grad():
            gm.forward(*named.values())
    except Exception as error:  # whatever the ops say
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if _runs(model, named):
            raise PassError(f"capture: the graph of {type(model).__name__} fails where it does not: {first}") from error
        raise GraphError(f"inputs: {type(model).__name__} fails on the examples: {first}") from error


def _runs(model: nn.Module, named: Mapping[str, Tensor]) -> bool:
    with contextlib.suppress(Exception), torch.no_grad():  # whatever its code raises
        _caller(model, {})(model, dict(named))
        return True
    return False


def _capture(
    model: nn.Module, named: dict[str, Tensor], options: Mapping[str, Any], mask: str | None
) -> fx.GraphModule:
    """The graph, with inputs in the order of ``named``; ``options``: further arguments of the model."""
    tokens = {one.name: 1 for one in _declared(named) if has_tokens(one)}
    if mask is not None:
        tokens |= {mask: 1} | token_axes(_declared(named), mask)
    sequence_sizes = {named[name].shape[axis] for name, axis in tokens.items()}
    with_sequence = len(sequence_sizes) == 1 and sequence_sizes != {1}
    batch_sizes = {x.shape[0] for x in named.values() if x.dim()}
    if len(batch_sizes) > 1:
        sizes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
        raise GraphError(f"inputs: the first dimensions differ ({sizes}); every input starts with the batch")
    copies = (
        2 if batch_sizes == {1} else 1
    )  # export would take a batch of 1 for a constant, one tensor given twice for one
    named = {name: torch.cat([x] * copies) if x.dim() else x.clone() for name, x in named.items()}

    flat = FlatModel(model, tuple(named), _caller(model, options))
    if with_sequence:
        try:
            return export_flat(flat, _declared(named, tokens), tuple(named.values()))
        except SpecializedError as error:
            gm = export_flat(flat, _declared(named), tuple(named.values()))
            source: Source = gm.meta[KEY]
            axes = " and ".join(str(axis) for axis in sorted(set(tokens.values())))
            gm.meta[KEY] = replace(source, notes=(*source.notes, f"dimension {axes} of the inputs is fixed: {error}"))
            return gm
    return export_flat(flat, _declared(named), tuple(named.values()))


def _caller(model: nn.Module, options: Mapping[str, Any]) -> Callable[[nn.Module, dict[str, Tensor]], Any]:
    """How the model is called with inputs by name: those that have none for its callers, by their positions."""
    parameters = inspect.signature(model.forward).parameters
    nameless = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]

    def call(module: nn.Module, by_name: dict[str, Tensor]) -> Any:
        first = [by_name.pop(name) for name in nameless if name in by_name]
        return module(*first, **by_name, **options)

    return call


def _name_inputs(model: nn.Module, inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs by name, in the order of the model's ``forward``."""
    parameters = inspect.signature(model.forward).parameters
    where = f"{type(model).__name__}.forward"
    by_position = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    endless = [n for n, p in parameters.items() if p.kind is p.VAR_POSITIONAL]
    named: dict[str, Any]
    if isinstance(inputs, Mapping):
        named = {n: inputs[n] for n in parameters if n in inputs} | dict(inputs)
    else:
        given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        if len(given) > len(by_position):
            if endless:
                raise _nameless(where, endless[0])
            if not by_position and parameters:
                raise GraphError(f"inputs: {where} takes none by position; pass a dict by argument name")
            raise GraphError(f"inputs: {len(given)} given, {where} takes {len(by_position)}: {', '.join(by_position)}")
        named = dict(zip(by_position, given, strict=False))
    if not named:
        raise GraphError(f"inputs: none given; pass example inputs of {where} as a tuple or dict")
    accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in named.items():
        if name in endless:
            raise _nameless(where, name)
        if name not in parameters and not accepts_any:
            raise GraphError(f"inputs: {where} has no argument {name}; it takes {', '.join(parameters)}")
        if not isinstance(value, Tensor):
            raise GraphError(f"inputs: {name} is a {type(value).__name__}; graphs take flat tensors")
    nameless = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_ONLY]
    left_out = [n for i, n in enumerate(nameless) if n not in named and any(later in named for later in nameless[i:])]
    if left_out:
        raise GraphError(f"inputs: {where} takes {', '.join(nameless)} by position alone: give {left_out[0]}, too")
    return named


def _nameless(where: str, name: str) -> GraphError:
    return GraphError(
        f"inputs: {where} takes any number of tensors (*{name}), which have no names for a graph; wrap the model in a"
        " module whose forward names each"
    )
