"""Reading an LLMC config: the sections ``quant`` (``mix_bits`` among it), ``ignored_layers`` and those of the run."""

import re
from collections.abc import Iterator, Sequence
from typing import Final

from graphq.frontends.document import Document, Plain, Section, nearest, show, spell
from graphq.frontends.llmc.format import Around, read_kind
from graphq.frontends.llmc.method import METHODS, read_method
from graphq.frontends.llmc.run import SECTIONS, read_run
from graphq.frontends.llmc.tensor import read_tensor
from graphq.spec.match import Blocks, Exact, Name, parse_blocks
from graphq.spec.plan import KeepFloat, Plan
from graphq.spec.quant import PerBlock, PerGroup, Quant
from graphq.spec.rules import Prefix, Rule, Spec

SIGN: Final = "a top-level quant with method or weight, or quant or sparse beside base and model"
_MODALITIES: Final = ("vision", "language", "video_gen")
_OTHER_METHODS: Final = {
    "SpinQuant": "learns rotations, which is not supported, and is in no release of LLMC; write Quarot",
    "GPTBRECQ": "is in no release of LLMC; it is TesseraQ there",
}
_QUANT: Final = ("method", "weight", "act", "kvcache", "special", "mix_bits", "quant_out", "tp", "quant_type")


def recognises(document: Document) -> bool:
    """Whether the document is in this dialect."""
    match document.root:
        case {"quant": dict() as quant} if "method" in quant or "weight" in quant:
            return True
        case {"base": _, "model": _}:
            return "quant" in document.root or "sparse" in document.root
        case _:
            return False


def parse(document: Document) -> Spec:
    """The spec that the config means. Raises ``SpecError`` with everything that is wrong with it."""
    top = Section(document, document.root)
    top.only(("quant", "sparse", "ignored_layers", *SECTIONS))
    run = read_run(top)
    if "sparse" in top.values:
        _report_sparse(top)
    quant = top.section("quant", required="sparse" not in top.values)
    base = None if quant is None else _read_modalities(quant)
    ignored = top.section("ignored_layers")
    last = [] if ignored is None else list(_read_ignored_layers(ignored))
    document.finish()
    assert base is not None  # else there was a problem
    notes = tuple(document.notes)
    rules = (*base.rules, *last)
    return Spec(rules, base.algorithms, base.cache, prefix=base.prefix, run=run, dialect="llmc", notes=notes)


def _report_sparse(top: Section) -> None:
    """Reports what ``sparse`` asks for, by the name that LLMC has for it."""
    sparse = top.values["sparse"]
    method = sparse.get("method") if isinstance(sparse, dict) else None
    what = {"TokenReduction": "token reduction", "Dense": "sparsity of the KV cache"}.get(str(method), "sparsity")
    top.report(f"{what} is not supported", "sparse")


def _read_modalities(quant: Section) -> Spec | None:
    """What ``quant`` says, right under it or in a section for each modality, which then all say the same."""
    nested = [key for key in _MODALITIES if key in quant.values]
    if not nested:
        return _read_quant(quant)
    quant.only(_MODALITIES)
    before = len(quant.document.problems)
    found = [None if (one := quant.section(key)) is None else _read_quant(one) for key in nested]
    if len(quant.document.problems) > before:
        return None
    if any(one != found[0] for one in found):
        quant.report(
            f"{' and '.join(nested)} are quantized in two ways, and graphq compiles one model at a time; leave the"
            " section of the model that is compiled"
        )
        return None
    quant.note("read for the whole model that is compiled; LLMC quantizes one modality by it", nested[0])
    return found[0]


def _read_quant(quant: Section) -> Spec | None:
    quant.only((*_QUANT, "token_reduction", "quant_objects"))
    if "quant_objects" in quant.values:
        quant.unused("quant_objects", "the model that is compiled is quantized")
    if quant.values.get("token_reduction") not in (None, {}):
        quant.report("token reduction is not supported", "token_reduction")
    method = quant.text("method", required=True)
    if method is not None and method not in METHODS:
        why = _OTHER_METHODS.get(method, f"is not a method{nearest(method, METHODS)}")
        quant.report(f"{show(method)} {why}", "method")
        method = None
    algorithms, hqq = read_method(quant, method)
    around = Around(method, read_kind(quant), hqq)
    if around.kind is not None:
        quant.note("read as documented; LLMC's code reads it under weight and act alone", "quant_type")
    weight = read_tensor(quant.section("weight", required=True), "weight", around)
    act = read_tensor(quant.section("act"), "act", around)
    cache = _read_cache(quant, act, around)
    plan = None if weight is None else _plan(quant, weight, act)
    settings = list(_read_mix_bits(quant, act, around))
    prefix = _read_prefix(quant, bool(algorithms))
    if "tp" in quant.values:
        quant.unused("tp", "graphq's own way of running holds")
    if plan is None:
        return None
    base = Rule(Blocks(), plan, quant.document.origin(quant.at, spell(quant.at)))
    return Spec((base, *settings), algorithms, cache, prefix=prefix)


def _plan(section: Section, weight: Quant, act: Quant | None) -> Plan | None:
    match weight.granularity:
        case PerBlock(rows) if act is not None and act.granularity != PerGroup(rows):
            section.report(f"with per_block weights, LLMC takes per_group activations with group_size: {rows}", "act")
        case _:
            pass
    return section.made(lambda: Plan(weight, act))


def _read_prefix(quant: Section, has_algorithm: bool) -> Prefix:
    """What blocks are calibrated on: LLMC's default are the outputs of float blocks."""
    quantized = quant.boolean("quant_out")
    if has_algorithm:
        return "quantized" if quantized else "float"
    if quantized is not None:
        quant.unused("quant_out", "graphq's own way of running holds")
    return "quantized"


def _read_cache(quant: Section, act: Quant | None, around: Around) -> Quant | None:
    section = quant.section("kvcache")
    if section is None:
        return None
    cache = section.text("method", required=True)
    if cache is not None and cache != "Naive":
        section.report(f"{show(cache)} is not supported; write Naive", "method")
    for key in ("special", "residual_length"):
        if section.values.get(key) not in (None, {}):
            section.report("options of other caches than Naive are not supported", key)
    return read_tensor(section, "kvcache", around, static=act is not None and not act.dynamic)


def _read_mix_bits(quant: Section, act: Quant | None, around: Around) -> Iterator[Rule]:
    section = quant.section("mix_bits")
    if section is None:
        return
    quant.note("read as documented; LLMC's code ignores it since May 2025", "mix_bits")
    names = section.values
    for key in names:
        if not re.fullmatch(r"setting_(0|[1-9][0-9]{0,4})", key):
            section.report("unknown key; settings are named setting_0, setting_1, ...", key)
    gap = next(i for i in range(len(names) + 1) if f"setting_{i}" not in names)
    if gap < len(names):
        section.report(f"setting_{gap} is missing: settings are numbered from 0 without a gap")
    for key in sorted(names, key=lambda name: (len(name), name)):
        setting = section.section(key)
        if setting is not None:
            yield from _read_setting(setting, f"mix_bits.{key}", act, around)


def _read_setting(setting: Section, name: str, base_act: Quant | None, around: Around) -> Iterator[Rule]:
    setting.only(("layer_name", "do_quant", "weight", "act"))
    decision: Plan | KeepFloat | None = None
    do_quant = setting.boolean("do_quant", required=True)
    if do_quant is False:
        decision = KeepFloat(f"{name}: do_quant False")
        for key in ("weight", "act"):
            if key in setting.values:
                setting.unused(key, "do_quant is False")
    elif do_quant:
        weight = read_tensor(setting.section("weight", required=True), "weight", around)
        act = _read_setting_act(setting, base_act, around)
        decision = None if weight is None else _plan(setting, weight, act)
    source = setting.document.origin(setting.at, name)
    for index, item in _strings(setting, "layer_name", required=True):
        match = setting.made(lambda item=item: _parse_layer_name(item), "layer_name", index)
        if match is not None and decision is not None:
            yield Rule(match, decision, source, exclusive="mix_bits")


def _read_setting_act(setting: Section, base_act: Quant | None, around: Around) -> Quant | None:
    match setting.values.get("act", "none"):
        case "none":
            return None
        case "inherit":
            if base_act is None:
                setting.report("quant has no act to inherit", "act")
            return base_act
        case dict():
            return read_tensor(setting.section("act"), "act", around)
        case other:
            setting.report(f"{show(other)} is not a mapping, inherit or none", "act")
            return None


def _parse_layer_name(item: str) -> Name:
    name, mark, blocks = item.partition("#")
    return Name(name, parse_blocks(blocks) if mark else None)


def _read_ignored_layers(section: Section) -> Iterator[Rule]:
    section.only(("block_ids", "layer_names", "speical_names"))

    def rule(match: Blocks | Name | Exact, key: str) -> Rule:
        source = section.document.origin((*section.at, key), f"ignored_layers.{key}")
        return Rule(match, KeepFloat(f"ignored_layers: {key}"), source)

    blocks: dict[int, None] = {}
    for index, item in enumerate(section.items("block_ids", ", such as [0, 2-5]")):
        blocks.update(dict.fromkeys(_parse_block_id(section, item, index)))
    names = [item for _, item in _strings(section, "layer_names")]
    if names and not section.values.get("block_ids"):
        section.report(
            "has no effect in LLMC without block_ids; list the blocks, or write full speical_names", "layer_names"
        )
    if blocks and not names:
        yield rule(Blocks(tuple(blocks)), "block_ids")
    for index, name in enumerate(names):
        match = section.made(lambda name=name: Name(name, tuple(blocks) or None), "layer_names", index)
        if match is not None:
            yield rule(match, "layer_names")
    for index, name in _strings(section, "speical_names"):
        exact = section.made(lambda name=name: Exact(name), "speical_names", index)
        if exact is not None:
            yield rule(exact, "speical_names")


def _parse_block_id(section: Section, item: Plain, index: int) -> Sequence[int]:
    """The blocks of a number, or of ``a-b``: a range that holds both ends, though mix_bits writes a list so."""
    found = re.fullmatch(r"([0-9]{1,4})(-([0-9]{1,4}))?", str(item))
    if not found:
        section.report(f"{show(item)} is neither a block's number nor a range such as 2-5", "block_ids", index)
        return ()
    first, last = int(found[1]), int(found[3] or found[1])
    if last < first:
        section.report(f"the range {item} is empty; write {last}-{first}", "block_ids", index)
    return range(first, last + 1)


def _strings(section: Section, key: str, *, required: bool = False) -> Iterator[tuple[int, str]]:
    """The strings of the list at ``key``, with their positions."""
    value = section.values.get(key)
    hint = f" of names; write [{value}]" if isinstance(value, str) else " of names"
    items = section.items(key, hint, required=required)
    if required and value == []:
        section.report("names no layer", key)
    for index, item in enumerate(items):
        if isinstance(item, str):
            yield index, item
        else:
            section.report(f"{show(item)} is not a layer name", key, index)
