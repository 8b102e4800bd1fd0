"""What LLMC configs say of the run: ``base``, ``model``, ``calib``, ``eval``, ``save``."""

import dataclasses
from typing import Any

import pytest

from graphq.errors import SpecError
from graphq.frontends import load_spec, write_spec
from graphq.spec.rules import Run

QUANT = {"method": "RTN", "weight": {"bit": 8, "symmetric": True, "granularity": "per_channel"}}


def read(**sections: Any) -> tuple[Run, list[str]]:
    spec = load_spec({"quant": QUANT, **sections})
    return spec.run, list(spec.notes)


@pytest.mark.parametrize(
    ("sections", "run"),
    [
        ({}, Run()),
        ({"base": {}, "model": {}, "calib": {}, "save": {}}, Run()),
        ({"base": {"seed": 7}, "model": {"path": "a/b"}}, Run(seed=7, model="a/b")),
        ({"base": {"seed": 7}, "calib": {"seed": 7, "n_samples": 3, "seq_len": 9}}, Run(seed=7, samples=3, sequence_length=9)),
        ({"calib": {"seed": 5}}, Run(seed=5)),
        ({"calib": {"name": "custom_txt", "path": "t.txt", "load_from_txt": True}}, Run(calibration="t.txt")),
        ({"save": {"save_vllm": True, "save_sgl": True}}, Run(target="compressed-tensors")),
        ({"save": {"save_lightllm": True, "save_fake": False}}, Run(target="compressed-tensors")),
        ({"save": {"save_autoawq": True}}, Run(target="autoawq")),
        ({"save": {"save_mlcllm": True}}, Run(target="mlcllm")),
        ({"save": {"save_trtllm": True}}, Run(target="trtllm")),
        ({"save": {"save_lightx2v": True}}, Run(target="lightx2v")),
    ],
)  # fmt: skip
def test_runs(sections, run):
    assert read(**sections) == (run, [])


UNUSED = {"download": False, "bs": -1, "preproc": "general", "padding": True}


def test_every_documented_key_is_read_or_noted():
    run, notes = read(
        base={"seed": 1},
        model={"type": "Llama", "path": "m", "tokenizer_mode": "slow", "torch_dtype": "__import__('os')"},
        calib={"name": "custom", "path": "samples", "n_samples": 128, "seq_len": 512, "seed": 2} | UNUSED,
        eval=[{"eval_pos": ["fake_quant"], "name": "c4"}, {"type": "acc"}],
        save={"save_fake": True, "save_trans": True, "save_lightllm_kv_cache_calib": True, "save_path": "s"},
        opencompass={"cfg_path": "c", "output_path": "o"},
    )
    assert run == Run("m", "torch", "samples", 128, 512, seed=1)
    assert sorted(notes) == [
        "calib.bs: ignored: a window is a batch",
        "calib.download: ignored: graphq downloads nothing",
        "calib.padding: ignored: calibration takes windows of plain text, one after the other",
        "calib.path: files there are read as plain text, a samples.json, too",
        "calib.preproc: ignored: calibration takes windows of plain text, one after the other",
        "calib.seed: ignored: base.seed is what is drawn from",
        "eval: ignored: graphq eval measures perplexity, on the text that it is given",
        "model.tokenizer_mode: ignored: the model's own tokenizer is read",
        "model.torch_dtype: ignored: a directory is captured in float32; the API takes dtype",
        "model.type: ignored: layers are found in the graph",
        "opencompass: ignored: graphq does not run it",
        "save.save_fake: the torch artifact holds codes, where LLMC writes what they stand for",
        "save.save_lightllm_kv_cache_calib: ignored: graphq writes no file of the KV cache's scales",
        "save.save_path: ignored: graphq compile takes --out",
        "save.save_trans: ignored: graphq writes no float model with the method's changes; the artifact holds them",
    ]


@pytest.mark.parametrize(
    ("calib", "run", "notes"),
    [
        ({"name": "pileval", "path": "p"}, Run(), [
            "calib.name: ignored: graphq calibrates on files of text; name them with --calibration",
            "calib.path: ignored: the data set is no text; name files of text with --calibration",
        ]),
        ({"name": "c4"}, Run(), ["calib.name: ignored: graphq calibrates on files of text; name them with --calibration"]),
        ({"path": "p"}, Run(), ["calib.path: ignored: the name custom_txt says that it is text"]),
        ({"name": "custom_txt", "path": ""}, Run(), ["calib.path: ignored: the name custom_txt says that it is text"]),
        ({"name": "custom_txt", "path": "p", "load_from_txt": False}, Run(calibration="p"), [
            "calib.path: files there are read as plain text, a samples.json, too"]),
        ({"name": "c4", "load_from_txt": True}, Run(), [
            "calib.name: ignored: graphq calibrates on files of text; name them with --calibration",
            "calib.load_from_txt: ignored: calibration takes windows of plain text, one after the other",
        ]),
    ],
)  # fmt: skip
def test_only_text_calibrates(calib, run, notes):
    assert read(calib=calib) == (run, notes)


@pytest.mark.parametrize(
    ("sections", "problems"),
    [
        ({"base": {"sed": 1}}, ["base.sed: unknown key; did you mean seed?"]),
        ({"base": {"seed": "42"}}, ["base.seed: '42' is not an integer"]),
        ({"base": {"seed": -1}}, ["base.seed: -1 is not a whole number from 0"]),
        ({"base": [1]}, ["base: a list is not a mapping"]),
        ({"calib": None}, ["calib: an empty value is not a mapping"]),
        ({"model": {"path": 3}}, ["model.path: 3 is not a string"]),
        ({"model": {"lora_path": "l"}}, ["model.lora_path: LoRA weights are not supported; merge them into the model"]),
        ({"model": {"modeltype": "Llama"}}, ["model.modeltype: unknown key; did you mean convert_model_dtype?"]),
        ({"calib": {"n_samples": 0}}, ["calib.n_samples: samples: 0 is not a whole number from 1"]),
        ({"calib": {"seq_len": 1}}, ["calib.seq_len: sequence_length: 1 is not a whole number from 2"]),
        ({"calib": {"nsamples": 8}}, ["calib.nsamples: unknown key; did you mean n_samples?"]),
        ({"calib": {"seed": -2}}, ["calib.seed: -2 is not a whole number from 0"]),
        ({"calib": {"name": "wikitext"}}, ["calib.name: 'wikitext' is not a data set; did you mean wikitext2?"]),
        ({"calib": {"name": ["c4"]}}, ["calib.name: a list is not a string"]),
        ({"eval": 3}, ["eval: 3 is not a mapping"]),
        ({"eval": None}, ["eval: an empty value is not a mapping"]),
        ({"eval": [{"eval_pos": []}, {"evalpos": []}, 1]}, [
            "eval[1].evalpos: unknown key; did you mean eval_pos?", "eval[2]: 1 is not a mapping"]),
        ({"save": {"save_vlm": True}}, ["save.save_vlm: unknown key; did you mean save_vllm?"]),
        ({"save": {"save_lightllm_kv_calib": True}}, [
            "save.save_lightllm_kv_calib: unknown key; did you mean save_lightllm_kv_cache_calib?"]),
        ({"save": {"save_vllm": 1}}, ["save.save_vllm: 1 is not true or false"]),
        ({"save": {"save_vllm": True, "save_sgl": True, "save_autoawq": True}}, [
            "save: a run writes one artifact, but save_vllm (compressed-tensors) and save_autoawq (autoawq) are True"]),
        ({"save": {"save_fake": True, "save_trtllm": True}}, [
            "save: a run writes one artifact, but save_fake (torch) and save_trtllm (trtllm) are True"]),
        ({"opencompass": {"cfg_pth": 1}}, ["opencompass.cfg_pth: unknown key; did you mean cfg_path?"]),
    ],
)  # fmt: skip
def test_refused(sections, problems):
    with pytest.raises(SpecError) as caught:
        read(**sections)
    assert list(caught.value.problems) == problems


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (Run(), ""),
        (Run(model="m\u2028 #: ä", seed=0), 'base:\n    seed: 0\nmodel:\n    path: "m\\L #: \\xE4"\n'),
        (Run(samples=4), "calib:\n    n_samples: 4\n    bs: 1\n"),
        (Run(calibration="yes", sequence_length=16, seed=3), """\
base:
    seed: 3
calib:
    name: custom_txt
    download: false
    path: 'yes'
    load_from_txt: true
    seq_len: 16
    bs: 1
    seed: 3
"""),
    ],
)  # fmt: skip
def test_written(run, text):
    spec = dataclasses.replace(load_spec({"quant": QUANT}), run=run)
    written = write_spec(spec, "llmc")
    assert written == text + write_spec(load_spec({"quant": QUANT}), "llmc")
    assert load_spec(written) == spec


@pytest.mark.parametrize(
    ("target", "key"),
    [
        *(("compressed-tensors", "save_vllm"), ("torch", "save_fake"), ("autoawq", "save_autoawq")),
        *(("mlcllm", "save_mlcllm"), ("trtllm", "save_trtllm"), ("lightx2v", "save_lightx2v")),
    ],
)
def test_targets_are_written(target, key):
    spec = dataclasses.replace(load_spec({"quant": QUANT}), run=Run(target=target))
    written = write_spec(spec, "llmc")
    assert written.endswith(f"save:\n    {key}: true\n    save_path: ./save\n")
    assert load_spec(written) == spec
