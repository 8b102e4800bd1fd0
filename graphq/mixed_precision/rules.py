"""A mix of decisions as few rules: the most frequent one for all blocks, and one for each role that has another."""

from collections import Counter
from collections.abc import Mapping

from graphq.errors import SpecError
from graphq.spec.match import Blocks, Exact, Layer, Match, Name
from graphq.spec.plan import Decision, KeepFloat
from graphq.spec.rules import Rule


def compact_rules(decisions: Mapping[str, Decision], layers: Mapping[str, Layer]) -> tuple[Rule, ...]:
    """Rules that decide so on these ``layers``, and on all others of them that they stay float.

    A role is what a layer is called in its block, such as ``mlp.down_proj``. The rules are checked against the layers.
    """
    inside = [fqn for fqn, layer in layers.items() if Blocks().matches(layer)]
    wanted: dict[str, Decision] = {fqn: decisions[fqn] for fqn in decisions}
    common = Counter(wanted[fqn] for fqn in inside if fqn in wanted).most_common(1)
    rules: list[Rule] = []
    base: Decision | None = None
    if common and all(fqn in wanted for fqn in inside):
        base = common[0][0]
        rules.append(Rule(Blocks(), base, "search"))
    by_role: dict[tuple[str, Decision], list[str]] = {}
    for fqn, decision in wanted.items():
        if base is None or decision != base or fqn not in set(inside):
            by_role.setdefault((_role(layers[fqn]), decision), []).append(fqn)
    for (role, decision), members in by_role.items():
        rules += [Rule(match, decision, "search") for match in _matches(role, members, layers)]
    made = tuple(rules)
    _check(made, wanted, layers)
    return made


def _role(layer: Layer) -> str:
    """The part of a layer's name behind the index of its block; outside of blocks the whole name."""
    if layer.block is None:
        return layer.fqn
    segments = layer.fqn.split(".")
    return ".".join(segments[segments.index(str(layer.block)) + 1 :])


def _matches(role: str, members: list[str], layers: Mapping[str, Layer]) -> list[Match]:
    """Matches that these layers have, and no others."""
    if any(layers[fqn].block is None for fqn in members):
        return [Exact(fqn) for fqn in members]
    alike = [fqn for fqn, layer in layers.items() if layer.block is not None and Name(role).matches(layer)]
    if set(alike) == set(members):
        return [Name(role)]
    blocks = {block for fqn in members if (block := layers[fqn].block) is not None}
    match = Name(role, tuple(sorted(blocks)))
    hits = {fqn for fqn in alike if match.matches(layers[fqn])}
    return [match] if hits == set(members) else [Exact(fqn) for fqn in members]


def _check(rules: tuple[Rule, ...], wanted: Mapping[str, Decision], layers: Mapping[str, Layer]) -> None:
    for fqn, layer in layers.items():
        decided = [rule.decision for rule in rules if rule.match.matches(layer)][-1:]
        is_float = not decided or isinstance(decided[0], KeepFloat)
        want = wanted.get(fqn)
        if (want is None or isinstance(want, KeepFloat)) != is_float or (not is_float and decided[0] != want):
            raise SpecError(f"search: {fqn}: no rule says {want}")
