"""Compilers that read ONNX give what the QDQ form gives: IREE, TVM, and pnnx with ncnn.

https://iree.dev, https://tvm.apache.org, https://github.com/pnnx/pnnx. Run by ``judges.py``, or as

    OMP_NUM_THREADS=1 .judges/tvm/bin/python judges/run_compilers.py tvm [NAME ...]

NAMEs are models of tests/matrix_models.py; default: those that it takes. Each is compiled in each of ``SCHEMES`` that
the compiler reads and written with fixed shapes; the compiler's function and the QDQ form run on the same inputs. Exit
status 1, with a reason, where a file is refused or an output is further from the QDQ form's than ``BOUND`` of its
largest element.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

ROOT: Final = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # for the tests' models

# All activations in 8 bits, linears and convolutions alone, and weights alone.
SCHEMES: Final[Mapping[str, dict[str, Any]]] = {
    "generic-int8": {"profile": "generic-int8"},
    "ort-cpu": {"profile": "ort-cpu"},
    "weights": {"spec": {"graphq": 1, "weight": "int8/channel"}},
}
BOUND: Final = {"generic-int8": 2e-2, "ort-cpu": 2e-2, "weights": 1e-3}  # a code that is off by one is a whole step
Inputs = Mapping[str, Any]


def command(name: str, *arguments: object, cwd: Path | None = None) -> None:
    """Run a program of this environment. Raises ``RuntimeError`` with the end of what it says."""
    program = Path(sys.executable).parent / name
    done = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, check=False, cwd=cwd)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}")


def iree(file: Path, inputs: Inputs, folder: Path) -> Any:
    """What the file's function gives on IREE's CPU back end."""
    import iree.runtime  # pyright: ignore[reportMissingImports]

    command("iree-import-onnx", file, "-o", folder / "m.mlir", "--opset-version", 21)
    options = ("--iree-hal-target-backends=llvm-cpu", "--iree-llvmcpu-target-cpu=host")
    command("iree-compile", folder / "m.mlir", *options, "-o", folder / "m.vmfb")
    module = iree.runtime.load_vm_flatbuffer_file(str(folder / "m.vmfb"), driver="local-task")
    names = [name for name in module.vm_module.function_names if not name.startswith("__") and "async" not in name]
    found = module[names[0]](*inputs.values())
    return np.asarray(found[0] if isinstance(found, tuple) else found)


def tvm(file: Path, inputs: Inputs, folder: Path) -> Any:
    """What the file's function gives on TVM's LLVM target."""
    import onnx
    import tvm  # pyright: ignore[reportMissingImports]
    from tvm import relax  # pyright: ignore[reportMissingImports]
    from tvm.relax.frontend.onnx import from_onnx  # pyright: ignore[reportMissingImports]

    module = relax.transform.LegalizeOps()(from_onnx(onnx.load(file), keep_params_in_input=False))
    machine = relax.VirtualMachine(tvm.compile(module, "llvm"), tvm.cpu())
    found = machine["main"](*(tvm.runtime.tensor(x) for x in inputs.values()))
    return (found if hasattr(found, "numpy") else found[0]).numpy()


def pnnx(file: Path, inputs: Inputs, folder: Path) -> Any:
    """What ncnn gives for the network that pnnx makes of the file."""
    import ncnn  # pyright: ignore[reportMissingImports]

    (folder / "m.onnx").write_bytes(file.read_bytes())
    shapes = ",".join(f"[{','.join(map(str, x.shape))}]f32" for x in inputs.values())
    command("pnnx", "m.onnx", f"inputshape={shapes}", cwd=folder)
    net = ncnn.Net()
    net.opt.num_threads = 1
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.opt.use_bf16_storage = False
    if net.load_param(str(folder / "m.ncnn.param")) or net.load_model(str(folder / "m.ncnn.bin")):
        raise RuntimeError("ncnn does not load what pnnx made")
    running = net.create_extractor()
    for i, x in enumerate(inputs.values()):
        running.input(f"in{i}", ncnn.Mat(np.ascontiguousarray(x[0])).clone())  # ncnn has no axis of a batch of one
    status, found = running.extract("out0")
    if status:
        raise RuntimeError(f"ncnn ended with {status}")
    return np.array(found)[None]


# How each compiler runs a file; the schemes and the models that it takes (README.md: what it does not, and why).
CLIENTS: Final[Mapping[str, tuple[Callable[[Path, Inputs, Path], Any], tuple[str, ...], tuple[str, ...]]]] = {
    "iree": (iree, ("generic-int8", "ort-cpu", "weights"), ("resnet", "unet", "vit")),
    "tvm": (tvm, ("generic-int8", "ort-cpu", "weights"), ("resnet", "unet", "vit")),
    "pnnx": (pnnx, ("weights",), ("resnet", "unet")),
}


def judge(client: str, name: str, scheme: str, place: Path) -> str | None:
    """What is wrong with the model of this name in this scheme; None where nothing is."""
    import torch

    import graphq
    from tests.matrix_models import model

    made, inputs = model(name)
    compiled = graphq.compile(made, **SCHEMES[scheme], inputs=inputs, calibration=[inputs])
    place.mkdir()
    compiled.emit("onnx", place / "onnx", shapes={"batch": 1})
    one = {key: x[:1] for key, x in inputs.items()}
    with torch.no_grad():
        wanted = compiled.graph(*one.values())[0].numpy()
    try:
        found = CLIENTS[client][0](place / "onnx" / "model.onnx", {key: x.numpy() for key, x in one.items()}, place)
    except Exception as error:  # noqa: BLE001 - whatever the compiler says
        return f"refused: {str(error)[-300:]}"
    if found.shape != wanted.shape:
        return f"its output is {found.shape}, not {wanted.shape}"
    error = float(abs(found - wanted).max() / abs(wanted).max())
    print(f"{name} {scheme}: within {error:.2g} of the QDQ form", flush=True)
    return (
        None if error <= BOUND[scheme] else f"its output is {error:.2g} from the QDQ form's, more than {BOUND[scheme]}"
    )


def main() -> int:
    """0 where all is taken and right."""
    client, *names = sys.argv[1:]
    _, schemes, taken = CLIENTS[client]
    faults = 0
    with tempfile.TemporaryDirectory() as place:
        for name in names or taken:
            for scheme in schemes:
                if problem := judge(client, name, scheme, Path(place) / f"{name}-{scheme}"):
                    faults += 1
                    print(f"{client}: {name} {scheme}: {problem}", file=sys.stderr, flush=True)
    return int(faults > 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
