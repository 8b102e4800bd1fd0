"""``weights``, ``inputs`` and ``kvcache`` of an AMCT config, and those for layers whose name fits a pattern."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, final

from graphq.frontends.amct.table import INPUTS, WEIGHTS
from graphq.frontends.document import Section, nearest, show
from graphq.spec.quant import MAX_GROUP_SIZE

_WEIGHT_STRATEGIES: Final = ("tensor", "channel", "group")
_INPUT_STRATEGIES: Final = ("tensor", "token", "group")
_KINDS: Final = ("weights", "inputs", "kvcache")


@final
@dataclass(frozen=True)
class Weights:
    """What ``weights`` says."""

    type: str
    strategy: str
    symmetric: bool
    group_size: int | None


@final
@dataclass(frozen=True)
class Inputs:
    """What ``inputs`` says; None for inputs that stay float."""

    type: str | None = None
    strategy: str | None = None
    symmetric: bool | None = None


@final
@dataclass(frozen=True)
class Pattern:
    """The sections for layers that fit a pattern: the keys that they stand under, empty where there is none."""

    text: str
    weights: str
    inputs: str


def read_weights(config: Section, key: str) -> Weights | None:
    """The weights that stand under ``key``; None where there are none, or where they are wrong."""
    section = config.section(key)
    if section is None:
        return None
    section.only(("type", "symmetric", "strategy", "group_size"))
    type_ = _word(section, "type", WEIGHTS)
    symmetric = section.boolean("symmetric", required=True)
    strategy = _word(section, "strategy", _WEIGHT_STRATEGIES)
    size = section.integer("group_size")
    is_read = size is not None or "group_size" not in section.values
    if size is not None and not 0 < size <= MAX_GROUP_SIZE:
        section.report(f"{size} is not a whole number from 1", "group_size")
    elif type_ is not None and symmetric is not None and strategy is not None and is_read:
        return Weights(type_, strategy, symmetric, size)
    return None


def read_inputs(config: Section, key: str) -> Inputs | None:
    """The inputs that stand under ``key``, float ones where there are none; None where they are wrong."""
    if key not in config.values:
        return Inputs()
    section = config.section(key)
    if section is None:
        return None
    section.only(("enable_quant", "type", "symmetric", "strategy", "dynamic"))
    enabled = section.boolean("enable_quant")
    if enabled is False:
        for other in section.values:
            if other != "enable_quant":
                section.unused(other, "enable_quant is False")
        return Inputs()
    type_ = _word(section, "type", INPUTS)
    symmetric = section.boolean("symmetric", required=True)
    strategy = _word(section, "strategy", _INPUT_STRATEGIES)
    dynamic = section.boolean("dynamic")
    if dynamic is not None and strategy in ("tensor", "group"):
        section.report(f"is for strategy token alone, not for {strategy}; leave it out", "dynamic")
    elif dynamic is False and strategy == "token":
        section.unused("dynamic", "scales of tokens are computed at run time, as AMCT's deployed layers do")
    if type_ is None or symmetric is None or strategy is None or ("enable_quant" in section.values and not enabled):
        return None
    return Inputs(type_, strategy, symmetric)


def read_cache(config: Section, has_algorithm: bool) -> bool:
    """Whether the KV cache is quantized; there is one way, which ``kvcache`` has to spell out."""
    section = config.section("kvcache")
    if section is None:
        return False
    section.only(("enable_quant", "type", "symmetric", "strategy"))
    if section.boolean("enable_quant") is False:
        for other in section.values:
            if other != "enable_quant":
                section.unused(other, "enable_quant is False")
        return False
    _word(section, "type", ("hifloat8",))
    if section.boolean("symmetric", required=True) is False:
        section.report("False is not supported: AMCT quantizes the cache symmetrically", "symmetric")
    _word(section, "strategy", ("tensor",))
    if not has_algorithm:
        section.report("the cache has the algorithm quantile; add it to algorithm")
    return True


def read_patterns(config: Section) -> list[Pattern]:
    """The patterns of keys such as ``*mlp*.weights``, in order. AMCT takes the weights of the first that fits, and the
    inputs of the first that fits: one list of patterns has to be the beginning of the other, or they would mix.
    """
    found: dict[str, list[str]] = {"weights": [], "inputs": []}
    for key in config.values:
        if key in _KINDS:
            continue
        text, _, kind = key.rpartition(".")
        if kind not in _KINDS or not text:
            config.report(f"unknown key{nearest(kind, _KINDS)}", key)
        elif "*" not in text:
            config.report(f"has no *, and AMCT ignores it; write a pattern, such as *{show(key)[1:-1]}", key)
        elif kind == "kvcache":
            config.report("a cache for some layers is not supported; write kvcache", key)
        else:
            found[kind].append(text)
    weights, inputs = found["weights"], found["inputs"]
    longer, shorter = (weights, inputs) if len(weights) >= len(inputs) else (inputs, weights)
    if shorter != longer[: len(shorter)]:
        config.report(
            "AMCT looks for the first pattern with weights and for the first with inputs apart; write both for each"
            " pattern, in the same order"
        )
        return []
    return [
        Pattern(text, f"{text}.weights" * (place < len(weights)), f"{text}.inputs" * (place < len(inputs)))
        for place, text in enumerate(longer)
    ]


def _word(section: Section, key: str, known: Collection[str]) -> str | None:
    word = section.text(key, required=True)
    if word is not None and word not in known:
        section.report(f"{show(word)} is not one of {', '.join(known)}{nearest(word, known)}", key)
        return None
    return word
