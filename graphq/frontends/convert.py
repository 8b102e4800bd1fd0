"""A spec in another dialect, where need be for one model's layers and by the other tool's own conventions."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, final

from graphq.errors import SpecError
from graphq.frontends.convert_conventions import CONVENTIONS, adapted
from graphq.frontends.convert_layers import bare, plans_of, said_again, scope_of
from graphq.spec.algorithms import defaults
from graphq.spec.match import Layer
from graphq.spec.plan import Plan
from graphq.spec.rules import Algorithm, Spec

_BY_NAME: Final = "the layers are named as this model has them: the text is for this model alone"


@final
@dataclass(frozen=True)
class Converted:
    """A spec's text in another dialect. ``notes``: a line for each thing that is not as it was."""

    text: str
    notes: tuple[str, ...] = ()


@final
@dataclass(frozen=True)
class _Try:
    """A spec to write, what it must mean when it is read again, and what cannot be said in it."""

    spec: Spec
    meant: Spec
    notes: tuple[str, ...]
    problems: tuple[str, ...] = ()


def converted(
    spec: Spec,
    dialect: str,
    write: Callable[[Spec], str],
    read: Callable[[str], Spec],
    layers: Mapping[str, Layer] | None = None,
    adapt: bool = False,
) -> Converted:
    """The spec in ``dialect``, which ``write`` and ``read`` are for; see ``graphq.frontends.convert_spec``."""
    try:
        return Converted(write(spec))
    except SpecError as error:
        problems = [*error.problems]
    for one in _tries(spec, dialect, layers, adapt) if dialect in CONVENTIONS else ():
        try:
            text = write(one.spec)
        except SpecError as error:
            problems = [*(f"{dialect}: {problem}" for problem in one.problems), *error.problems]
            continue
        problems = [*one.problems] or [*_differences(one, read(text), layers)]
        if not problems:
            return Converted(text, one.notes)
        problems = [f"{dialect}: {problem}" for problem in problems]
    raise SpecError([*dict.fromkeys(problems), *_advice(spec, dialect, write, layers, adapt)])


def _tries(spec: Spec, dialect: str, layers: Mapping[str, Layer] | None, adapt: bool) -> Iterator[_Try]:
    """What to write where the spec as it is cannot be, the least changed first."""
    if layers is not None:
        again, problems = said_again(spec, dialect, layers)
        yield _Try(again, spec, (_BY_NAME,), tuple(problems))
    if adapt:
        meant, notes = adapted(spec, dialect)
        yield _Try(meant, meant, notes)
        if layers is not None:
            again, problems = said_again(meant, dialect, layers)
            yield _Try(again, meant, (_BY_NAME, *notes), tuple(problems))


def _differences(one: _Try, again: Spec, layers: Mapping[str, Layer] | None) -> Iterator[str]:
    """What the text means otherwise than it should."""
    meant = one.meant
    before, after = ([a for a in spec.algorithms if a.name != "rtn"] for spec in (meant, again))
    for what, wanted, found in (
        ("pipeline", meant.pipeline, again.pipeline),
        ("prefix", meant.prefix, again.prefix),
        ("cache", meant.cache, again.cache),
        ("run", meant.run, again.run),
        ("algorithms", [*map(_options, before)], [*map(_options, after)]),
    ):
        if wanted != found:
            yield f"{what}: it would be read as {found}, and is {wanted}"
            return
    if layers is None:
        wanted, found = ({r.decision for r in s.rules if isinstance(r.decision, Plan)} for s in (meant, again))
        if wanted != found:
            yield f"plans: they would be read as {'; '.join(sorted(map(str, found)))}"
        return
    wanted, found = plans_of(meant, layers), plans_of(again, layers)
    for fqn in layers:
        if wanted.get(fqn) != found.get(fqn):
            yield f"{fqn}: it would be read as {found.get(fqn) or 'float'}, and is {wanted.get(fqn) or 'float'}"
            return
    for asked, other in zip(before, after, strict=True):
        differ = scope_of(asked, wanted, layers) ^ scope_of(other, found, layers)
        if differ:
            yield f"{asked.name}: its layers cannot be named; one of them is {min(differ)}"


def _options(algorithm: Algorithm) -> tuple[str, dict[str, object], str]:
    return algorithm.name, {**defaults(algorithm.name), **dict(algorithm.options)}, str(algorithm.folds)


def _advice(
    spec: Spec, dialect: str, write: Callable[[Spec], str], layers: Mapping[str, Layer] | None, adapt: bool
) -> list[str]:
    """A line that says what would make it possible."""
    if dialect not in CONVENTIONS or (adapt and layers is not None):
        return []
    names = "with --model MODEL_DIR, layers can be said by their names"
    own = f"with --adapt, in {CONVENTIONS[dialect].tool}'s own conventions"
    other, _ = adapted(spec, dialect)
    if layers is not None:
        again, problems = said_again(other, dialect, layers)
        return [own] if not problems and _is_written(write, [again]) else []
    if not adapt and _is_written(write, [other]):
        return [own]
    if _is_written(write, bare(other if adapt else spec, dialect)):
        return [names]
    return [f"{names}; {own}"] if not adapt and _is_written(write, bare(other, dialect)) else []


def _is_written(write: Callable[[Spec], str], specs: Iterable[Spec]) -> bool:
    """Whether the dialect holds all of these, and there are any."""
    try:
        return len([write(one) for one in specs]) > 0
    except SpecError:
        return False
