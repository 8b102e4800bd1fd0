"""msModelSlim's processors that come before quantization, as algorithms: rotation, smoothing, AWQ; and back.

They are given by kinds of subgraphs (``norm-linear``, ``ov``, ``up-down``, ``linear-linear``). graphq finds subgraphs
by the graph's edges and is given layers, so some of the kinds are told by the names of the layers that are scaled.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from graphq.errors import SpecError
from graphq.frontends.document import Plain, Section, nearest, show
from graphq.frontends.modelslim.qconfig import Scalar, read_number, read_qconfig, read_side
from graphq.match import Linears, Match
from graphq.spec import Algorithm

_KINDS: Final = ("norm-linear", "linear-linear", "ov", "up-down")
_OV: Final = "*o_proj"
_DOWN: Final = ("*down_proj", "*.w2")  # DeepSeek-V4's name comes second: what no layer has must not be asked for
_SCALE_MIN: Final = 1e-5
_SUBGRAPHS: Final = ("enable_subgraph_type", "include", "exclude")
REFUSED: Final[Mapping[str, str]] = {
    "online_quarot": "rotation at run time is written in the native form alone: algorithms: [{rotate: {r4: true}}]",
    "adapt_rotation": "a rotation that is fitted to data is not supported; write quarot",
    "kv_smooth": "it prepares the KV cache, which is not quantized here; leave it out",
    "fa3_quant": "attention's own inputs are not quantized; leave it out",
    "flatquant": "learned transforms are not supported; write quarot, or autoround_quant",
    "float_sparse": "sparsity is not supported",
    "svd_res": "a low-rank float branch is not supported; write weights of more bits",
}


def read_preparation(section: Section, kind: str) -> Algorithm | None:
    """The algorithm that a processor of this type is."""
    read = _READ[kind]
    before = len(section.document.problems)
    name, options, match = read(section)
    if len(section.document.problems) > before:
        return None
    source = section.document.origin(section.at, f"process[{section.at[-1]}]")
    return section.made(lambda: Algorithm(name, options, source, match))


_Read = tuple[str, tuple[tuple[str, Scalar], ...], tuple[Match, ...]]


def _quarot(section: Section) -> _Read:
    section.only(("type", "online", "block_size", "down_proj_online_layers", "max_tp_size", "export_extra_info"))
    if section.boolean("online") or section.items("down_proj_online_layers"):
        section.report(REFUSED["online_quarot"], "online")
    for key, why in (("max_tp_size", "it is for online rotation"), ("export_extra_info", "the target decides")):
        if key in section.values:
            section.unused(key, why)
    size = section.integer("block_size")
    if size is not None and size != -1 and (size < 1 or size & (size - 1)):
        section.report(f"{size} is neither -1 nor a power of two", "block_size")
    return "rotate", () if size in (None, -1) else (("block_size", size),), ()


def _smooth_quant(section: Section) -> _Read:
    section.only(("type", "alpha", "symmetric", "include", "exclude"))
    return "smooth-quant", (("alpha", _alpha(section, 0.5)),), _scaled(section, ("norm-linear",))


def _iter_smooth(section: Section) -> _Read:
    section.only(("type", "alpha", "scale_min", "symmetric", *_SUBGRAPHS))
    least = read_number(section, "scale_min")
    if least not in (None, _SCALE_MIN):
        section.report(f"factors are at least {_SCALE_MIN:g} here; write that, or leave it out", "scale_min")
    return "smooth-quant", (("alpha", _alpha(section, 0.9)),), _scaled(section)


def _flex_smooth(section: Section) -> _Read:
    section.only(("type", "alpha", "beta", *_SUBGRAPHS))
    alpha, beta = (None if section.values.get(key) is None else read_number(section, key) for key in ("alpha", "beta"))
    match = _scaled(section)
    if alpha is None and beta is None:
        return "smooth-quant", (("alpha", "search"),), match
    if alpha is None or beta is None or abs(alpha + beta - 1) > 1e-9:
        section.report("beta is 1 - alpha in graphq; write such a pair, or neither to have them searched", "alpha")
    return "smooth-quant", (("alpha", _alpha(section, 0.5)),), match


def _flex_awq(section: Section) -> _Read:
    section.only(("type", "alpha", "beta", "qconfig", *_SUBGRAPHS))
    for key in ("alpha", "beta"):
        if section.values.get(key) is not None:
            section.report("graphq searches it; leave it out", key)
    qconfig = section.section("qconfig", required=True)
    if qconfig is not None and read_qconfig(qconfig) is not None:
        section.unused("qconfig", "factors are judged by each layer's own plan")
    return "awq", (("duo", False), ("clip", False)), _scaled(section)


def _awq(section: Section) -> _Read:
    section.only(("type", "weight_qconfig", "n_grid", "include", "exclude"))
    if "weight_qconfig" in section.values:
        weight = section.section("weight_qconfig")
        if weight is not None and read_side(weight, "weight") is not None:
            section.unused("weight_qconfig", "factors are judged by each layer's own plan")
    options: list[tuple[str, Scalar]] = [("duo", False), ("clip", False)]
    if (grid := section.integer("n_grid")) is not None:
        options.insert(0, ("n_grid", grid))
        if grid < 1:
            section.report(f"{grid} is not a whole number from 1", "n_grid")
    return "awq", tuple(options), _scaled(section, _KINDS)


_READ: Final[Mapping[str, Callable[[Section], _Read]]] = {
    "quarot": _quarot,
    "smooth_quant": _smooth_quant,
    "iter_smooth": _iter_smooth,
    "flex_smooth_quant": _flex_smooth,
    "flex_awq_ssz": _flex_awq,
    "awq": _awq,
}
PREPARATIONS: Final = tuple(_READ)


def _alpha(section: Section, default: float) -> float:
    alpha = read_number(section, "alpha")
    if alpha is not None and not 0 <= alpha <= 1:
        section.report(f"{alpha} is not a number from 0 to 1", "alpha")
    if section.boolean("symmetric") is False:
        section.report("a shift of channels is not supported; write true", "symmetric")
    return default if alpha is None else alpha


def _scaled(section: Section, only: Sequence[str] = ()) -> tuple[Match, ...]:
    """The layers that are scaled: none for every layer. ``only``: the kinds of a processor that does not say."""
    kinds = list(only)
    for key in ("include", "exclude"):
        if section.values.get(key) not in (None, [], *([["*"]] if key == "include" else [])):
            section.report(
                "names what factors are folded into (a norm, up_proj, v_proj), and graphq is given the layers that are"
                " scaled; leave it out, or write a native spec with the algorithm's match",
                key,
            )
    if not only:
        listed = section.items("enable_subgraph_type") if section.values.get("enable_subgraph_type") else _KINDS
        for index, kind in enumerate(listed):
            if kind not in _KINDS:
                near = nearest(str(kind), _KINDS)
                section.report(f"{show(kind)} is not a kind of subgraph{near}", "enable_subgraph_type", index)
        kinds = [kind for kind in _KINDS if kind in listed]
    if {"norm-linear", "ov", "up-down"} <= set(kinds):
        return ()
    section.document.notes.append(
        f"{section.document.prefix(section.at)}kinds of subgraphs are told by names: ov is {_OV}, up-down is"
        f" {' and '.join(_DOWN)}, norm-linear is every other"
    )
    if "norm-linear" in kinds:
        but = [_OV] * ("ov" not in kinds) + [*_DOWN] * ("up-down" not in kinds)
        return (Linears("*", tuple(but)),)
    found = [Linears(_OV)] * ("ov" in kinds) + [Linears(_DOWN[0])] * ("up-down" in kinds)
    if not found and kinds:
        section.report("linear-linear alone is not supported; graphq finds such pairs with the other kinds")
    return tuple(found)


def write_preparation(algorithm: Algorithm, qconfig: dict[str, Plain]) -> dict[str, Plain]:
    """The processor that is read as this algorithm. Raises ``SpecError`` where there is none.

    ``qconfig``: one of the spec's, for processors that ask for one.
    """
    options = dict(algorithm.options)
    found: dict[str, Plain]
    match algorithm.name:
        case "rotate":
            found = {"type": "quarot", "block_size": options.pop("block_size", None) or -1}
            if algorithm.match:
                raise SpecError("rotate: quarot is for the whole model; the algorithm has a match")
        case "smooth-quant":
            alpha = options.pop("alpha", 0.5)
            found = {"type": "flex_smooth_quant"} if alpha == "search" else {"type": "iter_smooth", "alpha": alpha}
            found["enable_subgraph_type"] = _kinds(algorithm)
        case "awq":
            if options.pop("duo", None) is not False or options.pop("clip", True) is not False:
                raise SpecError("awq: msModelSlim's awq is duo false, clip false")
            grid = options.pop("n_grid", None)
            if algorithm.match and grid is not None:
                raise SpecError("awq: of msModelSlim's processors with n_grid none is for some layers alone")
            if algorithm.match:
                found = {"type": "flex_awq_ssz", "qconfig": qconfig, "enable_subgraph_type": _kinds(algorithm)}
            else:
                found = {"type": "awq", "weight_qconfig": qconfig.get("weight", {})}
                found |= {} if grid is None else {"n_grid": grid}
        case name:
            raise SpecError(f"{name}: msModelSlim has no such algorithm")
    if options:
        raise SpecError(f"{algorithm.name}: msModelSlim has no {next(iter(options))} {next(iter(options.values()))}")
    return found


def _kinds(algorithm: Algorithm) -> list[Plain]:
    """The kinds of subgraphs that are read as the algorithm's match."""
    given = algorithm.match
    norm, ov, down = "norm-linear", "ov", "up-down"
    for kinds in ([*_KINDS], [norm, ov], [norm, down], [norm], [ov, down], [ov], [down]):
        but = [_OV] * (ov not in kinds) + [*_DOWN] * (down not in kinds)
        match: tuple[Match, ...] = (Linears("*", tuple(but)),) if but else ()
        if norm not in kinds:
            match = tuple([Linears(_OV)] * (ov in kinds) + [Linears(_DOWN[0])] * (down in kinds))
        if match == given:
            return [*kinds]
    raise SpecError(
        f"{algorithm.name}: {', '.join(map(str, given))}: msModelSlim chooses kinds of subgraphs, not layers"
    )
