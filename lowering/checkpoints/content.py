"""What a checkpoint of a QDQ form holds, before a format says how: its layers and its float tensors by their names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from torch import Tensor, fx

from graphq.capture.source import source_of
from graphq.ir.layers import TURNED
from graphq.lowering.checkpoints.architecture import Architecture, architecture_of
from graphq.lowering.checkpoints.layers import QuantizedLinear, beyond, quantized_linears, rename, unstacked
from graphq.lowering.checkpoints.written import FloatTensor
from graphq.lowering.legalize import where
from graphq.spec.formats import Nvfp4
from graphq.state import first_names

_ARCHITECTURE: Final = "graphq.architecture"


def checkpoint_form(gm: fx.GraphModule, target: str) -> fx.GraphModule:
    """A copy of the QDQ form ``gm`` whose layers are linears of their own, with the names of the checkpoint.

    Raises ``TargetError`` for a model that no class of transformers loads.
    """
    made = unstacked(gm)
    architecture = architecture_of(made, target)
    rename(made, architecture.names)
    made.meta[_ARCHITECTURE] = architecture
    return made


def graph_layers(form: fx.GraphModule) -> dict[str, str]:
    """The names that layers of a ``checkpoint_form`` have in the graph it was made of, by those in it; nothing for
    other graphs, whose names are kept.
    """
    architecture: Architecture | None = form.meta.get(_ARCHITECTURE)
    if architecture is None:
        return {}
    names = architecture.names.items()
    return {new.removesuffix(".weight"): old.removesuffix(".weight") for old, new in names if new.endswith(".weight")}


@final
@dataclass(frozen=True)
class Content:
    """graph: a ``checkpoint_form``. layers: its quantized linears by name. floats: what stays float, as it is stored,
    by its name in the checkpoint.
    """

    graph: fx.GraphModule
    architecture: Architecture
    layers: Mapping[str, QuantizedLinear]
    floats: Mapping[str, FloatTensor]

    @property
    def config(self) -> dict[str, Any]:
        """The source's settings, in the dtype of its weights; a tie that the checkpoint undoes is undone."""
        dtype = str(source_of(self.graph).dtype).removeprefix("torch.")
        config = dict(self.architecture.config) | {"dtype": dtype}  # a directory's is captured wider
        if any(self._is_apart(name) for name in self.architecture.tied):
            config["tie_word_embeddings"] = False
        return config

    def _is_apart(self, graph_name: str) -> bool:
        """Whether a tied tensor is no longer the one that it is tied to."""
        name, other = (self.architecture.names[n] for n in (graph_name, self.architecture.tied[graph_name]))
        if name.removesuffix(".weight") in self.layers or name not in self.floats:
            return name.removesuffix(".weight") in self.layers
        same = first_names(self.graph.state_dict(keep_vars=True))
        return same.get(name, name) != same.get(other, other)


def content_of(gm: fx.GraphModule, target: str, *, ties: bool = False) -> Content:
    """What a checkpoint of the QDQ form ``gm`` holds.

    ties: a tensor that the configuration ties to another stands under both names. Raises ``TargetError`` for a model
    that no class of transformers loads.
    """
    made = checkpoint_form(gm, target)
    architecture: Architecture = made.meta[_ARCHITECTURE]
    layers = quantized_linears(made)
    return Content(made, architecture, layers, _floats(made, architecture, layers, ties))


def _floats(
    gm: fx.GraphModule, architecture: Architecture, layers: Mapping[str, QuantizedLinear], ties: bool
) -> dict[str, FloatTensor]:
    state = gm.state_dict(keep_vars=True)
    same = first_names(state)
    tied = {architecture.names[a]: architecture.names[b] for a, b in architecture.tied.items()}
    turned = {architecture.names.get(name, name) for name in gm.meta.get(TURNED, ())}
    found: dict[str, FloatTensor] = {}
    for name in architecture.names.values():
        if name not in state or name.removesuffix(".weight") in layers:
            continue
        other = tied.get(name)
        if not ties and other is not None and same.get(name, name) == same.get(other, other):
            continue
        found[name] = FloatTensor(gm, name, name in turned)
    return found


def held(layer: QuantizedLinear) -> dict[str, Tensor]:
    """The tensors of a layer as the QDQ form has them."""
    parts = {
        "weight": layer.codes,
        "weight_scale": layer.scales.scale,
        "weight_zero_point": layer.scales.zero_point,
        "weight_global_scale": layer.scales.global_scale,
    }
    if layer.input is not None and layer.input_scales is not None:
        scale, zero_point, _ = layer.input_scales
        kind = "input_global_scale" if isinstance(layer.input.format, Nvfp4) else "input_scale"
        parts[kind] = scale.reshape(())
        parts["input_zero_point"] = None if zero_point is None else zero_point.reshape(())
    return {f"{layer.name}.{suffix}": part for suffix, part in parts.items() if part is not None}


def lost(content: Content) -> Iterator[str]:
    """A line for what no checkpoint of this architecture holds: arithmetic that its modules do not have, parameters
    without a place in it, tensors of it that there are not.
    """
    for op, reason in beyond(content.graph):
        yield f"{where(op)}: {reason}"
    names = content.architecture.names
    for name, tensor in content.graph.named_parameters():
        if name not in names.values():
            yield f"{name}: the architecture has no such parameter {list(tensor.shape)}; it would be lost"
    tied = {names[name] for name in content.architecture.tied}
    for name in names.values():
        if name not in tied and name not in content.floats and name.removesuffix(".weight") not in content.layers:
            yield f"{name}: the architecture has this tensor, and the compiled graph has not"
