"""What an LLMC config says of the run (``base``, ``model``, ``calib``, ``eval``, ``save``) as a ``Run``, and back.

Nothing here is opened, imported or evaluated: LLMC's ``torch_dtype`` is Python code there, and a word here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Final

from graphq.frontends.document import Plain, Section, nearest, show
from graphq.spec.rules import Run

SECTIONS: Final = ("base", "model", "calib", "eval", "save", "opencompass")

_FILES: Final = "the model's own files say so"
_VIDEO: Final = "it is for models that make videos"
_MODEL: Final[Mapping[str, str]] = {
    "type": "layers are found in the graph",
    "tokenizer_mode": "the model's own tokenizer is read",
    "torch_dtype": "a directory is captured in float32; the API takes dtype",
    "block_wise_quant": _FILES,
    "use_cpu_to_save_cuda_mem_for_catcher": "it steers LLMC's own run",
    **dict.fromkeys(("wan2_repo_path", "diffusers_path", "force_diffusers", "allow_diffusers_fallback"), _VIDEO),
    **dict.fromkeys(("sample_steps", "sample_shift", "sample_solver", "boundary", "t5_cpu", "init_on_cpu"), _VIDEO),
    **dict.fromkeys(("convert_model_dtype", "offload_model"), _VIDEO),
}
_WINDOWS: Final = "calibration takes windows of plain text, one after the other"
_CALIB: Final[Mapping[str, str]] = {
    "download": "graphq downloads nothing",
    "bs": "a window is a batch",
    **dict.fromkeys(("preproc", "padding", "apply_chat_template", "add_answer", "load_from_txt", "type"), _WINDOWS),
    **dict.fromkeys(("sample_steps", "target_height", "target_width", "num_frames"), _VIDEO),
    **dict.fromkeys(("guidance_scale", "guidance_scale_2"), _VIDEO),
}
_TEXTS: Final = ("custom_txt", "custom")  # the documentation names the second one
_DATA: Final = (
    *("pileval", "pile", "wikitext2", "c4", "ptb", "ultrachat", *_TEXTS, "custom_mm", "images", "t2v", "i2v"),
    *("vlm_datastes", "alm_datastes", "avlm_datastes"),  # of earlier releases, spelled so
)
_EVAL: Final = (
    *("eval_pos", "type", "name", "download", "path", "bs", "seq_len", "num_samples", "num_eval_tokens", "seed"),
    *("inference_per_block", "apply_chat_template", "load_from_txt", "max_new_tokens", "res_path", "format_tabs"),
    *("add_chat_temp", "output_video_path", "fps", "eval_token_consist", "padding", "preproc", "n_samples", "tasks"),
    *("sample_steps", "target_height", "target_width", "num_frames", "guidance_scale", "guidance_scale_2"),
)
# The key of ``save`` -> the target's name. The first of those with one name is written.
TARGETS: Final[Mapping[str, str]] = {
    "save_vllm": "compressed-tensors",
    "save_sgl": "compressed-tensors",
    "save_lightllm": "compressed-tensors",
    "save_fake": "torch",
    "save_autoawq": "autoawq",
    "save_mlcllm": "mlcllm",
    "save_trtllm": "trtllm",
    "save_lightx2v": "lightx2v",
}
_SAVE: Final[Mapping[str, str]] = {
    "save_path": "graphq compile takes --out",
    "trtllm_cfg": "graphq does not run TensorRT-LLM",
    "lightllm_kv_cache_calib_name": "graphq writes no such file",
    **dict.fromkeys(("save_quant", "save_autogptq"), "a key of earlier releases; graphq compile takes --target"),
    "save_fp": "a key of earlier releases; graphq writes no float model with the method's changes",
}
_SAVE_FLAGS: Final[Mapping[str, str]] = {
    "save_trans": "graphq writes no float model with the method's changes; the artifact holds them",
    "save_lightllm_kv_cache_calib": "graphq writes no file of the KV cache's scales",
}
_SECTION_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "base": ("seed",),
    "model": ("path", "lora_path", *_MODEL),
    "calib": ("name", "path", "n_samples", "seq_len", "seed", *_CALIB),
    "eval": _EVAL,
    "save": (*TARGETS, *_SAVE_FLAGS, *_SAVE),
    "opencompass": ("cfg_path", "output_path", "max_num_workers"),
}


def read_run(top: Section) -> Run:
    """What the sections say. A key that has no meaning here is noted, one that LLMC does not document is reported."""
    base, model, calib, save = (_section(top, key) for key in ("base", "model", "calib", "save"))
    run = Run()
    seed = _number(base, run, "seed", "seed")
    drawn = _number(calib, seed, "seed", "seed")
    if drawn.seed != seed.seed:
        if seed.seed is None:
            seed = drawn
        else:
            calib.unused("seed", "base.seed is what is drawn from")
    run = _calibration(calib, _number(calib, seed, "seq_len", "sequence_length"))
    run = dataclasses.replace(run, model=model.text("path") or "", target=_read_target(save))
    if "lora_path" in model.values:
        model.report("LoRA weights are not supported; merge them into the model", "lora_path")
    for section, unused in ((model, _MODEL), (calib, _CALIB), (save, _SAVE)):
        for key in section.values:
            if key in unused and not (key == "load_from_txt" and run.calibration):
                section.unused(key, unused[key])
    _read_eval(top)
    if _section(top, "opencompass").values:
        top.unused("opencompass", "graphq does not run it")
    return run


def _section(top: Section, key: str) -> Section:
    """The section under ``key``, empty where it is missing or wrong, its unknown keys reported."""
    section = top.section(key) or Section(top.document, {}, (*top.at, key))
    section.only(_SECTION_KEYS[key])
    return section


def _number(section: Section, run: Run, key: str, name: str) -> Run:
    """``run`` with the whole number under ``key`` as its ``name``, if there is one that it may have."""
    value = section.integer(key)
    made = None if value is None else section.made(lambda: dataclasses.replace(Run(), **{name: value}), key)
    return run if made is None else dataclasses.replace(run, **{name: value})


def _calibration(calib: Section, run: Run) -> Run:
    run = _number(calib, run, "n_samples", "samples")
    name, path = calib.text("name"), calib.text("path")
    if name is not None and name not in _DATA:
        calib.report(f"{show(name)} is not a data set{nearest(name, _DATA)}", "name")
    elif name in _TEXTS and path:
        if not calib.boolean("load_from_txt"):
            calib.note("files there are read as plain text, a samples.json, too", "path")
        return dataclasses.replace(run, calibration=path)
    elif name is not None and name not in _TEXTS:
        calib.unused("name", "graphq calibrates on files of text; name them with --calibration")
        if path is not None:
            calib.unused("path", "the data set is no text; name files of text with --calibration")
    elif path is not None:
        calib.unused("path", "the name custom_txt says that it is text")
    return run


def _read_target(save: Section) -> str:
    chosen = [key for key in TARGETS if save.boolean(key)]
    if "save_fake" in chosen:
        save.note("the torch artifact holds codes, where LLMC writes what they stand for", "save_fake")
    for key in _SAVE_FLAGS:
        if save.boolean(key):
            save.unused(key, _SAVE_FLAGS[key])
    targets = {TARGETS[key]: key for key in reversed(chosen)}
    if len(targets) > 1:
        asked = " and ".join(f"{targets[TARGETS[key]]} ({TARGETS[key]})" for key in chosen if key in targets.values())
        save.report(f"a run writes one artifact, but {asked} are True")
        return ""
    return next(iter(targets), "")


def _read_eval(top: Section) -> None:
    given = top.values.get("eval")
    if given is None and "eval" not in top.values:
        return
    for index, item in enumerate(given if isinstance(given, list) else [given]):
        at: tuple[str | int, ...] = ("eval", index) if isinstance(given, list) else ("eval",)
        if isinstance(item, dict):
            Section(top.document, item, at).only(_EVAL)
        else:
            top.report(f"{show(item)} is not a mapping", *at)
    top.unused("eval", "graphq eval measures perplexity, on the text that it is given")


def write_run(run: Run) -> tuple[dict[str, Plain], dict[str, Plain], list[str]]:
    """The sections in front of ``quant`` and behind it, and a line for each thing that they cannot hold."""
    problems: list[str] = []
    if run.batches is not None:
        problems.append(f"run: batches: {run.batches}: LLMC's calib counts samples")
    before: dict[str, Plain] = {}
    if run.seed is not None:
        before["base"] = {"seed": run.seed}
    if run.model:
        before["model"] = {"path": run.model}
    calib: dict[str, Plain] = {}
    if run.calibration:
        calib |= {"name": _TEXTS[0], "download": False, "path": run.calibration, "load_from_txt": True}
    if run.samples is not None:
        calib["n_samples"] = run.samples
    if run.sequence_length is not None:
        calib["seq_len"] = run.sequence_length
    if calib:
        before["calib"] = calib | {"bs": 1} | ({} if run.seed is None else {"seed": run.seed})
    after: dict[str, Plain] = {}
    if run.target:
        key = next((key for key, target in TARGETS.items() if target == run.target), None)
        if key is None:
            problems.append(f"run: target: {run.target}: LLMC has no such export")
        else:
            after["save"] = {key: True, "save_path": "./save"}
    return before, after, problems
