"""Every file that is written for a profile satisfies the checks of ``checks.py``: each model of the matrix, each profile."""

from pathlib import Path

import pytest

import graphq
from graphq.lowering.profiles import PROFILES
from tests.lowering.profiles.checks import CHECKS, File
from tests.matrix_models import MODELS, model

QUICK = ("densenet", "tcn")  # in CI
# What does not hold, and why that is as it is.
EXPECTED: dict[tuple[str, str, str], str] = {}


def written(name: str, profile: str, folder: Path) -> Path:
    made, inputs = model(name)
    compiled = graphq.compile(made, profile=profile, inputs=inputs, calibration=[inputs])
    sizes = {"batch": 1} | ({"sequence": 16} if "input_ids" in inputs else {})
    compiled.emit("onnx", folder, shapes=sizes if PROFILES[profile].static else None)
    return folder / "model.onnx"


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]
)
def test_written_files(name, profile, tmp_path):
    file = File(written(name, profile, tmp_path / "a"), profile)
    found = {check: places for check, function in CHECKS.items() if (places := [*map(str, function(file))])}
    assert {check: places for check, places in found.items() if (name, profile, check) not in EXPECTED} == {}


def test_there_are_thirty_and_more():
    assert len(CHECKS) >= 30
