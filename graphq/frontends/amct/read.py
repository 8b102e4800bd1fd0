"""Reading an AMCT config: the combination that it names, and the layers that it skips."""

from typing import Final

from graphq.frontends.amct.algorithm import Chosen, read_algorithms
from graphq.frontends.amct.plan import CACHE, algorithm_of, plan_of
from graphq.frontends.amct.table import NO_ALGORITHM, Combination, legal, nearest_legal
from graphq.frontends.amct.tensor import Inputs, Weights, read_cache, read_inputs, read_patterns, read_weights
from graphq.frontends.amct.write import EVERY_LAYER, MAX_BATCHES, NO_WEIGHTS, skipped
from graphq.frontends.document import Document, Section, show
from graphq.spec.match import Glob, Kind, Match, Part
from graphq.spec.plan import KeepFloat
from graphq.spec.rules import Algorithm, Rule, Run, Spec

SIGN: Final = "a top-level quant_cfg"
_KEYS: Final = ("batch_num", "quant_cfg", "algorithm", "skip_layers")


def recognises(document: Document) -> bool:
    """Whether the document is in this dialect."""
    return "quant_cfg" in document.root


def parse(document: Document) -> Spec:
    """The spec that the config means. Raises ``SpecError`` with everything that is wrong with it."""
    top = Section(document, document.root)
    top.only(_KEYS)
    batches = top.integer("batch_num")
    if batches is not None and not 0 < batches <= MAX_BATCHES:
        top.report(f"{batches} is not a whole number from 1 to 2^32 - 1", "batch_num")
    config = top.section("quant_cfg", required=True)
    chosen = read_algorithms(top, has_cache=config is not None and "kvcache" in config.values)
    has_cache = config is not None and read_cache(config, chosen is None or chosen.cache)
    rules = [] if config is None else _read_rules(config, chosen, has_cache)
    kept = _read_skipped(top)
    document.finish()
    algorithms: list[Algorithm] = []
    if chosen is not None:
        made = algorithm_of(chosen.layers, chosen.value, document.origin(("algorithm",), "algorithm"))
        algorithms += [made] if made is not None else []
    return Spec(
        (*rules, *kept),
        tuple(algorithms),
        CACHE if has_cache else None,
        prefix="float" if algorithms else "quantized",
        run=Run(batches=batches),
        dialect="amct",
        notes=tuple(document.notes),
    )


def _read_skipped(top: Section) -> list[Rule]:
    """A rule for each text of ``skip_layers``: a layer whose name holds it stays float."""
    if isinstance(top.values.get("skip_layers"), str):
        text = top.values["skip_layers"]
        top.report(
            f"{show(text)} is one text, and AMCT takes its letters one by one; write [{show(text)}]", "skip_layers"
        )
        return []
    found: list[Rule] = []
    for index, text in enumerate(top.items("skip_layers", " of parts of layers' names, such as [lm_head]")):
        if not isinstance(text, str):
            top.report(f"{show(text)} is not a part of a layer's name", "skip_layers", index)
            continue
        match = top.made(lambda text=text: Part(text), "skip_layers", index)
        if match is not None:
            source = top.document.origin(("skip_layers", index), f"skip_layers[{index}]")
            found.append(Rule(match, skipped(text), source, may_match_nothing=True))
    return found


def _read_rules(config: Section, chosen: Chosen | None, has_cache: bool) -> list[Rule]:
    """The rule for all layers, then those of patterns, of which AMCT takes the first that fits: the last here."""
    patterns = read_patterns(config)
    weights = read_weights(config, "weights")
    inputs = read_inputs(config, "inputs")
    rules: list[Rule] = []
    if "weights" in config.values:
        rules += _rule(config, "weights", EVERY_LAYER, weights, inputs, chosen)
    else:
        rules.append(Rule(Kind("linear"), KeepFloat(NO_WEIGHTS), may_match_nothing=True))
        if not any(pattern.weights for pattern in patterns):
            _check_cache_alone(config, chosen, has_cache)
    for pattern in reversed(patterns):
        key = pattern.weights or pattern.inputs
        match = config.made(lambda pattern=pattern: Glob(pattern.text), key)
        own = read_weights(config, pattern.weights) if pattern.weights else weights
        what = read_inputs(config, pattern.inputs) if pattern.inputs else inputs
        if "weights" not in config.values and not pattern.weights:
            config.report(f"AMCT quantizes no inputs alone; write {pattern.text}.weights, too", key)
        elif match is not None:
            rules += _rule(config, key, match, own, what, chosen)
    return rules


def _check_cache_alone(config: Section, chosen: Chosen | None, has_cache: bool) -> None:
    """Reports what stands in a config that quantizes no layer, and has no effect."""
    if not has_cache:
        config.report("has no weights: it quantizes nothing")
    elif chosen is not None and chosen.layers not in ("quantile", NO_ALGORITHM):
        config.report(f"has no weights for the algorithm {chosen.layers}")
    if "inputs" in config.values:
        config.report("AMCT quantizes no inputs alone; write weights, too", "inputs")


def _rule(
    config: Section, key: str, match: Match, weights: Weights | None, inputs: Inputs | None, chosen: Chosen | None
) -> list[Rule]:
    """The rule of one combination; none, and a problem that names it and the nearest legal one, if AMCT has it not."""
    if chosen is None or weights is None or inputs is None:  # reported
        return []
    one = Combination(
        *(weights.type, weights.strategy, weights.symmetric, weights.group_size, chosen.layers),
        *(inputs.type, inputs.strategy, inputs.symmetric),
    )
    row = legal(one)
    if row is None:
        config.report(f"AMCT has no combination of {one}; the nearest is {nearest_legal(one)}", key)
        return []
    if row.note:
        config.note(row.note, key)
    if one.inputs == "hifloat8" and one.input_strategy == "token" and one.algorithm in ("ofmr", "cast"):
        config.note(f"inputs by token: {one.algorithm} has no scales of tokens", key)
    source = config.document.origin((*config.at, key), f"quant_cfg.{key}")
    return [Rule(match, plan_of(one), source, only_if=row.needs(one.group_size))]
