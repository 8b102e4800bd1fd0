"""The options of a search: what each layer may become."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from graphq.errors import SpecError
from graphq.frontends import load_spec
from graphq.frontends.presets import SCHEMES
from graphq.spec.formats import find_format
from graphq.spec.match import Blocks
from graphq.spec.plan import KeepFloat, Plan
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Rule, Spec

FLOAT: Final = "float"


@final
@dataclass(frozen=True)
class Option:
    """A spec by which any layer may be quantized, and its name."""

    name: str
    spec: Spec


def read_option(given: str | Spec | Mapping[str, Any]) -> Option:
    """An option from a preset's name, from a weight's text form with or without an input's (``int3/asym/g64``,
    ``int4/g128 x int8/token/dynamic``), from ``float``, or from a spec, as ``load_spec`` takes it.
    """
    if isinstance(given, Spec):
        option = Option(_name_of(given), given)
    elif isinstance(given, str) and given == FLOAT:
        option = Option(FLOAT, Spec((Rule(Blocks(), KeepFloat("of all options best")),)))
    elif isinstance(given, str) and given not in SCHEMES and _is_text_form(given):
        weight, _, activation = given.partition(" x ")
        try:
            plan = Plan(parse_quant(weight.strip()), parse_quant(activation.strip()) if activation else None)
        except SpecError as error:
            raise SpecError(f"options: {given}: {error}") from error
        option = Option(given, Spec((Rule(Blocks(), plan),)))
    else:
        spec = load_spec(given)
        option = Option(given if isinstance(given, str) else _name_of(spec), spec)
    spec = option.spec
    if spec.activations or spec.profile or spec.cache or spec.fallback:
        raise SpecError(
            f"options: {option.name}: an option says how layers are quantized; leave out activations, profile, cache"
            " and fallback"
        )
    return option


def read_options(given: Iterable[str | Spec | Mapping[str, Any]]) -> tuple[Option, ...]:
    """The options in order. Raises ``SpecError`` for fewer than two, for one given twice, and for options whose
    algorithms differ.
    """
    if isinstance(given, str):
        given = given.split(",")
    options = tuple(read_option(one.strip() if isinstance(one, str) else one) for one in given)
    if len(options) < 2:
        raise SpecError(f"options: {len(options)} given; a search chooses among two or more")
    names = [option.name for option in options]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise SpecError(f"options: {twice[0]} is given twice")
    quantizing = [option for option in options if option.name != FLOAT]
    if not quantizing:
        raise SpecError("options: none quantizes")
    for option in quantizing[1:]:
        if option.spec.algorithms != quantizing[0].spec.algorithms:
            raise SpecError(
                f"options: {quantizing[0].name} and {option.name} have other algorithms; a spec has them for all layers"
            )
    return options


def _is_text_form(text: str) -> bool:
    """Whether this is a weight's format, or one and an input's, and not the path of a file."""
    weight, times, _ = text.partition(" x ")
    try:
        return bool(times) or find_format(weight.partition("/")[0]) is not None
    except SpecError:  # a format with a wrong number
        return True


def _name_of(spec: Spec) -> str:
    plans = [
        " if ".join([str(rule.decision), *map(str, rule.only_if)])
        for rule in spec.rules
        if isinstance(rule.decision, Plan)
    ]
    return "; ".join(dict.fromkeys(plans))
