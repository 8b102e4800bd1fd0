"""A file of more than 2 GiB, which protobuf alone cannot hold: written, checked and read, in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

SCRIPT: Final = """
import json, sys
from pathlib import Path
import torch
from torch import nn
import graphq

folder = Path(sys.argv[1])

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) << 10

torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(64, 8192), *(nn.Linear(8192, 8192, bias=False) for _ in range(9)), nn.Linear(8192, 8))
x = torch.randn(2, 64)
weights = sum(p.nbytes for p in model.parameters())
Path("/proc/self/clear_refs").write_text("5")
rules = [{"match": "0", "weight": "int8/channel"}, {"match": "10", "weight": "int4/g32"}]
compiled = graphq.compile(model.eval(), {"graphq": 1, "rules": rules}, inputs=x, consume=True)
del model
compiled.emit("onnx", folder)
peak = resident("VmHWM")
wanted = compiled.graph(x)[0]
del compiled

import onnx, onnxruntime
onnx.checker.check_model(str(folder / "model.onnx"))
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
found = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
print(json.dumps({
    "weights": weights,
    "peak": peak,
    "error": float((found - wanted).abs().max() / wanted.abs().max()),
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is Linux's")
def test_a_file_of_more_than_2_gib(tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    try:
        said = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(folder)], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
    finally:
        for file in folder.glob("*"):  # pytest keeps the folders of its last runs
            file.unlink()
    found = json.loads(said.splitlines()[-1])
    assert sizes["model.onnx.data"] > 2 << 30
    assert sizes["model.onnx"] < 1 << 20
    assert found["error"] <= 1e-5
    assert found["peak"] <= 2.5 * found["weights"], f"{found['peak'] / found['weights']:.2f} times the float weights"
