"""Weights as codes, by rounding that is learned (Cheng et al., AutoRound, arXiv 2309.05516)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast, final

import torch
from torch import Tensor, fx
from torch.nn import functional

from graphq import numerics
from graphq.capture.source import source_of
from graphq.data.samples import Pool, draw, in_turn, pools_of
from graphq.errors import SpecError
from graphq.ir import edit
from graphq.ir.layers import sites
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.validity import ValidityRun
from graphq.ir.views import GroupedLinear, Weighted, ops_of
from graphq.ir.weight_parts import QuantizedWeight, WeightPart, quantize_weight
from graphq.numerics import Scales, rounding
from graphq.numerics.blocks import block_extremes
from graphq.numerics.scales import computed, scale_from_extremes
from graphq.passes.annotate import annotated
from graphq.passes.observe import observers, to_quantize
from graphq.passes.quantize_weights import (
    PlannedWeight,
    beyond_match,
    planned_weights,
    replace_weight,
    with_weights,
)
from graphq.runtime import ops
from graphq.spec.formats import Int, has_global_scale
from graphq.spec.quant import MinMax, Quant
from graphq.state import tensor_of

Codes = list[list[QuantizedWeight | None]]  # of the parts of each layer


@final
@dataclass(frozen=True)
class AutoRound(Pass):
    """Every planned weight of the layers ``only`` (None: of all) is codes, whose rounding and ranges were learned
    together, so that the graph's outputs, caches left out, change least.

    Weights of other layers, and inputs with static scales, are float meanwhile; inputs with scales of run time are
    quantized. Embeddings and the weights of states in recurrences are left alone. Where the error on all batches is not
    below that of rounding to nearest, weights are rounded to nearest, which is noted. Raises ``SpecError`` for formats
    that are no integers.

    steps: of signed gradient descent. lr: the first step's rate, 1 / steps if None; it falls in a line to 0.
    batch_size: how many rows of the batches (sequences, images) each step sees. seed: of the choice of them.
    """

    only: frozenset[str] | None = None
    steps: int = 200
    lr: float | None = None
    batch_size: int = 8
    seed: int = 0
    record: Callable[[str, float], None] | None = None
    note: Callable[[str], None] | None = None
    name: ClassVar[str] = "auto-round"
    requires: ClassVar = (annotated, with_weights)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        others = {site.param.fqn for site in sites(gm) if not site.op.is_product}
        layers = [layer for layer in planned_weights(gm, self.only) if layer.site.param.fqn not in others]
        _check_formats(layers)
        if not layers:
            return 0
        seen = list(batches or ())
        if not seen:
            raise SpecError("calibration: no batches; auto-round needs at least one")
        if self.note is not None:
            for line in beyond_match(layers, self.only, self.name):
                self.note(line)
        with torch.inference_mode(False), torch.enable_grad():
            made = self._learn(gm, layers, seen)
        for layer, codes in zip(layers, made, strict=True):
            replace_weight(gm, layer, codes, self.name, self.record)
        if layers:
            edit.drop_unused(gm)
        return len(layers)

    def _learn(self, gm: fx.GraphModule, layers: Sequence[PlannedWeight], seen: Sequence[tuple[Any, ...]]) -> Codes:
        """The codes of the least error among rounding to nearest, the last step's, and those of the best step."""
        trained = [[None if part.quant is None else _Learned(part) for part in layer.parts] for layer in layers]
        learned = [one for parts in trained for one in parts if one is not None]
        outputs = _compared_outputs(gm, {layer.site.param.fqn for layer in layers})
        if not outputs:
            self._note_nearest(layers, trained, in_vain=True)
            return _codes(trained, _Learned.nearest)
        task = _Task(gm, outputs, pools_of(gm, seen, [node for _, node in outputs]), self.batch_size)
        if self.note is not None:
            for stop in task.stops:
                self.note(f"{layers[0].site.path}: masked tokens have a part in what {self.name} compares: {stop}")
        generator = torch.Generator().manual_seed(self.seed)
        lr = 1 / self.steps if self.lr is None else self.lr
        least = torch.inf
        kept = [one.state for one in learned]
        for step in range(self.steps):
            weights = [
                [part.w if one is None else one.weight() for part, one in zip(layer.parts, parts, strict=True)]
                for layer, parts in zip(layers, trained, strict=True)
            ]
            loss = task.drawn_error(_whole_weights(layers, weights), generator)
            seen_loss = float(loss.detach())
            if seen_loss < least:
                least, kept = seen_loss, [one.state for one in learned]
            parameters = [x for one in learned for x in one.state]
            gradients = iter(torch.autograd.grad(loss, parameters, allow_unused=True))
            for one in learned:
                one.descend([next(gradients) for _ in one.state], rounding.rate_at(step, self.steps, lr))
        with torch.no_grad():
            nearest = _codes(trained, _Learned.nearest)
            best, error = nearest, task.error(_codes_as_weights(layers, nearest))
            for state in ([one.state for one in learned], kept):
                for one, own in zip(learned, state, strict=True):
                    one.state = own
                codes = _codes(trained, _Learned.codes)
                found = task.error(_codes_as_weights(layers, codes))
                if found < error:
                    best, error = codes, found
        self._note_nearest(layers, trained, in_vain=best is nearest)
        return best

    def _note_nearest(
        self, layers: Sequence[PlannedWeight], trained: Sequence[Sequence["_Learned | None"]], in_vain: bool
    ) -> None:
        if self.note is None:
            return
        if in_vain:
            more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
            self.note(f"{layers[0].site.path}{more}: rounded to nearest: auto-round found no smaller error")
            return
        for layer, parts in zip(layers, trained, strict=True):
            for part, one in zip(layer.parts, parts, strict=True):
                for position, member in enumerate(part.members if layer.site.is_stack and one is not None else ()):
                    if one is not None and not one.moved[position]:
                        self.note(f"{layer.site.fqns[member]}: rounded to nearest: no tokens reached it in calibration")


def _check_formats(layers: Sequence[PlannedWeight]) -> None:
    """Raises ``SpecError`` for weights that are not to be integers."""
    problems: list[str] = []
    for layer in layers:
        for part in layer.parts:
            if part.quant is not None and not isinstance(part.quant.format, Int):
                fqn = layer.site.fqns[part.members[0]]
                problems.append(
                    f"{fqn}: weight {part.quant}: auto-round holds integer formats; leave it out of its match"
                )
    if problems:
        raise SpecError(problems)


def _codes(trained: Sequence[Sequence["_Learned | None"]], f: Callable[["_Learned"], QuantizedWeight]) -> Codes:
    return [[None if one is None else f(one) for one in parts] for parts in trained]


def _codes_as_weights(layers: Sequence[PlannedWeight], made: Codes) -> dict[str, Tensor]:
    return _whole_weights(
        layers,
        [
            [
                part.w if codes is None else _dequantized(part, codes)
                for part, codes in zip(layer.parts, own, strict=True)
            ]
            for layer, own in zip(layers, made, strict=True)
        ],
    )


def _dequantized(part: WeightPart, made: QuantizedWeight) -> Tensor:
    assert part.quant is not None
    return numerics.dequantize(made.codes, made.scales, part.quant.format, made.block).to(part.w.dtype)


def _whole_weights(layers: Sequence[PlannedWeight], parts: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """The weights by their names, from those of their parts."""
    found: dict[str, Tensor] = {}
    for layer, own in zip(layers, parts, strict=True):
        whole = own[0]
        if len(own) > 1:
            members = torch.tensor([member for part in layer.parts for member in part.members])
            whole = torch.cat(list(own))[members.argsort()]
        found[layer.site.param.fqn] = whole
    return found


@final
class _Learned:
    """A part of a layer, with what is learned of it: each element's offset, and the shares of each block's range."""

    def __init__(self, part: WeightPart) -> None:
        assert part.quant is not None
        assert isinstance(part.quant.format, Int)
        self.part = part
        self.quant = part.quant
        self.format = part.quant.format
        self.w = part.w.clone() if part.w.is_inference() else part.w  # autograd saves no inference tensors
        scales = part.scales
        if scales is None and isinstance(self.quant.method, MinMax):
            self.low, self.high = block_extremes(computed(self.w), part.block)
        else:
            scales = scales or self.nearest().scales
            self.low, self.high = rounding.extremes_of(scales, self.format)
        v = torch.zeros_like(computed(self.w))
        shares = torch.ones_like(self.low)
        self.state = [x.requires_grad_() for x in (v, shares, shares.clone())]
        self.moved = torch.zeros(v.shape[0], dtype=torch.bool)

    def weight(self) -> Tensor:
        """The weight that its codes stand for, with gradients for ``state``."""
        v, alpha, beta = self.state
        scale, zero_point = rounding.ranged(self.low * alpha, self.high * beta, self.format)
        return rounding.rounded(self.w, v, scale, zero_point, self.format, self.part.block).to(self.w.dtype)

    def descend(self, gradients: Sequence[Tensor | None], rate: float) -> None:
        """``state`` is one step further; the old tensors are left as they are."""
        bounds = (rounding.OFFSETS, rounding.SHARES, rounding.SHARES)
        self.state = [
            x if g is None else rounding.descended(x.detach(), g, rate, bound).requires_grad_()
            for x, g, bound in zip(self.state, gradients, bounds, strict=True)
        ]
        if gradients[0] is not None:
            self.moved |= gradients[0].flatten(1).any(1)

    def codes(self) -> QuantizedWeight:
        """What was learned."""
        v, alpha, beta = self.state
        scales = Scales(*scale_from_extremes(self.low * alpha, self.high * beta, self.format))
        moved = rounding.offset(self.w, v, scales.scale, self.part.block)
        return quantize_weight(self.part, moved, scales)

    def nearest(self) -> QuantizedWeight:
        """What rounding to nearest gives."""
        return quantize_weight(self.part)


# -- running a graph


def _compared_outputs(gm: fx.GraphModule, fqns: set[str]) -> list[tuple[int, fx.Node]]:
    """The outputs, and their places, that these weights have a part in; caches only where there are no others."""
    reached: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if (node.op == "get_attr" and node.target in fqns) or not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    given = cast(tuple[fx.Node, ...], next(node for node in gm.graph.nodes if node.op == "output").args[0])
    found = [
        (i, node)
        for i, node in enumerate(given)
        if node in reached and isinstance(node.meta["val"], Tensor) and node.meta["val"].is_floating_point()
    ]
    source = source_of(gm)
    return [(i, node) for i, node in found if source.outputs[i] not in source.presents] or found


@final
class _Task:
    """The outputs of a graph with its own weights, for all data, and how far off they are with others."""

    def __init__(
        self, gm: fx.GraphModule, outputs: Sequence[tuple[int, fx.Node]], pools: Sequence[Pool], batch_size: int
    ) -> None:
        self.runner = _Runner(gm)
        self.places = [place for place, _ in outputs]
        self.pools = pools
        self.batch_size = batch_size
        found: list[list[tuple[Tensor, ...]]] = [[] for _ in pools]
        with torch.no_grad():
            for index, rows in in_turn(pools, batch_size):
                found[index].append(self._run(None, pools[index].pick(rows)))
        self.targets = [[torch.cat(one) for one in zip(*parts, strict=True)] for parts in found]
        self.stops: dict[str, None] = {}
        self.masks = [self._masks(gm, pool, targets) for pool, targets in zip(pools, self.targets, strict=True)]

    def _masks(self, gm: fx.GraphModule, pool: Pool, targets: Sequence[Tensor]) -> list[Tensor | None]:
        """Which of the targets come of tokens that masks leave in; None: all."""
        if pool.inputs.is_trivial:
            return [None] * len(targets)
        parts: list[list[Tensor]] = []
        for _, rows in in_turn([pool], self.batch_size):
            given = ValidityRun(gm).run_batch(pool.pick(rows))
            validity = [given.validity[place] for place in self.places]
            self.stops |= dict.fromkeys(stop for one in validity for stop in one.stops)
            parts.append([one.full(given[place]) for place, one in zip(self.places, validity, strict=True)])
        return [torch.cat(one) for one in zip(*parts, strict=True)]

    def drawn_error(self, weights: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """The mean squared error of a few rows drawn at random."""
        drawn = draw(self.pools, self.batch_size, generator)
        count = sum(rows.numel() for _, rows in drawn)
        return torch.stack([self._error(weights, i, rows) * (rows.numel() / count) for i, rows in drawn]).sum()

    def error(self, weights: Mapping[str, Tensor]) -> float:
        """The mean squared error of all rows."""
        sums = [float(self._error(weights, i, rows)) * rows.numel() for i, rows in in_turn(self.pools, self.batch_size)]
        return sum(sums) / sum(pool.size for pool in self.pools)

    def _error(self, weights: Mapping[str, Tensor], index: int, rows: Tensor) -> Tensor:
        pool = self.pools[index]
        made = self._run(weights, pool.pick(rows))
        wanted = [pool.of(target, rows) for target in self.targets[index]]
        masks = [None if mask is None else pool.of(mask, rows) for mask in self.masks[index]]
        squares = [_mean_square(computed(a) - computed(b), m) for a, b, m in zip(made, wanted, masks, strict=True)]
        return torch.stack(squares).sum()

    def _run(self, weights: Mapping[str, Tensor] | None, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
        self.runner.weights = weights
        given = self.runner.run(*inputs)
        return tuple(given[place] for place in self.places)


def _mean_square(error: Tensor, mask: Tensor | None) -> Tensor:
    """Over what ``mask`` leaves in; 0 where that is nothing."""
    if mask is None:
        return error.square().mean()
    return error[mask].square().sum() / mask.sum().clamp(min=1)


@final
class _Runner(fx.Interpreter):
    """Runs a graph with other ``weights``, which gradients reach, and inputs quantized where their scales are chosen at
    run time; without them, all in float. Observers see nothing.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.gm = gm
        self.weights: Mapping[str, Tensor] | None = None
        self.observers = {op.node for op, _ in observers(gm)}
        self.stacks = {op.node: op for op in ops_of(gm) if isinstance(op, GroupedLinear)}
        self.dynamic: dict[fx.Node, tuple[Weighted, list[Quant | None]]] = {}
        for op, quants in to_quantize(gm):
            chosen = [quant if quant is not None and quant.dynamic else None for quant in quants]
            if any(chosen):
                self.dynamic[op.node] = (op, chosen)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.weights is not None and target in self.weights:
            return self.weights[target]
        found = tensor_of(self.gm, target).detach()
        return found.clone() if found.is_inference() else found  # autograd saves no inference tensors

    def run_node(self, n: fx.Node) -> Any:
        if n in self.observers:
            return self.env[n.all_input_nodes[0]]
        op, quants = self.dynamic.get(n, (None, [])) if self.weights is not None else (None, [])
        stack = self.stacks.get(n)
        if stack is not None:
            x, weight, offsets = (self.env[part.node] for part in (stack.input_op, stack.weight_op, stack.offsets))
            return _grouped_linear(x, weight, offsets, quants or [None] * weight.shape[0])
        if op is None:
            return super().run_node(n)
        read = op.input_op.node
        x = self.env[read]
        self.env[read] = _quantized(x, quants[0])
        made = super().run_node(n)
        self.env[read] = x  # for its other readers
        return made


def _grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor, quants: Sequence[Quant | None]) -> Tensor:
    """``graphq::grouped_linear``, which has no gradients, with each expert's own input format."""
    inputs = {quant: _quantized(x, quant) for quant in dict.fromkeys(quants)}
    ends = [int(end) for end in offsets]
    made = [
        functional.linear(inputs[quant][first:last], weight[expert])
        for expert, (quant, first, last) in enumerate(zip(quants, [0, *ends[:-1]], ends, strict=True))
    ]
    rest = x.new_zeros(x.shape[0] - ends[-1], weight.shape[1])
    return torch.cat([*made, rest])


def _quantized(x: Tensor, quant: Quant | None) -> Tensor:
    """``x`` quantized and dequantized with scales of its own; gradients pass as they come."""
    if quant is None:
        return x
    with torch.no_grad():
        block = numerics.activation_block(quant.granularity, x.dim())
        upper = ops.choose_global_scale(x) if has_global_scale(quant.format) else None
        scales = numerics.choose_scale(x, quant.format, block, upper)
        back = numerics.fake_quantize(x, scales, quant.format, block)
    return back + (x - x.detach())
