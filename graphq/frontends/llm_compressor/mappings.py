"""The ``mappings`` of AWQModifier and SmoothQuantModifier, as matches of the layers that are scaled."""

from graphq.frontends.document import Plain, Section, show
from graphq.frontends.llm_compressor.schemes import read_targets
from graphq.spec.match import Match


def awq_mappings(given: Section) -> tuple[Match, ...]:
    """The ``balance_layers`` of all mappings; what takes factors up is noted."""
    found: dict[str, Match] = {}
    for index, item in enumerate(given.items("mappings", " of mappings")):
        if not isinstance(item, dict):
            given.report(f"{show(item)} is not a mapping with smooth_layer and balance_layers", "mappings", index)
            continue
        mapping = Section(given.document, item, (*given.at, "mappings", index))
        mapping.only(("smooth_layer", "balance_layers", "activation_hook_target"))
        if mapping.text("smooth_layer", required=True) is not None:
            mapping.unused("smooth_layer", "what takes the factors up is read from the graph")
        if mapping.values.get("activation_hook_target") is not None:
            mapping.unused("activation_hook_target", "what the layers read is read from the graph")
        mapping.items("balance_layers", required=True)
        found |= {text: match for text, match, _ in read_targets(mapping, "balance_layers")}
    return tuple(found.values())


def smooth_mappings(given: Section) -> tuple[Match, ...]:
    """The layers of all pairs of layers and norms; the norms are noted."""
    found: dict[str, Match] = {}
    for index, item in enumerate(given.items("mappings", " of pairs")):
        match item:
            case [list() | str() as balanced, str() | [str()]]:
                pair: dict[str, Plain] = {"0": balanced}
                layers = Section(given.document, pair, (*given.at, "mappings", index))
                found |= {text: match for text, match, _ in read_targets(layers, "0")}
                at = given.document.prefix((*given.at, "mappings", index, 1))
                given.document.notes.append(f"{at}ignored: what takes the factors up is read from the graph")
            case _:
                given.report(f"{show(item)} is not a pair of layers and the norm in front of them", "mappings", index)
    return tuple(found.values())
