"""What the source's class in transformers says of a checkpoint: the names of its tensors, and which modules are linear.

The model is built from its configuration, on the meta device. Names in files are those of ``save_pretrained``, which
may differ from those of the module's own state: experts that are a stack in memory are stored one by one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, fx, nn

from graphq.artifacts.manifest import settings
from graphq.capture.source import source_of
from graphq.errors import TargetError
from graphq.ir.layers import LAYER
from graphq.lowering.experts import expert_linears

_ROLES = {"gate_up_proj": ("gate_proj", "up_proj")}  # of a stack whose rows are those of two, one after the other


@final
@dataclass(frozen=True)
class Architecture:
    """names: of each tensor of an ``unstacked`` graph that a checkpoint has, the name there, in the module's order.

    linears: the modules that are linears, by their names in a checkpoint. tied: tensors that are another one, by that
    one, if the configuration ties them; both are names in the graph. config: the settings, as ``config.json`` has them.
    """

    names: Mapping[str, str]
    linears: tuple[str, ...]
    tied: Mapping[str, str]
    config: Mapping[str, Any]


def architecture_of(form: fx.GraphModule, target: str) -> Architecture:
    """The architecture of the model that ``form`` was captured from.

    Raises ``TargetError`` where it is none of transformers, or stores its tensors in a way that is not followed.
    """
    source = source_of(form)
    if source.config is None:
        raise TargetError(f"{target}: the model is none of transformers; a checkpoint is loaded by its class there")
    config = settings(source.config)
    model = _on_meta(config, target)
    parents = _stacks(form)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in _unsaved(model)}
    tied = {str(k): str(v) for k, v in cast(dict[str, str], getattr(model, "all_tied_weights_keys", {})).items()}
    names = _names(model, state, parents, target)
    modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linears = [names[f"{name}.weight"].removesuffix(".weight") for name in modules if f"{name}.weight" in names]
    experts = [
        name.removesuffix(".weight")
        for own, name in names.items()
        if own.rpartition(".")[0].rpartition(".")[0].rpartition(".")[0] in parents
    ]
    return Architecture(names, tuple(dict.fromkeys((*linears, *experts))), tied, config)


def _on_meta(config: Mapping[str, Any], target: str) -> Any:
    import transformers

    (name, *_) = config.get("architectures") or [""]
    found = getattr(transformers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise TargetError(f"{target}: architectures: {name}: no model of transformers {transformers.__version__}")
    made = cast(Any, found).config_class.from_dict(dict(config))
    with torch.device("meta"):
        return found(made)


def _unsaved(model: Any) -> frozenset[str]:
    return frozenset(cast(set[str], getattr(model, "_keys_to_ignore_on_save", None) or set()))


def _stacks(form: fx.GraphModule) -> dict[str, int]:
    """How many experts each stack of layers has, by the path that holds it; one that is no layer is stored as it is."""
    found: dict[str, int] = {}
    for node in form.graph.nodes:
        if node.target is expert_linears and LAYER in node.meta:
            path = str(node.meta[LAYER]).rpartition(".")[0]
            found[path] = len(node.args[1])
    return found


def _names(model: Any, state: Mapping[str, Tensor], stacks: Mapping[str, int], target: str) -> dict[str, str]:
    """The names in a checkpoint of the graph's tensors.

    transformers' own conversion is applied to tensors that say which they are: of a stack one number for each expert
    and role, of others one.
    """
    from transformers.core_model_loading import revert_weight_conversion

    graph_names: list[str] = []
    marked: dict[str, Tensor] = {}
    for name, tensor in state.items():
        parent, _, role = name.rpartition(".")
        if parent in stacks and tensor.dim() == 3:
            own = [f"{parent}.{e}.{r}.weight" for e in range(stacks[parent]) for r in _ROLES.get(role, (role,))]
            shape = [stacks[parent], len(own) // stacks[parent], 1]
        else:
            own, shape = [name], [1] * tensor.dim()
        marked[name] = torch.arange(len(graph_names), len(graph_names) + len(own)).view(shape)
        graph_names += own
    try:
        stored = revert_weight_conversion(model, marked)
    except (RuntimeError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise TargetError(f"{target}: {type(model).__name__} stores its tensors in a way that is not known") from error
    found = {graph_names[int(mark)]: name for name, mark in stored.items() if mark.numel() == 1}
    lost = [name for name in graph_names if name not in found]
    if lost or len(found) != len(stored):
        raise TargetError(
            f"{target}: {type(model).__name__} stores {', '.join(lost[:3]) or 'tensors'} in a way that is not known"
        )
    return {name: found[name] for name in graph_names}
