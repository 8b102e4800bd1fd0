"""msModelSlim configs: what each example means layer by layer, resolved and compiled on tiny models."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import graphq
from graphq.checks import refusals
from graphq.frontends import load_spec, print_spec, write_spec
from graphq.passes.annotate import decide
from graphq.spec.match import Layer
from graphq.spec.rules import resolve
from tests.models import captured, tiny

CONFIGS = Path(__file__).parents[2] / "examples" / "configs" / "modelslim"
EXAMPLES = sorted(CONFIGS.glob("*.yaml"))

GOLDEN = {
    "deepseek_w4a8_ascend": """\
graphq: 1
rules:
  - match: linear:*kv_b_proj
    float: linear_quant excludes it
    may_match_nothing: true
  - match: linear:*.mlp.experts.*
    weight: int4/channel/source
    input: int8/token/dynamic
  - match: linear:model.layers.0.mlp.*
    weight: int8/channel/source
    input: int8/token/dynamic
  - match: linear:model.layers.1.mlp.*
    weight: int8/channel/source
    input: int8/token/dynamic
  - match: linear:model.layers.2.mlp.*
    weight: int8/channel/source
    input: int8/token/dynamic
  - match: linear:*self_attn* but *kv_b_proj
    weight: int8/channel/source
    input: int8/tensor
  - match: linear:*.shared_experts.* but *kv_b_proj
    weight: int8/channel/source
    input: int8/tensor
algorithms:
  - smooth-quant:
      alpha: 0.9
      folds:
        kinds:
          - norm-linear
run:
  target: ascend
""",
    "autoround_w4a8": """\
graphq: 1
rules:
  - match: =lm_head
    float: linear_quant excludes it
  - match: linear:* but lm_head
    weight: int8/channel/source
    input: int8/token/dynamic
  - match: linear:*.mlp.*
    weight: int4/channel/source
    input: int8/token/dynamic
algorithms:
  - auto-round:
      steps: 10
""",
    "deepseek_w4a8_awq": """\
graphq: 1
rules:
  - match: linear:*.kv_b_proj
    float: linear_quant excludes it
    may_match_nothing: true
  - match: linear:*.mlp.gate
    float: linear_quant excludes it
    may_match_nothing: true
  - match: linear:*.self_attn.* but *.kv_b_proj *.mlp.gate
    weight: int8/channel/source
    input: int8/token/dynamic
  - match: linear:*.mlp.* but *.kv_b_proj *.mlp.gate
    weight: int8/channel/source
    input: int8/token/dynamic
  - match: linear:*.mlp.experts.*
    weight: int4/channel/ssz10/source
    input: int8/token/dynamic
algorithms:
  - awq:
      duo: false
      clip: false
      folds:
        kinds:
          - up-down
        include:
          - '*.mlp.experts.*'
  - smooth-quant:
      alpha: search
      folds:
        kinds:
          - norm-linear
          - ov
          - up-down
        exclude:
          - '*.mlp.experts.*'
          - '*.kv_a_layernorm'
run:
  target: ascend
""",
    "deepseek_w4a8_mix": """\
graphq: 1
rules:
  - match: linear:*kv_b_proj
    float: linear_quant excludes it
    may_match_nothing: true
  - match: linear:*gate
    float: linear_quant excludes it
    may_match_nothing: true
  - match: linear:*.mlp.experts.* but *gate
    weight: int4/over_int8/g256
    input: int8/token/dynamic
  - match: linear:model.layers.0.mlp.*
    weight: int8/channel/source
    input: int8/token/dynamic
  - match: linear:model.layers.1.mlp.*
    weight: int8/channel/source
    input: int8/token/dynamic
  - match: linear:model.layers.2.mlp.*
    weight: int8/channel/source
    input: int8/token/dynamic
  - match: linear:*self_attn* but *kv_b_proj
    weight: int8/channel/source
    input: int8/asym/joint/tensor
  - match: linear:*.shared_experts.* but *kv_b_proj
    weight: int8/channel/source
    input: int8/asym/joint/tensor
algorithms:
  - smooth-quant:
      alpha: 0.9
run:
  target: ascend
  calibration: deepseek_calib_prompt.jsonl
""",
    "deepseek_w4a8_ssz": """\
graphq: 1
rules:
  - match: linear:*kv_b_proj
    float: linear_quant excludes it
    may_match_nothing: true
  - match: linear:*gate
    float: linear_quant excludes it
    may_match_nothing: true
  - match: linear:*mlp.experts.*
    float: linear_quant excludes it
    may_match_nothing: true
  - match: linear:*.mlp.experts.*
    weight: int4/channel/ssz30/source
    input: int8/token/dynamic
  - match: linear:*mlp* but *gate *mlp.experts.*
    weight: int8/channel/source
    input: int8/token/dynamic
  - match: linear:*self_attn* but *kv_b_proj
    weight: int8/channel/source
    input: int8/token/dynamic
algorithms:
  - smooth-quant:
      alpha: search
      folds:
        kinds:
          - norm-linear
          - ov
run:
  target: ascend
  calibration: mix_calib.jsonl
""",
    "fp8_dynamic": """\
graphq: 1
rules:
  - match: linear:model.layers.1.*
    float: linear_quant excludes it
    may_match_nothing: true
  - match: =lm_head
    float: linear_quant excludes it
  - match: linear:* but model.layers.1.* lm_head
    weight: float8_e4m3fn/channel/source
    input: float8_e4m3fn/token/dynamic
pipeline: independent
""",
    "mxfp4_mxfp8": """\
graphq: 1
rules:
  - match: linear:*.mlp.*
    weight: mxfp4/ascend/source
    input: mxfp4/ascend/dynamic
  - match: linear:*self_attn*
    weight: mxfp8_e4m3/ascend/source
    input: mxfp8_e4m3/ascend/dynamic
  - match: linear:model.layers.0.mlp.down_proj
    weight: mxfp4/ascend/source
    input: mxfp8_e4m3/ascend/dynamic
""",
    "quarot_w4a4": """\
graphq: 1
rules:
  - match: =lm_head
    float: linear_quant excludes it
  - match: linear:* but lm_head
    weight: int4/channel/ssz/source
    input: int4/token/dynamic
  - match: linear:*.down_proj
    weight: int8/channel/source
    input: int8/token/dynamic
algorithms:
  - rotate
""",
    "w4a16_awq_gptq": """\
graphq: 1
rules:
  - match: linear:*.self_attn.q_proj
    weight: int8/channel/source
  - match: linear:*.self_attn.k_proj
    weight: int8/channel/source
  - match: linear:*.self_attn.v_proj
    weight: int8/channel/source
  - match: linear:*.self_attn.o_proj
    weight: int8/channel/source
  - match: linear:*.mlp.*
    weight: int4/asym/joint/g32
algorithms:
  - awq:
      n_grid: 20
      duo: false
      clip: false
  - gptq:
      act_order: none
      scales: plan
      dampening: 0.01
      block_size: 64
      match: linear:*.mlp.*
""",
    "w8a8_dynamic": """\
graphq: 1
rules:
  - match: =lm_head
    float: linear_quant excludes it
  - match: linear:* but lm_head
    weight: int8/channel/source
    input: int8/token/dynamic
algorithms:
  - smooth-quant:
      alpha: search
""",
    "w8a8_static": """\
graphq: 1
rules:
  - match: linear:*.down_proj
    float: linear_quant excludes it
    may_match_nothing: true
  - match: =lm_head
    float: linear_quant excludes it
  - match: linear:* but *.down_proj lm_head
    weight: int8/channel/source
    input: int8/tensor
algorithms:
  - smooth-quant:
      alpha: 0.5
      folds:
        kinds:
          - norm-linear
run:
  target: ascend
""",
    "v0_w8a8": """\
graphq: 1
rules:
  - match: linear:*
    weight: int8/channel/source
    input: int8/asym/joint/tensor/histogram
  - match: linear:*.mlp.*
    weight: int8/channel/source
    input: int8/token/dynamic
  - match: =model.layers.0.mlp.down_proj
    float: disable_names
  - match: linear:*lm_head
    float: disable_last_linear
    may_match_nothing: true
algorithms:
  - smooth-quant:
      alpha: 0.9
run:
  target: ascend
""",
    "w8a8_static_c8": """\
graphq: 1
rules:
  - match: linear:*down_proj
    float: linear_quant excludes it
    may_match_nothing: true
  - match: =lm_head
    float: linear_quant excludes it
  - match: linear:* but *down_proj lm_head
    weight: int8/channel/source
    input: int8/asym/joint/tensor/histogram
algorithms:
  - smooth-quant:
      alpha: 0.9
      folds:
        kinds:
          - norm-linear
          - ov
          - up-down
cache: int8/channel
run:
  target: ascend
  calibration: mix_calib.jsonl
""",
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path):
    spec = load_spec(path)
    assert print_spec(spec) == GOLDEN[path.stem]
    assert spec.dialect == "modelslim"
    assert load_spec(print_spec(spec)) == spec
    again = load_spec(write_spec(spec, "modelslim"))
    assert (again == spec) != path.stem.startswith("v0")  # the v1 is written, whose rules stand the other way round


def deepseek() -> dict[str, Layer]:
    """The layers of DeepSeek-V3 with three dense blocks and one of four experts."""
    found: list[Layer] = [Layer("model.embed_tokens", "embedding", (99, 64), named_only="embedding")]
    for block in range(4):
        names = [f"self_attn.{name}" for name in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
        stacks = ["mlp"] if block < 3 else ["mlp.shared_experts"]
        names += [f"{stack}.{name}_proj" for stack in stacks for name in ("gate", "up", "down")]
        found += [Layer(f"model.layers.{block}.{name}", "linear", (64, 64), block) for name in names]
    found.append(Layer("model.layers.3.mlp.gate", "linear", (4, 64), 3, named_only="router"))
    found += [
        Layer(f"model.layers.3.mlp.experts.{i}.{name}_proj", "expert", (64, 64), 3)
        for i in range(4)
        for name in ("gate", "up", "down")
    ]
    found.append(Layer("lm_head", "linear", (99, 64), named_only="output head"))
    return {layer.fqn: layer for layer in found}


STATIC = "weight int8/channel/source, input int8/asym/joint/tensor"
DYNAMIC = "weight int8/channel/source, input int8/token/dynamic"
TWO_LEVELS = "weight int4/over_int8/g256, input int8/token/dynamic"


def documented(fqn: str) -> str | None:
    """What the documentation of the W4A8 mix says of a layer; None: it stays float."""
    if fqn in ("model.embed_tokens", "lm_head") or fqn.endswith(("kv_b_proj", "mlp.gate")):
        return None
    if ".experts." in fqn:
        return TWO_LEVELS
    return STATIC if "self_attn" in fqn or "shared_experts" in fqn else DYNAMIC


@pytest.mark.parametrize("name", ["deepseek_w4a8_mix.yaml", "quant_model_description.json"])
def test_the_documented_mix(name):
    resolved, notes = resolve(load_spec(CONFIGS / name), deepseek())
    for fqn, one in resolved.items():
        wanted = documented(fqn)
        assert str(one.decision) == wanted if wanted else str(one.decision).startswith("float (")
    assert Counter(documented(fqn) for fqn in resolved) == {STATIC: 19, DYNAMIC: 9, TWO_LEVELS: 12, None: 7}
    assert not [note for note in notes if "matches no layer" in note]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_w4a8_mix.yaml", "quant_model_description.json"])
def test_the_documented_mix_compiled(name):
    compiled, error = compile_with(tiny("deepseek", num_hidden_layers=4, first_k_dense_replace=3), CONFIGS / name)
    assert {row.layer.fqn for row in compiled.report.layers} == set(deepseek())
    for row in compiled.report.layers:
        parts = [f"{role} {quant}" for role, quant in (("weight", row.weight), ("input", row.input)) if quant]
        assert ", ".join(parts) == (documented(row.layer.fqn) or "")
    assert 0 < error < 0.2


def compile_with(model: Any, spec: Any) -> tuple[Any, float]:
    """The model compiled, and how far its logits are from those of the model, in shares of these."""
    batches = [torch.randint(0, 128, (4, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    compiled: Any = graphq.compile(model, spec, calibration=batches)
    with torch.no_grad():
        wanted = model(batches[0]).logits
    return compiled, float((compiled(batches[0])["logits"] - wanted).norm() / wanted.norm())


LLAMA = [path for path in EXAMPLES if "deepseek" not in path.stem]
STAYS = "float (linear_quant excludes it)"
UNNAMED = "float (output head: quantized only when a rule names it)"
COUNTS = {
    "autoround_w4a8": {DYNAMIC: 8, "weight int4/channel/source, input int8/token/dynamic": 6, STAYS: 1},
    "fp8_dynamic": {"weight float8_e4m3fn/channel/source, input float8_e4m3fn/token/dynamic": 7, STAYS: 8},
    "mxfp4_mxfp8": {
        "weight mxfp8_e4m3/ascend/source, input mxfp8_e4m3/ascend/dynamic": 8,
        "weight mxfp4/ascend/source, input mxfp4/ascend/dynamic": 5,
        "weight mxfp4/ascend/source, input mxfp8_e4m3/ascend/dynamic": 1,
        UNNAMED: 1,
    },
    "quarot_w4a4": {"weight int4/channel/ssz/source, input int4/token/dynamic": 12, DYNAMIC: 2, STAYS: 1},
    "w4a16_awq_gptq": {"weight int8/channel/source": 8, "weight int4/asym/joint/g32": 6, UNNAMED: 1},
    "v0_w8a8": {
        "weight int8/channel/source, input int8/asym/joint/tensor/histogram": 8,
        DYNAMIC: 5,
        "float (disable_names)": 1,
        "float (disable_last_linear)": 1,
    },
    "w8a8_dynamic": {DYNAMIC: 14, STAYS: 1},
    "w8a8_static": {"weight int8/channel/source, input int8/tensor": 12, STAYS: 3},
    "w8a8_static_c8": {"weight int8/channel/source, input int8/asym/joint/tensor/histogram": 12, STAYS: 3},
}


@pytest.mark.parametrize("path", LLAMA, ids=lambda path: path.stem)
def test_examples_on_a_llama(path):
    resolved, notes = decide(captured("llama"), load_spec(path))
    embedding = "float (embedding: quantized only when a rule names it)"
    assert Counter(str(one.decision) for one in resolved.values()) == {**COUNTS[path.stem], embedding: 1}
    assert notes == load_spec(path).notes  # every pattern matches


@pytest.mark.slow
@pytest.mark.parametrize("path", LLAMA, ids=lambda path: path.stem)
def test_examples_compiled(path):
    spec = load_spec(path)
    assert refusals(spec) == []
    compiled, error = compile_with(tiny("llama"), spec)
    assert [str(one.quant) for one in compiled.report.caches] == (
        ["int8/channel"] * 4 if path.stem.endswith("c8") else []
    )
    counts = Counter(", ".join(f"{q}" for q in (row.weight, row.input) if q) for row in compiled.report.layers)
    wanted = Counter({text.replace("weight ", "").replace("input ", ""): n for text, n in COUNTS[path.stem].items()})
    assert counts == {"": 1 + sum(n for text, n in wanted.items() if "float (" in text)} | {
        text: n for text, n in wanted.items() if "float (" not in text
    }
    assert 0 < error < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "experts"),
    [("deepseek_w4a8_ssz", "int4/channel/ssz30/source"), ("deepseek_w4a8_awq", "int4/channel/ssz10/source")],
)
def test_a_mix_for_all_linears_of_deepseek_compiled(name, experts):
    compiled, error = compile_with(tiny("deepseek"), CONFIGS / f"{name}.yaml")
    plans = Counter(str(row.weight) for row in compiled.report.layers)
    assert plans == {"int8/channel/source": 14, experts: 12, "None": 5}
    assert 0 < error < 0.5
