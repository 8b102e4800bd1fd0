"""Observers on the activations that scales have to be calibrated for."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from typing import ClassVar, Protocol, cast, final, runtime_checkable

from torch import Tensor, fx

from graphq import numerics
from graphq.ir import edit
from graphq.ir.layers import LAYER, PLAN
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import (
    Dequantize,
    Embedding,
    GroupedLinear,
    Linear,
    Op,
    Param,
    Quantize,
    TransposedLinear,
    Weighted,
    ops_of,
    view,
)
from graphq.observers.observer import Observer
from graphq.observers.ranges import OfmrWeightObserver, OutputMap, RangeObserver, observer_for
from graphq.runtime import ops
from graphq.spec.plan import PerExpert, Plan
from graphq.spec.quant import Ofmr, Quant
from graphq.state import tensor_of


def input_quants(decision: object) -> tuple[Quant | None, ...]:
    """The input format of a layer, or of each expert of a stack."""
    decisions = decision.decisions if isinstance(decision, PerExpert) else (decision,)
    return tuple(d.input if isinstance(d, Plan) else None for d in decisions)


def to_quantize(gm: fx.GraphModule) -> Iterator[tuple[Weighted, tuple[Quant | None, ...]]]:
    """The layers whose planned input is not quantized yet, with its format (a stack: that of each expert)."""
    for op in ops_of(gm):
        if not isinstance(op, Weighted) or _is_quantized(op.input_op):
            continue
        quants = input_quants(op.node.meta.get(PLAN))
        if any(quant is not None for quant in quants):
            yield op, quants


def _is_quantized(x: Op) -> bool:
    if x.node.target is ops.select_rows:  # one of several that are
        return True
    return isinstance(x, Dequantize) and isinstance(x.codes, Quantize)


def weight_quants(decision: object) -> tuple[Quant | None, ...]:
    """The weight format of a layer, or of each expert of a stack."""
    decisions = decision.decisions if isinstance(decision, PerExpert) else (decision,)
    return tuple(d.weight if isinstance(d, Plan) else None for d in decisions)


def output_map(gm: fx.GraphModule, op: Weighted, quant: Quant) -> OutputMap:
    """What a linear or a convolution makes of its input, without its bias."""
    weight = op.weight_op
    assert isinstance(weight, Param), "not quantized yet"
    assert not isinstance(op, GroupedLinear | Embedding), "refused by annotate"
    w = tensor_of(gm, weight.fqn).detach()
    block = numerics.weight_block(quant.granularity, w.dim(), op.out_axis, op.in_axis, op.own_axes)
    target, arguments = op.node.target, op.node.args[3:]  # a convolution's stride, padding, dilation and groups

    def apply(x: Tensor, weight: Tensor) -> Tensor:
        if isinstance(op, TransposedLinear):
            return x @ weight
        return cast(Tensor, target(x, weight, None, *arguments))  # type: ignore[operator]

    is_linear = isinstance(op, Linear | TransposedLinear)
    return OutputMap(apply, w, -1 if is_linear else 1, tuple(block))


@final
@dataclass(frozen=True)
class Wanted:
    """An observer of ``x`` that a pass asks for. ``like``: a layer that reads it; ``rest``: what it sees besides."""

    x: Op
    observer: Observer
    like: Weighted
    rest: tuple[Op, ...] = ()


@runtime_checkable  # tests check types as they run
class Asking(Protocol):
    """A pass that needs statistics."""

    def wanted(self, gm: fx.GraphModule) -> Iterable[Wanted]:
        """The observers that are not there yet."""
        ...


@final
@dataclass(frozen=True)
class Observe(Pass):
    """Every activation with a static scale is watched by one observer, which all layers that agree on it share.

    The experts of a stack that have the same format share a scale: they read rows of one tensor. A layer whose weight's
    scale depends on its output has an observer of its own for that.

    passes: those whose statistics are watched, too. ranges: whether static scales are.
    """

    passes: tuple[Asking, ...] = ()
    ranges: bool = True
    name: ClassVar[str] = "observe"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        made = [found for step in self.passes for found in step.wanted(gm)]
        if self.ranges:
            made += self._ranges(gm)
        add_observers(gm, made, by=self.name)
        return len(made)

    def _ranges(self, gm: fx.GraphModule) -> list[Wanted]:
        wanted: dict[tuple[Op, Quant], list[Weighted]] = {}
        for op, quants in to_quantize(gm):
            for quant in dict.fromkeys(quants):
                if quant is not None and not quant.dynamic and observer_on(gm, op.input_op, quant) is None:
                    wanted.setdefault((op.input_op, quant), []).append(op)
        made: list[Wanted] = []
        for (x, quant), readers in wanted.items():
            layers = tuple(dict.fromkeys(str(op.node.meta[LAYER]) for op in readers))
            maps = [(op, quant) for op in readers]
            observer = observer_for(quant, layers, lambda maps=maps: [output_map(gm, op, q) for op, q in maps])
            made.append(Wanted(x, observer, readers[0]))
        for op in ops_of(gm):
            quant = weight_quants(op.node.meta.get(PLAN))[0] if isinstance(op, Weighted) else None
            if quant is None or not isinstance(quant.method, Ofmr) or not isinstance(op, Weighted):
                continue
            if isinstance(op.weight_op, Param) and weight_observer_on(gm, op) is None:
                layer = str(op.node.meta[LAYER])
                made.append(Wanted(op.input_op, OfmrWeightObserver(quant, (layer,), output_map(gm, op, quant)), op))
        return made


def add_observers(gm: fx.GraphModule, made: Sequence[Wanted], by: str) -> None:
    """Every activation is watched by the observer that is wanted; names are given in this order."""
    free = (path for i in count() if not edit.has_tensor(gm, path := f"observers.{i}"))
    paths = list(islice(free, len(made)))
    for found, path in reversed(list(zip(made, paths, strict=True))):
        # Each stands right after x: in order at last.
        edit.add_observer(gm, found.x, path, found.observer, by, found.like, found.rest)


def remove_observers(gm: fx.GraphModule) -> int:
    """No observer is left; how many there were."""
    left = observers(gm)
    for op, _ in left:
        edit.bypass(gm, op, view(op.node.all_input_nodes[0]))
    edit.drop_unused(gm)
    return len(left)


def observer_of(gm: fx.GraphModule, op: Op) -> Observer | None:
    """The observer that a node calls."""
    if op.node.op != "call_module":
        return None
    module = gm.get_submodule(str(op.node.target))
    return module if isinstance(module, Observer) else None


def observer_on(gm: fx.GraphModule, x: Op, quant: Quant) -> RangeObserver | None:
    """The observer of ``x`` as an activation of this format."""
    for user in x.users:
        found = observer_of(gm, user)
        if isinstance(found, RangeObserver) and not isinstance(found, OfmrWeightObserver) and found.quant == quant:
            return found
    return None


def weight_observer_on(gm: fx.GraphModule, op: Weighted) -> OfmrWeightObserver | None:
    """The observer of a layer's output errors."""
    for user in op.input_op.users:
        found = observer_of(gm, user)
        if isinstance(found, OfmrWeightObserver) and found.layers == (op.node.meta.get(LAYER),):
            return found
    return None


def observers(gm: fx.GraphModule) -> list[tuple[Op, Observer]]:
    """The nodes that call observers, and the observers."""
    found = ((op, observer_of(gm, op)) for op in ops_of(gm))
    return [(op, observer) for op, observer in found if observer is not None]


def free_path(gm: fx.GraphModule, layer: str, names: Sequence[str]) -> str:
    """Where tensors of these names can be held that belong to the input of ``layer``: there, or under a name made of it
    where they are held already, and where the layer is itself a float tensor.
    """
    parent, _, name = layer.rpartition(".")
    is_tensor = isinstance(getattr(gm.get_submodule(parent), name, None), Tensor)
    first = f"{layer}_input" if is_tensor else layer
    further = (f"{first}.input{number}" for number in count())
    return next(
        path for path in chain((first,), further) if not any(edit.has_tensor(gm, f"{path}.{name}") for name in names)
    )
