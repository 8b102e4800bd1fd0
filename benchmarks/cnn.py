"""A static W8A8 ResNet-18 on the CPU: graphq's torch module and ONNX file, and what else makes one of the same weights.

    OMP_NUM_THREADS=1 python benchmarks/cnn.py [--batches 1,8] [--repeats 7]

Drawn weights in the shape of ResNet-18, pictures of 224 by 224, the same 8 for calibration and others for fidelity.
Float in eager mode; graphq's ``torch-cpu`` profile in eager mode; PyTorch's PT2E with the x86 quantizer of torchao,
compiled by inductor (where torchao is installed; it needs a C++ compiler); onnxruntime's float model, its own
``quantize_static`` at its best for this processor, and graphq's profile ``ort-cpu``. All run in turn in one process, so
that a change of the machine's load meets all alike. The table has the median of CPU times, the median of the ratios to
float eager, and the output's signal to quantization noise ratio in dB.
"""

import argparse
import importlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.config
from onnx_vs_ort_quantizer import export_float, open_session, pictures, quantize_static, run, sqnr_db
from torch import Tensor, nn

import graphq

Runner = Callable[[Tensor], Any]


class Block(nn.Module):
    """Two convolutions and what they are added to."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """``[B, 3, 224, 224]`` to ``[B, 1000]``, in 11.7 million parameters and 1.8 billion products a picture."""

    def __init__(self, width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1)
        sizes = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 2)]
        self.blocks = nn.Sequential(*(b for i, o, s in sizes for b in (Block(i, o, s), Block(o, o, 1))))
        self.head = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(torch.relu(self.norm(self.stem(x)))))
        return self.head(x.mean((2, 3)))


def drawn() -> nn.Module:
    """A net whose batch norms have seen what their convolutions give, so that activations stay in range."""
    torch.manual_seed(0)
    model = ResNet18()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    with torch.no_grad():
        model.train()(torch.cat([one["pixel_values"] for one in pictures(8)]))
    return model.eval()


def by_pt2e(model: nn.Module, calibration: list[Tensor], x: Tensor) -> Runner | None:
    """The model by PyTorch's own quantization of exported graphs, for batches of the size of ``x``; None without it."""
    try:
        pt2e: Any = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
        x86: Any = importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    except ImportError as error:
        print(f"PT2E: skipped: {error}")
        return None
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    for one in calibration:
        prepared(one.expand(x.shape))
    compiled = torch.compile(pt2e.convert_pt2e(prepared))
    with torch._inductor.config.patch(freezing=True):
        compiled(x)
    return compiled


def runners(model: nn.Module, x: Tensor, folder: Path) -> dict[str, Runner]:
    """Each way to run the model on batches like ``x``."""
    batches = pictures(8)
    calibration = [one["pixel_values"] for one in batches]
    compiled = graphq.compile(model, profile="torch-cpu", inputs=calibration[0], calibration=calibration)
    found: dict[str, Runner] = {"float, eager": model, "graphq, torch-cpu, eager": compiled}
    if (made := by_pt2e(model, calibration, x)) is not None:
        found["PT2E, inductor"] = made
    named = Named(model)
    export_float(named, batches[0], folder / "float")
    quantize_static(folder / "float" / "model.onnx", folder / "static.onnx", batches, setting="best")
    emitted = graphq.compile(named, profile="ort-cpu", inputs=batches[0], calibration=batches)
    emitted.emit("onnx", folder / "graphq")
    files = {"onnxruntime, float": folder / "float" / "model.onnx", "quantize_static, best": folder / "static.onnx"}
    for label, path in (files | {"graphq, ort-cpu": folder / "graphq" / "model.onnx"}).items():
        session = open_session(path)
        found[label] = lambda x, session=session: run(session, {"pixel_values": x})
    return found


class Named(nn.Module):
    """A model whose input has the name of the pictures."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values)


def measure(batch: int, repeats: int) -> None:
    """Prints the table of one size of batches."""
    model, tried = drawn(), torch.cat([one["pixel_values"] for one in pictures(8 + batch)[8:]])
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        ways = runners(model, tried, Path(place))
        outputs = {label: np.asarray(way(tried)) for label, way in ways.items()}
        times: dict[str, list[float]] = {label: [] for label in ways}
        for _ in range(repeats):
            for label, way in ways.items():
                start = time.process_time()
                way(tried)
                times[label].append(time.process_time() - start)
    base = times["float, eager"]
    print(f"batch {batch}: CPU ms, of float eager, dB")
    for label, own in times.items():
        ratio = statistics.median(t / f for t, f in zip(own, base, strict=True))
        noise = sqnr_db(outputs["float, eager"], outputs[label])
        print(f"  {label:26} {statistics.median(own) * 1e3:7.1f}  {ratio:5.2f}  {noise:6.1f}")


def main() -> None:
    """Prints a table for each size of batches."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    known = [flag for flag in ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in flags]
    print(
        f"{platform.processor() or platform.machine()} with {', '.join(known)}; torch {torch.__version__}, one thread"
    )
    for batch in map(int, given.batches.split(",")):
        measure(batch, given.repeats)


if __name__ == "__main__":
    main()
