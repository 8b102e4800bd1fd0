"""The layers of a model, and the matches that say which of them a rule or an algorithm is for.

``parse_match`` and ``str`` are inverses; docs/specs.md has the grammar.
"""

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, final, get_args

from graphq.errors import SpecError

MAX_BLOCK: Final = 9999
MAX_SIZE: Final = 10**9 - 1  # of an axis, where a text writes one
LayerKind = Literal[
    "linear",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "recurrent",
    "embedding",
    "expert",
]
KINDS: Final = tuple(kind for kind in get_args(LayerKind) if kind != "expert")  # that a text can name


@final
@dataclass(frozen=True)
class Layer:
    """A layer that a rule can name. ``block``: its position in the model's list of repeated blocks.

    ``named_only``: why it is quantized only by a rule that names it; empty for the others.
    ``shape``: the weight's, channels first (an ``[N, K]`` matrix for a linear, whatever the layout it is stored in).
    ``dtype``: the weight's in the source, by torch's name. ``bias``: whether there is one. ``padding``: its mode.
    ``reads_state``: whether its input is the state inside of a recurrence, which no graph shows. ``made_of``: what the
    source has in its place, by the names that layers of its parameters would have.
    """

    fqn: str
    kind: LayerKind
    shape: tuple[int, ...]
    block: int | None = None
    named_only: Literal["", "embedding", "output head", "router", "outside of the repeated blocks"] = ""
    dtype: str = "float32"
    bias: bool = False
    padding: str = "zeros"
    reads_state: bool = False
    made_of: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class Unnamed:
    """A parameter of two or more axes that is multiplied with an activation, but is no layer that a rule can name.

    ``layer``: what it would be as one; ``reason``: what multiplies by it.
    """

    layer: Layer
    reason: str


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
        if "#" in self.pattern or self.pattern.startswith(("=", "~", "re:", "kind:", "linear:")):
            raise SpecError(
                f"{self.pattern!r}: a pattern takes neither =, ~, re:, kind: or linear: nor #blocks; write a name,"
                " such as down_proj#0-1"
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


@final
@dataclass(frozen=True)
class Regex:
    """Matches full dotted paths that a regular expression matches from their start (``re.match``), as llm-compressor's
    ``re:`` targets. Text form: ``re:.*self_attn.*``. Embeddings and routers only where it spells their last segment.
    """

    pattern: str

    def __post_init__(self) -> None:
        if not self.pattern:
            raise SpecError("re: an empty pattern matches every layer; write re:.*")
        try:
            re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise SpecError(f"re:{self.pattern}: {error}") from error

    def matches(self, layer: Layer) -> bool:
        if layer.named_only in ("embedding", "router") and layer.fqn.rpartition(".")[2] not in self.pattern:
            return False
        return re.match(self.pattern, layer.fqn) is not None

    def __str__(self) -> str:
        return f"re:{self.pattern}"


@final
@dataclass(frozen=True)
class Kind:
    """Matches layers of this kind, or of any of several, wherever they stand, the output head included, and no routers.

    Text form: ``kind:linear``, ``kind:linear|conv2d``. The linears of experts are linears, however a model stores them.
    """

    kind: str

    def __post_init__(self) -> None:
        wrong = [kind for kind in self.kinds if kind not in KINDS]
        if wrong:
            raise SpecError(f"kind: {wrong[0]!r} is not one of {', '.join(KINDS)}")
        if len(set(self.kinds)) < len(self.kinds):
            raise SpecError(f"{self}: write different kinds, or kind:linear for one")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Each of the kinds."""
        return tuple(self.kind.split("|"))

    def matches(self, layer: Layer) -> bool:
        kind = "linear" if layer.kind == "expert" else layer.kind
        return kind in self.kinds and layer.named_only != "router"

    def __str__(self) -> str:
        return f"kind:{self.kind}"


@final
@dataclass(frozen=True)
class Linears:
    """Matches linears, those of experts and the output head included, whose full dotted path has the shell ``pattern``
    (``*`` crosses dots) and none of the patterns ``but``; routers only where ``pattern`` spells their last segment.

    Text form: ``linear:*``, ``linear:*mlp* but *gate *.experts.*``.
    """

    pattern: str
    but: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in (self.pattern, *self.but):
            if not pattern or " " in pattern or not pattern.isprintable():
                raise SpecError(f"linear: {pattern!r} is not a pattern of layers' names, such as *.mlp.*")

    def matches(self, layer: Layer) -> bool:
        if layer.kind not in ("linear", "expert"):
            return False
        if layer.named_only == "router" and layer.fqn.rpartition(".")[2] not in self.pattern:
            return False
        if not fnmatch.fnmatchcase(layer.fqn, self.pattern):
            return False
        return not any(fnmatch.fnmatchcase(layer.fqn, pattern) for pattern in self.but)

    def __str__(self) -> str:
        return " ".join([f"linear:{self.pattern}", *(["but", *self.but] if self.but else ())])


@final
@dataclass(frozen=True)
class Part:
    """Matches every layer whose full dotted path holds this text anywhere. Text form: ``~down``."""

    text: str

    def __post_init__(self) -> None:
        if not self.text or not self.text.isprintable():
            raise SpecError(f"{self.text!r} is no part of a layer's name")

    def matches(self, layer: Layer) -> bool:
        return self.text in layer.fqn

    def __str__(self) -> str:
        return f"~{self.text}"


Match = Name | Exact | Glob | Blocks | Regex | Kind | Linears | Part


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
    """The ``Match`` that ``text`` writes: ``o_proj``, ``o_proj#0-1``, ``=full.name``, ``*.o_proj``, ``blocks``,
    ``re:.*o_proj``, ``kind:linear``, ``kind:linear|conv2d``, ``linear:*mlp* but *gate``, ``~o_pr``.
    """
    if text.startswith("re:"):
        return Regex(text[3:])
    if text.startswith("kind:"):
        return Kind(text[5:])
    if text.startswith("linear:"):
        return _parse_linears(text[7:])
    if text.startswith("~"):
        return Part(text[1:])
    name, mark, blocks = text.partition("#")
    chosen = parse_blocks(blocks) if mark else None
    if name == "blocks":
        return Blocks(chosen)
    if text.startswith("="):
        return Exact(text[1:])
    if set(text) & set("*?["):
        return Glob(text)
    return Name(name, chosen)


def _parse_linears(text: str) -> Linears:
    pattern, *words = text.split(" ")
    if words and (words[0] != "but" or len(words) == 1):
        raise SpecError(f"linear:{text}: write linear:<pattern>, or linear:<pattern> but <pattern> <pattern>...")
    return Linears(pattern, tuple(words[1:]))
