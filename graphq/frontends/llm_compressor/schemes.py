"""Quantization schemes of compressed-tensors: presets, ``scheme`` and ``config_groups``, as rules.

https://github.com/vllm-project/compressed-tensors 0.19, quantization/quant_scheme.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, final

from graphq.frontends.document import KeyPath, Section, nearest, show
from graphq.frontends.llm_compressor.args import filled, read_actorder, read_args
from graphq.frontends.llm_compressor.presets import UNQUANTIZED, Observers, read_preset
from graphq.frontends.llm_compressor.targets import is_attention, is_other_class, order, read_target
from graphq.spec.attention import AttentionOperands
from graphq.spec.formats import Int, Mx, Nvfp4
from graphq.spec.match import Exact, Match
from graphq.spec.plan import Decision, KeepFloat, Plan
from graphq.spec.rules import Rule

IGNORED: Final = KeepFloat("ignore")
FORMATS: Final = (
    *("dense", "int-quantized", "float-quantized", "naive-quantized", "pack-quantized", "nvfp4-pack-quantized"),
    *("mxfp4-pack-quantized", "mxfp8-quantized"),
)
_WITHDRAWN: Final = ("sparse-bitmask", "sparse-24-bitmask", "marlin-24")
SCHEME: Final = ("weights", "input_activations", "output_activations", "format")


@final
@dataclass
class Groups:
    """What the groups of one modifier decide: targets in the order of the config, the words of ``actorder``, and how
    what attention reads is quantized.
    """

    targets: dict[str, tuple[Match, Rule]] = field(default_factory=dict[str, tuple[Match, Rule]])
    actorders: list[tuple[Section, str]] = field(default_factory=list[tuple[Section, str]])
    attention: AttentionOperands | None = None

    def rules(self) -> tuple[Rule, ...]:
        """A rule for each target, in an order in which the last that matches decides."""
        ordered = sorted(((match, text) for text, (match, _) in self.targets.items()), key=order)
        return tuple(self.targets[text][1] for _, text in ordered)


def read_groups(section: Section, name: str, observers: Observers, groups: Groups) -> None:
    """Reads ``config_groups`` into ``groups``."""
    for key in section.values:
        if isinstance(section.values[key], list):
            decision = read_preset(section, key, key, observers)
            _add(section, key, f"{name}.{key}", decision, groups)  # its name is the preset's
            continue
        group = section.section(key)
        if group is None:
            continue
        group.only(("targets", *SCHEME))
        if _is_of_attention(group):
            _read_attention(group, observers, groups)
            continue
        decision = read_scheme(group, observers, groups)
        if "targets" not in group.values:
            group.report("is missing", "targets")
        _add(group, "targets", f"{name}.{key}", decision, groups, key)


def _is_of_attention(group: Section) -> bool:
    """Whether every target is a class of attention."""
    value = group.values.get("targets")
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return bool(texts) and all(isinstance(text, str) and is_attention(text) for text in texts)


def _read_attention(group: Section, observers: Observers, groups: Groups) -> None:
    """Queries, keys and values of every attention, and so its cache, which llm-compressor quantizes with them."""
    given = filled(group)
    for key in ("weights", "output_activations", "format"):
        if key in given.values:
            given.report("is for layers; of attention input_activations alone are quantized", key)
    quant = read_args(given.section("input_activations", required=True), "kv_cache_scheme", observers.input)
    if quant is None:
        return
    found = given.made(lambda: AttentionOperands(quant, quant, quant), "input_activations")
    if found is not None and groups.attention not in (None, found):
        given.report("another group quantizes attention in another way", "targets")
    groups.attention = found


def read_scheme(section: Section, observers: Observers, groups: Groups) -> Decision | None:
    """What weights and input_activations decide; None where they are wrong."""
    given = filled(section)
    before = len(section.document.problems)
    weights, inputs = given.section("weights"), given.section("input_activations")
    weight = read_args(weights, "weights", observers.weights)
    act = read_args(inputs, "input_activations", observers.input)
    if "output_activations" in given.values:
        given.report("quantized outputs are not supported; write null", "output_activations")
    if weights is not None and (word := read_actorder(weights)) is not None:
        groups.actorders.append((weights, word))
    if inputs is not None and inputs.values.get("actorder") is not None:
        inputs.report("is for weights", "actorder")
    if len(section.document.problems) > before:
        return None
    plans = (
        None if weight is None else given.made(lambda: Plan(weight=weight), "weights"),
        None if act is None else given.made(lambda: Plan(input=act), "input_activations"),
    )
    if len(section.document.problems) > before:
        return None
    plan = Plan(weight, act) if any(plans) else None
    _check_format(given, plan)
    return plan or UNQUANTIZED


def _check_format(given: Section, plan: Plan | None) -> None:
    """Reports a storage format that cannot hold the group; notes one that can."""
    word = given.text("format")
    if word is None:
        return
    if word in _WITHDRAWN:
        given.report(f"{word} is withdrawn by compressed-tensors, and not supported", "format")
    elif word not in FORMATS:
        given.report(f"{show(word)} is not the format of a group{nearest(word, FORMATS)}", "format")
    elif word not in (fitting := _formats(plan)):
        what = "what is not quantized" if plan is None else str(plan)
        given.report(f"{word} does not hold {what}; {' or '.join(fitting)} does", "format")
    else:
        given.unused("format", "how a layer is stored follows from its plan and the target")


def _formats(plan: Plan | None) -> tuple[str, ...]:
    """The formats that can store a plan."""
    weight = None if plan is None else plan.weight
    if plan is None or weight is None:
        return ("dense",)
    match weight.format:
        case Int():
            return ("pack-quantized", "naive-quantized", *["int-quantized"] * (plan.input is not None))
        case Nvfp4():
            return ("nvfp4-pack-quantized",)
        case Mx(element):
            return ("mxfp4-pack-quantized",) if element == "float4_e2m1" else ("mxfp8-quantized",)
        case _:
            return ("naive-quantized", *["float-quantized"] * (plan.input is not None))


def _add(section: Section, key: str, source: str, decision: Decision | None, groups: Groups, name: str = "") -> None:
    """Adds the targets under ``key``, of the group of this ``name``. What an earlier group targets, too, is the later
    one's.
    """
    for text, match, at in read_targets(section, key):
        if text in groups.targets:
            section.document.notes.append(
                f"{section.document.prefix(at)}{text} is the target of two groups; the later one's, as llm-compressor"
                " has it"
            )
        if decision is not None:
            origin = section.document.origin(at, source)
            rule = Rule(match, decision, origin, group=name)
            groups.targets[text] = (match, rule)


def add_targets(section: Section, key: str, source: str, decision: Decision | None, groups: Groups) -> None:
    """Adds the targets under ``key``, or every linear where there is none, with one decision."""
    if key not in section.values and decision is not None:
        match = read_target("Linear")
        groups.targets["Linear"] = (match, Rule(match, decision, section.document.origin(section.at, source)))
    else:
        _add(section, key, source, decision, groups)


def read_targets(section: Section, key: str) -> Iterator[tuple[str, Match, KeyPath]]:
    """The targets under ``key``, a text or a list of them, with their matches and places."""
    value = section.values.get(key)
    if isinstance(value, str):
        match = section.made(lambda: read_target(value), key)
        if match is not None:
            yield value, match, (*section.at, key)
        return
    if value == []:
        section.report("names no layer", key)
    for index, text in enumerate(section.items(key, " of names, classes, or re: and a regular expression")):
        if not isinstance(text, str):
            section.report(f"{show(text)} is not a name, a class, or re: and a regular expression", key, index)
            continue
        match = section.made(lambda text=text: read_target(text), key, index)
        if match is not None:
            yield text, match, (*section.at, key, index)


def read_ignore(section: Section, source: str, *, lenient: bool = False) -> tuple[Rule, ...]:
    """A rule for each layer that is left alone. ``lenient``: full names, too, may match nothing."""
    found: dict[str, Rule] = {}
    value = section.values.get("ignore")
    items = [(value, "ignore")] if isinstance(value, str) else []
    if value is not None and not items:
        items = [(item, index) for index, item in enumerate(section.items("ignore", " of names"))]
    for item, place in items:
        keys = ("ignore",) if place == "ignore" else ("ignore", place)
        if not isinstance(item, str):
            section.report(f"{show(item)} is not a name, a class, or re: and a regular expression", *keys)
        elif is_other_class(item):
            at = section.document.prefix((*section.at, *keys))
            section.document.notes.append(f"{at}ignored: graphq quantizes no {item}")
        elif (match := section.made(lambda item=item: read_target(item), *keys)) is not None:
            origin = section.document.origin((*section.at, *keys), f"{source}ignore")
            found[item] = Rule(match, IGNORED, origin, lenient or not isinstance(match, Exact))
    return tuple(found.values())
