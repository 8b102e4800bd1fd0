"""What the user wants, as data: the layers of a model, ordered rules over them, and what they decide.

Rules are ordered and flat: the last rule that matches a layer wins, whole.
"""

import difflib
import fnmatch
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, final

from graphq.errors import SpecError
from graphq.plan import Decision, KeepFloat
from graphq.quant import Quant

MAX_BLOCK: Final = 9999
Order = Literal["sequential", "independent"]
Prefix = Literal["quantized", "float"]
LayerKind = Literal["linear", "conv1d", "conv2d", "embedding", "expert"]


@final
@dataclass(frozen=True)
class Layer:
    """A layer that a rule can name. ``block``: its position in the model's list of repeated blocks.

    ``named_only``: why it is quantized only by a rule that names it; empty for the others.
    ``shape``: the weight's, channels first (an ``[N, K]`` matrix for a linear, whatever the layout it is stored in).
    """

    fqn: str
    kind: LayerKind
    shape: tuple[int, ...]
    block: int | None = None
    named_only: Literal["", "embedding", "output head", "router", "outside of the repeated blocks"] = ""


@final
@dataclass(frozen=True)
class Name:
    """Matches layers whose path holds ``path`` as a run of whole segments, in these ``blocks`` (None: anywhere).

    Text form: ``mlp.down_proj`` or ``mlp.down_proj#0-1-28..31`` (a list of block indices, ranges inclusive).
    """

    path: str
    blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", self.path):
            raise SpecError(f"{self.path!r} is not a layer name: write dotted segments, such as mlp.down_proj")
        if self.path == "blocks":
            raise SpecError(
                "blocks stands for all layers of the repeated blocks; write *.blocks.* for layers below that name"
            )
        _check_blocks(self.path, self.blocks)

    def matches(self, layer: Layer) -> bool:
        if self.blocks is not None and layer.block not in self.blocks:
            return False
        if f".{self.path}." not in f".{layer.fqn}.":
            return False
        return not layer.named_only or f".{layer.fqn}".endswith(f".{self.path}")

    def __str__(self) -> str:
        return self.path if self.blocks is None else f"{self.path}#{'-'.join(map(_print_run, _runs(self.blocks)))}"


@final
@dataclass(frozen=True)
class Exact:
    """Matches the one layer of this full dotted path."""

    fqn: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", self.fqn):
            raise SpecError(
                f"{self.fqn!r} is not a layer name: write dotted segments, such as model.layers.0.mlp.down_proj"
            )

    def matches(self, layer: Layer) -> bool:
        return layer.fqn == self.fqn

    def __str__(self) -> str:
        return f"={self.fqn}"


@final
@dataclass(frozen=True)
class Glob:
    """Matches full dotted paths by shell wildcards; ``*`` crosses dots."""

    pattern: str

    def __post_init__(self) -> None:
        if not set(self.pattern) & set("*?["):
            raise SpecError(f"{self.pattern!r} has no wildcard; write it as a name")
        if "#" in self.pattern or self.pattern.startswith("="):
            raise SpecError(
                f"{self.pattern!r}: a pattern takes neither = nor #blocks; write a name, such as down_proj#0-1"
            )

    def matches(self, layer: Layer) -> bool:
        if layer.named_only and layer.fqn.rpartition(".")[2] not in self.pattern:
            return False
        return fnmatch.fnmatchcase(layer.fqn, self.pattern)

    def __str__(self) -> str:
        return self.pattern


@final
@dataclass(frozen=True)
class Blocks:
    """Matches what is quantized when no rule names it: every layer in the repeated blocks, or every layer of a model
    without repeated blocks; but no ``named_only`` one. ``blocks`` restricts it to these indices.
    """

    blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_blocks("blocks", self.blocks)

    def matches(self, layer: Layer) -> bool:
        return not layer.named_only and (self.blocks is None or layer.block in self.blocks)

    def __str__(self) -> str:
        return "blocks" if self.blocks is None else f"blocks#{'-'.join(map(_print_run, _runs(self.blocks)))}"


Match = Name | Exact | Glob | Blocks


def _check_blocks(name: str, blocks: tuple[int, ...] | None) -> None:
    if blocks is None:
        return
    if not blocks or len(set(blocks)) < len(blocks) or not all(type(b) is int and 0 <= b <= MAX_BLOCK for b in blocks):
        raise SpecError(f"{name}: block indices {blocks} are not a list of different numbers from 0 to {MAX_BLOCK}")


def parse_blocks(text: str) -> tuple[int, ...]:
    """Block indices of ``0-1-28..31``: a list joined by ``-``; ``a..b`` is a range that holds both ends."""
    blocks: dict[int, None] = {}
    for item in text.split("-"):
        found = re.fullmatch(r"(\d{1,4})(\.\.(\d{1,4}))?", item)
        if not found:
            raise SpecError(f"#{text}: {item!r} is not a block index; write #2-7 for blocks 2 and 7, #2..7 for 2 to 7")
        first, last = int(found[1]), int(found[3] or found[1])
        if last < first:
            raise SpecError(f"#{text}: the range {item} is empty; write #{last}..{first}")
        blocks.update(dict.fromkeys(range(first, last + 1)))
    return tuple(blocks)


def _runs(blocks: Iterable[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and block == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], block)
        else:
            runs.append((block, block))
    return runs


def _print_run(run: tuple[int, int]) -> str:
    first, last = run
    return str(first) if first == last else f"{first}-{last}" if last == first + 1 else f"{first}..{last}"


def parse_match(text: str) -> Match:
    """The ``Match`` that ``text`` writes: ``o_proj``, ``o_proj#0-1``, ``=full.name``, ``*.o_proj``, ``blocks``."""
    name, mark, blocks = text.partition("#")
    chosen = parse_blocks(blocks) if mark else None
    if name == "blocks":
        return Blocks(chosen)
    if text.startswith("="):
        return Exact(text[1:])
    if set(text) & set("*?["):
        return Glob(text)
    return Name(name, chosen)


@final
@dataclass(frozen=True)
class Rule:
    """Layers that match get the decision. ``source``: where the user wrote it, such as ``mix_bits.setting_0``.

    ``may_match_nothing``: a pattern that keeps layers float and matches none is a line in the report, not an error.
    ``exclusive``: two rules that share this word may not both match one layer (empty: the later one wins).
    """

    match: Match
    decision: Decision
    source: str = field(default="", compare=False)
    may_match_nothing: bool = False
    exclusive: str = ""


@final
@dataclass(frozen=True)
class Algorithm:
    """An algorithm the spec asks for, by its canonical name (``rtn``, ``awq``, ...), with its options.

    ``match``: the layers it is for, those that any of these matches; none: every layer that is quantized.
    """

    name: str
    options: tuple[tuple[str, str | int | float | bool | None], ...] = ()
    source: str = field(default="", compare=False)
    match: tuple[Match, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", self.name):
            raise SpecError(f"{self.name!r} is not an algorithm's name: write lower-case letters, such as awq")
        if len(dict(self.options)) < len(self.options):
            raise SpecError(f"{self.name}: an option is given twice")
        if "match" in dict(self.options):
            raise SpecError(f"{self.name}: match is no option; give the layers as Algorithm(..., match=...)")
        for option, value in self.options:
            if isinstance(value, float) and not math.isfinite(value):
                raise SpecError(f"{self.name}: {option}: {value} is not a finite number")


@final
@dataclass(frozen=True)
class Spec:
    """Ordered rules (the last that matches a layer wins, whole), the algorithms, and the KV cache's format.

    ``pipeline``: ``sequential`` runs all algorithms on a block before the next block is calibrated, ``independent``
    runs one after the other over all blocks. ``prefix``: a block is calibrated on what the blocks in front of it give
    as they are by then, ``quantized``, or as they were, ``float``. ``dialect``: the one it was read from.
    ``notes``: what the frontend read and has no use for, for the report.
    """

    rules: tuple[Rule, ...]
    algorithms: tuple[Algorithm, ...] = ()
    cache: Quant | None = None
    pipeline: Order = "sequential"
    prefix: Prefix = "quantized"
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


def resolve(spec: Spec, layers: Mapping[str, Layer]) -> tuple[dict[str, Resolved], tuple[str, ...]]:
    """The decision for every layer by FQN, and lines for the report. Raises ``SpecError`` for rules without a match."""
    problems: list[str] = []
    notes: list[str] = list(spec.notes)
    block_count = 1 + max((layer.block for layer in layers.values() if layer.block is not None), default=-1)
    matched: dict[str, Rule] = {}
    claimed: dict[tuple[str, str], Rule] = {}
    for rule in spec.rules:
        where = f"{rule.source}: " if rule.source else ""
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
            notes.append(f"{where}{rule.match} matches no layer")
        elif not hits:
            name, _, blocks = str(rule.match).lstrip("=").partition("#")
            near = nearest_layer(name, layers)
            if near is None:
                hint = ""
            elif blocks and near == name:
                hint = "; other blocks have it"
            else:
                hint = f"; did you mean {near}?"
            problems.append(f"{where}{rule.match} matches no layer{hint}")
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
            resolved[fqn] = Resolved(layer, rule.decision, rule)
    return resolved, tuple(notes)


def nearest_layer(name: str, layers: Iterable[str]) -> str | None:
    """The run of segments of any layer's path that is spelled most like ``name``; None when none comes close."""
    width = name.count(".") + 1
    candidates: dict[str, None] = {}
    for fqn in layers:
        segments = fqn.split(".")
        for start in range(max(1, len(segments) - width + 1)):
            candidates[".".join(segments[start : start + width])] = None
    found = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return found[0] if found else None
