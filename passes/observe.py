"""Observers on the activations that scales have to be calibrated for."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import ClassVar, Protocol, cast, final, runtime_checkable

from torch import Tensor, fx

from graphq.ir import edit
from graphq.ir.layers import LAYER, PLAN
from graphq.ir.matrices import scale_block
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import (
    Dequantize,
    GroupedLinear,
    Op,
    Param,
    Quantize,
    TransposedLinear,
    Weighted,
    ops_of,
    view,
)
from graphq.observers.observer import Observer, ObserverRequest
from graphq.observers.ranges import OfmrWeightObserver, OutputMap, RangeObserver, observer_for
from graphq.runtime import ops
from graphq.spec.plan import Plan, input_quants, weight_quants
from graphq.spec.quant import Ofmr, Quant
from graphq.state import tensor_of


def to_quantize(gm: fx.GraphModule) -> Iterator[tuple[Weighted, tuple[Quant | None, ...]]]:
    """The layers whose planned input is not quantized yet, with its format (a stack: that of each expert)."""
    for op in ops_of(gm):
        if not isinstance(op, Weighted) or _is_quantized(op.input_op):
            continue
        plan = op.node.meta.get(PLAN)
        if isinstance(plan, Plan) and plan.placed:  # with those of the whole graph
            continue
        quants = input_quants(plan)
        if any(quant is not None for quant in quants):
            yield op, quants


def _is_quantized(x: Op) -> bool:
    if x.node.target is ops.select_rows:  # one of several that are
        return True
    return isinstance(x, Dequantize) and isinstance(x.codes, Quantize)


def output_map(gm: fx.GraphModule, op: Weighted, quant: Quant) -> OutputMap:
    """What a linear or a convolution makes of its input, without its bias."""
    weight = op.weight_op
    assert isinstance(weight, Param), "not quantized yet"
    assert op.is_product, "refused by annotate"
    assert not isinstance(op, GroupedLinear), "refused by annotate"
    w = tensor_of(gm, weight.fqn).detach()
    block = scale_block(op, quant.granularity)
    target, arguments = op.node.target, op.node.args[3:]  # a convolution's stride, padding, dilation and groups

    def apply(x: Tensor, weight: Tensor) -> Tensor:
        if isinstance(op, TransposedLinear):
            return x @ weight
        return cast(Tensor, target(x, weight, None, *arguments))  # type: ignore[operator]

    return OutputMap(apply, w, op.output_axis, tuple(block))


@runtime_checkable  # tests check types as they run
class NeedsStatistics(Protocol):
    """A pass that needs statistics."""

    def observer_requests(self, gm: fx.GraphModule) -> Iterable[ObserverRequest]:
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

    passes: tuple[NeedsStatistics, ...] = ()
    ranges: bool = True
    name: ClassVar[str] = "observe"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        made = [found for step in self.passes for found in step.observer_requests(gm)]
        if self.ranges:
            made += self._ranges(gm)
        add_observers(gm, made, by=self.name)
        return len(made)

    def _ranges(self, gm: fx.GraphModule) -> list[ObserverRequest]:
        wanted: dict[tuple[Op, Quant], list[Weighted]] = {}
        for op, quants in to_quantize(gm):
            for quant in dict.fromkeys(quants):
                if quant is not None and not quant.dynamic and observer_on(gm, op.input_op, quant) is None:
                    wanted.setdefault((op.input_op, quant), []).append(op)
        made: list[ObserverRequest] = []
        for (x, quant), readers in wanted.items():
            layers = tuple(dict.fromkeys(str(op.node.meta[LAYER]) for op in readers))
            maps = [(op, quant) for op in readers]
            observer = observer_for(quant, layers, lambda maps=maps: [output_map(gm, op, q) for op, q in maps])
            made.append(ObserverRequest(x, observer, readers[0]))
        for op in ops_of(gm):
            quant = weight_quants(op.node.meta.get(PLAN))[0] if isinstance(op, Weighted) else None
            if quant is None or not isinstance(quant.method, Ofmr) or not isinstance(op, Weighted):
                continue
            if isinstance(op.weight_op, Param) and weight_observer_on(gm, op) is None:
                layer = str(op.node.meta[LAYER])
                made.append(
                    ObserverRequest(op.input_op, OfmrWeightObserver(quant, (layer,), output_map(gm, op, quant)), op)
                )
        return made


def add_observers(gm: fx.GraphModule, made: Sequence[ObserverRequest], by: str) -> None:
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
    if left:
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
