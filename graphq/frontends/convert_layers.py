"""A spec's decisions for the layers of one model, said again in the matches that a dialect has."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final

from graphq.frontends.amct.plan import plan_of
from graphq.frontends.amct.table import ROWS, combinations
from graphq.frontends.amct.write import EVERY_LAYER, skipped
from graphq.frontends.llm_compressor.combine import precedence
from graphq.frontends.llm_compressor.transforms import folds
from graphq.frontends.llmc.write import MIX_BITS
from graphq.spec.algorithms import at_stage
from graphq.spec.constraint import Constraint, broken
from graphq.spec.match import Blocks, Exact, Glob, Kind, Layer, Linears, Match, Name, Part, Regex
from graphq.spec.plan import KeepFloat, Plan
from graphq.spec.quant import PerGroup
from graphq.spec.rules import Algorithm, Rule, Spec, resolve

_FLOAT: Final = KeepFloat("float")
Plans = Mapping[str, Plan]
Layers = Mapping[str, Layer]
_Shape = Callable[[Layer, tuple[int, ...]], Match | None]  # of a layer, and the blocks in which it is left to name


def plans_of(spec: Spec, layers: Layers) -> dict[str, Plan]:
    """The plan of every layer that is quantized. Raises ``SpecError`` for rules without a layer."""
    resolved, _ = resolve(spec, layers)
    return {fqn: found.decision for fqn, found in resolved.items() if isinstance(found.decision, Plan)}


def scope_of(algorithm: Algorithm, plans: Plans, layers: Layers) -> frozenset[str]:
    """The quantized layers that an algorithm is for."""
    return frozenset(
        fqn for fqn in plans if not algorithm.match or any(match.matches(layers[fqn]) for match in algorithm.match)
    )


def said_again(spec: Spec, dialect: str, layers: Layers) -> tuple[Spec, list[str]]:
    """The spec with rules that have each layer of the model keep its decision; and what the dialect cannot name."""
    plans = plans_of(spec, layers)
    if not plans:
        return spec, ["no layer of this model is quantized"]
    algorithms = [one for one in spec.algorithms if one.name != "rtn"]
    scopes = [scope_of(one, plans, layers) for one in algorithms]
    whole = [len(scope) == len(plans) for scope in scopes]
    problems: list[str] = []
    if dialect == "llmc":
        rules = _llmc(plans, layers, problems)
        matches = [() if all_ else one.match for one, all_ in zip(algorithms, whole, strict=True)]
    elif dialect == "amct":
        rules = _amct(plans, layers, problems)
        matches = [() if all_ else one.match for one, all_ in zip(algorithms, whole, strict=True)]
    else:
        is_slim = dialect == "modelslim"
        rounding = [i for i, one in enumerate(algorithms) if one.name in at_stage("round") and not whole[i]]
        own = {fqn: tuple(i for i in rounding if fqn in scopes[i]) for fqn in plans}
        named: list[tuple[Rule, tuple[int, ...]]] = []
        for key in dict.fromkeys((plan, own[fqn]) for fqn, plan in plans.items()):
            wanted = [fqn for fqn, plan in plans.items() if (plan, own[fqn]) == key]
            named += [(Rule(match, key[0]), key[1]) for match in _cover(wanted, layers, _SLIM if is_slim else _RECIPE)]
        if not is_slim:  # what a partial algorithm rounds comes last, and expressions as they stand above each other
            named.sort(key=lambda one: (one[1], precedence(one[0])))
        rules = [rule for rule, _ in named]
        matches = []
        for i, one in enumerate(algorithms):
            if whole[i] and (is_slim or one.folds == folds(one.name, ())):
                matches.append(())
            elif i in rounding:
                matches.append(tuple(rule.match for rule, of in named if i in of))
            else:
                matches.append((() if is_slim else _endings(scopes[i], plans, layers)) or one.match)
    again = tuple(dataclasses.replace(one, match=match) for one, match in zip(algorithms, matches, strict=True))
    return dataclasses.replace(spec, rules=tuple(rules), algorithms=again), problems


def _parts(layer: Layer) -> tuple[str, str] | None:
    """The path before the block's number, and the path within the block."""
    head, mark, tail = layer.fqn.partition(f".{layer.block}.")
    return (head, tail) if layer.block is not None and mark else None


def _cover(wanted: Sequence[str], layers: Layers, shapes: Sequence[_Shape]) -> list[Match]:
    """Matches that have these layers and no others, of the first shape that can."""
    left, every = dict.fromkeys(wanted), frozenset(wanted)
    found: list[Match] = []
    by_last: dict[str, list[Layer]] = {}
    for fqn, layer in layers.items():
        by_last.setdefault(fqn.rpartition(".")[2], []).append(layer)
    for shape in shapes:
        blocks: dict[tuple[str, str], set[int]] = {}
        for fqn in left:
            if (parts := _parts(layers[fqn])) is not None:
                blocks.setdefault(parts, set()).add(layers[fqn].block or 0)
        tried: set[Match] = set()
        for fqn in wanted:
            parts = _parts(layers[fqn])
            here = () if parts is None else tuple(sorted(blocks.get(parts, ())))
            match = shape(layers[fqn], here) if fqn in left else None
            if match is None or match in tried:
                continue
            tried.add(match)
            # patterns of one name spell its last segment: to try all layers of a large model would take minutes
            is_of_name = isinstance(match, Regex | Glob) or (isinstance(match, Linears) and match.pattern != "*")
            hits = _hits(match, by_last[fqn.rpartition(".")[2]] if is_of_name else layers.values(), every)
            if hits:
                found.append(match)
                for hit in hits:
                    left.pop(hit, None)
    return found


def _hits(match: Match, layers: Iterable[Layer], wanted: frozenset[str]) -> list[str]:
    """The layers that match; none where one of them is not wanted."""
    if isinstance(match, Exact):
        return [match.fqn]
    hits: list[str] = []
    for layer in layers:
        if match.matches(layer):
            if layer.fqn not in wanted:
                return []
            hits.append(layer.fqn)
    return hits


def _expression(layer: Layer, number: str, *, numbers: bool = False) -> Regex | None:
    parts = _parts(layer)
    if parts is None:
        return None
    head, tail = (re.escape(part).replace(r"\-", "-") for part in parts)
    if numbers:  # of experts, which are alike
        tail = re.sub(r"(?<=\\\.)[0-9]+(?=\\\.)", "[0-9]+", tail)
    return Regex(rf"{head}\.{number}\.{tail}$")


def _every_block(layer: Layer) -> str | None:
    parts = _parts(layer)
    return None if parts is None else f"{parts[0]}.*.{parts[1]}"


def _linears(layer: Layer, _: tuple[int, ...]) -> Match | None:
    pattern = _every_block(layer)
    return None if pattern is None else Linears(pattern)


def _linear_experts(layer: Layer, _: tuple[int, ...]) -> Match | None:
    pattern = _every_block(layer)
    return None if pattern is None else Linears(re.sub(r"(?<=\.)[0-9]+(?=\.)", "*", pattern))


def _globs(layer: Layer, _: tuple[int, ...]) -> Match | None:
    pattern = _every_block(layer)
    return None if pattern is None else Glob(pattern)


def _within(layer: Layer) -> str:
    """The path within the block; the whole one of a layer that is in none."""
    parts = _parts(layer)
    return layer.fqn if parts is None else parts[1]


def _some_blocks(layer: Layer, blocks: tuple[int, ...]) -> Match | None:
    return _expression(layer, f"({'|'.join(map(str, blocks))})") if len(blocks) > 1 else None


_RECIPE: Final[tuple[_Shape, ...]] = (
    lambda layer, _: Kind("linear"),
    lambda layer, _: _expression(layer, "[0-9]+", numbers=True),
    lambda layer, _: _expression(layer, "[0-9]+"),
    _some_blocks,
    lambda layer, _: Exact(layer.fqn),
)
_SLIM: Final[tuple[_Shape, ...]] = (
    lambda layer, _: Linears("*"),
    _linear_experts,
    _linears,
    lambda layer, _: Exact(layer.fqn),
)
_LLMC: Final[tuple[_Shape, ...]] = (
    lambda layer, _: Name(_within(layer)),
    lambda layer, blocks: Name(_within(layer), blocks) if blocks else None,
)
_AMCT: Final[tuple[_Shape, ...]] = (_globs, lambda layer, _: Glob(f"*{layer.fqn}"))
_SKIPS: Final[tuple[_Shape, ...]] = (lambda layer, _: Part(_within(layer)), lambda layer, _: Part(layer.fqn))


def _most_frequent(plans: Iterable[Plan]) -> Plan:
    return Counter(plans).most_common(1)[0][0]


def _llmc(plans: Plans, layers: Layers, problems: list[str]) -> list[Rule]:
    """A word for all blocks, and the settings of mix_bits."""
    inside = [fqn for fqn, layer in layers.items() if Blocks().matches(layer)]
    of_blocks = {fqn: plans.get(fqn, _FLOAT) for fqn in inside}
    outside = [fqn for fqn in plans if fqn not in of_blocks]
    problems += [f"{fqn}: {plans[fqn]}: LLMC quantizes layers of blocks alone" for fqn in outside]
    chosen = [plan for plan in of_blocks.values() if isinstance(plan, Plan)]
    base = _most_frequent(chosen or plans.values())
    rules = [Rule(Blocks(), base)]
    for decision in dict.fromkeys(one for one in of_blocks.values() if one != base):
        wanted = [fqn for fqn, one in of_blocks.items() if one == decision]
        rules += [Rule(match, decision, exclusive=MIX_BITS) for match in _cover(wanted, layers, _LLMC)]
    return rules


def _amct(plans: Plans, layers: Layers, problems: list[str]) -> list[Rule]:
    """A word for all layers, patterns that are quantized otherwise, and parts of names that stay float."""
    base = _most_frequent(plans.values())
    rules: list[Rule] = []
    for plan in sorted(dict.fromkeys(plans.values()), key=lambda plan: plan != base):
        wanted = [fqn for fqn, one in plans.items() if one == plan]
        needs = _needs(plan, [layers[fqn] for fqn in wanted])
        for fqn in wanted:
            if why := broken(needs, layers[fqn]):
                problems.append(f"{fqn}: {plan}: {why}")
                break
        found: list[Match] = [EVERY_LAYER] if plan == base else _cover(wanted, layers, _AMCT)
        rules += [Rule(match, plan, only_if=needs) for match in found]
    kept = [fqn for fqn, layer in layers.items() if EVERY_LAYER.matches(layer) and fqn not in plans]
    for match in _cover(kept, layers, _SKIPS):
        assert isinstance(match, Part)
        rules.append(Rule(match, skipped(match.text), may_match_nothing=True))
    return rules


def _needs(plan: Plan, layers: Sequence[Layer]) -> tuple[Constraint, ...]:
    """What AMCT asks of the layers with this plan, the first that these all are."""
    by = None if plan.weight is None else plan.weight.granularity
    size = by.size if isinstance(by, PerGroup) else None
    found = [row.needs(size) for row in ROWS if any(plan_of(one) == plan for one in combinations(row, size))]
    kept = (needs for needs in found if not any(broken(needs, layer) for layer in layers))
    return next(kept, found[0] if found else ())


def _endings(scope: frozenset[str], plans: Plans, layers: Layers) -> tuple[Match, ...]:
    """The last words of these layers' names, where no other quantized layer ends in them."""
    words = dict.fromkeys(fqn.rpartition(".")[2] for fqn in plans if fqn in scope)
    matches = tuple(Regex(rf".*{re.escape(word)}$") for word in words)
    return matches if scope_of(Algorithm("awq", match=matches), plans, layers) == scope else ()


def bare(spec: Spec, dialect: str) -> Iterator[Spec]:
    """The spec with each of its plans alone, for all layers: what is left to refuse is not how layers are named."""
    base: Match = {"llmc": Blocks(), "amct": EVERY_LAYER}.get(dialect, Kind("linear"))
    algorithms = tuple(dataclasses.replace(one, match=()) for one in spec.algorithms if one.name != "rtn")
    for plan in dict.fromkeys(rule.decision for rule in spec.rules if isinstance(rule.decision, Plan)):
        needs = _needs(plan, ()) if dialect == "amct" else ()
        yield dataclasses.replace(spec, rules=(Rule(base, plan, only_if=needs),), algorithms=algorithms)
