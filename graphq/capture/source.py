"""What capture found out about a model and later steps need: its inputs, outputs, dimensions, blocks and configuration.

A ``Source`` is frozen data in ``gm.meta["graphq.source"]``; it survives ``deepcopy`` and is written into artifacts.
"""

from dataclasses import dataclass
from typing import Final, Literal, final

import torch
from torch import fx

from graphq.errors import PassError

KEY: Final = "graphq.source"
SHARED: Final = "graphq.shared"  # of a part of a graph: the names of parameters that other parts hold, too
BATCH: Final = "batch"
SEQUENCE: Final = "sequence"
PAST: Final = "past_sequence"
TOTAL: Final = "past_sequence + sequence"


@final
@dataclass(frozen=True)
class TensorInput:
    """One input: its name, dtype and shape; a named dimension is dynamic (``TOTAL`` is the sum of its two parts)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]

    @property
    def is_cache(self) -> bool:
        return PAST in self.shape


@final
@dataclass(frozen=True)
class CachePair:
    """The names of an input, ``past``, and of the output, ``present``, that is this input of the next call."""

    past: str
    present: str


@final
@dataclass(frozen=True)
class Source:
    """Where a graph came from. ``dtype`` is the source's own, whatever the graph computes in.

    ``ranges``: the smallest and largest size of each dynamic dimension. ``caches``: what the model gives to itself; no
    other input or output is a cache, whatever its name.

    ``blocks``: dotted paths of the lists of repeated blocks, such as ``model.layers``. ``output_kind``: the structure
    the source returns. ``config``, ``generation_config``: transformers' settings as JSON. ``files``: the directory with
    the tokenizer and configuration that go with the artifact.
    """

    inputs: tuple[TensorInput, ...]
    outputs: tuple[str, ...]
    output_kind: Literal["tensor", "tuple", "dict"]
    dtype: torch.dtype
    ranges: tuple[tuple[str, int, int], ...] = ()
    blocks: tuple[str, ...] = ()
    config: str | None = None
    generation_config: str | None = None
    files: str | None = None
    notes: tuple[str, ...] = ()
    caches: tuple[CachePair, ...] = ()

    @property
    def pasts(self) -> frozenset[str]:
        """The inputs that are caches."""
        return frozenset(pair.past for pair in self.caches)

    @property
    def presents(self) -> frozenset[str]:
        """The outputs that are caches."""
        return frozenset(pair.present for pair in self.caches)

    @property
    def is_causal_lm(self) -> bool:
        """Whether the graph takes ``input_ids`` and returns next-token ``logits``."""
        return self.outputs[:1] == ("logits",) and [i.name for i in self.inputs[:1]] == ["input_ids"]

    def block_of(self, fqn: str) -> int | None:
        """The index of the repeated block that holds this layer, None outside of blocks."""
        for prefix in self.blocks:
            if fqn.startswith(f"{prefix}."):
                index = fqn[len(prefix) + 1 :].partition(".")[0]
                if index.isdecimal():
                    return int(index)
        return None


def source_of(gm: fx.GraphModule) -> Source:
    """The ``Source`` of a captured graph."""
    found = gm.meta.get(KEY)
    if not isinstance(found, Source):
        raise PassError("this graph was not made by graphq.capture: it has no graphq.source")
    return found
