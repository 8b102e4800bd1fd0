"""What to say of a match that no layer has: what these layers are read as, or which name is spelled most like it."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence

from graphq.spec.match import Blocks, Exact, Kind, Layer, Linears, Match, Regex, Unnamed


def unmatched_hint(match: Match, layers: Mapping[str, Layer]) -> str:
    """Why no layer has a match: ``; <name> is read as <layers>`` where it has what these are made of, else ``; did you
    mean <the name most like it>?``; nothing where none comes close.
    """
    if isinstance(match, Blocks | Kind):
        return ""
    forms: dict[str, list[str]] = {}
    for layer in layers.values():
        for source in layer.made_of:
            if match.matches(dataclasses.replace(layer, fqn=source, named_only="")):
                forms.setdefault(source, []).append(layer.fqn)
    for source, names in forms.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"; {source} is read as {', '.join(names[:3])}{more}"
    if isinstance(match, Regex):
        return ""
    text = match.pattern.strip("*.") if isinstance(match, Linears) else str(match).lstrip("=~")
    name, _, blocks = text.partition("#")
    near = nearest_layer(name, layers)
    if near is None:
        return ""
    if near == name and not isinstance(match, Exact):
        return "; other blocks have it" if blocks else ""
    return f"; did you mean {near}?"


def unnamed_hint(match: Match, unnamed: Iterable[Unnamed]) -> str:
    """``; <name> is multiplied by <op>; no rule can name it`` for a match that such a parameter has; else nothing."""
    hits = [found for found in unnamed if match.matches(found.layer)]
    if not hits:
        return ""
    more = f" (and {len(hits) - 1} more)" if len(hits) > 1 else ""
    return f"; {hits[0].layer.fqn} is {hits[0].reason}{more}"


def nearest_layer(name: str, layers: Iterable[str]) -> str | None:
    """The run of segments of any layer's path that is spelled most like ``name``, else the layer, or the end of layers'
    names, that is left of ``name`` without what stands in front; None when none comes close.
    """
    names = list(layers)
    width = name.count(".") + 1
    candidates: dict[str, None] = {}
    for fqn in names:
        segments = fqn.split(".")
        for start in range(max(1, len(segments) - width + 1)):
            candidates[".".join(segments[start : start + width])] = None
    found = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    return found[0] if found else _without_prefix(name, names)


def _without_prefix(name: str, layers: Sequence[str]) -> str | None:
    """``lm_head`` for ``language_model.lm_head``, as a model is called whose language half alone is captured."""
    tail = name.partition(".")[2]
    while tail:
        ends = [fqn for fqn in layers if f".{fqn}".endswith(f".{tail}")]
        if ends:
            return ends[0] if len(ends) == 1 else tail
        tail = tail.partition(".")[2]
    return None
