"""Quantizes one model on request and measures it: one half of vs_llm_compressor.py, run in its tool's environment.

Usage: python worker.py {graphq | llm-compressor} MODEL TOKENS THREADS

MODEL is a Hugging Face directory, TOKENS a safetensors file with ``calibration`` and ``evaluation``, int64 [n, length].
Reads a task a line from standard input and answers a line on standard output, both JSON:

    {"task": SPEC or RECIPE, "samples": 128, "batch_size": 16, "evaluate": true}
    {"seconds": 3.2, "megabytes": 96.0, "perplexity": 13.6}    or    {"refused": "graphq has no awq yet"}

The task null quantizes nothing: its perplexity is the float model's. Seconds and megabytes are those of
``graphq.compile`` and of ``oneshot`` on a model that is loaded. Both may use up that model. Megabytes: the peak of
resident memory above what was resident before (Linux).
"""

import ctypes
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2]))  # last: its folders have common names
from graphq import evaluate
from graphq.errors import SpecError

Quantize = Callable[[], Callable[[], Any]]  # the work that is measured -> what makes the model to evaluate from it


def _graphq(folder: str, task: Any, batches: list[Tensor]) -> Quantize:
    import transformers

    import graphq

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def quantize() -> Callable[[], Any]:
        compiled = graphq.compile(model, task, calibration=batches, consume=True)  # as oneshot does
        return lambda: compiled.module

    return quantize


def _llm_compressor(folder: str, task: list[tuple[str, dict[str, Any]]], batches: list[Tensor]) -> Quantize:
    import transformers

    # By name, since the environment that checks types has neither.
    datasets, llmcompressor = (importlib.import_module(name) for name in ("datasets", "llmcompressor"))
    cache = importlib.import_module("llmcompressor.pipelines.cache").IntermediatesCache
    cache._pin_intermediate = staticmethod(lambda _: None)  # 0.14.0.1 pins memory, which takes an accelerator
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.cat(batches)
    data = datasets.Dataset.from_dict(
        {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    )
    recipe = [_modifier(name, options) for name, options in task]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def quantize() -> Callable[[], Any]:
        llmcompressor.oneshot(
            model=model,
            processor=tokenizer,
            dataset=data,
            recipe=recipe,
            num_calibration_samples=len(tokens),
            max_seq_length=tokens.shape[1],
            batch_size=len(batches[0]),
            shuffle_calibration_samples=False,
        )
        return lambda: model

    return quantize


def _modifier(name: str, options: dict[str, Any]) -> Any:
    homes = {"GPTQModifier": "gptq", "QuantizationModifier": "quantization", "AWQModifier": "transform.awq"}
    homes["SmoothQuantModifier"] = "transform.smoothquant"
    return getattr(importlib.import_module(f"llmcompressor.modifiers.{homes[name]}"), name)(**options)


TOOLS: Final = {"graphq": _graphq, "llm-compressor": _llm_compressor}


def _kilobytes(field: str) -> int:
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


def _measure(quantize: Quantize) -> tuple[dict[str, Any], Callable[[], Any]]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tasks freed is resident no more
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = _kilobytes("VmRSS"), time.perf_counter()
    finish = quantize()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "megabytes": (_kilobytes("VmHWM") - before) / 1024}, finish


def answer(tool: str, folder: str, tokens: dict[str, Tensor], request: dict[str, Any]) -> dict[str, Any]:
    """What the request asks for, measured."""
    import transformers

    found: dict[str, Any] = {}
    if request["task"] is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    else:
        batches = list(tokens["calibration"][: request["samples"]].split(request["batch_size"]))
        try:
            found, finish = _measure(TOOLS[tool](folder, request["task"], batches))
        except SpecError as error:
            if "graphq has no " not in str(error):
                raise
            return {"refused": str(error)}
        model = finish()
    if request["evaluate"]:
        found["perplexity"] = evaluate.perplexity(model, tokens["evaluation"])
    return found


def main(tool: str, folder: str, tokens_file: str, threads: int) -> int:
    """Answer requests until standard input ends."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tokens = load_file(tokens_file)
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)  # what libraries print is no reply
        for line in sys.stdin:
            print(json.dumps(answer(tool, folder, tokens, json.loads(line))), file=replies, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
