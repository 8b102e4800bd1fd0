"""From dialect to dialect for one model's layers, by the other tool's conventions; and what each change is told as."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import graphq
from graphq.errors import SpecError
from graphq.frontends import DIALECTS, Converted, convert_spec, load_spec, write_spec
from graphq.frontends.convert import converted
from graphq.frontends.convert_conventions import adapted
from graphq.frontends.convert_layers import plans_of
from graphq.frontends.presets import SCHEMES
from graphq.spec.folds import EVERYWHERE, NORMS
from graphq.spec.formats import code_bits, element_name, is_asymmetric
from graphq.spec.match import Layer, Name
from graphq.spec.plan import Plan
from graphq.spec.quant import Quant
from graphq.spec.rules import Spec
from tests.frontends.test_convert import CONFIGS, FILES, decoder

BY_NAME = "the layers are named as this model has them: the text is for this model alone"


def llama(blocks: int, dtype: str = "bfloat16") -> dict[str, Layer]:
    return {fqn: dataclasses.replace(layer, dtype=dtype) for fqn, layer in decoder(blocks).items()}


@functools.cache
def matrix(blocks: int) -> dict[tuple[str, str, str], tuple[Spec, Converted] | SpecError]:
    """Every example in every other dialect, by folder, name and dialect."""
    layers = llama(blocks)
    found: dict[tuple[str, str, str], tuple[Spec, Converted] | SpecError] = {}
    for path in (*FILES, *(Path("preset") / name for name in SCHEMES)):
        spec = load_spec(path if path in FILES else path.name)
        for dialect in DIALECTS:
            if dialect not in (path.parent.name, "native"):
                try:
                    made = spec, convert_spec(spec, dialect, layers, adapt=True)
                except SpecError as error:
                    made = error
                found[path.parent.name, path.name, dialect] = made
    return found


def without_conventions(plan: Plan | None) -> list[object]:
    """What of a plan no conversion may change."""
    sides: list[Quant] = [quant for quant in (plan.weight, plan.input) if quant is not None] if plan else []
    return [
        (code_bits(q.format), element_name(q.format), is_asymmetric(q.format), q.granularity, q.dynamic) for q in sides
    ]


@pytest.mark.parametrize("blocks", [32, 6])
def test_every_layer_has_the_adapted_plan(blocks):
    layers = llama(blocks)
    for (_, _, dialect), made in matrix(blocks).items():
        if isinstance(made, SpecError):
            continue
        spec, found = made
        again = load_spec(found.text, dialect)
        plans = plans_of(again, layers)
        assert plans in (plans_of(spec, layers), plans_of(adapted(spec, dialect)[0], layers))
        before = plans_of(spec, layers)
        for fqn in layers:
            assert without_conventions(plans.get(fqn)) == without_conventions(before.get(fqn)), (fqn, dialect)
        assert [a.name for a in again.algorithms] == [a.name for a in spec.algorithms if a.name != "rtn"]
        assert not any(name != BY_NAME and " -> " not in name and ": left out: " not in name for name in found.notes)


def counts(blocks: int) -> dict[str, str]:
    """How many go where, in the order llmc, llm-compressor, amct, modelslim."""
    every, held = Counter[tuple[str, str]](), Counter[tuple[str, str]]()
    for (folder, _, dialect), made in matrix(blocks).items():
        every[folder, dialect] += 1
        held[folder, dialect] += not isinstance(made, SpecError)
    return {
        folder: " ".join(f"{held[folder, d]}/{every[folder, d]}" if (folder, d) in every else "-" for d in DIALECTS[1:])
        for folder in dict.fromkeys(folder for folder, _ in every)
    }


def test_how_many_go_where():
    """Of what is refused, most has formats, algorithms or ranges that the other tool lacks; some is for other models."""
    many = {
        "amct": "5/12 7/12 - 6/12",
        "llm-compressor": "10/17 - 4/17 9/17",
        "llmc": "- 17/22 8/22 11/22",
        "modelslim": "2/14 5/14 1/14 -",
        "native": "5/10 9/10 4/10 5/10",
        "preset": "12/19 17/19 8/19 9/19",
    }
    assert counts(32) == many
    assert counts(6) == many | {"llmc": "- 15/22 7/22 10/22"}  # three name blocks beyond the sixth


def test_all_that_is_written_is_more_than_what_is_written_strictly():
    strict = 0
    for folder, name, dialect in matrix(32):
        try:
            write_spec(load_spec(CONFIGS / folder / name if folder != "preset" else name), dialect)
            strict += 1
        except SpecError:
            pass
    assert strict == 18
    assert sum(not isinstance(made, SpecError) for made in matrix(32).values()) == 154  # of 311


def test_everywhere():
    """The integer presets go into every dialect of large language models."""
    for name in ("w8a8", "w8a8-static", "w8a16", "w4a16", "w4a16-asym"):
        for dialect in ("llmc", "llm-compressor", "modelslim"):
            assert not isinstance(matrix(32)["preset", name, dialect], SpecError)


def test_the_llmc_example_as_a_recipe():
    found = convert_spec(load_spec(CONFIGS / "llmc/mix_bits_2_blocks.yaml"), "llm-compressor", llama(32), adapt=True)
    assert found.notes == (
        BY_NAME,
        "int4/asym/g128 -> int4/asym/joint/g128: llm-compressor rounds quotient and zero point together",
        "int4/asym/joint/g128 -> int4/asym/joint/g128/source: llm-compressor computes weights in the model's dtype",
        "int8/asym/g128 -> int8/asym/joint/g128: llm-compressor rounds quotient and zero point together",
        "int8/asym/joint/g128 -> int8/asym/joint/g128/source: llm-compressor computes weights in the model's dtype",
    )
    assert (
        "\n" + found.text
        == r"""
# Keys beside the stage are arguments of llm-compressor's oneshot, which it does not read from a recipe.
propagate_error: false
quant_stage:
  quant_modifiers:
    AWQModifier:
      duo_scaling: false
    QuantizationModifier:
      config_groups:
        group_0:
          targets:
            - re:model\.layers\.[0-9]+\.self_attn\.v_proj$
            - re:model\.layers\.[0-9]+\.self_attn\.q_proj$
            - re:model\.layers\.[0-9]+\.self_attn\.k_proj$
            - re:model\.layers\.[0-9]+\.mlp\.up_proj$
            - re:model\.layers\.[0-9]+\.mlp\.gate_proj$
            - re:model\.layers\.(4|5|6|7|8|9|10|11|12|13|14|15|16|17|18|19|20|21|22|23|24|25|26|27)\.mlp\.down_proj$
          weights:
            num_bits: 4
            type: int
            symmetric: false
            strategy: group
            group_size: 128
            dynamic: false
        group_1:
          targets:
            - re:model\.layers\.(0|1|2|3|28|29|30|31)\.mlp\.down_proj$
          weights:
            num_bits: 8
            type: int
            symmetric: false
            strategy: group
            group_size: 128
            dynamic: false
"""
    )


def test_a_recipe_as_mix_bits():
    found = convert_spec(load_spec(CONFIGS / "llm-compressor/int4_int8_gptq.yaml"), "llmc", llama(32), adapt=True)
    assert found.notes == (
        BY_NAME,
        "int4/asym/joint/g128/source -> int4/asym/joint/g128: graphq computes LLMC's weights in float32",
        "int4/asym/joint/g128 -> int4/asym/g128: LLMC rounds the quotient, then adds the zero point",
        "int8/half/g128/source -> int8/half/g128: graphq computes LLMC's weights in float32",
        "int8/half/g128 -> int8/g128: LLMC divides the extreme by 2^(bits-1) - 1",
    )
    assert (
        "\n" + found.text
        == """
quant:
    method: GPTQ
    weight:
        bit: 4
        symmetric: false
        granularity: per_group
        group_size: 128
    special:
        actorder: true
        static_groups: true
        percdamp: 0.01
        blocksize: 128
        true_sequential: false
    quant_out: true
    mix_bits:
        setting_0:
            layer_name: [mlp.down_proj]
            do_quant: true
            weight:
                bit: 8
                symmetric: true
                granularity: per_group
                group_size: 128
"""
    )


def test_a_preset_in_msmodelslim():
    found = convert_spec(load_spec("w8a8"), "modelslim", llama(32), adapt=True)
    assert found.notes == (
        BY_NAME,
        "int8/channel -> int8/channel/source: msModelSlim computes weights in the model's dtype",
    )
    with pytest.raises(SpecError) as caught:
        convert_spec(load_spec("w8a8"), "modelslim", llama(32))
    assert caught.value.problems[0] == (
        "int8/channel: msModelSlim computes such weights in the model's dtype; write int8/channel/source"
    )
    assert (
        "\n" + found.text
        == """
apiversion: modelslim_v1
metadata:
  config_id: graphq
spec:
  runner: layer_wise
  process:
    - type: linear_quant
      qconfig:
        act:
          scope: per_token
          dtype: int8
          symmetric: true
          method: minmax
        weight:
          scope: per_channel
          dtype: int8
          symmetric: true
          method: minmax
      include:
        - model.layers.*.self_attn.q_proj
        - model.layers.*.self_attn.k_proj
        - model.layers.*.self_attn.v_proj
        - model.layers.*.self_attn.o_proj
        - model.layers.*.mlp.gate_proj
        - model.layers.*.mlp.up_proj
        - model.layers.*.mlp.down_proj
"""
    )


def test_msmodelslim_as_a_recipe():
    found = convert_spec(load_spec(CONFIGS / "modelslim/w8a8_static.yaml"), "llm-compressor", llama(32), adapt=True)
    assert found.notes == (
        "int8/channel/source -> int8/half/channel/source: llm-compressor divides the extreme by (2^bits - 1) / 2",
        "int8/tensor -> int8/half/tensor: llm-compressor divides the extreme by (2^bits - 1) / 2",
        "smooth-quant: statistic magnitude -> range: llm-compressor's SmoothQuant measures from smallest to largest",
        "run.target ascend: left out: a recipe does not say it",
    )
    assert (
        "\n" + found.text
        == r"""
quant_stage:
  quant_modifiers:
    SmoothQuantModifier: {}
    QuantizationModifier:
      config_groups:
        group_0:
          targets:
            - re:.*\.down_proj$
      ignore:
        - lm_head
  quant_1_modifiers:
    QuantizationModifier:
      config_groups:
        group_0:
          targets:
            - re:(?!.*\.down_proj$)(?!lm_head$).*$
          weights:
            num_bits: 8
            type: int
            symmetric: true
            strategy: channel
            dynamic: false
          input_activations:
            num_bits: 8
            type: int
            symmetric: true
            strategy: tensor
            dynamic: false
            observer: static_minmax
"""
    )


def doc(weight: str = "int8/channel", input: str | None = None, *algorithms: object, **more: object) -> dict[str, Any]:
    """A spec in the native form."""
    given = {"graphq": 1, "weight": weight, **({"input": input} if input else {}), **more}
    return given | ({"algorithms": [*algorithms]} if algorithms else {})


GPTQ = {"gptq": {"scales": "plan", "act_order": "none"}}
DYNAMIC = "int8/token/dynamic"
NOTES: list[tuple[dict[str, Any], str, str]] = [
    (doc(), "llm-compressor", "int8/channel -> int8/half/channel: llm-compressor divides the extreme by (2^bits - 1) / 2"),
    (doc(), "amct", "int8/channel -> int8/by_sign/channel: AMCT divides a negative extreme by 2^(bits-1)"),
    (doc("int8/half/channel"), "llmc", "int8/half/channel -> int8/channel: LLMC divides the extreme by 2^(bits-1) - 1"),
    (doc("int4/asym/g128"), "modelslim", "int4/asym/g128 -> int4/asym/joint/g128: msModelSlim rounds quotient and zero point together"),
    (doc("int4/asym/joint/g128"), "llmc", "int4/asym/joint/g128 -> int4/asym/g128: LLMC rounds the quotient, then adds the zero point"),
    (doc("mxfp8_e4m3"), "llm-compressor", "mxfp8_e4m3 -> mxfp8_e4m3/even: llm-compressor finds shared exponents by the rule even"),
    (doc("mxfp8_e4m3", "mxfp8_e4m3/dynamic"), "modelslim", "mxfp8_e4m3/dynamic -> mxfp8_e4m3/ascend/dynamic: msModelSlim finds shared exponents by the rule ascend"),
    (doc("mxfp4"), "amct", "mxfp4 -> mxfp4/amct: AMCT finds shared exponents by the rule amct"),
    (doc("hifloat8/channel", "hifloat8/token/dynamic"), "amct", "hifloat8/token/dynamic -> hifloat8/to15/token/dynamic: AMCT takes a token's extreme to 15"),
    (doc("hifloat8/channel", "hifloat8/tensor/dynamic"), "amct", "hifloat8/tensor/dynamic -> hifloat8/unit/tensor/dynamic: AMCT casts inputs without a scale"),
    (doc("float8_e4m3fn/pow2/channel"), "llmc", "float8_e4m3fn/pow2/channel -> float8_e4m3fn/channel: LLMC takes the extreme to the format's largest value"),
    (doc("int4/g128/mse"), "llmc", "int4/g128/mse -> int4/g128/mse0.2:100:2.4:20: LLMC's mse has the norm 2.4 and tries every candidate"),
    (doc("int8/half/channel/source"), "llmc", "int8/half/channel/source -> int8/half/channel: graphq computes LLMC's weights in float32"),
    (doc("mxfp4/ascend/source"), "llm-compressor", "mxfp4/ascend/source -> mxfp4/ascend: graphq computes llm-compressor's weights in float32"),
    (doc("nvfp4"), "llm-compressor", "nvfp4 -> nvfp4/source: llm-compressor computes weights in the model's dtype"),
    (doc("int4/half/g128/source"), "modelslim", "int4/g128/source -> int4/g128: msModelSlim computes such weights in float32"),
    (doc("int8/half/channel/source"), "modelslim", "int8/half/channel/source -> int8/channel/source: msModelSlim divides the extreme by 2^(bits-1) - 1"),
    (doc("int4/half/g128/mse"), "llmc", "int4/half/g128/mse -> int4/g128/mse0.2:100:2.4:20: LLMC divides the extreme by 2^(bits-1) - 1; LLMC's mse has the norm 2.4 and tries every candidate"),
    (doc("int8/channel", "int8/tensor/ema"), "modelslim", "int8/tensor/ema -> int8/tensor: msModelSlim takes the extremes of all batches"),
    (doc("int8/channel", "int8/tensor/ema"), "amct", "int8/tensor/ema -> int8/by_sign/tensor: AMCT divides a negative extreme by 2^(bits-1); AMCT takes the extremes of all batches"),
    (doc(cache="int8/asym/channel"), "modelslim", "int8/asym/channel -> int8/asym/joint/channel: msModelSlim rounds quotient and zero point together"),
    (doc("int8/channel", None, "awq"), "llm-compressor", "awq: clip true -> false: llm-compressor's AWQ does not clip"),
    (doc("int8/channel", None, "awq"), "modelslim", "awq: duo null -> false: msModelSlim's AWQ looks at inputs alone"),
    (doc("int8/channel", None, "awq"), "llmc", "awq: duo null -> false: LLMC's awq has no duo null"),
    (doc("int8/channel", None, {"awq": {"n_grid": 10}}), "llmc", "awq: n_grid 10 -> 20: LLMC has no such option"),
    (doc("int8/channel", None, {"awq": {"power": 4}}), "llm-compressor", "awq: power 4 -> 2: llm-compressor's AWQ measures squared errors"),
    (doc("int8/channel", None, {"awq": {"where": "multiply"}}), "llm-compressor", "awq: where multiply -> fold: llm-compressor's AWQ folds factors into what stands in front"),
    (doc("int8/channel", None, "awq"), "amct", "awq: power 2 -> 4: AMCT's AWQ measures errors to the fourth power"),
    (doc("int8/channel", None, "awq"), "amct", "awq: where fold -> multiply: AMCT's AWQ multiplies inputs at run time"),
    (doc("int8/channel", None, "gptq"), "amct", "prefix quantized -> float: AMCT calibrates every block on what float ones give"),
    (doc("int8/channel", None, "gptq"), "llmc", "gptq: scales search -> plan: LLMC's GPTQ takes the range's scales, and searches none"),
    (doc("int8/channel", None, "gptq"), "modelslim", "gptq: act_order static -> none: msModelSlim's GPTQ leaves columns in their order"),
    (doc("int8/channel", None, {"gptq": {"dampening": 0.1}}), "amct", "gptq: dampening 0.1 -> 0.01: AMCT has no such option"),
    (doc("int8/channel", DYNAMIC, {"auto-round": {"lr": 0.01}}), "modelslim", "auto-round: lr 0.01 -> null: msModelSlim has no such option"),
    (doc("int8/channel", DYNAMIC, "smooth-quant"), "llm-compressor", "smooth-quant: statistic magnitude -> range: llm-compressor's SmoothQuant measures from smallest to largest"),
    (doc("int8/channel", DYNAMIC, "smooth-quant"), "amct", "smooth-quant: where fold -> multiply: AMCT's SmoothQuant multiplies inputs at run time"),
    (doc("int8/channel", DYNAMIC, {"smooth-quant": {"where": "multiply"}}), "llm-compressor", "smooth-quant: where multiply -> fold: llm-compressor's SmoothQuant folds factors into what stands in front"),
    (doc("int8/channel", None, {"rotate": {"r2": False, "kind": "hadamard"}}), "llmc", "rotate: kind hadamard -> random_hadamard: LLMC's rotate has no kind hadamard"),
    (doc(prefix="float"), "llmc", "prefix float -> quantized: LLMC calibrates each block on what those in front of it give by then"),
    (doc("int8/channel", None, GPTQ, pipeline="independent"), "llmc", "pipeline independent -> sequential: LLMC goes from block to block"),
    (doc("int8/channel", None, GPTQ, prefix="float"), "modelslim", "prefix float -> quantized: msModelSlim calibrates each block on what those in front of it give by then"),
    (doc(run={"samples": 128}), "modelslim", "run.samples 128: left out: an msModelSlim config does not say it"),
    (doc(run={"target": "onnx"}), "llmc", "run.target onnx: left out: an LLMC config does not say it"),
    (doc(run={"seed": 1}), "llm-compressor", "run.seed 1: left out: a recipe does not say it"),
    (doc(run={"model": "m"}), "amct", "run.model m: left out: an AMCT config does not say it"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "dialect", "note"), NOTES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_note_for_each_change(given, dialect, note):
    found = convert_spec(load_spec(given), dialect, llama(2), adapt=True)
    assert found.notes.count(note) == 1


ADVICE = "llm-compressor: blocks: a target says nothing of repeated blocks; write re: and a regular expression, or kind:linear and a rule that keeps lm_head float"
NAMES = "with --model MODEL_DIR, layers can be said by their names"


@pytest.mark.parametrize(
    ("given", "dialect", "options", "lines"),
    [
        (
            doc("int4/g128", None, "gptq"), "llm-compressor", {},
            [ADVICE, "llm-compressor: gptq: scales is search; llm-compressor's is plan", "llm-compressor: int4/g128: compressed-tensors' 4-bit integers are int4/half", f"{NAMES}; with --adapt, in llm-compressor's own conventions"],
        ),
        (
            doc("int4/g128", None, "gptq"), "llm-compressor", {"layers": llama(2)},
            ["llm-compressor: gptq: scales is search; llm-compressor's is plan", "llm-compressor: int4/g128: compressed-tensors' 4-bit integers are int4/half", "with --adapt, in llm-compressor's own conventions"],
        ),
        (doc("int4/g128", None, "gptq"), "llm-compressor", {"adapt": True}, [ADVICE, NAMES]),
        (doc("int4/half/g128/source"), "llm-compressor", {}, [ADVICE, NAMES]),
        (doc("int8/channel", None, "gptq"), "llmc", {}, ["llmc: gptq: scales: 'search': LLMC's GPTQ has no such setting", "with --adapt, in LLMC's own conventions"]),
        (
            doc("int4/g128", DYNAMIC), "modelslim", {"layers": llama(2), "adapt": True},
            ["weight int4/g128, input int8/token/dynamic: msModelSlim has no such pair; its int4 groups under int8 activations are over_int8"],
        ),
        (
            doc("int4/g128", rules=[{"match": "=lm_head", "weight": "int8/channel"}]), "llmc", {"layers": llama(2), "adapt": True},
            ["llmc: lm_head: weight int8/channel: LLMC quantizes layers of blocks alone"],
        ),
        (
            doc(), "amct", {"layers": llama(2, "float32"), "adapt": True},
            ["amct: model.layers.0.self_attn.q_proj: weight int8/by_sign/channel: needs dtype bfloat16|float16: the weight is float32"],
        ),
        (
            doc(rules=[{"match": "up_prj", "weight": "int4/g128"}]), "modelslim", {"layers": llama(2)},
            ["rules[0]: up_prj matches no layer; did you mean up_proj?"],
        ),
        (
            {"graphq": 1, "rules": [{"match": "blocks", "weight": "int8/channel", "only_if": ["K % 7"]}]}, "llmc", {"layers": llama(2)},
            ["llmc: no layer of this model is quantized", "llmc: blocks: only_if: K % 7: LLMC has no constraints"],
        ),
        (
            doc("int8/channel", None, {"awq": {"match": "q_proj#0"}}), "modelslim", {"layers": llama(2), "adapt": True},
            ["awq: q_proj#0: msModelSlim chooses what factors are folded into, not the layers that are scaled; write folds instead of match"],
        ),
        (doc("int8/channel/ssz/source"), "llm-compressor", {"layers": llama(2), "adapt": True}, ["llm-compressor: int8/half/channel/ssz: llm-compressor has no observer like ssz"]),
        (doc("int4/g128/hqq"), "llm-compressor", {"layers": llama(2), "adapt": True}, ["llm-compressor: int4/half/g128/hqq: llm-compressor has no observer like hqq"]),
        (
            doc("int8/channel", None, "equalize"), "llm-compressor", {"layers": llama(2), "adapt": True},
            ["llm-compressor: equalize: llm-compressor has no such algorithm"],
        ),
        (doc(), "ollm", {}, ["'ollm' is not a dialect; did you mean llmc? (known: native, llmc, llm-compressor, amct, modelslim)"]),
    ],
    ids=[str(number) for number in range(15)],
)  # fmt: skip
def test_what_is_refused(given, dialect, options, lines):
    with pytest.raises(SpecError) as caught:
        convert_spec(load_spec(given), dialect, **options)
    assert list(caught.value.problems) == lines


def moe() -> dict[str, Layer]:
    """The first block is dense, in the others four experts share a router."""
    layers = [Layer("model.embed_tokens", "embedding", (256, 128), named_only="embedding")]
    for b in range(3):
        layers += [Layer(f"model.layers.{b}.self_attn.{p}_proj", "linear", (256, 256), b) for p in "qkvo"]
        names = ("gate_proj", "up_proj", "down_proj")
        if b == 0:
            layers += [Layer(f"model.layers.{b}.mlp.{p}", "linear", (256, 256), b) for p in names]
            continue
        layers.append(Layer(f"model.layers.{b}.mlp.gate", "linear", (4, 256), b, "router"))
        layers += [
            Layer(f"model.layers.{b}.mlp.experts.{e}.{p}", "expert", (256, 256), b) for e in range(4) for p in names
        ]
    layers.append(Layer("lm_head", "linear", (256, 256), named_only="output head"))
    return {layer.fqn: layer for layer in layers}


def test_experts_are_named_at_once():
    given = doc(rules=[{"match": "experts", "weight": "int4/channel", "input": DYNAMIC}], input=DYNAMIC)
    found = yaml.safe_load(convert_spec(load_spec(given), "llm-compressor", moe(), adapt=True).text)
    groups = found["quant_stage"]["quant_modifiers"]["QuantizationModifier"]["config_groups"]
    assert groups["group_1"]["targets"] == [
        rf"re:model\.layers\.[0-9]+\.mlp\.experts\.[0-9]+\.{p}_proj$" for p in ("up", "gate", "down")
    ]
    found = yaml.safe_load(convert_spec(load_spec(given), "modelslim", moe(), adapt=True).text)
    assert found["spec"]["process"][0]["configs"][0]["include"] == [
        f"model.layers.*.mlp.experts.*.{p}_proj" for p in ("gate", "up", "down")
    ]


@pytest.mark.parametrize("dialect", ["llmc", "llm-compressor", "amct", "modelslim"])
@pytest.mark.parametrize("match", ["experts#2", "*.experts.3.*", "q_proj#1", "mlp"])
def test_odd_layers_are_named_one_by_one(match, dialect):
    layers = {fqn: dataclasses.replace(layer, dtype="bfloat16") for fqn, layer in moe().items()}
    spec = load_spec(doc("int4/asym/joint/g128", rules=[{"match": match, "weight": "int8/asym/joint/g128/source"}]))
    found = convert_spec(spec, dialect, layers, adapt=True)
    assert plans_of(load_spec(found.text, dialect), layers) == plans_of(adapted(spec, dialect)[0], layers)
    kept = load_spec(doc("int4/asym/joint/g128", rules=[{"match": match, "float": True}]))
    found = convert_spec(kept, dialect, layers, adapt=True)
    assert plans_of(load_spec(found.text, dialect), layers) == plans_of(adapted(kept, dialect)[0], layers)


def test_algorithms_keep_their_layers():
    """GPTQ for some layers, AWQ for others, by the names that each dialect has for them."""
    spec = load_spec(CONFIGS / "native/awq_gptq.yaml")
    again = load_spec(convert_spec(spec, "llm-compressor", llama(4), adapt=True).text, "llm-compressor")
    awq, gptq = again.algorithms
    assert [str(match) for match in awq.match] == ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$", "re:.*o_proj$"]
    assert [str(match) for match in gptq.match] == [
        rf"re:model\.layers\.[0-9]+\.mlp\.{p}_proj$" for p in ("up", "gate", "down")
    ]
    smooth = load_spec(doc("int8/channel", DYNAMIC, {"smooth-quant": {"match": ["o_proj", "mlp.down_proj"]}}))
    with pytest.raises(SpecError, match="chooses what factors are folded into, not the layers that are scaled"):
        convert_spec(smooth, "modelslim", llama(4))
    everywhere = load_spec(doc("int8/channel", DYNAMIC, {"smooth-quant": {"match": ["self_attn", "mlp"]}}))
    again = convert_spec(everywhere, "llmc", llama(4), adapt=True)
    (found,) = load_spec(again.text, "llmc").algorithms
    assert (found.match, found.folds) == ((), NORMS)
    assert "smooth-quant: folds everything -> norm-linear: LLMC does not choose" in again.notes


def test_smoothing_that_folds_everywhere_has_mappings_for_every_layer():
    everywhere = {"smooth-quant": {"statistic": "range"}}
    text = convert_spec(load_spec(doc("int8/half/channel/source", None, everywhere)), "llm-compressor", llama(4)).text
    (found,) = load_spec(text).algorithms
    assert [str(match) for match in found.match] == [
        f"re:.*{p}_proj$" for p in ("q", "k", "v", "o", "gate", "up", "down")
    ]
    some = {"smooth-quant": {"match": ["re:.*o_proj$"]}}
    (found,) = load_spec(
        convert_spec(
            load_spec(doc("int8/half/channel/source", None, some)), "llm-compressor", llama(4), adapt=True
        ).text
    ).algorithms
    assert ([str(match) for match in found.match], found.folds) == (["re:.*o_proj$"], EVERYWHERE)


def test_what_a_dialect_holds_is_as_it_was():
    for path in FILES:
        spec = load_spec(path)
        if path.parent.name != "native":
            assert convert_spec(spec, path.parent.name, adapt=True) == Converted(write_spec(spec, path.parent.name))
        assert convert_spec(spec, "native", llama(2), adapt=True) == Converted(write_spec(spec, "native"))
    assert graphq.convert_spec is convert_spec


def test_what_is_read_otherwise_is_refused():
    """Nothing of a writer is taken on trust: the text is read again, and every layer compared."""
    spec, other = load_spec(doc()), load_spec(doc("int4/g128"))
    problems = {
        "llmc: model.layers.0.self_attn.q_proj: it would be read as weight int4/g128, and is weight int8/channel": other,
        "llmc: prefix: it would be read as float, and is quantized": dataclasses.replace(spec, prefix="float"),
    }
    for problem, read in problems.items():
        with pytest.raises(SpecError) as caught:
            converted(spec, "llmc", refuse_once(), lambda _, read=read: read, llama(2))
        assert caught.value.problems[0] == problem
    with pytest.raises(SpecError) as caught:
        converted(spec, "llmc", refuse_once(), lambda _: other, adapt=True)
    assert caught.value.problems[0] == "llmc: plans: they would be read as weight int4/g128"
    asked = load_spec(doc("int8/channel", None, "awq"))
    some = dataclasses.replace(asked, algorithms=(dataclasses.replace(asked.algorithms[0], match=(Name("q_proj"),)),))
    with pytest.raises(SpecError) as caught:
        converted(asked, "llmc", refuse_once(), lambda _: some, llama(2))
    assert caught.value.problems[0] == (
        "llmc: awq: its layers cannot be named; one of them is model.layers.0.mlp.down_proj"
    )


def refuse_once() -> Callable[[Spec], str]:
    """A writer that refuses the first spec that it is given."""
    seen: list[Spec] = []

    def write(spec: Spec) -> str:
        seen.append(spec)
        if len(seen) == 1:
            raise SpecError("no")
        return "text\n"

    return write


def test_compressed_tensors_takes_the_groups():
    """What is written as config_groups is valid for the library that reads it."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    count = 0
    for (_, _, dialect), made in matrix(32).items():
        if dialect != "llm-compressor" or isinstance(made, SpecError):
            continue
        stage = yaml.safe_load(made[1].text)["quant_stage"]
        for fields in (fields for group in stage.values() for fields in group.values()):
            if "config_groups" in fields:
                config = {"config_groups": fields["config_groups"], "ignore": fields.get("ignore", [])}
                quantization.QuantizationConfig.model_validate(config)
                for scheme in fields["config_groups"].values():
                    quantization.QuantizationScheme.model_validate(scheme)
                    count += 1
    assert count > 60
