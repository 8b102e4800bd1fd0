"""Reading a recipe, or a ``quantization_config``."""

from collections.abc import Mapping
from typing import Final

from graphq.frontends.document import Document, Plain, Section, show
from graphq.frontends.llm_compressor.args import filled, read_args
from graphq.frontends.llm_compressor.presets import Observers
from graphq.frontends.llm_compressor.recipe import STAGE, no_layers, parse_recipe
from graphq.frontends.llm_compressor.schemes import Groups, read_groups, read_ignore
from graphq.spec.rules import Spec

SIGN: Final = (
    "a key that ends in _stage, _modifiers or Modifier, or a quantization_config with quant_method compressed-tensors"
)
_CONFIGS: Final = ("quantization_config", "compression_config")


# Other methods, and the preset that is most like what each is used for.
_OTHERS: Final[Mapping[str, str]] = {
    "gptq": "w4a16+gptq",
    "awq": "w4a16-asym+awq",
    "fp8": "fp8-block or fp8-dynamic",
    "fbgemm_fp8": "fp8-dynamic",
    "mxfp4": "mxfp4a16",
    "modelopt": "nvfp4 or fp8",
    "bitsandbytes": "w8a16 or w4a16",
    "hqq": "w4a16-asym",
    "auto-round": "w4a16",
    "torchao": "w8a8 or w4a16",
    "quark": "fp8",
}


def recognises(document: Document) -> bool:
    """Whether the document is in this dialect; also a checkpoint's configuration for another method, to be refused."""
    root = document.root
    return _is_config(root) or any(_is_config(root.get(key)) for key in _CONFIGS) or _is_recipe(root)


def _is_config(value: Plain) -> bool:
    return isinstance(value, dict) and isinstance(value.get("quant_method"), str)


def _is_recipe(value: Plain) -> bool:
    match value:
        case {"recipe": dict() as recipe}:
            return _is_recipe(recipe)
        case {"modifiers": list() as items}:
            return any(isinstance(item, dict) and _is_recipe(item) for item in items)
        case {"modifiers": dict() as modifiers}:
            return _is_recipe(modifiers)
        case dict():
            return any(STAGE.fullmatch(key) or key.endswith(("_modifiers", "Modifier")) for key in value)
        case _:
            return False


def parse(document: Document) -> Spec:
    """The spec that the recipe or the ``quantization_config`` means. Raises ``SpecError`` with all that is wrong."""
    top = Section(document, document.root)
    key = next((key for key in _CONFIGS if isinstance(document.root.get(key), dict)), None)
    if key is not None and not _is_recipe(document.root):
        document.notes.append(f"{document.prefix(())}of the configuration of a model, {key} alone is read")
        section = top.section(key)
        assert section is not None
        return _read_config(section)
    if _is_config(document.root) or ("config_groups" in document.root and not _is_recipe(document.root)):
        return _read_config(top)
    return parse_recipe(document)


def _read_sparsity(given: Section) -> None:
    """Notes a ``sparsity_config`` whose weights are stored whole, and reports others."""
    value = given.values.get("sparsity_config")
    word = value.get("format") if isinstance(value, dict) else None
    if word == "dense":
        given.unused("sparsity_config", "weights are stored whole, zeros among them")
    elif value not in (None, {}):
        given.report(
            f"sparsity{f' stored as {word}' if isinstance(word, str) else ''} is not supported", "sparsity_config"
        )


def _read_config(section: Section) -> Spec:
    """The ``quantization_config`` of a checkpoint, which says how layers are quantized, and not by what algorithm."""
    document = section.document
    method = section.text("quant_method")
    if method not in (None, "compressed-tensors"):
        preset = f"; the preset {_OTHERS[method]} comes near" if method in _OTHERS else ""
        section.report(
            f"{show(method)} is not compressed-tensors, the one method that is read as a spec{preset}", "quant_method"
        )
        document.finish()
    section.only(
        (
            *("quant_method", "config_groups", "ignore", "kv_cache_scheme", "version", "format"),
            *("quantization_status", "global_compression_ratio", "sparsity_config", "transform_config"),
        )
    )
    given = filled(section)
    for key in ("version", "format", "quantization_status", "global_compression_ratio"):
        if key in given.values:
            given.unused(key, "it describes the checkpoint, not the model")
    _read_sparsity(given)
    if given.values.get("transform_config") not in (None, {}):
        given.report("a checkpoint with rotations is not supported", "transform_config")
    groups = Groups()
    sections = given.section("config_groups", required=True)
    if sections is not None:
        read_groups(sections, "config_groups", Observers(), groups)
    for weights, _ in groups.actorders:
        weights.unused("actorder", "it tells of the algorithm that made the checkpoint")
    cache = read_args(given.section("kv_cache_scheme"), "kv_cache_scheme")
    rules = (*groups.rules(), *read_ignore(given, "", lenient=True))
    attention = groups.attention
    if attention is not None and cache is None:
        cache = attention.k
    if not groups.targets and cache is None and not document.problems:
        section.report("quantizes nothing", "config_groups")
    document.finish()
    notes = tuple(document.notes)
    return Spec(
        rules if groups.targets else no_layers(rules),
        cache=cache,
        attention=attention,
        dialect="llm-compressor",
        notes=notes,
    )
