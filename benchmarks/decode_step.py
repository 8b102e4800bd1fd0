"""What one decode step costs beside its arithmetic: a Llama of many narrow layers, one token a step.

Steps of transformers (float32) and of graphq's packed modules (W8A8 per token, W4A16 g32; dynamic and static cache) are
timed in turn, in one process; medians of the process's CPU time and of wall time, and ratios to transformers'.

    python benchmarks/decode_step.py [--layers 24] [--width 64] [--steps 40] [--threads 1]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphq

W8A8 = {"graphq": 1, "weight": "int8/channel", "input": "int8/token/dynamic"}
W4A16 = {"graphq": 1, "weight": "int4/g32"}
PROMPT = 16


def stepper(model: Any, prompt: torch.Tensor, **cache: Any) -> Callable[[], object]:
    """A call of it reads one more token."""
    state = {"past": model(input_ids=prompt, use_cache=True, **cache).past_key_values}

    def step() -> None:
        out = model(input_ids=prompt[:, :1], past_key_values=state["past"], use_cache=True)
        state["past"] = out.past_key_values

    return step


def main() -> None:
    """Prints a row for each way to take a step."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("layers", 24), ("width", 64), ("steps", 40), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=options.width,
        intermediate_size=2 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    source = LlamaForCausalLM(config).eval()
    prompt = torch.randint(0, 256, (1, PROMPT))
    static = {"cache": "static", "max_length": PROMPT + 2 * options.steps + 8}
    with torch.inference_mode():
        steps = {"transformers float32": stepper(source, prompt)}
        for name, spec in (("W8A8", W8A8), ("W4A16 g32", W4A16)):
            compiled = graphq.compile(source, spec)
            steps[f"graphq {name}"] = stepper(compiled, prompt)
            steps[f"graphq {name}, static cache"] = stepper(compiled, prompt, **static)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for number in range(options.steps + 4):
            for name, step in steps.items():
                wall, cpu = time.perf_counter(), time.process_time()
                step()
                if number >= 4:  # the first ones are slower
                    times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    first = next(iter(times.values()))
    print(f"{options.layers} layers of width {options.width}, {torch.get_num_threads()} thread(s), torch", end=" ")
    print(f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    print(f"{'':32} {'CPU ms':>8} {'wall ms':>8} {'ratio':>6}")
    for name, found in times.items():
        cpu, wall = (statistics.median(one[i] for one in found) * 1e3 for i in (0, 1))
        ratio = statistics.median(a[0] / b[0] for a, b in zip(found, first, strict=True))
        print(f"{name:32} {cpu:8.2f} {wall:8.2f} {ratio:6.2f}")


if __name__ == "__main__":
    main()
