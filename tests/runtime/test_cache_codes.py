"""A compiled model with a cache of codes: generation, beams, memory, what comes back, and what is refused."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import graphq
from graphq import compiler
from graphq.capture.source import source_of
from graphq.data.batches import complete_all
from graphq.data.evaluate import calibration_windows, load_tokenizer, perplexity, standard_library_windows
from graphq.errors import SpecError
from graphq.frontends import load_spec
from graphq.ir.pipeline import Pipeline
from graphq.lowering.torch.pack import pack
from graphq.pipelines import canonical_passes, passes_for
from graphq.runtime.key_value_cache import CodesLayer
from graphq.runtime.model import CompiledModel
from graphq.verifier import verify
from tests.compiled import compile_captured
from tests.models import DECODERS, tiny

QUANTS = ("int8/asym/token/dynamic", "int8/channel", "float8_e4m3fn/tensor", "int4/g8/dynamic")
HOW: dict[str, dict[str, Any]] = {"greedy": {}, "beams": {"num_beams": 3, "num_return_sequences": 2}}


def tokens(batch: int, sequence: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 60, (batch, sequence), generator=torch.Generator().manual_seed(seed))


@functools.cache
def model_of(quant: str, family: str = "llama") -> CompiledModel:
    return compile_captured(family, {"graphq": 1, "weight": "int8/channel", "cache": quant}).module


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("quant", QUANTS)
def test_generates_the_same_tokens_whatever_holds_the_codes(quant: str, how: str) -> None:
    """With rows of other lengths; beams move scales with their codes."""
    ids = tokens(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = ids[0, :2] = 0
    options: dict[str, Any] = {"max_new_tokens": 7, "min_new_tokens": 7, "pad_token_id": 0, **HOW[how]}
    ways: list[dict[str, Any]] = [{"cache": "dynamic"}, {"cache": "static"}, {"use_cache": False}]
    found = [model_of(quant).generate(ids, attention_mask=mask, **options, **own) for own in ways]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])  # a prompt at once sees what tokens one by one see


@pytest.mark.parametrize("family", [f if f == "gemma3" else pytest.param(f, marks=pytest.mark.slow) for f in DECODERS])
def test_every_family(family: str) -> None:
    """Beyond gemma3's window of 4; deepseek's keys and values have other widths."""
    model, ids = model_of("int8/token/dynamic", family), tokens(2, 9)
    past: Any = {}
    step: Any = None
    with torch.no_grad():
        whole = model(ids)
        for part in ids.split(3, 1):
            step = model(part, **past)
            past = {"past_key_values": step.past_key_values}
    # Attention over other numbers of queries sums in another order; a wrong scale moves logits by 1e-2.
    assert (step.logits - whole.logits[:, -3:]).abs().max() <= 1e-5 * whole.logits.abs().max()
    codes = {name: x.dtype for name, x in whole.items() if name.endswith(("key", "value"))}
    assert set(codes.values()) == {torch.int8}
    assert len(codes) == 4


def test_a_cache_of_8_bits_takes_about_half_of_bfloat16() -> None:
    """For 64 channels, with scales of run time: 1 + 2/64 bytes for 2."""
    model = graphq.compile(
        tiny("llama", num_hidden_layers=1, head_dim=64),
        {"graphq": 1, "weight": "int8/channel", "cache": "int8/token/dynamic"},
    )
    (keys, values) = model.report.caches
    assert (keys.nbytes, keys.float_nbytes) == (2 * 64 + 2 * 2, 2 * 64 * 4)  # this source is float32
    with torch.no_grad():
        made: Any = model(tokens(3, 10))
    held = made.past_key_values.layers[0]
    found = sum(x.numel() * x.itemsize for x in (held.keys, held.values, *held.beside.values()))
    assert found == 3 * 10 * (keys.nbytes + values.nbytes)
    assert found <= 0.55 * 3 * 10 * 2 * (2 * 64 * 2)
    assert {x.dtype for x in held.beside.values()} == {torch.bfloat16}


def test_steps_write_where_the_codes_stay() -> None:
    model, ids = model_of("int8/asym/token/dynamic"), tokens(2, 6)
    with torch.no_grad():
        dynamic, static = model(ids[:, :3]), model(ids[:, :3], cache="static", max_length=6)
        cache = static.past_key_values
        places = [memory.data_ptr() for memory in cache._memory.values()]
        assert len(set(places)) == 2 * 2 * 3
        assert sorted({str(x.dtype) for x in cache._memory.values()}) == ["torch.bfloat16", "torch.int8"]
        for i in range(3, 6):
            dynamic = model(ids[:, i : i + 1], past_key_values=dynamic.past_key_values)
            static = model(ids[:, i : i + 1], past_key_values=cache)
            assert all(torch.equal(dynamic[name], static[name]) for name in dynamic)
        assert places == [memory.data_ptr() for memory in cache._memory.values()]


def test_what_is_done_to_rows_is_done_to_their_scales() -> None:
    model, ids = model_of("int8/asym/token/dynamic"), tokens(2, 6)
    with torch.no_grad():
        expected = [model(row) for row in ids.split(1)]
        for change, rows in (
            (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
            (lambda cache: cache.crop(-1), [0, 1]),
        ):
            cache = model(ids[:, :5]).past_key_values
            assert all(type(layer) is CodesLayer for layer in cache.layers)
            change(cache)
            start = cache.get_seq_length()
            found = model(ids[rows, start:], past_key_values=cache)
            for place, row in enumerate(rows):
                assert (found.logits[place, -1] - expected[row].logits[0, -1]).abs().max() <= 1e-5
        cache.reset()
        assert torch.equal(model(ids, past_key_values=cache).logits, model(ids).logits)


def test_pairs_with_what_is_beside_them_come_back() -> None:
    """As where transformers is not installed."""
    model, ids = model_of("int8/asym/token/dynamic"), tokens(1, 4)
    with torch.no_grad():
        first = model(ids[:, :3])
        layers = [(layer.keys, layer.values, layer.beside) for layer in first.past_key_values.layers]
        assert sorted(layers[0][2]) == ["key_scale", "key_zero_point", "value_scale", "value_zero_point"]
        found = model(ids[:, 3:], past_key_values=layers).logits
        assert torch.equal(found, model(ids[:, 3:], past_key_values=first.past_key_values).logits)


def test_a_cache_of_another_model_is_refused() -> None:
    """Of values for codes, of codes for values, and one that lacks scales."""
    ids = tokens(1, 3)
    plain = compile_captured("llama", {"graphq": 1, "weight": "int8/channel"}).module
    dynamic, static = model_of("int8/asym/token/dynamic"), model_of("int8/channel")
    with torch.no_grad():
        values, codes, beside = (model(ids).past_key_values for model in (plain, static, dynamic))
        with pytest.raises(SpecError, match=r"past_key_values\.0\.key is torch\.float32, the model takes torch\.int8"):
            static(ids, past_key_values=values)
        with pytest.raises(SpecError, match=r"past_key_values\.0\.key is torch\.int8, the model takes torch\.float32"):
            plain(ids, past_key_values=codes)
        with pytest.raises(SpecError, match=r"the cache lacks past_key_values\.0\.key_scale"):
            dynamic(ids, past_key_values=codes)
        with pytest.raises(TypeError, match=r"captured without the argument past_key_values\.0\.key_scale"):
            static(ids, past_key_values=beside)
    layer: Any = beside.layers[0]
    with pytest.raises(SpecError, match="it holds codes"):
        layer.update(layer.keys, layer.values)


@pytest.mark.parametrize("quant", QUANTS)
def test_an_artifact_has_the_same_cache(quant: str, tmp_path: Path) -> None:
    made = compile_captured("llama", {"graphq": 1, "weight": "int8/channel", "cache": quant})
    made.save(tmp_path / "a")
    loaded, ids = graphq.load(tmp_path / "a"), tokens(2, 5)
    assert source_of(loaded.graph).caches == source_of(made.graph).caches
    with torch.no_grad():
        found: list[Any] = [model(ids, past_key_values=DynamicCache()) for model in (made, loaded)]
    ours, theirs = found
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert loaded.dtype == torch.float32
    assert verify(tmp_path / "a").differences == ()


@pytest.mark.slow
def test_perplexity_token_by_token() -> None:
    """Each token is read behind the codes of all before it: a cache of 8 bits costs less than 0.5 % of perplexity, and it
    is one: 4 bits cost more.
    """
    folder = Path(__file__).parents[2] / "examples" / "models" / "stdlib-llama"
    tokenizer = load_tokenizer(folder)
    windows = standard_library_windows(tokenizer, count=32, length=64)
    batches = calibration_windows(tokenizer, count=16, length=128).split(4)
    gm = compiler.capture(folder)
    found: dict[str, float] = {}
    for cache in (
        "",
        "int8/token/dynamic",
        "int8/channel",
        "int8/tensor",
        "float8_e4m3fn/tensor",
        "int4/asym/token/dynamic",
    ):
        graph, keeps = copy.deepcopy(gm), {"graphq": 1, "rules": [{"match": "blocks", "float": True}]}
        if cache:
            passes = passes_for(load_spec({**keeps, "cache": cache}))[len(canonical_passes()) :]
            with torch.no_grad():
                Pipeline(passes).run(graph, list(complete_all(source_of(graph), batches)))
        found[cache] = perplexity(token_by_token(CompiledModel(pack(graph)).eval()), windows, 32)
    ratios = {cache: value / found[""] for cache, value in found.items()}
    assert all(abs(ratio - 1) < 0.005 for cache, ratio in ratios.items() if not cache.startswith("int4")), ratios
    assert 1.003 < ratios["int4/asym/token/dynamic"] < 1.02, ratios


def token_by_token(model: CompiledModel) -> Callable[[Tensor], Tensor]:
    """The logits of each token, from a call of its own."""

    def run(windows: Tensor) -> Tensor:
        past: Any = {}
        logits: list[Tensor] = []
        for column in windows.split(1, 1):
            step = model(column, **past)
            past = {"past_key_values": step.past_key_values}
            logits.append(step.logits)
        return torch.cat(logits, 1)

    return run
