"""msModelSlim on the CPU quantizes the examples' model by a config, graphq by the same one: the files are compared.

https://gitcode.com/Ascend/msmodelslim. Run by ``judges.py``, or as

    OMP_NUM_THREADS=1 .judges/modelslim/bin/python judges/run_modelslim.py [SCHEME ...]

Where all that a file holds follows from the weights, its bytes are compared, and the descriptions and indexes. Static
scales of inputs follow from activations, which msModelSlim computes in bfloat16: there codes and scales of weights are
compared byte for byte, names, dtypes and shapes of all tensors, and msModelSlim's other tensors with what its own input
scales give. Its W8A8 has no weight_scale and weight_offset, which vLLM-Ascend declares and graphq writes.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import graphq

ROOT: Final = Path(__file__).parents[1]
MODEL: Final = ROOT / "examples" / "models" / "stdlib-llama"


def _side(dtype: str, scope: str, symmetric: bool = True, method: str = "minmax") -> dict[str, Any]:
    return {"dtype": dtype, "scope": scope, "symmetric": symmetric, "method": method}


_TOKEN: Final = _side("int8", "per_token")
_INT8: Final = _side("int8", "per_channel")
_MXFP8, _MXFP4 = _side("mxfp8", "per_block"), _side("mxfp4", "per_block")
_FP8: Final = (_side("fp8_e4m3", "per_token"), _side("fp8_e4m3", "per_channel"))
_ATTENTION, _MLP = "*self_attn*", "*mlp*"
# name -> (act, weight, include) of each processor; the options of the target
SCHEMES: Final[dict[str, tuple[list[tuple[Any, Any, list[str]]], dict[str, Any]]]] = {
    "W8A8_DYNAMIC, W4A8_DYNAMIC": (
        [(_TOKEN, _INT8, [_ATTENTION]), (_TOKEN, _side("int4", "per_channel"), [_MLP])],
        {},
    ),
    "W8A16": ([(_side("float", "per_tensor", method="none"), _INT8, [_ATTENTION, _MLP])], {}),
    "W8A8": ([(_side("int8", "per_tensor", False), _INT8, [_ATTENTION, _MLP])], {}),
    "W8A8_MIX": ([(_side("int8", "pd_mix", False), _INT8, [_ATTENTION, _MLP])], {"prefill": "dynamic"}),
    "WFP8AFP8_DYNAMIC": ([(*_FP8, [_ATTENTION, _MLP])], {}),
    "W8A8_MXFP8, W4A8_MXFP": ([(_MXFP8, _MXFP8, [_ATTENTION]), (_MXFP8, _MXFP4, [_MLP])], {}),
    "W4A4_MXFP4": ([(_MXFP4, _MXFP4, [_ATTENTION, _MLP])], {}),
}
_STATIC: Final = ("quant_bias", "deq_scale", "input_scale", "input_offset")


def main(names: list[str]) -> int:
    """0 where both write the same."""
    faults = 0
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        shutil.copytree(MODEL, model)
        settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
        text = json.dumps({"pad_token": settings.get("eos_token"), **settings})  # msModelSlim pads its batches
        (model / "tokenizer_config.json").write_text(text, encoding="utf-8")
        for number, name in enumerate(names or list(SCHEMES)):
            folder = Path(place) / str(number)
            folder.mkdir()
            problems = compared(model, folder, *SCHEMES[name])
            print(f"{name}: {'; '.join(problems[:3]) or 'the same'}", flush=True)
            faults += bool(problems)
    return int(bool(faults))


def compared(
    model: Path, folder: Path, processors: list[tuple[Any, Any, list[str]]], options: dict[str, Any]
) -> list[str]:
    """What differs between msModelSlim's checkpoint and graphq's."""
    configs = [
        {"type": "linear_quant", "qconfig": {"act": act, "weight": weight}, "include": include}
        for act, weight, include in processors
    ]
    config = {
        "apiversion": "modelslim_v1",
        "metadata": {
            "config_id": "judge",
            "score": 50,
            "verified_model_types": [],
            "label": {"w_bit": 8, "a_bit": 8, "is_sparse": False, "kv_cache": False},
        },
        "spec": {
            "runner": "layer_wise",
            "process": [{"type": "group", "configs": configs}],
            "dataset": "mix_calib.jsonl",
            "save": [{"type": "ascendv1_saver", "part_file_size": 4}],
        },
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [str(Path(sys.executable).parent / "msmodelslim"), "quant", "--model_type", "default", "--device", "cpu"]
    command += ["--model_path", str(model), "--save_path", str(folder / "theirs"), "--config_path", str(file)]
    log = folder / "log"
    with log.open("w") as written:
        ran = subprocess.run([*command, "--trust_remote_code", "False"], stdout=written, stderr=written, check=False)
    if ran.returncode:
        print(log.read_text(errors="replace")[-2000:], file=sys.stderr)
        return [f"msModelSlim ended with exit status {ran.returncode}"]
    is_static = any(act["scope"] in ("per_tensor", "pd_mix") and act["dtype"] == "int8" for act, _, _ in processors)
    batches = [torch.arange(256).view(2, 128)] if is_static else None
    options = {"consumer": "any", **options}
    made = graphq.compile(str(model), str(file), target="ascend", target_options=options, calibration=batches)
    made.emit("ascend", folder / "ours", **options)
    if not graphq.verify(folder / "ours").ok:
        return ["graphq's own checkpoint is not what was compiled"]
    ours, theirs = folder / "ours", folder / "theirs"
    return static_differences(ours, theirs) if is_static else byte_differences(ours, theirs)


def tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()}


def described(directory: Path, name: str = "quant_model_description.json") -> dict[str, Any]:
    """A file of JSON."""
    return json.loads((directory / name).read_text(encoding="utf-8"))


def byte_differences(ours: Path, theirs: Path) -> list[str]:
    """The files of weights whose bytes differ, and other files whose contents do."""
    files = sorted({file.name for place in (ours, theirs) for file in place.glob("quant_model_*")})
    found: list[str] = []
    for name in files:
        if not ((ours / name).is_file() and (theirs / name).is_file()):
            found.append(f"{name}: {'graphq' if (theirs / name).is_file() else 'msModelSlim'} writes no such file")
        elif name.endswith(".json"):
            found += [] if described(ours, name) == described(theirs, name) else [f"{name}: differs"]
        elif (ours / name).read_bytes() != (theirs / name).read_bytes():
            a, b = tensors(ours), tensors(theirs)
            found.append(f"{name}: {', '.join(n for n in a.keys() | b.keys() if not _same(a.get(n), b.get(n)))[:300]}")
    return found


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def static_differences(ours: Path, theirs: Path) -> list[str]:
    """What differs of layers whose input scales come from calibration."""
    a, b = tensors(ours), tensors(theirs)
    tags, of_theirs = described(ours), described(theirs)
    found = [f"{n}: graphq writes no such tensor" for n in b.keys() - a.keys()]
    extra = {n for n in a.keys() - b.keys() if tags[n] != "W8A8" or not n.endswith(("weight_scale", "weight_offset"))}
    found += [f"{n}: msModelSlim writes no such tensor" for n in sorted(extra)]
    found += [f"{n}: tagged {tags.get(n)}, not {of_theirs[n]}" for n in b if tags.get(n) != of_theirs[n]]
    for name in sorted(a.keys() & b.keys()):
        layer, _, suffix = name.rpartition(".")
        if (a[name].dtype, a[name].shape) != (b[name].dtype, b[name].shape):
            found.append(f"{name}: {a[name].dtype}{[*a[name].shape]}, not {b[name].dtype}{[*b[name].shape]}")
        elif suffix not in _STATIC and not _same(a[name], b[name]):
            found.append(f"{name}: differs")
        elif suffix == "quant_bias":  # without a bias, -z times the sum of codes
            sums = b[f"{layer}.weight"].to(torch.int64).sum(1)
            if not torch.equal(b[name].to(torch.int64), -(b[f"{layer}.input_offset"].to(torch.int64) * sums)):
                found.append(f"{name}: is not what msModelSlim's own input_offset gives")
        elif suffix == "deq_scale":  # rounded to bfloat16 by msModelSlim
            wanted = b[f"{layer}.input_scale"] * a[f"{layer}.weight_scale"].flatten()
            if not torch.allclose(b[name], wanted, rtol=2**-8, atol=0):
                found.append(f"{name}: is not what msModelSlim's own input_scale gives")
    return found


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(sys.argv[1:]))
