"""A graph with every layer quantized by each of several options, and runs of it in which each layer has one of them."""

from collections.abc import Mapping
from typing import Any, cast, final

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from graphq.capture.source import source_of
from graphq.data.masks import MaskedBatch, masked_batch
from graphq.ir.edit import copy_graph
from graphq.ir.layers import layers, sites
from graphq.ir.pipeline import Batches, Pipeline
from graphq.ir.validity import ValidityRun
from graphq.pipelines import passes_for
from graphq.spec.match import Exact
from graphq.spec.plan import Decision
from graphq.spec.rules import Rule, Spec
from graphq.state import tensor_of


def quantized(gm: fx.GraphModule, decisions: Mapping[str, Decision], batches: Batches | None) -> fx.GraphModule:
    """The QDQ form of ``gm`` by round-to-nearest, with these layers as they are decided, and others float.

    ``batches`` are for static scales. ``gm`` is left alone, and shares the tensors that stay float.
    """
    copied = copy_graph(gm)
    spec = Spec(tuple(Rule(Exact(fqn), decision) for fqn, decision in decisions.items()))
    with torch.no_grad():
        Pipeline(passes_for(spec, layers(copied))).run(copied, batches)
    return copied


@final
class QuantizedLayers:
    """The layers of a quantized graph, by the names of the nodes that the float graph ``source`` has for them."""

    def __init__(self, source: fx.GraphModule, gm: fx.GraphModule) -> None:
        self._gm = gm
        nodes = {node.name: node for node in gm.graph.nodes}
        own = {site.op.node.name: site.op.node for site in sites(source)}
        self._nodes = {
            name: nodes[name]
            for name, node in own.items()
            if [read.name for read in nodes[name].all_input_nodes] != [read.name for read in node.all_input_nodes]
        }

    def __contains__(self, name: str) -> bool:
        """Whether the layer's weight or its input is quantized."""
        return name in self._nodes

    def output(self, name: str, values: Mapping[str, Any]) -> Tensor:
        """The output of a layer where the nodes that the float graph's layer reads have these ``values``."""
        return cast(Tensor, self._call(self._nodes[name], values))

    def _value(self, node: fx.Node, values: Mapping[str, Any]) -> Any:
        if node.op == "get_attr":
            return tensor_of(self._gm, str(node.target)).detach()
        return values[node.name] if node.name in values else self._call(node, values)

    def _call(self, node: fx.Node, values: Mapping[str, Any]) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), lambda read: self._value(read, values))
        return cast(Any, node.target)(*args, **kwargs)


@final
class MixedRun(ValidityRun):
    """Runs a float graph with the layers of ``chosen``, by the names of their nodes, quantized."""

    def __init__(self, gm: fx.GraphModule, chosen: Mapping[str, QuantizedLayers]) -> None:
        super().__init__(gm)
        self.source = source_of(gm)
        self.chosen = chosen

    def compute(self, n: fx.Node) -> Any:
        option = self.chosen.get(n.name)
        if option is None or n.name not in option:
            return super().compute(n)
        return option.output(n.name, {read.name: self.env[read] for read in n.all_input_nodes})

    def outputs(self, batch: tuple[Any, ...]) -> MaskedBatch:
        """What the graph gives for a complete batch, and which of it is valid."""
        return self.run_batch(masked_batch(self.source, batch))
