"""llm-compressor's own checkpoints and graphq's, from the same recipes: the same tensors, settings and bytes.

https://github.com/vllm-project/llm-compressor. Run by ``judges.py``, or as

    OMP_NUM_THREADS=1 .venv/bin/python judges/run_llm_compressor.py .judges/llm-compressor/bin/python [CASE ...]

The client's Python runs this script once more and makes a checkpoint of the language model of the examples from each
recipe; here the recipe that it saved beside it is compiled. Compared are names, dtypes and shapes of all tensors, the
keys and values of ``quantization_config``, and the bytes. All have to be equal, but for what ``EXPECTED`` says: a group
keeps the recipe's name here and is ``group_0`` there; scales of inputs and caches, which llm-compressor observes in
bfloat16 and graphq in float32, are within ``NEAR``. Checkpoints that GPTQ made have codes of
their own: it adds up errors.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
MODEL: Final = ROOT / "examples" / "models" / "stdlib-llama"
WINDOWS, LENGTH = 16, 128
NEAR: Final = 0.06
_PRESETS: Final = (
    *("W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP4"),
    *("MXFP4A16", "MXFP8", "MXFP8A16", "W4A8", "W4AFP8", "W2A16", "W3A16"),
)
_INT8: Final = {"num_bits": 8, "strategy": "channel"}
_TOKEN: Final = {"num_bits": 8, "strategy": "token", "dynamic": True}
_STATIC: Final = {"num_bits": 8, "strategy": "tensor"}
_FLOAT8: Final = {"num_bits": 8, "type": "float", "strategy": "channel"}
_BLOCKS: Final = {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn", "group_size": 16}
_NVFP4: Final = {"num_bits": 4, "type": "float", "strategy": "tensor_group", **_BLOCKS}
_LOCAL: Final = _NVFP4 | {"dynamic": "local", "observer": "static_minmax"}
_OTHERS: Final = ["re:.*self_attn\\..*", "re:.*(gate|up)_proj$"]


def _int4(size: int) -> dict[str, Any]:
    return {"num_bits": 4, "strategy": "group", "group_size": size}


def _group(targets: list[str], weights: Mapping[str, Any], inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {"targets": targets, "weights": dict(weights), "input_activations": inputs}


def _recipe(modifier: str = "QuantizationModifier", ignore: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    return {"quant_stage": {"quant_modifiers": {modifier: {"ignore": ["lm_head", *ignore], **fields}}}}


def _one(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return _recipe(config_groups={"g": _group(["Linear"], weights, inputs)})


def _two(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    return _recipe(config_groups={"a": a, "b": b})


RECIPES: Final[Mapping[str, dict[str, Any]]] = {
    **{name: _recipe(targets=["Linear"], scheme=name) for name in _PRESETS},
    "W4A16_g32": _one(_int4(32)),
    "W4A16_g64": _one(_int4(64)),
    "W4A16_chan": _one({"num_bits": 4, "strategy": "channel"}),
    "W8A8_static": _one(_INT8, _STATIC),
    "W8A8_static_asym": _one(_INT8, _STATIC | {"symmetric": False}),
    "W8A8_dyn_asym": _one(_INT8, _TOKEN | {"symmetric": False}),
    "W8A8_tensor": _one(_STATIC, _TOKEN),
    "MIX_w4a16_w8a8down": _two(_group(["re:.*down_proj$"], _INT8, _TOKEN), _group(_OTHERS, _int4(128))),
    "MIX_w4g128_w8g128": _two(_group(["re:.*down_proj$"], _int4(128) | {"num_bits": 8}), _group(_OTHERS, _int4(128))),
    "MIX_partial": _recipe(
        ignore=("re:.*self_attn.*", "re:.*down_proj"),
        config_groups={"b": _group(["re:.*(gate|up)_proj$"], _int4(128))},
    ),
    "MIX_qkv_unfused": _two(
        _group(["re:.*v_proj$"], _INT8, _TOKEN), _group(["re:.*(q|k|o)_proj$", "re:.*mlp\\..*"], _int4(128))
    ),
    "NVFP4_FP8down": _two(
        _group(["re:.*down_proj$"], _FLOAT8, _TOKEN | {"type": "float"}), _group(_OTHERS, _NVFP4, _LOCAL)
    ),
    "W4A8_packed": _recipe(targets=["Linear"], scheme="W4A8"),
    "EMB_W8_W4A16": _recipe(
        config_groups={"e": _group(["re:.*embed_tokens$"], _INT8), "b": _group(["Linear"], _int4(128))}
    ),
    "KVFP8_W4A16": _recipe(targets=["Linear"], scheme="W4A16", kv_cache_scheme=_STATIC | {"type": "float"}),
    "GPTQ_W4A16": _recipe("GPTQModifier", targets=["Linear"], scheme="W4A16"),
}
EXPECTED: Final = {  # what else may differ, and why
    "W4A8": "packed: fewer than 8 bits take fewer than 8",
    "W4AFP8": "packed: fewer than 8 bits take fewer than 8",
    "GPTQ_W4A16": "codes of GPTQ",
}


def main(client: str, names: list[str]) -> int:
    """0 where all is equal that has to be."""
    import torch

    import graphq

    faults = 0
    with tempfile.TemporaryDirectory() as place:
        told = json.dumps([place, names or list(RECIPES)])
        subprocess.run([client, __file__, "--client", told], stdout=sys.stderr, check=False)
        windows = [torch.tensor([ids]) for ids in _windows()]
        print("| recipe | tensors | bytes of codes and scales that differ | inputs' scales | settings |")
        print("|---|---|---|---|---|")
        for name in names or list(RECIPES):
            theirs, ours = Path(place) / name, Path(place) / "graphq" / name
            if not (theirs / "config.json").exists():
                print(f"| {name} | llm-compressor made none | | | |", flush=True)
                continue
            try:
                made = graphq.compile(
                    MODEL,
                    theirs / "recipe.yaml",
                    target="compressed-tensors",
                    target_options={"consumer": "any"},
                    calibration=windows,
                )
                made.emit("compressed-tensors", ours, consumer="any")
            except graphq.GraphqError as error:
                print(f"| {name} | refused: {str(error).splitlines()[0]} | | | |", flush=True)
                faults += name not in EXPECTED
                continue
            cells, is_equal = compare(name, theirs, ours)
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
            faults += not is_equal
    return int(faults > 0)


def compare(name: str, theirs: Path, ours: Path) -> tuple[list[str], bool]:
    """What is equal, in words, and whether all is that has to be."""
    import torch
    from safetensors.torch import load_file

    from graphq.lowering.checkpoints.compressed_tensors.emit import tensors

    a, b = load_file(theirs / "model.safetensors"), load_file(ours / "model.safetensors")
    told = f"{len(a)}, alike"
    is_packed = name in EXPECTED and EXPECTED[name].startswith("packed")
    if {n: (t.dtype, t.shape) for n, t in a.items()} != {n: (t.dtype, t.shape) for n, t in b.items()}:
        told = f"{len(a)}, {EXPECTED[name]}" if is_packed else "differ"
    given = [n for n in a if n.rpartition(".")[2].startswith(("input_", "k_scale", "v_scale"))]
    if is_packed:  # as the two say what the codes are
        a, b = tensors(theirs), tensors(ours)
    different, total, farthest = Counter[str](), 0, 0.0
    for n in sorted(a.keys() & b.keys()):
        x, y = a[n], b[n]
        if n in given:
            unit = 256.0 if x.dtype == torch.int8 else float(x.float().abs().max())
            farthest = max(farthest, float((x.float() - y.float()).abs().max()) / unit)
        elif x.shape == y.shape and x.dtype == y.dtype:
            x, y = (t.contiguous().flatten().view(torch.uint8) for t in (x, y))
            total += x.numel()
            different[n.rpartition(".")[2]] += int((x != y).sum())
    wrong = {suffix: count for suffix, count in different.items() if count}
    found = ", ".join(f"{suffix} {count / total:.2%}" for suffix, count in wrong.items()) or "none"
    if wrong and name == "GPTQ_W4A16":
        found = f"{found}: {EXPECTED[name]}"
    settings, is_said = compare_settings(theirs, ours, is_packed)
    cells = [told, found, f"within {farthest:.1%}" if given else "", settings]
    is_equal = a.keys() == b.keys() and told != "differ" and farthest <= NEAR and is_said
    return cells, is_equal and (not wrong or name == "GPTQ_W4A16")


def compare_settings(theirs: Path, ours: Path, is_packed: bool) -> tuple[str, bool]:
    """What differs in ``quantization_config``, and whether it may."""
    a, b = (json.loads((path / "config.json").read_text())["quantization_config"] for path in (theirs, ours))
    lines = [key for key in ("ignore", "quant_method", "quantization_status") if a[key] != b[key]]
    caches = [None if c["kv_cache_scheme"] is None else c["kv_cache_scheme"] | {"observer": None} for c in (a, b)]
    lines += ["kv_cache_scheme"] * (caches[0] != caches[1])
    lines += ["keys"] * (a.keys() != b.keys()) + ["format"] * (a["format"] != b["format"] and not is_packed)
    groups = [sorted(map(_plain, c["config_groups"].values())) for c in (a, b)]
    if is_packed:
        groups = [[text.replace("int-quantized", "pack-quantized") for text in one] for one in groups]
    lines += ["groups"] * (groups[0] != groups[1])
    names = "" if a["config_groups"].keys() == b["config_groups"].keys() else ", names of groups kept"
    return (f"differ: {', '.join(lines)}" if lines else f"alike{names}"), not lines


def _plain(group: dict[str, Any]) -> str:
    """A group without its targets, of which there are many ways to say the same, and words that mean the same."""
    text = json.dumps({key: value for key, value in group.items() if key != "targets"}, sort_keys=True)
    for theirs, ours in (('"minmax"', '"static_minmax"'), ('"actorder": "static"', '"actorder": "weight"')):
        text = text.replace(theirs, ours)
    return text


def _windows() -> list[list[int]]:
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    files = sorted((ROOT / "graphq" / "numerics").glob("*.py"))
    ids = tokenizer.encode("".join(file.read_text(encoding="utf-8") for file in files)).ids
    return [ids[i : i + LENGTH] for i in range(0, WINDOWS * LENGTH, LENGTH)]


def make(told: str) -> int:
    """Writes llm-compressor's checkpoint of each of these names. Runs in its Python."""
    import torch
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place, names = json.loads(told)
    torch.set_num_threads(1)
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    rows = _windows()
    for name in names:
        folder = Path(place) / name
        recipe = Path(place) / f"{name}.yaml"
        recipe.write_text(json.dumps(RECIPES[name]))
        model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
        data: Any = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * LENGTH] * WINDOWS})
        try:
            oneshot(
                model=model,
                dataset=data,
                recipe=str(recipe),
                processor=tokenizer,
                num_calibration_samples=WINDOWS,
                max_seq_length=LENGTH,
                shuffle_calibration_samples=False,
                pipeline="independent",
            )
            packed = {"quantization_format": "pack-quantized"} if name == "W4A8_packed" else {}
            model.save_pretrained(folder, save_compressed=True, **packed)
        except Exception as error:  # noqa: BLE001  # of whatever kind: the case has no peer then
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            continue
        (folder / "recipe.yaml").write_text(recipe.read_text())
    return 0


if __name__ == "__main__":
    os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    sys.exit(make(sys.argv[2]) if sys.argv[1] == "--client" else main(sys.argv[1], sys.argv[2:]))
