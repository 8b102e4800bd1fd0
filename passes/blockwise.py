"""Passes on one repeated block at a time, each calibrated on what the blocks in front of it give.

The graph is cut at the blocks; a part is a graph of its own, to which a pass cannot tell that it is none. Only the
activations between parts are kept, and what stands behind the last layer with a plan is never run.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, cast, final

import torch
from torch import Tensor, fx, nn

from graphq.capture.source import KEY, SHARED, TensorInput, source_of
from graphq.data.masks import MaskedBatch, Validity, masked_batch
from graphq.errors import SpecError
from graphq.ir import edit
from graphq.ir.layers import PLAN
from graphq.ir.pipeline import Batches, Pass, Pipeline
from graphq.passes.calibrate import run_batch
from graphq.spec.plan import PerExpert, Plan
from graphq.spec.rules import Prefix
from graphq.state import put_input, put_tensor, remove_tensor, tensor_of

_OUTPUT: Final = "stage_output"


@final
@dataclass(frozen=True)
class Blockwise(Pass):
    """``passes`` have been run on every part of the graph between cuts at the repeated blocks, in order.

    ``prefix``: each part sees what the changed parts in front of it give, ``quantized``, or what they gave before the
    change, ``float``. A graph whose blocks do not stand one after the other is one part.
    """

    passes: tuple[Pass, ...]
    prefix: Prefix = "quantized"
    name: ClassVar[str] = "blockwise"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        stages = cut(gm)
        shared = _shared(gm, stages)
        planned = [i for i, stage in enumerate(stages) if any(_is_planned(node) for node in stage)]
        seen = None if batches is None else [_inputs(gm, batch) for batch in batches]
        if seen == []:
            raise SpecError("calibration: no batches; give at least one")
        changes = 0
        for index, stage in enumerate(stages[: planned[-1] + 1] if planned else ()):
            part = extract(gm, stage, stages[index + 1 :], shared)
            later = part.carried and index < planned[-1]
            after: list[_Values] | None = None
            if seen is not None and later and (self.prefix == "float" or index not in planned):
                after = _run(part, seen, self.name)
            if index in planned:
                inputs = None if seen is None else _Replay(part, seen)
                count = sum(Pipeline(self.passes).run(part.gm, inputs).values())
                if seen is not None and later and after is None:
                    after = _run(part, seen, self.name)
                if count:
                    names = merge(gm, stage, part)
                    after = after and [{names.get(k, k): v for k, v in values.items()} for values in after]
                    changes += count
            seen = after
        edit.drop_unused(gm)
        return changes


@final
@dataclass(frozen=True)
class BlockGraph:
    """A part of a graph: the nodes whose values it takes and gives, by name in the whole graph, in order.

    ``carried``: those that it gives and that later parts take, rather than the model's outputs alone; and what
    passes it by.
    """

    gm: fx.GraphModule
    takes: tuple[fx.Node, ...]
    gives: tuple[fx.Node, ...]
    carried: frozenset[str]


_Values = dict[str, tuple[Any, Validity]]  # of a batch, by the names of their nodes


class _Replay:
    """The batches of a part, as often as they are asked for."""

    def __init__(self, part: BlockGraph, seen: Sequence[_Values]) -> None:
        self.part = part
        self.seen = seen

    def __iter__(self) -> Any:
        return iter([_arguments(self.part, values) for values in self.seen])

    def __len__(self) -> int:
        return len(self.seen)


def _arguments(part: BlockGraph, values: _Values) -> MaskedBatch:
    taken = [values[node.name] for node in part.takes]
    return MaskedBatch([value for value, _ in taken], [validity for _, validity in taken])


def _inputs(gm: fx.GraphModule, batch: tuple[Tensor, ...]) -> _Values:
    return _named([node.name for node in gm.graph.find_nodes(op="placeholder")], masked_batch(source_of(gm), batch))


def _named(names: Sequence[str], batch: MaskedBatch) -> _Values:
    return dict(zip(names, zip(batch, batch.validity, strict=True), strict=True))


def _run(part: BlockGraph, seen: Sequence[_Values], by: str) -> list[_Values]:
    """What later parts take of each batch."""
    part.gm.recompile()
    names = [node.name for node in part.gives]
    found: list[_Values] = []
    for number, values in enumerate(seen):
        with torch.inference_mode():
            given = _named(names, run_batch(part.gm, _arguments(part, values), number, by))
        found.append({name: value for name, value in (values | given).items() if name in part.carried})
    return found


def _is_planned(node: fx.Node) -> bool:
    decision = node.meta.get(PLAN)
    decisions = decision.decisions if isinstance(decision, PerExpert) else (decision,)
    return any(isinstance(d, Plan) for d in decisions)


# -- cutting and joining


def cut(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """The nodes that compute, in order: those in front of the blocks, those of each block, and those behind."""
    nodes = [n for n in gm.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    blocks = [_block_of(gm, node) for node in nodes]
    order = list(dict.fromkeys(block for block in blocks if block is not None))
    first = {block: blocks.index(block) for block in order}
    last = {block: len(blocks) - 1 - blocks[::-1].index(block) for block in order}
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
        storage = tensor_of(gm, str(node.target)).untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
        readers.setdefault(storage, set()).update(place.get(user, -1) for user in node.users)
        names.setdefault(storage, set()).add(str(node.target))
    return frozenset(name for storage, found in readers.items() if len(found) > 1 for name in names[storage])


def extract(
    gm: fx.GraphModule, stage: Sequence[fx.Node], later: Sequence[Sequence[fx.Node]], shared: frozenset[str]
) -> BlockGraph:
    """The graph of a part. It holds the same tensors as ``gm``; those in ``shared`` belong to others, too."""
    own = set(stage)
    behind = {node for other in later for node in other}
    takes: dict[fx.Node, None] = {}
    for node in stage:
        takes |= dict.fromkeys(n for n in node.all_input_nodes if n not in own and n.op != "get_attr")
    gives = tuple(node for node in stage if any(user not in own for user in node.users))
    outputs = next(node for node in gm.graph.nodes if node.op == "output").args[0]
    source = source_of(gm)
    named = dict(zip(cast(tuple[fx.Node, ...], outputs), source.outputs, strict=True))

    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in takes:
        made[node] = put_input(graph, node.name)
        made[node].meta = {"val": node.meta["val"]}
    root = nn.Module()
    for node in gm.graph.nodes:
        if node.op == "get_attr" and any(user in own for user in node.users):
            name = str(node.target)
            put_tensor(root, name, tensor_of(gm, name))
            made[node] = graph.node_copy(node, made.__getitem__)
    for node in stage:
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[node] for node in gives))
    part = fx.GraphModule(root, graph)
    names = tuple(named.get(node, f"{_OUTPUT}_{i}") for i, node in enumerate(gives))
    declared = dict(zip(gm.graph.find_nodes(op="placeholder"), source.inputs, strict=True))
    inputs = tuple(declared.get(node) or _input(node) for node in takes)
    # Its batches come with their validity, whose mask may not be among them.
    part.meta[KEY] = dataclasses.replace(source, inputs=inputs, outputs=names, mask=None)
    part.meta[SHARED] = shared | gm.meta.get(SHARED, frozenset())
    needed = frozenset(n.name for other in behind for n in other.all_input_nodes)
    return BlockGraph(part, tuple(takes), gives, needed)


def _input(node: fx.Node) -> TensorInput:
    """What a part takes of the parts in front of it, as an input; a number is a tensor without axes."""
    val = node.meta["val"]
    if not isinstance(val, Tensor):
        return TensorInput(node.name, torch.int64, ())
    sizes = (str(size) if isinstance(cast(Any, size), torch.SymInt) else size for size in val.shape)
    return TensorInput(node.name, val.dtype, tuple(sizes))


def merge(gm: fx.GraphModule, stage: Sequence[fx.Node], part: BlockGraph) -> dict[str, str]:
    """The nodes of ``stage`` are those that became of its part, with the tensors that these read.

    Gives the new names of what the part gives, by the old ones.
    """
    made: dict[fx.Node, fx.Node] = {}
    held: dict[str, fx.Node] = {}
    inputs = part.gm.graph.find_nodes(op="placeholder")
    made |= dict(zip(inputs, part.takes, strict=True))
    outputs: tuple[fx.Node, ...] = ()
    own = set(stage)
    source, of_part = source_of(gm), source_of(part.gm)
    if of_part.wide is not source.wide:  # of parameters that passes made
        gm.meta[KEY] = dataclasses.replace(source, wide=source.wide | of_part.wide)
    reads = [n for n in gm.graph.find_nodes(op="get_attr") if n.users and own.issuperset(n.users)]
    others = {str(n.target) for n in gm.graph.find_nodes(op="get_attr") if n not in reads}
    for name in dict.fromkeys(str(n.target) for n in reads):
        if name not in others:
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
                    put_tensor(gm, name, tensor_of(part.gm, name))
                    if name not in held:
                        held[name] = gm.graph.node_copy(node, made.__getitem__)
                    made[node] = held[name]
                case _:
                    made[node] = gm.graph.node_copy(node, made.__getitem__)
    for old, new in zip(part.gives, outputs, strict=True):
        old.replace_all_uses_with(made[new])
    names = {old.name: made[new].name for old, new in zip(part.gives, outputs, strict=True)}
    for node in (*reversed(stage), *reads):
        gm.graph.erase_node(node)
    return names
