"""The shapes of the configs that LLMC ships, told by what they hold: what each means, or which reason refuses it.

Their sections of the run are alike (``RUN``); what differs is ``quant``, and a few keys of the others.
"""

import copy
from typing import Any

import pytest

from graphq.checks import refusals
from graphq.errors import SpecError
from graphq.frontends import load_spec
from graphq.spec.rules import Spec

RUN: dict[str, Any] = {
    "base": {"seed": 42},
    "model": {"type": "Llama", "path": "model path", "tokenizer_mode": "slow", "torch_dtype": "auto"},
    "calib": {
        "name": "pileval",
        "download": False,
        "path": "data path",
        "n_samples": 128,
        "bs": -1,
        "seq_len": 512,
        "preproc": "txt_general_preproc",
        "seed": 42,
    },
    "eval": {
        "eval_pos": ["pretrain", "transformed", "fake_quant"],
        "name": "wikitext2",
        "download": False,
        "bs": 1,
        "path": "eval path",
        "seq_len": 2048,
        "inference_per_block": False,
        "eval_token_consist": True,
    },
    "save": {"save_trans": False, "save_fake": False, "save_path": "./save"},
}


def weight(bit: Any, granularity: str = "per_channel", symmetric: bool = True, **keys: Any) -> dict[str, Any]:
    size = {"group_size": 128} if granularity == "per_group" else {"group_size": -1}
    return {"bit": bit, "symmetric": symmetric, "granularity": granularity, **size, **keys}


def act(bit: Any = 8, symmetric: bool = True, **keys: Any) -> dict[str, Any]:
    return {"bit": bit, "symmetric": symmetric, "granularity": "per_token", **keys}


def quant(method: str, weights: dict[str, Any], acts: Any = None, **special: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"method": method, "weight": weights, "quant_out": True}
    return found | ({} if acts is None else {"act": acts}) | ({"special": special} if special else {})


def config(quantized: dict[str, Any], **sections: Any) -> dict[str, Any]:
    whole = copy.deepcopy(RUN)
    for name, keys in sections.items():
        whole[name] = {**whole.get(name, {}), **keys}
    return whole | {"quant": copy.deepcopy(quantized)}


def shown(spec: Spec) -> str:
    plan = "; ".join(str(rule.decision).replace("weight ", "").replace("input ", "") for rule in spec.rules)
    return " ".join([plan, *(f"{a.name}{dict(a.options)}" for a in spec.algorithms)])


W4G, W4GS = weight(4, "per_group", False), weight(4, "per_group")
STATIC: dict[str, Any] = {"granularity": "per_tensor", "static": True}
QT: dict[str, Any] = {"quant_type": "float-quant", "use_qtorch": True}
AWQ: dict[str, Any] = {"trans": True, "trans_version": "v2", "weight_clip": True, "clip_sym": True}
AWQ_OPTIONS = "awq{'duo': False, 'clip': True}"
GPTQ: dict[str, Any] = {
    **dict.fromkeys(("actorder", "static_groups", "true_sequential"), True),
    "percdamp": 0.01,
    "blocksize": 128,
}
GPTQ_OPTIONS = "gptq{'act_order': 'static', 'scales': 'plan', 'block_size': 128, 'dampening': 0.01}"
OMNI: dict[str, Any] = {
    **dict.fromkeys(("aug_loss", "let", "use_shift"), False),
    "lwc": True,
    "deactive_amp": True,
    "lwc_lr": 0.01,
    "let_lr": 0.005,
    "epochs": 20,
    "alpha": 0.5,
    "wd": 0,
}
LEARNT: dict[str, Any] = {"calib_algo": "learnable", "ste": True}
ROTATE: dict[str, Any] = {"rotate_mode": "hadamard", "fp32_had": True}
ROTATED = "rotate{'r1': True, 'r2': False, 'r3': False, 'r4': False, 'kind': 'random_hadamard'}"
SMOOTH = config(quant("SmoothQuant", weight(8), act(), alpha=0.75))["quant"]

# What a config of this shape is read as.
READ: dict[str, tuple[dict[str, Any], str]] = {
    "rtn w8a8": (config(quant("RTN", weight(8), act())), "int8/channel, int8/token/dynamic"),
    "rtn w4a16": (config(quant("RTN", W4G), save={"save_vllm": True}), "int4/asym/g128"),
    "rtn w8a16 packed": (config(quant("RTN", weight(8, "per_group", need_pack=True))), "int8/g128"),
    "rtn static": (config(quant("RTN", weight(8), act(**STATIC))), "int8/channel, int8/tensor"),
    "rtn fp8 block": (
        config(
            quant(
                "RTN",
                weight("e4m3", "per_block", block_size=128, **QT),
                act("e4m3", **QT, group_size=128) | {"granularity": "per_group"},
            )
        ),
        "float8_e4m3fn/128x128, float8_e4m3fn/g128/dynamic",
    ),
    "rtn e2m1": (
        config({**quant("RTN", weight("e2m1"), act("e2m1")), "quant_type": "float-quant"}),
        "float4_e2m1/channel, float4_e2m1/token/dynamic",
    ),
    "awq w4a16": (config(quant("Awq", W4G, **AWQ)), f"int4/asym/g128 {AWQ_OPTIONS}"),
    "awq v2 clip": (
        config(quant("Awq", weight(6, symmetric=False, calib_algo="learnable"), act(6, False, calib_algo="minmax"),
                     **AWQ, clip_version="v2", save_scale=True, scale_path="a", save_clip=True, clip_path="b")),
        f"int6/asym/channel, int6/asym/token/dynamic {AWQ_OPTIONS}",
    ),
    "awq fp8": (
        config({**quant("Awq", weight("e4m3", use_qtorch=True), act("e4m3", use_qtorch=True), **AWQ), "quant_type": "float-quant"}),
        f"float8_e4m3fn/channel, float8_e4m3fn/token/dynamic {AWQ_OPTIONS}",
    ),
    "awq fp8 static": (
        config({**quant("Awq", weight("e4m3", "per_tensor", use_qtorch=True), act("e4m3", use_qtorch=True, **STATIC), **AWQ),
                "quant_type": "float-quant"}),
        f"float8_e4m3fn/tensor, float8_e4m3fn/tensor {AWQ_OPTIONS}",
    ),
    "awq of images": (
        config({**quant("Awq", W4G, **AWQ), "quant_objects": ["vision", "language"]},
               calib={"name": "vlm_datastes", "type": "img_txt", "padding": True, "add_answer": True},
               eval={"type": "img_txt", "tasks": "piqa"}, opencompass={"cfg_path": "a", "max_num_workers": 1, "output_path": "b"}),
        f"int4/asym/g128 {AWQ_OPTIONS}",
    ),
    "gptq by default": (config(quant("GPTQ", W4G, **GPTQ | {"static_groups": False})), f"int4/asym/g128 {GPTQ_OPTIONS}"),
    "gptq static groups": (config(quant("GPTQ", W4GS, **GPTQ), save={"save_vllm": True}), f"int4/g128 {GPTQ_OPTIONS}"),
    "gptq fp8": (
        config({**quant("GPTQ", weight("e4m3", use_qtorch=True), act("e4m3", use_qtorch=True), **GPTQ | {"static_groups": False}),
                "quant_type": "float_quant"}),
        f"float8_e4m3fn/channel, float8_e4m3fn/token/dynamic {GPTQ_OPTIONS}",
    ),
    "gptq after quarot": (
        config(quant("GPTQ", weight(8), act(), **GPTQ, online_rotate=False, fp32_had=True)),
        f"int8/channel, int8/token/dynamic {GPTQ_OPTIONS}",
    ),
    "smooth quant of video": (
        config({"video_gen": SMOOTH}, calib={"name": "i2v", "sample_steps": 40, "guidance_scale": 5.0}),
        "int8/channel, int8/token/dynamic smooth-quant{'alpha': 0.75}",
    ),
    "both halves alike": (
        config({half: quant("RTN", weight(8), act()) for half in ("vision", "language")}), "int8/channel, int8/token/dynamic",
    ),
    "quarot": (
        config(quant("Quarot", weight(8, symmetric=False), act(8, False), **ROTATE, online_rotate=False)),
        f"int8/asym/channel, int8/asym/token/dynamic {ROTATED}",
    ),
    "keys of 2024": (
        config(quant("RTN", W4G), save={"save_fp": False, "save_quant": True, "save_autogptq": False}, calib={"preproc": "general"}),
        "int4/asym/g128",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_read(name):
    document, wanted = READ[name]
    spec = load_spec(document)
    assert shown(spec) == wanted
    assert refusals(spec) == []


def test_what_is_noted_of_them():
    """What another number follows from is said; so is a section that is read for a model that it does not name."""
    notes = load_spec(READ["gptq by default"][0]).notes
    assert notes[-2] == (
        "quant.special.static_groups: groups are of columns side by side here; LLMC's are of columns in their new order,"
        " which no checkpoint of its own holds"
    )
    # Channels have no groups whose columns could move.
    assert not [note for note in load_spec(READ["gptq fp8"][0]).notes if "static_groups" in note]
    notes = load_spec(READ["awq v2 clip"][0]).notes
    clip = "v2 keeps as factors the ranges that v1 clips weights to; they are the same"
    assert f"quant.special.clip_version: ignored: {clip}" in notes
    video = load_spec(READ["smooth quant of video"][0])
    whole = "read for the whole model that is compiled; LLMC quantizes one modality by it"
    assert f"quant.video_gen: {whole}" in video.notes
    assert (video.rules[0].source, video.algorithms[0].source) == ("quant.video_gen", "quant.video_gen.method")
    notes = load_spec(READ["awq of images"][0]).notes
    assert "quant.quant_objects: ignored: the model that is compiled is quantized" in notes
    notes = load_spec(READ["keys of 2024"][0]).notes
    assert "save.save_quant: ignored: a key of earlier releases; graphq compile takes --target" in notes


# What a config of this shape is refused for, when it is read or, where that is possible, when it is compiled.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "gptq owq": (config(quant("GPTQ", W4G, **GPTQ, owq=True, n_outs=[6, 6])), "quant.special.owq: is not supported"),
    "gptq after online quarot": (
        config(quant("GPTQ", weight(4, symmetric=False, calib_algo="mse"), act(4, False), **GPTQ, online_rotate=True)),
        "quant.special.online_rotate: LLMC rotates the model before, by a config of Quarot",
    ),
    "hqq axis 0": (
        config(quant("HQQ", {**W4G, "round_zp": False}, axis=0, lp_norm=0.7, beta=10, kappa=1.01, iters=20)),
        "quant.special.axis: groups along the output axis are not supported; write 1",
    ),
    "e4m3 without qtorch": (
        config({**quant("RTN", weight("e4m3"), act("e4m3")), "quant_type": "float-quant"}),
        "quant.weight.bit: without use_qtorch, LLMC's e4m3 has other values than float8_e4m3fn",
    ),
    "int4 inside int8": (
        config(quant("RTN", {"bit": 48, "bit4": {"symmetric": False}, "bit8": {"symmetric": True}}, act())),
        "quant.weight.bit4: a weight of two levels is not supported",
    ),
    "dgq": (config(quant("DGQ", {"w_1": {"bit": 4}, "w_2": {"bit": 8}}, act())), "quant.weight.w_1: a weight of two levels"),
    "hif4": (
        config({"video_gen": quant("Awq", weight(4, quant_type="hif4"), act(4, quant_type="hif4"), **AWQ)}),
        "quant.video_gen.weight.quant_type: 'hif4' is not supported; write int-quant or float-quant",
    ),
    "lora": (config({"video_gen": SMOOTH}, model={"lora_path": "a"}), "model.lora_path: LoRA weights are not supported"),
    "float zero points": (
        config(quant("SpQR", {**W4G, "round_zp": False}, actorder=True, percdamp=1)),
        "quant.weight.round_zp: a float zero point is not supported",
    ),
    "omniquant": (
        config(quant("OmniQuant", {**W4G, **LEARNT}, **OMNI, search_clip_init=True)),
        "quant.method: graphq has no algorithm omniquant; near are auto-round, which learns roundings and ranges, and awq",
    ),
    "osplus": (
        config(quant("OsPlus", weight(8), act(), use_shift=True)),
        "quant.method: graphq has no algorithm osplus; near is smooth-quant with alpha: search",
    ),
    "tesseraq": (
        config(quant("TesseraQ", {**W4G, **LEARNT}, lr=0.0005, iterations=250, weight_clip=True, clip_version="v2", thresholds=[0.75])),
        "quant.method: graphq has no algorithm tesseraq; near is auto-round",
    ),
    "quik": (
        config(quant("QUIK", weight(8), act(), fp_relative=False, fp_features=256, fp_threshold=0.0, last_fc_bit=8)),
        "quant.method: graphq has no algorithm quik; near is rotate with gptq",
    ),
    "llm int8": (config(quant("LlmInt8", weight(8), act(), threshold=6.0)), "quant.method: graphq has no algorithm llmint8; near is smooth-quant"),
    "norm tweaking": (
        config(quant("NormTweaking", weight(8), act(), ntweak_lr=1e-6, deactive_amp=True, epochs=50, gamma=0.001)),
        "quant.method: graphq has no algorithm normtweaking; near is correct-bias",
    ),
    "adadim": (config(quant("AdaDim", weight(8), act())), "quant.method: graphq has no algorithm adadim; near is a rule for each layer"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    document, reason = REFUSED[name]
    try:
        problems = refusals(load_spec(document))
    except SpecError as error:
        problems = list(error.problems)
    assert {problem.replace(".act.", ".weight.") for problem in problems} == {*problems[:1]}  # one fault, one line
    assert problems[0].startswith(reason)
