"""What a layer of experts costs at decode: the block of transformers in bfloat16, and graphq's of the same shapes.

Routing, products and sums of one block (OLMoE's shapes: 64 experts, 8 for each token) for 1 to 4 tokens. All are timed
in turn, in one process, each time with other tokens, so that other experts are read; medians of the process's CPU time,
and ratios to transformers' loop (which also has torch's grouped product). graphq's "loop" has the kernels of linears,
called for one expert after another from Python.

    python benchmarks/experts.py [--experts 64] [--active 8] [--width 2048] [--hidden 1024] [--rounds 30] [--threads 1]
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

import graphq
from graphq.numerics import Scales
from graphq.runtime.experts import PackedExperts
from graphq.runtime.linear import PackedLinear
from graphq.runtime.modules import codes_of, hold_weight, scales_of
from graphq.runtime.program import Program

SPECS: Final[dict[str, dict[str, Any]]] = {
    "W8A8": {"graphq": 1, "weight": "int8/channel", "input": "int8/token/dynamic"},
    "W4A8": {"graphq": 1, "weight": "int4/g128", "input": "int8/token/dynamic"},
    "W4A16": {"graphq": 1, "weight": "int4/g128"},
    "W8A16": {"graphq": 1, "weight": "int8/channel"},
}


class Loop(nn.Module):
    """Experts as linears on packed codes, one after another."""

    def __init__(self, experts: PackedExperts) -> None:
        super().__init__()
        form, codes, scales = experts.graphq_form, codes_of(experts), scales_of(experts)
        settings = (str(form.settings["format"]), form.block[1:], form.shape[1:], (0,), form.dtype)
        self.each = nn.ModuleList()
        for e in range(form.shape[0]):
            module = PackedLinear(*settings, takes_codes=experts.takes_codes)
            zero = None if scales.zero_point is None else scales.zero_point[e]
            self.each.append(hold_weight(module, codes[e], Scales(scales.scale[e], zero)))
        self.shape, self.dtype = form.shape, form.dtype

    def forward(self, x: Tensor, offsets: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
        out, first = x.new_zeros(x.shape[0], self.shape[1], dtype=self.dtype), 0
        for module, last in zip(self.each, offsets.tolist(), strict=True):
            if first < last:
                parts = (None if part is None else part[first:last] for part in (scale, zero))
                out[first:last] = module(x[first:last], *parts)
            first = last
        return out


def looped(compiled: Any) -> Callable[[Tensor], Tensor]:
    """The compiled block with ``Loop`` in the place of its experts."""
    graph = copy.deepcopy(compiled.module.graph)
    for path, module in list(graph.named_modules()):
        if isinstance(module, PackedExperts):
            graph.set_submodule(path, Loop(module))
    program = Program(graph)
    return lambda x: program(x)[0]


def main() -> None:
    """Prints a row for each way to compute the block, for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = (("experts", 64), ("active", 8), ("width", 2048), ("hidden", 1024), ("rounds", 30), ("threads", 1))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = OlmoeConfig(
        hidden_size=options.width,
        intermediate_size=options.hidden,
        num_experts=options.experts,
        num_experts_per_tok=options.active,
    )
    block = cast(nn.Module, OlmoeSparseMoeBlock(config)).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    block, eager = block.bfloat16(), copy.deepcopy(block.bfloat16())
    for one, how in ((block, "grouped_mm"), (eager, "eager")):
        cast(Any, one).experts.config._experts_implementation = how
    example = torch.randn(1, 2, options.width).bfloat16()
    calls: dict[str, Callable[[Tensor], Any]] = {
        "transformers bfloat16": eager,
        "transformers bfloat16, grouped": block,
    }
    for name, spec in SPECS.items():
        compiled = graphq.compile(block, spec, inputs=example)
        calls |= {f"graphq {name}, loop": looped(compiled), f"graphq {name}": compiled.module}
    print(f"{options.experts} experts, {options.active} active, {options.width} x {options.hidden},", end=" ")
    print(f"{torch.get_num_threads()} thread(s), {torch.backends.cpu.get_cpu_capability()}")
    for tokens in (1, 2, 4):
        times: dict[str, list[float]] = {name: [] for name in calls}
        with torch.inference_mode():
            for call in calls.values():
                call(torch.randn(1, 4 * options.experts, options.width).bfloat16())  # each expert gets ready
            for number in range(options.rounds + 2):
                x = torch.randn(1, tokens, options.width).bfloat16()
                for name, call in calls.items():
                    start = time.process_time()
                    call(x)
                    if number >= 2:  # the first ones prepare
                        times[name].append(time.process_time() - start)
        first = times["transformers bfloat16"]
        print(f"{tokens} token(s){'':24} {'CPU ms':>8} {'ratio':>6}")
        for name, found in times.items():
            ratio = statistics.median(a / b for a, b in zip(found, first, strict=True))
            print(f"  {name:32} {statistics.median(found) * 1e3:8.2f} {ratio:6.2f}", flush=True)


if __name__ == "__main__":
    main()
