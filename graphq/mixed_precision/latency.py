"""What a layer takes on this machine with the kernel that is chosen for it."""

import statistics
import time
from typing import Final

import torch
from torch import nn

from graphq import compiler
from graphq.errors import SpecError
from graphq.spec.match import Exact, Layer
from graphq.spec.plan import Decision, Plan
from graphq.spec.rules import Rule, Spec

_RUNS: Final = 15
_SECONDS: Final = 0.2  # of one measurement, at most, beyond the fewest runs


def layer_latency(layer: Layer, decision: Decision, rows: int) -> float:
    """Seconds of a linear of this layer's shape and dtype on ``rows`` rows of random numbers: the median of several.

    Raises ``SpecError`` for other layers: what an expert takes depends on the router, what a convolution on its input.
    """
    if layer.kind != "linear":
        raise SpecError(f"budget: latency: {layer.fqn} is a {layer.kind}; only linears are timed: give bits or bytes")
    n, k = layer.shape
    dtype = getattr(torch, layer.dtype)
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(k, n, bias=layer.bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(n, k, generator=generator) / k**0.5)
    x = torch.randn(rows, k, generator=generator).to(dtype)
    call = linear
    if isinstance(decision, Plan):
        holder = nn.Sequential(linear)
        spec = Spec((Rule(Exact("0"), decision),))
        call = compiler.compile(holder, spec, inputs=x, calibration=[x]).module
    with torch.inference_mode():
        for _ in range(3):
            call(x)
        times: list[float] = []
        while len(times) < _RUNS or (sum(times) < _SECONDS and len(times) < 100 * _RUNS):
            start = time.perf_counter()
            call(x)
            times.append(time.perf_counter() - start)
    return statistics.median(times)
