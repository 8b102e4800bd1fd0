"""A spec as an AMCT config, where AMCT has one that means it."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Final

import yaml

from graphq.errors import SpecError
from graphq.frontends.amct.plan import CACHE, algorithm_of, plan_of
from graphq.frontends.amct.table import ALGORITHMS, NO_ALGORITHM, ROWS, Combination, Row, combinations
from graphq.frontends.document import Plain, show
from graphq.spec.constraint import Constraint
from graphq.spec.folds import EVERYWHERE
from graphq.spec.match import Glob, Kind, Match, Part
from graphq.spec.plan import Decision, KeepFloat, Plan
from graphq.spec.quant import PerGroup
from graphq.spec.rules import Algorithm, Rule, Run, Spec

NO_WEIGHTS: Final = "quant_cfg has no weights for it"
EVERY_LAYER: Final = Kind("linear|conv2d")
MAX_BATCHES: Final = (1 << 32) - 1


def skipped(text: str) -> KeepFloat:
    """The decision of ``skip_layers``."""
    return KeepFloat(f"skip_layers: {text}")


def write(spec: Spec) -> str:
    """The spec as an AMCT config in YAML. Raises ``SpecError`` with a line for each thing that AMCT cannot hold."""
    problems = [*_unheld(spec)]
    skips = _skips(spec.rules)
    others = spec.rules[: len(spec.rules) - len(skips)]
    first, patterns = (others[0], others[1:]) if others else (None, ())
    problems += [*_misplaced(first, patterns, skips)]
    planned = [rule for rule in (first, *patterns) if rule is not None and isinstance(rule.decision, Plan)]
    if not planned and spec.cache is None:
        problems.append("the spec quantizes nothing")
    problems += [f"{one.name}: no rule quantizes a layer" for one in spec.algorithms if not planned]
    found = _combinations(planned, spec.algorithms, problems) if planned else []
    if problems:
        raise SpecError([f"amct: {problem}" for problem in problems])
    top: dict[str, Plain] = {} if spec.run.batches is None else {"batch_num": spec.run.batches}
    config: dict[str, Plain] = {}
    algorithms: dict[str, Plain] = {}
    for rule, one in zip(planned, found, strict=True):
        prefix = "" if rule is first else f"{rule.match}."
        config[f"{prefix}weights"] = _weights(one)
        if one.inputs is not None or prefix:
            config[f"{prefix}inputs"] = _inputs(one)
        if one.algorithm != NO_ALGORITHM:
            algorithms[one.algorithm] = _options(spec.algorithms)
    # AMCT takes the first pattern that fits, a spec the last.
    keys = [key for key in config if "*" not in key] + _turned([key for key in config if "*" in key])
    config = {key: config[key] for key in keys}
    if spec.cache is not None:
        config["kvcache"] = {"type": "hifloat8", "symmetric": True, "strategy": "tensor"}
        algorithms.setdefault("quantile", None)
    top["quant_cfg"] = config
    if algorithms:
        top["algorithm"] = dict(algorithms)
    if skips:
        top["skip_layers"] = [rule.match.text for rule in skips if isinstance(rule.match, Part)]
    return yaml.safe_dump(top, sort_keys=False, width=10**6)


def _turned(keys: Sequence[str]) -> list[str]:
    """The keys of the last pattern first; weights stay in front of inputs."""
    return [key for index in range(len(keys) - 2, -1, -2) for key in keys[index : index + 2]]


def _unheld(spec: Spec) -> Iterator[str]:
    """A line for each thing that a config has no word for."""
    if spec.cache not in (None, CACHE):
        yield f"cache: {spec.cache}: AMCT's cache is {CACHE}"
    if spec.pipeline != "sequential":
        yield f"pipeline: {spec.pipeline}: AMCT has one algorithm, and no order"
    calibrated = "float" if spec.algorithms else "quantized"
    if spec.prefix != calibrated:
        why = "calibrates every layer on float inputs" if spec.algorithms else "says nothing of it without an algorithm"
        yield f"prefix: {spec.prefix}: AMCT {why}; write {calibrated}"
    for name, value in vars(spec.run).items():
        if name != "batches" and value != getattr(Run(), name):
            yield f"run: {name}: {show(value)}: a config does not say it"
    if spec.run.batches is not None and spec.run.batches > MAX_BATCHES:
        yield f"run: batches: {spec.run.batches} is more than 2^32 - 1"


def _skips(rules: Sequence[Rule]) -> list[Rule]:
    """The rules at the end that keep layers float by a part of their name."""
    count = 0
    for rule in reversed(rules):
        if not (isinstance(rule.match, Part) and isinstance(rule.decision, KeepFloat)):
            break
        count += 1
    return list(rules[len(rules) - count :])


def _misplaced(first: Rule | None, patterns: Sequence[Rule], skips: Sequence[Rule]) -> Iterator[str]:
    """A line for each rule that stands where a config has no place for it, or says more than one can."""
    if first is not None and isinstance(first.decision, KeepFloat):
        if first != Rule(Kind("linear"), KeepFloat(NO_WEIGHTS), may_match_nothing=True):
            yield f"{first.match}: a config keeps layers float by a part of their name, as in ~lm_head, and last"
    elif first is not None and first.match != EVERY_LAYER:
        yield f"{first.match}: the first rule is for all layers; write {EVERY_LAYER}"
    seen: set[Match] = set()
    for rule in patterns:
        if isinstance(rule.decision, KeepFloat):
            yield f"{rule.match}: a config keeps layers float by a part of their name, as in ~lm_head, and last"
        elif not isinstance(rule.match, Glob) or "*" not in rule.match.pattern:
            yield f"{rule.match}: a config names layers by patterns with a *"
        elif rule.match in seen:
            yield f"{rule.match}: stands twice, and the keys of a config do not"
        seen.add(rule.match)
    for rule in (first, *patterns):
        if rule is not None and isinstance(rule.decision, Plan) and (rule.may_match_nothing or rule.exclusive):
            yield f"{rule.match}: a config does not say may_match_nothing or exclusive"
    for rule in skips:
        assert isinstance(rule.match, Part)
        if rule.decision != skipped(rule.match.text):
            yield f"{rule.match}: a config gives no reason of its own; write {skipped(rule.match.text).reason!r}"
        elif not rule.may_match_nothing or rule.exclusive:
            yield f"{rule.match}: a part of a name may match nothing in AMCT, and is not exclusive"


def _combinations(rules: Sequence[Rule], asked: tuple[Algorithm, ...], problems: list[str]) -> list[Combination]:
    """A combination for each rule, all of one algorithm, and best of those that AMCT's code still has; what AMCT has
    not is added to ``problems``.
    """
    names = [name for name in (*ALGORITHMS, NO_ALGORITHM) if _means(name, asked)]
    if not names:
        if not any(_means(name, asked[:1]) for name in ALGORITHMS):
            problems.append(_algorithm_problem(asked[0]))
        problems += [f"{one.name}: AMCT has one algorithm for a layer" for one in asked[1:]]
        names = [*ALGORITHMS, NO_ALGORITHM]
    kinds = dict.fromkeys((rule.decision, rule.only_if) for rule in rules)
    known = {(kind, name): _combination(*kind, name) for kind in kinds for name in names}
    found = [[known[(rule.decision, rule.only_if), name] for rule in rules] for name in names]
    best = min(found, key=lambda row: [row.count(None), sum(one is not None and one[0].note != "" for one in row)])
    for rule, one in zip(rules, best, strict=True):
        if one is None:
            problems.append(_plan_problem(rule, names))
    return [one[1] for one in best if one is not None]


def _means(name: str, asked: tuple[Algorithm, ...]) -> bool:
    """Whether AMCT's algorithm is this, whatever its option is set to."""
    made = algorithm_of(name, _value(asked))
    if made is None:
        return not asked
    return (
        len(asked) == 1
        and asked[0] == dataclasses.replace(made, options=asked[0].options)
        and (dict(asked[0].options) == dict(made.options))
    )


def _value(asked: tuple[Algorithm, ...]) -> int | float | None:
    """What AMCT's only option would be set to; None where it cannot be."""
    if len(asked) != 1:
        return None
    options = dict(asked[0].options)
    grids, strength = options.get("n_grid"), options.get("alpha")
    if type(grids) is int and 0 < grids < 1 << 32:
        return grids
    return strength if type(strength) is float and 0 < strength < 1 else None


def _algorithm_problem(one: Algorithm) -> str:
    for name in ("awq", "smoothquant", "gptq"):
        known = algorithm_of(name, _value((one,)))
        if known is not None and known.name == one.name:
            if one.match:
                return f"{one.name}: AMCT's is for every layer; leave out its match"
            if one.folds != EVERYWHERE:
                return f"{one.name}: folds: {one.folds}: AMCT folds nothing; leave it out"
            has = ", ".join(f"{option} {value}" for option, value in known.options)
            return f"{one.name}: AMCT's has {has}"
    return f"{one.name}: AMCT has no such algorithm"


def _combination(decision: Decision, only_if: tuple[Constraint, ...], algorithm: str) -> tuple[Row, Combination] | None:
    assert isinstance(decision, Plan)
    size = _group_size(decision)
    for row in ROWS:
        if set(row.needs(size)) == set(only_if):
            for one in combinations(row, size):
                if one.algorithm == algorithm and plan_of(one) == decision:
                    return row, one
    return None


def _group_size(plan: Plan) -> int | None:
    weight = plan.weight
    return weight.granularity.size if weight is not None and isinstance(weight.granularity, PerGroup) else None


def _plan_problem(rule: Rule, names: Sequence[str]) -> str:
    """Why a rule is none of AMCT's: its plan, the algorithm beside it, or the layers that AMCT would leave float."""
    assert isinstance(rule.decision, Plan)
    size = _group_size(rule.decision)
    same = [(row, one.algorithm) for row in ROWS for one in combinations(row, size) if plan_of(one) == rule.decision]
    if not same:
        return f"{rule.match}: {rule.decision}: AMCT has no such combination"
    usable = [row for row, algorithm in same if algorithm in names]
    if not usable:
        choices = ", ".join(dict.fromkeys(algorithm or "no algorithm" for _, algorithm in same))
        return f"{rule.match}: {rule.decision}: AMCT has it with {choices} alone"
    needs = ", ".join(map(str, usable[0].needs(size)))
    return f"{rule.match}: {rule.decision}: AMCT quantizes by it only layers with {needs}; write it as only_if"


def _weights(one: Combination) -> Plain:
    found: dict[str, Plain] = {"type": one.weights, "symmetric": one.symmetric, "strategy": one.strategy}
    return found if one.group_size is None else found | {"group_size": one.group_size}


def _inputs(one: Combination) -> Plain:
    if one.inputs is None:
        return {"enable_quant": False}
    return {"type": one.inputs, "symmetric": one.input_symmetric, "strategy": one.input_strategy}


def _options(asked: tuple[Algorithm, ...]) -> Plain:
    if not asked or asked[0].name == "gptq":
        return None
    return {"grids_num" if asked[0].name == "awq" else "smooth_strength": _value(asked)}
