"""``generate`` for a captured causal language model: a thin transformers model around the graph."""

import json
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from graphq.capture.source import Source
from graphq.data.batches import complete
from graphq.errors import GraphqError
from graphq.runtime.calls import ModelOutput, cached


class _Generator(PreTrainedModel, GenerationMixin):
    main_input_name = "input_ids"
    _is_stateful = False
    graph: fx.GraphModule
    captured: Source

    def __init__(self, config: Any, graph: fx.GraphModule, source: Source) -> None:
        super().__init__(config)
        self.__dict__ |= {"graph": graph, "captured": source}  # no submodule: transformers must not touch its tensors

    @property
    def device(self) -> torch.device:
        tensors = [*self.graph.buffers(), *self.graph.parameters()]
        return tensors[0].device if tensors else torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return self.captured.dtype

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **ignored: Any,
    ) -> CausalLMOutputWithPast:
        given: dict[str, Tensor | None] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if any(i.name == "position_ids" for i in self.captured.inputs):
            given["position_ids"] = position_ids
        past = past_key_values if past_key_values is not None else DynamicCache()
        _check_cache(past)
        given |= cached(past)
        batch = complete(self.captured, {k: v for k, v in given.items() if v is not None})
        outputs = ModelOutput(zip(self.captured.outputs, self.graph(*batch), strict=True))
        # Without a cache generate gives all tokens again each time, which a cache handed back would double.
        if use_cache is not False:
            past.layers = outputs.past_key_values.layers
        return CausalLMOutputWithPast(
            logits=cast(Any, outputs.logits), past_key_values=None if use_cache is False else past
        )


def _check_cache(cache: Any) -> None:
    """Raises ``GraphqError`` for a cache whose layers are no plain keys and values as long as what was read."""
    if type(cache) is not DynamicCache or cache.offloading:
        kind = "an offloaded DynamicCache" if type(cache) is DynamicCache else f"a {type(cache).__name__}"
        raise GraphqError(
            f"generate: {kind} cannot hold this graph's keys and values, which grow with the text;"
            " leave cache_implementation and past_key_values out"
        )


def dynamic_cache(pairs: Sequence[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache of full-length layers that hold these keys and values."""
    cache = DynamicCache()
    for keys, values in pairs:
        layer = DynamicLayer()
        layer.keys, layer.values = keys, values
        layer.dtype, layer.device, layer.is_initialized = keys.dtype, keys.device, True
        cache.layers.append(layer)
    return cache


def generator(graph: fx.GraphModule, source: Source, config: Any) -> PreTrainedModel:
    """A transformers model whose forward is ``graph``, with the source's configuration."""
    made = _Generator(config, graph, source)
    if source.generation_config is not None:
        made.generation_config = GenerationConfig.from_dict(json.loads(source.generation_config))
    return made.eval()
