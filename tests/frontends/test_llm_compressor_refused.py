"""llm-compressor's recipes that are refused, with all problems, and which message each has."""

from typing import Any

import pytest

from graphq.errors import SpecError
from graphq.frontends import load_spec, print_spec
from tests.frontends.test_llm_compressor_keys import PREFIX, ROUND, RTN, group, inputs, scheme, several, weights


def problems(recipe: dict[str, Any]) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load_spec(recipe)
    return [problem.removeprefix(PREFIX) for problem in caught.value.problems]


SAME = "stores groups in another order, which compressed-tensors has given up; write static"
ARGS = "config_groups.g.weights."


@pytest.mark.parametrize(
    ("recipe", "found"),
    [
        (scheme("W4A8_FP8"), ["scheme: 'W4A8_FP8' is not a preset; did you mean W4AFP8?"]),
        (scheme("w8a4"), ["scheme: 'w8a4' is not a preset; did you mean W8A8?"]),
        (scheme(4), ["scheme: 4 is not a mapping"]),
        (scheme({}), ["scheme: is empty: it quantizes nothing"]),
        (scheme({"W4A16": ["Linear"], "weights": {}}), ["scheme.W4A16: neither a preset nor a key of a scheme"]),
        (scheme({"weight": {}}), ["scheme.weight: neither a preset nor a key of a scheme; did you mean weights?"]),
        (scheme(config_groups={}), ["scheme: stands beside config_groups; write one of them"]),
        (scheme(target=["Linear"]), ["target: unknown key; did you mean targets?"]),
        (scheme(targets=[]), ["targets: names no layer"]),
        (scheme(targets={"a": 1}), ["targets: a mapping is not a list of names, classes, or re: and a regular expression"]),
        (scheme(targets=["Linaer", "re:(", "re:", 3, "a b", "LlamaAttention", "Module"]), [
            "targets[0]: Linaer: layers of this class are not known; did you mean Linear? (known: Linear, LinearBase, Embedding, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d; others by name, or by re: and a regular expression)",
            "targets[1]: re:(: missing ), unterminated subpattern at position 0",
            "targets[2]: re: an empty pattern matches every layer; write re:.*",
            "targets[3]: 3 is not a name, a class, or re: and a regular expression",
            "targets[4]: 'a b' is not a layer name: write dotted segments, such as model.layers.0.mlp.down_proj",
            "targets[5]: LlamaAttention: what attention reads is a group of its own, of input_activations alone",
            "targets[6]: Module: layers of this class are not known (known: Linear, LinearBase, Embedding, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d; others by name, or by re: and a regular expression)",
        ]),
        (scheme(ignore=[3, "re:["]), [
            "ignore[0]: 3 is not a name, a class, or re: and a regular expression",
            "ignore[1]: re:[: unterminated character set at position 0",
        ]),
        (scheme(ignore={"a": 1}), ["ignore: a mapping is not a list of names"]),
        (scheme(observer={"weight": "mse"}), ["observer.weight: unknown key; did you mean weights?"]),
        (scheme(weight_observer="hist", input_observer="imatrix_mse"), [
            "weight_observer: 'hist' is not an observer",
            "input_observer: the observer imatrix_mse, which weighs errors by the inputs, is not supported"]),
        (scheme("MXFP4", weight_observer="mse"), ["scheme: mxfp4/even/mse: mxfp4/even takes its scales from the extremes; leave out mse"]),
        (scheme(bypass_divisibility_checks="x"), ["bypass_divisibility_checks: 'x' is not true or false"]),
        (weights(strategy="attn_head"), [f"{ARGS}strategy: attn_head is for what attention reads; see kv_cache_scheme"]),
        (scheme(kv_cache_scheme={"strategy": "channel"}), ["kv_cache_scheme.strategy: channel is for weights; activations take tensor, token, group or tensor_group"]),
        (weights(num_bit=8), [f"{ARGS}num_bit: unknown key; did you mean num_bits?"]),
        (weights(num_bits=1), [f"{ARGS}num_bits: bits: 1 is not one of 2 to 8 or 16"]),
        (weights(num_bits=16), ["config_groups.g.weights: weight: int16/half/tensor has 16 bits; weights hold 2 to 8"]),
        (weights(num_bits=4.0), [f"{ARGS}num_bits: 4.0 is not an integer"]),
        (weights(num_bits=None), [f"{ARGS}num_bits: an empty value is not an integer"]),
        (weights(type="flaot"), [f"{ARGS}type: 'flaot' is not int or float"]),
        (weights(type="float", num_bits=6), [f"{ARGS}num_bits: float formats have 4 or 8 bits, not 6"]),
        (weights(type="float", symmetric=False), [f"{ARGS}symmetric: float formats are symmetric"]),
        (weights(symmetric=1), [f"{ARGS}symmetric: 1 is not true or false"]),
        (weights(group_size=0), [f"{ARGS}group_size: 0 is neither positive, for groups, nor -1, for channels"]),
        (weights(group_size=-2), [f"{ARGS}group_size: -2 is neither positive, for groups, nor -1, for channels"]),
        (weights(group_size=10**9), [f"{ARGS}group_size: 1000000000 is not a positive integer"]),
        (weights(group_size=64, strategy="channel"), [f"{ARGS}group_size: the strategy is channel; groups have the strategy group"]),
        (weights(strategy="group"), [f"{ARGS}group_size: the strategy group needs a positive one"]),
        (weights(strategy="group", group_size=-1), [f"{ARGS}group_size: the strategy group needs a positive one"]),
        (weights(strategy="chanel"), [f"{ARGS}strategy: 'chanel' is not a strategy; did you mean channel?"]),
        (weights(strategy="block"), [f"{ARGS}block_structure: belongs to the strategy block, and it to this"]),
        (weights(block_structure=[2, 2]), [f"{ARGS}block_structure: belongs to the strategy block, and it to this"]),
        (weights(strategy="block", block_structure="2x"), [f"{ARGS}block_structure: '2x' is not [rows, columns], such as [128, 128]"]),
        (weights(strategy="block", block_structure=[0, 2]), [f"{ARGS}block_structure: block rows: 0 is not a positive integer"]),
        (weights(strategy="token"), [f"{ARGS}strategy: token is for activations; weights take tensor, channel, group, block or tensor_group"]),
        (weights(dynamic=True), [f"{ARGS}dynamic: a weight's scales are known when it is compiled; write false"]),
        (weights(dynamic="x"), [f"{ARGS}dynamic: 'x' is not true, false or local"]),
        (weights(actorder="group"), [f"{ARGS}actorder: 'group' {SAME}"]),
        (weights(actorder=True), [f"{ARGS}actorder: True {SAME}"]),
        (weights(actorder="x"), [f"{ARGS}actorder: 'x' is not static, weight or null"]),
        (weights(scale_dtype="float8_e4m3fn"), [f"{ARGS}scale_dtype: scales of integers stay float32; float8_e4m3fn is not supported"]),
        (weights(scale_dtype="torch.float9"), [f"{ARGS}scale_dtype: 'torch.float9' is not a dtype; did you mean float64?"]),
        (weights(zp_dtype="torch.uint8", symmetric=False), [f"{ARGS}zp_dtype: zero points of integers are int8, not uint8"]),
        (weights(strategy="tensor_group", group_size=16), [f"{ARGS}strategy: tensor_group is for 4-bit floats in groups of 16"]),
        (weights(type="float", strategy="tensor_group", group_size=32), [f"{ARGS}strategy: tensor_group is for 4-bit floats in groups of 16"]),
        (weights(type="float", strategy="tensor_group", group_size=16, scale_dtype="uint8"), [f"{ARGS}scale_dtype: scales under a scale of the tensor are float8_e4m3fn, not uint8"]),
        (weights(type="float", group_size=64, scale_dtype="uint8"), [f"{ARGS}scale_dtype: uint8, a scale that is an exponent, is for groups of 32"]),
        (weights(type="float", group_size=32, scale_dtype="float8_e4m3fn"), [f"{ARGS}scale_dtype: float8_e4m3fn is not supported here; leave it out"]),
        (weights(observer="nvfp4_expanded_mse"), [f"{ARGS}observer: the observer nvfp4_expanded_mse, which searches beyond the extremes, is not supported"]),
        (weights(observer="mse", observer_kwargs={"grid": 10.5}), [f"{ARGS}observer_kwargs: grid: 10.5 is not a whole number"]),
        (weights(observer="mse", observer_kwargs={"expand": 1.8, "norm": "a", "x": 1}), [
            f"{ARGS}observer_kwargs.x: unknown key",
            f"{ARGS}observer_kwargs.norm: 'a' is not a number",
            f"{ARGS}observer_kwargs.expand: a search beyond the extremes is not supported; write 1"]),
        (inputs(strategy="channel"), ["config_groups.g.input_activations.strategy: channel is for weights; activations take tensor, token, group or tensor_group"]),
        (inputs(strategy="token"), ["config_groups.g.input_activations.strategy: scales of tokens exist only at run time; write dynamic: true"]),
        (inputs(group_size=128), ["config_groups.g.input_activations.strategy: scales of groups exist only at run time; write dynamic: true"]),
        (inputs(num_bits=3), ["config_groups.g.input_activations: input: int3/half/tensor/ema has 3 bits; activations hold 4, 6, 8 or 16"]),
        (inputs(dynamic="local"), ["config_groups.g.input_activations.dynamic: local belongs to the strategy tensor_group, not to tensor"]),
        (inputs(observer="memoryless_mse"), ["config_groups.g.input_activations.observer: memoryless_mse sees the last batch alone; write mse"]),
        (inputs(actorder="static"), ["config_groups.g.input_activations.actorder: is for weights"]),
        (inputs(observer_kwargs={"averaging_constant": 0}), ["config_groups.g.input_activations.observer_kwargs: ema: 0.0 is not a number above 0 and up to 1"]),
        (inputs(num_bits=4, type="float", strategy="tensor_group", group_size=16), [
            "config_groups.g.input_activations.dynamic: an activation's groups have their scales at run time; write local"]),
        (group(weights={}, output_activations={}), ["config_groups.g.output_activations: quantized outputs are not supported; write null"]),
        (group(weights={}, format="mixed-precision"), ["config_groups.g.format: 'mixed-precision' is not the format of a group"]),
        (group(weights={}, format="marlin-24"), ["config_groups.g.format: marlin-24 is withdrawn by compressed-tensors, and not supported"]),
        (group(weights={}, format="int-quantized"), ["config_groups.g.format: int-quantized does not hold weight int8/half/tensor/source; pack-quantized or naive-quantized does"]),
        (group(format="pack-quantized"), ["config_groups.g.format: pack-quantized does not hold what is not quantized; dense does"]),
        (weights(type="float", num_bits=8, format=0), [f"{ARGS}format: unknown key"]),
        (scheme(None, config_groups={"g": {"weights": {}}, "W4A7": ["Linear"], "h": 3}), [
            "config_groups.g.targets: is missing",
            "config_groups.W4A7: 'W4A7' is not a preset; did you mean W4A8?",
            "config_groups.h: 3 is not a mapping"]),
    ],
)  # fmt: skip
def test_refused(recipe, found):
    assert problems(recipe) == found


@pytest.mark.parametrize(
    ("modifiers", "found"),
    [
        ([("SparseGPTModifier", {"sparsity": 0.5})], ["[0].SparseGPTModifier: pruning is not supported"]),
        ([("QuIPModifier", {}), RTN], ["[0].QuIPModifier: rotations of single layers at run time are not supported; SpinQuantModifier rotates a model"]),
        ([("LogarithmicEqualizationModifier", {}), RTN], ["[0].LogarithmicEqualizationModifier: logarithmic equalization is not supported; write SmoothQuantModifier"]),
        ([("GPTQModifer", {}), RTN], ["[0].GPTQModifer: unknown modifier; did you mean GPTQModifier?"]),
        ([("QuantizationModifier", {})], ["[0].QuantizationModifier: quantizes nothing; write scheme or config_groups"]),
        ([("QuantizationModifier", 3)], ["[0].QuantizationModifier: 3 is not a mapping", "[0].QuantizationModifier: quantizes nothing; write scheme or config_groups"]),
        ([RTN, ("AWQModifier", {})], ["[1].AWQModifier: no modifier behind it quantizes; add a QuantizationModifier or a GPTQModifier"]),
        ([RTN, ("SpinQuantModifier", {})], ["[1].SpinQuantModifier: stands behind another modifier; a model is rotated before anything else"]),
        ([("GPTQModifier", {"scheme": "W4A16", "actorder": "group"})], [f"[0].GPTQModifier.actorder: 'group' {SAME}"]),
        ([("GPTQModifier", {"scheme": "W4A16", "block_size": "x", "dampening_frac": None, "percdamp": 1})], [
            "[0].GPTQModifier.percdamp: unknown key",
            "[0].GPTQModifier.block_size: 'x' is not an integer",
            "[0].GPTQModifier.dampening_frac: an empty value is not a number"]),
        ([("GPTQModifier", {"actorder": None, "config_groups": {"g": {"targets": ["Linear"], "weights": {"actorder": "weight"}}}})], [
            "[0].GPTQModifier.config_groups.g.weights.actorder: static is not the actorder of the modifier, null; write one of them"]),
        ([("AWQModifier", {"duo_scaling": "no", "mappings": [{"smooth_layer": "a"}, 3, {"balance_layers": ["a"], "x": 1}], "n_grid": 1.5}), RTN], [
            "[0].AWQModifier.duo_scaling: 'no' is not true, false or both",
            "[0].AWQModifier.n_grid: 1.5 is not an integer",
            "[0].AWQModifier.mappings[0].balance_layers: is missing",
            "[0].AWQModifier.mappings[1]: 3 is not a mapping with smooth_layer and balance_layers",
            "[0].AWQModifier.mappings[2].x: unknown key",
            "[0].AWQModifier.mappings[2].smooth_layer: is missing"]),
        ([("AWQModifier", {"duo_scaling": 1}), RTN], ["[0].AWQModifier.duo_scaling: 1 is not true, false or both"]),
        ([("SmoothQuantModifier", {"smoothing_strength": "a", "ignore": ["x"], "mappings": [["a"]], "algorithm": "log_equalization"}), RTN], [
            "[0].SmoothQuantModifier.smoothing_strength: 'a' is not a number",
            "[0].SmoothQuantModifier.algorithm: logarithmic equalization is not supported; write smoothquant",
            "[0].SmoothQuantModifier.ignore: leaving out norms is not supported; write mappings with the layers that are smoothed",
            "[0].SmoothQuantModifier.mappings[0]: a list is not a pair of layers and the norm in front of them"]),
        ([("SmoothQuantModifier", {"algorithm": "x", "targets": []}), RTN], [
            "[0].SmoothQuantModifier.targets: unknown key; did you mean start?", "[0].SmoothQuantModifier.algorithm: 'x' is not smoothquant"]),
        ([("SpinQuantModifier", {"rotations": ["R5", 1], "transform_type": "hadamar", "randomize": True, "precision": "torch.float32", "transform_config": {"a": 1}, "mappings": {"a": 1}}), RTN], [
            "[0].SpinQuantModifier.rotations[0]: 'R5' is not R1, R2, R3 or R4",
            "[0].SpinQuantModifier.rotations[1]: 1 is not R1, R2, R3 or R4",
            "[0].SpinQuantModifier.transform_type: 'hadamar' is not a transform; did you mean hadamard?",
            "[0].SpinQuantModifier.randomize: is not supported, nor by llm-compressor",
            "[0].SpinQuantModifier.precision: 'torch.float32' is not supported; rotations are of float64",
            "[0].SpinQuantModifier.mappings: is not supported: what is rotated is read from the graph",
            "[0].SpinQuantModifier.transform_config: is not supported; write rotations"]),
        ([("SpinQuantModifier", {"rotations": []}), RTN], ["[0].SpinQuantModifier.rotations: is empty: it rotates nothing"]),
        ([("AutoRoundModifier", {"scheme": "W4A16", "iters": "x", "lr": "y"})], [
            "[0].AutoRoundModifier.iters: 'x' is not an integer", "[0].AutoRoundModifier.lr: 'y' is not a number"]),
        ([ROUND, ("QuantizationModifier", {"scheme": "W8A8"})], ["[0].GPTQModifier: a later modifier has all of its targets; leave one of them out"]),
        ([("GPTQModifier", {"scheme": "W4A16", "targets": ["re:a"]}), ("QuantizationModifier", {"scheme": "W8A8"})],
         ["[0].GPTQModifier: kind:linear takes layers from re:a; write targets that do not overlap"]),
        ([("QuantizationModifier", {"scheme": "W8A8", "targets": ["Conv2d"]}), ROUND, ("QuantizationModifier", {"scheme": "W8A8", "targets": ["re:b"]})],
         ["[1].GPTQModifier: kind:conv2d is not told from what is left of its targets; write targets that do not overlap"]),
        ([("GPTQModifier", {"scheme": "W4A16", "targets": ["re:(?i)a"]}), ("QuantizationModifier", {"scheme": "W8A8", "targets": ["re:b"]})],
         ["[0].GPTQModifier: re:(?i)a overlaps another modifier's targets, and cannot be taken from them"]),
        ([("QuantizationModifier", {"scheme": "W4A16", "targets": ["Embedding"]}), ("QuantizationModifier", {"scheme": "W8A8", "ignore": ["re:b"]})],
         ["[1].QuantizationModifier.ignore: re:b ignores what an earlier modifier quantizes by kind:embedding; write one modifier"]),
        ([("QuantizationModifier", {"scheme": f"W{bits}A16", "targets": [f"re:{bits}"], "kv_cache_scheme": {"num_bits": bits}}) for bits in (4, 8)],
         ["[1].QuantizationModifier.kv_cache_scheme: another modifier has another one"]),
        ([3], ["[0]: 3 is not a mapping of a modifier's class to its fields"]),
    ],
)  # fmt: skip
def test_refused_modifiers(modifiers, found):
    recipe = {"quant_stage": {"quant_modifiers": [{m[0]: m[1]} if isinstance(m, tuple) else m for m in modifiers]}}
    assert [p.removeprefix("quant_stage.quant_modifiers") for p in problems(recipe)] == found


CONFIG: dict[str, Any] = {"quant_method": "compressed-tensors"}


@pytest.mark.parametrize(
    ("recipe", "found"),
    [
        ({"quant_stage": {}}, ["the recipe has no modifiers: it quantizes nothing"]),
        ({"quant_stage": 3}, ["quant_stage: 3 is not a mapping"]),
        ({"quant_stage": {"x": {}, "quant_modifiers": 3}}, [
            "quant_stage.x: not a group of modifiers; llm-compressor ignores it; write quant_modifiers",
            "quant_stage.quant_modifiers: 3 is not a mapping"]),
        ({"quant_stage": {"a_modifiers": {"QuantizationModifier": RTN[1]}, "run_type": "train"}}, ["quant_stage.run_type: 'train' is not supported; write oneshot"]),
        (several(RTN, pipelin="a"), ["pipelin: unknown key; did you mean pipeline?"]),
        (several(RTN, pipeline="a"), ["pipeline: 'a' is not supported; write sequential, independent, basic or datafree"]),
        (several(ROUND, pipeline="datafree"), ["pipeline: datafree: GPTQModifier needs data; write sequential or independent"]),
        (several(RTN, pipeline=3, propagate_error=3), ["pipeline: 3 is not a string", "propagate_error: 3 is not true or false"]),
        (several(RTN, num_calibration_samples=0, model=3), ["model: 3 is not a string", "num_calibration_samples: samples: 0 is not a whole number from 1"]),
        ({"recipe": several(RTN, pipeline="sequential")}, ["recipe.pipeline: unknown key"]),
        ({"recipe": "a.yaml", "quant_stage": {"quant_modifiers": {"QuantizationModifier": RTN[1]}}}, ["recipe: 'a.yaml' is not a mapping"]),
        ({"quantization_config": CONFIG}, ["quantization_config.config_groups: is missing"]),
        ({**CONFIG, "config_groups": {}}, ["config_groups: quantizes nothing"]),
        ({**CONFIG, "config_groups": {"W4A16": ["Linear"]}, "sparsity_config": {"a": 1}, "transform_config": {"a": 1}, "q": 1}, [
            "q: unknown key", "sparsity_config: sparsity is not supported", "transform_config: a checkpoint with rotations is not supported"]),
        ({**CONFIG, "config_groups": {"g": {"targets": ["Linear"], "weights": {"actorder": "group"}}}}, [f"config_groups.g.weights.actorder: 'group' {SAME}"]),
    ],
)  # fmt: skip
def test_refused_containers(recipe, found):
    assert problems(recipe) == found


def test_problems_name_file_and_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "quant_stage:\n  quant_modifiers:\n    GPTQModifier:\n      scheme: W4A17\n      dampenig_frac: 1\n"
    )
    with pytest.raises(SpecError) as caught:
        load_spec(path)
    where = "quant_stage.quant_modifiers.GPTQModifier"
    assert list(caught.value.problems) == [
        f"{path}:5:{where}.dampenig_frac: unknown key; did you mean dampening_frac?",
        f"{path}:4:{where}.scheme: 'W4A17' is not a preset; did you mean W4A16?",
    ]


def test_a_checkpoint_s_config():
    """Full names that are ignored may be of layers that graphq does not see."""
    config = {
        **CONFIG,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8}}},
        "ignore": ["a.b"],
    }
    for recipe in (config, {"hidden_size": 3, "quantization_config": config}, {"compression_config": config}):
        spec = load_spec(recipe)
        assert print_spec(spec) == (
            "graphq: 1\nrules:\n  - match: kind:linear\n    weight: int8/half/tensor/source\n"
            "  - match: =a.b\n    float: ignore\n    may_match_nothing: true\n"
        )
    assert (
        load_spec({**CONFIG, "config_groups": {}, "kv_cache_scheme": {"num_bits": 8, "dynamic": True}}).cache
        is not None
    )
    with pytest.raises(SpecError, match="no dialect is recognised"):
        load_spec({"quantization_config": {"bits": 4}})


@pytest.mark.parametrize(
    ("earlier", "ignored"),
    [([f"re:{'(a+)+' * 50}{i}" for i in range(60)], ["re:x", "re:y"] * 30), ([f"a.b{i}" for i in range(300)], [f"a.c{i}" for i in range(300)])],
)  # fmt: skip
def test_what_would_take_very_long_is_refused(earlier, ignored):
    recipe = several(
        ("QuantizationModifier", {"scheme": "W4A16", "targets": earlier}),
        ("QuantizationModifier", {"scheme": "W8A16", "ignore": list(dict.fromkeys([*ignored, *earlier]))}),
    )
    assert problems(recipe) == [
        "quant_stage.quant_modifiers[1].QuantizationModifier.ignore: is too long a list behind so many targets of earlier modifiers"
    ]


def test_too_many_targets_beside_others_are_refused():
    recipe = several(
        ("GPTQModifier", {"scheme": "W4A16", "targets": [f"re:a{i}" for i in range(300)]}),
        ("QuantizationModifier", {"scheme": "W8A16", "targets": [f"re:b{i}" for i in range(300)]}),
    )
    assert problems(recipe) == [
        "quant_stage.quant_modifiers[0].GPTQModifier: has too many targets beside those of other modifiers"
    ]
