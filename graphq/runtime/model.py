"""A compiled model as it is deployed: packed weights, the source's calling convention, generation for causal LMs."""

import copy
import json
from typing import Any, Self, cast, final

import torch
from torch import Tensor, fx, nn

from graphq.capture.source import Source, source_of
from graphq.data.batches import complete
from graphq.errors import GraphqError, SpecError


@final
class CompiledModel(nn.Module):
    """A captured graph behind the source's inputs and outputs.

    Calling it takes the captured inputs in the source's order or by name, and returns what the source returned: a
    tensor, a tuple, or a dict by name (a causal language model: ``logits`` and ``present.{i}.key|value``). Masks,
    positions and empty caches may be left out.
    """

    graph: fx.GraphModule

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        # Its tensors and modules are the graph's own, so that their names are the layers' and ``to`` moves both.
        self.__dict__ |= {"graph": graph} | {
            kind: graph.__dict__[kind] for kind in ("_parameters", "_buffers", "_modules")
        }
        self.train(graph.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(copy.deepcopy(self.graph, memo))

    @property
    def source(self) -> Source:
        """What capture recorded of the source."""
        return source_of(self.graph)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor | tuple[Tensor, ...] | dict[str, Tensor]:
        """Raises ``TypeError`` for an argument that was not captured, ``SpecError`` for a wrong shape."""
        source = self.source
        batch = by_name(source, args, kwargs)
        outputs = cast(tuple[Tensor, ...], self.graph(*complete(source, batch)))
        match source.output_kind:
            case "tensor":
                return outputs[0]
            case "tuple":
                return tuple(outputs)
            case "dict":
                return dict(zip(source.outputs, outputs, strict=True))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """``transformers``' ``generate`` on this model: greedy, sampling, beams, left padding, with the KV cache.

        Raises ``GraphqError`` for models that are not causal language models with a cache. Needs transformers.
        """
        source = self.source
        if not source.is_causal_lm or source.config is None or not source.caches:
            raise GraphqError("generate: this model is not a causal language model captured with its key/value cache")
        from graphq.runtime.generation import generator

        with torch.inference_mode():
            return cast(Any, generator(self.graph, source, json.loads(source.config))).generate(*args, **kwargs)


def by_name(source: Source, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Arguments of a call by the names of the captured inputs."""
    names = [i.name for i in source.inputs]
    if len(args) > len(names):
        raise TypeError(f"forward() takes {len(names)} inputs, {len(args)} were given: {', '.join(names)}")
    batch = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names:
            raise TypeError(f"forward() was captured without the argument {name}; it takes {', '.join(names)}")
        if name in batch:
            raise TypeError(f"forward() got {name} twice, by position and by name")
        batch[name] = value
    if not batch:
        raise SpecError(f"inputs: none given; the model takes {', '.join(names)}")
    return batch
