"""What vLLM-Ascend would not load is refused before the work begins, with the layer, the reason and a way out."""

from typing import Any

import pytest
import torch

import graphq
from graphq.errors import TargetError
from graphq.frontends import load_spec
from graphq.ir.pipeline import Pipeline
from graphq.lowering.checkpoints.ascend.preflight import preflight
from graphq.lowering.checkpoints.ascend.tags import Wanted, layer_problem, quant_type, tag_of
from graphq.passes.annotate import decide
from graphq.pipelines import canonical_passes
from graphq.spec.quant import parse_quant
from tests.models import captured


def lines(family: str, spec: str, **options: Any) -> list[str]:
    gm = captured(family)
    Pipeline(canonical_passes()).run(gm)
    parsed = load_spec(f"graphq: 1\n{spec}")
    return preflight(gm, decide(gm, parsed)[0], parsed, **options)


TOKEN = "input: int8/token/dynamic"
Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
GATE, UP, DOWN = (f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))
EXPERT = "model.layers.1.mlp.experts.0"
_8BIT = "write int8/channel with int8/token/dynamic (W8A8_DYNAMIC)"


@pytest.mark.parametrize(
    ("family", "spec", "options", "expected"),
    [
        ("llama", f"weight: int8/channel\n{TOKEN}", {}, []),
        ("llama", "weight: int8/channel\ninput: int8/asym/joint/tensor", {}, []),
        ("llama", "weight: int8/channel", {"tp": 3}, []),
        ("llama", "rules: [{match: self_attn, weight: mxfp8_e4m3, input: mxfp8_e4m3/dynamic}]", {}, []),
        ("deepseek", f"rules: [{{match: experts, weight: int4/channel, {TOKEN}}}]", {}, []),
        ("deepseek", f"rules: [{{match: experts, weight: int4/channel, {TOKEN}}}]", {"tp": 2}, []),
        (
            "llama",
            f"rules: [{{match: '={DOWN}', weight: int4/channel, {TOKEN}}}]",
            {},
            [
                (
                    f"{DOWN}: int4/channel (W4A8_DYNAMIC): vLLM-Ascend loads it in no linear; {_8BIT}, or say consumer=any"
                    " (rules[0] (line 2))"
                )
            ],
        ),
        ("llama", f"rules: [{{match: '={DOWN}', weight: int4/channel, {TOKEN}}}]", {"consumer": "any"}, []),
        (
            "llama",
            f"rules: [{{match: '={V}', weight: int8/channel, {TOKEN}}}]",
            {},
            [
                (
                    f"{V}: weight int8/channel, input int8/token/dynamic, but {Q}, with which vLLM-Ascend fuses it:"
                    " float (no rule matches it); plan them alike, or say consumer=any"
                )
            ],
        ),
        (
            "deepseek",
            f"rules: [{{match: '=model.layers.0.self_attn.q_a_proj', weight: int8/channel, {TOKEN}}}]",
            {},
            [
                (
                    "model.layers.0.self_attn.kv_a_proj_with_mqa: float (no rule matches it), but"
                    " model.layers.0.self_attn.q_a_proj, with which vLLM-Ascend fuses it: weight int8/channel, input"
                    " int8/token/dynamic; plan them alike, or say consumer=any"
                )
            ],
        ),
        (
            "deepseek",
            (
                f"rules:\n  - {{match: experts, weight: int4/channel, {TOKEN}}}\n"
                f"  - {{match: '={EXPERT}.down_proj', weight: int8/channel, {TOKEN}}}"
            ),
            {},
            [
                (
                    f"{EXPERT}.down_proj: weight int8/channel, input int8/token/dynamic, but {EXPERT}.gate_proj, with which"
                    " vLLM-Ascend fuses it: weight int4/channel, input int8/token/dynamic; plan them alike, or say"
                    " consumer=any"
                )
            ],
        ),
        (
            "deepseek",
            f"rules: [{{match: experts, weight: int4/channel, {TOKEN}}}]",
            {"tp": 32},
            None,
        ),
        (
            "llama",
            f"rules:\n  - {{match: '={GATE}', weight: int8/g16}}\n  - {{match: '={UP}', weight: int8/g32}}",
            {"consumer": "any"},
            [f"{UP}: int8/g32, but {GATE}: int8/g16; a file has one group size, write one for both"],
        ),
        (
            "llama",
            "weight: int8/channel\nalgorithms: [correct-bias]",
            {},
            [
                (
                    f"algorithms[0] (line 3): correct-bias: {Q}, {K} and 12 more: the architecture has no bias to put it in;"
                    " leave it out"
                )
            ],
        ),
        (
            "llama",
            "weight: int8/channel\nalgorithms: [{rotate: {r4: true}}]",
            {"consumer": "any"},
            ["algorithms[0] (line 3): rotate: r4: rotations at run time are not written; leave them out"],
        ),
    ],
)
def test_lines(family: str, spec: str, options: dict[str, Any], expected: list[str] | None) -> None:
    found = lines(family, spec, **options)
    if expected is None:
        assert (
            f"{EXPERT}.gate_proj: int4/channel (W4A8_DYNAMIC): tp: 32: it has sums for 1, 2, 4, 8 or 16 ranks" in found
        )
    else:
        assert found == expected


def test_groups_beside_experts_of_int4() -> None:
    """vLLM-Ascend refuses W4A8_DYNAMIC where the file's group size is not 0, and needs 32 for mx formats."""
    spec = (
        f"rules:\n  - {{match: experts, weight: int4/channel, {TOKEN}}}\n"
        "  - {match: '=model.layers.0.self_attn.o_proj', weight: mxfp8_e4m3, input: mxfp8_e4m3/dynamic}"
    )
    found = lines("deepseek", spec)
    assert len(found) == 12
    assert found[0] == (
        f"{EXPERT}.gate_proj: int4/channel (W4A8_DYNAMIC), but model.layers.0.self_attn.o_proj: mxfp8_e4m3;"
        f" vLLM-Ascend takes no W4A8_DYNAMIC in a file with a group size; {_8BIT}, or say consumer=any"
    )
    assert lines("deepseek", spec, consumer="any") == []


# kind, weight, input, [N, K], is_row, options -> the reason
PROBLEMS: list[tuple[str, str, str | None, tuple[int, int], bool, dict[str, Any], str | None]] = [
    ("expert", "int4/channel", "int8/token/dynamic", (16, 64), True, {}, None),
    ("expert", "int4/channel", "int8/token/dynamic", (16, 64), False, {"tp": 2}, None),
    ("expert", "int4/channel", "int8/token/dynamic", (8, 64), True, {"tp": 4}, None),  # outputs are whole
    ("expert", "int4/channel", "int8/token/dynamic", (20, 64), False, {},
     f"int4/channel (W4A8_DYNAMIC): vLLM-Ascend takes outputs that are a multiple of 8, not 20; {_8BIT}"),
    ("expert", "int4/channel", "int8/token/dynamic", (24, 64), False, {"tp": 2},
     f"int4/channel (W4A8_DYNAMIC): vLLM-Ascend takes outputs of 2 ranks that are a multiple of 8, not 12; {_8BIT}"),
    ("expert", "int4/channel", "int8/token/dynamic", (16, 40), True, {},
     f"int4/channel (W4A8_DYNAMIC): 40 inputs are no multiple of 16, the slices of scale_bias; {_8BIT}"),
    ("expert", "int4/channel", "int8/token/dynamic", (16, 40), False, {}, None),
    ("expert", "int4/channel", "int8/token/dynamic", (15, 64), False, {"consumer": "any"},
     "int4/channel (W4A8_DYNAMIC): its rows are packed in pairs, and there are 15; write int8/channel"),
    ("expert", "int4/over_int8/g32", "int8/token/dynamic", (16, 64), False, {"consumer": "any"},
     "int4/over_int8/g32 (W4A8_DYNAMIC): version 1 has no groups of int4 over int8; say layout=v0, or write int4/channel"),
    ("expert", "int4/over_int8/g32", "int8/token/dynamic", (16, 64), False, {"consumer": "any", "layout": "v0"}, None),
    ("expert", "int4/over_int8/g32", "int8/token/dynamic", (16, 64), False, {"layout": "v0"},
     ("int4/over_int8/g32 (W4A8_DYNAMIC): vLLM-Ascend loads a scale for each channel alone; write int8/channel or"
     " int4/channel with int8/token/dynamic (W8A8_DYNAMIC, W4A8_DYNAMIC), or say consumer=any")),
    ("expert", "int4/g32", "int8/token/dynamic", (16, 64), False, {"consumer": "any"},
     ("int4/g32 with int8/token/dynamic inputs: msModelSlim has no type for it; write int8/channel or int4/channel with"
     " int8/token/dynamic (W8A8_DYNAMIC, W4A8_DYNAMIC)")),
    ("expert", "int8/channel", "int8/tensor", (16, 64), False, {},
     f"int8/channel (W8A8): vLLM-Ascend loads it in no expert; {_8BIT}, or say consumer=any"),
    ("expert", "int8/channel", None, (16, 64), False, {},
     "int8/channel (W8A16): vLLM-Ascend loads it in no expert; write mxfp4 (W4A16_MXFP4), or say consumer=any"),
    ("expert", "mxfp4", None, (16, 64), False, {}, None),
    ("linear", "mxfp4", None, (16, 64), False, {},
     "mxfp4 (W4A16_MXFP4): vLLM-Ascend loads it in no linear; write int8/channel (W8A16), or say consumer=any"),
    ("linear", "int4/channel", None, (16, 64), False, {},
     ("int4/channel (W4A16): vLLM-Ascend reads it from files of compressed-tensors alone, in experts; write int8/channel"
     " (W8A16), or say consumer=any")),
    ("linear", "int4/channel", None, (16, 63), False, {"consumer": "any"},
     "int4/channel (W4A16): codes are packed in pairs along 63 inputs; write int8/channel"),
    ("linear", "int4/g9", None, (15, 63), False, {"consumer": "any"},
     "int4/g9 (W4A16): codes are packed in pairs along 15 outputs; write int8/channel"),
    ("linear", "int8/asym/channel", None, (16, 64), False, {},
     "int8/asym/channel (W8A16): vLLM-Ascend loads no offsets of weights; write int8/channel (W8A16), or say consumer=any"),
    ("linear", "int8/g32", "int8/token/dynamic", (16, 64), False, {},
     f"int8/g32 (W8A8_DYNAMIC): vLLM-Ascend loads a scale for each channel alone; {_8BIT}, or say consumer=any"),
    ("linear", "int8/g24", "int8/token/dynamic", (16, 64), False, {"consumer": "any"},
     "int8/g24 (W8A8_DYNAMIC): 64 inputs are no multiple of 24; write another group"),
    ("linear", "int8/asym/g32", "int8/token/dynamic", (16, 64), False, {"consumer": "any"},
     f"int8/asym/g32 with int8/token/dynamic inputs: msModelSlim has no type for it; {_8BIT}"),
    ("linear", "int8/channel", "int8/half/token/dynamic", (16, 64), False, {},
     f"input int8/half/token/dynamic: vLLM-Ascend divides by 127; {_8BIT}, or say consumer=any"),
    ("linear", "int8/channel", "int8/half/token/dynamic", (16, 64), False, {"consumer": "any"}, None),
    ("linear", "int4/channel", "int4/token/dynamic", (16, 64), False, {}, None),
    ("linear", "float8_e4m3fn/channel", "float8_e4m3fn/token/dynamic", (16, 64), False, {}, None),
    ("linear", "float8_e4m3fn/channel", "float8_e4m3fn/tensor", (16, 64), False, {"consumer": "any"},
     ("float8_e4m3fn/channel with float8_e4m3fn/tensor inputs: msModelSlim has no type for it; write int8/channel with"
     " int8/tensor or int8/asym/joint/tensor (W8A8)")),
    ("linear", "int8/tensor", "int8/token/dynamic", (16, 64), False, {"consumer": "any"},
     f"int8/tensor with int8/token/dynamic inputs: msModelSlim has no type for it; {_8BIT}"),
    ("linear", "nvfp4", None, (16, 64), False, {"consumer": "any"},
     "nvfp4 with float inputs: msModelSlim has no type for it; write int8/channel (W8A16)"),
    ("linear", "mxfp8_e4m3", "mxfp8_e4m3/dynamic", (16, 96), False, {},
     ("mxfp8_e4m3 (W8A8_MXFP8): vLLM-Ascend takes inputs that are a multiple of 64, not 96;"
     f" {_8BIT}, or say consumer=any")),
    ("linear", "mxfp8_e4m3", "mxfp8_e4m3/dynamic", (16, 128), True, {"tp": 4},
     ("mxfp8_e4m3 (W8A8_MXFP8): vLLM-Ascend takes inputs of 4 ranks that are a multiple of 64, not 32;"
     f" {_8BIT}, or say consumer=any")),
    ("linear", "mxfp8_e4m3", "mxfp8_e4m3/dynamic", (16, 128), False, {"tp": 4}, None),
    ("linear", "mxfp4", "mxfp8_e4m3/dynamic", (16, 63), False, {"consumer": "any"},
     "mxfp4 (W4A8_MXFP): codes are packed in pairs along 63 inputs; write mxfp8_e4m3"),
    ("embedding", "int8/channel", None, (16, 64), False, {"consumer": "any"},
     "msModelSlim and vLLM-Ascend quantize no embedding; keep it float"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "weight", "given", "shape", "is_row", "options", "reason"), PROBLEMS)
def test_layers(
    kind: str,
    weight: str,
    given: str | None,
    shape: tuple[int, int],
    is_row: bool,
    options: dict[str, Any],
    reason: str | None,
) -> None:
    quant = None if given is None else parse_quant(given)
    assert layer_problem(kind, parse_quant(weight), quant, shape, is_row, Wanted(**options)) == reason


@pytest.mark.parametrize("tp", [0, -1])
def test_ranks_are_a_positive_number(tp: int) -> None:
    with pytest.raises(TargetError, match=f"^ascend: tp: {tp} is not a positive number of ranks$"):
        Wanted(tp=tp)


def test_float8_has_vllm_ascends_own_name_for_vllm_ascend() -> None:
    quants = parse_quant("float8_e4m3fn/channel"), parse_quant("float8_e4m3fn/token/dynamic")
    assert tag_of(*quants) == "W8A8FP8_DYNAMIC"
    assert tag_of(*quants, Wanted(consumer="any")) == "WFP8AFP8_DYNAMIC"


def test_the_tag_of_the_whole() -> None:
    assert quant_type(["FLOAT"]) == "FLOAT"
    assert quant_type(["FLOAT", "W4A8_DYNAMIC"]) == "FLOAT"
    assert quant_type(["W4A8_DYNAMIC", "W8A8_DYNAMIC", "FLOAT"]) == "W8A8_DYNAMIC"
    assert quant_type(["W8A8", "W8A8_DYNAMIC", "W8A8_MIX"]) == "W8A8"


def test_compile_refuses_before_it_calibrates(tmp_path: Any) -> None:
    from tests.models import tiny

    tiny("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    spec = f"graphq: 1\nweight: int4/channel\n{TOKEN}"
    seen: list[int] = []

    def batches() -> Any:
        seen.append(1)
        yield (torch.zeros(1, 4, dtype=torch.int64),)

    with pytest.raises(TargetError) as caught:
        graphq.compile(tmp_path, spec, target="ascend", calibration=batches())
    assert not seen
    told = str(caught.value).splitlines()
    assert told[0].startswith(f"ascend: {Q}: int4/channel (W4A8_DYNAMIC): vLLM-Ascend loads it in no linear; ")
    assert len(told) == 7
    report = graphq.explain(tmp_path, spec, target="ascend")
    assert [line for line in report.notes if "refuses" in line] == [f"compile refuses: {line}" for line in told]
    allowed = graphq.explain(tmp_path, spec, target="ascend", target_options={"consumer": "any"})
    assert not [line for line in allowed.notes if "refuses" in line]
