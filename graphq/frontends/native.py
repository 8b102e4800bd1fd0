"""The native YAML form, in both directions: ``parse`` inverts ``print_spec``. docs/specs.md has the grammar."""

import dataclasses
from typing import Final, TypeVar, assert_never, cast, final

import yaml

from graphq.frontends.document import Document, Plain, Section, nearest, show
from graphq.spec.activations import ActivationRule
from graphq.spec.attention import AttentionOperands
from graphq.spec.constraint import Constraint, parse_constraint
from graphq.spec.fallback import Fallback
from graphq.spec.folds import EVERYWHERE, SUBGRAPHS, Folds, kinds_among
from graphq.spec.match import Blocks, Glob, Match, parse_match
from graphq.spec.plan import Decision, KeepFloat, Plan
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Algorithm, Order, Prefix, Rule, Run, Spec

SIGN: Final = "a top-level key graphq"
VERSION: Final = 1
KEPT_BY_RULE: Final = "a rule keeps it float"
_RUN_TEXTS: Final = ("model", "target", "calibration")
_KEYS: Final = (
    *("graphq", "weight", "input", "output", "rules", "activations", "profile", "fallback", "algorithms"),
    *("pipeline", "prefix", "cache", "attention", "run"),
)
_ORDERS: Final[tuple[Order, ...]] = ("sequential", "independent")
_PREFIXES: Final[tuple[Prefix, ...]] = ("quantized", "float")
_Word = TypeVar("_Word", Order, Prefix)


def recognises(document: Document) -> bool:
    """Whether the document is in this dialect."""
    return "graphq" in document.root


def parse(document: Document) -> Spec:
    """The spec that the document writes. Raises ``SpecError`` with everything that is wrong with it."""
    top = Section(document, document.root)
    top.only(_KEYS)
    version = top.integer("graphq", required=True)
    if version not in (None, VERSION):
        top.report(f"{version} is not a version of the form that this graphq reads: write {VERSION}", "graphq")
    rules: list[Rule] = []
    if "weight" in top.values or "input" in top.values:
        plan = _read_plan(top)
        if plan is not None:
            first = "weight" if "weight" in top.values else "input"
            rules.append(Rule(Blocks(), plan, document.origin((first,), first)))
    elif "output" in top.values:
        top.report("is of layers with a weight or an input: write these, too", "output")
    elif "rules" not in top.values:
        top.report("is missing: write rules, or weight and input for all blocks", "rules")
    for index, item in enumerate(top.items("rules")):
        rule = _read_rule(document, item, index)
        if rule is not None:
            rules.append(rule)
    algorithms = [_read_algorithm(document, item, index) for index, item in enumerate(top.items("algorithms"))]
    text = top.text("cache")
    cache = None if text is None else top.made(lambda: parse_quant(text), "cache")
    if top.values.get("rules") == [] and not rules:
        top.report("is empty: the spec quantizes nothing", "rules")
    pipeline = _one_of(top, "pipeline", _ORDERS)
    prefix = _one_of(top, "prefix", _PREFIXES)
    activations = _read_activations(document, top)
    profile = top.text("profile") or ""
    fallback = _read_fallback(top)
    attention = _read_attention(top)
    run = _read_run(top)
    document.finish()
    made = tuple(filter(None, algorithms))
    return Spec(tuple(rules), made, cache, pipeline, prefix, run, activations, profile, fallback, attention)


def _read_attention(top: Section) -> AttentionOperands | None:
    section = top.section("attention")
    if section is None:
        return None
    section.only(("q", "k", "v", "p"))
    before = len(top.document.problems)
    texts = {name: section.text(name) for name in ("q", "k", "v", "p")}
    given = {n: section.made(lambda text=text: parse_quant(text), n) for n, text in texts.items() if text is not None}
    if len(top.document.problems) > before:
        return None
    return top.made(lambda: AttentionOperands(**given), "attention")


def _read_fallback(top: Section) -> Fallback | None:
    section = top.section("fallback")
    if section is None:
        return None
    section.only(("max_ops", "min_sqnr"))
    values = {name: value for name, value in section.values.items() if name in ("max_ops", "min_sqnr")}
    return top.made(lambda: Fallback(**cast(dict[str, int], values)), "fallback")


def _read_activations(document: Document, top: Section) -> tuple[ActivationRule, ...]:
    """What tensors between layers are: one quant for all, or a list of rules."""
    given = top.values.get("activations")
    if isinstance(given, str):
        source = document.origin(("activations",), "activations")
        one = top.made(lambda: ActivationRule(parse_quant(given), source=source), "activations")
        return () if one is None else (one,)
    found: list[ActivationRule] = []
    if given == []:
        top.report("is empty; leave it out", "activations")
    for index, item in enumerate(top.items("activations", ": a quant for all tensors, or a list of rules")):
        at = ("activations", index)
        if not isinstance(item, dict):
            document.report(at, f"{show(item)} is not a mapping with quant or float, and op or module")
            continue
        section = Section(document, item, at)
        section.only(("quant", "float", "op", "module"))
        op, quant, module = section.values.get("op"), section.text("quant"), section.text("module")
        ops = op if isinstance(op, list) else [] if op is None else [op]
        if op == [] or not all(isinstance(kind, str) for kind in ops):
            section.report(f"{show(op)} is not the kind of an op, such as Softmax, or a list of them", "op")
            continue
        keeps = section.boolean("float")
        if (quant is None) == (not keeps):
            section.report("decides nothing: write quant, or float: true" if quant is None else "write quant or float")
            continue
        source = document.origin(at, f"activations[{index}]")
        made = section.made(
            lambda quant=quant, ops=ops, module=module, source=source: ActivationRule(
                None if quant is None else parse_quant(quant),
                tuple(map(str, ops)),
                "*" if module is None else module,
                source,
            ),
            "quant",
        )
        found += [] if made is None else [made]
    return tuple(found)


def _read_run(top: Section) -> Run:
    section = top.section("run")
    if section is None:
        return Run()
    names = [field.name for field in dataclasses.fields(Run)]
    section.only(names)
    values = {name: section.text(name) if name in _RUN_TEXTS else section.integer(name) for name in names}
    run = Run()
    for name, value in values.items():
        if value is not None:
            changed = section.made(lambda name=name, value=value: dataclasses.replace(Run(), **{name: value}), name)
            run = dataclasses.replace(run, **{name: value}) if changed is not None else run
    return run


def _one_of(section: Section, key: str, words: tuple[_Word, ...]) -> _Word:
    """The word under ``key``; the first of ``words`` where it is not given."""
    text = section.text(key)
    if text is not None and text not in words:
        section.report(f"{text!r} is not one of {', '.join(words)}", key)
    return next((word for word in words if word == text), words[0])


def _read_rule(document: Document, item: Plain, index: int) -> Rule | None:
    at = ("rules", index)
    if not isinstance(item, dict):
        document.report(at, f"{show(item)} is not a mapping with match and weight, input or float")
        return None
    section = Section(document, item, at)
    section.only(("match", "weight", "input", "output", "float", "may_match_nothing", "exclusive", "only_if"))
    text = section.text("match", required=True)
    match = None if text is None else section.made(lambda: parse_match(text), "match")
    decision = _read_decision(section)
    may_match_nothing = section.boolean("may_match_nothing")
    exclusive = section.text("exclusive")
    only_if = _read_constraints(section)
    if match is None or decision is None:
        return None
    if may_match_nothing is None:
        may_match_nothing = _may_match_nothing(match, decision)
    source = document.origin(at, f"rules[{index}]")
    return section.made(lambda: Rule(match, decision, source, may_match_nothing, exclusive or "", only_if), "only_if")


def _read_constraints(section: Section) -> tuple[Constraint, ...]:
    found: list[Constraint] = []
    for text in section.items("only_if", " of constraints, such as [K % 64]"):
        if not isinstance(text, str):
            section.report(f"{show(text)} is not a constraint, such as K % 64", "only_if")
            continue
        constraint = section.made(lambda text=text: parse_constraint(text), "only_if")
        found += [constraint] if constraint is not None else []
    return tuple(found)


def _may_match_nothing(match: Match, decision: Decision) -> bool:
    """The default: only a pattern that keeps layers float may."""
    return isinstance(match, Glob) and isinstance(decision, KeepFloat)


def _read_decision(section: Section) -> Decision | None:
    if "float" not in section.values:
        if "weight" in section.values or "input" in section.values:
            return _read_plan(section)
        section.report("decides nothing: write weight, input or float")
        return None
    for key in ("weight", "input", "output"):
        if key in section.values:
            section.report("the rule keeps layers float: write either this or float", key)
    match section.values["float"]:
        case True:
            return KeepFloat(KEPT_BY_RULE)
        case str() as reason:
            return KeepFloat(reason)
        case other:
            section.report(f"{show(other)} is neither true nor the reason", "float")
            return None


def _read_plan(section: Section) -> Plan | None:
    weight, activation = section.text("weight"), section.text("input")
    plans = (
        None if weight is None else section.made(lambda: Plan(weight=parse_quant(weight)), "weight"),
        None if activation is None else section.made(lambda: Plan(input=parse_quant(activation)), "input"),
    )
    match plans:  # None: not there, or wrong and reported
        case Plan() as one, Plan() as other:
            plan = Plan(one.weight, other.input)
        case one, other:
            plan = one or other
    output = section.text("output")
    if output is None or plan is None:
        return plan
    return section.made(lambda: dataclasses.replace(plan, output=parse_quant(output)), "output")


def _read_algorithm(document: Document, item: Plain, index: int) -> Algorithm | None:
    at = ("algorithms", index)
    source = document.origin(at, f"algorithms[{index}]")
    section = Section(document, {}, at)
    match item:
        case str():
            return section.made(lambda: Algorithm(item, source=source))
        case dict() if len(item) == 1:
            (name,) = item
            options = Section(document, item, at).section(name)
            if options is None:
                return None
            scalars: list[tuple[str, str | int | float | bool | None]] = []
            match, folds = _read_matches(options), _read_folds(options)
            for option, value in options.values.items():
                if option in ("match", "folds"):
                    continue
                if isinstance(value, list | dict):
                    options.report(f"{show(value)} is not a single value", option)
                else:
                    scalars.append((option, value))
            return section.made(lambda: Algorithm(name, tuple(scalars), source, match, folds), name)
        case _:
            section.report(f"{show(item)} is neither a name nor a mapping of one name to its options")
            return None


def _read_matches(options: Section) -> tuple[Match, ...]:
    """The layers that an algorithm is for: one match, or a list of them."""
    given = options.values.get("match")
    if "match" not in options.values:
        return ()
    found: list[Match] = []
    for text in given if isinstance(given, list) else [given]:
        if not isinstance(text, str):
            options.report(f"{show(text)} is not a match, such as self_attn", "match")
            continue
        match = options.made(lambda text=text: parse_match(text), "match")
        found += [match] if match is not None else []
    if given == []:
        options.report("is empty: leave it out for every layer that is quantized", "match")
    return tuple(found)


def _read_folds(options: Section) -> Folds:
    """What an algorithm may fold factors into."""
    section = options.section("folds")
    if section is None:
        return EVERYWHERE
    section.only(("kinds", "include", "exclude"))
    texts: dict[str, list[str]] = {}
    for key in ("kinds", "include", "exclude"):
        for index, item in enumerate(section.items(key)):
            if not isinstance(item, str):
                section.report(f"{show(item)} is not a text", key, index)
            elif key == "kinds" and item not in SUBGRAPHS:
                near = nearest(item, SUBGRAPHS)
                section.report(f"{show(item)} is not one of {', '.join(SUBGRAPHS)}{near}", key, index)
            else:
                texts.setdefault(key, []).append(item)
        if section.values.get(key) == [] and key != "exclude":
            section.report("is empty; leave it out for all", key)
    listed = texts.get("kinds", [*SUBGRAPHS])
    kinds = kinds_among(listed)
    include, exclude = (tuple(texts.get(key, default)) for key, default in (("include", ["*"]), ("exclude", [])))
    return options.made(lambda: Folds(kinds or SUBGRAPHS, include, exclude), "folds") or EVERYWHERE


def print_spec(spec: Spec) -> str:
    """The canonical text of the spec. It writes all that takes part in a spec's equality, and no defaults."""
    top: dict[str, Plain] = {"graphq": VERSION, "rules": [_rule(rule) for rule in spec.rules]}
    if spec.algorithms:
        top["algorithms"] = [_algorithm(algorithm) for algorithm in spec.algorithms]
    if spec.pipeline != "sequential":
        top["pipeline"] = spec.pipeline
    if spec.prefix != "quantized":
        top["prefix"] = spec.prefix
    if spec.activations:
        top["activations"] = [_activation_rule(rule) for rule in spec.activations]
    if spec.profile:
        top["profile"] = spec.profile
    if spec.fallback is not None:
        top["fallback"] = dict(spec.fallback.given())
    if spec.cache is not None:
        top["cache"] = str(spec.cache)
    if spec.attention is not None:
        top["attention"] = {name: str(quant) for name, quant in spec.attention.given()}
    run = {name: value for name, value in dataclasses.asdict(spec.run).items() if value not in ("", None)}
    if run:
        top["run"] = run
    return yaml.dump(top, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def _rule(rule: Rule) -> dict[str, Plain]:
    items: dict[str, Plain] = {"match": str(rule.match)}
    match rule.decision:
        case Plan(weight, activation, output):
            for role, quant in (("weight", weight), ("input", activation), ("output", output)):
                if quant is not None:
                    items[role] = str(quant)
        case KeepFloat(reason):
            items["float"] = True if reason == KEPT_BY_RULE else reason
        case _:
            assert_never(rule.decision)
    if rule.may_match_nothing != _may_match_nothing(rule.match, rule.decision):
        items["may_match_nothing"] = rule.may_match_nothing
    if rule.exclusive:
        items["exclusive"] = rule.exclusive
    if rule.only_if:
        items["only_if"] = [str(constraint) for constraint in rule.only_if]
    return items


def _activation_rule(rule: ActivationRule) -> dict[str, Plain]:
    items: dict[str, Plain] = {"float": True} if rule.quant is None else {"quant": str(rule.quant)}
    if rule.ops:
        items["op"] = list(rule.ops)
    if rule.module != "*":
        items["module"] = rule.module
    return items


def _algorithm(algorithm: Algorithm) -> Plain:
    items: dict[str, Plain] = dict(algorithm.options)
    if algorithm.match:
        items["match"] = str(algorithm.match[0]) if len(algorithm.match) == 1 else [str(m) for m in algorithm.match]
    if algorithm.folds != EVERYWHERE:
        items["folds"] = {
            key: [*getattr(algorithm.folds, key)]
            for key in ("kinds", "include", "exclude")
            if getattr(algorithm.folds, key) != getattr(EVERYWHERE, key)
        }
    return {algorithm.name: items} if items else algorithm.name


@final
class _Dumper(yaml.SafeDumper):
    """Writes lists indented below their key, and line breaks as escapes."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def write_text(self, text: str) -> yaml.ScalarNode:
        # Between single quotes PyYAML 6.0.3 writes U+0085 and U+2028 so that they read as spaces.
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.write_text)
