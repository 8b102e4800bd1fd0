"""``genai_config.json``, by which onnxruntime-genai serves an ONNX language model.

Source: https://onnxruntime.ai/docs/genai/reference/config.html, and what onnxruntime-genai 0.18 reads and refuses. It
allocates the caches from this file, all of one shape, so sizes are those of the graph's own inputs and outputs; tokens
and the search follow transformers' settings of the source. Keys and values of all positions are cached, also where the
model slides a window, which its own mask does: the file has no ``sliding_window``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, fx

from graphq.capture.source import PAST, SEQUENCE, Source, source_of
from graphq.errors import TargetError
from graphq.lowering.onnx.tensors import NAME as MODEL

NAME: Final = "genai_config.json"
ENDLESS: Final = 1 << 17  # the context of a model that has no longest one, such as those with linear biases (ALiBi)
# Types that run the decoder as it is described; "decoder" does for all others. gpt2 joins keys and values, lfm2 wants
# states of convolutions, and a type that is not known is refused.
_TYPES: Final = frozenset(
    {
        *("chatglm", "ernie4_5", "gemma", "gemma2", "gemma3_text", "granite", "internlm2", "llama", "mistral"),
        *("nemotron", "olmo", "phi", "phi3", "phimoe", "qwen2", "qwen3", "smollm3"),
    }
)
_TOKENS: Final = ("input_ids", "attention_mask", "position_ids")
_CONTEXT: Final = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
_FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)
_WIDTH: Final = ("hidden_size", "n_embd", "d_model", "hidden_dim")
_HEADS: Final = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_SEARCH: Final[Mapping[str, bool | float]] = {  # transformers' own defaults, under the same names
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}


def write(directory: Path, gm: fx.GraphModule) -> tuple[str, ...]:
    """``genai_config.json`` for the model that was made of ``gm``, where there is one; a note where a causal language
    model with a cache has none.
    """
    try:
        described = genai_config(gm)
    except TargetError as error:
        return (f"onnx: no {NAME}: {error}",)
    if described is not None:
        (directory / NAME).write_text(json.dumps(described, indent=1, allow_nan=False) + "\n")
    return ()


def genai_config(gm: fx.GraphModule) -> dict[str, Any] | None:
    """The settings of a graph in ONNX's form; None for what is no causal language model of transformers with a cache.

    Raises ``TargetError`` for one whose inputs or caches onnxruntime-genai does not give.
    """
    source = source_of(gm)
    if not source.is_causal_lm or not source.caches or source.config is None:
        return None
    heads, width = _cache_shape(source)
    config: dict[str, Any] = json.loads(source.config)
    config = config.get("text_config") or config
    generation: dict[str, Any] = json.loads(source.generation_config) if source.generation_config else {}
    context = int(_first(config, _CONTEXT, ENDLESS))
    query_heads = _first(config, _HEADS, heads)
    words = _vocabulary(gm)
    kind = config.get("model_type")
    taken = [i.name for i in source.inputs if i.name in _TOKENS]
    return {
        "model": {
            **_tokens(config, generation, words),
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL,
                "head_size": width,
                "hidden_size": _first(config, _WIDTH, query_heads * width),
                "inputs": {name: name for name in taken} | _patterns([c.past for c in source.caches], "past"),
                "num_attention_heads": query_heads,
                "num_hidden_layers": len(source.caches) // 2,
                "num_key_value_heads": heads,
                "outputs": {"logits": "logits"} | _patterns([c.present for c in source.caches], "present"),
            },
            "type": kind if kind in _TYPES else "decoder",
            "vocab_size": words,
        },
        "search": _search(generation)
        # The graph joins past and present keys; one buffer for both is for kernels that write into it.
        | {"max_length": context, "past_present_share_buffer": False},
    }


def _cache_shape(source: Source) -> tuple[int, int]:
    """The heads and the width of each, of all keys and values."""
    inputs = {i.name: i for i in source.inputs}
    if others := sorted(inputs.keys() - source.pasts - {*_TOKENS}):
        raise TargetError(f"the model takes {', '.join(others)}, which onnxruntime-genai does not give")
    for name in (SEQUENCE, PAST):
        if name in source.fixed:
            raise TargetError(f"onnxruntime-genai feeds a prompt, then single tokens; {name} is fixed")
    if any(inputs[pair.past].dtype not in _FLOATS for pair in source.caches):
        raise TargetError("the caches hold codes, and onnxruntime-genai allocates them in the type of the logits")
    shapes = {inputs[pair.past].shape for pair in source.caches}
    if len(shapes) > 1:
        found = " and ".join(str(list(shape)).replace("'", "") for shape in sorted(shapes, key=str)[:2])
        raise TargetError(f"onnxruntime-genai allocates all caches alike, and the model has {found}")
    match shapes.pop():
        case (_, int(heads), past, int(width)) if past == PAST:
            return heads, width
        case shape:
            found = str(list(shape)).replace("'", "")
            raise TargetError(f"onnxruntime-genai allocates caches [batch, heads, past_sequence, width], not {found}")


def _patterns(names: Sequence[str], when: str) -> dict[str, str]:
    """The names of keys and of values, which alternate, with ``%d`` in place of the layer."""
    found: dict[str, str] = {}
    for part, kind in enumerate(("key", "value")):
        pattern = names[part].replace("0", "%d", 1)
        if [pattern.replace("%d", str(layer)) for layer in range(len(names) // 2)] != list(names[part::2]):
            raise TargetError(f"{names[part]} and the like are not names that count the layers")
        found[f"{when}_{kind}_names"] = pattern
    return found


def _vocabulary(gm: fx.GraphModule) -> int:
    """The width of the logits."""
    output = next(node for node in gm.graph.nodes if node.op == "output")
    logits = output.args[0][0].meta["val"]
    assert isinstance(logits, Tensor)
    return int(logits.shape[-1])


def _first(config: Mapping[str, Any], names: Sequence[str], default: int) -> int:
    """The first of these settings that is a number."""
    return next((config[name] for name in names if type(config.get(name)) is int), default)


def _tokens(config: Mapping[str, Any], generation: Mapping[str, Any], words: int) -> dict[str, Any]:
    """The tokens that start a text, end it and fill it up, as ``generate`` takes them: the settings of generation go
    before the model's, and a text is filled up with the first that ends one. None is one that the model cannot give,
    which would be refused.
    """

    def known(name: str) -> list[int]:
        found = config.get(name) if generation.get(name) is None else generation[name]
        return [one for one in (found if isinstance(found, list) else [found]) if type(one) is int and 0 <= one < words]

    bos, eos, pad = (known(f"{name}_token_id") for name in ("bos", "eos", "pad"))
    tokens: dict[str, Any] = {"eos_token_id": eos[0] if len(eos) == 1 else eos}  # [] ends no text
    first = {"bos_token_id": bos, "pad_token_id": pad or eos}
    return tokens | {name: ids[0] for name, ids in first.items() if ids}


def _search(generation: Mapping[str, Any]) -> dict[str, bool | float]:
    def given(name: str, default: bool | float) -> bool | float:
        found = generation.get(name)
        is_one = isinstance(found, bool) if isinstance(default, bool) else type(found) in (int, float)
        return found if is_one and found is not None else default

    return {name: given(name, default) for name, default in _SEARCH.items()}
