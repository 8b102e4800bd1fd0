"""Recipes: modifiers in stages and groups, and oneshot's arguments beside them, as a spec."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, cast

from graphq.frontends.document import Document, Section, nearest, show
from graphq.frontends.llm_compressor.args import filled
from graphq.frontends.llm_compressor.combine import (
    CALIBRATED,
    adopted,
    combine_algorithms,
    combine_rules,
    default_pipeline,
    default_prefix,
)
from graphq.frontends.llm_compressor.modifiers import Modifier, read_modifier
from graphq.frontends.llm_compressor.presets import UNQUANTIZED
from graphq.spec.match import Kind
from graphq.spec.rules import Order, Prefix, Rule, Run, Spec

STAGE: Final = re.compile(r".*_stage(_\d+)?", re.DOTALL)
_RUN: Final[Mapping[str, str]] = {
    "model": "model",
    "dataset_path": "calibration",
    "num_calibration_samples": "samples",
    "max_seq_length": "sequence_length",
}
_ONESHOT: Final = (
    *("config_name", "tokenizer", "processor", "precision", "tie_word_embeddings", "trust_remote_code_model"),
    *("save_compressed", "model_revision", "recipe_args", "clear_sparse_session", "stage", "dataset"),
    *("dataset_config_name", "splits", "batch_size", "data_collator", "shuffle_calibration_samples"),
    *("pad_to_max_length", "text_column", "concatenate_data", "streaming", "overwrite_cache"),
    *("preprocessing_num_workers", "dataloader_num_workers", "min_tokens_per_module", "moe_calibrate_all_experts"),
    *("tracing_ignore", "sequential_targets", "sequential_offload_device", "sequential_targets_per_subgraph"),
    *("sequential_prefetch", "quantization_aware_calibration", "use_loss_mask", "output_dir", "log_dir", "args"),
)


def no_layers(rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of a config that quantizes no layer, but the KV cache."""
    return (Rule(Kind("linear"), UNQUANTIZED), *rules)


def parse_recipe(document: Document) -> Spec:
    """The spec that the recipe means. Raises ``SpecError`` with everything that is wrong with it."""
    top = Section(document, document.root)
    modifiers: list[Modifier] = []
    complete = True  # whether all could be read: what is lacking in others is told only then
    for name, section in _modifiers(top):
        behind = not complete or any(modifier.quantizes for modifier in modifiers)
        read = read_modifier(name, section, behind=behind)
        modifiers += [] if read is None else [read]
        complete = complete and read is not None
    if not modifiers and not document.problems:
        top.report("the recipe has no modifiers: it quantizes nothing")
    _check_sequence(modifiers, complete=complete)
    modifiers = adopted(modifiers) if complete else modifiers
    for modifier in modifiers:
        for weights, _ in modifier.actorders:
            weights.unused("actorder", "GPTQModifier alone orders columns")
    quantizing = [modifier for modifier in modifiers if modifier.quantizes]
    word, prefix = _read_pipeline(top, modifiers)
    rules = combine_rules(quantizing)
    pipeline = word or default_pipeline(m.name for m in modifiers if m.has_plans or not m.quantizes)
    algorithms = combine_algorithms(modifiers, sequential=pipeline == "sequential")
    caches = {modifier.cache: modifier.section for modifier in modifiers if modifier.cache is not None}
    if len(caches) > 1:
        list(caches.values())[-1].report("another modifier has another one", "kv_cache_scheme")
    attentions = {modifier.attention: modifier.section for modifier in modifiers if modifier.attention is not None}
    if len(attentions) > 1:
        list(attentions.values())[-1].report("another modifier quantizes attention in another way")
    attention = next(iter(attentions), None)
    run = _read_run(top)
    document.finish()
    if not any(modifier.rules for modifier in quantizing):
        rules = no_layers(rules)
    return Spec(
        rules,
        algorithms,
        next(iter(caches), None if attention is None else attention.k),
        pipeline,
        prefix or default_prefix(algorithms),
        run,
        attention=attention,
        dialect="llm-compressor",
        notes=tuple(document.notes),
    )


def _check_sequence(modifiers: list[Modifier], *, complete: bool) -> None:
    """Reports modifiers in an order that has no meaning. ``complete``: none is lacking that could not be read."""
    for index, modifier in enumerate(modifiers):
        later = modifiers[index + 1 :]
        if modifier.name == "SpinQuantModifier" and any(m.name != modifier.name for m in modifiers[:index]):
            modifier.section.report("stands behind another modifier; a model is rotated before anything else")
        elif complete and not modifier.quantizes and not any(m.quantizes for m in later):
            modifier.section.report("no modifier behind it quantizes; add a QuantizationModifier or a GPTQModifier")


def _modifiers(top: Section) -> Iterator[tuple[str, Section]]:
    """Every modifier's class and fields, in order, from stages, groups, lists, or right at the top."""
    arguments = () if top.at else (*_RUN, "pipeline", "propagate_error")  # oneshot's: not inside of a recipe
    bare = ""
    for key in top.values:
        if STAGE.fullmatch(key):
            stage = top.section(key)
            yield from _groups(stage) if stage is not None else ()
        elif key.endswith("_modifiers") or key == "modifiers":
            bare = bare or key
            yield from _group(top, key)
        elif key.endswith("Modifier"):
            bare = bare or key
            yield key, _fields(top, key)
        elif key == "recipe" and not top.at:
            recipe = top.section(key)
            yield from _modifiers(recipe) if recipe is not None else ()
        elif key == "args" or (key in _ONESHOT and not top.at):
            top.unused(key, "it steers llm-compressor's own run")
        elif key not in arguments:
            top.report(f"unknown key{nearest(key, (*arguments, *_ONESHOT, 'quant_stage'))}", key)
    if bare:
        top.document.notes.append(
            f"{top.document.prefix((*top.at, bare))}llm-compressor itself reads modifiers below a stage and a group"
            " alone, and ignores others in a file"
        )


def _groups(stage: Section) -> Iterator[tuple[str, Section]]:
    for key in stage.values:
        if key.endswith("_modifiers"):
            yield from _group(stage, key)
        elif key == "modifiers":
            stage.document.notes.append(
                f"{stage.document.prefix((*stage.at, key))}read as a group, as documented; llm-compressor's code"
                " ignores a group of this name"
            )
            yield from _group(stage, key)
        elif key == "run_type":
            if stage.text(key) not in (None, "oneshot"):
                stage.report(f"{show(stage.values[key])} is not supported; write oneshot", key)
        else:
            stage.report("not a group of modifiers; llm-compressor ignores it; write quant_modifiers", key)


def _group(section: Section, key: str) -> Iterator[tuple[str, Section]]:
    value = section.values[key]
    if isinstance(value, list):
        for index, item in enumerate(value):
            if not isinstance(item, dict):
                section.report(f"{show(item)} is not a mapping of a modifier's class to its fields", key, index)
                continue
            one = Section(section.document, item, (*section.at, key, index))
            for name in one.values:
                yield name, _fields(one, name)
        return
    group = section.section(key)
    if group is not None:
        for name in group.values:
            yield name, _fields(group, name)


def _fields(group: Section, name: str) -> Section:
    if group.values[name] is None:
        return Section(group.document, {}, (*group.at, name))
    return group.section(name) or Section(group.document, {}, (*group.at, name))


def _read_pipeline(top: Section, modifiers: list[Modifier]) -> tuple[Order | None, Prefix | None]:
    """``pipeline`` and ``propagate_error``, oneshot's arguments; None where they are not given."""
    given = filled(top)
    word, propagate = given.text("pipeline"), given.boolean("propagate_error")
    prefix: Prefix | None = None
    if propagate is not None:
        prefix = "quantized" if propagate else "float"
        if propagate:
            given.document.notes.append(
                f"{given.document.prefix((*given.at, 'propagate_error'))}blocks are calibrated on what quantized blocks"
                " give, as documented; llm-compressor's code passes on changed weights, and quantizes nothing"
            )
    match word:
        case None | "sequential" | "independent":
            return word, prefix
        case "basic":
            return "sequential", "float"
        case "datafree":
            for modifier in modifiers:
                if modifier.name in CALIBRATED:
                    given.report(f"datafree: {modifier.name} needs data; write sequential or independent", "pipeline")
            return "sequential", prefix
        case _:
            given.report(f"{show(word)} is not supported; write sequential, independent, basic or datafree", "pipeline")
            return None, prefix


def _read_run(top: Section) -> Run:
    given = filled(top)
    values: dict[str, Any] = {}
    for key, name in _RUN.items():
        value = given.integer(key) if name in ("samples", "sequence_length") else given.text(key)
        if value is not None and given.made(lambda n=name, v=value: Run(**cast(Any, {n: v})), key) is not None:
            values[name] = value
    return Run(**values)
