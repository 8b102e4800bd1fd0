"""Prefill, decode and resident memory of a Llama of 0.35 billion parameters: graphq's packed modules, and others.

    python benchmarks/llm.py [--layers 24] [--width 1024] [--vocabulary 32000] [--prompt 512] [--tokens 64] [--rounds 5]
                             [--threads 1] [--only transformers,W4A16]

Weights are drawn, and stored in bfloat16. Every column is a process of its own, whose memory is what its resident size
grew by since before it loaded the model, after a prefill and a decode. They take turns: a prefill of ``--prompt``
tokens and ``--tokens`` steps behind it a round. The table has medians of processor time (one thread; else wall time)
and of the ratios to transformers in bfloat16, eager. ONNX Runtime runs graphq's own file, W4A8. torchao and
llama.cpp have no column; the output says whether they are installed.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch

SPECS: Final[dict[str, dict[str, str]]] = {
    "W8A8": {"weight": "int8/channel", "input": "int8/token/dynamic"},
    "W4A16": {"weight": "int4/g128"},
    "W4A8": {"weight": "int4/g128", "input": "int8/token/dynamic"},
}
FIRST: Final = "transformers"
ORT: Final = "onnxruntime W4A8"
PEERS: Final = ("torchao", "llama_cpp")


def save(folder: Path, options: argparse.Namespace) -> int:
    """The model's directory is there; the bytes of its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.width,
        intermediate_size=options.width * 11 // 4,
        num_hidden_layers=options.layers,
        num_attention_heads=max(options.width // 64, 2),
        num_key_value_heads=max(options.width // 256, 1),
        max_position_embeddings=2048,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def compile_one(source: str, name: str, out: str) -> None:
    """An artifact for the column of this name."""
    import graphq

    spec = {"graphq": 1, **SPECS["W4A8" if name == ORT else name]}
    made = graphq.compile(source, spec, dtype=torch.float32 if name == ORT else torch.bfloat16)
    if name == ORT:
        made.emit("onnx", out, profile="ort-cpu")
    else:
        made.save(out)


def resident() -> int:
    """Bytes of this process in memory, those of files that it maps included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


Step = Callable[[Any, Any], Any]  # token ids and the cache that a step gave, or None -> its cache


def opened(name: str, place: str) -> Step:
    """A call of the column's model."""
    if name == ORT:
        return onnx_step(Path(place))
    if name == FIRST:
        from transformers import LlamaForCausalLM

        model: Any = LlamaForCausalLM.from_pretrained(place, dtype=torch.bfloat16).eval()
    else:
        import graphq

        model = graphq.load(place)
    return lambda ids, past: model(input_ids=ids, past_key_values=past, use_cache=True).past_key_values


def onnx_step(folder: Path) -> Step:
    """A call of ONNX Runtime's session, which takes and gives the cache as tensors."""
    import numpy as np
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = torch.get_num_threads(), 1
    session = onnxruntime.InferenceSession(folder / "model.onnx", settings, providers=["CPUExecutionProvider"])
    caches = [one for one in session.get_inputs() if one.name.startswith("past_key_values")]
    given = [one.name for one in session.get_outputs()]

    def step(ids: torch.Tensor, past: Any) -> Any:
        if past is None:
            past = {one.name: np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32) for one in caches}
        held, count = next(iter(past.values())).shape[2], ids.shape[1]
        feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, held + count), np.int64)} | past
        feeds["position_ids"] = np.arange(held, held + count, dtype=np.int64)[None]
        made = dict(zip(given, session.run(None, feeds), strict=True))
        return {one.name: made[one.name.replace("past_key_values", "present")] for one in caches}

    return step


def work(name: str, place: str, prompt: int, tokens: int, vocabulary: int) -> None:
    """Answers each line of its input with a line: the seconds of a prefill and of a step behind it, and memory."""
    before = resident()
    step = opened(name, place)
    ids = torch.randint(0, vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    with torch.inference_mode():
        for _ in sys.stdin:
            start = clock()
            past = step(ids, None)
            middle = clock()
            for _ in range(tokens):
                past = step(ids[:, :1], past)
            end = clock()
            held = resident() - before
            print(json.dumps([middle - start, (end - middle) / tokens, held]), flush=True)


def ask(worker: "subprocess.Popen[str]") -> list[float]:
    """The figures of one round of a worker."""
    assert worker.stdin is not None, "it has pipes"
    assert worker.stdout is not None, "it has pipes"
    worker.stdin.write("\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


def measure(folder: Path, options: argparse.Namespace, columns: list[str]) -> None:
    """Prints the table."""
    size = save(folder / "model", options)
    command = [sys.executable, __file__, "--threads", str(options.threads)]
    sizes = ["--prompt", str(options.prompt), "--tokens", str(options.tokens), "--vocabulary", str(options.vocabulary)]
    workers: dict[str, subprocess.Popen[str]] = {}
    for number, name in enumerate(columns):
        place = folder / ("model" if name == FIRST else f"artifact{number}")
        if name != FIRST:
            subprocess.run([*command, "--compile", str(folder / "model"), name, str(place)], check=True)
        run = [*command, *sizes, "--work", name, str(place)]
        workers[name] = subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    found: dict[str, list[list[float]]] = {name: [] for name in columns}
    try:
        for number in range(options.rounds + 1):
            for name, worker in workers.items():
                made = ask(worker)
                if number:  # the first prepares
                    found[name].append(made)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    print(
        f"{options.layers} layers of width {options.width}, {size / 1e9:.2f} GB in bfloat16, {options.threads} threads"
    )
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    heads = ("prefill/s", "ratio", "ms a step", "tokens/s", "ratio", "MB", "ratio")
    print(" " * 18, *(head.rjust(width) for head, width in zip(heads, (10, 6, 10, 9, 6, 7, 6), strict=True)))
    first = found[columns[0]]
    for name, rounds in found.items():
        prefill, step, held = (statistics.median(one[i] for one in rounds) for i in range(3))
        ratio = [statistics.median(b[i] / a[i] for a, b in zip(rounds, first, strict=True)) for i in range(2)]
        memory = held / statistics.median(one[2] for one in first)
        print(
            f"{name:18} {options.prompt / prefill:10.0f} {ratio[0]:6.2f} {step * 1e3:10.2f} {1 / step:9.1f}"
            f" {ratio[1]:6.2f} {held / 1e6:7.0f} {memory:6.2f}"
        )
    for name in PEERS:
        state = "installed" if importlib.util.find_spec(name) else "not installed"
        print(f"{name}: no column ({state})")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in (("layers", 24), ("width", 1024), ("vocabulary", 32000), ("prompt", 512), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default=",".join([FIRST, *SPECS, ORT]))
    parser.add_argument("--compile", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.compile:
        compile_one(*options.compile)
    elif options.work:
        work(options.work[0], options.work[1], options.prompt, options.tokens, options.vocabulary)
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure(Path(folder), options, options.only.split(","))


if __name__ == "__main__":
    main()
