"""Layers whose output an algorithm scales by channel, for the sake of those that read it.

SmoothQuant, AWQ and equalization move factors between a layer's rows and its readers' columns: the function of both
together stays, the output between them does not. Which layers these are follows from the graph, as it does for the
algorithms themselves; by what factors is known only where they ran.
"""

from collections.abc import Mapping
from typing import Any, cast

from torch import fx

from graphq.ir.channel_groups import Where, groups
from graphq.ir.layers import LAYER
from graphq.ir.views import Weighted
from graphq.spec.algorithms import ALGORITHMS, defaults
from graphq.spec.match import Layer
from graphq.spec.rules import Algorithm, Spec


def scaled_outputs(gm: fx.GraphModule, spec: Spec, layers: Mapping[str, Layer]) -> dict[str, tuple[str, ...]]:
    """The readers of each layer whose output the algorithms of ``spec`` may scale, by the layer's name.

    ``gm``: a float graph, with the decisions of ``spec`` on its layers.
    """
    found: dict[str, tuple[str, ...]] = {}
    for algorithm in spec.algorithms:
        if ALGORITHMS[algorithm.name].stage not in ("smooth", "equalize"):
            continue
        matched = (fqn for fqn, layer in layers.items() if any(match.matches(layer) for match in algorithm.match))
        only = frozenset(matched) if algorithm.match else None
        for group in groups(gm, only, where_of(algorithm), None, algorithm.folds):
            producer = None if group.flow is None else group.flow.producer
            if isinstance(producer, Weighted):
                names = tuple(str(reader.op.node.meta[LAYER]) for reader in group.readers)
                found[str(producer.node.meta[LAYER])] = tuple(dict.fromkeys(names))
    return found


def where_of(algorithm: Algorithm) -> Where:
    """What the algorithm does with its factors; ``fold`` where it has no choice."""
    options: dict[str, Any] = defaults(algorithm.name) | dict(algorithm.options)
    return cast(Where, options.get("where", "fold"))
