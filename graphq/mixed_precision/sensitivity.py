"""What rounding each layer costs, for all options at once: a forward pass over the data, and a backward pass at most.

Costs of layers are added up, as the errors of roundings are nearly uncorrelated (Dong et al., HAWQ-V2, arXiv
1911.03852, equation 6). ``d`` is what an option changes in a layer's output, with the float model's values as its
inputs.

- ``gradient``: half the mean over tokens of ``(g . d)^2``, with ``g`` the gradient of the log-likelihood of next tokens
  that are drawn from the model itself: the second-order term of the Kullback-Leibler divergence of its outputs, whose
  Hessian is the Fisher matrix, which these gradients' outer products estimate (Martens, arXiv 1412.1193, section 5).
  Of other models, ``g`` is the gradient of the outputs by a random direction: the mean is that of the outputs' squared
  change, relative to their squares (Hutchinson's estimator).
- ``output-error``: ``|d|^2 / |y|^2`` over all tokens; it does not see what later layers make of it.
- ``divergence``: each layer alone quantized, the outputs' divergence itself. Slow: a forward pass for each.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, final, get_args

import torch
from torch import Tensor, fx

from graphq.capture.source import source_of
from graphq.data.masks import MaskedBatch, masked_batch
from graphq.ir.layers import sites
from graphq.ir.validity import ValidityRun
from graphq.ir.validity_rules import validity_of
from graphq.mixed_precision.divergence import measured_outputs
from graphq.mixed_precision.quantized import QuantizedLayers

Sensitivity = Literal["gradient", "output-error", "divergence"]
SENSITIVITIES: Final = get_args(Sensitivity)
Visit = Callable[[fx.Node, dict[str, Any], Tensor], Tensor]


@final
class _Watched(ValidityRun):
    """A run that shows each layer's inputs, by the names of their nodes, and its output, which a visitor replaces."""

    def __init__(self, gm: fx.GraphModule, visit: Visit) -> None:
        super().__init__(gm)
        self.visit = visit
        self.watched = {site.op.node for site in sites(gm)}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.watched:
            return self.visit(n, {read.name: self.env[read] for read in n.all_input_nodes}, result)
        return result


def layer_costs(
    gm: fx.GraphModule,
    options: Mapping[str, QuantizedLayers],
    batches: Sequence[tuple[Any, ...]],
    kind: Literal["gradient", "output-error"],
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """For each option, by name, the cost of each layer of ``gm`` that it quantizes, by the path of its weight.

    A layer that is used several times has the sum of its uses.
    """
    measuring = _Measuring(gm, options, seed)
    measure = measuring.by_gradient if kind == "gradient" else measuring.by_output
    total = sum([measure(batch) for batch in batches])
    return {name: {path: cost / total for path, cost in own.items()} for name, own in measuring.costs.items()}


@final
class _Measuring:
    """The sums of costs so far."""

    def __init__(self, gm: fx.GraphModule, options: Mapping[str, QuantizedLayers], seed: int) -> None:
        self.gm, self.options = gm, options
        self.source = source_of(gm)
        self.generator = torch.Generator().manual_seed(seed)
        self.paths = {site.op.node.name: site.path for site in sites(gm)}
        self.costs = {
            name: {path: 0.0 for node, path in self.paths.items() if node in option} for name, option in options.items()
        }

    def by_output(self, batch: tuple[Any, ...]) -> int:
        """Add a batch; how much it weighs."""
        run: _Watched

        def visit(node: fx.Node, values: dict[str, Any], y: Tensor) -> Tensor:
            mask = validity_of(node, run.validity).mask
            size = float((y if mask is None else y[mask]).double().square().sum())
            for name, option in self.options.items():
                if node.name in option and size:
                    d = option.output(node.name, values) - y
                    error = float((d if mask is None else d[mask]).double().square().sum())
                    self.costs[name][self.paths[node.name]] += error / size
            return y

        run = _Watched(self.gm, visit)
        with torch.inference_mode():
            run.run_batch(masked_batch(self.source, batch))
        return 1

    def by_gradient(self, batch: tuple[Any, ...]) -> int:
        """Add a batch; how much it weighs: the tokens of a language model, of another one batch."""
        roots: list[Tensor] = []
        is_lm = self.source.is_causal_lm

        def visit(node: fx.Node, values: dict[str, Any], y: Tensor) -> Tensor:
            if not y.requires_grad:
                y = y.detach().requires_grad_()
                roots.append(y)
            held = {name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()}
            before = y.detach()

            def add(g: Tensor) -> None:
                with torch.no_grad():
                    for name, option in self.options.items():
                        if node.name in option:
                            product = (g * (option.output(node.name, held) - before)).double()
                            rows = product.flatten(0, -2).sum(-1) if is_lm else product.flatten(1).sum(-1)
                            self.costs[name][self.paths[node.name]] += float(rows.square().sum()) / 2

            y.register_hook(add)
            return y

        with torch.inference_mode(False), torch.enable_grad():
            outputs = _Watched(self.gm, visit).run_batch(masked_batch(self.source, batch))
            loss, weight = self._likelihood(outputs) if is_lm else (self._directional(outputs), 1)
            torch.autograd.backward(loss, inputs=roots)
        return weight

    def _likelihood(self, outputs: MaskedBatch) -> tuple[Tensor, int]:
        """Minus the log-likelihood of tokens that the model draws, and how many there are."""
        mask = outputs.validity[0].mask
        logits = outputs[0].flatten(0, -2) if mask is None else outputs[0][mask.all(-1)]
        logits = logits.float().log_softmax(-1)
        drawn = torch.multinomial(logits.detach().exp(), 1, generator=self.generator)
        return -logits.gather(-1, drawn).sum(), logits.shape[0]

    def _directional(self, outputs: MaskedBatch) -> Tensor:
        """The outputs by random signs, each relative to its norm."""
        total = torch.zeros(())
        for place in measured_outputs(self.gm):
            x, mask = outputs[place], outputs.validity[place].mask
            x = (x if mask is None else x[mask]).double()
            signs = torch.randint(0, 2, x.shape, generator=self.generator) * 2 - 1
            total = total + (x * signs).sum() / x.detach().square().sum().sqrt().clamp_min(1e-300)
        return total
