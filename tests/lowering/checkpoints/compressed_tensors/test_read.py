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


def with_version(directory: Path, version: object, bits: int = 8) -> Path:
    file = checkpoint(directory, ["Linear"]) / "config.json"
    found = json.loads(file.read_text())
    found["quantization_config"]["version"] = version
    found["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = bits
    file.write_text(json.dumps(found))
    return directory


@pytest.mark.parametrize("version", ["1.0.0", "", "zero", None, 0.19, "0.", ["0.19"]])
def test_versions_that_are_not_known(tmp_path: Path, version: object) -> None:
    with pytest.raises(
        TargetError, match=r"config\.json: quantization_config: version: .*: is not known; 0\.x is read$"
    ):
        tensors(with_version(tmp_path, version))


@pytest.mark.parametrize("version", ["0.9.3", "0.19.0", "0.20.1a20261101", "0.21"])
def test_versions_that_are_known(tmp_path: Path, version: str) -> None:
    assert len(tensors(with_version(tmp_path, version))) == 3


@pytest.mark.parametrize(
    ("version", "bits", "is_read"), [("0.17.1", 3, False), ("0.18.0", 3, True), ("0.17.1", 4, True)]
)
def test_codes_that_lay_otherwise_before(tmp_path: Path, version: str, bits: int, is_read: bool) -> None:
    place = with_version(tmp_path, version, bits)
    if is_read:
        assert len(tensors(place)) == 3
        return
    with pytest.raises(TargetError, match=r"config_groups\.group_0: int3.*lie otherwise in files.*before 0\.18, which"):
        tensors(place)
