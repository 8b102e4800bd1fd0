"""The processors of a modelslim_v1 config, in order, as rules and algorithms.

A layer that a processor quantizes is no ``nn.Linear`` to the later ones: the first that selects it keeps it. Rules are
the other way round, so they stand from the last processor to the first.
"""

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, final

from graphq.errors import SpecError
from graphq.formats import Int
from graphq.frontends.document import Section, nearest, show
from graphq.frontends.modelslim_globs import is_inside, literal, matches_of, may_meet, read_patterns
from graphq.frontends.modelslim_qconfig import Qconfig, Rounding, read_qconfig
from graphq.frontends.modelslim_smooth import PREPARATIONS, REFUSED, read_preparation
from graphq.match import Exact, Linears, Match
from graphq.plan import KeepFloat
from graphq.quant import PerChannel, Quant
from graphq.spec import Algorithm, Rule

EXCLUDED: Final = "linear_quant excludes it"
_QUANTIZERS: Final = ("linear_quant", "group", "autoround_quant")
TYPES: Final = (*_QUANTIZERS, "dynamic_cache", *PREPARATIONS)


@final
@dataclass(frozen=True)
class Selection:
    """The layers that one linear_quant, or one strategy of autoround_quant, quantizes, and how."""

    section: Section
    name: str
    matches: tuple[Exact | Linears, ...]
    exclude: tuple[str, ...]
    qconfig: Qconfig

    @property
    def source(self) -> str:
        return self.section.document.origin(self.section.at, self.name)

    def takes(self, name: str) -> bool:
        """Whether a layer of this name, where there is one, is among them."""
        return any(
            match.fqn == name if isinstance(match, Exact) else _is_selected(name, match) for match in self.matches
        )


@final
@dataclass(frozen=True)
class Processed:
    """What the processors say."""

    rules: tuple[Rule, ...]
    algorithms: tuple[Algorithm, ...]
    cache: Quant | None


def read_process(spec: Section) -> Processed:
    """The rules and algorithms of ``spec.process``; what is wrong is reported."""
    preparations: list[Algorithm] = []
    selections: list[Selection] = []
    cache: Quant | None = None
    before = len(spec.document.problems)
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
        elif kind in _QUANTIZERS:
            quantizer = quantizer or name
            selections += _read_quantizer(section, kind, name)
        elif kind in REFUSED:
            section.report(f"{kind}: {REFUSED[kind]}", "type")
        else:
            section.report(f"{show(kind)} is not a processor{nearest(kind, TYPES)}", "type")
    if not selections and len(spec.document.problems) == before:
        spec.report("quantizes nothing: there is no linear_quant that selects a layer", "process")
    rounding = _read_roundings(selections)
    return Processed(tuple(_rules(selections)), (*preparations, *rounding), cache)


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
    if len(include) * len(exclude) > 20_000:
        section.report("more than 20,000 pairs of include and exclude; write fewer patterns", "exclude")
        return
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
    is_pattern = any(isinstance(match, Linears) for match in matches)
    yield Selection(section, name, matches, exclude if is_pattern else (), found)


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
            name = literal(pattern)
            match = Linears(pattern) if name is None else name
            if match not in kept:
                kept.add(match)
                yield Rule(match, KeepFloat(EXCLUDED), f"{one.source}: exclude", may_match_nothing=name is None)
    used: set[Match] = set()
    found: list[list[Rule]] = []
    for one in selections:
        found.append([])
        for match in one.matches:
            if match in used:
                place = one.section.document.prefix((*one.section.at, "include"))
                one.section.document.notes.append(f"{place}ignored: an earlier processor has taken {match}")
            else:
                used.add(match)
                found[-1].append(Rule(match, one.qconfig.plan, one.source))
    for rules in reversed(found):
        yield from rules


def _read_roundings(selections: Sequence[Selection]) -> Iterator[Algorithm]:
    """The algorithms that round weights, each for the layers of the processors that ask for it."""
    asked = dict.fromkeys(one.qconfig.rounding for one in selections)
    for rounding in asked:
        if rounding is None:
            continue
        name, options = rounding
        own = [one for one in selections if one.qconfig.rounding == rounding]
        matches: dict[Match, None] = {}
        for one in own if len(asked) > 1 else ():
            earlier = [other for other in selections[: selections.index(one)] if other.qconfig.rounding != rounding]
            for match in one.matches:
                try:
                    left = _left(match, earlier)
                except SpecError as error:
                    one.section.report(str(error), "include")
                    continue
                matches.update({} if left is None else {left: None})
        source = own[0].source
        if len(asked) == 1 or matches:
            yield Algorithm(name, options, source, tuple(matches))


def _left(match: Exact | Linears, earlier: Sequence[Selection]) -> Exact | Linears | None:
    """The layers of ``match`` that no earlier processor takes; None for none.

    Raises ``SpecError`` where patterns cannot say which these are.
    """
    if isinstance(match, Exact):
        return None if any(other.takes(match.fqn) for other in earlier) else match
    taken: dict[str, None] = {}
    for other in earlier:
        for theirs in other.matches:
            if isinstance(theirs, Exact):
                taken.update({theirs.fqn: None} if _is_selected(theirs.fqn, match) else {})
                continue
            apart = not may_meet(match.pattern, theirs.pattern)
            apart = apart or any(is_inside(theirs.pattern, one) for one in match.but)
            if apart or any(is_inside(match.pattern, one) for one in theirs.but):
                continue
            if any(may_meet(match.pattern, one) for one in theirs.but):
                raise SpecError(
                    f"patterns cannot say which layers of {match.pattern} are left by {other.name}, which rounds by"
                    f" another method; put this processor in front of {other.name}"
                )
            taken[theirs.pattern] = None
    return Linears(match.pattern, tuple(dict.fromkeys((*match.but, *taken))))


def _is_selected(name: str, match: Linears) -> bool:
    return fnmatch.fnmatchcase(name, match.pattern) and not any(fnmatch.fnmatchcase(name, one) for one in match.but)
