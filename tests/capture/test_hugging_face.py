"""Capture of transformers models: names, caches, padding, numbers of every family, and the same graph without weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from graphq import compiler
from graphq.capture.hugging_face import capture_config, capture_pretrained, is_pretrained, read_config
from graphq.capture.source import source_of
from graphq.data.batches import complete
from graphq.errors import GraphError
from graphq.ir.text import dump
from graphq.runtime import ops
from graphq.state import tensor_of
from tests import models
from tests.models import DECODERS, FAMILIES, MLP, random_inputs, tiny, tiny_config

ENCODERS = tuple(family for family in FAMILIES if family not in DECODERS)
TIED = {"gemma3": "model.embed_tokens", "opt": "model.decoder.embed_tokens", "gpt2": "transformer.wte"}
HEADS = {  # of the cache; deepseek keeps one latent vector for all
    "llama": 2,
    "qwen3": 2,
    "gemma3": 2,
    "mixtral": 2,
    "deepseek": 1,
    "opt": 4,
    "gpt2": 4,
}
aten = torch.ops.aten


def graph(family: str) -> fx.GraphModule:
    """The graph of ``tiny(family)``, which is not to be changed."""
    return models._captured(family)


def tokens(batch: int, sequence: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 100, (batch, sequence), generator=torch.Generator().manual_seed(seed))


def call(gm: fx.GraphModule, batch: Any) -> dict[str, Tensor]:
    """The graph's outputs by name, for a batch that is completed."""
    source = source_of(gm)
    with torch.no_grad():
        return dict(zip(source.outputs, gm(*complete(source, batch)), strict=True))


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_a_causal_language_model_takes_and_gives_flat_caches(family: str) -> None:
    source = source_of(graph(family))
    past = [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]
    present = [f"present.{i}.{part}" for i in range(2) for part in ("key", "value")]
    assert [i.name for i in source.inputs] == ["input_ids", "attention_mask", "position_ids", *past]
    assert source.outputs == ("logits", *present)
    shapes = {i.name: i.shape for i in source.inputs}
    assert shapes["input_ids"] == shapes["position_ids"] == ("batch", "sequence")
    assert shapes["attention_mask"] == ("batch", "past_sequence + sequence")
    for name in past:
        assert shapes[name][:3] == ("batch", HEADS[family], "past_sequence")
    assert source.ranges == (("batch", 1, 1 << 20), ("past_sequence", 0, 1 << 20), ("sequence", 1, 1 << 20))
    assert source.is_causal_lm
    assert source.output_kind == "dict"
    assert len(source.blocks) == 1
    assert json.loads(source.config or "")["architectures"] == [type(tiny(family)).__name__]
    assert [node.name for node in graph(family).graph.nodes if node.op == "placeholder"] == [
        i.name.replace(".", "_") for i in source.inputs
    ]


def test_inputs_and_outputs_of_encoders() -> None:
    bert, vit, resnet = (source_of(graph(family)) for family in ("bert", "vit", "resnet"))
    assert [(i.name, i.shape) for i in bert.inputs] == [
        ("input_ids", ("batch", "sequence")),
        ("attention_mask", ("batch", "sequence")),
        ("token_type_ids", ("batch", "sequence")),
    ]
    assert bert.outputs == ("last_hidden_state", "pooler_output")
    assert bert.ranges == (("batch", 1, 1 << 20), ("sequence", 1, 128))  # it has 128 positions
    assert bert.blocks == ("encoder.layer",)
    for source in (vit, resnet):
        assert [(i.name, i.shape) for i in source.inputs] == [("pixel_values", ("batch", 3, 32, 32))]
        assert source.outputs == ("logits",)
        assert not source.is_causal_lm


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_have_the_names_of_the_state_dict(family: str) -> None:
    gm, model = graph(family), tiny(family)
    named = dict(model.named_parameters(remove_duplicate=False))
    read = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    floats = {name for name in read if name in named}
    assert {id(named[name]) for name in floats} == {id(p) for p in model.parameters()}  # none is missing
    for name in floats:
        assert torch.equal(tensor_of(gm, name), named[name])
    buffers = {name for name, _ in model.named_buffers()}
    assert all(name in buffers or name.startswith(("constants.", "lifted_")) for name in read - floats), read - floats


@pytest.mark.parametrize("family", TIED)
def test_a_tied_head_reads_its_own_name(family: str) -> None:
    gm = graph(family)
    readers = {str(node.target): next(iter(node.users)).target for node in gm.graph.nodes if node.op == "get_attr"}
    assert readers[f"{TIED[family]}.weight"] is aten.embedding.default
    assert readers["lm_head.weight"] is aten.linear.default


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_graph_does_not_hold(family: str) -> None:
    gm = graph(family)
    assert not [node for node in gm.graph.nodes if node.op in ("call_module", "call_method")]
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        assert "assert" not in str(node.target)
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable, node.target
        if node.target is aten.cat.default:  # the empty start of a cache
            assert all(part.op != "get_attr" and part.meta["val"].dim() > 1 for part in node.args[0]), (
                node.format_node()
            )


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_logits_equal_those_of_the_model(family: str) -> None:
    gm, model = graph(family), tiny(family)
    for batch, sequence in ((1, 1), (1, 7), (3, 1), (2, 17)):  # gemma3's window: 4
        ids = tokens(batch, sequence)
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        assert torch.equal(call(gm, ids)["logits"], expected), (batch, sequence)  # the same ops on the same numbers


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_equal_the_model(family: str) -> None:
    gm, model = graph(family), tiny(family)
    for batch, sequence in ((1, 1), (1, 7), (4, 2)):
        inputs = dict(zip((i.name for i in source_of(gm).inputs), random_inputs(gm, batch, sequence), strict=True))
        if family == "bert":
            inputs["attention_mask"][0, 2:] = 0
            inputs["token_type_ids"][:, 1:] = 1
        with torch.no_grad():
            expected = model(**inputs)
        for name, output in call(gm, inputs).items():
            assert torch.equal(output, expected[name]), (name, batch, sequence)


@pytest.mark.parametrize("family", DECODERS)
def test_steps_with_a_cache_equal_one_long_forward(family: str) -> None:
    gm, ids = graph(family), tokens(2, 12)
    with torch.no_grad():
        expected = tiny(family)(input_ids=ids).logits
    past: dict[str, Tensor] = {}
    logits: list[Tensor] = []
    done = 0
    for step in (5, 1, 1, 3, 2):
        given = {"input_ids": ids[:, done : done + step], "attention_mask": torch.ones(2, done + step).long(), **past}
        outputs = call(gm, given)
        logits.append(outputs.pop("logits"))
        past = {name.replace("present", "past_key_values"): value for name, value in outputs.items()}
        done += step
        assert {value.shape[2] for value in past.values()} == {done}  # full length, beyond gemma3's window, too
    # Products of other shapes accumulate in another order.
    assert (torch.cat(logits, 1) - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_window_of_gemma3_is_in_the_graph() -> None:
    """Without it the logits of the test above would be others."""
    ids = tokens(1, 12)
    with torch.no_grad():
        wide = tiny("gemma3", sliding_window=128)(input_ids=ids).logits
    difference = (call(graph("gemma3"), ids)["logits"] - wide).abs().amax(-1)[0]
    assert difference[:4].max() == 0
    assert difference[4:].min() > 1e-4


@pytest.mark.parametrize("family", DECODERS)
def test_left_padding(family: str) -> None:
    gm, model, ids = graph(family), tiny(family), tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        short = model(input_ids=ids[:1, 4:]).logits
    logits = call(gm, {"input_ids": ids, "attention_mask": mask})["logits"]
    assert torch.equal(logits[mask.bool()], padded[mask.bool()])
    assert (logits[0, 4:] - short[0]).abs().max() <= 1e-6 * short.abs().max()  # other shapes, another order of sums


def test_without_a_cache() -> None:
    model = tiny("llama")
    gm = capture_pretrained(model, cache=False)
    source = source_of(gm)
    assert [(i.name, i.shape) for i in source.inputs] == [
        (name, ("batch", "sequence")) for name in ("input_ids", "attention_mask", "position_ids")
    ]
    assert source.outputs == ("logits",)
    assert source.ranges == (("batch", 1, 1 << 20), ("sequence", 1, 128))  # nothing can follow: 128 positions
    for batch, sequence in ((1, 1), (2, 9)):
        ids = tokens(batch, sequence)
        with torch.no_grad():
            assert torch.equal(call(gm, ids)["logits"], model(input_ids=ids).logits)


# -- dtypes and experts ------------------------------------------------------------------------------------------------


def test_a_bfloat16_mixture_of_experts_keeps_its_dtype() -> None:
    model = tiny("mixtral", num_hidden_layers=1).to(torch.bfloat16)
    gm = capture_pretrained(model)
    source = source_of(gm)
    assert source.dtype == torch.bfloat16
    assert {i.dtype for i in source.inputs if i.is_cache} == {torch.bfloat16}
    targets = {str(node.target) for node in gm.graph.nodes}
    assert "aten._grouped_mm.default" in targets
    with torch.no_grad():
        expected = model(input_ids=tokens(2, 5)).logits
    assert call(gm, tokens(2, 5))["logits"].dtype == torch.bfloat16
    compiler.Pipeline(compiler.canonical_passes()).run(gm)
    products = [node for node in gm.graph.nodes if node.target is ops.grouped_linear]
    assert len(products) == 3  # gate, up, down
    assert "aten._grouped_mm.default" not in {str(node.target) for node in gm.graph.nodes}
    logits = call(gm, tokens(2, 5))["logits"]
    # bfloat16 has 8 bits: a few of its steps, 2^-8 of a number, where sums are rounded in another order.
    assert (logits - expected).abs().max() <= 2**-5 * expected.abs().max()


def test_the_float32_experts_are_one_product() -> None:
    for family, blocks in (("mixtral", 2), ("deepseek", 1)):
        products = [n for n in graph(family).graph.nodes if str(n.target) == "transformers.grouped_mm_fallback.default"]
        assert len(products) == 2 * blocks  # gate and up fused, down


# -- the caller's model ------------------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("mixtral", num_hidden_layers=1).train()
    model.model.layers[0].eval()
    model.config._experts_implementation = "eager"
    flags = {name: module.training for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = {name: id(value) for name, value in model.named_parameters()}
    config = model.config.to_json_string()
    capture_pretrained(model)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert model.config._experts_implementation == "eager"
    assert model.config.to_json_string() == config
    assert {name: id(value) for name, value in model.named_parameters()} == identities
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


# -- without weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_without_weights_gives_the_same_graph(family: str) -> None:
    cls, config = tiny_config(family)
    gm = capture_config(config, cls)
    assert dump(gm) == dump(graph(family))
    assert {type(p).__name__ for p in gm.parameters()} <= {"FakeTensor", "Parameter"}
    assert all(p.device.type == "cpu" and p.untyped_storage()._cdata for p in gm.parameters())
    ours, theirs = source_of(gm), source_of(graph(family))
    assert (ours.inputs, ours.outputs, ours.ranges, ours.blocks) == (
        theirs.inputs,
        theirs.outputs,
        theirs.ranges,
        theirs.blocks,
    )


# -- directories -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny("llama", num_hidden_layers=1).to(torch.bfloat16).save_pretrained(path)
    return path


def test_a_directory_is_captured_in_float32_and_its_dtype_recorded(directory: Path) -> None:
    gm = compiler.capture(directory)
    source = source_of(gm)
    assert {p.dtype for p in gm.parameters()} == {torch.float32}
    assert {i.dtype for i in source.inputs if i.is_cache} == {torch.float32}
    assert source.dtype == torch.bfloat16
    assert source.files == str(directory)
    with torch.no_grad():
        expected = type(tiny("llama")).from_pretrained(directory, dtype=torch.float32)(input_ids=tokens(2, 5)).logits
    assert torch.equal(call(gm, tokens(2, 5))["logits"], expected)
    fake = compiler.capture(str(directory), weights=False)
    assert dump(fake) == dump(gm)
    assert source_of(fake) == source


def test_the_dtype_of_a_directory_can_be_chosen(directory: Path) -> None:
    gm = compiler.capture(directory, dtype=torch.bfloat16)
    assert {p.dtype for p in gm.parameters()} == {torch.bfloat16}
    assert source_of(gm).dtype == torch.bfloat16


def test_the_dtype_of_a_module_can_be_chosen() -> None:
    model = tiny("llama", num_hidden_layers=1)
    gm = compiler.capture(model, dtype=torch.float64)
    assert {p.dtype for p in gm.parameters()} == {torch.float64}
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # a copy was changed


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_quantized_already_is_refused() -> None:
    model = tiny("llama", num_hidden_layers=1)
    model.config.quantization_config = {"quant_method": "awq", "bits": 4}
    with pytest.raises(GraphError) as caught:
        capture_pretrained(model)
    assert str(caught.value) == (
        "quantization_config: this model is quantized already (awq); its codes are read from files alone: give the path"
        " of its directory instead of the module"
    )


def test_where_a_float_directory_is_needed_those_who_read_others_are_named(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(GraphError) as caught:
        read_config(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / 'config.json'}: quantization_config: this model is quantized already (compressed-tensors); graphq"
        " compile, convert, inspect and verify --against read quantized directories; here a float model is needed, or an"
        " artifact that is compiled from this one"
    )


def test_an_encoder_decoder_needs_inputs() -> None:
    import transformers

    config = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32)
    with pytest.raises(GraphError) as caught:
        capture_pretrained(transformers.T5ForConditionalGeneration(config))
    assert str(caught.value) == (
        "T5ForConditionalGeneration is an encoder-decoder: pass example inputs of its forward (inputs=..., or --inputs"
        " with a safetensors file)"
    )


def test_other_modules_need_inputs() -> None:
    assert is_pretrained(tiny("resnet"))
    assert not is_pretrained(MLP())
    with pytest.raises(GraphError) as caught:
        compiler.capture(MLP())
    assert str(caught.value) == "inputs: MLP is not a transformers model; pass example inputs of its forward"
    with pytest.raises(GraphError) as caught:
        compiler.capture(3)  # type: ignore[arg-type]
    assert str(caught.value) == "model: a int is neither a module nor the path of a model directory"


def test_a_transformers_model_with_inputs_is_any_module() -> None:
    gm = compiler.capture(tiny("vit"), inputs={"pixel_values": torch.randn(2, 3, 32, 32)})
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(gm(x)[0], tiny("vit")(pixel_values=x).logits)
    assert source_of(gm).outputs == ("logits",)
