"""Qualcomm's QNN takes static models of 8 bits, and of 16-bit activations, whole for its tensor processor, in integers,
on its x86-64 simulator.

https://github.com/onnxruntime/onnxruntime-qnn. Run by ``judges.py``, or as

    OMP_NUM_THREADS=1 .judges/qnn-htp/bin/python judges/run_qnn_htp.py [uint8|uint16] [NAME ...]

NAMEs are models of tests/matrix_models.py; default: all of ``TAKEN``, in both types. Each is compiled for the profile
``qnn-htp`` and written with fixed shapes. Fallback to the CPU is off, so that a node that QNN refuses is an error; the
graph that QNN compiled is dumped and read: float operands prove that something is not in integers. Then the file is
taken apart (qdq_parts.py), and each op computes from what the file itself, as it is written, has for its inputs.

Exit status 1, with a reason, where a model is refused; where an op but the border's Quantize, Dequantize and Cast has a
float operand; where an op is further from the file's own result than ``STEPS``, or ``WIDE_STEPS`` of its kind with 16
bits, of its output's grid; or where an output
of the whole is further from the QDQ form's than ``BOUND`` of its norm.
"""

import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for the tests' models

BOUND: Final = {"uint8": 0.06, "uint16": 0.005}
LLAMAS: Final = {"llama": 2, "llama-one-head": 1}  # by name, heads of keys and values
LOOSE: Final = {"uint8": 0.1, "uint16": 0.01}  # theirs: of weights drawn, 140 ops in a row
STEPS: Final = {"uint8": 2.0, "uint16": 6.0}  # of 65,536: Sigmoid and Tanh 4, sums and norms 2
# What is further off with 16 bits, whatever it is fed. The factor of a product (scale of the input times scale of the
# weight by scale of the output) has 11 bits, and multiplies the zero point, too: a code is off by up to 2^-11 of it, or
# 32 steps. Columns of a MatMul's second operand that 8 signed bits around its zero point do not hold are rounded
# again. Gelu and Softmax are interpolated.
WIDE_STEPS: Final = {"Conv": 34.0, "ConvTranspose": 34.0, "Gemm": 34.0, "MatMul": 256.0, "Gelu": 64.0, "Softmax": 128.0}
TAKEN: Final = (
    *("resnet", "mobilenet-v2", "efficientnet", "convnext", "regnet", "unet", "densenet", "vit", "swin", "segformer"),
    *("detr", "bert", "distilbert", "whisper-encoder", "wav2vec2", "tcn", "bilstm", *LLAMAS),
)
# Ops that the simulator computes otherwise, by what they are fed.
KNOWN: Final = {
    ("Pad", "uint8"): "rows and columns at the ends alone get another code than the zero point",
    ("Pad", "uint16"): "rows and columns at the ends alone get another code than the zero point",
    ("Softmax", "uint16"): "scores that all are alike, on a grid finer than 3e-6",
}
# What stays float by name: the angles of rotary embeddings, of positions that are integers.
LEFT: Final = dict.fromkeys(LLAMAS, ("Concat", "ElementWiseCos", "ElementWiseMultiply", "ElementWiseSin"))
_TYPES: Final = {
    0x0408: "u8", 0x0308: "s8", 0x0416: "u16", 0x0316: "s16", 0x0332: "s32q", 0x0232: "f32", 0x0216: "f16",
    0x0132: "u32", 0x0032: "s32", 0x0508: "bool", 0x0404: "u4", 0x0304: "s4", 0x0064: "s64",
}  # fmt: skip
_BORDER: Final = ("Quantize", "Dequantize", "Cast")


def ops_of(folder: Path) -> Counter[str]:
    """The ops of the graphs that QNN compiled, with their operands' types: ``Conv2d(u8,s8,s32q->u8)``."""
    found: Counter[str] = Counter()
    for file in folder.glob("*.json"):
        if file.name.endswith("_tensor_log.json"):
            continue
        described: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        graph = described.get("graph", described)
        tensors: dict[str, dict[str, Any]] = graph["tensors"]

        def kind(name: str, tensors: dict[str, dict[str, Any]] = tensors) -> str:
            code = int(tensors[name]["data_type"])
            return _TYPES.get(code, hex(code))

        for node in graph["nodes"].values():
            given, made = (",".join(map(kind, node[key])) for key in ("input_names", "output_names"))
            found[f"{node['type']}({given}->{made})"] += 1
    return found


def floats(found: Counter[str]) -> list[str]:
    """The ops with a float operand that do not stand at the border."""
    return [op for op in found if "f32" in op or "f16" in op if not op.startswith(tuple(f"{b}(" for b in _BORDER))]


def spec(activations: str) -> dict[str, Any] | None:
    """The profile's own spec, or that with all activations in 16 bits."""
    if activations == "uint8":
        return None
    layers = "kind:linear|conv1d|conv2d|conv_transpose2d|recurrent"
    rule = {"match": layers, "weight": "int8/channel", "may_match_nothing": True}
    return {"graphq": 1, "rules": [rule], "activations": f"{activations}/tensor"}


def session(model: Path, folder: Path) -> Any:
    """The model in ONNX Runtime on QNN alone; what QNN compiles is written into ``folder``."""
    import onnxruntime
    import onnxruntime_qnn  # pyright: ignore[reportMissingImports]

    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == "QNNExecutionProvider"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    settings = {
        "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
        "offload_graph_io_quantization": "0",
        "dump_json_qnn_graph": "1",
        "json_qnn_graph_dir": str(folder),
    }
    options.add_provider_for_devices(devices, settings)
    return onnxruntime.InferenceSession(str(model), options)


def widen(model: Any) -> None:
    """Weights give activations of about 1, as trained ones do: those that transformers draws give 1e-6 behind a few
    layers, which arithmetic of fixed point is not made for.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.named_parameters():
        if tensor.dim() > 1 and "embed" not in name:
            gain = 0.5 if tensor.dim() == 2 else 1.0  # what stands beside a residual stream is smaller than it
            tensor.data.normal_(std=gain * tensor[0].numel() ** -0.5, generator=generator)


def llama(heads: int) -> tuple[Any, dict[str, Any]]:
    """The prefill of a small language model with so many heads of keys and values, and inputs."""
    import torch
    import transformers
    from torch import nn

    class Prefill(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes: dict[str, Any] = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96}
            sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": heads}
            self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))

        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits

    ids = torch.randint(0, 100, (2, 16), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    return Prefill().eval(), {"input_ids": ids, "position_ids": torch.arange(16).repeat(2, 1)}


def judge(name: str, activations: str, place: Path) -> list[str]:
    """What is wrong with the model of this name; prints what QNN made of it."""
    import graphq
    from graphq.errors import GraphqError
    from tests.matrix_models import model

    made, inputs = llama(LLAMAS[name]) if name in LLAMAS else model(name)
    widen(made)
    one = {key: value[:1] for key, value in inputs.items()}
    path = place / f"{name}-{activations}"
    try:
        compiled = graphq.compile(made, spec(activations), profile="qnn-htp", inputs=inputs, calibration=[inputs])
        sizes = {"batch": 1} | ({"sequence": 16} if "input_ids" in inputs else {})
        compiled.emit("onnx", path, shapes=sizes)
    except GraphqError as error:
        return [f"graphq: {error}"]
    folder = path / "compiled"
    folder.mkdir()
    given = {key: value.numpy() for key, value in one.items()}
    try:
        opened = session(path / "model.onnx", folder)
        outputs = opened.run(None, {i.name: given[i.name] for i in opened.get_inputs()})
        ops = ops_of(folder)
        print(f"  {dict(ops)}")
        off = each_op(path, given)
    except Exception as error:  # noqa: BLE001 - whatever the runtime says
        print(f"  {dict(ops_of(folder))}")
        return [f"refused: {str(error).splitlines()[0][:200]}"]
    left = [op for op in floats(ops) if op.split("(")[0] not in LEFT.get(name, ())]
    faults = [f"in float: {', '.join(left)}"] if left else []
    for found, result in zip(outputs, compiled.graph(*one.values()), strict=True):
        wanted = result.detach().numpy()
        error = float(((found - wanted) ** 2).sum() ** 0.5 / (wanted**2).sum() ** 0.5)
        print(f"  an output within {error:.2%} of the QDQ form's norm")
        if error > (LOOSE if name in LLAMAS else BOUND)[activations]:
            faults.append(f"an output is {error:.1%} from the QDQ form's")
    worst: dict[str, list[float]] = {}
    for part, steps in off.items():
        worst.setdefault(part.op, []).append(steps)
    told = (f"{kind} {max(steps):.0f} ({len(steps)})" for kind, steps in sorted(worst.items()))
    print(f"  {sum(ops.values())} ops; {len(off)} fed alone, steps off at most: {', '.join(told)}", flush=True)
    for part, steps in off.items():
        wide = WIDE_STEPS.get(part.op.split("+")[0]) if activations == "uint16" else None
        if steps <= (wide or STEPS[activations]):
            continue
        if why := KNOWN.get((part.op, activations)):
            print(f"  known: {part.op} {part.name} is {steps:.0f} steps off: {why}")
        else:
            faults.append(f"{part.op} {part.name} is {steps:.0f} steps off")
    return faults


def each_op(path: Path, given: dict[str, Any]) -> dict[Any, float]:
    """How many steps each op is off, fed by itself what the file has for its inputs."""
    import onnx
    from qdq_parts import activations, feeds, on_grids, steps, take_apart

    model = onnx.load(str(path / "model.onnx"))
    own = on_grids(model, {one.name: given[one.name] for one in model.graph.input})
    apart, parts = take_apart(model)
    held = activations(model, parts, own)
    (path / "apart").mkdir()
    onnx.save(apart, path / "apart.onnx")
    opened = session(path / "apart.onnx", path / "apart")
    found = opened.run(None, feeds(parts, held, own))
    return steps(parts, held, dict(zip([one.name for one in opened.get_outputs()], found, strict=True)))


def main() -> int:
    """0 where all are taken in integers."""
    import onnxruntime
    import onnxruntime_qnn  # pyright: ignore[reportMissingImports]

    onnxruntime.register_execution_provider_library("QNNExecutionProvider", onnxruntime_qnn.get_library_path())
    given = sys.argv[1:]
    types = [one for one in BOUND if one in given] or list(BOUND)
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        for name in [one for one in given if one not in BOUND] or TAKEN:
            for activations in types:
                print(f"{name}, {activations}", flush=True)
                for problem in judge(name, activations, Path(place)):
                    faults.append(f"{name}, {activations}: {problem}")
                    print(f"  FAULT {problem}", flush=True)
    for fault in faults:
        print(fault, file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
