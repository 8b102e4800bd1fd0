"""Ordered rules as the groups and ignores of modifiers, whose targets have a precedence of their own."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import final

from graphq.errors import SpecError
from graphq.frontends.llm_compressor_combine import restored
from graphq.frontends.llm_compressor_presets import UNQUANTIZED
from graphq.frontends.llm_compressor_targets import order, write_target
from graphq.match import Exact, Kind, Match, Regex
from graphq.plan import KeepFloat
from graphq.spec import Algorithm, Rule

ROUNDING = ("gptq", "auto-round")


@final
@dataclass
class Segment:
    """What one modifier holds: rules in the order of their targets' precedence, and layers that it ignores."""

    algorithm: Algorithm | None
    rules: list[Rule] = field(default_factory=list[Rule])
    ignored: list[Rule] = field(default_factory=list[Rule])


def divide(rules: Sequence[Rule], algorithms: Sequence[Algorithm]) -> list[Segment]:
    """The modifiers that give these rules, one after the other."""
    rounding = [algorithm for algorithm in algorithms if algorithm.name in ROUNDING]
    segments: list[Segment] = []
    earlier: list[Rule] = []  # those of the segments before the last one
    for rule in in_order(rules):
        last = segments[-1] if segments else None
        if isinstance(rule.decision, KeepFloat):
            if last is not None and rule.decision != UNQUANTIZED and _is_left_float(earlier, rule):
                last.ignored.append(rule)
                continue
            algorithm = last.algorithm if last is not None else _default(rounding)
        else:
            algorithm = next((a for a in rounding if _covers(a, rule.match)), None)
        if last is None or last.ignored or last.algorithm != algorithm or not _follows(last.rules, rule):
            if last is not None:
                earlier += [*last.rules, *last.ignored]
            last = Segment(algorithm)
            segments.append(last)
        last.rules.append(rule)
    return segments


def _default(rounding: Sequence[Algorithm]) -> Algorithm | None:
    return next((algorithm for algorithm in rounding if not algorithm.match), None)


def _covers(algorithm: Algorithm, match: Match) -> bool:
    """Whether the algorithm is for the layers of a target; less those of others, which reading takes away again."""
    if not algorithm.match or match in algorithm.match:
        return True
    if isinstance(match, Exact):
        endings: tuple[str, ...] = ()
    elif isinstance(match, Kind):
        endings = (").*",)
    else:
        endings = (f")(?:{match.pattern})",) if isinstance(match, Regex) else ()
    patterns = [one.pattern for one in algorithm.match if isinstance(one, Regex) and one.pattern.startswith("(?!")]
    return any(pattern.endswith(ending) for pattern in patterns for ending in endings)


def _is_left_float(earlier: Sequence[Rule], rule: Rule) -> bool:
    try:
        return all(isinstance(one.decision, KeepFloat) for one in restored(earlier, rule))
    except SpecError:
        return False


def _follows(rules: Sequence[Rule], rule: Rule) -> bool:
    """Whether the rule's target stands above those of the rules."""
    return not rules or _key(rules[-1]) < _key(rule)


def _key(rule: Rule) -> tuple[int, tuple[int, ...]]:
    return order((rule.match, write_target(rule.match)))


def in_order(rules: Iterable[Rule]) -> list[Rule]:
    """The rules, those side by side that no layer has in common in the order of their targets."""
    found: list[Rule] = []
    for kind, run in groupby(rules, key=_run):
        one = list(run)
        texts = {write_target(rule.match) for rule in one}
        apart = kind[0] in (Exact, Kind) and not kind[1] and len(texts) == len(one)
        found += sorted(one, key=_key) if apart else one
    return found


def _run(rule: Rule) -> tuple[type, bool]:
    return type(rule.match), isinstance(rule.decision, KeepFloat) and rule.decision != UNQUANTIZED
