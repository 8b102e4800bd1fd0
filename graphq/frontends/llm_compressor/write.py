"""A spec as a recipe of llm-compressor. What a recipe cannot hold is refused, a line for each thing."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final, TypeVar, final

import yaml

from graphq.errors import SpecError
from graphq.frontends.document import Plain, read_mapping
from graphq.frontends.llm_compressor.args import write_args
from graphq.frontends.llm_compressor.combine import default_pipeline, default_prefix, in_order
from graphq.frontends.llm_compressor.divide import Segment, divide
from graphq.frontends.llm_compressor.recipe import parse_recipe
from graphq.frontends.llm_compressor.targets import read_target, whole_name, write_target
from graphq.frontends.llm_compressor.transforms import write_rounding, write_transform
from graphq.spec.algorithms import at_stage, defaults
from graphq.spec.match import Exact, Kind, Match
from graphq.spec.plan import Decision, KeepFloat, Plan
from graphq.spec.rules import Algorithm, Rule, Spec

T = TypeVar("T")
_RUN: Final = (
    *(("model", "model"), ("calibration", "dataset_path"), ("samples", "num_calibration_samples")),
    ("sequence_length", "max_seq_length"),
)
_HEAD: Final = (
    "# Keys beside the stage are arguments of llm-compressor's oneshot, which it does not read from a recipe.\n"
)


def write(spec: Spec) -> str:
    """The text of a recipe that means the same. Raises ``SpecError`` with a line for each thing that none can hold."""
    problems: list[str] = []
    wanted = _in_targets(spec, problems)
    stage = _stage(wanted, problems)
    top = _arguments(spec, stage, problems)
    if problems:
        raise SpecError([f"llm-compressor: {problem}" for problem in problems])
    text = yaml.dump({**top, "quant_stage": stage}, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
    _check(wanted, {**top, "quant_stage": stage})
    return (_HEAD if top else "") + text


def _in_targets(spec: Spec, problems: list[str]) -> Spec:
    """The spec with matches as targets have them."""
    rules: list[Rule] = []
    for rule in (one for asked in spec.rules for one in _one_kind_each(asked)):
        if rule.only_if:
            problems.append(f"{rule.match}: only_if: {', '.join(map(str, rule.only_if))}: targets have no constraints")
        if rule.exclusive:
            problems.append(f"{rule.match}: exclusive: targets have no such word")
        if rule.may_match_nothing and isinstance(rule.decision, Plan):
            problems.append(f"{rule.match}: may_match_nothing: a target that quantizes may not")
        match = _made(lambda rule=rule: _translated(rule.match), problems)
        if isinstance(match, Exact) and rule.may_match_nothing:
            match = whole_name(match)  # a full name must be there, an expression need not
        rules.append(replace(rule, match=match or Kind("linear")))
    algorithms: list[Algorithm] = []
    for algorithm in spec.algorithms:
        if algorithm.name == "rtn":
            continue  # what happens to every layer that no other rounds
        matches = [_made(lambda match=match: _translated(match), problems) for match in algorithm.match]
        algorithms.append(replace(algorithm, match=tuple(match for match in matches if match is not None)))
    return replace(spec, rules=tuple(rules), algorithms=tuple(algorithms))


def _one_kind_each(rule: Rule) -> list[Rule]:
    if isinstance(rule.match, Kind):
        return [replace(rule, match=Kind(kind)) for kind in rule.match.kinds]
    return [rule]


def _translated(match: Match) -> Match:
    return read_target(write_target(match))


def _made(make: Callable[[], T], problems: list[str]) -> T | None:
    try:
        return make()
    except SpecError as error:
        problems += [problem for problem in error.problems if problem not in problems]
        return None


def _stage(spec: Spec, problems: list[str]) -> dict[str, Plain]:
    """The groups of modifiers: a class stands once in a group, so that a class that comes again opens another."""
    modifiers: list[tuple[str, dict[str, Plain]]] = []
    segments = divide(spec.rules, spec.algorithms)
    transforms = [(index, a) for index, a in enumerate(spec.algorithms) if a.name not in at_stage("round")]
    cache = None if spec.cache is None else spec.cache
    written = None if cache is None else _made(lambda: write_args(cache, "kv_cache_scheme"), problems)
    for number, segment in enumerate(segments):
        place = len(spec.algorithms) if segment.algorithm is None else spec.algorithms.index(segment.algorithm)
        is_last = number == len(segments) - 1
        while transforms and (transforms[0][0] < place or is_last):
            _, transform = transforms.pop(0)
            items = _made(lambda transform=transform: write_transform(transform), problems)
            modifiers += [] if items is None else [items]
        rounding = segment.algorithm
        name, fields = _made(lambda rounding=rounding: write_rounding(rounding), problems) or ("", {})
        fields |= _groups(segment, problems)
        if number == 0 and written is not None:
            fields["kv_cache_scheme"] = {**written}
        modifiers.append((name, fields))
    stage: dict[str, Plain] = {}
    group: dict[str, Plain] = {}
    for name, fields in modifiers:
        if not stage or name in group:
            group = {}
            stage[f"quant_{len(stage)}_modifiers" if stage else "quant_modifiers"] = group
        group[name] = fields
    return stage


def _groups(segment: Segment, problems: list[str]) -> dict[str, Plain]:
    groups: dict[str, Plain] = {}
    by_decision: dict[Decision, list[Plain]] = {}
    for rule in segment.rules:
        by_decision.setdefault(rule.decision, []).append(write_target(rule.match))
    for number, (decision, targets) in enumerate(by_decision.items()):
        scheme = _made(lambda decision=decision: _scheme(decision), problems)
        groups[f"group_{number}"] = {"targets": targets, **(scheme or {})}
    fields: dict[str, Plain] = {"config_groups": groups} if groups else {}
    if segment.ignored:
        fields["ignore"] = [write_target(rule.match) for rule in segment.ignored]
    return fields


def _scheme(decision: Decision) -> dict[str, Plain]:
    if isinstance(decision, KeepFloat):
        return {}
    problems: list[str] = []
    scheme: dict[str, Plain] = {}
    for key, quant in (("weights", decision.weight), ("input_activations", decision.input)):
        if quant is not None:
            role: Any = key
            items = _made(lambda quant=quant, role=role: write_args(quant, role), problems)
            scheme[key] = {**(items or {})}
    if problems:
        raise SpecError(problems)
    return scheme


def _arguments(spec: Spec, stage: dict[str, Plain], problems: list[str]) -> dict[str, Plain]:
    """What stands beside the stage: what oneshot would do differently if it were not told."""
    top: dict[str, Plain] = {}
    for name, key in _RUN:
        if (value := getattr(spec.run, name)) not in ("", None):
            top[key] = value
    others = ("target", "batches", "seed")
    problems += [
        f"run.{name}: oneshot has no argument for it" for name in others if getattr(spec.run, name) not in ("", None)
    ]
    if spec.pipeline != default_pipeline(_planned(stage)):
        top["pipeline"] = spec.pipeline
    if spec.prefix != default_prefix(spec.algorithms):
        top["propagate_error"] = spec.prefix == "quantized"
    return top


def _planned(stage: dict[str, Plain]) -> Iterator[str]:
    """The classes of the modifiers that do something, as reading counts them."""
    for group in stage.values():
        for name, fields in group.items() if isinstance(group, dict) else ():
            groups = fields.get("config_groups") if isinstance(fields, dict) else None
            if not isinstance(groups, dict) or any(isinstance(g, dict) and len(g) > 1 for g in groups.values()):
                yield name


def _check(wanted: Spec, top: dict[str, Plain]) -> None:
    """Raises ``SpecError`` where the recipe means something else, which the precedence of targets may bring about."""
    try:
        found = parse_recipe(read_mapping({**top}))
    except SpecError as error:
        raise SpecError([f"llm-compressor: {problem}" for problem in error.problems]) from None
    for what, one, other in (
        ("the order of rules", _plain(wanted), _plain(found)),
        ("the layers or the order of algorithms", _listed(wanted), _listed(found)),
        ("how blocks are calibrated", (wanted.pipeline, wanted.prefix), (found.pipeline, found.prefix)),
        ("cache and run", (wanted.cache, wanted.run), (found.cache, found.run)),
    ):
        if one != other:
            raise SpecError(f"llm-compressor: {what}: a recipe's modifiers and their targets cannot say it")


def _plain(spec: Spec) -> list[tuple[Match, Decision]]:
    """Matches and decisions, less the words of a reason, and in one order where it makes no difference."""
    float_ = KeepFloat("float")
    return [
        (rule.match, float_ if isinstance(rule.decision, KeepFloat) else rule.decision) for rule in in_order(spec.rules)
    ]


def _listed(spec: Spec) -> list[tuple[str, dict[str, object], tuple[Match, ...]]]:
    return [(a.name, {**defaults(a.name), **dict(a.options)}, a.match) for a in spec.algorithms]


@final
class _Dumper(yaml.SafeDumper):
    """Writes lists indented below their key, without anchors, and line breaks as escapes."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: object) -> bool:
        return True

    def write_text(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.write_text)
