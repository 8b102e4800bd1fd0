"""Targets and ignores of compressed-tensors as matches, and back (utils/match.py).

A target is ``re:`` and a regular expression that matches a name from its start, a full name, or a class.
"""

import re
from typing import Final

from graphq.errors import SpecError
from graphq.frontends.document import nearest
from graphq.spec.match import Blocks, Exact, Glob, Kind, Linears, Match, Name, Part, Regex

CLASSES: Final[dict[str, Match]] = {
    "Linear": Kind("linear"),
    "LinearBase": Kind("linear"),
    "Embedding": Kind("embedding"),
    "Conv1d": Kind("conv1d"),
    "Conv2d": Kind("conv2d"),
    "Conv3d": Kind("conv3d"),
    "ConvTranspose1d": Kind("conv_transpose1d"),
    "ConvTranspose2d": Kind("conv_transpose2d"),
    "ConvTranspose3d": Kind("conv_transpose3d"),
}
_CLASS: Final = re.compile(r"[A-Z]\w*")
# What may not be put into a larger expression: flags for all of it, numbered and named groups.
_UNJOINABLE: Final = re.compile(r"\(\?[aiLmsux]+\)|\\[1-9]|\(\?P|\(\?\(")
_MOST_REPEATS: Final = 3  # with more, or with repeated groups, an expression may take a very long time to fail
_MOST_CHARACTERS: Final = 200


def read_target(text: str) -> Match:
    """The match that a target means. Raises ``SpecError``."""
    if text.startswith("re:"):
        return Regex(text[3:])
    if text in CLASSES:
        return CLASSES[text]
    if _CLASS.fullmatch(text):
        if is_attention(text):
            raise SpecError(f"{text}: what attention reads is a group of its own, of input_activations alone")
        raise SpecError(
            f"{text}: layers of this class are not known{nearest(text, CLASSES)} (known: {', '.join(CLASSES)}; others"
            " by name, or by re: and a regular expression)"
        )
    return Exact(text)


def is_attention(text: str) -> bool:
    """Whether this is the class of an attention."""
    return _CLASS.fullmatch(text) is not None and "attention" in text.lower()


def is_other_class(text: str) -> bool:
    """Whether this is a class of which graphq quantizes no layer anyhow."""
    return text not in CLASSES and _CLASS.fullmatch(text) is not None


def order(target: tuple[Match, str]) -> tuple[int, tuple[int, ...]]:
    """A key that sorts the targets of one modifier so that a later one stands above an earlier one.

    Full names stand above expressions, these above classes; among expressions the alphabetically first stands above,
    whatever their order in the config.
    """
    match, text = target
    if isinstance(match, Exact):
        return 2, tuple(map(ord, text))  # no two of them match one layer
    falling = (*(-ord(character) for character in text), 1)  # what begins with another target comes before it
    return int(isinstance(match, Regex)), falling


def both(match: Match, ignored: Match) -> Match | None:
    """What matches where both do; None where nothing can. Raises ``SpecError`` where no match says that."""
    match (match, ignored):
        case (one, other) if one == other:
            return other
        case (Kind("linear"), Exact() | Regex()):
            return ignored
        case (Exact() | Regex(), Kind("linear")):
            return match
        case (Kind(), Kind()) | (Exact(), Exact()):
            return None
        case (Exact(fqn) as exact, Regex() as regex) | (Regex() as regex, Exact(fqn) as exact):
            found = matches_at_once(regex, fqn)
            if found is None:
                return join("(?=", [whole_name(exact)], regex)
            return exact if found else None
        case (Regex() as one, Regex() as other):
            return join("(?=", [other], one)
        case _:
            raise SpecError(f"{ignored} ignores what an earlier modifier quantizes by {match}; write one modifier")


def without(match: Match, others: list[Match]) -> Match | None:
    """What ``match`` matches and the others do not; None for nothing. Raises ``SpecError`` where no match says that."""
    taken: dict[Regex, None] = {}
    for other in others:
        if match == other:
            return None
        match (match, other):
            case (Exact(), Exact()):
                pass
            case (Exact(fqn), Regex() as regex) if (found := matches_at_once(regex, fqn)) is not None:
                if found:
                    return None
            case (Regex() as regex, Exact(fqn)) if matches_at_once(regex, fqn) is False:
                pass
            case (Kind("linear") | Exact() | Regex(), Exact() | Regex()):
                taken[_regex(other)] = None
            case _:
                raise SpecError(f"{other} takes layers from {match}; write targets that do not overlap")
    if not taken:
        return match
    own = match if isinstance(match, Regex) else whole_name(match) if isinstance(match, Exact) else Regex(".*")
    return join("(?!", [*reversed(taken)], own)


def join(look: str, ahead: list[Regex], regex: Regex) -> Regex:
    """``regex`` where all of ``ahead`` match, too, or none does: ``look`` is ``(?=`` or ``(?!``."""
    for one in (*ahead, regex):
        if _UNJOINABLE.search(one.pattern):
            raise SpecError(f"{one} overlaps another modifier's targets, and cannot be taken from them")
    body = regex.pattern if regex.pattern == ".*" else f"(?:{regex.pattern})"
    return Regex("".join(f"{look}{one.pattern})" for one in ahead) + body)


def whole_name(match: Exact) -> Regex:
    """The expression for a full name."""
    return Regex(f"{_escape(match.fqn)}$")


def _regex(match: Exact | Regex) -> Regex:
    return match if isinstance(match, Regex) else whole_name(match)


def matches_at_once(regex: Regex, fqn: str) -> bool | None:
    """Whether the expression matches the name; None where to find that out might take too long."""
    pattern = regex.pattern
    if len(fqn) > _MOST_CHARACTERS or len(pattern) > _MOST_CHARACTERS or re.search(r"\)[*+?{]", pattern):
        return None
    if len(re.findall(r"[*+?{]", re.sub(r"\(\?", "(", pattern))) > _MOST_REPEATS:
        return None
    return re.match(pattern, fqn) is not None


def write_target(match: Match) -> str:
    """The target that matches the same layers. Raises ``SpecError`` where there is none."""
    match match:
        case Exact(fqn):
            if _CLASS.fullmatch(fqn):
                raise SpecError(f"{match}: llm-compressor would read {fqn} as a class; write re:{fqn}$")
            return fqn
        case Regex(pattern):
            return f"re:{pattern}"
        case Kind() if len(match.kinds) > 1:
            raise SpecError(f"{match}: a target is for one class; write a rule for each kind")
        case Kind("recurrent"):
            raise SpecError(f"{match}: llm-compressor has no class for one weight of a recurrent layer; write its name")
        case Kind():
            return next(name for name, kind in CLASSES.items() if kind == match)
        case Name(path, blocks):
            return f"re:{_below(blocks)}{_escape(path)}(\\..*)?$"
        case Part(text):
            return f"re:.*{_escape(text)}"
        case Glob(pattern):
            return f"re:{_from_glob(pattern)}$"
        case Linears("*", ()):
            return "Linear"
        case Linears(pattern, but):
            apart = "".join(f"(?!{_glob(one)}$)" for one in but)
            return f"re:{apart}{_glob(pattern)}$"
        case Blocks():
            raise SpecError(
                f"{match}: a target says nothing of repeated blocks; write re: and a regular expression, or kind:linear"
                " and a rule that keeps lm_head float"
            )


def _below(blocks: tuple[int, ...] | None) -> str:
    """What stands in front of a name: anything, or a path whose first number is one of these."""
    if blocks is None:
        return r"(.*\.)?"
    return rf"([^.0-9][^.]*\.)*({'|'.join(map(str, blocks))})\.(.*\.)?"


def _escape(text: str) -> str:
    return re.escape(text).replace(r"\-", "-")


def _from_glob(pattern: str) -> str:
    last = pattern.rpartition(".")[2]
    if set(last) & set("*?["):
        raise SpecError(
            f"{pattern}: it leaves out heads and layers outside of the blocks that it does not spell, which a regular"
            " expression does not; write re: and an expression"
        )
    return _glob(pattern)


def _glob(pattern: str) -> str:
    parts: list[str] = []
    for piece in re.findall(r"\*+|\?|\[!?\]?[^\]]*\]|.", pattern):
        if piece.startswith("*"):
            parts.append(".*")
        elif piece == "?":
            parts.append(".")
        elif piece.startswith("[") and len(piece) > 1:
            inside = piece[1:-1].replace("\\", r"\\")
            parts.append(f"[{'^' + inside[1:] if inside.startswith('!') else inside}]")
        else:
            parts.append(_escape(piece))
    return "".join(parts)
