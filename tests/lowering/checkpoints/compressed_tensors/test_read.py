"""What is read of checkpoints that graphq did not write, or that were damaged since: a ``TargetError``, and at once."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from graphq.errors import TargetError
from graphq.lowering.checkpoints.compressed_tensors.emit import tensors


def checkpoint(directory: Path, targets: list[str], **changed: torch.Tensor) -> Path:
    """One linear in int8 with a static input, and ``targets`` of its group."""
    parts = {
        "weight": torch.ones(4, 8, dtype=torch.int8),
        "weight_scale": torch.ones(4, 1),
        "input_scale": torch.ones(1),
    }
    save_file({f"a.bbbbbbbbbbbb.cc.{n}": t for n, t in (parts | changed).items()}, directory / "model.safetensors")
    args: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "format": "int-quantized",
        "targets": targets,
        "weights": args | {"strategy": "channel"},
        "input_activations": args | {"strategy": "tensor"},
    }
    config = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}}
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}))
    return directory


@pytest.mark.parametrize(
    "pattern",
    [r"re:^(b|a|\.|bb)+$", "re:(.*)*(.*)*(.*)*x", "re:" + ".*.*.*.*.*.*x", "re:" + "(" * 5000, "re:a{99999999999}"],
)
def test_patterns_that_cannot_be_matched_at_once_are_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(TargetError, match=r"config\.json: (config_groups\.group_0: )?targets: "):
        tensors(checkpoint(tmp_path, [pattern]))


@pytest.mark.parametrize("pattern", [r"re:^a\.b+\.cc$", r"re:.*\.(cc|dd)$", "re:.*cc", "Linear", "a.bbbbbbbbbbbb.cc"])
def test_patterns_that_llm_compressor_writes_are_read(tmp_path: Path, pattern: str) -> None:
    assert set(tensors(checkpoint(tmp_path, [pattern]))) == {
        f"a.bbbbbbbbbbbb.cc.{name}" for name in ("weight", "weight_scale", "input_scale")
    }


@pytest.mark.parametrize("shape", [(0,), (2,), (1, 0)])
def test_an_input_scale_that_is_no_single_number_is_named(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(TargetError, match=r"a\.bbbbbbbbbbbb\.cc: damaged: "):
        tensors(checkpoint(tmp_path, ["Linear"], input_scale=torch.ones(shape)))


@pytest.mark.parametrize("name", ["weight_scale", "input_scale"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_scales_are_floating_point_numbers(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    shape = (4, 1) if name == "weight_scale" else (1,)
    with pytest.raises(
        TargetError, match=r"a\.bbbbbbbbbbbb\.cc: damaged: a scale: [a-z0-9]+, no floating-point number"
    ):
        tensors(checkpoint(tmp_path, ["Linear"], **{name: torch.ones(shape).to(dtype)}))


def test_zero_points_are_codes(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"a\.bbbbbbbbbbbb\.cc: damaged: weight_zero_point: float32, not int8"):
        tensors(checkpoint(tmp_path, ["Linear"], weight_zero_point=torch.ones(4, 1)))


def test_a_configuration_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    file = checkpoint(tmp_path, ["Linear"]) / "config.json"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(TargetError, match=r"config\.json: no such file$"):
        tensors(tmp_path)
