"""The dialects a spec can be written in: ``load_spec`` reads them, ``write_spec`` and ``convert_spec`` write them."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, cast, final

from graphq.errors import SpecError
from graphq.frontends import amct, llm_compressor, llmc, modelslim, native, presets
from graphq.frontends.convert import Converted, converted
from graphq.frontends.document import Document, nearest, read_mapping, show
from graphq.frontends.json_text import read_json_file
from graphq.frontends.native import print_spec
from graphq.frontends.yaml_text import read_file, read_text
from graphq.spec.match import Layer
from graphq.spec.plan import Plan
from graphq.spec.rules import Spec

__all__ = ["DIALECTS", "Converted", "convert_spec", "load_spec", "print_spec", "write_spec"]


@final
@dataclass(frozen=True)
class _Dialect:
    """How a dialect is recognised, in code and in words; how it is read, and how a spec is written in it."""

    recognises: Callable[[Document], bool]
    sign: str
    parse: Callable[[Document], Spec]
    write: Callable[[Spec], str]


# By name. The first that recognises a document reads it.
_DIALECTS: Final[Mapping[str, _Dialect]] = {
    "native": _Dialect(native.recognises, native.SIGN, native.parse, native.print_spec),
    "llmc": _Dialect(llmc.recognises, llmc.SIGN, llmc.parse, llmc.write),
    "llm-compressor": _Dialect(
        llm_compressor.recognises, llm_compressor.SIGN, llm_compressor.parse, llm_compressor.write
    ),
    "amct": _Dialect(amct.recognises, amct.SIGN, amct.parse, amct.write),
    "modelslim": _Dialect(modelslim.recognises, modelslim.SIGN, modelslim.parse, modelslim.write),
}
DIALECTS: Final = tuple(_DIALECTS)


def load_spec(source: str | os.PathLike[str] | Mapping[str, object] | Spec, dialect: str | None = None) -> Spec:
    """The spec of a YAML or JSON file, its text, a mapping, or a preset's name; a ``Spec`` is returned as it is.

    A name such as ``w4a16`` or ``w4a16+gptq`` is a preset's, even beside a file of that name (write ``./w4a16``).
    Raises ``SpecError`` with all problems of the source, a line each: ``path:line:key: message``.
    """
    if dialect is not None:
        _check_dialect(dialect)
    if isinstance(source, Spec):
        return source
    match cast("object", source):
        case Mapping() as mapping:
            document = read_mapping(cast("Mapping[object, object]", mapping))
        case str() as name if dialect in (None, "native") and presets.is_name(name):
            document = presets.read(name)
        case str() as text if "\n" in text:
            document = read_text(text)
        case str() | os.PathLike() as path:
            is_json = os.fsdecode(cast("str | os.PathLike[str]", path)).lower().endswith(".json")
            document = (read_json_file if is_json else read_file)(cast("str | os.PathLike[str]", path))
        case _:
            raise SpecError(f"a spec is a path, a preset's name, a mapping or a Spec, not {show(source)}")
    for name, known in _DIALECTS.items():
        if name == dialect or (dialect is None and known.recognises(document)):
            return known.parse(document)
    looked_for = "; ".join(f"{name}: {known.sign}" for name, known in _DIALECTS.items())
    document.report((), f"no dialect is recognised; looked for {looked_for}")
    raise SpecError(document.problems)


def write_spec(spec: Spec, dialect: str) -> str:
    """The spec as text in a dialect; reading it gives the same plans and algorithms.

    Raises ``SpecError`` with a line for each thing that the dialect cannot hold: nothing is dropped.
    """
    _check_dialect(dialect)
    _check_activations(spec, dialect)
    return _DIALECTS[dialect].write(spec)


def convert_spec(spec: Spec, dialect: str, layers: Mapping[str, Layer] | None = None, adapt: bool = False) -> Converted:
    """The spec as text in a dialect, as ``write_spec`` has it where that can.

    ``layers``, of a model: where the dialect cannot say the rules, they are written for this model's layers, by name.
    ``adapt``: rounding and options for which the dialect's tool has conventions of its own are replaced by these, and
    what it cannot say of the run is left out; the notes have a line for each. Bits, symmetry, granularity, element
    formats, algorithms and layers never change. Raises ``SpecError`` with a line for each thing that still cannot be.
    """
    _check_dialect(dialect)
    _check_activations(spec, dialect)
    return converted(spec, dialect, _DIALECTS[dialect].write, lambda text: load_spec(text, dialect), layers, adapt)


def _check_activations(spec: Spec, dialect: str) -> None:
    """Raises ``SpecError`` for what only the native form says of the tensors between layers."""
    if dialect == "native":
        return
    problems = [f"{dialect} cannot say activations; leave them out"] if spec.activations else []
    problems += [f"{dialect} cannot say profile: {spec.profile}; leave it out"] if spec.profile else []
    problems += [f"{dialect} cannot say fallback; leave it out"] if spec.fallback else []
    problems += (
        [f"attention: {spec.attention}: {dialect} is not written with it; leave it out"] if spec.attention else []
    )
    for rule in spec.rules:
        if isinstance(rule.decision, Plan) and rule.decision.output is not None:
            problems.append(
                f"{rule.match}: output {rule.decision.output}: {dialect} cannot say an output; leave it out"
            )
    if problems:
        raise SpecError(problems)


def _check_dialect(name: str) -> None:
    if name not in DIALECTS:
        raise SpecError(f"{show(name)} is not a dialect{nearest(str(name), DIALECTS)} (known: {', '.join(DIALECTS)})")
