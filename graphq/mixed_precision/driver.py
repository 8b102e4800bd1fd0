"""``graphq.search``: the spec that loses least within a budget, or the cheapest that loses no more than it may."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, cast, final

import torch
from torch import Tensor, nn

from graphq import compiler
from graphq.capture.source import source_of
from graphq.compiler import Compiled, Inputs
from graphq.data.batches import complete_all
from graphq.data.evaluate import perplexity
from graphq.errors import SpecError
from graphq.ir.layers import layers
from graphq.mixed_precision.budget import Budget, parse_budget
from graphq.mixed_precision.costs import OptionLayers, group_costs, group_sizes
from graphq.mixed_precision.exchange import Mix
from graphq.mixed_precision.knapsack import Front, pareto_front
from graphq.mixed_precision.layer_groups import Group, layer_groups
from graphq.mixed_precision.mixes import Trial, best_within, total_size
from graphq.mixed_precision.options import FLOAT, read_options
from graphq.mixed_precision.rules import compact_rules
from graphq.mixed_precision.sensitivity import SENSITIVITIES, Sensitivity
from graphq.spec.match import Blocks, Layer
from graphq.spec.plan import Decision, KeepFloat
from graphq.spec.rules import Rule, Spec

EXCHANGES: Final = 16
_SHOWN: Final = 1000  # places of a front in JSON


@final
@dataclass(frozen=True)
class Found:
    """What a search found. chosen: the option of each group, by its place. costs, sizes: of each group by each of its
    options: the predicted loss, and the bytes or nanoseconds. trials: what was measured end to end, in order.
    """

    spec: Spec
    layers: Mapping[str, Layer]
    groups: tuple[Group, ...]
    chosen: Mix
    costs: tuple[tuple[float, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    trials: tuple[Trial, ...]
    front: Front

    @property
    def size(self) -> int:
        """Of the chosen mix, in bytes or nanoseconds."""
        return total_size(self.sizes, self.chosen)

    def to_json(self) -> dict[str, Any]:
        """Plain data: ``groups``, each with ``layers``, the chosen ``option``, and ``size`` and ``loss`` of each of its
        ``options``; ``trials`` with ``origin``, ``size``, ``loss``, null where that is no number; ``front``, the size
        and predicted loss of the best mixes, at most a thousand of them.
        """
        groups = [
            {
                "layers": [layer.fqn for layer in group.layers],
                "option": group.options[choice],
                "options": {name: {"size": s, "loss": c} for name, s, c in zip(group.options, size, cost, strict=True)},
            }
            for group, choice, cost, size in zip(self.groups, self.chosen, self.costs, self.sizes, strict=True)
        ]
        trials = [
            {"origin": one.origin, "size": one.size, "loss": one.loss if math.isfinite(one.loss) else None}
            for one in self.trials
        ]
        step = -(-len(self.front) // _SHOWN)
        front = [[int(s), float(c)] for s, c in zip(self.front.sizes[::step], self.front.losses[::step], strict=True)]
        return {"groups": groups, "trials": trials, "front": front}

    def lines(self) -> list[str]:
        """The chosen options as text: a line for each group, then one for each mix that was measured."""
        width = max(len(group.name) for group in self.groups)
        lines = [
            f"{group.name:{width}}  {group.options[choice]}"
            for group, choice in zip(self.groups, self.chosen, strict=True)
        ]
        return [*lines, *(f"measured: {one.origin}: size {one.size:,.0f}, loss {one.loss:.6g}" for one in self.trials)]


def search(
    model: nn.Module | str | os.PathLike[str],
    options: str | Iterable[str | Spec | Mapping[str, Any]],
    budget: str | Budget | None = None,
    *,
    calibration: Iterable[object],
    max_drop: float | str | None = None,
    evaluate: Callable[[Compiled], float] | Tensor | None = None,
    higher_is_better: bool = False,
    sensitivity: Sensitivity = "gradient",
    exchanges: int = EXCHANGES,
    rows: int = 1,
    scores: str | os.PathLike[str] | None = None,
    seed: int = 0,
    inputs: Inputs | None = None,
    dtype: torch.dtype | None = None,
    cache: bool = True,
    mask: str | None = None,
    shapes: Mapping[str, int] | None = None,
) -> Spec:
    """The spec that gives each layer one of ``options`` so that the model loses least within ``budget``: the ``spec``
    of what ``find`` finds, which takes the same and says what each is.
    """
    return find(
        model,
        options,
        budget,
        calibration=calibration,
        max_drop=max_drop,
        evaluate=evaluate,
        higher_is_better=higher_is_better,
        sensitivity=sensitivity,
        exchanges=exchanges,
        rows=rows,
        scores=scores,
        seed=seed,
        inputs=inputs,
        dtype=dtype,
        cache=cache,
        mask=mask,
        shapes=shapes,
    ).spec


def find(
    model: nn.Module | str | os.PathLike[str],
    options: str | Iterable[str | Spec | Mapping[str, Any]],
    budget: str | Budget | None = None,
    *,
    calibration: Iterable[object],
    max_drop: float | str | None = None,
    evaluate: Callable[[Compiled], float] | Tensor | None = None,
    higher_is_better: bool = False,
    sensitivity: Sensitivity = "gradient",
    exchanges: int = EXCHANGES,
    rows: int = 1,
    scores: str | os.PathLike[str] | None = None,
    seed: int = 0,
    inputs: Inputs | None = None,
    dtype: torch.dtype | None = None,
    cache: bool = True,
    mask: str | None = None,
    shapes: Mapping[str, int] | None = None,
) -> Found:
    """Search for the best mix of ``options`` over the layers of ``model``, which is taken as ``compile`` takes it.

    options: two or more of: a preset's name, a weight's text form with or without an input's (``int3/asym/g64``,
        ``int4/g128 x int8/token/dynamic``), ``float``, a spec. All have the same algorithms, which join the result;
        they do not run while it is searched for.
    budget: ``4.5bits`` (of a searched weight on average, scales included), ``600MB`` or ``123456B`` (of the searched
        layers, as ``explain`` counts them), ``1.2x-latency`` (of the searched layers' products on ``rows`` rows on this
        machine, relative to the fastest choice). Layers that runtimes fuse, and tied ones, get one option.
    calibration: batches, as ``compile`` takes them: what sensitivities and mixes are measured on.
    max_drop: in place of a budget, or beside it: the smallest mix that loses no more than this share (0.005, or
        ``0.5%``) of what the float model has. It is measured by ``evaluate``: a function of a compiled model, or
        windows of tokens ``[n, length]``, which are not those of the calibration, for their perplexity.
        ``higher_is_better``: of the function.
    sensitivity: see ``graphq.mixed_precision.sensitivity``.
    exchanges: how many neighbours of the predicted best are measured end to end, at most.
    scores: a JSON file that keeps the sensitivities: a search that is run again measures only what is new.

    Raises ``SpecError``, also where no mix is as small, or none loses as little.
    """
    chosen_from = read_options(options)
    limit = parse_budget(budget) if isinstance(budget, str) else budget
    drop = _share(max_drop)
    if limit is None and drop is None:
        raise SpecError("search: neither a budget nor max_drop is given")
    if drop is not None and evaluate is None:
        raise SpecError("evaluate: max_drop needs a function of a compiled model, or windows of tokens")
    if sensitivity not in SENSITIVITIES:
        raise SpecError(f"sensitivity: {sensitivity!r} is not one of {', '.join(SENSITIVITIES)}")
    if type(exchanges) is not int or exchanges < 0:
        raise SpecError(f"exchanges: {exchanges!r} is not a whole number from 0")
    if type(rows) is not int or rows < 1:
        raise SpecError(f"rows: {rows!r} is not a whole number from 1")
    gm = compiler.capture(model, inputs, dtype, cache=cache, mask=mask, shapes=shapes)
    batches = list(complete_all(source_of(gm), calibration))
    if not batches:
        raise SpecError("calibration: no batches; a search needs at least one")
    groups = layer_groups(gm, chosen_from)
    sizes = group_sizes(gm, groups, limit, rows)
    held = OptionLayers(gm, groups, batches)
    costs = group_costs(gm, groups, chosen_from, held, batches, sensitivity, seed, scores)
    most = _most(limit, groups, sizes)
    front = pareto_front(sizes, costs, most)
    named = layers(gm)
    base = next(option.spec for option in chosen_from if option.name != FLOAT)

    def spec_for(mix: Mix, notes: tuple[str, ...] = ()) -> Spec:
        return replace(base, rules=compact_rules(_decisions(groups, mix), named), notes=notes, dialect="native")

    if drop is None:
        mix, trials = best_within(gm, groups, held, sizes, costs, most, front, batches, exchanges)
    else:

        def measured(spec: Spec) -> float:
            made = compiler.compile(
                model,
                spec,
                inputs=inputs,
                calibration=batches,
                dtype=dtype,
                cache=cache,
                mask=mask,
                shapes=shapes,
                seed=seed,
            )
            return perplexity(made, evaluate) if isinstance(evaluate, Tensor) else float(cast(Any, evaluate)(made))

        sign = -1.0 if higher_is_better and not isinstance(evaluate, Tensor) else 1.0
        mix, trials = _cheapest(front, drop, sign, measured, spec_for)
    size = total_size(sizes, mix)
    used = _used(size, groups, limit)
    note = f"search: {limit or f'max_drop {drop:.3g}'}: {used}; {len(trials)} mixes measured"
    found = spec_for(mix, (note,))
    return Found(found, named, tuple(groups), mix, costs, sizes, tuple(trials), front)


def _share(max_drop: float | str | None) -> float | None:
    if max_drop is None:
        return None
    text = str(max_drop)
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError as error:
        raise SpecError(f"max_drop: {max_drop!r} is no share: write 0.005 or 0.5%") from error
    if not 0 <= share < 10:
        raise SpecError(f"max_drop: {max_drop} is not from 0 to 1000%")
    return share


def _most(limit: Budget | None, groups: Sequence[Group], sizes: Sequence[Sequence[int]]) -> float:
    """The size that a mix may have. Raises ``SpecError`` where none is as small."""
    if limit is None:
        return float("inf")
    numel = sum(group.numel for group in groups)
    least = sum(min(own) for own in sizes)
    most = {"bits": limit.value * numel / 8, "bytes": limit.value, "latency": limit.value * least}[limit.kind]
    if least > most:
        raise SpecError(f"budget: {limit}: the smallest mix takes {least:,} bytes, {8 * least / numel:.3f} bits each")
    return most


def _decisions(groups: Sequence[Group], mix: Mix) -> dict[str, Decision]:
    found: dict[str, Decision] = {}
    for group, choice in zip(groups, mix, strict=True):
        found |= group.decisions[choice]
    return found


def _used(size: int, groups: Sequence[Group], limit: Budget | None) -> str:
    if limit is not None and limit.kind == "latency":
        return f"{size / 1e6:.3f} ms"
    return f"{size:,} bytes, {8 * size / sum(group.numel for group in groups):.3f} bits a weight"


def _cheapest(
    front: Front, drop: float, sign: float, measured: Callable[[Spec], float], spec_for: Callable[[Mix], Spec]
) -> tuple[Mix, list[Trial]]:
    """The first mix of the front that loses no more than it may, by halving, as if the loss fell along the front.

    What is returned was measured to hold. Raises ``SpecError`` where the largest does not.
    """
    bound = measured(Spec((Rule(Blocks(), KeepFloat("measured as it is")),)))
    trials = [Trial("float", 0, bound)]

    def holds(at: int) -> bool:
        value = measured(spec_for(front.choices(at)))
        trials.append(Trial("front", float(front.sizes[at]), value))
        return sign * (value - bound) <= drop * abs(bound)

    high = len(front) - 1
    if not holds(high):
        raise SpecError(
            f"max_drop: the largest mix has {trials[-1].loss:.6g}, the float model {bound:.6g}: more than"
            f" {drop:.3%} lost; give a finer option, or float"
        )
    low = -1  # does not hold
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return front.choices(high), trials
