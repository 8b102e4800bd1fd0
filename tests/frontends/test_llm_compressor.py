"""llm-compressor's examples: what each means layer by layer, what it computes, and that it is written back."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import graphq
from graphq import compiler
from graphq.checks import refusals
from graphq.frontends import load_spec, print_spec, write_spec
from graphq.spec.match import Layer, parse_match
from graphq.spec.rules import resolve
from tests.frontends.test_llmc import llama
from tests.models import captured, tiny

CONFIGS = Path(__file__).parents[2] / "examples" / "configs" / "llm-compressor"
AWQ_GPTQ = """\
graphq: 1
rules:
  - match: re:.*self_attn\\.(k|q|o|v)_proj$
    weight: int4/half/g128/source
  - match: =lm_head
    float: ignore
  - match: re:.*mlp\\.(down|gate|up)_proj$
    weight: int8/half/channel/source
    input: int8/half/token/dynamic
  - match: =lm_head
    float: ignore
algorithms:
  - awq:
      duo: true
      clip: false
      match:
        - re:.*q_proj$
        - re:.*k_proj$
        - re:.*v_proj$
  - gptq:
      act_order: static
      scales: plan
      match: re:.*mlp\\.(down|gate|up)_proj$
"""
GOLDEN = {
    "awq_gptq_independent": AWQ_GPTQ + "pipeline: independent\n",
    "awq_gptq_sequential": AWQ_GPTQ,
    "config": """\
graphq: 1
rules:
  - match: re:.*self_attn.*
    weight: int4/asym/joint/g128/source
  - match: re:.*mlp.*
    weight: int8/half/channel/source
    input: int8/half/token/dynamic
  - match: =lm_head
    float: ignore
    may_match_nothing: true
""",
    "fp8_dynamic": """\
graphq: 1
rules:
  - match: kind:linear
    weight: float8_e4m3fn/channel/source
    input: float8_e4m3fn/token/dynamic
  - match: =lm_head
    float: ignore
""",
    "fp8_static_kv_cache": """\
graphq: 1
rules:
  - match: kind:linear
    weight: float8_e4m3fn/tensor/source
    input: float8_e4m3fn/tensor
  - match: =lm_head
    float: ignore
cache: float8_e4m3fn/tensor/ema
run:
  samples: 512
  sequence_length: 2048
""",
    "fp8_two_strategies": """\
graphq: 1
rules:
  - match: re:.*up_proj.*
    weight: float8_e4m3fn/tensor/source
    input: float8_e4m3fn/token/dynamic
  - match: re:.*self_attn.v_proj.*
    weight: float8_e4m3fn/channel/source
    input: float8_e4m3fn/token/dynamic
  - match: re:.*self_attn.q_proj.*
    weight: float8_e4m3fn/channel/source
    input: float8_e4m3fn/token/dynamic
  - match: re:.*self_attn.o_proj.*
    weight: float8_e4m3fn/channel/source
    input: float8_e4m3fn/token/dynamic
  - match: re:.*self_attn.k_proj.*
    weight: float8_e4m3fn/channel/source
    input: float8_e4m3fn/token/dynamic
  - match: re:.*gate_proj.*
    weight: float8_e4m3fn/tensor/source
    input: float8_e4m3fn/token/dynamic
  - match: re:.*down_proj.*
    weight: float8_e4m3fn/tensor/source
    input: float8_e4m3fn/token/dynamic
  - match: =lm_head
    float: ignore
""",
    "ignore_regexes": """\
graphq: 1
rules:
  - match: kind:linear
    weight: int8/half/g128/source
  - match: =lm_head
    float: ignore
  - match: re:.*layers\\.0\\..*
    float: ignore
    may_match_nothing: true
  - match: re:.*layers\\.31\\..*
    float: ignore
    may_match_nothing: true
  - match: re:.*vision_tower.*
    float: ignore
    may_match_nothing: true
""",
    "int4_int8_gptq": """\
graphq: 1
rules:
  - match: re:.*up_proj.*
    weight: int4/asym/joint/g128/source
  - match: re:.*self_attn.v_proj.*
    weight: int4/asym/joint/g128/source
  - match: re:.*self_attn.q_proj.*
    weight: int4/asym/joint/g128/source
  - match: re:.*self_attn.o_proj.*
    weight: int4/asym/joint/g128/source
  - match: re:.*self_attn.k_proj.*
    weight: int4/asym/joint/g128/source
  - match: re:.*gate_proj.*
    weight: int4/asym/joint/g128/source
  - match: re:.*down_proj.*
    weight: int8/half/g128/source
  - match: =lm_head
    float: ignore
algorithms:
  - gptq:
      act_order: static
      scales: plan
""",
    "mxfp4": """\
graphq: 1
rules:
  - match: re:.*self_attn.*
    weight: mxfp8_e4m3/even
    input: mxfp8_e4m3/even/dynamic
  - match: re:.*mlp.*
    weight: mxfp4/even
    input: mxfp4/even/dynamic
  - match: re:.*lm_head
    float: ignore
    may_match_nothing: true
""",
    "nvfp4_fp8": """\
graphq: 1
rules:
  - match: re:.*up_proj.*
    weight: nvfp4/source
    input: nvfp4/ema
  - match: re:.*self_attn.v_proj.*
    weight: nvfp4/source
    input: nvfp4/ema
  - match: re:.*self_attn.q_proj.*
    weight: nvfp4/source
    input: nvfp4/ema
  - match: re:.*self_attn.o_proj.*
    weight: nvfp4/source
    input: nvfp4/ema
  - match: re:.*self_attn.k_proj.*
    weight: nvfp4/source
    input: nvfp4/ema
  - match: re:.*gate_proj.*
    weight: nvfp4/source
    input: nvfp4/ema
  - match: re:.*down_proj.*
    weight: float8_e4m3fn/channel/source
    input: float8_e4m3fn/token/dynamic
  - match: =lm_head
    float: ignore
""",
    "precedence": """\
graphq: 1
rules:
  - match: kind:linear
    weight: int4/half/g128/source
  - match: re:.*self_attn.*
    weight: int6/half/channel/source
  - match: re:.*mlp.*
    weight: int6/half/channel/source
  - match: re:.*down_proj$
    weight: int8/half/channel/source
  - match: =model.layers.0.mlp.down_proj
    float: UNQUANTIZED
  - match: =lm_head
    float: ignore
""",
    "w4a16_asym_awq": """\
graphq: 1
rules:
  - match: kind:linear
    weight: int4/asym/joint/g128/source
  - match: =lm_head
    float: ignore
algorithms:
  - awq:
      duo: null
      clip: false
      n_grid: 20
""",
    "w4a16_auto_round": """\
graphq: 1
rules:
  - match: kind:linear
    weight: int4/half/g128/source
  - match: =lm_head
    float: ignore
algorithms:
  - auto-round:
      steps: 20
      batch_size: 4
prefix: float
""",
    "w4a16_gptq_actorder": """\
graphq: 1
rules:
  - match: kind:linear
    weight: int4/half/g128/mse
  - match: =lm_head
    float: ignore
algorithms:
  - gptq:
      act_order: static
      scales: plan
      block_size: 128
      dampening: 0.01
""",
    "w4a4_spin_quant": """\
graphq: 1
rules:
  - match: kind:linear
    weight: int4/half/g128/source
    input: int4/half/token/dynamic
  - match: =lm_head
    float: ignore
algorithms:
  - rotate:
      kind: random_hadamard
      r4: true
  - gptq:
      act_order: static
      scales: plan
""",
    "w8a8_smooth_quant_gptq": """\
graphq: 1
rules:
  - match: kind:linear
    weight: int8/half/channel/source
    input: int8/half/token/dynamic
  - match: =lm_head
    float: ignore
algorithms:
  - smooth-quant:
      statistic: range
      alpha: 0.8
      folds:
        kinds:
          - norm-linear
  - gptq:
      act_order: static
      scales: plan
pipeline: independent
""",
    "w8a8_static_minmax": """\
graphq: 1
rules:
  - match: kind:linear
    weight: int8/half/channel/source
    input: int8/asym/joint/tensor/ema
  - match: =lm_head
    float: ignore
algorithms:
  - gptq:
      act_order: static
      scales: plan
""",
}
NOTES = {
    "awq_gptq_sequential": ["8:quant_stage.quant_modifiers.AWQModifier.mappings[0].smooth_layer: ignored: what takes the factors up is read from the graph"],
    "awq_gptq_independent": ["8:quant_stage.quant_modifiers.AWQModifier.mappings[0].smooth_layer: ignored: what takes the factors up is read from the graph"],
    "nvfp4_fp8": [
        f"{line}:quant_stage.quant_modifiers.QuantizationModifier.config_groups.group_{group}.format: ignored: how a layer is stored follows from its plan and the target"
        for line, group in ((20, 0), (37, 1))
    ],
    "config": [
        " of the configuration of a model, quantization_config alone is read",
        *(f"{line}:quantization_config.{key}: ignored: it describes the checkpoint, not the model" for line, key in ((71, "version"), (63, "format"), (68, "quantization_status"))),
        *(f"{line}:quantization_config.config_groups.group_{group}.format: ignored: how a layer is stored follows from its plan and the target" for line, group in ((10, 0), (30, 1))),
        "15:quantization_config.config_groups.group_0.weights.actorder: ignored: it tells of the algorithm that made the checkpoint",
    ],
}  # fmt: skip
EXAMPLES = sorted(CONFIGS.iterdir())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples(path):
    spec = load_spec(path)
    assert print_spec(spec) == GOLDEN[path.stem]
    assert spec.dialect == "llm-compressor"
    assert [note.removeprefix(f"{path}:") for note in spec.notes] == NOTES.get(path.stem, [])
    assert load_spec(GOLDEN[path.stem]) == spec
    resolve(spec, llama(32))  # every rule matches


def test_every_example_has_its_text():
    assert {path.stem for path in EXAMPLES} == set(GOLDEN)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_written_back(path):
    spec = load_spec(path)
    text = write_spec(spec, "llm-compressor")
    again = load_spec(text)
    if path.stem == "config":  # a full name of a checkpoint's ignore may match nothing; a recipe says so by re:
        old, new = (parse_match(match) for match in ("=lm_head", "re:lm_head$"))
        rules = tuple(dataclasses.replace(r, match=new) if r.match == old else r for r in spec.rules)
        spec = dataclasses.replace(spec, rules=rules)
    assert (again, print_spec(again)) == (spec, print_spec(spec))
    assert write_spec(again, "llm-compressor") == text


def decisions(name: str, layers: dict[str, Layer]) -> dict[str, str]:
    resolved, _ = resolve(load_spec(CONFIGS / name), layers)
    return {fqn: str(found.decision) for fqn, found in resolved.items()}


def test_the_precedence_that_llm_compressor_was_seen_to_have():
    """Exact names, then expressions by the alphabet, then classes: as observed on its release 0.14."""
    found = decisions("precedence.yaml", llama(2))
    assert found["model.layers.0.mlp.down_proj"] == "float (UNQUANTIZED)"
    assert found["model.layers.1.mlp.down_proj"] == "weight int8/half/channel/source"  # 'd' comes before 'm'
    assert found["model.layers.1.mlp.gate_proj"] == "weight int6/half/channel/source"
    assert found["lm_head"] == "float (ignore)"
    spec = load_spec({"quant_stage": {"quant_modifiers": {"QuantizationModifier": {"scheme": "W8A16"}}}})
    resolved, _ = resolve(spec, llama(1))
    assert str(resolved["lm_head"].decision) == "weight int8/half/g128/source"  # a linear like all others
    assert str(resolved["model.embed_tokens"].decision).startswith("float")


def test_attention_and_mlp_have_plans_of_their_own():
    found = decisions("awq_gptq_sequential.yaml", llama(2))
    assert {plan for fqn, plan in found.items() if "self_attn" in fqn} == {"weight int4/half/g128/source"}
    assert {plan for fqn, plan in found.items() if "mlp" in fqn} == {
        "weight int8/half/channel/source, input int8/half/token/dynamic"
    }


def test_every_decision_names_its_rule():
    resolved, _ = resolve(load_spec(CONFIGS / "int4_int8_gptq.yaml"), llama(1))
    sources = {found.rule.source for found in resolved.values() if found.rule is not None}
    assert sources == {
        *("GPTQModifier.config_groups.group_0 (line 15)", "GPTQModifier.ignore (line 5)"),
        *(f"GPTQModifier.config_groups.group_1 (line {line})" for line in (24, 25, 26)),
    }


TOKENS = [torch.randint(0, 128, (4, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_compile(path, monkeypatch):
    def capture(*_: Any, **__: Any) -> fx.GraphModule:  # which is tested elsewhere, and takes its time
        return copy.deepcopy(captured("llama"))

    monkeypatch.setattr(compiler, "capture", capture)
    spec = load_spec(path)
    if refusals(spec):
        assert spec.cache is not None
        spec = dataclasses.replace(spec, cache=None)
    compiled = graphq.compile(tiny("llama"), spec, calibration=TOKENS)
    explained = {found.layer.fqn: found.plan for found in graphq.explain(tiny("llama"), spec).layers}
    assert {found.layer.fqn: found.plan for found in compiled.report.layers} == explained
    logits = compiled.graph(*compiled_inputs(compiled.graph))[0]
    assert torch.isfinite(logits).all()


def compiled_inputs(gm: fx.GraphModule) -> tuple[torch.Tensor, ...]:
    from tests.models import random_inputs

    return random_inputs(gm, 1, 3)
