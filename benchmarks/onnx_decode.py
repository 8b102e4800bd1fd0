"""One step of a decode in ONNX Runtime: a Llama of width 1024 with weights of 4 bits, against its float file.

    OMP_NUM_THREADS=1 python benchmarks/onnx_decode.py [--layers 24] [--vocabulary 32000] [--past 64] [--repeats 15] \
        [--plans "W4A16 g32" ...]

24 layers with a head of their own have 0.37 B parameters. Weights are drawn. All are written for ``ort-cpu``: the float
model; weights of 4 bits with float activations (MatMulNBits at accuracy level 0); and with activations in int8 by block
(level 4), each with groups of 32 and of 128, the head in 4 bits as well. They run in turn on one thread, and the table
has the median of the ratios of CPU time, for one token after ``--past`` others.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphq

PLANS: Final[dict[str, dict[str, str] | None]] = {
    "float": None,
    "W4A16 g32": {"weight": "int4/g32"},
    "W4A16 g128": {"weight": "int4/g128"},
    "W4A8 g32": {"weight": "int4/g32", "input": "int8/token/dynamic"},
    "W4A8 g128": {"weight": "int4/g128", "input": "int8/token/dynamic"},
}
HEADS: Final = 16


def session(folder: Path) -> Any:
    """The artifact in ONNX Runtime's default session, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def one_token(opened: Any, past: int, width: int) -> dict[str, Any]:
    """The inputs of one token after ``past`` others."""
    integers = {"input_ids": [[5]], "position_ids": [[past]], "attention_mask": [[1] * (past + 1)]}
    cache = np.zeros((1, HEADS, past, width // HEADS), np.float32)
    return {
        one.name: np.array(integers[one.name], np.int64) if one.name in integers else cache
        for one in opened.get_inputs()
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--past", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--plans", nargs="+", default=list(PLANS)[1:], choices=list(PLANS)[1:], help="beside float")
    given = parser.parse_args()
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=given.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        vocab_size=given.vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = LlamaForCausalLM(config).eval()
    sessions: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in ("float", *given.plans):
            plan = PLANS[name]
            rules = [{"match": match, **(plan or {"float": True})} for match in ("blocks", "lm_head")]
            made = graphq.compile(model, {"graphq": 1, "rules": rules})
            made.emit("onnx", Path(place) / name.replace(" ", "_"), profile="ort-cpu")
            sessions[name] = session(Path(place) / name.replace(" ", "_"))
        feeds = one_token(sessions["float"], given.past, config.hidden_size)
        times: dict[str, list[float]] = {name: [] for name in sessions}
        for opened in sessions.values():
            opened.run(None, feeds)
        for _ in range(given.repeats):
            for name, opened in sessions.items():
                start = time.process_time()
                opened.run(None, feeds)
                times[name].append(time.process_time() - start)
    print(f"{given.layers} layers, vocabulary of {given.vocabulary}, {given.past} tokens before; one thread")
    for name, found in times.items():
        faster = statistics.median(f / t for f, t in zip(times["float"], found, strict=True))
        print(f"  {name:12} {statistics.median(found) * 1e3:7.1f} ms  {faster:5.2f} times as fast as float")


if __name__ == "__main__":
    main()
