"""The processors of a modelslim_v1 config, in order, as rules and algorithms.

A layer that a processor quantizes is no ``nn.Linear`` to the later ones: the first that selects it keeps it. Rules are
the other way round, so they stand from the last processor to the first.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, final

from graphq.errors import SpecError
from graphq.frontends.document import Section, nearest, show
from graphq.frontends.modelslim.attention import read_attention
from graphq.frontends.modelslim.globs import is_inside, is_name, matches_any, matches_of, may_meet, read_patterns
from graphq.frontends.modelslim.qconfig import Qconfig, Rounding, read_qconfig
from graphq.frontends.modelslim.smooth import PREPARATIONS, REFUSED, read_preparation
from graphq.spec.attention import AttentionOperands
from graphq.spec.formats import Int
from graphq.spec.match import Exact, Linears, Match
from graphq.spec.plan import KeepFloat
from graphq.spec.quant import PerChannel, Quant
from graphq.spec.rules import Algorithm, Rule

MAX_PATTERNS: Final = 2000
MAX_PAIRS: Final = 3000
EXCLUDED: Final = "linear_quant excludes it"
_QUANTIZERS: Final = ("linear_quant", "group", "autoround_quant")
TYPES: Final = (*_QUANTIZERS, "dynamic_cache", "fa3_quant", *PREPARATIONS)


@final
@dataclass(frozen=True)
class Selection:
    """The layers that one linear_quant, or one strategy of autoround_quant, quantizes, and how."""

    section: Section
    name: str
    matches: tuple[Linears, ...]
    exclude: tuple[str, ...]
    qconfig: Qconfig

    @property
    def source(self) -> str:
        return self.section.document.origin(self.section.at, self.name)

    def takes(self, name: str) -> bool:
        """Whether a layer of this name, where there is one, is among them."""
        return any(_is_selected(name, match) for match in self.matches)


@final
@dataclass(frozen=True)
class Processed:
    """What the processors say."""

    rules: tuple[Rule, ...]
    algorithms: tuple[Algorithm, ...]
    cache: Quant | None
    attention: AttentionOperands | None = None


def read_process(spec: Section) -> Processed:
    """The rules and algorithms of ``spec.process``; what is wrong is reported."""
    preparations: list[Algorithm] = []
    selections: list[Selection] = []
    cache: Quant | None = None
    before = len(spec.document.problems)
    attention: AttentionOperands | None = None
    quantizer, seen_cache = "", False
    for index, item in enumerate(spec.items("process", " of processors", required=True)):
        name = f"process[{index}]"
        if not isinstance(item, dict):
            spec.report(f"{show(item)} is not a mapping with a type", "process", index)
            continue
        section = Section(spec.document, item, (*spec.at, "process", index))
        kind = section.text("type", required=True)
        if kind is None:
            continue
        if kind in PREPARATIONS:
            found = read_preparation(section, kind)
            if quantizer:
                section.report(f"{kind} comes after {quantizer}, which has quantized layers; put it in front", "type")
            if kind == "quarot" and preparations:
                section.report("graphq rotates before it scales; put quarot first", "type")
            preparations += [] if found is None else [found]
        elif kind == "dynamic_cache":
            if seen_cache:
                section.report("a second dynamic_cache; graphq has one format for the whole cache", "type")
            cache, seen_cache = _read_cache(section), True
        elif kind == "fa3_quant":
            if attention is not None:
                section.report("a second fa3_quant; graphq has one format for every attention", "type")
            attention = read_attention(section)
        elif kind in _QUANTIZERS:
            quantizer = quantizer or name
            selections += _read_quantizer(section, kind, name)
        elif kind in REFUSED:
            section.report(f"{kind}: {REFUSED[kind]}", "type")
        else:
            section.report(f"{show(kind)} is not a processor{nearest(kind, TYPES)}", "type")
    if not selections and len(spec.document.problems) == before:
        spec.report("quantizes nothing: there is no linear_quant that selects a layer", "process")
    if problem := _excess(selections):
        spec.report(problem, "process")
        selections = []
    selections = list(_reached(selections))
    rounding = _read_roundings(selections)
    return Processed(tuple(_rules(selections)), (*preparations, *rounding), cache, attention)


def _excess(selections: Sequence[Selection]) -> str:
    """What there is too much of to compare all patterns; empty for most."""
    included = [match.pattern for one in selections for match in one.matches]
    excluded = [pattern for one in selections for pattern in one.exclude if not is_name(pattern)]
    if len(included) > MAX_PATTERNS:
        return f"more than {MAX_PATTERNS:,} patterns in all, braces written out"
    if sum(not is_name(pattern) for pattern in included) * len(excluded) > MAX_PAIRS:
        return f"more than {MAX_PAIRS:,} pairs of patterns in include and exclude; write fewer"
    return ""


def _read_quantizer(section: Section, kind: str, name: str) -> Iterator[Selection]:
    if kind == "linear_quant":
        yield from _read_selection(section, name, ("type", "qconfig", "include", "exclude"))
    elif kind == "group":
        section.only(("type", "configs"))
        for index, item in enumerate(section.items("configs", " of linear_quant", required=True)):
            inner = Section(section.document, item if isinstance(item, dict) else {}, (*section.at, "configs", index))
            if inner.values.get("type") != "linear_quant":
                inner.report("a group holds processors of type linear_quant, and no others")
                continue
            keys = ("type", "qconfig", "include", "exclude")
            yield from _read_selection(inner, f"{name}.configs[{index}]", keys)
    else:
        yield from _read_autoround(section, name)


def _read_autoround(section: Section, name: str) -> Iterator[Selection]:
    section.only(("type", "iters", "enable_minmax_tuning", "enable_round_tuning", "strategies"))
    steps = section.integer("iters")
    if steps is not None and steps < 1:
        section.report(f"{steps} is not a whole number from 1", "iters")
    for key in ("enable_minmax_tuning", "enable_round_tuning"):
        if section.boolean(key) is False:
            section.report("graphq learns roundings and ranges together; write true", key)
    rounding: Rounding = ("auto-round", (("steps", 10 if steps is None else steps),))
    for index, item in enumerate(section.items("strategies", " of qconfig, include, exclude", required=True)):
        at = (*section.at, "strategies", index)
        if not isinstance(item, dict):
            section.report(f"{show(item)} is not a mapping with qconfig", "strategies", index)
            continue
        inner = Section(section.document, item, at)
        keys = ("qconfig", "include", "exclude")
        yield from _read_selection(inner, f"{name}.strategies[{index}]", keys, rounding)


def _read_selection(
    section: Section, name: str, keys: Sequence[str], autoround: Rounding | None = None
) -> Iterator[Selection]:
    section.only(keys)
    include = read_patterns(section, "include") if section.values.get("include") is not None else ("*",)
    exclude = read_patterns(section, "exclude")
    if section.values.get("include") == []:
        section.report("is empty: nothing is selected; leave it out for every linear", "include")
    qconfig = section.section("qconfig", required=True)
    found = None if qconfig is None else read_qconfig(qconfig, autoround)
    if found is None:
        return
    matches = tuple(matches_of(include, exclude))
    if include and not matches:
        section.report("every layer of include is in exclude", "exclude")
        return
    yield Selection(section, name, matches, exclude, found)


def _read_cache(section: Section) -> Quant | None:
    section.only(("type", "qconfig", "include", "exclude"))
    if section.values.get("include") != ["*"] or section.values.get("exclude") not in (None, []):
        section.report(
            "graphq has one format for the whole cache; write include: ['*'], without which msModelSlim quantizes none"
            " of it, and no exclude",
            "include",
        )
    qconfig = section.section("qconfig")
    if qconfig is None:
        return Quant(Int(8), PerChannel())
    qconfig.only(("scope", "dtype", "symmetric", "method", "ext"))
    for key, only in (("scope", "per_channel"), ("dtype", "int8"), ("method", "minmax")):
        if qconfig.text(key) not in (None, only):
            qconfig.report(f"{show(qconfig.values[key])}: the cache has {only}", key)
    if qconfig.values.get("ext") not in (None, {}):
        qconfig.report("minmax of a cache has no options", "ext")
    symmetric = qconfig.boolean("symmetric") is not False
    return Quant(Int(8, symmetric, joint=not symmetric), PerChannel())


def _rules(selections: Sequence[Selection]) -> Iterator[Rule]:
    kept: set[Match] = set()
    for one in selections:
        for pattern in one.exclude:
            match = Exact(pattern) if is_name(pattern) else Linears(pattern)
            if match not in kept:
                kept.add(match)
                may_miss = not is_name(pattern)
                yield Rule(match, KeepFloat(EXCLUDED), f"{one.source}: exclude", may_match_nothing=may_miss)
    for one in reversed(selections):
        for match in one.matches:
            yield Rule(match, one.qconfig.plan, one.source)


def _reached(selections: Sequence[Selection]) -> Iterator[Selection]:
    """The selections without patterns all of whose layers an earlier one takes."""
    before: list[Linears] = []
    for one in selections:
        matches: list[Linears] = []
        for match in one.matches:
            whole = next((other for other in before if _is_taken(match, other)), None)
            if whole is None:
                matches.append(match)
            else:
                place = one.section.document.prefix((*one.section.at, "include"))
                one.section.document.notes.append(f"{place}ignored: {whole} has taken all of {match} before")
        before += matches
        exclude = one.exclude if any(match.but for match in matches) else ()
        if matches:
            yield dataclasses.replace(one, matches=tuple(matches), exclude=exclude)


def _is_taken(match: Linears, other: Linears) -> bool:
    return is_inside(match.pattern, other.pattern) and not _exceptions(match, other)


def _exceptions(match: Linears, other: Linears) -> list[str]:
    """Patterns that ``other`` excludes, of layers that ``match`` may have."""
    own = [one for one in other.but if not any(is_inside(one, excluded) for excluded in match.but)]
    return [one for one in own if may_meet(match.pattern, one)]


def _read_roundings(selections: Sequence[Selection]) -> Iterator[Algorithm]:
    """The algorithms that round weights, each for the layers of the processors that ask for it."""
    asked = dict.fromkeys(one.qconfig.rounding for one in selections)
    for rounding in asked:
        if rounding is None:
            continue
        name, options = rounding
        own = [one for one in selections if one.qconfig.rounding == rounding]
        matches: dict[Match, None] = {}
        for one in reversed(own) if len(asked) > 1 else ():
            earlier = [other for other in selections[: selections.index(one)] if other.qconfig.rounding != rounding]
            asks = len(one.matches) * sum(1 + len(match.but) for other in earlier for match in other.matches)
            if asks > 2000:
                one.section.report("too many patterns to tell apart what the processors before it round otherwise")
                continue
            for match in one.matches:
                try:
                    left = _without_earlier(match, earlier)
                except SpecError as error:
                    one.section.report(str(error), "include")
                    continue
                matches.update({} if left is None else {left: None})
        source = own[0].source
        if len(asked) == 1 or matches:
            yield Algorithm(name, options, source, tuple(matches))


def _without_earlier(match: Linears, earlier: Sequence[Selection]) -> Linears | None:
    """The layers of ``match`` that no earlier processor takes; None for none.

    Raises ``SpecError`` where patterns cannot say which these are.
    """
    if is_name(match.pattern):
        return None if any(other.takes(match.pattern) for other in earlier) else match
    taken: dict[str, None] = {}
    for other in reversed(earlier):  # in the order of the rules
        for theirs in other.matches:
            if is_name(theirs.pattern):
                taken.update({theirs.pattern: None} if _is_selected(theirs.pattern, match) else {})
                continue
            apart = not may_meet(match.pattern, theirs.pattern)
            apart = apart or any(is_inside(theirs.pattern, one) for one in match.but)
            if apart or any(is_inside(match.pattern, one) for one in theirs.but):
                continue
            if _exceptions(match, theirs):
                raise SpecError(
                    f"patterns cannot say which layers of {match.pattern} are left by {other.name}, which rounds by"
                    f" another method; put this processor in front of {other.name}"
                )
            taken[theirs.pattern] = None
    return Linears(match.pattern, tuple(dict.fromkeys((*match.but, *taken))))


def _is_selected(name: str, match: Linears) -> bool:
    return matches_any(name, (match.pattern,)) and not matches_any(name, match.but)
