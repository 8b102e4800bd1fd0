"""The layers of a module tree that can be quantized where they stand, and those that cannot, with the reason."""

from collections.abc import Iterable
from typing import Any, Final, cast

import torch
from torch import nn

from graphq.capture import hugging_face
from graphq.capture.export import block_lists
from graphq.capture.source import Source
from graphq.checks import QUANTIZABLE
from graphq.errors import GraphError
from graphq.in_place.graph import Layer as Float
from graphq.spec.match import Layer

_HEAD: Final = "output head"
_OUTSIDE: Final = "outside of the repeated blocks"


def float_layers(model: nn.Module) -> dict[str, Float]:
    """The ``nn.Linear``s and ``nn.Conv2d``s of a model by the first of their names. Subclasses may compute something
    else, and are none.
    """
    kinds = (nn.Linear, nn.Conv2d)
    return {name: cast(Float, module) for name, module in model.named_modules() if type(module) in kinds}


def describe(model: nn.Module, found: dict[str, Float]) -> dict[str, Layer]:
    """The layers as rules see them."""
    source = Source((), (), "tensor", torch.float32, blocks=block_lists(model))
    head = cast(Any, model).get_output_embeddings() if hugging_face.is_pretrained(model) else None
    described: dict[str, Layer] = {}
    for fqn, layer in found.items():
        block = source.block_of(fqn)
        described[fqn] = Layer(
            fqn,
            "linear" if isinstance(layer, nn.Linear) else "conv2d",
            tuple(layer.weight.shape),
            block,
            _HEAD if layer is head else _OUTSIDE if source.blocks and block is None else "",
            str(layer.weight.dtype).removeprefix("torch."),
            layer.bias is not None,
            layer.padding_mode if isinstance(layer, nn.Conv2d) else "zeros",
        )
    return described


def why_not(model: nn.Module, fqn: str, layer: Float) -> str:
    """Why a layer cannot be quantized in place; empty where it can."""
    parent = model.get_submodule(fqn.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer reads its weight without calling it"
    if not isinstance(cast(object, layer.weight), nn.Parameter):
        return "its weight is computed at each call"
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        return f"it pads by {layer.padding_mode}; in place, graphq quantizes convolutions that pad with zeros"
    return ""


def notes_on(model: nn.Module, planned: Iterable[str], found: dict[str, Float]) -> list[str]:
    """A line for each layer that is none here because of its class, for further names, and for tied weights."""
    notes: list[str] = []
    names = {id(layer): fqn for fqn, layer in found.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        first = names.get(id(module))
        if first is not None and first != name:
            notes.append(f"{name}: is {first} under another name")
        elif first is None and (isinstance(module, nn.Linear | nn.Conv2d) or _has_matrix(module)):
            kind = type(module).__name__
            notes.append(f"{name}: stays float: a {kind}; in place, nn.Linear and nn.Conv2d are quantized")
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    for fqn in planned:
        own = [f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False) if module is found[fqn]]
        others = [name for name in holders[id(found[fqn].weight)] if name not in own]
        if others:
            notes.append(f"{fqn}: its weight is {others[0]}, too, which is left as it is")
    return notes


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def check_weights(planned: Iterable[str], found: dict[str, Float]) -> None:
    """Raises ``GraphError`` for a weight without data, with NaN or Inf, or of a dtype that cannot be quantized."""
    for fqn in planned:
        w = found[fqn].weight.detach()
        if w.dtype not in QUANTIZABLE:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in QUANTIZABLE)
            raise GraphError(f"{fqn}: the weight is {w.dtype}; graphq quantizes {names}")
        if w.is_meta:
            raise GraphError(f"{fqn}: the weight is on the meta device; load the model's weights first")
        if not torch.isfinite(w).all():
            raise GraphError(f"{fqn}: the weight holds NaN or Inf")
