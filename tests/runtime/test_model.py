"""A compiled model is called like its source: the same inputs by position and name, the same structure of outputs."""

import copy
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline

import graphq
from graphq.capture.hugging_face import capture_directory
from graphq.capture.modules import capture_module
from graphq.capture.source import source_of
from graphq.errors import GraphqError, SpecError
from graphq.runtime.calls import ModelOutput
from graphq.runtime.configuration import configuration
from graphq.runtime.model import CompiledModel
from tests import models
from tests.checkpoints import save_checkpoint
from tests.models import MLP, Tied, tiny, tiny_config


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Structured(nn.Module):
    """One linear and an output of the wanted structure."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.kind = kind

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        y = self.up(x) * mask
        return {"tensor": y, "tuple": (y, y.sum(-1)), "dict": {"y": y, "total": y.sum(-1)}}[self.kind]


@pytest.fixture(scope="module", params=["tensor", "tuple", "dict"])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, CompiledModel]:
    """A source and its graph, in which nothing is quantized."""
    torch.manual_seed(0)
    source = Structured(request.param)
    return source, CompiledModel(capture_module(source, (floats(2, 8), floats(2, 8))))


def test_it_returns_what_the_source_returned(pair: tuple[nn.Module, CompiledModel]) -> None:
    source, model = pair
    x, mask = floats(5, 8), floats(5, 8, seed=1)
    with torch.no_grad():
        expected = source(x, mask)
        for found in (model(x, mask), model(x, mask=mask), model(mask=mask, x=x)):
            assert type(found) is type(expected)
            if isinstance(expected, dict):
                assert list(found) == list(expected)
                found, wanted = list(found.values()), list(expected.values())
            else:
                found, wanted = (found, expected) if isinstance(expected, tuple) else ((found,), (expected,))
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((floats(2, 8),) * 3, {}, TypeError, "forward() takes 2 inputs, 3 were given: x, mask"),
        (
            (floats(2, 8),),
            {"masks": floats(2, 8)},
            TypeError,
            "forward() was captured without the argument masks; it takes x, mask",
        ),
        (
            (floats(2, 8), floats(2, 8)),
            {"mask": floats(2, 8)},
            TypeError,
            "forward() got mask twice, by position and by name",
        ),
        ((), {}, SpecError, "inputs: none given; the model takes x, mask"),
        ((floats(2, 8),), {}, SpecError, "inputs: mask is missing; the model takes x, mask"),
        ((floats(2, 7), floats(2, 8)), {}, SpecError, "inputs: x has shape (2, 7), expected (batch = 2, 8)"),
        ((floats(2, 8), floats(3, 8)), {}, SpecError, "inputs: mask has shape (3, 8), expected (batch = 2, 8)"),
        (
            (torch.ones(2, 8).long(), floats(2, 8)),
            {},
            SpecError,
            "inputs: x is torch.int64, the model takes torch.float32",
        ),
    ],
)
def test_wrong_calls(
    pair: tuple[nn.Module, CompiledModel],
    args: tuple[Tensor, ...],
    kwargs: dict[str, Tensor],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error) as caught:
        pair[1](*args, **kwargs)
    assert str(caught.value).startswith(message)


def test_masks_positions_and_caches_may_be_left_out() -> None:
    model = CompiledModel(models._captured("llama"))
    ids = torch.arange(10).reshape(2, 5)
    with torch.no_grad():
        expected = tiny("llama")(input_ids=ids).logits
        whole = model(input_ids=ids)
        assert torch.equal(model(ids)["logits"], expected)
        assert list(whole) == ["logits", *(f"present.{i}.{part}" for i in (0, 1) for part in ("key", "value"))]
        first = model(ids[:, :3])
        past = {k.replace("present", "past_key_values"): v for k, v in first.items() if k != "logits"}
        second = model(ids[:, 3:], **past)  # the mask covers the past, positions go on
        assert second["present.0.key"].shape[2] == 5
        assert (
            second["logits"] - expected[:, 3:]
        ).abs().max() <= 1e-6 * expected.abs().max()  # other shapes, other sums
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
        assert not torch.equal(model(ids, attention_mask=mask)["logits"], expected)


def test_its_tensors_have_the_names_of_the_source() -> None:
    compiled = graphq.compile(MLP(), {"graphq": 1, "weight": "int8/channel"}, inputs=floats(2, 8)).module
    assert set(compiled.state_dict()) == {
        f"{layer}.{name}" for layer in ("up", "down") for name in ("weight", "weight_scale", "bias")
    }
    assert compiled.source == source_of(compiled.graph)
    assert not compiled.training


def test_copies_are_independent() -> None:
    compiled = graphq.compile(MLP(), {"graphq": 1, "weight": "int8/channel"}, inputs=floats(2, 8)).module
    x = floats(3, 8)
    before = compiled(x)
    copied = copy.deepcopy(compiled)
    assert torch.equal(copied(x), before)
    with torch.no_grad():
        for tensor in copied.state_dict().values():
            tensor.zero_()
    assert copied(x).abs().max() == 0
    assert torch.equal(compiled(x), before)


def test_a_state_dict_is_loaded() -> None:
    spec = {"graphq": 1, "weight": "int4/asym/g4"}
    torch.manual_seed(1)
    first, second = (graphq.compile(MLP(), spec, inputs=floats(2, 8)).module for _ in range(2))
    x = floats(3, 8)
    assert not torch.equal(first(x), second(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_only_causal_language_models_generate() -> None:
    compiled = graphq.compile(Tied(), {"graphq": 1, "weight": "int8/channel"}, inputs=torch.ones(2, 3).long())
    with pytest.raises(GraphqError) as caught:
        compiled.generate(torch.ones(1, 3).long())
    assert str(caught.value) == (
        "generate: this model is not a causal language model captured with its key/value cache"
    )


# -- as transformers' models are called --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> CompiledModel:
    return CompiledModel(models._captured("llama"))


IDS = torch.arange(10).reshape(2, 5)


def test_the_outputs_have_names_places_and_attributes(llama: CompiledModel) -> None:
    out: Any = llama(IDS)
    assert isinstance(out, ModelOutput)
    assert out.logits is out["logits"] is out[0]
    with pytest.raises(AttributeError) as caught:
        _ = out.pooler_output
    assert str(caught.value).startswith("the model returned no pooler_output; it returned logits, present.0.key, ")
    with pytest.raises(KeyError, match="hidden_states"):
        _ = out["hidden_states"]
    assert llama(IDS, return_dict=False)[0].equal(out.logits)


def test_the_cache_goes_back_into_the_model_and_into_transformers(llama: CompiledModel) -> None:
    expected: Any = llama(IDS)
    first: Any = llama(IDS[:, :3])
    assert isinstance(first.past_key_values, DynamicCache)
    assert first["past_key_values"].get_seq_length() == 3
    pairs = tuple((first[f"present.{i}.key"], first[f"present.{i}.value"]) for i in range(2))
    for past in (copy.deepcopy(first.past_key_values), pairs):
        second: Any = llama(IDS[:, 3:], past_key_values=past, use_cache=True)
        assert (second.logits - expected.logits[:, 3:]).abs().max() <= 1e-6 * expected.logits.abs().max()
    with torch.no_grad():
        theirs = tiny("llama")(input_ids=IDS[:, 3:], past_key_values=first.past_key_values, use_cache=True).logits
    assert (theirs - expected.logits[:, 3:]).abs().max() <= 1e-5 * expected.logits.abs().max()
    assert torch.equal(llama(IDS, past_key_values=DynamicCache()).logits, expected.logits)  # type: ignore[union-attr]


def test_without_a_cache(llama: CompiledModel) -> None:
    out: Any = llama(IDS, use_cache=False)
    assert list(out) == ["logits"]
    assert out.past_key_values is None
    with pytest.raises(KeyError):
        _ = out["past_key_values"]


def test_arguments_that_ask_for_nothing_are_left_out(llama: CompiledModel) -> None:
    nothing: dict[str, Any] = {"labels": None, "output_attentions": False, "logits_to_keep": 0, "attention_mask": None}
    assert torch.equal(llama(input_ids=IDS, **nothing)[0], llama(IDS)[0])
    with pytest.raises(TypeError, match="was captured without the argument output_attentions"):
        llama(IDS, output_attentions=True)


def test_what_is_known_of_it(llama: CompiledModel) -> None:
    config = tiny_config("llama")[1]
    assert type(llama.config) is type(config)
    assert llama.config.num_hidden_layers == 2
    assert llama.config is llama.config
    assert (llama.device, llama.dtype) == (torch.device("cpu"), torch.float32)
    assert llama.can_generate()
    llama.generation_config.max_new_tokens = 2
    try:
        assert llama.generate(IDS, pad_token_id=0).shape == (2, 7)
    finally:
        llama.generation_config.max_new_tokens = None


def test_what_is_known_of_a_plain_module() -> None:
    made = graphq.compile(MLP().bfloat16(), {"graphq": 1, "weight": "int4/g4"}, inputs=floats(2, 8).bfloat16())
    assert (made.dtype, made.device, made.can_generate()) == (torch.bfloat16, torch.device("cpu"), False)
    assert made.eval() is made.module
    assert not hasattr(made, "config")
    assert not hasattr(made, "nothing")
    with pytest.raises(GraphqError, match="not a causal language model"):
        _ = made.generation_config


def test_a_configuration_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = configuration('{"hidden_size": 4, "rope": {"theta": 2.0}, "id2label": {"0": "a"}}')
    assert (found.hidden_size, found.rope.theta, found.id2label) == (4, 2.0, {"0": "a"})
    monkeypatch.setitem(sys.modules, "graphq.runtime.key_value_cache", None)
    x = floats(1)
    assert ModelOutput({"present.0.key": x, "present.0.value": x}).past_key_values == ((x, x),)


def test_a_configuration_that_transformers_does_not_know() -> None:
    assert configuration('{"model_type": "mine", "hidden_size": 4}').hidden_size == 4


def test_a_pipeline_of_transformers(tmp_path: Path) -> None:
    """The text that a pipeline writes with the model and with its source: nothing is quantized."""
    tokenizer = AutoTokenizer.from_pretrained(save_checkpoint(tmp_path / "llama"))
    model = CompiledModel(capture_directory(tmp_path / "llama"))
    source = AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    texts: list[Any] = []
    for each in cast("list[Any]", [source, model]):
        write: Any = pipeline("text-generation", model=each, tokenizer=tokenizer)
        assert "'input_modalities': 'text'" in repr(write)
        texts.append(write(["w1 w2", "w3"], max_new_tokens=6, do_sample=False, pad_token_id=0))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("shape", "dimension"), [((2, 0), "sequence"), ((0, 3), "batch")])
def test_an_empty_batch_of_which_the_graph_makes_nothing(
    llama: CompiledModel, shape: tuple[int, int], dimension: str
) -> None:
    with pytest.raises(SpecError) as caught:
        llama(torch.ones(shape, dtype=torch.int64))
    assert str(caught.value) == f"inputs: input_ids has shape {shape}; {dimension} is at least 1 in this graph"
    with pytest.raises(IndexError):  # nothing is empty: the error of the ops
        llama(torch.full((1, 3), 10**6))
