"""Causal language models of transformers with flat inputs and outputs, their caches among them."""

import contextlib
import inspect
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphq.capture.caches import Caches, cache_argument
from graphq.capture.export import FlatModel
from graphq.capture.source import BATCH, SEQUENCE, TOTAL, TensorInput

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextlib.contextmanager
def experts_as(implementation: str, model: "PreTrainedModel") -> Generator[None]:
    """Experts in one product: the loops of transformers' eager implementation depend on the routing."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(c, c._experts_implementation) for c in configs.values() if hasattr(c, "_experts_implementation")]
    for config, _ in before:
        config._experts_implementation = implementation
    try:
        yield
    finally:
        for config, own in before:
            config._experts_implementation = own


def arguments_of(model: "PreTrainedModel") -> set[str]:
    """The names that the model's ``forward`` takes."""
    return set(inspect.signature(model.forward).parameters)


def is_causal_lm(model: "PreTrainedModel") -> bool:
    """Whether the model predicts the next token and takes a key/value cache."""
    return (
        model.main_input_name == "input_ids"
        and not getattr(model.config, "is_encoder_decoder", False)
        and model.get_output_embeddings() is not None
        and cache_argument(model) is not None
        and (model.can_generate() or "CausalLM" in type(model).__name__)
    )


def causal_lm(model: "PreTrainedModel", caches: Caches | None, by_step: bool) -> tuple[FlatModel, list[TensorInput]]:
    """The model with flat inputs. ``by_step``: it reads one token; where that is padding, states stay as they are."""
    held = [] if caches is None else caches.inputs
    total = TOTAL if any(i.is_cache for i in held) else SEQUENCE
    inputs = [
        TensorInput("input_ids", torch.int64, (BATCH, SEQUENCE)),
        TensorInput("attention_mask", torch.int64, (BATCH, total)),
    ]
    arguments = arguments_of(model)
    inputs = [i for i in inputs if i.name in arguments]
    if "position_ids" in arguments:
        inputs.append(TensorInput("position_ids", torch.int64, (BATCH, SEQUENCE)))
    inputs += held

    def call(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        past = {i.name: tensors.pop(i.name) for i in held}
        if caches is None:
            return {"logits": module(**tensors, use_cache=False, return_dict=True).logits}
        mask = tensors.get("attention_mask")
        if mask is not None and caches.has_states:
            # Recurrent layers take the mask's last columns and ask whether these are contiguous, which with nothing in
            # the cache they would be: in memory one column wider they never are, and nothing depends on it.
            tensors["attention_mask"] = F.pad(mask, (0, 1))[:, :-1]
        state = caches.filled(past)
        result = module(**tensors, **{caches.argument: state}, use_cache=True, return_dict=True)
        kept = mask[:, -1] != 0 if by_step and caches.has_states and mask is not None else None
        return {"logits": result.logits} | caches.outputs(getattr(result, caches.argument, state), past, kept)

    return FlatModel(model, [i.name for i in inputs], call), inputs


def run_of(model: "PreTrainedModel") -> Callable[..., Any]:
    """A call of the model that needs no kernel which fake tensors lack."""

    def run(**given: Any) -> Any:
        with torch.no_grad(), experts_as("batched_mm", model):  # grouped_mm has no fake kernel for float32
            return model(**given, return_dict=True)

    return run
