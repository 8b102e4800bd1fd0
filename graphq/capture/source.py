"""What capture found out about a model and later steps need: its inputs, outputs, dimensions, blocks and configuration.

A ``Source`` is frozen data in ``gm.meta["graphq.source"]``; it survives ``deepcopy`` and is written into artifacts.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal, final

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from graphq.capture.structure import Structure
from graphq.errors import PassError
from graphq.state import deferred_of

KEY: Final = "graphq.source"
SHARED: Final = "graphq.shared"  # of a part of a graph: the names of parameters that other parts hold, too
BATCH: Final = "batch"
SEQUENCE: Final = "sequence"
PAST: Final = "past_sequence"
TOTAL: Final = "past_sequence + sequence"
_KEYS_AND_VALUES: Final = re.compile(r"past_key_values\.\d+\.(key|value)(_scale|_zero_point)?")


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

    ``ranges``: the smallest and largest size of each named dimension; one whose two are equal is fixed. ``caches``:
    what the model gives to itself; no other input or output is a cache, whatever its name.

    ``blocks``: dotted paths of the lists of repeated blocks, such as ``model.layers``. ``output_kind``: the structure
    the source returns, which ``structure`` tells where it is more than a tensor, or a tuple or dict of tensors.
    ``config``, ``generation_config``: transformers' settings as JSON. ``files``: the directory with the tokenizer and
    configuration that go with the artifact. ``mask``: the name of the input ``[batch, tokens]`` that is 0 where a token
    is padding.

    ``scales``: what the target stores scales in; those of weights and inputs are numbers of this dtype.

    ``stored``: what float parameters that are held in float32 are stored in, where that is narrower: those named in
    ``wide``, whose numbers it does not hold, are stored as they are.
    """

    inputs: tuple[TensorInput, ...]
    outputs: tuple[str, ...]
    output_kind: Literal["tensor", "tuple", "dict", "structured"]
    dtype: torch.dtype
    ranges: tuple[tuple[str, int, int], ...] = ()
    blocks: tuple[str, ...] = ()
    config: str | None = None
    generation_config: str | None = None
    files: str | None = None
    notes: tuple[str, ...] = ()
    caches: tuple[CachePair, ...] = ()
    stored: torch.dtype | None = None
    wide: frozenset[str] = frozenset()
    mask: str | None = None
    structure: Structure | None = None
    scales: torch.dtype = torch.float32

    @property
    def fixed(self) -> dict[str, int]:
        """The sizes of the dimensions that have one size, their sum among them where both parts do."""
        return with_total({name: low for name, low, high in self.ranges if low == high})

    def sizes(self, shape: Iterable[int | str]) -> tuple[int | str, ...]:
        """A shape with numbers for the dimensions that are fixed."""
        fixed = self.fixed
        total = " + ".join(str(fixed.get(part, part)) for part in (PAST, SEQUENCE))
        return tuple(fixed.get(d, total if d == TOTAL else d) if isinstance(d, str) else d for d in shape)

    @cached_property
    def bounds(self) -> dict[str, tuple[int, int]]:
        """The smallest and largest size of each named dimension."""
        return {name: (low, high) for name, low, high in self.ranges}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Those of the inputs, in order."""
        return tuple(i.name for i in self.inputs)

    @cached_property
    def pasts(self) -> frozenset[str]:
        """The inputs that are caches."""
        return frozenset(pair.past for pair in self.caches)

    @cached_property
    def presents(self) -> frozenset[str]:
        """The outputs that are caches."""
        return frozenset(pair.present for pair in self.caches)

    @cached_property
    def has_states(self) -> bool:
        """Whether its caches are more than keys and values (and what goes with their codes) of each layer."""
        layers = {name.split(".")[1] for name in self.pasts if _KEYS_AND_VALUES.fullmatch(name)}
        others = [name for name in self.pasts if not _KEYS_AND_VALUES.fullmatch(name)]
        own = any(name.startswith("past_key_values.") for name in others)
        return own or layers != {str(i) for i in range(len(layers))}

    @cached_property
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


def with_total(sizes: dict[str, int]) -> dict[str, int]:
    """The same sizes, and their sum where there are both of its parts."""
    both = PAST in sizes and SEQUENCE in sizes
    return sizes | ({TOTAL: sizes[PAST] + sizes[SEQUENCE]} if both else {})


def record_stored(gm: fx.GraphModule) -> None:
    """Parameters that ``gm`` holds in float32 and that stay float will be stored in the source's dtype.

    The source's own float32 parameters (routers, some norms) are told by their numbers, which that dtype does not hold.
    """
    source = source_of(gm)
    if source.dtype not in (torch.bfloat16, torch.float16):
        return
    wide = frozenset(
        name
        for name, tensor in gm.named_parameters(remove_duplicate=False)
        if tensor.dtype == torch.float32 and not _is_held_by(tensor, source.dtype)
    )
    gm.meta[KEY] = replace(source, stored=source.dtype, wide=wide)


def _is_held_by(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether all numbers of a tensor are numbers of ``dtype``; those of one without data are taken to be."""
    deferred = deferred_of(tensor)
    if deferred is None:
        return isinstance(tensor.data, FakeTensor) or torch.equal(tensor.detach().to(dtype).to(tensor.dtype), tensor)
    if deferred.dtypes() == frozenset({dtype}):
        return True
    return all(torch.equal(piece.to(dtype).to(piece.dtype), piece) for piece in deferred.pieces())


def stored_dtype(source: Source, fqn: str, tensor: Tensor) -> torch.dtype:
    """The dtype that a float parameter is stored in; that of a buffer, or of codes, is its own."""
    is_narrow = isinstance(tensor, nn.Parameter) and tensor.dtype == torch.float32 and fqn not in source.wide
    return source.stored if is_narrow and source.stored is not None else tensor.dtype


def source_of(gm: fx.GraphModule) -> Source:
    """The ``Source`` of a captured graph."""
    found = gm.meta.get(KEY)
    if not isinstance(found, Source):
        raise PassError("this graph was not made by graphq.capture: it has no graphq.source")
    return found
