"""``generate`` for a captured causal language model: a thin transformers model around the graph."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import torch
from torch import Tensor, fx
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from graphq.capture.source import Source
from graphq.data.batches import complete
from graphq.errors import GraphqError, SpecError
from graphq.runtime.cache_layers import pairs_of
from graphq.runtime.calls import cached
from graphq.runtime.key_value_cache import StaticCache, hold, refusal
from graphq.runtime.stepping import StateCache, read_text

Run = Callable[..., tuple[Tensor, ...]]

_LONGEST: Final = 20  # transformers' default


class _Generator(PreTrainedModel, GenerationMixin):
    main_input_name = "input_ids"
    _is_stateful = False
    graph: fx.GraphModule
    captured: Source
    run: Run

    def __init__(self, config: Any, graph: fx.GraphModule, run: Run, source: Source) -> None:
        super().__init__(config)
        # No submodule: transformers must not touch its tensors.
        self.__dict__ |= {"graph": graph, "run": run, "captured": source}

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
        if self.captured.has_states:
            return self._with_states(given, past_key_values, use_cache)
        past = past_key_values if past_key_values is not None else DynamicCache()
        refused = refusal(past)
        if refused is not None:
            raise GraphqError(
                f"generate: {refused} cannot hold this graph's keys and values, which grow with the text;"
                " leave cache_implementation and past_key_values out"
            )
        given |= cached(past)
        batch = complete(self.captured, {k: v for k, v in given.items() if v is not None})
        made = self.run(batch, append=past.append) if isinstance(past, StaticCache) else self.run(batch)
        outputs: dict[str, Tensor] = dict(zip(self.captured.outputs, made, strict=True))
        # Without a cache generate gives all tokens again each time, which a cache handed back would double.
        if use_cache is not False:
            hold(past, pairs_of(outputs))
        return CausalLMOutputWithPast(
            logits=cast(Any, outputs["logits"]), past_key_values=None if use_cache is False else past
        )

    def _with_states(
        self, given: dict[str, Tensor | None], past: Any, use_cache: bool | None
    ) -> CausalLMOutputWithPast:
        state = past if isinstance(past, StateCache) else StateCache()
        if past is not state and past is not None and past.get_seq_length():
            raise GraphqError(f"generate: a {type(past).__name__} of another model; leave past_key_values out")
        named = {k: v for k, v in given.items() if v is not None} | state.tensors
        outputs = read_text(self.captured, self.run, named)
        if use_cache is not False:
            ids = given["input_ids"]
            assert ids is not None, "generate gives tokens"
            state.hold(self.captured, outputs, ids.shape[1])
        return CausalLMOutputWithPast(
            logits=cast(Any, outputs["logits"]), past_key_values=None if use_cache is False else state
        )


def static_cache(kind: str, config: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> StaticCache:
    """Room for the longest text that ``generate`` may give, called so. Raises ``SpecError`` for another ``kind``."""
    if kind != "static":
        raise SpecError(f"generate: cache is {kind!r}; it can be 'dynamic' or 'static'")
    config = kwargs.get("generation_config") or config
    prompt = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
    start = prompt.shape[-1] if isinstance(prompt, Tensor) else 1  # without a prompt, one token begins the text
    new, longest = kwargs.get("max_new_tokens"), kwargs.get("max_length")
    if new is None and longest is not None:
        return StaticCache(max(longest, start))
    # Without either, transformers takes the configuration's; its default length is one of new tokens.
    return StaticCache(start + (new or config.max_new_tokens or config.max_length or _LONGEST))


def generator(graph: fx.GraphModule, run: Run, source: Source, config: Any) -> PreTrainedModel:
    """A transformers model whose forward is ``run``, that of ``graph``, with the source's configuration."""
    made = _Generator(config, graph, run, source)
    if source.generation_config is not None:
        made.generation_config = GenerationConfig.from_dict(json.loads(source.generation_config))
    return made.eval()
