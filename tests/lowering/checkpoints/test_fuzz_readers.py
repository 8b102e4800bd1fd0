"""Readers of checkpoints, fed damaged ones: nothing but a ``GraphqError`` comes out, and nothing outside is read."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from graphq.errors import GraphqError
from graphq.lowering.checkpoints.compressed_tensors.emit import tensors
from graphq.lowering.checkpoints.inspect import inspect_checkpoint

INT: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 8}
FLOAT: dict[str, Any] = {"num_bits": 4, "type": "float", "symmetric": True}
GROUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "packed": ("pack-quantized", INT),
    "plain": ("int-quantized", {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}),
    "float8": ("float-quantized", {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor"}),
    "nvfp4": ("nvfp4-pack-quantized", FLOAT | {"strategy": "tensor_group", "group_size": 16}),
    "mxfp4": ("mxfp4-pack-quantized", FLOAT | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}),
}
PARTS: dict[str, dict[str, torch.Tensor]] = {
    "packed": {
        "weight_packed": torch.ones(8, 4, dtype=torch.int32),
        "weight_scale": torch.ones(8, 4, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([8, 32]),
        "weight_zero_point": torch.ones(1, 4, dtype=torch.int32),
    },
    "plain": {"weight": torch.ones(8, 32, dtype=torch.int8), "weight_scale": torch.ones(8, 1)},
    "float8": {"weight": torch.ones(8, 32).to(torch.float8_e4m3fn), "weight_scale": torch.ones(1)},
    "nvfp4": {
        "weight_packed": torch.ones(8, 16, dtype=torch.uint8),
        "weight_scale": torch.ones(8, 2).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.ones(1),
    },
    "mxfp4": {
        "weight_packed": torch.ones(8, 16, dtype=torch.uint8),
        "weight_scale": torch.ones(8, 1, dtype=torch.uint8),
    },
}
ODD = ("", "..", "../x", "/etc/passwd", "\0", "weight", "9" * 400, "re:(", "\ud800", None, True, -1, 0, 1 << 63, 1e300)


def checkpoint(directory: Path) -> Path:
    """One linear of each format, and a float tensor."""
    held = {f"layers.{name}.{part}": tensor for name, parts in PARTS.items() for part, tensor in parts.items()}
    save_file({**held, "norm.weight": torch.ones(4)}, directory / "model.safetensors")
    groups = {
        name: {"format": format, "targets": [f"layers.{name}"], "weights": weights, "input_activations": None}
        for name, (format, weights) in GROUPS.items()
    }
    found = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    config = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "quantization_config": found}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def flipped(data: bytes, draw: random.Random) -> bytes:
    """Some bytes are others, gone, or there twice; most changes fall into the header."""
    made = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(min(len(made), draw.choice([16, 2000, len(made)])))
        match draw.randrange(4):
            case 0:
                made[place] = draw.randrange(256)
            case 1:
                made[place] = draw.choice(b'0123456789-{}[]",:.')
            case 2:
                del made[place : place + draw.randint(1, 9)]
            case _:
                made[place:place] = made[place : place + draw.randint(1, 9)]
    return bytes(made)


def replaced(config: Any, draw: random.Random) -> Any:
    """A value somewhere in it is another, or gone."""
    at = config
    while True:
        keys: list[Any] = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            return config
        key = draw.choice(keys)
        if isinstance(at[key], dict | list) and draw.random() < 0.85:
            at = at[key]
            continue
        if isinstance(at, dict) and draw.random() < 0.2:
            del at[key]
        else:
            at[key] = draw.choice([*ODD, [], {}, [None], {"a": 1}, at[key]])
        return config


def survives(directory: Path) -> bool:
    """Whether both readers read the checkpoint; what they raise is a ``GraphqError``."""
    readers: tuple[Callable[[Path], object], ...] = (tensors, inspect_checkpoint)
    done = True
    for read in readers:
        try:
            read(directory)
        except GraphqError:
            done = False
    return done


def hurt(directory: Path, draws: int, seed: int) -> int:
    """How many of so many damaged checkpoints were refused."""
    whole = checkpoint(directory)
    weights, config = (whole / "model.safetensors").read_bytes(), (whole / "config.json").read_text()
    assert survives(whole)
    refused = 0
    for number in range(draws):
        draw = random.Random(seed + number)
        in_weights = draw.random() < 0.5
        (whole / "model.safetensors").write_bytes(flipped(weights, draw) if in_weights else weights)
        changed = config if in_weights else json.dumps(replaced(json.loads(config), draw))
        (whole / "config.json").write_bytes(
            flipped(config.encode(), draw) if not in_weights and draw.random() < 0.3 else changed.encode()
        )
        try:
            refused += not survives(whole)
        except BaseException as error:
            error.add_note(f"seed {seed + number}")
            raise
    return refused


def test_damaged_checkpoints(tmp_path: Path) -> None:
    assert hurt(tmp_path, 300, seed=0) > 150


@pytest.mark.slow
def test_many_damaged_checkpoints(tmp_path: Path) -> None:
    assert hurt(tmp_path, 20_000, seed=1000) > 10_000
