"""How far a quantized graph's outputs lie from the float graph's, measured end to end."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, final

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from graphq.capture.source import source_of
from graphq.data.masks import MaskedBatch
from graphq.errors import SpecError
from graphq.mixed_precision.quantized import MixedRun, QuantizedLayers
from graphq.passes.calibrate import run_batch

_BY: Final = "search"
MAX_ELEMENTS: Final = 1 << 27  # of outputs that are held, a GiB of float64


def measured_outputs(gm: fx.GraphModule) -> list[int]:
    """The positions of what is compared: a causal language model's logits, of another model all outputs of floats that
    are no caches. Raises ``SpecError`` where there are none.
    """
    source = source_of(gm)
    if source.is_causal_lm:
        return [0]
    given = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    vals = [node.meta.get("val") if isinstance(node, fx.Node) else None for node in given]
    found = [
        i
        for i, (name, val) in enumerate(zip(source.outputs, vals, strict=True))
        if name not in source.presents and isinstance(val, Tensor) and val.is_floating_point()
    ]
    if not found:
        raise SpecError("search: the model gives no floats but caches: there is nothing to measure it by")
    return found


@final
class Divergence:
    """Of the first batches, as many as outputs of are held in ``MAX_ELEMENTS`` numbers, at least one.

    For a causal language model the mean over tokens of the Kullback-Leibler divergence from the float model's
    distribution of next tokens, in nats; for another the sum of squared differences over that of squares, the mean over
    its outputs.
    What a batch's mask leaves out has no part in it.
    """

    def __init__(self, gm: fx.GraphModule, batches: Sequence[tuple[Any, ...]]) -> None:
        self.gm = gm
        self.is_lm = source_of(gm).is_causal_lm
        self.places = measured_outputs(gm)
        self.batches: list[tuple[Any, ...]] = []
        self.wanted: list[list[Tensor]] = []
        held = 0
        with torch.inference_mode():
            for number, batch in enumerate(batches):
                outputs = self._valid(run_batch(gm, batch, number, _BY))
                held += sum(x.numel() for x in outputs)
                if self.batches and held > MAX_ELEMENTS:
                    break
                self.batches.append(batch)
                self.wanted.append([x.double().log_softmax(-1) for x in outputs] if self.is_lm else outputs)
        if not self.batches:
            raise SpecError("calibration: no batches; a search needs at least one")

    def of(self, chosen: Mapping[str, QuantizedLayers]) -> float:
        """That of the graph with these layers quantized, by their nodes' names; infinite where it is no number."""
        sums = [[0.0, 0.0] for _ in self.places]
        with torch.inference_mode():
            for batch, wanted in zip(self.batches, self.wanted, strict=True):
                outputs = self._valid(MixedRun(self.gm, chosen).outputs(batch))
                for one, got, want in zip(sums, outputs, wanted, strict=True):
                    if self.is_lm:
                        kl = F.kl_div(got.double().log_softmax(-1), want, reduction="sum", log_target=True)
                        one[0] += float(kl)
                        one[1] += want.shape[0]
                    else:
                        one[0] += float((got - want).double().square().sum())
                        one[1] += float(want.double().square().sum())
        found = sum(error / max(size, 1e-300) for error, size in sums) / len(sums)
        return found if found == found else float("inf")

    def _valid(self, outputs: MaskedBatch) -> list[Tensor]:
        """The compared outputs in float32: of logits the rows of tokens that count, of others the elements."""
        return list(_valid_parts(outputs, self.places, self.is_lm))


def _valid_parts(outputs: MaskedBatch, places: Iterable[int], is_lm: bool) -> Iterable[Tensor]:
    for place in places:
        x, mask = outputs[place].float(), outputs.validity[place].mask
        if is_lm:
            yield x.flatten(0, -2) if mask is None else x[mask.all(-1)]
        else:
            yield x.flatten() if mask is None else x[mask]
