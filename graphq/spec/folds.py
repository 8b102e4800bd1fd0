"""What an algorithm may fold factors of channels into, where a spec says so."""

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal, final, get_args

from graphq.errors import SpecError

Subgraph = Literal["norm-linear", "linear-linear", "ov", "up-down"]
SUBGRAPHS: Final[tuple[Subgraph, ...]] = get_args(Subgraph)


def kinds_among(words: Iterable[object]) -> tuple[Subgraph, ...]:
    """Those of the kinds that are among the words, in their order."""
    chosen = set(words)
    return tuple(kind for kind in SUBGRAPHS if {kind} <= chosen)


@final
@dataclass(frozen=True)
class Folds:
    """Sources of activations, whose own weights take factors up: by ``kinds`` of subgraphs, and by their names.

    ``norm-linear``: a norm's gain, in front of what reads it. ``ov``: a linear whose channels go through attention, as
    values do. ``up-down``: one whose channels are multiplied by a gate. ``linear-linear``: any other linear or
    convolution. ``include`` and ``exclude``: shell patterns of the sources' full dotted names, ``*`` crosses dots.
    """

    kinds: tuple[Subgraph, ...] = SUBGRAPHS
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        wrong = [kind for kind in self.kinds if kind not in SUBGRAPHS]
        if wrong:
            raise SpecError(f"kinds: {wrong[0]!r} is not one of {', '.join(SUBGRAPHS)}")
        if self.kinds != kinds_among(self.kinds) or not self.kinds:
            raise SpecError(f"kinds: write some of {', '.join(SUBGRAPHS)}, each once and in this order")
        if not self.include:
            raise SpecError("include: is empty; leave it out for every source")
        for name, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if not pattern or " " in pattern or not pattern.isprintable():
                    raise SpecError(f"{name}: {pattern!r} is not a pattern of names, such as *input_layernorm")

    def takes(self, kind: Subgraph, source: str) -> bool:
        """Whether factors may be folded into the ``source`` of a subgraph of this kind."""
        return (
            kind in self.kinds
            and any(fnmatch.fnmatchcase(source, pattern) for pattern in self.include)
            and not any(fnmatch.fnmatchcase(source, pattern) for pattern in self.exclude)
        )

    def __str__(self) -> str:
        kinds = "everything" if self.kinds == SUBGRAPHS else ", ".join(self.kinds)
        of = [] if self.include == ("*",) else ["of", *self.include]
        return " ".join([kinds, *of, *(["but", *self.exclude] if self.exclude else ())])


EVERYWHERE: Final = Folds()
NORMS: Final = Folds(("norm-linear",))
