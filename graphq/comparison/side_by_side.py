"""Two graphs of one model, run side by side, layer by layer.

The compared graph is run twice in one walk: once by itself, and once so that every layer's output is taken from the
reference. In the second, what a layer reads is the reference's activation, brought to it by the compared graph's own
ops between layers; what it gives then differs by its own rounding alone. What both runs share, such as a weight's
values, is computed once; no more of the reference is held than what the next layers are compared with.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, cast, final

import torch
from torch import Tensor, fx

from graphq.capture.source import source_of
from graphq.comparison.clipping import clipped
from graphq.comparison.layer_errors import LayerErrors, Places, Sums
from graphq.data.agreement import AgreementOver
from graphq.data.masks import masked_batch
from graphq.errors import GraphqError, SpecError
from graphq.ir.layers import LAYER
from graphq.ir.validity import ValidityRun
from graphq.ir.validity_rules import validity_of
from graphq.ir.views import Dequantize, GroupedLinear, Op, Quantize, Weighted, ops_of, view

Key = tuple[str, int]  # a layer's name, and which of its uses
_NO_LAYERS: Final = "diff: no layer of A has the name of one of B: they are not of one model"


def layer_nodes(gm: fx.GraphModule) -> dict[Key, fx.Node]:
    """The uses of layers in graph order."""
    found: dict[Key, fx.Node] = {}
    counts: dict[str, int] = {}
    for op in ops_of(gm):
        if isinstance(op, Weighted) and LAYER in op.node.meta and isinstance(op.val, Tensor):
            name = str(op.node.meta[LAYER])
            found[name, counts.get(name, 0)] = op.node
            counts[name] = counts.get(name, 0) + 1
    return found


@final
class SideBySide:
    """The errors of the layers that both graphs have, over the batches that were run. ``merged``: the layers whose
    output is not the same function in both: they have no errors of their own, and what reads them has theirs, too.
    """

    def __init__(self, a: fx.GraphModule, b: fx.GraphModule, merged: Mapping[str, object], worst: int) -> None:
        of_a, of_b = layer_nodes(a), layer_nodes(b)
        self.nodes = {key: (of_a[key], of_b[key]) for key in of_b if key in of_a}
        if not self.nodes:
            raise SpecError(_NO_LAYERS)
        self.only_a, self.only_b = (
            tuple(dict.fromkeys(name for name, use in one if (name, use) not in other))
            for one, other in ((of_a, of_b), (of_b, of_a))
        )
        self.merged = merged
        self.errors = {key: LayerErrors(worst) for key in self.nodes}
        self.outputs = {name: Sums() for name in _compared_outputs(a, b)}
        self.agreement = AgreementOver() if source_of(a).is_causal_lm and source_of(b).is_causal_lm else None
        self._reference = _Reference(a, [node for node, _ in self.nodes.values()])
        self._compared = _Compared(b, self)
        self._a, self._b = a, b

    def run(self, number: int, of_a: tuple[Any, ...], of_b: tuple[Any, ...]) -> None:
        """Add a batch, as each graph takes it. Raises ``SpecError`` for one on which a graph fails."""
        try:
            with torch.inference_mode():
                self._reference.begin(of_a)
                ids = of_a[0] if source_of(self._a).names[0] == "input_ids" else None
                got = self._compared.run_batch(number, of_b, self._reference, ids)
                self._add_outputs(self._reference.finish(), got)
        except (GraphqError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the ops say
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise SpecError(f"calibration: batch {number}: the model fails on it: {first}") from error

    def clipped_share(self, node: fx.Node) -> float | None:
        """The share of the activations that the layer's own input quantizer clipped; None where it has none."""
        quantizer = input_quantizer(view(node))
        if quantizer is None or quantizer not in self._compared.clipped:
            return None
        count, total = self._compared.clipped[quantizer]
        return count / max(total, 1)

    def _add_outputs(self, want: Sequence[Any], got: Sequence[Any]) -> None:
        masks = self._reference.result
        for name, sums in self.outputs.items():
            at, other = source_of(self._a).outputs.index(name), source_of(self._b).outputs.index(name)
            x, y, mask = want[at], got[other], masks[at].mask
            if self.agreement is not None and name == "logits":
                rows = slice(None) if mask is None else mask.all(-1)
                x, y = x[rows], y[rows]
                self.agreement.add(x, y)
                mask = None
            x, y = (x, y) if mask is None else (x[mask], y[mask])
            sums.add(x.reshape(1, -1), y.reshape(1, -1))


def _compared_outputs(a: fx.GraphModule, b: fx.GraphModule) -> list[str]:
    """The outputs of floats that both have and that are no caches."""
    source = source_of(a)
    given = cast(Sequence[Any], a.graph.output_node().args[0])
    others = set(source_of(b).outputs) - source_of(b).presents
    return [
        name
        for name, node in zip(source.outputs, given, strict=True)
        if name in others - source.presents
        and isinstance(node, fx.Node)
        and isinstance(node.meta.get("val"), Tensor)
        and node.meta["val"].is_floating_point()
    ]


@final
class _Reference(ValidityRun):
    """Runs a graph step by step, as far as the next layer that is asked for."""

    def __init__(self, gm: fx.GraphModule, wanted: Sequence[fx.Node]) -> None:
        super().__init__(gm)
        self.source, self.nodes = source_of(gm), list(gm.graph.nodes)
        self.wanted = frozenset(wanted)
        self.kept: dict[fx.Node, tuple[Tensor, Tensor | None]] = {}
        self._steps: Iterator[fx.Node] = iter(())

    def begin(self, batch: tuple[Any, ...]) -> None:
        """The batch is run from now on."""
        given = masked_batch(self.source, batch)
        pairs = zip(self.inputs, given.validity, strict=True)
        self.validity = {node: one for node, one in pairs if not one.is_trivial}
        self.env, self.kept, self.result = {}, {}, ()
        self.args_iter = iter(given)
        self._steps = iter(self.nodes)

    def take(self, node: fx.Node) -> tuple[Tensor, Tensor | None]:
        """What the layer gives, and which of it counts; it is held no longer."""
        while node not in self.kept:
            self._step(next(self._steps))
        return self.kept.pop(node)

    def finish(self) -> Sequence[Any]:
        """What the graph gives."""
        for node in self._steps:
            self._step(node)
        return self.env[self.nodes[-1]]

    def _step(self, node: fx.Node) -> None:
        self.env[node] = made = self.run_node(node)
        if node in self.wanted:
            self.kept[node] = made, validity_of(node, self.validity).mask
        for old in self.user_to_last_uses.get(node, ()):
            del self.env[old]


@final
class _Compared(fx.Interpreter):
    """Runs a graph by itself and with its layers' outputs taken from the reference, in one walk."""

    def __init__(self, gm: fx.GraphModule, whole: SideBySide) -> None:
        super().__init__(gm)
        self.extra_traceback = False
        self.nodes = list(gm.graph.nodes)
        self.errors, self.merged = whole.errors, whole.merged
        self.layers = {node: (key, other) for key, (other, node) in whole.nodes.items()}
        watched = (input_quantizer(view(node)) for node in self.layers)
        self.clipped: dict[fx.Node, list[int]] = {node: [0, 0] for node in watched if node is not None}

    def run_batch(
        self, number: int, batch: tuple[Any, ...], reference: _Reference, tokens: Tensor | None
    ) -> Sequence[Any]:
        """What the graph gives by itself; the errors of its layers are added on the way."""
        free: dict[fx.Node, Any] = {}
        forced: dict[fx.Node, Any] = {}
        values = iter(batch)
        for node in self.nodes:
            if node.op == "placeholder":
                free[node] = forced[node] = next(values)
                continue
            self.env = free
            made = again = self.run_node(node)
            if node.op == "output":
                return made
            if any(free[read] is not forced[read] for read in node.all_input_nodes):
                self.env = forced
                again = self.run_node(node)
            if node in self.clipped:
                self._count(node, free, made)
            if node in self.layers:
                again = self._compare(node, number, reference, (made, again), tokens)
            free[node], forced[node] = made, again
            for old in self.user_to_last_uses.get(node, ()):
                del free[old], forced[old]
        raise AssertionError("a graph ends with its output")

    def _count(self, node: fx.Node, values: Mapping[fx.Node, Any], codes: Tensor) -> None:
        op = cast(Quantize, view(node))
        parts = (op.argument(name) for name in ("scale", "zero_point", "global_scale"))
        given = (None if part is None else values[part] for part in parts)
        found = clipped(values[op.x.node], codes, (*given, op.format, list(op.block)))
        self.clipped[node][0] += int(found.sum())
        self.clipped[node][1] += found.numel()

    def _compare(
        self, node: fx.Node, number: int, reference: _Reference, made: tuple[Tensor, Tensor], tokens: Tensor | None
    ) -> Tensor:
        """What the forced walk goes on with: the reference's output, where both are the same function."""
        (key, other), (free, forced) = self.layers[node], made
        want, mask = reference.take(other)
        if want.shape != forced.shape:
            raise SpecError(f"diff: {key[0]} gives {list(want.shape)} in A and {list(forced.shape)} in B")
        if key[0] in self.merged:
            return forced
        op = cast(Weighted, view(node))
        x, y, z = (one.movedim(op.output_axis, -1) for one in (want, forced, free))
        shape = tuple(x.shape[:-1])
        picked = None
        if mask is not None:
            picked = mask.movedim(op.output_axis, -1).reshape(-1, x.shape[-1]).all(-1).nonzero().flatten()
        flat = [one.reshape(-1, one.shape[-1]) for one in (x, y, z)]
        rows, local, cumulative = flat if picked is None else (one[picked] for one in flat)
        errors = self.errors[key]
        ids = tokens if tokens is not None and tuple(tokens.shape) == shape else None
        errors.add_local(rows, local, Places(number, shape, picked, ids))
        if not isinstance(op, GroupedLinear):  # whose rows lie by expert, which routing of its own may change
            errors.add_cumulative(rows, cumulative)
        return want.to(forced.dtype)


def input_quantizer(op: Op) -> fx.Node | None:
    """The quantizer of a layer's input, through what only moves its codes."""
    assert isinstance(op, Weighted)
    x = op.input_op
    if not isinstance(x, Dequantize):
        return None
    codes = x.codes
    while not isinstance(codes, Quantize):
        read = codes.node.all_input_nodes
        if len(read) != 1 or isinstance(codes, Weighted | Dequantize):
            return None
        codes = view(read[0])
    return codes.node
