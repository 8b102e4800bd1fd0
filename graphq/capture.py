"""Capture of any module from example inputs, as one functional graph with flat tensors in and out."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphq.errors import GraphError
from graphq.export import FlatModel, SpecializedError, export_flat
from graphq.source import BATCH, KEY, SEQUENCE, Source, TensorInput


def capture_module(model: nn.Module, inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> fx.GraphModule:
    """The graph of any module, from example inputs (a tensor, a tuple, or a dict by argument name).

    The first dimension of every input is the dynamic ``batch``; the second dimension of ``[batch, n]`` integer and
    ``[batch, n, features]`` inputs is the dynamic ``sequence`` where the model allows it; a note says where not.
    Raises ``GraphError`` for inputs or outputs that are not tensors, a specialized batch, and untraceable code.
    """
    named = _name_inputs(model, inputs)
    sequence_sizes = {x.shape[1] for x in named.values() if _has_sequence(x)}
    with_sequence = len(sequence_sizes) == 1 and sequence_sizes != {1}
    batch_sizes = {x.shape[0] for x in named.values() if x.dim()}
    if len(batch_sizes) > 1:
        sizes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
        raise GraphError(f"inputs: the first dimensions differ ({sizes}); every input starts with the batch")
    copies = (
        2 if batch_sizes == {1} else 1
    )  # export would take a batch of 1 for a constant, one tensor given twice for one
    named = {name: torch.cat([x] * copies) if x.dim() else x.clone() for name, x in named.items()}

    def declare(sequence: bool) -> tuple[TensorInput, ...]:
        return tuple(
            TensorInput(
                name,
                x.dtype,
                tuple(
                    BATCH if axis == 0 else SEQUENCE if axis == 1 and sequence and _has_sequence(x) else size
                    for axis, size in enumerate(x.shape)
                ),
            )
            for name, x in named.items()
        )

    flat = FlatModel(model, tuple(named), lambda module, by_name: module(**by_name))
    if with_sequence:
        try:
            return export_flat(flat, declare(sequence=True), tuple(named.values()))
        except SpecializedError as error:
            gm = export_flat(flat, declare(sequence=False), tuple(named.values()))
            source: Source = gm.meta[KEY]
            gm.meta[KEY] = replace(source, notes=(*source.notes, f"dimension 1 of the inputs is fixed: {error}"))
            return gm
    return export_flat(flat, declare(sequence=False), tuple(named.values()))


def _has_sequence(x: Tensor) -> bool:
    return x.dim() == 3 or (x.dim() == 2 and not x.is_floating_point())


def _name_inputs(model: nn.Module, inputs: Tensor | Sequence[Tensor] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    parameters = inspect.signature(model.forward).parameters
    named: dict[str, Any]
    if isinstance(inputs, Mapping):
        named = dict(inputs)
    else:
        given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        names = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(given) > len(names):
            raise GraphError(
                f"inputs: {len(given)} given, {type(model).__name__}.forward takes {len(names)}: {', '.join(names)}"
            )
        named = dict(zip(names, given, strict=False))
    if not named:
        raise GraphError(
            f"inputs: none given; pass example inputs of {type(model).__name__}.forward as a tuple or dict"
        )
    accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name, value in named.items():
        if name not in parameters and not accepts_any:
            raise GraphError(
                f"inputs: {type(model).__name__}.forward has no argument {name}; it takes {', '.join(parameters)}"
            )
        if not isinstance(value, Tensor):
            raise GraphError(f"inputs: {name} is a {type(value).__name__}; graphs take flat tensors")
    return named
