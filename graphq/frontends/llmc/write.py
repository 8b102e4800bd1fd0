"""Specs as LLMC configs. What LLMC cannot say is refused by name, a line each.

``quant.weight`` and ``act`` are for all blocks; the settings of ``mix_bits`` stand beside each other, and no layer may
have two; ``ignored_layers`` come last. Rules in an order that makes another decision cannot be written.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, final

import yaml

from graphq.errors import SpecError
from graphq.frontends.document import Plain
from graphq.frontends.llmc.format import Role
from graphq.frontends.llmc.method import write_method
from graphq.frontends.llmc.run import write_run
from graphq.frontends.llmc.tensor import write_hqq, write_tensor
from graphq.spec.match import Blocks, Exact, Name
from graphq.spec.plan import Decision, KeepFloat, Plan
from graphq.spec.quant import Hqq, PerBlock, PerGroup, Quant
from graphq.spec.rules import Rule, Spec

MIX_BITS: Final = "mix_bits"
Place = Literal["setting", "ignored"]


def write(spec: Spec) -> str:
    """The spec as an LLMC config. Raises ``SpecError`` with a line for each thing that LLMC cannot say."""
    method, special, problems = write_method(spec.algorithms)
    if spec.pipeline != "sequential":
        problems.append(f"pipeline: {spec.pipeline}: LLMC goes from block to block")
    if method == "RTN" and spec.prefix != "quantized":
        problems.append(f"prefix: {spec.prefix}: without a method, LLMC calibrates no blocks")
    hqq = _common_hqq(spec) if method == "RTN" else None
    if hqq is not None:
        method, special = "HQQ", {"axis": 1, **write_hqq(hqq)}
    writer = _Writer(problems, hqq is not None)
    quant: dict[str, Plain] = {"method": method}
    base = spec.rules[0]
    is_static = False
    if base.match == Blocks() and isinstance(base.decision, Plan) and base.decision.weight is not None:
        quant |= writer.plan(base.decision, "quant")
        is_static = base.decision.input is not None and not base.decision.input.dynamic
        writer.check_flags(base, exclusive=False)
    else:
        problems.append(f"{base.match}: {base.decision}: LLMC's first word is a weight for all blocks")
    if spec.cache is not None:
        quant["kvcache"] = {"method": "Naive", **writer.tensor(spec.cache, "kvcache", "cache", is_static)}
    if special:
        quant["special"] = special
    if method not in ("RTN", "HQQ") and spec.prefix == "quantized":
        quant["quant_out"] = True
    settings, ignored = writer.rules(spec.rules[1:])
    if settings:
        quant["mix_bits"] = {f"setting_{i}": setting for i, setting in enumerate(settings)}
    before, after, unsaid = write_run(spec.run)
    problems += unsaid
    if problems:
        raise SpecError([f"llmc: {problem}" for problem in problems])
    top = before | {"quant": quant} | ({"ignored_layers": ignored} if ignored else {}) | after
    return yaml.dump(top, Dumper=_Dumper, sort_keys=False, indent=4, width=10**6)


def _common_hqq(spec: Spec) -> Hqq | None:
    """The range of all weights, if it is one of HQQ."""
    found = {r.decision.weight.method for r in spec.rules if isinstance(r.decision, Plan) and r.decision.weight}
    one = found.pop() if len(found) == 1 else None
    return one if isinstance(one, Hqq) else None


@final
@dataclass(frozen=True)
class _Writer:
    """Writes plans and rules; what it cannot write it adds to ``problems``. ``hqq``: it is the method."""

    problems: list[str]
    hqq: bool

    def tensor(self, quant: Quant, role: Role, name: str, static: bool = False) -> dict[str, Plain]:
        written = write_tensor(quant, role, static=static, hqq=self.hqq)
        if isinstance(written, str):
            self.problems.append(f"{name}: {quant}: {written}")
            return {}
        return written

    def plan(self, plan: Plan, name: str) -> dict[str, Plain]:
        """``weight`` and ``act``."""
        if plan.weight is None:
            self.problems.append(f"{name}: input {plan.input}: LLMC quantizes no input without its weight")
            return {}
        found: dict[str, Plain] = {"weight": self.tensor(plan.weight, "weight", f"{name}: weight")}
        if plan.input is not None:
            found["act"] = self.tensor(plan.input, "act", f"{name}: input")
            block = plan.weight.granularity
            if isinstance(block, PerBlock) and plan.input.granularity != PerGroup(block.rows):
                self.problems.append(f"{name}: {plan}: LLMC's blocks take inputs in groups of their size")
        return found

    def check_flags(self, rule: Rule, exclusive: bool) -> None:
        """Reports flags of a rule that a config has no word for."""
        if rule.may_match_nothing:
            self.problems.append(f"{rule.match}: may_match_nothing: a name in an LLMC config must match")
        if rule.only_if:
            self.problems.append(f"{rule.match}: only_if: {', '.join(map(str, rule.only_if))}: LLMC has no constraints")
        if rule.exclusive not in ("", MIX_BITS) or (rule.exclusive and not exclusive):
            self.problems.append(f"{rule.match}: exclusive: {rule.exclusive}: only settings of mix_bits are exclusive")

    def rules(self, rules: Sequence[Rule]) -> tuple[list[Plain], dict[str, Plain]]:
        """The settings of ``mix_bits``, and ``ignored_layers``."""
        placed = list(self._placed(rules))
        for number, (other, where) in enumerate(placed):
            for one, first in placed[:number] if where == "setting" else ():
                if _clash(one, first, other):
                    self.problems.append(
                        f"{other.match} comes after {one.match}: LLMC cannot say which of them decides"
                    )
        settings: list[Plain] = []
        chosen = [rule for rule, place in placed if place == "setting"]
        for (_, decision), group in itertools.groupby(chosen, lambda rule: (rule.source, rule.decision)):
            matches = [rule.match for rule in group]
            settings.append(self._setting(decision, [m for m in matches if isinstance(m, Name)]))
        ignored: dict[str, Plain] = {}
        for rule, place in placed:
            match rule.match:
                case Exact(fqn) if place == "ignored":
                    _add(ignored, "speical_names", fqn)
                case Name(path, blocks) if place == "ignored" and blocks is not None:
                    ignored.setdefault("block_ids", _ranges(blocks))
                    _add(ignored, "layer_names", path)
                case _:
                    pass
        whole = dict.fromkeys(
            b for rule, _ in placed if isinstance(rule.match, Blocks) for b in rule.match.blocks or ()
        )
        if whole:
            ignored = {"block_ids": _ranges(tuple(whole)), **ignored}
        return settings, ignored

    def _placed(self, rules: Sequence[Rule]) -> Iterator[tuple[Rule, Place]]:
        """Where each rule stands. There is one list of blocks to ignore, whole or certain layers of them."""
        kept = [rule for rule in rules if _is_kept(rule)]
        whole = [rule.match for rule in kept if isinstance(rule.match, Blocks)]
        listed = [m.blocks for m in (rule.match for rule in kept) if isinstance(m, Name) and m.blocks is not None]
        for rule in rules:
            place: Place | None = None
            match rule.match:
                case Name(_, blocks):
                    is_listed = _is_kept(rule) and blocks is not None and blocks == listed[0] and not whole
                    place = "ignored" if is_listed else "setting"
                case Exact() if isinstance(rule.decision, KeepFloat):
                    place = "ignored"
                case Blocks(blocks) if isinstance(rule.decision, KeepFloat) and blocks is not None:
                    place = "ignored"
                case _:
                    self.problems.append(f"{rule.match}: {rule.decision}: LLMC cannot name these layers for it")
            if place is not None:
                self.check_flags(rule, exclusive=place == "setting")
                yield rule, place

    def _setting(self, decision: Decision, matches: Sequence[Name]) -> Plain:
        names: list[Plain] = [
            name.path if name.blocks is None else f"{name.path}#{'-'.join(map(str, name.blocks))}" for name in matches
        ]
        setting: dict[str, Plain] = {"layer_name": names, "do_quant": isinstance(decision, Plan)}
        return setting | (self.plan(decision, str(matches[0])) if isinstance(decision, Plan) else {})


def _clash(one: Rule, place: Place, other: Rule) -> bool:
    """Whether a config decides otherwise than ``one``, then the setting ``other``, for a layer that both match."""
    assert isinstance(other.match, Name)
    if place == "setting" and one.exclusive == other.exclusive == MIX_BITS:
        return False
    if isinstance(one.match, Exact):
        return f".{other.match.path}." in f".{one.match.fqn}."
    assert isinstance(one.match, Name | Blocks)
    blocks, others = one.match.blocks, other.match.blocks
    if blocks is not None and others is not None and not {*blocks} & {*others}:
        return False
    if place == "ignored" or isinstance(one.match, Blocks):
        return True
    path, longer = sorted((one.match.path, other.match.path), key=len)
    return f".{path}." in f".{longer}."


def _is_kept(rule: Rule) -> bool:
    return isinstance(rule.decision, KeepFloat) and not rule.exclusive


def _add(ignored: dict[str, Plain], key: str, item: str) -> None:
    items = ignored.setdefault(key, [])
    assert isinstance(items, list)
    items.append(item)


def _ranges(blocks: Sequence[int]) -> list[Plain]:
    """Numbers, and ``a-b`` for runs, as ``block_ids`` has them."""
    words = str(Blocks(tuple(blocks))).partition("#")[2].split("-")
    return [int(word) if word.isdecimal() else word.replace("..", "-") for word in words]


@final
class _Dumper(yaml.SafeDumper):
    """Writes lists in a line, and nothing as an alias. What is not ASCII is escaped, so that it reads as it was."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def write_list(self, items: list[Plain]) -> yaml.SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(list, _Dumper.write_list)
