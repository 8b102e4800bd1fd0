"""A spec as the text of a modelslim_v1 config. What the dialect cannot hold is refused, a line each.

The last rule that matches a layer decides, and the first processor that selects it: rules are written from the last to
the first, and what a rule keeps float is excluded from every processor after it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import yaml

from graphq.errors import SpecError
from graphq.frontends.document import Plain
from graphq.frontends.modelslim.globs import MAX_EXPANDED, expand, is_inside, matches_of, may_meet
from graphq.frontends.modelslim.qconfig import Rounding, beyond, side_of, write_qconfig
from graphq.frontends.modelslim.read import SAVERS, parse
from graphq.frontends.modelslim.smooth import write_preparation
from graphq.frontends.yaml_text import read_text
from graphq.spec.algorithms import at_stage
from graphq.spec.formats import Int
from graphq.spec.match import Exact, Glob, Kind, Linears, Match
from graphq.spec.plan import KeepFloat, Plan
from graphq.spec.quant import PerChannel, Quant
from graphq.spec.rules import Algorithm, Rule, Spec


@final
@dataclass(frozen=True)
class _Chosen:
    """The layers of one processor, and how they are quantized."""

    include: tuple[str, ...]
    exclude: tuple[str, ...]
    plan: Plan
    rounding: Rounding | None


def write(spec: Spec) -> str:
    """The spec as a modelslim_v1 config; what is read from it has the same plans.

    Raises ``SpecError`` with a line for each thing that the dialect cannot hold.
    """
    text = _write_text(spec)
    again = parse(read_text(text))
    wanted = [_canonical(algorithm, spec) for algorithm in spec.algorithms if algorithm.name != "rtn"]
    found = [_canonical(algorithm, again) for algorithm in again.algorithms]
    lost = [f"{one[0]}: msModelSlim cannot ask for it so" for one in wanted if one not in found]
    if not lost and wanted != found:
        lost.append("algorithms: in msModelSlim they stand in another order: quarot, smoothing, rounding")
    lost += [
        f"{name}: msModelSlim cannot hold {getattr(spec, name)}"
        for name in ("cache", "pipeline", "prefix", "run")
        if getattr(spec, name) != getattr(again, name)
    ]
    if lost:
        raise SpecError(lost)
    return text


def _write_text(spec: Spec) -> str:
    """The config. Raises ``SpecError`` with a line for each thing that it cannot hold."""
    problems: list[str] = []
    chosen = list(_chosen(spec, problems))
    remarks: dict[str, None] = {}
    qconfigs: list[dict[str, Plain]] = []
    for one in chosen:
        try:
            qconfigs.append(write_qconfig(one.plan, one.rounding))
            assert one.plan.weight is not None  # else it was refused
            act = None if one.plan.input is None else side_of(one.plan.input, "act")
            missing = beyond(act, side_of(one.plan.weight, "weight"))
            remarks |= dict.fromkeys(missing if one.rounding is None else missing[:0])
        except SpecError as error:
            problems += error.problems
    process: list[Plain] = []
    for algorithm in spec.algorithms:
        if algorithm.name == "auto-round" and [*dict(algorithm.options)] != ["steps"]:
            problems.append("auto-round: msModelSlim's has steps, which are to be written, and no other option")
        if algorithm.name in (*at_stage("round"), "rtn"):
            continue
        try:
            process.append(write_preparation(algorithm, write_qconfig(chosen[0].plan, None) if qconfigs else {}))
        except SpecError as error:
            problems += error.problems
    if not chosen and not problems:
        problems.append("every rule keeps layers float: there is nothing to select")
    cache = _cache(spec.cache, problems)
    top = _top(spec, problems)
    if problems:
        raise SpecError(list(dict.fromkeys(problems)))
    process += _processors(chosen, qconfigs)
    top["spec"] = {**top["spec"], "process": [*process, *cache]} if isinstance(top["spec"], dict) else None
    text = yaml.dump(top, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
    return "".join(f"# {remark}.\n" for remark in remarks) + text


def _chosen(spec: Spec, problems: list[str]) -> Iterator[_Chosen]:
    """The processors in order, as pieces of one pattern or name joined where they are alike."""
    kept: list[str] = []
    roundings = _roundings(spec)
    runs: list[list[Rule]] = []  # from the last rule to the first; rules that are alike stay in their order
    for rule in reversed(spec.rules):
        problems += _rule_problems(rule)
        one = runs[-1][0] if runs else None
        if one is not None and _kind_of(one, roundings) == _kind_of(rule, roundings):
            runs[-1].insert(0, rule)
        else:
            runs.append([rule])
    for rules in runs:
        decision, match = rules[0].decision, rules[0].match
        found = [_pattern(rule, problems) for rule in rules]
        include = tuple(pattern for pattern in found if pattern is not None)
        if len(include) < len(rules):
            continue
        if isinstance(decision, KeepFloat):
            kept += _excluded(rules, problems)
            continue
        left_out = [one for one in kept if any(may_meet(one, other) for other in include)]
        exclude = tuple(dict.fromkeys((*_but(match), *left_out)))
        include = tuple(match.pattern for match in matches_of(include, exclude))
        if len(include) > MAX_EXPANDED or len(exclude) > MAX_EXPANDED:
            problems.append(f"a processor with more than {MAX_EXPANDED:,} patterns, the first {include[0]}")
        if include:
            yield _Chosen(include, exclude, decision, roundings.get(match))


def _excluded(rules: Sequence[Rule], problems: list[str]) -> Iterator[str]:
    """The patterns of rules that keep layers float."""
    for rule in rules:
        pattern, but = _pattern(rule, []) or "", _but(rule.match)
        if any(is_inside(pattern, other) for other in but):
            continue
        if any(may_meet(pattern, other) for other in but):
            problems.append(
                f"{rule.match}: msModelSlim excludes all that a pattern has; give what but leaves a plan behind"
            )
        yield pattern


def _rule_problems(rule: Rule) -> Iterator[str]:
    where = f"{rule.source}: " if rule.source else ""
    if rule.only_if:
        yield f"{where}{rule.match}: only_if: {', '.join(map(str, rule.only_if))}: msModelSlim has no constraints"
    if rule.exclusive:
        yield f"{where}{rule.match}: exclusive: msModelSlim's processors may select one layer twice"
    if rule.may_match_nothing and isinstance(rule.decision, Plan):
        yield f"{where}{rule.match}: may_match_nothing: a pattern that quantizes has to match, as graphq reads it"


def _kind_of(rule: Rule, roundings: Mapping[Match, Rounding]) -> tuple[object, ...]:
    """What rules have in common that are one processor."""
    return rule.decision, _but(rule.match), roundings.get(rule.match)


def _but(match: Match) -> tuple[str, ...]:
    return match.but if isinstance(match, Linears) else ()


def _pattern(rule: Rule, problems: list[str]) -> str | None:
    """The glob or name that selects the same linears; None, and a problem more, where there is none."""
    where = f"{rule.source}: " if rule.source else ""
    match rule.match:
        case Exact(fqn):
            return fqn
        case Kind("linear"):
            return "*"
        case Linears(pattern):
            found = pattern
        case Glob(pattern) if re.search(r"(^|\.)[\w-]+$", pattern):  # spells the last segment, as Glob wants it
            found = pattern
        case other:
            problems.append(
                f"{where}{other}: msModelSlim selects linears by their full names; write =<full name>, or a pattern"
                " such as linear:*mlp* or *.down_proj"
            )
            return None
    try:
        if expand(found) == (found,):
            return found
        problems.append(f"{where}{rule.match}: msModelSlim reads braces as alternatives")
    except SpecError as error:
        problems += [f"{where}{problem}" for problem in error.problems]
    return None


def _roundings(spec: Spec) -> dict[Match, Rounding]:
    """The algorithm that rounds what each rule decides, by the rule's match.

    Its own match is that of the rule, or that less what the processors before have taken.
    """
    found: dict[Match, Rounding] = {}
    given = [rule.match for rule in spec.rules if isinstance(rule.decision, Plan)]
    for algorithm in spec.algorithms:
        if algorithm.name not in at_stage("round"):
            continue
        for asked in algorithm.match or given:
            near = [match for match in given if _is_for(asked, match)]
            if near:
                found.setdefault(max(near, key=lambda match: len(_but(match))), (algorithm.name, algorithm.options))
    return found


def _is_for(asked: Match, match: Match) -> bool:
    if isinstance(asked, Linears) and isinstance(match, Linears):
        return asked.pattern == match.pattern and asked.but[: len(match.but)] == match.but
    return asked == match


def _processors(chosen: Sequence[_Chosen], qconfigs: Sequence[dict[str, Plain]]) -> Iterator[Plain]:
    """Neighbours that autoround_quant, or a group of linear_quant, has as one processor, joined."""
    at = 0
    while at < len(chosen):
        rounding = chosen[at].rounding
        learned = rounding if rounding is not None and rounding[0] == "auto-round" else None
        end = at + 1
        while end < len(chosen) and _learned(chosen[end]) == learned:
            end += 1
        items: list[Plain] = []
        for one, qconfig in zip(chosen[at:end], qconfigs[at:end], strict=True):
            item: dict[str, Plain] = {} if learned else {"type": "linear_quant"}
            item["qconfig"] = qconfig
            item["include"] = [*one.include]
            if one.exclude:
                item["exclude"] = [*one.exclude]
            items.append(item)
        if learned is not None:
            yield {"type": "autoround_quant", "iters": dict(learned[1])["steps"], "strategies": items}
        elif len(items) == 1:
            yield items[0]
        else:
            yield {"type": "group", "configs": items}
        at = end


def _learned(one: _Chosen) -> Rounding | None:
    return one.rounding if one.rounding is not None and one.rounding[0] == "auto-round" else None


def _cache(cache: Quant | None, problems: list[str]) -> list[Plain]:
    match cache:
        case None:
            return []
        case Quant(Int(8, symmetric, "max", True, power_of_two=False) as format, PerChannel(), False) if (
            format.joint is not symmetric
        ):
            qconfig: Plain = {"scope": "per_channel", "dtype": "int8", "symmetric": symmetric, "method": "minmax"}
            return [{"type": "dynamic_cache", "qconfig": qconfig, "include": ["*"]}]
        case _:
            problems.append(f"cache: {cache}: msModelSlim's cache is int8/channel or int8/asym/joint/channel")
            return []


def _top(spec: Spec, problems: list[str]) -> dict[str, Plain]:
    if spec.prefix != "quantized":
        problems.append(f"prefix: {spec.prefix}: msModelSlim feeds each layer what the ones before it give by then")
    body: dict[str, Plain] = {"runner": "model_wise" if spec.pipeline == "independent" else "layer_wise", "process": []}
    run = spec.run
    problems += [
        f"run.{name}: {getattr(run, name)}: msModelSlim's configs do not say it"
        for name in ("model", "samples", "sequence_length", "batches", "seed")
        if getattr(run, name) not in ("", None)
    ]
    if run.calibration:
        body["dataset"] = run.calibration
    if run.target:
        saver = next((saver for saver, target in SAVERS.items() if target == run.target), None)
        if saver is None:
            problems.append(f"run.target: {run.target}: msModelSlim has no such saver")
        body["save"] = [{"type": saver}]
    return {"apiversion": "modelslim_v1", "metadata": {"config_id": "graphq"}, "spec": body}


def _canonical(algorithm: Algorithm, spec: Spec) -> tuple[object, ...]:
    """What makes two algorithms the same: defaults are written out, and a match of all that is quantized is none."""
    options = {"alpha": 0.5} if algorithm.name == "smooth-quant" else {}
    planned = {rule.match for rule in spec.rules if isinstance(rule.decision, Plan)}
    match = () if planned <= set(algorithm.match) else algorithm.match
    return algorithm.name, options | dict(algorithm.options), match, algorithm.folds


@final
class _Dumper(yaml.SafeDumper):
    """Writes lists indented below their key, and no aliases."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: object) -> bool:
        return True
