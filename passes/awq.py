"""Weights scaled by what their inputs are worth, and clipped, before they are rounded.

Lin et al., AWQ, arXiv 2306.00978, equations 4 and 5: an input's channels are divided, and its weights multiplied, by
x^ratio, where x is the channel's mean magnitude, or with ``duo`` by x^ratio / w^(1 - ratio); the ratio is searched for.
Where the paper runs the model for each candidate, the squared error on all data follows here from second moments. The
fourth power of the error, which AMCT takes, needs the outputs: the data comes by once more.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, fx

from graphq.ir import edit
from graphq.ir.channel_groups import Group, Where, apply_factors, chosen_layers, groups, names_of, rounding_change
from graphq.ir.choices import Choices
from graphq.ir.index import GraphIndex
from graphq.ir.labels import Reader
from graphq.ir.layers import LAYER, PLAN
from graphq.ir.matrices import Samples, as_matrices, as_weight, input_vectors, scale_block
from graphq.ir.pipeline import Batches, Pass
from graphq.ir.views import Convolution, ConvTranspose, Op, Param, Weighted
from graphq.numerics import awq
from graphq.observers.observer import Observer, ObserverRequest
from graphq.observers.statistics import ChannelObserver, HessianObserver, channels, hessians, required_statistic
from graphq.passes.annotate import annotated
from graphq.passes.quantize_weights import with_weights
from graphq.spec.folds import EVERYWHERE, Folds
from graphq.spec.formats import Float, Int
from graphq.spec.plan import weight_quants
from graphq.spec.quant import MinMax, PerChannel, PerGroup, Quant
from graphq.state import tensor_of


@final
@dataclass(frozen=True)
class AWQ(Pass):
    """The weights of the layers ``only`` (None: of all with a plan) are scaled, input by input, so that rounding them
    changes their outputs least; the inputs are scaled back where they are made. Then ranges are clipped.

    All readers of an input share its factors; each is judged by its own plan, and those that stay float by none.

    n_grid: how many ratios from 0 to 1 are tried. duo: with the weights' magnitudes, without, or ``None`` for both.
    power: of the outputs' errors, which are added: 2, or 4 as AMCT has it.
    clip: whether weights are clamped to the range of the least output error: of layers with min-max ranges by channel
        or group that are not in ``unclipped``.
    where, folds: see ``SmoothQuant``. choices: where factors and ranges are kept.
    """

    only: frozenset[str] | None = None
    n_grid: int = 20
    duo: bool | None = None
    power: Literal[2, 4] = 2
    clip: bool = True
    unclipped: frozenset[str] = frozenset()
    where: Where = "fold"
    folds: Folds = EVERYWHERE
    note: Callable[[str], None] | None = None
    choices: Choices | None = None
    name: ClassVar[str] = "awq"
    requires: ClassVar = (annotated, with_weights)

    def observer_requests(self, gm: fx.GraphModule) -> Iterator[ObserverRequest]:
        """The mean magnitudes of each channel of the inputs, and their second moments or the outputs' errors."""
        chosen = chosen_layers(gm, self.only)
        yield from channels(gm, chosen)
        if self.clip or self.power == 2:
            yield from hessians(gm, chosen)
        if self.power == 2:
            return
        candidates = _Candidates(self, gm)
        for name, (one, _) in candidates.by_node.items():
            samples, rest = input_vectors(one.op)
            observer = ErrorObserver(
                (str(one.op.node.meta[LAYER]),), self._count, name, candidates, samples, self.power
            )
            observer.reads_windows = isinstance(one.op, Convolution | ConvTranspose)
            yield ObserverRequest(one.op.input_op, observer, one.op, rest)

    @property
    def _count(self) -> int:
        return 1 + (self.n_grid + 1) * (2 if self.duo is None else 1)

    def run(self, gm: fx.GraphModule, batches: Batches | None = None) -> int:
        count, index = 0, GraphIndex(gm)
        scaled: dict[Op, Tensor] = {}  # what the channels of a layer's input were divided by
        moments = (
            {op: self._moments(gm, op) for op in chosen_layers(gm, self.only)} if self.clip or self.power == 2 else {}
        )
        for group in list(groups(gm, self.only, self.where, self.note, self.folds)):
            found = self._search(gm, group, moments)
            if found is not None:
                count += apply_factors(index, group, found, self.name, self.choices)
                for reader in group.chosen:
                    scaled[reader.op] = group.at(torch.where(group.moved, found, 1.0), reader.channels)
        if self.clip:
            for op, hessian in moments.items():
                count += self._clip(index, op, _divided(op, hessian, scaled.get(op)))
        return count

    def _moments(self, gm: fx.GraphModule, op: Weighted) -> Tensor:
        seen = required_statistic(gm, op, HessianObserver, self.name)
        assert isinstance(seen, HessianObserver)
        return seen.mean()

    def _search(self, gm: fx.GraphModule, group: Group, moments: dict[Weighted, Tensor]) -> Tensor | None:
        """The factors of the least error; None where none are better than 1."""
        readers = _quantized_readers(gm, group)
        if not readers:
            return None
        candidates = self.candidate_factors(gm, group, readers)
        if self.power == 2:
            errors = [
                sum(float(awq.output_error(one.change(f), moments[one.op]).sum()) for one in readers)
                for f in candidates
            ]
        else:
            errors = torch.stack([_errors_seen(gm, one.op, self.name) for one in readers]).sum(0).tolist()
        best = errors.index(min(errors))
        return candidates[best] if best else None

    def candidate_factors(
        self, gm: fx.GraphModule, group: Group, readers: "Sequence[_QuantizedReader]"
    ) -> list[Tensor]:
        """The factors to try: first 1."""
        labels = [one.reader.channels for one in readers]
        activations = group.by_label([one.activations(gm, self.name) for one in readers], labels, "mean")
        weights = group.by_label([one.columns() for one in readers], labels, "mean")
        activations, weights = (torch.where(group.moved, v, 1.0) for v in (activations, weights))
        found = [torch.ones_like(activations)]
        for duo in (False, True) if self.duo is None else (self.duo,):
            ratios = [i / self.n_grid for i in range(self.n_grid + 1)]
            found += [awq.factors(activations, weights if duo else None, ratio) for ratio in ratios]
        return found

    def _clip(self, index: GraphIndex, op: Weighted, hessian: Tensor) -> int:
        quants = set(weight_quants(op.node.meta[PLAN]))
        param = op.weight_op
        if len(quants) != 1 or not isinstance(param, Param) or not index.is_own(param):
            return 0
        (quant,) = quants
        if quant is None or not _can_clip(quant) or not self.unclipped.isdisjoint(names_of(op)):
            return 0
        if isinstance(op, Convolution | ConvTranspose) and isinstance(quant.granularity, PerGroup):
            return 0
        old = tensor_of(index.gm, param.fqn).detach()
        steps = awq.clip_steps(as_matrices(old.float(), op), hessian, quant.format, _rows_of(quant))
        new = clipped(old, op, quant, steps)
        if torch.equal(new, old):
            return 0
        if self.choices is not None:
            self.choices.keep(f"clip {param.fqn}", steps)
        edit.set_param(index.gm, param.fqn, lambda _: new, self.name, index.reads(param.fqn))
        return 1


def clipped(w: Tensor, op: Weighted, quant: Quant, steps: Tensor) -> Tensor:
    """The weight ``w`` of ``op`` clamped to ``steps``, which are those of ``numerics.awq.clip_steps``."""
    made = awq.clipped(as_matrices(w.float(), op), steps, quant.format, _rows_of(quant))
    return as_weight(made, op, w).to(w.dtype).contiguous()


def _rows_of(quant: Quant) -> list[int]:
    """The blocks of a weight as matrices."""
    return [1, 1, quant.granularity.size if isinstance(quant.granularity, PerGroup) else -1]


def _can_clip(quant: Quant) -> bool:
    return (
        isinstance(quant.format, Int | Float)
        and isinstance(quant.granularity, PerChannel | PerGroup)
        and isinstance(quant.method, MinMax)
    )


def _divided(op: Weighted, hessian: Tensor, factors: Tensor | None) -> Tensor:
    """The second moments of an input whose channels were divided by ``factors``."""
    if factors is None:
        return hessian
    per_vector = _per_vector(op, 1 / factors).to(hessian.dtype)
    return hessian * per_vector[..., :, None] * per_vector[..., None, :]


def _per_vector(op: Weighted, values: Tensor) -> Tensor:
    """Values of an input's channels as those of the vectors that a weight multiplies: [B or 1, K]."""
    if isinstance(op, Convolution | ConvTranspose):
        taps = op.weight_op.val.shape[2:].numel()
        return values.view(int(op.groups), -1).repeat_interleave(taps, 1)
    return values[None]


@final
class _QuantizedReader:
    """A reader of a group whose weight is quantized, so that the group's factors change its error."""

    def __init__(self, gm: fx.GraphModule, group: Group, reader: Reader) -> None:
        self.group = group
        self.reader = reader
        self.op = reader.op
        self.w = tensor_of(gm, reader.weight.fqn).detach().float()
        quants = weight_quants(self.op.node.meta[PLAN])
        members: dict[Quant, list[int]] = {}
        for index, quant in enumerate(quants):
            if quant is not None:
                members.setdefault(quant, []).append(index)
        self.quants = members

    def activations(self, gm: fx.GraphModule, by: str) -> Tensor:
        seen = required_statistic(gm, self.op, ChannelObserver, by)
        assert isinstance(seen, ChannelObserver)
        return seen.mean

    def columns(self) -> Tensor:
        quant = next(iter(self.quants))
        found = awq.relative_columns(self.w, self._block(quant), self.op.in_axis)
        return found.repeat(int(self.op.groups)) if isinstance(self.op, Convolution) else found

    def _block(self, quant: Quant) -> list[int]:
        return scale_block(self.op, quant.granularity)

    def change(self, factors: Tensor) -> Tensor:
        """What rounding the weights multiplied by ``factors`` adds to them: [B, N, K], with the inputs as they are."""
        return rounding_change(self.op, self.w, self.group.at(factors, self.reader.weight.labels).float())


def _quantized_readers(gm: fx.GraphModule, group: Group) -> list[_QuantizedReader]:
    readers = [_QuantizedReader(gm, group, reader) for reader in group.chosen]
    return [one for one in readers if one.quants]


@final
class _Candidates:
    """The readers of a graph's groups, by their nodes' names, each with the candidate factors of its group, which
    follow from what was seen of the graph's activations. A copy of the graph has its own.
    """

    def __init__(self, awq: AWQ, gm: fx.GraphModule) -> None:
        self.awq, self.gm = awq, gm

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Candidates":
        made = memo[id(self)] = _Candidates(self.awq, copy.deepcopy(self.gm, memo))
        return made

    @functools.cached_property
    def by_node(self) -> Mapping[str, tuple[_QuantizedReader, Callable[[], list[Tensor]]]]:
        found: dict[str, tuple[_QuantizedReader, Callable[[], list[Tensor]]]] = {}
        for group in groups(self.gm, self.awq.only, self.awq.where, None, self.awq.folds):
            readers = _quantized_readers(self.gm, group)
            candidates = functools.cache(functools.partial(self.awq.candidate_factors, self.gm, group, tuple(readers)))
            found |= {one.op.node.name: (one, candidates) for one in readers}
        return found


@final
class ErrorObserver(Observer):
    """The sum of a power of a layer's output errors for each candidate, over all data.

    The first look finds what the candidates follow from, the second measures. ``node``: the name of the layer's.
    """

    errors: Tensor
    sweeps = 2

    def __init__(
        self,
        layers: tuple[str, ...],
        count: int,
        node: str,
        candidates: _Candidates,
        samples: Samples,
        power: int,
    ) -> None:
        super().__init__(layers)
        self.node, self.candidates, self.samples, self.power = node, candidates, samples, power
        self.register_buffer("errors", torch.zeros(count, dtype=torch.float64))

    @property
    def has_observed(self) -> bool:
        return bool(self.batches)

    def settings(self) -> tuple[object, ...]:
        return self.errors.shape, self.power

    def update(self, x: Tensor, *rest: Tensor) -> None:
        pass

    def refine(self, x: Tensor, *rest: Tensor) -> None:
        reader, factors_of = self.candidates.by_node[self.node]
        for number, factors in enumerate(factors_of()):
            change = reader.change(factors)
            for index, rows in self.samples(x, *rest):
                error = (rows.to(change.dtype) @ change[index].T).double().square_()
                self.errors[number] += (error.square_() if self.power == 4 else error).sum()  # pow is slow

    def absorb(self, later: Observer) -> None:
        assert isinstance(later, ErrorObserver)
        self.errors += later.errors


def _errors_seen(gm: fx.GraphModule, op: Weighted, by: str) -> Tensor:
    seen = required_statistic(gm, op, ErrorObserver, by)
    assert isinstance(seen, ErrorObserver)
    return seen.errors
