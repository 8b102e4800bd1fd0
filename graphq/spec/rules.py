"""What the user wants, as data: ordered rules over a model's layers, and what they decide.

Rules are ordered and flat: the last rule that matches a layer wins, whole.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, final

from graphq.errors import SpecError
from graphq.spec.activations import ActivationRule
from graphq.spec.attention import AttentionOperands
from graphq.spec.constraint import Constraint, broken
from graphq.spec.fallback import Fallback
from graphq.spec.folds import EVERYWHERE, Folds
from graphq.spec.match import Exact, Layer, Match, Unnamed
from graphq.spec.plan import Decision, KeepFloat, Plan
from graphq.spec.quant import Quant
from graphq.spec.unmatched import unmatched_hint, unnamed_hint

Order = Literal["sequential", "independent"]
Prefix = Literal["quantized", "float"]
SHOWN: Final = 10  # rules without a layer that are told one by one
HINTS: Final = 3  # with the layer that is spelled most like theirs: a second each, where there are 50,000 layers


@final
@dataclass(frozen=True)
class Rule:
    """Layers that match get the decision. ``source``: where the user wrote it, such as ``mix_bits.setting_0``.

    ``may_match_nothing``: a pattern that keeps layers float and matches none is a line in the report, not an error.
    ``exclusive``: two rules that share this word may not both match one layer (empty: the later one wins).
    ``only_if``: a layer that breaks one of these stays float, and the report says which. ``group``: the name of the
    group of layers that it stands for in the spec, which targets that have names for groups keep.
    """

    match: Match
    decision: Decision
    source: str = field(default="", compare=False)
    may_match_nothing: bool = False
    exclusive: str = ""
    only_if: tuple[Constraint, ...] = ()
    group: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.only_if and isinstance(self.decision, KeepFloat):
            raise SpecError("only_if: the rule keeps layers float, whatever they are")


@final
@dataclass(frozen=True)
class Algorithm:
    """An algorithm the spec asks for, by its canonical name (``rtn``, ``awq``, ...), with its options.

    ``match``: the layers it is for, those that any of these matches; none: every layer that is quantized.
    ``folds``: what it may fold factors of channels into.
    """

    name: str
    options: tuple[tuple[str, str | int | float | bool | None], ...] = ()
    source: str = field(default="", compare=False)
    match: tuple[Match, ...] = ()
    folds: Folds = EVERYWHERE

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", self.name):
            raise SpecError(f"{self.name!r} is not an algorithm's name: write lower-case letters, such as awq")
        if len(dict(self.options)) < len(self.options):
            raise SpecError(f"{self.name}: an option is given twice")
        if "match" in dict(self.options):
            raise SpecError(f"{self.name}: match is no option; give the layers as Algorithm(..., match=...)")
        if "folds" in dict(self.options):
            raise SpecError(f"{self.name}: folds is no option; give it as Algorithm(..., folds=...)")
        for option, value in self.options:
            if isinstance(value, float) and not math.isfinite(value):
                raise SpecError(f"{self.name}: {option}: {value} is not a finite number")


@final
@dataclass(frozen=True)
class Run:
    """What a config says about the run, for whoever starts it and says nothing else; empty or None: it does not say.

    ``model``: the directory of the model. ``target``: what to write, by a target's name. ``calibration``: the file or
    directory of text to calibrate on, ``samples`` windows of ``sequence_length`` tokens of it. ``batches``: how many
    batches calibrate. ``seed``: of what an algorithm draws.
    """

    model: str = ""
    target: str = ""
    calibration: str = ""
    samples: int | None = None
    sequence_length: int | None = None
    batches: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("sequence_length", 2), ("batches", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not least <= value < 1 << 63):
                raise SpecError(f"{name}: {value!r} is not a whole number from {least}")


@final
@dataclass(frozen=True)
class Spec:
    """Ordered rules (the last that matches a layer wins, whole), the algorithms, and the KV cache's format.

    ``pipeline``: ``sequential`` runs all algorithms on a block before the next block is calibrated, ``independent``
    runs one after the other over all blocks. ``prefix``: a block is calibrated on what the blocks in front of it give
    as they are by then, ``quantized``, or as they were, ``float``. ``dialect``: the one it was read from.
    ``run``: what it says about the run itself. ``notes``: what the frontend read and has no use for, for the report.
    ``activations``: rules for the tensors between layers; ``profile``: the name of what the artifact is for, which says
    where quantizers stand (``graphq.ir.grids``). With neither, the inputs of layers alone are quantized. ``fallback``:
    how far a search may go that takes ops out of eight bits. ``attention``: how what attention reads is quantized.
    """

    rules: tuple[Rule, ...]
    algorithms: tuple[Algorithm, ...] = ()
    cache: Quant | None = None
    pipeline: Order = "sequential"
    prefix: Prefix = "quantized"
    run: Run = Run()
    activations: tuple[ActivationRule, ...] = ()
    profile: str = ""
    fallback: Fallback | None = None
    attention: AttentionOperands | None = None
    dialect: str = field(default="native", compare=False)
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if not self.rules:
            raise SpecError("the spec has no rules: it quantizes nothing")


@final
@dataclass(frozen=True)
class Resolved:
    """What becomes of one layer, and the rule that decided (None: no rule matched)."""

    layer: Layer
    decision: Decision
    rule: Rule | None


def resolve(
    spec: Spec, layers: Mapping[str, Layer], unnamed: Sequence[Unnamed] = ()
) -> tuple[dict[str, Resolved], tuple[str, ...]]:
    """The decision for every layer by FQN, and lines for the report.

    Raises ``SpecError`` for rules that match none of ``layers``; it says which of ``unnamed`` they would match.
    """
    problems: list[str] = []
    notes: list[str] = list(spec.notes)
    block_count = 1 + max((layer.block for layer in layers.values() if layer.block is not None), default=-1)
    matched: dict[str, Rule] = {}
    claimed: dict[tuple[str, str], Rule] = {}
    lost: list[Rule] = []
    absent: list[str] = []
    for rule in spec.rules:
        where = f"{rule.source}: " if rule.source else ""
        if isinstance(rule.match, Exact):  # a checkpoint's description has one for each of its many layers
            hits = [rule.match.fqn] if rule.match.fqn in layers else []
        else:
            hits = [fqn for fqn, layer in layers.items() if rule.match.matches(layer)]
        for fqn in hits:
            other = claimed.setdefault((rule.exclusive, fqn), rule) if rule.exclusive else rule
            if other is not rule:
                problems.append(f"{where}{rule.match} and {other.source}: {other.match} both claim {fqn}")
                break
            matched[fqn] = rule
        beyond = [b for b in (getattr(rule.match, "blocks", None) or ()) if b >= block_count]
        if beyond:
            have = f"blocks 0 to {block_count - 1}" if block_count else "no repeated blocks"
            hint = "; #a-b is a list, write #a..b for a range"
            problems.append(
                f"{where}{rule.match}: block {', '.join(map(str, beyond))} does not exist: this model has {have}{hint}"
            )
        elif not hits and rule.may_match_nothing:
            notices = absent if isinstance(rule.match, Exact) else notes
            hint = unnamed_hint(rule.match, unnamed) if isinstance(rule.decision, Plan) else ""
            notices.append(f"{where}{rule.match} matches no layer{hint}")
        elif not hits:
            lost.append(rule)
            if len(lost) <= SHOWN:
                hint = unnamed_hint(rule.match, unnamed)
                hint = hint or (unmatched_hint(rule.match, layers) if len(lost) <= HINTS else "")
                problems.append(f"{where}{rule.match} matches no layer{hint}")
    if len(lost) > SHOWN:
        problems.append(f"{len(lost) - SHOWN:,} more rules match no layer, the last: {lost[-1].match}")
    if len(absent) > SHOWN:
        absent[SHOWN - 1 :] = [f"{len(absent) - SHOWN + 1:,} more names match no layer; they would stay float"]
    notes += absent
    if problems:
        raise SpecError(problems)
    resolved: dict[str, Resolved] = {}
    for fqn, layer in layers.items():
        rule = matched.get(fqn)
        if rule is None:
            why = (
                f"{layer.named_only}: quantized only when a rule names it" if layer.named_only else "no rule matches it"
            )
            resolved[fqn] = Resolved(layer, KeepFloat(why), None)
        else:
            why = broken(rule.only_if, layer) if isinstance(rule.decision, Plan) else ""
            resolved[fqn] = Resolved(layer, KeepFloat(why) if why else rule.decision, rule)
    return resolved, tuple(notes)
