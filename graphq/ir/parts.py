"""A graph cut at its repeated blocks: parts that are graphs of their own, and what is made of one in its place."""

import dataclasses
import itertools
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast, final

import torch
from torch import Tensor, fx, nn

from graphq.capture.source import KEY, SHARED, TensorInput, source_of
from graphq.state import deferred_of, held_tensor, put_input, put_tensor, remove_tensor, storage_of, tensor_of

_OUTPUT: Final = "stage_output"


@final
@dataclass(frozen=True)
class BlockGraph:
    """A part of a graph: the nodes whose values it takes and gives, of the whole graph, in order.

    ``read``: the tensors that were read for it, by name.
    """

    gm: fx.GraphModule
    takes: tuple[fx.Node, ...]
    gives: tuple[fx.Node, ...]
    read: dict[str, weakref.ref[Tensor]] = field(default_factory=dict[str, weakref.ref[Tensor]], repr=False)

    def leaves(self, name: str) -> bool:
        """Whether the part holds the tensor that was read for it under this name, and none that was made of it."""
        found = self.read.get(name)
        return found is not None and found() is held_tensor(self.gm, name)


def cut(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """The nodes that compute, in order: those in front of the blocks, those of each block, and those behind."""
    nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    blocks = [_block_of(gm, node) for node in nodes]
    first: dict[tuple[str, int], int] = {}
    last: dict[tuple[str, int], int] = {}
    for place, block in enumerate(blocks):
        if block is not None:
            first.setdefault(block, place)
            last[block] = place
    order = list(first)
    if not order or any(last[a] >= first[b] for a, b in itertools.pairwise(order)):
        return [nodes]
    ends = [*(first[block] for block in order), last[order[-1]] + 1, len(nodes)]
    starts = [0, *ends[:-1]]
    return [nodes[a:b] for a, b in zip(starts, ends, strict=True) if a < b]


def _block_of(gm: fx.GraphModule, node: fx.Node) -> tuple[str, int] | None:
    """The list of blocks and the index in it of the innermost module that a node belongs to."""
    source = source_of(gm)
    for path, _ in cast(Iterable[Any], (node.meta.get("nn_module_stack") or {}).values()):
        index = source.block_of(f"{path}.")
        if index is not None:
            prefix = next(p for p in source.blocks if f"{path}.".startswith(f"{p}."))
            return prefix, index
    return None


def _shared(gm: fx.GraphModule, stages: Sequence[Sequence[fx.Node]]) -> frozenset[str]:
    """The tensors that several parts read, under this name or another."""
    place = {node: index for index, stage in enumerate(stages) for node in stage}
    readers: dict[int, set[int]] = {}
    names: dict[int, set[str]] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        storage = storage_of(held_tensor(gm, str(node.target)))
        readers.setdefault(storage, set()).update(place.get(user, -1) for user in node.users)
        names.setdefault(storage, set()).add(str(node.target))
    return frozenset(name for storage, found in readers.items() if len(found) > 1 for name in names[storage])


@final
class Parts:
    """A graph cut at its blocks. What a part needs to know of the whole is found once, and kept true by ``merge``: what
    a part costs does not depend on how many there are.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.stages = cut(gm)
        self.merged: tuple[str, ...] = ()  # the tensors that the part which was merged last reads
        self.shared: frozenset[str] = _shared(gm, self.stages) | gm.meta.get(SHARED, frozenset())
        source = source_of(gm)
        self._declared = dict(zip(gm.graph.find_nodes(op="placeholder"), source.inputs, strict=True))
        results = cast(tuple[fx.Node, ...], gm.graph.output_node().args[0])
        self._outputs = {node: place for place, node in enumerate(results)}
        self._reads = Counter(str(node.target) for node in gm.graph.find_nodes(op="get_attr"))  # nodes of each name
        self._last: dict[fx.Node, int] = {}  # the last part that takes each value
        for index, stage in enumerate(self.stages):
            self._last |= dict.fromkeys((n for node in stage for n in node.all_input_nodes), index)

    def extract(self, index: int, read: bool = True) -> BlockGraph:
        """The graph of a part. It holds the same tensors as the whole, those that are deferred read unless ``read`` is
        false; those in ``shared`` belong to others, too.
        """
        stage = self.stages[index]
        own = set(stage)
        takes: dict[fx.Node, None] = {}
        for node in stage:
            takes |= dict.fromkeys(n for n in node.all_input_nodes if n not in own and n.op != "get_attr")
        gives = tuple(node for node in stage if any(user not in own for user in node.users))
        source = source_of(self.gm)

        graph = fx.Graph()
        made: dict[fx.Node, fx.Node] = {}
        for node in takes:
            made[node] = put_input(graph, node.name)
            made[node].meta = {"val": node.meta["val"]}
        root = nn.Module()
        were_read: dict[str, weakref.ref[Tensor]] = {}
        for node in _tensors_of(stage):
            name = str(node.target)
            held = held_tensor(self.gm, name)
            if read and name not in were_read and deferred_of(held) is not None:
                put_tensor(root, name, tensor_of(self.gm, name))
                were_read[name] = weakref.ref(held_tensor(root, name))
            elif name not in were_read:
                put_tensor(root, name, held)
            made[node] = graph.node_copy(node, made.__getitem__)
        for node in stage:
            made[node] = graph.node_copy(node, made.__getitem__)
        graph.output(tuple(made[node] for node in gives))
        part = fx.GraphModule(root, graph)
        places = [self._outputs.get(node) for node in gives]
        names = tuple(f"{_OUTPUT}_{i}" if at is None else source.outputs[at] for i, at in enumerate(places))
        inputs = tuple(self._declared.get(node) or _input(node) for node in takes)
        # Its batches come with their validity, whose mask may not be among them.
        part.meta[KEY] = dataclasses.replace(source, inputs=inputs, outputs=names, mask=None)
        part.meta[SHARED] = self.shared
        return BlockGraph(part, tuple(takes), gives, were_read)

    def done_with(self, index: int, part: BlockGraph) -> frozenset[str]:
        """What the part takes and gives, by name, and no later part takes."""
        return frozenset(node.name for node in (*part.takes, *part.gives) if self._last.get(node, -1) <= index)

    def merge(self, index: int, part: BlockGraph) -> dict[str, str]:
        """The nodes of the part's stage are those that became of it, with the tensors that these read; what was read
        for it and left alone is deferred as it was.

        Gives the new names of what the part gives, by the old ones.
        """
        gm, stage = self.gm, self.stages[index]
        made: dict[fx.Node, fx.Node] = {}
        held: dict[str, fx.Node] = {}
        inputs = part.gm.graph.find_nodes(op="placeholder")
        made |= dict(zip(inputs, part.takes, strict=True))
        outputs: tuple[fx.Node, ...] = ()
        source, of_part = source_of(gm), source_of(part.gm)
        if of_part.wide is not source.wide:  # of parameters that passes made
            gm.meta[KEY] = dataclasses.replace(source, wide=source.wide | of_part.wide)
        own = set(stage)
        reads = [node for node in _tensors_of(stage) if all(user in own for user in node.users)]
        as_they_were = {name: held_tensor(gm, name) for name in part.read}
        self._reads.subtract(str(node.target) for node in reads)
        for name in dict.fromkeys(str(node.target) for node in reads):
            if not self._reads[name]:
                remove_tensor(gm, name)  # the part holds it, if it has not made something else of it
        with gm.graph.inserting_before(stage[0]):
            for node in part.gm.graph.nodes:
                match node.op:
                    case "placeholder":
                        continue
                    case "output":
                        outputs = node.args[0]
                    case "get_attr":
                        name = str(node.target)
                        if name not in held:
                            own = as_they_were[name] if part.leaves(name) else held_tensor(part.gm, name)
                            put_tensor(gm, name, own)
                            held[name] = gm.graph.node_copy(node, made.__getitem__)
                        made[node] = held[name]
                    case _:
                        made[node] = gm.graph.node_copy(node, made.__getitem__)
        self._reads.update(held.keys())
        self.merged = tuple(held)
        names: dict[str, str] = {}
        for old, result in zip(part.gives, outputs, strict=True):
            new = made[result]
            old.replace_all_uses_with(new)
            names[old.name] = new.name
            for found in (self._last, self._outputs):
                if old in found:  # ``new`` may be a node that was there, or stand for several
                    found[new] = max(found.pop(old), found.get(new, -1))
        for node in (*reversed(stage), *reads):
            gm.graph.erase_node(node)
        return names


def _tensors_of(stage: Sequence[fx.Node]) -> list[fx.Node]:
    """The nodes of tensors that these nodes read, in graph order."""
    return sorted({n for node in stage for n in node.all_input_nodes if n.op == "get_attr"})


def _input(node: fx.Node) -> TensorInput:
    """What a part takes of the parts in front of it, as an input; a number is a tensor without axes."""
    val = node.meta["val"]
    if not isinstance(val, Tensor):
        return TensorInput(node.name, torch.int64, ())
    sizes = (str(size) if isinstance(cast(Any, size), torch.SymInt) else size for size in val.shape)
    return TensorInput(node.name, val.dtype, tuple(sizes))
