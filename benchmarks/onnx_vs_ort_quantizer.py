"""Static W8A8 ONNX models of graphq and of onnxruntime's own ``quantize_static``: time, fidelity, size.

    OMP_NUM_THREADS=1 python benchmarks/onnx_vs_ort_quantizer.py [--models resnet50,vit,bert] [--layers 12]

The same drawn weights, the same 16 inputs for calibration, 8 others for fidelity, one thread. Transformers are drawn
with what makes trained ones hard to quantize (``draw``); ``--layers`` is the number of their blocks. There are: the
float model as torch's exporter writes it; what ``quantize_static`` makes of that file with its default settings, with
its best for this processor (uint8 activations, int8 weights by channel, after its own preprocessing), and with these
for convolutions and products by constants alone; and graphq's profile ``ort-cpu``. They run in turn in one process, so
that a change of the machine's load meets all alike. The table has the median of the ratios of CPU time to the float
model's, the output's signal to quantization noise ratio in dB, and the size of the file.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

import graphq

Made = tuple[nn.Module, list[dict[str, Tensor]]]


def pictures(count: int, size: int = 224) -> list[dict[str, Tensor]]:
    """Smooth pictures."""
    generator = torch.Generator().manual_seed(1)
    noise = (torch.randn(1, 3, size // 8, size // 8, generator=generator) for _ in range(count))
    return [{"pixel_values": nn.functional.interpolate(one, size=(size, size), mode="bilinear")} for one in noise]


class FirstOutput(nn.Module):
    """A transformers model's first output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs)[0]


def resnet50(_: int) -> Made:
    """ResNet-50: 25.5 M parameters."""
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(ResNetConfig()).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return FirstOutput(model), pictures(24)


def draw(model: nn.Module) -> nn.Module:
    """A transformer whose linears keep the variance, with rows of unlike norms and biases; in whose norms some channels
    are ten times as large as the others, and always to one side; whose queries and keys are large enough that attention
    chooses.
    """
    generator = torch.Generator().manual_seed(2)

    def normal(like: Tensor, std: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * std

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            width = module.weight.shape[1]
            gain = normal(module.weight[:, :1], 0.3).exp() * (1.5 if "query" in name or "key" in name else 1.0)
            module.weight.data = normal(module.weight, width**-0.5) * gain
            module.bias.data = normal(module.bias, 0.2)
        elif isinstance(module, nn.LayerNorm):
            channels = torch.randperm(module.weight.numel(), generator=generator)[: module.weight.numel() // 128]
            module.weight.data = normal(module.weight, 0.3).exp()
            module.bias.data = normal(module.bias, 0.2)
            module.weight.data[channels] *= 3
            module.bias.data[channels] += 10 * torch.sign(normal(module.bias[channels], 1.0))
    return model


def vit(layers: int) -> Made:
    """ViT-base, patches of 16: 86 M parameters in 12 layers."""
    from transformers import ViTConfig, ViTModel

    model = ViTModel(ViTConfig(num_hidden_layers=layers), add_pooling_layer=False)
    return FirstOutput(draw(model)).eval(), pictures(24)


def bert(layers: int) -> Made:
    """BERT-base, 128 tokens: 110 M parameters in 12 layers."""
    from transformers import BertConfig, BertModel

    model = FirstOutput(draw(BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False))).eval()
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 30522, (1, 128), generator=generator) for _ in range(24)]
    return model, [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]


MODELS: Final[dict[str, Callable[[int], Made]]] = {"resnet50": resnet50, "vit": vit, "bert": bert}


def export_float(model: nn.Module, batch: dict[str, Tensor], path: Path) -> None:
    """The float model by torch's exporter."""
    torch.onnx.export(model, (), str(path), kwargs=batch, dynamo=True, verbose=False, external_data=False)


Setting = Literal["default", "best", "best, layers alone"]


def quantize_static(source: Path, out: Path, batches: list[dict[str, Tensor]], setting: Setting) -> None:
    """The model by onnxruntime's quantizer, by default or at its best for x86."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> Any:
            batch = next(self.left, None)
            return None if batch is None else {name: x.numpy() for name, x in batch.items()}

    if setting == "default":
        quantize_static(str(source), str(out), Reader())
        return
    alone: dict[str, Any] = {"op_types_to_quantize": ["Conv", "Gemm", "MatMul"]}
    alone["extra_options"] = {"MatMulConstBOnly": True}
    prepared = out.with_suffix(".pre.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(out),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        **({} if setting == "best" else alone),
    )


def open_session(path: Path) -> Any:
    """The model in onnxruntime, on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session: Any, batch: dict[str, Tensor]) -> Any:
    """The first output."""
    return session.run(None, {one.name: batch[one.name].numpy() for one in session.get_inputs()})[0]


def sqnr_db(wanted: Any, found: Any) -> float:
    """Signal to quantization noise ratio in decibels."""
    noise = ((wanted - found) ** 2).sum()
    return float(10 * np.log10((wanted**2).sum() / noise)) if noise else float("inf")


def measure(name: str, layers: int, repeats: int) -> None:
    """Prints the table of one model."""
    torch.manual_seed(0)
    model, batches = MODELS[name](layers)
    calibration, tried = batches[:16], batches[16:]
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        folder = Path(place)
        files = {"float": folder / "float.onnx"}
        export_float(model, calibration[0], files["float"])
        for number, setting in enumerate(get_args(Setting)):
            label = f"quantize_static, {setting}"
            files[label] = folder / f"static{number}.onnx"
            quantize_static(files["float"], files[label], calibration, setting)
        compiled = graphq.compile(model, profile="ort-cpu", inputs=calibration[0], calibration=calibration)
        compiled.emit("onnx", folder / "graphq")
        files["graphq, ort-cpu"] = folder / "graphq" / "model.onnx"
        sessions = {label: open_session(path) for label, path in files.items()}
        outputs = {label: np.stack([run(session, one) for one in tried]) for label, session in sessions.items()}
        times: dict[str, list[float]] = {label: [] for label in sessions}
        for _ in range(repeats):
            for label, session in sessions.items():
                start = time.process_time()
                run(session, tried[0])
                times[label].append(time.process_time() - start)
        base = statistics.median(times["float"])
        print(f"{name}: float {base * 1e3:.0f} ms of CPU time")
        for label, path in files.items():
            ratio = statistics.median(t / f for t, f in zip(times[label], times["float"], strict=True))
            size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")) / 1e6
            print(f"  {label:35} {ratio:5.2f}  {sqnr_db(outputs['float'], outputs[label]):6.1f} dB  {size:7.1f} MB")


def main() -> None:
    """Prints a table for each model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    import platform

    import onnxruntime

    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    known = [flag for flag in ("avx2", "avx512_vnni", "avx512_bf16", "amx_int8") if flag in flags]
    print(
        f"{platform.processor() or platform.machine()} with {', '.join(known)}; onnxruntime {onnxruntime.__version__}"
    )
    for name in given.models.split(","):
        measure(name, given.layers, given.repeats)


if __name__ == "__main__":
    main()
