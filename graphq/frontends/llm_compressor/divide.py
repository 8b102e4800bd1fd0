"""Ordered rules as the groups and ignores of modifiers, whose targets have a precedence of their own."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, final

from graphq.errors import SpecError
from graphq.frontends.llm_compressor.combine import precedence, restored, runs
from graphq.frontends.llm_compressor.presets import UNQUANTIZED
from graphq.spec.algorithms import at_stage
from graphq.spec.match import Exact, Kind, Match, Regex
from graphq.spec.plan import KeepFloat, Plan
from graphq.spec.rules import Algorithm, Rule

_MOST_EARLIER: Final = 1000  # beyond, to look for what they decide for each float rule would take long


@final
@dataclass
class Segment:
    """What one modifier holds: rules in the order of their targets' precedence, and layers that it ignores."""

    algorithm: Algorithm | None
    rules: list[Rule] = field(default_factory=list[Rule])
    ignored: list[Rule] = field(default_factory=list[Rule])

    @property
    def quantizes(self) -> bool:
        return any(isinstance(rule.decision, Plan) for rule in self.rules)


def divide(rules: Sequence[Rule], algorithms: Sequence[Algorithm]) -> list[Segment]:
    """The modifiers that give these rules, one after the other."""
    rounding = [algorithm for algorithm in algorithms if algorithm.name in at_stage("round")]
    whole = next((algorithm for algorithm in rounding if not algorithm.match), None)
    segments: list[Segment] = []
    earlier: list[Rule] = []  # those of the segments before the last one
    for rule in _together(rules, rounding):
        last = segments[-1] if segments else None
        if isinstance(rule.decision, KeepFloat):
            if last is not None and rule.decision != UNQUANTIZED and _is_left_float(earlier, rule):
                last.ignored.append(rule)
                continue
            algorithm = whole if last is None else last.algorithm
        else:
            algorithm = _algorithm(rule, rounding)
        is_other = last is not None and last.quantizes and last.algorithm != algorithm
        if last is None or last.ignored or is_other or not _follows(last.rules, rule):
            earlier += [] if last is None else [*last.rules, *last.ignored]
            last = Segment(whole)
            segments.append(last)
        if isinstance(rule.decision, Plan):
            last.algorithm = algorithm
        last.rules.append(rule)
    return segments


def _together(rules: Sequence[Rule], rounding: Sequence[Algorithm]) -> list[Rule]:
    """The rules, those whose order says nothing by the algorithm that rounds them: that of the rule in front first."""
    found: list[Rule] = []
    for run, apart in runs(rules):
        if apart:
            front = _algorithm(found[-1], rounding) if found else None
            own = {id(rule): _algorithm(rule, rounding) for rule in run}
            places = [front, *rounding, None]
            run.sort(key=lambda rule: (places.index(own[id(rule)]), precedence(rule)))
        found += run
    return found


def _algorithm(rule: Rule, rounding: Sequence[Algorithm]) -> Algorithm | None:
    return next((algorithm for algorithm in rounding if _covers(algorithm, rule.match)), None)


def _covers(algorithm: Algorithm, match: Match) -> bool:
    """Whether the algorithm is for the layers of a target; less those of others, which reading takes away again."""
    if not algorithm.match or match in algorithm.match:
        return True
    if isinstance(match, Exact):
        endings: tuple[str, ...] = ()
    elif isinstance(match, Kind):
        endings = (").*",) if match.kind == "linear" else ()
    else:
        endings = (f")(?:{match.pattern})",) if isinstance(match, Regex) else ()
    patterns = [one.pattern for one in algorithm.match if isinstance(one, Regex) and one.pattern.startswith("(?!")]
    return any(pattern.endswith(ending) for pattern in patterns for ending in endings)


def _is_left_float(earlier: Sequence[Rule], rule: Rule) -> bool:
    if len(earlier) > _MOST_EARLIER:
        return False
    try:
        return all(isinstance(one.decision, KeepFloat) for one in restored(earlier, rule))
    except SpecError:
        return False


def _follows(rules: Sequence[Rule], rule: Rule) -> bool:
    """Whether the rule's target stands above those of the rules."""
    return not rules or precedence(rules[-1]) < precedence(rule)
