"""Models and layers that PEFT wraps, recognised by their classes and parts; peft itself is not imported.

A graph has no adapters: they are merged into the weights before. Source: github.com/huggingface/peft, ``PeftModel`` and
``BaseTunerLayer``.
"""

from pathlib import Path
from typing import Any, Final, cast

from torch import nn

from graphq.errors import GraphError

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
_MERGE: Final = "compile what merge_and_unload() returns"


def without_adapters(model: nn.Module) -> nn.Module:
    """The model itself, or the one in a ``PeftModel`` that adapts nothing any more.

    Raises ``GraphError`` naming the first layer that carries an adapter, merged or not, and for prompts that are
    learned.
    """
    adapted = [name for name, module in model.named_modules() if _is_adapted(module)]
    if adapted:
        count = f" (and {len(adapted) - 1} more layers)" if len(adapted) > 1 else ""
        raise GraphError(f"{adapted[0]}: carries a PEFT adapter{count}; {_MERGE}")
    while _is_of_peft(model):
        if next(cast(nn.Module, getattr(model, "prompt_encoder", nn.Module())).children(), None) is not None:
            raise GraphError(f"prompt_encoder: {type(model).__name__} puts learned prompts before its inputs")
        inner: Any = getattr(model, "base_model", None) or getattr(model, "model", None)
        if not isinstance(inner, nn.Module):
            raise GraphError(f"{type(model).__name__}: the model that it wraps is not found; {_MERGE}")
        model = inner
    return model


def _is_of_peft(module: nn.Module) -> bool:
    return any(c.__module__.startswith("peft.") for c in type(module).__mro__)


def _is_adapted(module: nn.Module) -> bool:
    """Whether it computes with a layer and with what was learned beside it."""
    parts = dict(module.named_children())
    return "base_layer" in parts and (_is_of_peft(module) or "lora_A" in parts)


def adapter_note(path: Path) -> tuple[str, ...]:
    """A line for the report where an adapter lies beside the weights in a model directory."""
    if not (path / CONFIG).is_file():
        return ()
    return (f"{CONFIG}: the adapter beside the weights is left out; merge it (merge_and_unload()) and save the result",)


def refuse_adapter_alone(path: Path) -> None:
    """Raises ``GraphError`` for a directory that holds an adapter and no model."""
    if (path / CONFIG).is_file():
        raise GraphError(
            f"{path}: an adapter ({CONFIG}) without its model; load both, merge_and_unload(), and save the result"
        )
