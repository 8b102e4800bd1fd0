"""``algorithm`` of an AMCT config: a name, a set of names, or a mapping of a name to its options."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

from graphq.frontends.amct.table import ALGORITHMS, NO_ALGORITHM
from graphq.frontends.document import Plain, Section, nearest, show

_OPTION: Final = {"awq": "grids_num", "smoothquant": "smooth_strength"}
_MAX_GRIDS: Final = (1 << 32) - 1


@final
@dataclass(frozen=True)
class Chosen:
    """``layers``: the algorithm for layers; empty for none. ``value``: what its option is set to; None: it is not.
    ``cache``: whether the KV cache has its algorithm, quantile.
    """

    layers: str
    value: int | float | None = None
    cache: bool = False


def read_algorithms(top: Section, *, has_cache: bool) -> Chosen | None:
    """What ``algorithm`` names; None, and problems, for what AMCT does not have."""
    if "algorithm" not in top.values:
        return Chosen(NO_ALGORITHM)
    given = top.values["algorithm"]
    named: dict[str, Plain] = {}
    match given:
        case str():
            named[given] = None
        case list():
            for name in given:
                if not isinstance(name, str):
                    top.report(f"{show(name)} is not the name of an algorithm", "algorithm")
                    return None
                named[name] = None
        case dict():
            named |= given
        case _:
            top.report(f"{show(given)} is neither an algorithm's name nor a mapping of it to its options", "algorithm")
            return None
    if not named:
        top.report("is empty: name an algorithm, or leave the key out where there is none", "algorithm")
        return None
    unknown = [name for name in named if name not in ALGORITHMS]
    for name in unknown:
        there = f"{nearest(name, ALGORITHMS)} (there are {', '.join(ALGORITHMS)})"
        top.report(f"{show(name)} is not an algorithm of AMCT's{there}", "algorithm")
    if unknown:
        return None
    layers = [name for name in named if not (has_cache and name == "quantile")] or ["quantile"]
    if len(layers) > 1:
        top.report(
            f"{', '.join(named)}: a layer has one algorithm; AMCT would take the last of them, of a set any of them",
            "algorithm",
        )
        return None
    values = {name: _read_option(top, name, options) for name, options in named.items()}
    return Chosen(layers[0], values[layers[0]], cache=has_cache and "quantile" in named)


def _read_option(top: Section, name: str, options: Plain) -> int | float | None:
    """The value of an algorithm's only option, where it has one that is given."""
    if options is None:
        return None
    if not isinstance(options, dict):
        top.report(f"{show(options)} is not a mapping of options", "algorithm", name)
        return None
    section = Section(top.document, options, (*top.at, "algorithm", name))
    key = _OPTION.get(name)
    if key is None:
        for unknown in options:
            section.report(f"{name} has no options", unknown)
        return None
    section.only((key,))
    return _read_value(section, options, key)


def _read_value(section: Section, options: Mapping[str, Plain], key: str) -> int | float | None:
    if key not in options:
        return None
    value = options[key]
    if key == "grids_num":
        if type(value) is int and 0 < value <= _MAX_GRIDS:
            return value
        section.report(f"{show(value)} is not a whole number from 1 to 2^32 - 1", key)
    elif type(value) is float and 0 < value < 1:
        return value
    else:
        section.report(f"{show(value)} is not a number between 0 and 1, such as 0.5", key)
    return None
