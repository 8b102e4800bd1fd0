"""LLMC configs: what each example means layer by layer, and what a model may lack."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from graphq.errors import SpecError
from graphq.frontends import load_spec, print_spec
from graphq.spec.match import Layer, parse_match
from graphq.spec.plan import Plan
from graphq.spec.rules import resolve

CONFIGS = Path(__file__).parents[2] / "examples" / "configs" / "llmc"
LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def llama(blocks: int) -> dict[str, Layer]:
    layers = [
        Layer(f"model.layers.{block}.{name}", "linear", (64, 64), block) for block in range(blocks) for name in LINEARS
    ]
    layers.append(Layer("model.embed_tokens", "embedding", (99, 64), named_only="embedding"))
    layers.append(Layer("lm_head", "linear", (99, 64), named_only="output head"))
    return {layer.fqn: layer for layer in layers}


GOLDEN = {
    "deepseek_w4a8_ascend": """\
graphq: 1
rules:
  - match: blocks
    weight: int8/channel
    input: int8/tensor
  - match: mlp#0..2
    weight: int8/channel
    input: int8/token/dynamic
    exclusive: mix_bits
  - match: experts
    weight: int4/channel
    input: int8/token/dynamic
    exclusive: mix_bits
  - match: kv_b_proj
    float: 'mix_bits.setting_2: do_quant False'
    exclusive: mix_bits
algorithms:
  - smooth-quant:
      alpha: 0.9
      folds:
        kinds:
          - norm-linear
""",
    "mix_bits_1_down_proj": """\
graphq: 1
rules:
  - match: blocks
    weight: int4/asym/g128
  - match: down_proj
    weight: int8/asym/g128
    exclusive: mix_bits
algorithms:
  - awq:
      duo: false
      clip: false
prefix: float
""",
    "mix_bits_2_blocks": """\
graphq: 1
rules:
  - match: blocks
    weight: int4/asym/g128
  - match: down_proj#0..3-28..31
    weight: int8/asym/g128
    exclusive: mix_bits
  - match: o_proj
    float: 'mix_bits.setting_1: do_quant False'
    exclusive: mix_bits
algorithms:
  - awq:
      duo: false
      clip: false
prefix: float
""",
    "mix_bits_3_w4a4_w8a8": """\
graphq: 1
rules:
  - match: blocks
    weight: int4/asym/channel
    input: int4/asym/token/dynamic
  - match: down_proj
    weight: int8/asym/channel
    input: int8/asym/token/dynamic
    exclusive: mix_bits
algorithms:
  - awq:
      duo: false
      clip: false
prefix: float
""",
    "mix_bits_4_everything": """\
graphq: 1
rules:
  - match: blocks
    weight: int4/asym/channel
    input: int4/asym/token/dynamic
  - match: down_proj#0-1-8-15
    weight: int8/asym/channel
    input: int8/asym/token/dynamic
    exclusive: mix_bits
  - match: down_proj#2-6-4-11
    float: 'mix_bits.setting_1: do_quant False'
    exclusive: mix_bits
  - match: o_proj#2-7
    float: 'mix_bits.setting_1: do_quant False'
    exclusive: mix_bits
  - match: down_proj#27
    weight: int6/asym/channel
    input: int6/asym/token/dynamic
    exclusive: mix_bits
  - match: down_proj#13-21
    weight: int4/asym/channel
    exclusive: mix_bits
algorithms:
  - awq:
      duo: false
      clip: false
prefix: float
""",
    "stdlib_llama_blocks": """\
graphq: 1
rules:
  - match: blocks
    weight: int4/asym/g128
  - match: down_proj#0-5
    weight: int8/asym/g128
    exclusive: mix_bits
  - match: o_proj
    float: 'mix_bits.setting_1: do_quant False'
    exclusive: mix_bits
algorithms:
  - awq:
      duo: false
      clip: false
prefix: float
""",
    "stdlib_llama_everything": """\
graphq: 1
rules:
  - match: blocks
    weight: int4/asym/channel
    input: int4/asym/token/dynamic
  - match: down_proj#0
    weight: int8/asym/channel
    input: int8/asym/token/dynamic
    exclusive: mix_bits
  - match: down_proj#1-2
    float: 'mix_bits.setting_1: do_quant False'
    exclusive: mix_bits
  - match: o_proj#1-3
    float: 'mix_bits.setting_1: do_quant False'
    exclusive: mix_bits
  - match: down_proj#5
    weight: int6/asym/channel
    input: int6/asym/token/dynamic
    exclusive: mix_bits
  - match: down_proj#3-4
    weight: int4/asym/channel
    exclusive: mix_bits
algorithms:
  - awq:
      duo: false
      clip: false
prefix: float
""",
    "stdlib_llama_w4_mixed": """\
graphq: 1
rules:
  - match: blocks
    weight: int4/asym/g128
  - match: down_proj#0-5
    weight: int8/asym/g128
    exclusive: mix_bits
  - match: o_proj
    float: 'mix_bits.setting_1: do_quant False'
    exclusive: mix_bits
""",
    "w8a8_per_token": """\
graphq: 1
rules:
  - match: blocks
    weight: int8/channel
    input: int8/token/dynamic
""",
    "w8a8_static": """\
graphq: 1
rules:
  - match: blocks
    weight: int8/channel
    input: int8/tensor
cache: int8/tensor
""",
    "w4a4": """\
graphq: 1
rules:
  - match: blocks
    weight: int4/channel
    input: int4/token/dynamic
  - match: mlp.down_proj#0-1
    float: 'ignored_layers: layer_names'
""",
    "gptq_w4a16": """\
graphq: 1
rules:
  - match: blocks
    weight: int4/g128
algorithms:
  - gptq:
      act_order: static
      scales: plan
      block_size: 128
      dampening: 0.01
run:
  model: /path/to/model
  target: compressed-tensors
  samples: 128
  sequence_length: 256
  seed: 42
""",
    "smooth_quant_w8a8": """\
graphq: 1
rules:
  - match: blocks
    weight: int8/channel
    input: int8/token/dynamic
algorithms:
  - smooth-quant:
      alpha: 0.8
      folds:
        kinds:
          - norm-linear
prefix: float
run:
  model: /path/to/model
  target: torch
  calibration: calibration.txt
  samples: 64
  sequence_length: 128
  seed: 42
""",
    "quarot_w4a4": """\
graphq: 1
rules:
  - match: blocks
    weight: int4/asym/channel/mse0.8:100:2.4:80
    input: int4/asym/token/dynamic
algorithms:
  - rotate:
      r1: true
      r2: true
      r3: false
      r4: true
      kind: random_hadamard
prefix: float
run:
  model: /path/to/model
  seed: 0
""",
    "hqq_w4a16": """\
graphq: 1
rules:
  - match: blocks
    weight: int4/asym/g64/hqq
""",
    "fp8_w8a8": """\
graphq: 1
rules:
  - match: blocks
    weight: float8_e4m3fn/channel
    input: float8_e4m3fn/token/dynamic
  - match: o_proj#0
    float: 'mix_bits.setting_0: do_quant False'
    exclusive: mix_bits
run:
  model: /path/to/model
  target: compressed-tensors
""",
    "fp8_blocks": """\
graphq: 1
rules:
  - match: blocks
    weight: float8_e4m3fn/128x128
    input: float8_e4m3fn/g128/dynamic
""",
    "fp4_w4a16": """\
graphq: 1
rules:
  - match: blocks
    weight: float4_e2m1/g32
  - match: down_proj
    weight: float6_e3m2/g32
    exclusive: mix_bits
""",
    "kvcache_int4": """\
graphq: 1
rules:
  - match: blocks
    weight: int8/channel
cache: int4/asym/token/dynamic
""",
    "w8a8_static_hist": """\
graphq: 1
rules:
  - match: blocks
    weight: int8/channel
    input: int8/tensor/histogram
  - match: down_proj
    weight: int8/channel
    input: int8/asym/tensor/ema
    exclusive: mix_bits
  - match: blocks#0
    float: 'ignored_layers: block_ids'
""",
    "awq_w4a16_clip": """\
graphq: 1
rules:
  - match: blocks
    weight: int4/asym/g128
  - match: self_attn.o_proj#1
    float: 'ignored_layers: layer_names'
  - match: =model.layers.0.mlp.down_proj
    float: 'ignored_layers: speical_names'
algorithms:
  - awq:
      duo: false
      clip: true
""",
    "osplus_w8a8": """\
graphq: 1
rules:
  - match: blocks
    weight: int8/channel
    input: int8/token/dynamic
algorithms:
  - osplus:
      weight_clip: false
prefix: float
""",
}
NOTES = {
    "deepseek_w4a8_ascend": [
        "8:quant.act.calib_algo: the extremes of all batches are taken; LLMC takes the mean of each batch's",
        "16:quant.mix_bits: read as documented; LLMC's code ignores it since May 2025",
    ],
    "awq_w4a16_clip": [
        "13:quant.special.clip_sym: ignored: weights are clipped as their format is symmetric",
    ],
    "fp4_w4a16": [
        "10:quant.mix_bits: read as documented; LLMC's code ignores it since May 2025",
    ],
    "fp8_w8a8": [
        "3:model.type: ignored: layers are found in the graph",
        "24:save.save_path: ignored: graphq compile takes --out",
        "7:quant.quant_type: read as documented; LLMC's code reads it under weight and act alone",
        "18:quant.mix_bits: read as documented; LLMC's code ignores it since May 2025",
    ],
    "gptq_w4a16": [
        "9:calib.name: ignored: graphq calibrates on files of text; name them with --calibration",
        "11:calib.path: ignored: the data set is no text; name files of text with --calibration",
        "5:model.type: ignored: layers are found in the graph",
        "7:model.torch_dtype: ignored: a directory is captured in float32; the API takes dtype",
        "10:calib.download: ignored: graphq downloads nothing",
        "13:calib.bs: ignored: a window is a batch",
        "15:calib.preproc: ignored: calibration takes windows of plain text, one after the other",
        "43:save.save_path: ignored: graphq compile takes --out",
        "17:eval: ignored: graphq eval measures perplexity, on the text that it is given",
        "38:quant.special.true_sequential: ignored: graphq calibrates a block at once",
        "32:quant.weight.need_pack: ignored: the target decides",
    ],
    "hqq_w4a16": [
        "14:quant.special.kappa: beta grows by it, as documented; in LLMC's code it has no effect",
        "9:quant.weight.round_zp: zero points are integers here; the search knows it",
    ],
    "mix_bits_1_down_proj": [
        "9:quant.mix_bits: read as documented; LLMC's code ignores it since May 2025",
    ],
    "mix_bits_2_blocks": [
        "9:quant.mix_bits: read as documented; LLMC's code ignores it since May 2025",
    ],
    "mix_bits_3_w4a4_w8a8": [
        "12:quant.mix_bits: read as documented; LLMC's code ignores it since May 2025",
    ],
    "mix_bits_4_everything": [
        "12:quant.mix_bits: read as documented; LLMC's code ignores it since May 2025",
    ],
    "quarot_w4a4": [
        "5:model.type: ignored: layers are found in the graph",
        "21:quant.special.online_rotate: values are rotated in each head, by weights alone; LLMC mixes heads, too",
        "22:quant.special.fp32_had: ignored: products are made in the dtype that the model is captured in",
    ],
    "smooth_quant_w8a8": [
        "29:save.save_fake: the torch artifact holds codes, where LLMC writes what they stand for",
        "5:model.type: ignored: layers are found in the graph",
        "9:calib.download: ignored: graphq downloads nothing",
        "13:calib.bs: ignored: a window is a batch",
        "15:calib.preproc: ignored: calibration takes windows of plain text, one after the other",
        "30:save.save_path: ignored: graphq compile takes --out",
    ],
    "stdlib_llama_w4_mixed": [
        "10:quant.mix_bits: read as documented; LLMC's code ignores it since May 2025",
    ],
    "w8a8_static": [
        "15:quant.act.calib_algo: the extremes of all batches are taken; LLMC takes the mean of each batch's",
        "16:quant.kvcache.calib_algo: the extremes of all batches are taken; LLMC takes the mean of each batch's",
    ],
    "stdlib_llama_blocks": ["10:quant.mix_bits: read as documented; LLMC's code ignores it since May 2025"],
    "stdlib_llama_everything": ["12:quant.mix_bits: read as documented; LLMC's code ignores it since May 2025"],
    "w8a8_static_hist": [
        "13:quant.act.calib_algo: the same error is made least, by another search than LLMC's",
        "14:quant.mix_bits: read as documented; LLMC's code ignores it since May 2025",
    ],
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_examples(path):
    spec = load_spec(path)
    assert print_spec(spec) == GOLDEN[path.stem]
    assert spec.dialect == "llmc"
    assert [note.removeprefix(f"{path}:") for note in spec.notes] == NOTES.get(path.stem, [])
    if "deepseek" not in path.stem:  # whose layers are others
        resolve(spec, llama(6 if "stdlib" in path.stem else 32))  # every rule matches


# What LLMC's documentation says of its four examples, for the 32 blocks of 7 linears of Llama-2-7B.
W4A16, W8A16 = "weight int4/asym/g128", "weight int8/asym/g128"
W4A4, W6A6, W8A8 = (f"weight int{bits}/asym/channel, input int{bits}/asym/token/dynamic" for bits in (4, 6, 8))
UNNAMED = {
    "model.embed_tokens": "float (embedding: quantized only when a rule names it)",
    "lm_head": "float (output head: quantized only when a rule names it)",
}


def at(name: str, blocks: Any, decision: str) -> dict[str, str]:
    return {f"model.layers.{block}.{name}": decision for block in blocks}


@pytest.mark.parametrize(
    ("example", "base", "others", "counts"),
    [
        ("mix_bits_1_down_proj", W4A16, at("mlp.down_proj", range(32), W8A16), [192, 32]),
        ("mix_bits_2_blocks", W4A16, {
            **at("mlp.down_proj", (0, 1, 2, 3, 28, 29, 30, 31), W8A16),
            **at("self_attn.o_proj", range(32), "float (mix_bits.setting_1: do_quant False)"),
        }, [184, 32, 8]),
        ("mix_bits_3_w4a4_w8a8", W4A4, at("mlp.down_proj", range(32), W8A8), [192, 32]),
        ("mix_bits_4_everything", W4A4, {
            **at("mlp.down_proj", (0, 1, 8, 15), W8A8),
            **at("mlp.down_proj", (2, 4, 6, 11), "float (mix_bits.setting_1: do_quant False)"),
            **at("self_attn.o_proj", (2, 7), "float (mix_bits.setting_1: do_quant False)"),
            **at("mlp.down_proj", (27,), W6A6),
            **at("mlp.down_proj", (13, 21), "weight int4/asym/channel"),
        }, [211, 6, 4, 2, 1]),
    ],
)  # fmt: skip
def test_documented_meaning(example, base, others, counts):
    layers = llama(32)
    resolved, notes = resolve(load_spec(CONFIGS / f"{example}.yaml"), layers)
    assert {fqn: str(one.decision) for fqn, one in resolved.items()} == dict.fromkeys(layers, base) | others | UNNAMED
    assert (
        sorted(Counter(str(r.decision) for r in resolved.values() if r.layer.block is not None).values())[::-1]
        == counts
    )
    (note,) = notes
    assert note.endswith("quant.mix_bits: read as documented; LLMC's code ignores it since May 2025")


def test_every_decision_names_its_rule():
    resolved, _ = resolve(load_spec(CONFIGS / "mix_bits_4_everything.yaml"), llama(32))
    sources = Counter(one.rule.source if one.rule else "" for one in resolved.values())
    assert sources == {
        "quant (line 2)": 211,
        "mix_bits.setting_0 (line 13)": 4,
        "mix_bits.setting_1 (line 24)": 6,
        "mix_bits.setting_2 (line 27)": 1,
        "mix_bits.setting_3 (line 38)": 2,
        "": 2,
    }


WEIGHT = {"bit": 4, "symmetric": True, "granularity": "per_channel"}


def setting(name: str, *, do_quant: bool = True) -> dict[str, Any]:
    return {"layer_name": [name], "do_quant": do_quant, "weight": WEIGHT}


def config(settings: list[dict[str, Any]], ignored: dict[str, Any]) -> dict[str, Any]:
    mix_bits = {f"setting_{i}": one for i, one in enumerate(settings)}
    return {"quant": {"method": "RTN", "weight": WEIGHT, "mix_bits": mix_bits}, "ignored_layers": ignored}


@pytest.mark.parametrize(
    ("settings", "ignored", "problems"),
    [
        ([setting("down_porj")], {}, ["mix_bits.setting_0: down_porj matches no layer; did you mean down_proj?"]),
        ([setting("o_porj")], {}, ["mix_bits.setting_0: o_porj matches no layer; did you mean o_proj?"]),
        ([setting("down_proj#30-34")], {}, [
            "mix_bits.setting_0: down_proj#30-34: block 34 does not exist: this model has blocks 0 to 31; #a-b is a list, write #a..b for a range"]),
        ([setting("down_proj"), setting("mlp.down_proj#3")], {}, [
            "mix_bits.setting_1: mlp.down_proj#3 and mix_bits.setting_0: down_proj both claim model.layers.3.mlp.down_proj"]),
        ([setting("down_proj", do_quant=False), setting("down_proj")], {}, [
            "mix_bits.setting_1: down_proj and mix_bits.setting_0: down_proj both claim model.layers.0.mlp.down_proj"]),
        ([], {"block_ids": ["31-32"]}, [
            "ignored_layers.block_ids: blocks#31-32: block 32 does not exist: this model has blocks 0 to 31; #a-b is a list, write #a..b for a range"]),
        ([], {"speical_names": ["model.layers.0.mlp.down"]}, [
            "ignored_layers.speical_names: =model.layers.0.mlp.down matches no layer; did you mean model.layers.0.mlp.down_proj?"]),
    ],
)  # fmt: skip
def test_what_the_model_does_not_hold(settings, ignored, problems):
    spec = load_spec(config(settings, ignored))
    with pytest.raises(SpecError) as caught:
        resolve(spec, llama(32))
    assert list(caught.value.problems) == problems


def test_ignored_layers_outrank_mix_bits():
    spec = load_spec(config([setting("down_proj")], {"block_ids": [1]}))
    resolved, _ = resolve(spec, llama(2))
    assert isinstance(resolved["model.layers.0.mlp.down_proj"].decision, Plan)
    assert str(resolved["model.layers.1.mlp.down_proj"].decision) == "float (ignored_layers: block_ids)"
    assert spec.rules[1].match == parse_match("down_proj")
