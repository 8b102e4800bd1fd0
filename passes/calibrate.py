"""Calibration: the observers see the activations of the user's data, without what its masks leave out."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphq.capture.source import source_of
from graphq.data.masks import ALL, MaskedBatch, masked_batch
from graphq.errors import GraphqError, PassError, SpecError
from graphq.ir.layers import LAYER
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.row_masks import row_mask
from graphq.ir.validity import ValidityRun
from graphq.ir.validity_rules import place_of, validity_of
from graphq.observers.grids import GridObserver
from graphq.passes.observe import observers

Reached = dict[str, dict[str, None]]  # by the op that masked tokens come through, the layers whose input they reach


@final
@dataclass(frozen=True)
class Calibrate(Pass):
    """Every observer has seen every batch, in as many sweeps as it asks for. Without observers no batch is run.

    What a batch's mask leaves out is not seen. ``note`` is told of the layers whose observers see masked tokens all
    the same, and of the op beyond which these cannot be told from others.
    """

    note: Callable[[str], None] | None = None
    name: ClassVar[str] = "calibrate"

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        watching = observers(gm)
        if not watching:
            return 0
        gm.recompile()
        count = 0
        reached: Reached = {}
        sweeps = max(observer.sweeps for _, observer in watching)
        if sweeps > 1 and batches is not None:
            batches = list(batches)
        for sweep in range(sweeps):
            for _, observer in watching:
                observer.sweep = sweep
            with torch.inference_mode():
                for number, batch in enumerate(batches or ()):
                    run_batch(gm, batch, number, self.name, reached)
                    count += 1
        if count == 0:
            raise SpecError("calibration: no batches; static scales need at least one")
        of_grids = [one for _, one in watching if isinstance(one, GridObserver) and not one.moved]
        grids = {one.grid.number for one in of_grids if one.has_observed}
        unseen = dict.fromkeys(
            layer
            for _, seen in watching
            if not seen.has_observed and not (isinstance(seen, GridObserver) and seen.grid.number in grids)
            for layer in seen.layers
        )  # an empty cache has the range of what is written into it
        if unseen:
            problem = "calibration: no data reached {}; calibrate with data that uses it"
            raise SpecError([problem.format(layer) for layer in unseen])
        for op, layers in reached.items():
            first, *more = layers
            others = f" and {len(more)} more" if more else ""
            if self.note is not None:
                self.note(f"{first}{others}: masked tokens have a part in its calibration: {op}")
        return len(watching)


def run_batch(
    gm: fx.GraphModule, batch: tuple[Any, ...], number: int, by: str, reached: Reached | None = None
) -> MaskedBatch:
    """What the graph gives for a batch, with what of it is valid; observers see the valid part of their inputs.

    Raises ``SpecError`` for a batch on which the model fails, such as token ids beyond its vocabulary, and
    ``PassError``, which names the pass ``by``, where what failed is not the model's own.
    """
    given = masked_batch(source_of(gm), batch)
    try:
        if given.is_trivial:  # a call would print where in the graph it failed
            outputs = gm.forward(*given)
            return MaskedBatch(outputs, [ALL] * len(outputs))
        return _ObservedRun(gm, {} if reached is None else reached).run_batch(given)
    except (GraphqError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the ops say
        raise _explained(gm, given, number, by, error) from error


@final
class _ObservedRun(ValidityRun):
    """Observers see the valid part of their inputs. ``reached`` takes in what they see of masked tokens, too."""

    def __init__(self, gm: fx.GraphModule, reached: Reached) -> None:
        super().__init__(gm)
        self.reached = reached
        self.observers = {str(op.node.target): (op.node, observer) for op, observer in observers(gm)}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        node, observer = self.observers[target]
        found = validity_of(node.args[0], self.validity)
        stops = dict.fromkeys(found.stops)
        valid = found.mask
        if valid is not None and observer.reads_windows:
            valid, stops["a convolution reads many of them at once"] = None, None
        elif valid is not None and observer.axis is not None and row_mask(valid, (observer.axis,)) is None:
            valid, stops["they have a part in some of its channels"] = None, None
        for stop in stops:
            self.reached.setdefault(stop, {}).update(dict.fromkeys(observer.layers))
        return observer(*args, valid=valid)


# -- whose fault it is


def _explained(gm: fx.GraphModule, batch: tuple[Any, ...], number: int, by: str, error: Exception) -> GraphqError:
    """A batch is to blame where an op of the model's own fails on operands of the kind that it was captured with."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    found = _Search(gm).failing(batch)
    if found is None:
        return PassError(f"{by}: batch {number}: {type(error).__name__}: {first}")
    node, is_as_captured = found
    if is_as_captured and isinstance(node.target, OpOverload) and node.target.namespace != "graphq":
        return SpecError(f"calibration: batch {number}: the model fails on it: {first}")
    where = node.meta.get(LAYER) or place_of(node)
    return PassError(f"{by}: batch {number}: {where}: {node.target}: {type(error).__name__}: {first}")


@final
class _Search(fx.Interpreter):
    """Runs a graph, without its observers, up to the node that fails."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.extra_traceback = False
        self.observers = {op.node for op, _ in observers(gm)}
        self.last: fx.Node | None = None

    def failing(self, batch: tuple[Any, ...]) -> tuple[fx.Node, bool] | None:
        """The node, and whether its operands are as its ``val``s say; None where none fails."""
        with contextlib.suppress(Exception):  # whatever the ops say
            self.run(*batch)
            return None
        assert self.last is not None
        read = self.last.all_input_nodes
        return self.last, all(_is_like(node.meta.get("val"), self.env.get(node)) for node in read)

    def run_node(self, n: fx.Node) -> Any:
        self.last = n
        return self.env[n.all_input_nodes[0]] if n in self.observers else super().run_node(n)


def _is_like(val: Any, value: Any) -> bool:
    """Whether a value has the dtype and the sizes, as far as these are fixed, that a node promises."""
    if not isinstance(val, Tensor) or not isinstance(value, Tensor):
        return type(val) is type(value) or isinstance(val, torch.SymInt | torch.SymFloat | torch.SymBool)
    sizes = zip(val.shape, value.shape, strict=False)
    fit = not any(statically_known_true(want != size) for want, size in sizes)
    return val.dtype == value.dtype and val.dim() == value.dim() and fit
