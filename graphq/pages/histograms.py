"""Histograms of what is quantized, with the range that its quantizer holds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast, final

import torch
from torch import Tensor, fx

from graphq.comparison.clipping import edges
from graphq.comparison.side_by_side import input_quantizer, layer_nodes
from graphq.ir.layers import LAYER
from graphq.ir.views import Dequantize, Param, Quantize, Weighted, view
from graphq.numerics.histogram import SIDE, count, widen, width_exponent
from graphq.runtime import ops
from graphq.state import tensor_of

BINS: Final = 64


@final
@dataclass(frozen=True)
class Histogram:
    """How many elements lie in each of ``counts``' bins, as wide as each other, from ``low`` to ``high``; and the least
    and the largest value that the quantizer holds, the widest of its blocks'.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    range: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"low": self.low, "high": self.high, "counts": list(self.counts), "range": list(self.range)}


@final
class Histograms:
    """Elements seen so far, in bins that widen as it must be, and the widest range."""

    def __init__(self) -> None:
        self._counts = torch.zeros(2 * SIDE, dtype=torch.int64)
        self._exponent = width_exponent(0.0)
        self._extremes: tuple[float, float] | None = None
        self._range: tuple[float, float] | None = None

    def add(self, x: Tensor, low: Tensor, high: Tensor) -> None:
        """Further elements, and the values of the outermost codes for them. What is not finite is left out."""
        held = x.detach().float().flatten()
        held = held[held.isfinite()]
        if not held.numel():
            return
        least, largest = (float(one) for one in held.aminmax())
        exponent = max(self._exponent, width_exponent(max(abs(least), abs(largest))))
        self._counts = widen(self._counts, exponent - self._exponent) + count(held, exponent)
        self._exponent = exponent
        self._extremes = _wider(self._extremes, (least, largest))
        self._range = _wider(self._range, (float(low.min()), float(high.max())))

    def found(self, bins: int = BINS) -> Histogram | None:
        """In ``bins`` bins, the outermost of which begin and end where the elements do; None before any was seen."""
        if self._extremes is None or self._range is None:
            return None
        low, high = self._extremes
        width = (high - low) / bins or 1.0
        places = self._counts.nonzero().flatten()
        centres = torch.ldexp(places.double() - SIDE + 0.5, torch.tensor(self._exponent))
        index = ((centres - low) / width).long().clamp(0, bins - 1)
        counts = torch.zeros(bins, dtype=torch.int64).index_add_(0, index, self._counts[places])
        return Histogram(low, low + width * bins, tuple(counts.tolist()), self._range)


def _wider(held: tuple[float, float] | None, new: tuple[float, float]) -> tuple[float, float]:
    """The range that holds both."""
    return new if held is None else (min(held[0], new[0]), max(held[1], new[1]))


def weight_histograms(source: fx.GraphModule, gm: fx.GraphModule) -> dict[str, Histogram]:
    """Of the float weights of ``source`` whose codes ``gm`` holds, by the layer's name: a stack of experts is one."""
    found: dict[str, Histogram] = {}
    floats = layer_nodes(source)
    for key, node in layer_nodes(gm).items():
        weight = cast(Weighted, view(node)).weight_op
        if key not in floats or key[1] or not isinstance(weight, Dequantize) or not isinstance(weight.codes, Param):
            continue
        held = cast(Weighted, view(floats[key])).weight_op
        if not isinstance(held, Param):
            continue
        parts = [weight.codes, weight.scale, weight.zero_point, weight.global_scale]
        codes, *scales = [None if part is None else tensor_of(gm, cast(Param, part).fqn) for part in parts]
        seen = Histograms()
        seen.add(tensor_of(source, held.fqn), *_ends(cast(Tensor, codes), scales, weight.format, list(weight.block)))
        if (made := seen.found()) is not None:
            found[key[0]] = made
    return found


def _ends(codes: Tensor, scales: Sequence[Tensor | None], format: str, block: list[int]) -> tuple[Tensor, Tensor]:
    """The values of the least and the largest code in the place of each of ``codes``."""
    least, _, _, largest = edges(format)
    low, high = (
        ops.dequantize(torch.full_like(codes, code), *scales, format, block, torch.float32) for code in (least, largest)
    )
    return low, high


@final
class _Watching(fx.Interpreter):
    """Runs a graph, and sees what the quantizers ``watched`` take."""

    def __init__(self, gm: fx.GraphModule, watched: Iterable[fx.Node]) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.seen = {node: Histograms() for node in watched}

    def run_node(self, n: fx.Node) -> Any:
        made = super().run_node(n)
        if n in self.seen:
            op = cast(Quantize, view(n))
            parts = (op.argument(name) for name in ("scale", "zero_point", "global_scale"))
            scales = [None if part is None else self.env[part] for part in parts]
            self.seen[n].add(self.env[op.x.node], *_ends(made, scales, op.format, list(op.block)))
        return made


def activation_histograms(gm: fx.GraphModule, batches: Iterable[tuple[Any, ...]]) -> dict[str, Histogram]:
    """Of what the quantized inputs of layers are on the batches, complete as the graph takes them, by layer."""
    quantizers: dict[str, fx.Node] = {}
    for node in layer_nodes(gm).values():
        quantizer = input_quantizer(view(node))
        if quantizer is not None:
            quantizers.setdefault(str(node.meta[LAYER]), quantizer)
    run = _Watching(gm, quantizers.values())
    with torch.inference_mode():
        for batch in batches:
            run.run(*batch)
    made = {name: run.seen[quantizer].found() for name, quantizer in quantizers.items()}
    return {name: one for name, one in made.items() if one is not None}
