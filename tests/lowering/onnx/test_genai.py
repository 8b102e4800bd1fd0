"""``genai_config.json``: the settings of a language model for onnxruntime-genai, and which models have none."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from expecttest import assert_expected_inline
from torch import fx

import graphq
from graphq.artifacts.inspect import inspect
from graphq.capture.hugging_face import capture_pretrained
from graphq.capture.source import KEY, CachePair, source_of
from graphq.errors import TargetError
from graphq.lowering.onnx import genai
from graphq.lowering.onnx.form import onnx_form
from graphq.lowering.onnx.shapes import fix_sizes
from tests.compiled import blocks_spec, compile_captured
from tests.models import captured, tiny


def changed(
    gm: fx.GraphModule, config: Mapping[str, Any] | None = None, generation: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The settings, where those of the source are so changed."""
    source = source_of(gm)
    assert source.config is not None
    gm.meta[KEY] = replace(
        source,
        config=json.dumps(json.loads(source.config) | dict(config or {})),
        generation_config=json.dumps(dict(generation or {})),
    )
    found = genai.genai_config(gm)
    assert found is not None
    return found


def names(described: Mapping[str, Any], side: str) -> set[str]:
    """The names of inputs or outputs that the settings stand for."""
    decoder = described["model"]["decoder"]
    given: dict[str, str] = decoder[side]
    layers = range(decoder["num_hidden_layers"])
    return {name.replace("%d", str(i)) for name in given.values() for i in (layers if "%d" in name else [0])}


# -- the file ----------------------------------------------------------------------------------------------------------


def test_a_llama(tmp_path: Path) -> None:
    compiled = compile_captured("llama", blocks_spec("int8/channel", "int8/token/dynamic"))
    compiled.emit("onnx", tmp_path / "a")
    assert compiled.report.notes == ()
    text = (tmp_path / "a" / "genai_config.json").read_text()
    assert_expected_inline(
        text,
        """\
{
 "model": {
  "eos_token_id": 2,
  "bos_token_id": 1,
  "pad_token_id": 2,
  "context_length": 128,
  "decoder": {
   "session_options": {
    "log_id": "onnxruntime-genai",
    "provider_options": []
   },
   "filename": "model.onnx",
   "head_size": 16,
   "hidden_size": 64,
   "inputs": {
    "input_ids": "input_ids",
    "attention_mask": "attention_mask",
    "position_ids": "position_ids",
    "past_key_names": "past_key_values.%d.key",
    "past_value_names": "past_key_values.%d.value"
   },
   "num_attention_heads": 4,
   "num_hidden_layers": 2,
   "num_key_value_heads": 2,
   "outputs": {
    "logits": "logits",
    "present_key_names": "present.%d.key",
    "present_value_names": "present.%d.value"
   }
  },
  "type": "llama",
  "vocab_size": 128
 },
 "search": {
  "diversity_penalty": 0.0,
  "do_sample": false,
  "early_stopping": true,
  "length_penalty": 1.0,
  "min_length": 0,
  "no_repeat_ngram_size": 0,
  "num_beams": 1,
  "num_return_sequences": 1,
  "repetition_penalty": 1.0,
  "temperature": 1.0,
  "top_k": 50,
  "top_p": 1.0,
  "max_length": 128,
  "past_present_share_buffer": false
 }
}
""",
    )
    session: Any = onnxruntime.InferenceSession(tmp_path / "a" / "model.onnx")
    described = json.loads(text)
    assert names(described, "inputs") == {i.name for i in session.get_inputs()}
    assert names(described, "outputs") == {o.name for o in session.get_outputs()}
    past = next(i for i in session.get_inputs() if i.name == "past_key_values.0.key")
    decoder = described["model"]["decoder"]
    assert past.shape == ["batch", decoder["num_key_value_heads"], "past_sequence", decoder["head_size"]]
    assert session.get_outputs()[0].shape[-1] == described["model"]["vocab_size"]
    # the manifest lists it, and verify reads it
    assert "genai_config.json" in {file.name for file in inspect(tmp_path / "a").files}
    assert graphq.verify(tmp_path / "a").differences == ()
    (tmp_path / "a" / "genai_config.json").write_text(text.replace("128", "129"))
    (found,) = graphq.verify(tmp_path / "a").differences
    assert found.startswith("genai_config.json: differs")


@pytest.mark.parametrize(
    ("family", "kind", "heads", "context", "positions"),
    [
        ("qwen3", "qwen3", 2, 128, True),
        ("gemma3", "gemma3_text", 2, 128, True),
        ("mixtral", "decoder", 2, 128, True),
        ("opt", "decoder", 4, 128, True),
        ("gpt2", "decoder", 4, 128, True),  # whose settings have other names
        ("bloom", "decoder", 4, genai.ENDLESS, False),
    ],
)
def test_families(family: str, kind: str, heads: int, context: int, positions: bool) -> None:
    gm = captured(family)
    described = genai.genai_config(gm)
    assert described is not None
    model, decoder = described["model"], described["model"]["decoder"]
    assert (model["type"], model["context_length"], described["search"]["max_length"]) == (kind, context, context)
    assert (decoder["num_key_value_heads"], decoder["num_attention_heads"], decoder["hidden_size"]) == (heads, 4, 64)
    assert (decoder["head_size"], decoder["num_hidden_layers"], model["vocab_size"]) == (16, 2, 128)
    assert "sliding_window" not in decoder
    assert ("position_ids" in decoder["inputs"]) == positions
    source = source_of(gm)
    assert names(described, "inputs") == {i.name for i in source.inputs}
    assert names(described, "outputs") == set(source.outputs)


def test_heads_of_a_width_of_their_own() -> None:
    gm = capture_pretrained(tiny("qwen3", head_dim=24, num_key_value_heads=1, num_hidden_layers=1))
    described = genai.genai_config(gm)
    assert described is not None
    decoder = described["model"]["decoder"]
    assert (decoder["head_size"], decoder["num_key_value_heads"], decoder["hidden_size"]) == (24, 1, 64)


def test_settings_of_a_language_model_in_another_model() -> None:
    text = {"model_type": "gemma3_text", "max_position_embeddings": 77, "eos_token_id": 9}
    model = changed(captured("llama"), {"model_type": "gemma3", "text_config": text})["model"]
    assert (model["type"], model["context_length"], model["eos_token_id"]) == ("gemma3_text", 77, 9)


# -- tokens and search -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 7}, {}, (5, 6, 7)),
        ({"pad_token_id": None}, {}, (1, 2, 2)),  # what generate fills up with
        ({"eos_token_id": [4, 5, 6]}, {}, (1, [4, 5, 6], 4)),
        ({"eos_token_id": [4]}, {}, (1, 4, 4)),
        ({"eos_token_id": 4}, {"eos_token_id": [5, 6], "bos_token_id": None, "pad_token_id": 0}, (1, [5, 6], 0)),
        ({"bos_token_id": [3]}, {}, (3, 2, 2)),
        ({"bos_token_id": None, "eos_token_id": None}, {}, (None, [], None)),
        # out of the vocabulary of 128, which onnxruntime-genai refuses
        ({"bos_token_id": -1, "eos_token_id": [127, 128], "pad_token_id": 128}, {}, (None, 127, 127)),
    ],
)
def test_tokens(config: dict[str, Any], generation: dict[str, Any], expected: tuple[Any, ...]) -> None:
    model = changed(captured("llama"), config, generation)["model"]
    assert tuple(model.get(f"{name}_token_id") for name in ("bos", "eos", "pad")) == expected
    assert None not in model.values()


def test_the_search_is_that_of_generate() -> None:
    given = {"do_sample": True, "top_k": 20, "top_p": 0.8, "temperature": 1}
    others = {"early_stopping": "never", "num_beams": None, "cache_implementation": "static", "max_length": 20}
    search = changed(captured("llama"), generation=given | others)["search"]
    assert {name: search[name] for name in given} == given
    assert (search["early_stopping"], search["num_beams"]) == (True, 1)
    assert "cache_implementation" not in search
    assert (search["max_length"], search["past_present_share_buffer"]) == (128, False)
    assert changed(captured("llama"), generation={"do_sample": 1, "top_k": True})["search"]["top_k"] == 50
    assert changed(captured("llama"), generation={"do_sample": 1})["search"]["do_sample"] is False


# -- models without ----------------------------------------------------------------------------------------------------


def test_what_is_no_language_model_with_a_cache_has_none(tmp_path: Path) -> None:
    assert genai.genai_config(captured("bert")) is None
    assert genai.genai_config(onnx_form(captured("llama"), cache=False)) is None
    gm = captured("llama")
    gm.meta[KEY] = replace(source_of(gm), config=None)
    assert genai.genai_config(gm) is None
    assert genai.write(tmp_path, gm) == ()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_served_has_a_note(tmp_path: Path) -> None:
    """Keys and values of unlike widths; other inputs; a fixed sequence; names that do not count."""
    (note,) = genai.write(tmp_path, captured("deepseek"))
    reason = "onnxruntime-genai allocates all caches alike, and the model has "
    shapes = "[batch, 1, past_sequence, 16] and [batch, 1, past_sequence, 8]"
    assert note == f"onnx: no genai_config.json: {reason}{shapes}"
    assert list(tmp_path.iterdir()) == []

    gm = captured("llama")
    source = source_of(gm)
    gm.meta[KEY] = replace(source, inputs=(*source.inputs, replace(source.inputs[0], name="token_type_ids")))
    with pytest.raises(TargetError) as caught:
        genai.genai_config(gm)
    assert_expected_inline(
        str(caught.value), """the model takes token_type_ids, which onnxruntime-genai does not give"""
    )

    for name, size in (("sequence", 1), ("past_sequence", 7)):
        gm = onnx_form(captured("llama"))
        fix_sizes(gm, {name: size})
        with pytest.raises(TargetError) as caught:
            genai.genai_config(gm)
        assert str(caught.value) == f"onnxruntime-genai feeds a prompt, then single tokens; {name} is fixed"

    gm = captured("llama")
    shape = ("batch", "past_sequence", 2, 16)  # rows of tokens first
    inputs = tuple(replace(i, shape=shape) if i.is_cache else i for i in source.inputs)
    gm.meta[KEY] = replace(source, inputs=inputs)
    with pytest.raises(TargetError) as caught:
        genai.genai_config(gm)
    assert_expected_inline(
        str(caught.value),
        """onnxruntime-genai allocates caches [batch, heads, past_sequence, width], not [batch, past_sequence, 2, 16]""",
    )

    gm = captured("llama")
    gm.meta[KEY] = replace(source, caches=tuple(CachePair(c.past, f"new.{i}") for i, c in enumerate(source.caches)))
    with pytest.raises(TargetError) as caught:
        genai.genai_config(gm)
    assert_expected_inline(str(caught.value), """new.0 and the like are not names that count the layers""")


def test_a_fixed_batch_is_served() -> None:
    gm = onnx_form(captured("llama"))
    fix_sizes(gm, {"batch": 1})
    assert genai.genai_config(gm) == genai.genai_config(captured("llama"))
