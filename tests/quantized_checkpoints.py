"""Quantized checkpoints of tiny models: what tests of readers, of compilation from them and of conversion begin with.

Those of transformers' own formats are made here by hand; compressed-tensors' own library is the judge of its formats.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import graphq
from tests.models import tiny

# A format a layer: what compressed-tensors has.
EVERY_FORMAT = """
graphq: 1
rules:
- {match: "*.0.*.q_proj", weight: int4/half/g32}
- {match: "*.0.*.k_proj", weight: int4/asym/joint/g16}
- {match: "*.0.*.v_proj", weight: int3/half/channel}
- {match: "*.0.*.o_proj", weight: float8_e4m3fn/32x16, input: float8_e4m3fn/g16/dynamic}
- {match: "*.0.*.gate_proj", weight: nvfp4}
- {match: "*.0.*.up_proj", weight: mxfp4/even}
- {match: "*.0.*.down_proj", weight: mxfp8_e4m3/even, input: mxfp8_e4m3/even/dynamic}
- {match: "*.1.*.q_proj", weight: int8/half/channel, input: int8/token/dynamic}
- {match: "*.1.*.k_proj", weight: float8_e4m3fn/tensor}
- {match: "*.1.*.v_proj", weight: int8/half/tensor, input: int8/token/dynamic}
- {match: "*.1.*.o_proj", weight: float8_e4m3fn/channel, input: float8_e4m3fn/token/dynamic}
- {match: "*.1.*.gate_proj", weight: int4/asym/joint/tensor}
- {match: "*.1.*.up_proj", weight: int8/half/g32}
"""


def source(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """A float model."""
    tiny(family, **options).to(dtype).save_pretrained(folder)
    return folder


def written(folder: Path, spec: Any, target: str = "compressed-tensors", family: str = "llama", **options: Any) -> Path:
    """A checkpoint of this spec without graphq's manifest."""
    given = options.pop("calibration", None)
    made = graphq.compile(
        source(folder.with_name(f"{folder.name}-source"), family, **options),
        spec,
        target=target,
        target_options={"consumer": "any"},
        calibration=given,
    )
    made.emit(target, folder, consumer="any")
    (folder / "graphq.json").unlink()
    return folder


def held(folder: Path) -> dict[str, Tensor]:
    """The tensors of all files."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_bytes(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names of tensors that are not the same, byte for byte."""

    def is_same(a: Tensor, b: Tensor) -> bool:
        same = a.dtype == b.dtype and a.shape == b.shape
        return same and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))

    unlike = [name for name in one.keys() & other.keys() if not is_same(one[name], other[name])]
    return sorted([*unlike, *(one.keys() ^ other.keys())])


def changed(folder: Path, change: Any) -> None:
    """The tensors of the only file become what ``change`` makes of them."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    for index in folder.glob("*.index.json"):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, file.name)}))


def decompressed(folder: Path) -> dict[str, Tensor]:
    """The weight of each quantized layer by compressed-tensors' own decompression."""
    import compressed_tensors.compressors  # noqa: F401  # pyright: ignore[reportUnusedImport]
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.utils.match import match_name

    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    tensors = held(folder)
    layers = {name.rpartition(".")[0] for name in tensors if name.endswith(".weight_scale")}
    found: dict[str, Tensor] = {}
    for layer in sorted(layers):
        (group,) = [
            g for g in groups.values() if g["targets"] == ["Linear"] or any(match_name(layer, t) for t in g["targets"])
        ]
        named = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.rpartition(".")[0] == layer}
        scheme = QuantizationScheme(**group)
        made: Any = BaseCompressor.get_value_from_registry(group["format"])
        found[layer] = made.decompress({k: v for k, v in named.items() if k != "bias"}, scheme)["weight"]
    return found


def with_config(folder: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


def float8(folder: Path, family: str = "llama", rows: int = 32, columns: int = 16, **options: Any) -> dict[str, Tensor]:
    """A checkpoint as DeepSeek-V3's, with smaller blocks; and its weights as transformers dequantizes them."""
    source(folder, family, **options)
    (file,) = folder.glob("*.safetensors")
    tensors, wanted = load_file(file), {}
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    for name, w in list(tensors.items()):
        if not name.endswith(("_proj.weight", ".w1.weight", ".w2.weight", ".w3.weight")):
            continue
        assert w.shape[0] % rows == 0, name
        assert w.shape[1] % columns == 0, name
        blocks = w.float().reshape(w.shape[0] // rows, rows, w.shape[1] // columns, columns)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn).reshape(w.shape)
        tensors[name], tensors[f"{name}_scale_inv"] = codes, scale
        wanted[name] = Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16)  # type: ignore[arg-type]
    save_file(tensors, file, metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    with_config(folder, settings | {"weight_block_size": [rows, columns]})
    return wanted


def gpt_oss(folder: Path) -> dict[str, Tensor]:
    """A checkpoint as gpt-oss's: experts of random codes and exponents; and its stacks as transformers dequantizes them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    source(folder, "gpt_oss")
    (file,) = folder.glob("*.safetensors")
    tensors, wanted = load_file(file), {}
    draw = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith((".gate_up_proj", ".down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=draw)
        scales = torch.randint(118, 124, (experts, rows, columns // 32), dtype=torch.uint8, generator=draw)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        wanted[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, file, metadata={"format": "pt"})
    with_config(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    return wanted
