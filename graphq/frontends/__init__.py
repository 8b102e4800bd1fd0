"""The dialects a spec can be written in. ``load_spec`` recognises the dialect; each has a file of its own."""

import os
from collections.abc import Callable, Mapping
from typing import Final, cast

from graphq.errors import SpecError
from graphq.frontends import llmc, native
from graphq.frontends.document import Document, nearest, read_mapping, show
from graphq.frontends.native import print_spec
from graphq.frontends.yaml_text import read_file
from graphq.spec import Spec

__all__ = ["load_spec", "print_spec"]

# name, how it is recognised, the same in words, how it is read; the first that recognises a document reads it
_DIALECTS: Final[tuple[tuple[str, Callable[[Document], bool], str, Callable[[Document], Spec]], ...]] = (
    ("native", native.recognises, native.SIGN, native.parse),
    ("llmc", llmc.recognises, llmc.SIGN, llmc.parse),
)


def load_spec(source: str | os.PathLike[str] | Mapping[str, object] | Spec, dialect: str | None = None) -> Spec:
    """The spec of a YAML file or of a mapping; a ``Spec`` is returned as it is.

    Raises ``SpecError`` with all problems of the source, a line each: ``path:line:key: message``.
    """
    names = [name for name, *_ in _DIALECTS]
    if dialect is not None and dialect not in names:
        raise SpecError(f"{show(dialect)} is not a dialect{nearest(str(dialect), names)} (known: {', '.join(names)})")
    if isinstance(source, Spec):
        return source
    match cast("object", source):
        case Mapping() as mapping:
            document = read_mapping(cast("Mapping[object, object]", mapping))
        case str() | os.PathLike() as path:
            document = read_file(cast("str | os.PathLike[str]", path))
        case _:
            raise SpecError(f"a spec is a path, a mapping or a Spec, not {show(source)}")
    for name, recognises, _, parse in _DIALECTS:
        if name == dialect or (dialect is None and recognises(document)):
            return parse(document)
    looked_for = "; ".join(f"{name}: {sign}" for name, _, sign, _ in _DIALECTS)
    document.report((), f"no dialect is recognised; looked for {looked_for}")
    raise SpecError(document.problems)
