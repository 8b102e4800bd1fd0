"""Algorithms as modifiers of llm-compressor, written. What none of them can do is refused."""

from collections.abc import Mapping, Sequence
from typing import Final

from graphq.errors import SpecError
from graphq.frontends.document import Plain
from graphq.frontends.llm_compressor.targets import write_target
from graphq.spec.algorithms import Value, defaults
from graphq.spec.folds import EVERYWHERE, NORMS, Folds
from graphq.spec.match import Match, Regex
from graphq.spec.rules import Algorithm

_ALGORITHMS: Final = ("gptq", "auto-round", "awq", "smooth-quant", "rotate")  # those that llm-compressor has
# What an option has to be, for llm-compressor does nothing else.
_FIXED: Final[Mapping[str, Mapping[str, Value]]] = {
    "gptq": {"scales": "plan", "min_samples": 32},
    "awq": {"power": 2, "clip": False, "where": "fold"},
    "smooth-quant": {"statistic": "range", "where": "fold"},
}
_TRANSFORMS: Final = {"hadamard": "hadamard", "random_hadamard": "random-hadamard", "orthogonal": "random-matrix"}
# The norm, or the layer, in front of these in models like Llama, as llm-compressor's default mappings have it.
_IN_FRONT: Final[Mapping[str, tuple[str, ...]]] = {
    "re:.*input_layernorm$": ("q_proj", "k_proj", "v_proj"),
    "re:.*v_proj$": ("o_proj",),
    "re:.*post_attention_layernorm$": ("gate_proj", "up_proj"),
    "re:.*up_proj$": ("down_proj",),
}


def folds(name: str, match: tuple[Match, ...]) -> Folds:
    """What llm-compressor folds factors into: where no mappings say so, SmoothQuant into norms alone."""
    return NORMS if name == "smooth-quant" and not match else EVERYWHERE


def _options(algorithm: Algorithm) -> dict[str, Value]:
    """All options of an algorithm that llm-compressor has. Raises ``SpecError`` with those that it does not have."""
    name = algorithm.name
    if name not in _ALGORITHMS:
        raise SpecError(f"{name}: llm-compressor has no such algorithm")
    problems = [f"{name} has no option {option}" for option, _ in algorithm.options if option not in defaults(name)]
    options = {**defaults(name), **dict(algorithm.options)}
    for option, value in _FIXED.get(name, {}).items():
        if options[option] != value:
            shown = str(value).lower() if isinstance(value, bool) else value
            problems.append(f"{name}: {option} is {_shown(options[option])}; llm-compressor's is {shown}")
    if problems:
        raise SpecError(problems)
    return options


def _shown(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def write_rounding(algorithm: Algorithm | None) -> tuple[str, dict[str, Plain]]:
    """The class and the fields of the modifier that rounds. Raises ``SpecError``."""
    if algorithm is None:
        return "QuantizationModifier", {}
    options = _options(algorithm)
    if algorithm.name == "auto-round":
        names = {"steps": "iters", "lr": "lr", "batch_size": "batch_size"}
        return "AutoRoundModifier", {names[key]: value for key, value in algorithm.options}
    given = dict(algorithm.options)
    fields: dict[str, Plain] = {}
    for option, field in (("block_size", "block_size"), ("dampening", "dampening_frac")):
        if option in given:
            fields[field] = given[option]
    if options["act_order"] == "none":
        fields["actorder"] = None
    return "GPTQModifier", fields


def write_transform(algorithm: Algorithm) -> tuple[str, dict[str, Plain]]:
    """The class and the fields of a modifier that changes weights before they are rounded. Raises ``SpecError``."""
    options, given = _options(algorithm), dict(algorithm.options)
    fields: dict[str, Plain] = {}
    if algorithm.folds != (own := folds(algorithm.name, algorithm.match)):
        raise SpecError(f"{algorithm.name}: folds: {algorithm.folds}: llm-compressor folds into {own}")
    if algorithm.name == "awq":
        fields["duo_scaling"] = "both" if options["duo"] is None else options["duo"]
        if "n_grid" in given:
            fields["n_grid"] = given["n_grid"]
        if algorithm.match:
            fields["mappings"] = [
                {"smooth_layer": front, "balance_layers": layers} for front, layers in _mappings(algorithm)
            ]
        return "AWQModifier", fields
    if algorithm.name == "smooth-quant":
        if options["alpha"] == "search":
            raise SpecError("smooth-quant: alpha is search; llm-compressor's smoothing_strength is a number")
        if "alpha" in given:
            fields["smoothing_strength"] = given["alpha"]
        if algorithm.match:
            fields["mappings"] = [[layers, front] for front, layers in _mappings(algorithm)]
        return "SmoothQuantModifier", fields
    fields["rotations"] = [name.upper() for name in ("r1", "r2", "r3", "r4") if options[name]]
    if not fields["rotations"]:
        raise SpecError("rotate: it rotates nothing")
    fields["transform_type"] = _TRANSFORMS[str(options["kind"])]
    if options["block_size"] is not None:
        fields["transform_block_size"] = options["block_size"]
    return "SpinQuantModifier", fields


def _mappings(algorithm: Algorithm) -> list[tuple[str, list[Plain]]]:
    """The layers with what stands in front of them. Raises ``SpecError`` for layers other than Llama's."""
    found: list[tuple[str, list[Plain]]] = []
    for match in algorithm.match:
        front = _front(match)
        if front is None:
            raise SpecError(
                f"{algorithm.name}: {match}: llm-compressor's mappings name the norm in front of a layer, known of"
                " q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj alone"
            )
        if found and found[-1][0] == front:
            found[-1][1].append(write_target(match))
        else:
            found.append((front, [write_target(match)]))
    return found


def _front(match: Match) -> str | None:
    """What stands in front of the one layer that the expression ends in."""
    if not isinstance(match, Regex):
        return None
    ends: Sequence[str] = [front for front, names in _IN_FRONT.items() for name in names if _ends(match.pattern, name)]
    return ends[0] if ends else None


def _ends(pattern: str, name: str) -> bool:
    heads = ("", r"\.", r"self_attn\.", r"mlp\.", r"\.self_attn\.", r"\.mlp\.", r"self_attn.", "mlp.")
    tails = ("", "$", ".*", r"(\..*)?$")
    return any(
        pattern == f"{start}{head}{name}{tail}" for start in (".*", r"(.*\.)?") for head in heads for tail in tails
    )
