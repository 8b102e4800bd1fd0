"""``cache=False`` leaves out the cache of whatever model gives one back, also where example inputs are given."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphq import compiler
from graphq.capture.source import source_of
from graphq.errors import GraphError
from tests.models import tiny

TOKENS = torch.arange(8).reshape(2, 4)
KINDS = {"llama": "DynamicCache", "wrapped": "DynamicCache", "t5": "", "mamba": "DynamicCache"}  # by the model


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny("llama", num_hidden_layers=1)

    def forward(self, input_ids: Tensor) -> Any:
        return self.model(input_ids)


def made(kind: str) -> tuple[Any, dict[str, Tensor]]:
    """A model that gives a cache back, and inputs of it."""
    import transformers

    torch.manual_seed(0)
    match kind:
        case "llama":
            model: Any = tiny("llama", num_hidden_layers=1)
        case "wrapped":
            model = Wrapped()
        case "mamba":
            config: Any = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4)
            model = transformers.MambaForCausalLM(config)
        case _:
            sizes: Any = {"d_model": 32, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 16, "vocab_size": 64}
            model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
            return model.eval(), {"input_ids": TOKENS, "decoder_input_ids": TOKENS.flip(0)}
    return model.eval(), {"input_ids": TOKENS}


@pytest.mark.parametrize("kind", KINDS)
def test_with_example_inputs(kind: str) -> None:
    model, inputs = made(kind)
    if kind == "t5":
        left_out = "T5ForConditionalGeneration: its key/value cache is left out"
        assert left_out in source_of(compiler.capture(model, inputs)).notes
    else:
        with pytest.raises(GraphError) as error:
            compiler.capture(model, inputs)
        name = "cache_params" if kind == "mamba" else "past_key_values"
        assert str(error.value) == (
            f"{type(model).__name__}: output {name} is a {KINDS[kind]}; outputs must be tensors, or tuples, lists, dicts"
            " and dataclasses of them; pass cache=False to leave the cache out"
        )
    gm = compiler.capture(model, inputs, cache=False)
    outputs = source_of(gm).outputs
    assert outputs == (("logits", "encoder_last_hidden_state") if kind == "t5" else ("logits",))
    with torch.no_grad():
        expected = model(**inputs)
        found = gm(*inputs.values())
    assert [i.name for i in source_of(gm).inputs] == list(inputs)
    for output, tensor in zip(outputs, found, strict=True):
        assert (tensor - expected[output]).abs().max() <= 1e-5 * expected[output].abs().max()  # other sums
    inner = model.model if kind == "wrapped" else model
    assert inner.config.use_cache  # as before


def test_the_configuration_is_restored_after_an_error() -> None:
    model, _ = made("llama")
    with pytest.raises(GraphError):
        compiler.capture(model, {"input_ids": torch.ones(2, 4)}, cache=False)
    assert model.config.use_cache


def test_a_use_cache_that_is_an_input_is_the_callers() -> None:
    class Switched(nn.Module):
        def forward(self, x: Tensor, use_cache: Tensor) -> Tensor:
            return x * use_cache

    gm = compiler.capture(Switched(), {"x": torch.ones(2, 4), "use_cache": torch.ones(2, 4)}, cache=False)
    assert [i.name for i in source_of(gm).inputs] == ["x", "use_cache"]


def test_explain_takes_it_too() -> None:
    model, inputs = made("wrapped")
    import graphq

    assert graphq.explain(model, "w8a16", inputs=inputs, cache=False).layers
