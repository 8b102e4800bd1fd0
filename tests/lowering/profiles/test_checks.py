"""Every file that is written for a profile satisfies the checks of ``checks.py``: each model of the matrix, each profile."""

from pathlib import Path

import pytest

import graphq
from graphq.lowering.profiles import PROFILES
from tests.lowering.profiles.checks import CHECKS, File
from tests.matrix_models import MODELS, model

QUICK = ("densenet", "tcn")  # in CI
# What need not hold: of a profile, or of a model.
EXCUSED = {
    "vitis-ai": ["signed_weights_are_symmetric_and_narrow"],  # powers of two by least error: -128 is a code
    "bert": ["no_tensor_is_quantized_twice_alike"],  # the mask, by each layer
    "distilbert": ["no_tensor_is_quantized_twice_alike"],
}


def written(name: str, profile: str, folder: Path) -> Path:
    made, inputs = model(name)
    compiled = graphq.compile(made, profile=profile, inputs=inputs, calibration=[inputs])
    sizes = {"batch": 1} | ({"sequence": 16} if "input_ids" in inputs else {})
    compiled.emit("onnx", folder, shapes=sizes if PROFILES[profile].static else None)
    return folder / "model.onnx"


@pytest.mark.parametrize("profile", [name for name in PROFILES if name != "torch-cpu"])  # which reads no files
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]
)
def test_written_files(name, profile, tmp_path):
    file = File(written(name, profile, tmp_path / "a"), profile)
    found = {check: places for check, function in CHECKS.items() if (places := [*map(str, function(file))])}
    excused = [*EXCUSED.get(profile, ()), *EXCUSED.get(name, ())]
    assert {check: places for check, places in found.items() if check not in excused} == {}


def test_there_are_thirty_and_more():
    assert len(CHECKS) >= 30
