"""Qualcomm's QNN takes static W8A8 models whole for its tensor processor, in integers, on its x86-64 simulator.

https://github.com/onnxruntime/onnxruntime-qnn. Run by ``judges.py``, or as

    OMP_NUM_THREADS=1 .judges/qnn-htp/bin/python judges/run_qnn_htp.py [NAME ...]

NAMEs are models of tests/matrix_models.py; default: all of ``TAKEN``. Each is compiled for the profile ``qnn-htp`` and
written with fixed shapes. Fallback to the CPU is off, so that a node that QNN refuses is an error; the graph that QNN
compiled is dumped and read: float operands prove that something is not in integers. Exit status 1, with a reason, where
a model is refused, where an op but the border's Quantize and Dequantize has a float operand, or where the output is
further from the QDQ form's than ``BOUND`` of its norm.
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
TAKEN: Final = (
    *("resnet", "mobilenet-v2", "efficientnet", "convnext", "regnet", "unet", "densenet", "vit", "swin", "segformer"),
    *("bert", "distilbert", "whisper-encoder", "wav2vec2", "tcn"),
)
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


def judge(name: str, place: Path) -> str | None:
    """What is wrong with the model of this name; None where nothing is. Prints what QNN made of it."""
    import graphq
    from graphq.errors import GraphqError
    from tests.matrix_models import model

    made, inputs = model(name)
    one = {key: value[:1] for key, value in inputs.items()}
    try:
        compiled = graphq.compile(made, profile="qnn-htp", inputs=inputs, calibration=[inputs])
        sizes = {"batch": 1} | ({"sequence": 16} if "input_ids" in inputs else {})
        compiled.emit("onnx", place / name, shapes=sizes)
    except GraphqError as error:
        return f"graphq: {error}"
    folder = place / f"{name}.json"
    folder.mkdir()
    try:
        opened = session(place / name / "model.onnx", folder)
        found = opened.run(None, {i.name: one[i.name].numpy() for i in opened.get_inputs()})[0]
    except Exception as error:  # noqa: BLE001 - whatever the runtime says
        print(f"  {dict(ops_of(folder))}")
        return f"refused: {str(error).splitlines()[0][:200]}"
    ops = ops_of(folder)
    print(f"  {dict(ops)}")
    wanted = compiled.graph(*one.values())[0].detach().numpy()
    error = float(((found - wanted) ** 2).sum() ** 0.5 / (wanted**2).sum() ** 0.5)
    print(f"  {sum(ops.values())} ops, output within {error:.2%} of the QDQ form's norm")
    if left := floats(ops):
        return f"in float: {', '.join(left)}"
    return None if error <= BOUND["uint8"] else f"its output is {error:.1%} from the QDQ form's"


def main() -> int:
    """0 where all are taken in integers."""
    import onnxruntime
    import onnxruntime_qnn  # pyright: ignore[reportMissingImports]

    onnxruntime.register_execution_provider_library("QNNExecutionProvider", onnxruntime_qnn.get_library_path())
    faults: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in sys.argv[1:] or TAKEN:
            print(name, flush=True)
            if problem := judge(name, Path(place)):
                faults[name] = problem
                print(f"  FAULT {problem}", flush=True)
    for name, problem in faults.items():
        print(f"{name}: {problem}", file=sys.stderr)
    return int(bool(faults))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
