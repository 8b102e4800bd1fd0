"""The options of a search: what each layer may become."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from graphq.errors import SpecError
from graphq.frontends import load_spec
from graphq.frontends.presets import SCHEMES
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
        option = Option(given if isinstance(given, str) else "", load_spec(given))
    spec = option.spec
    if spec.activations or spec.profile or spec.cache or spec.fallback:
        raise SpecError(
            f"options: {option.name}: an option says how layers are quantized; leave out activations, profile, cache"
            " and fallback"
        )
    return option if option.name else Option(_name_of(spec), spec)


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
    return re.match(r"[a-z0-9_]+(\[[^\]]*\])?(/|$)", text) is not None and not text.endswith((".yaml", ".yml", ".json"))


def _name_of(spec: Spec) -> str:
    plans = [str(rule.decision) for rule in spec.rules if isinstance(rule.decision, Plan)]
    return "; ".join(dict.fromkeys(plans))
