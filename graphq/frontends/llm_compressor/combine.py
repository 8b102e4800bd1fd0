"""Several modifiers as one ordered list of rules, and the layers that the algorithm of each is for.

A later modifier decides anew for the layers that it targets; those it ignores keep what earlier ones decided.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Final

from graphq.errors import SpecError
from graphq.frontends.llm_compressor.modifiers import Modifier
from graphq.frontends.llm_compressor.presets import UNQUANTIZED
from graphq.frontends.llm_compressor.targets import both, order, without, write_target
from graphq.spec.match import Exact, Kind, Match, Regex
from graphq.spec.plan import KeepFloat, Plan
from graphq.spec.rules import Algorithm, Order, Prefix, Rule

CALIBRATED: Final = ("SmoothQuantModifier", "AWQModifier", "GPTQModifier", "AutoRoundModifier")
_MOST_PAIRS: Final = 50_000  # of targets, each of which may make a rule
_MOST_CHARACTERS: Final = 100_000  # of expressions joined from them


def adopted(modifiers: Sequence[Modifier]) -> list[Modifier]:
    """The modifiers, those without a scheme with what the ones before them plan.

    A modifier all of whose layers such a one rounds is gone. What cannot be said is reported.
    """
    found: list[Modifier] = []
    for modifier in modifiers:
        if not modifier.adopts:
            found.append(modifier)
            continue
        plans = [one for one in found if one.quantizes and one.has_plans]
        if len(plans) != 1:
            which = "several modifiers before it have one" if plans else "no modifier before it plans a layer"
            modifier.section.report(f"has no scheme, and {which}; write it")
            continue
        (other,) = plans
        words = {word for _, word in other.actorders}
        options = dict(modifier.algorithm.options if modifier.algorithm else ())
        given = modifier.section.values.get("actorder") is not None
        if given:
            modifier.section.unused("actorder", "the order of the scheme holds, which stands before")
        options["act_order"] = "static" if words else "none"
        texts = {rule.match for rule in other.ignored}
        ignored = (*other.ignored, *(rule for rule in modifier.ignored if rule.match not in texts))
        if len(ignored) == len(other.ignored):
            found.remove(other)
        else:
            found[found.index(other)] = replace(other, actorders=())
        algorithm = modifier.algorithm and replace(modifier.algorithm, options=tuple(options.items()))
        found.append(replace(modifier, rules=other.rules, ignored=ignored, cache=other.cache, algorithm=algorithm))
    return found


def combine_rules(modifiers: Sequence[Modifier]) -> tuple[Rule, ...]:
    """The rules of all modifiers, the last that matches deciding. What cannot be said is reported."""
    return tuple(in_order(_one_after_the_other(modifiers)))


def _one_after_the_other(modifiers: Sequence[Modifier]) -> list[Rule]:
    rules: list[Rule] = []
    for modifier in modifiers:
        earlier = tuple(rules)
        rules += modifier.rules
        if _is_too_much([rule.match for rule in earlier], [rule.match for rule in modifier.ignored]):
            modifier.section.report("is too long a list behind so many targets of earlier modifiers", "ignore")
            continue
        for one in modifier.ignored:
            rules += modifier.section.made(lambda e=earlier, one=one: restored(e, one), "ignore") or ()
    return rules


def restored(earlier: Sequence[Rule], ignored: Rule) -> tuple[Rule, ...]:
    """What ``earlier`` rules decide for the layers that a later modifier ignores. Raises ``SpecError``."""
    kept = [ignored]
    for rule in earlier:
        match = both(rule.match, ignored.match)
        if match is None:
            continue
        if match == ignored.match:
            is_float = isinstance(rule.decision, KeepFloat)
            as_ignored = replace(rule, match=match, may_match_nothing=ignored.may_match_nothing)
            kept = [ignored if is_float else as_ignored]
        elif not isinstance(rule.decision, KeepFloat) or any(isinstance(one.decision, Plan) for one in kept):
            kept.append(replace(rule, match=match, may_match_nothing=True))
    return tuple(kept)


def combine_algorithms(modifiers: Sequence[Modifier], *, sequential: bool) -> tuple[Algorithm, ...]:
    """The modifiers' algorithms in order, each with the layers that it is for. What cannot be said is reported."""
    every = [modifier for modifier in modifiers if modifier.quantizes]
    quantizing = [modifier for modifier in every if modifier.has_plans] or every[:1]
    settings = {(m.name, m.algorithm.options if m.algorithm else ()) for m in quantizing}
    is_one = len(quantizing) == 1 or (sequential and len(settings) == 1)
    found: list[Algorithm] = []
    for modifier in modifiers:
        algorithm = modifier.algorithm
        if algorithm is None:
            continue
        if not modifier.rounds or (is_one and modifier.name == "AWQModifier"):
            found.append(algorithm)
        elif is_one:
            if modifier is quantizing[0]:
                found.append(algorithm)
        elif modifier in quantizing:
            match = modifier.section.made(lambda modifier=modifier: _scope(modifier, quantizing))
            if match:
                found.append(replace(algorithm, match=match))
            elif match is not None:
                modifier.section.report("a later modifier has all of its targets; leave one of them out")
    return tuple(found)


def _scope(modifier: Modifier, quantizing: Sequence[Modifier]) -> tuple[Match, ...]:
    """The modifier's targets, less what another modifier decides. Raises ``SpecError``."""
    place = quantizing.index(modifier)
    others = [
        rule.match for later in quantizing[place + 1 :] for rule in later.rules if isinstance(rule.decision, Plan)
    ]
    earlier = _one_after_the_other(quantizing[:place])
    for ignored in modifier.ignored:
        others += [rule.match for rule in restored(earlier, ignored) if isinstance(rule.decision, Plan)]
    own = [rule.match for rule in modifier.rules if isinstance(rule.decision, Plan)]
    if _is_too_much(own, others):
        raise SpecError("has too many targets beside those of other modifiers")
    found = [without(match, [other for other in others if not _apart(match, other)]) for match in own]
    theirs = [rule.match for other in quantizing if other is not modifier for rule in other.rules]
    convolutions = [other for other in theirs if isinstance(other, Kind) and other.kind.startswith("conv")]
    by_name = (isinstance(m, Kind) and isinstance(left, Regex) for m, left in zip(own, found, strict=True))
    if convolutions and any(by_name):
        raise SpecError(
            f"{convolutions[0]} is not told from what is left of its targets; write targets that do not overlap"
        )
    return tuple(dict.fromkeys(match for match in found if match is not None))


def _is_too_much(matches: Sequence[Match], others: Sequence[Match]) -> bool:
    """Whether to compare, and join, each of these with each of the others may take very long."""
    if len(matches) * len(others) > _MOST_PAIRS:
        return True
    lengths = [[len(one.pattern) for one in ones if isinstance(one, Regex)] for ones in (matches, others)]
    return sum(lengths[0]) * len(others) + sum(lengths[1]) * len(lengths[0]) > _MOST_CHARACTERS


def _apart(match: Match, other: Match) -> bool:
    return isinstance(match, Kind) and isinstance(other, Kind) and match != other


def precedence(rule: Rule) -> tuple[int, tuple[int, ...]]:
    """How far a rule's target stands above others in one modifier."""
    return order((rule.match, write_target(rule.match)))


def in_order(rules: Iterable[Rule]) -> list[Rule]:
    """The rules, those side by side that no layer has in common in the order of their targets."""
    return [rule for run, apart in runs(rules) for rule in (sorted(run, key=precedence) if apart else run)]


def runs(rules: Iterable[Rule]) -> Iterator[tuple[list[Rule], bool]]:
    """Rules of one kind that stand side by side, and whether no layer has two of them: their order says nothing."""
    for kind, group in groupby(rules, key=_run):
        run = list(group)
        texts = {write_target(rule.match) for rule in run}
        yield run, kind[0] in (Exact, Kind) and not kind[1] and len(texts) == len(run)


def _run(rule: Rule) -> tuple[type, bool]:
    return type(rule.match), isinstance(rule.decision, KeepFloat) and rule.decision != UNQUANTIZED


def default_pipeline(names: Iterable[str]) -> Order:
    """How oneshot runs modifiers of these classes where it is not told: each that needs data by itself."""
    return "independent" if sum(name in CALIBRATED for name in names) > 1 else "sequential"


def default_prefix(algorithms: Sequence[Algorithm]) -> Prefix:
    """What oneshot calibrates blocks on where it is not told: with AutoRound, on what float blocks give."""
    return "float" if any(algorithm.name == "auto-round" for algorithm in algorithms) else "quantized"
