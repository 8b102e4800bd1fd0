"""What a server would not load is refused before the work begins, with the layer, the reason and a way out."""

import dataclasses
from typing import Any

import pytest
import torch

import graphq
from graphq.capture.source import KEY, source_of
from graphq.errors import TargetError
from graphq.frontends import load_spec
from graphq.ir.pipeline import Pipeline
from graphq.lowering.checkpoints.compressed_tensors.preflight import preflight
from graphq.passes.annotate import decide
from graphq.pipelines import canonical_passes
from tests.models import MLP, captured


def lines(family: str, spec: str, consumer: Any = "vllm") -> list[str]:
    gm = captured(family)
    Pipeline(canonical_passes()).run(gm)
    parsed = load_spec(f"graphq: 1\n{spec}")
    return preflight(gm, decide(gm, parsed)[0], parsed, consumer)


Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")


@pytest.mark.parametrize(
    ("family", "spec", "consumer", "expected"),
    [
        ("llama", "weight: int4/g16", "vllm", []),
        ("llama", "weight: int4/g16\ninput: int8/token/dynamic", "vllm", []),
        ("llama", "weight: int8/channel\ninput: int8/asym/tensor", "transformers", []),
        ("llama", "weight: int4/asym/tensor", "transformers", []),
        ("llama", "weight: int8/asym/channel\ninput: int8/token/dynamic", "transformers", []),
        ("llama", "weight: int4/asym/g16", "any", []),
        (
            "llama",
            "rules:\n  - {match: '*.0.mlp.down_proj', weight: int4/asym/g16}",
            "transformers",
            [
                (
                    "model.layers.0.mlp.down_proj: int4/asym/g16: transformers loads no packed zero points; write a"
                    " symmetric format, or asym/tensor (rules[0] (line 3))"
                )
            ],
        ),
        (
            "llama",
            (
                "rules:\n  - {match: '*.0.self_attn.v_proj', weight: int8/channel}\n"
                "  - {match: '*.0.self_attn.[qk]_proj', weight: int4/channel}"
            ),
            "vllm",
            [
                (
                    f"{V}: weight int8/channel, but {Q}, with which vLLM fuses it: weight int4/channel; plan them alike, or"
                    " say consumer=transformers"
                )
            ],
        ),
        (
            "llama",
            (
                "rules:\n  - {match: '*.0.self_attn.v_proj', weight: int8/channel}\n"
                "  - {match: '*.0.self_attn.[qk]_proj', weight: int4/channel}"
            ),
            "transformers",
            [],
        ),
        (
            "llama",
            "rules:\n  - {match: '*.1.mlp.up_proj', weight: int8/channel}",
            "vllm",
            [
                (
                    "model.layers.1.mlp.up_proj: weight int8/channel, but model.layers.1.mlp.gate_proj, with which vLLM"
                    " fuses it: float (no rule matches it); plan them alike, or say consumer=transformers"
                )
            ],
        ),
        ("llama", "rules:\n  - {match: '*.1.mlp.down_proj', weight: int8/channel}", "vllm", []),
        # parts may differ in where their scales came from
        (
            "llama",
            (
                "rules:\n  - {match: '*.0.self_attn.[qk]_proj', weight: int4/channel}\n"
                "  - {match: '*.0.self_attn.v_proj', weight: int4/channel/mse}"
            ),
            "vllm",
            [],
        ),
        (
            "mixtral",
            "weight: int4/g16\nrules:\n  - {match: '*.0.mlp.experts.2.*', weight: int8/channel}",
            "vllm",
            [
                (
                    "model.layers.0.mlp.experts.2.gate_proj: weight int8/channel, but model.layers.0.mlp.experts.0.gate_proj,"
                    " with which vLLM fuses it: weight int4/g16; plan them alike, or say consumer=transformers"
                )
            ],
        ),
        ("mixtral", "weight: int4/g16\nrules:\n  - {match: '*.0.mlp.experts.*', weight: int8/channel}", "vllm", []),
        (
            "llama",
            "rules:\n  - {match: '*.0.mlp.down_proj', weight: int4/g36}",
            "any",
            [
                (
                    "model.layers.0.mlp.down_proj: int4/g36: 96 inputs are no multiple of 36, and compressed-tensors has no"
                    " shorter group (rules[0] (line 3))"
                )
            ],
        ),
        (
            "llama",
            "rules:\n  - {match: embed_tokens, weight: int8/channel}",
            "vllm",
            [
                (
                    "model.embed_tokens: vllm loads no quantized embedding; keep it float, or say consumer=any"
                    " (rules[0] (line 3))"
                )
            ],
        ),
        ("llama", "rules:\n  - {match: embed_tokens, weight: int8/channel}", "any", []),
        (
            "mixtral",
            "rules:\n  - {match: '*.0.mlp.experts.2.gate_proj', weight: int8/channel}",
            "transformers",
            [
                (
                    "model.layers.0.mlp.experts.2.gate_proj: transformers loads no quantized experts, which it stacks;"
                    " keep them float, or say consumer=vllm (rules[0] (line 3))"
                )
            ],
        ),
        (
            "llama",
            "rules:\n  - {match: '*.0.mlp.down_proj', input: int8/tensor}",
            "vllm",
            [
                (
                    "model.layers.0.mlp.down_proj: input int8/tensor: only its input is quantized; a checkpoint holds"
                    " quantized weights (rules[0] (line 3))"
                )
            ],
        ),
        (
            "gpt2",
            "rules:\n  - {match: '*.0.mlp.c_fc', weight: int8/channel}",
            "any",
            [
                (
                    "transformer.h.0.mlp.c_fc: a linear whose weight is stored as [inputs, outputs] has no place among"
                    " quantized linears; keep it float (rules[0] (line 3))"
                )
            ],
        ),
        (
            "llama",
            "weight: int8/channel\nalgorithms: [{smooth-quant: {where: fold-or-multiply}}]\ninput: int8/tensor",
            "any",
            [
                "algorithms[0] (line 3): smooth-quant: where: fold-or-multiply: the architecture has no factors; write fold"
            ],
        ),
        (
            "llama",
            "weight: int8/channel\nalgorithms: [{rotate: {r3: true, r4: true}}]",
            "any",
            ["algorithms[0] (line 3): rotate: r3 and r4: rotations at run time are not written; leave them out"],
        ),
        (
            "opt",
            "weight: int8/channel\nalgorithms: [rotate]",
            "any",
            [
                (
                    "algorithms[0] (line 3): rotate: r1: model.decoder.layers.0.self_attn_layer_norm: a rotated layer norm"
                    " has no mean to subtract; write r1: false"
                )
            ],
        ),
        ("opt", "weight: int8/channel\nalgorithms: [{rotate: {r1: false}}]", "any", []),
        ("opt", "weight: int8/channel\nalgorithms: [correct-bias]", "any", []),
        (
            "llama",
            "weight: int8/channel\nalgorithms: [correct-bias]",
            "any",
            [
                (
                    f"algorithms[0] (line 3): correct-bias: {Q}, {K} and 12 more: the architecture has no bias to put it in;"
                    " leave it out"
                )
            ],
        ),
    ],
)
def test_what_is_refused(family: str, spec: str, consumer: str, expected: list[str]) -> None:
    assert lines(family, spec, consumer) == expected


@pytest.mark.parametrize(
    "weight", ["uint8/channel", "float8_e5m2/channel", "hifloat8/channel", "mxint8", "int4/8x8", "int4/over_int8/g8"]
)
def test_formats_that_it_has_no_name_for(weight: str) -> None:
    found = lines("llama", f"rules:\n  - {{match: '*.0.mlp.down_proj', weight: {weight}}}")
    assert len(found) == 1
    assert found[0].startswith(f"model.layers.0.mlp.down_proj: {weight}: compressed-tensors has no format for it")


def test_compile_refuses_before_it_calibrates() -> None:
    def batches() -> Any:
        raise AssertionError("calibrated")
        yield

    with pytest.raises(
        TargetError, match=r"^compressed-tensors: up: uint8/channel: compressed-tensors has no format for it"
    ):
        graphq.compile(
            MLP(), "graphq: 1\nweight: uint8/channel", inputs=torch.ones(2, 8), target="compressed-tensors",
            calibration=batches(),
        )  # fmt: skip


def test_an_option_that_the_target_has_not() -> None:
    with pytest.raises(
        TargetError, match="compressed-tensors: consumer: 'sglang' is not one of vllm, transformers, any"
    ):
        graphq.compile(
            MLP(), "graphq: 1\nweight: int4/g8", inputs=torch.ones(2, 8), target="compressed-tensors",
            target_options={"consumer": "sglang"},
        )  # fmt: skip


@pytest.mark.parametrize("weight", ["nvfp4", "mxfp4/even", "mxfp8_e4m3/even"])
@pytest.mark.parametrize(("dtype", "consumer", "count"), [
    (torch.float16, "transformers", 1), (torch.bfloat16, "transformers", 0), (torch.float16, "vllm", 0)
])  # fmt: skip
def test_blocks_of_small_floats_in_models_of_float16(
    weight: str, dtype: torch.dtype, consumer: Any, count: int
) -> None:
    gm = captured("llama")
    Pipeline(canonical_passes()).run(gm)
    gm.meta[KEY] = dataclasses.replace(source_of(gm), dtype=dtype)
    parsed = load_spec(f"graphq: 1\nrules:\n  - {{match: '*.0.self_attn.o_proj', weight: {weight}}}")
    found = preflight(gm, decide(gm, parsed)[0], parsed, consumer)
    assert len(found) == count
    assert all("transformers dequantizes it to bfloat16, and fails on it in a model of float16" in one for one in found)
