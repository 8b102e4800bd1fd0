"""msModelSlim's processors that come before quantization, as algorithms: rotation, smoothing, AWQ; and back.

They are given by kinds of subgraphs (``norm-linear``, ``ov``, ``up-down``, ``linear-linear``) and by the names of what
factors are folded into, which are the folds of an algorithm.
"""

from collections.abc import Callable, Mapping
from typing import Final

from graphq.errors import SpecError
from graphq.frontends.document import Plain, Section, nearest, show
from graphq.frontends.modelslim.globs import read_patterns
from graphq.frontends.modelslim.qconfig import Scalar, read_number, read_qconfig, read_side
from graphq.spec.folds import EVERYWHERE, NORMS, SUBGRAPHS, Folds, Subgraph, kinds_among
from graphq.spec.rules import Algorithm

_SCALE_MIN: Final = 1e-5
_BY_SOURCE: Final = (
    "msModelSlim chooses what factors are folded into, not the layers that are scaled; write folds instead of match"
)
_SUBGRAPHS: Final = ("enable_subgraph_type", "include", "exclude")
REFUSED: Final[Mapping[str, str]] = {
    "online_quarot": "rotation at run time is written in the native form alone: algorithms: [{rotate: {r4: true}}]",
    "adapt_rotation": "a rotation that is fitted to data is not supported; write quarot",
    "kv_smooth": "factors between keys and queries are not supported; leave it out",
    "flatquant": "learned transforms are not supported; write quarot, or autoround_quant",
    "float_sparse": "sparsity is not supported",
    "svd_res": "a low-rank float branch is not supported; write weights of more bits",
}


def read_preparation(section: Section, kind: str) -> Algorithm | None:
    """The algorithm that a processor of this type is."""
    read = _READ[kind]
    before = len(section.document.problems)
    name, options, folds = read(section)
    if len(section.document.problems) > before:
        return None
    source = section.document.origin(section.at, f"process[{section.at[-1]}]")
    return section.made(lambda: Algorithm(name, options, source, folds=folds))


_Read = tuple[str, tuple[tuple[str, Scalar], ...], Folds]


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
    return "rotate", () if size in (None, -1) else (("block_size", size),), EVERYWHERE


def _smooth_quant(section: Section) -> _Read:
    section.only(("type", "alpha", "symmetric", "include", "exclude"))
    return "smooth-quant", (("alpha", _alpha(section, 0.5)),), _folds(section, NORMS.kinds)


def _iter_smooth(section: Section) -> _Read:
    section.only(("type", "alpha", "scale_min", "symmetric", *_SUBGRAPHS))
    least = read_number(section, "scale_min")
    if least not in (None, _SCALE_MIN):
        section.report(f"factors are at least {_SCALE_MIN:g} here; write that, or leave it out", "scale_min")
    return "smooth-quant", (("alpha", _alpha(section, 0.9)),), _folds(section)


def _flex_smooth(section: Section) -> _Read:
    section.only(("type", "alpha", "beta", *_SUBGRAPHS))
    alpha, beta = (None if section.values.get(key) is None else read_number(section, key) for key in ("alpha", "beta"))
    folds = _folds(section)
    if alpha is None and beta is None:
        return "smooth-quant", (("alpha", "search"),), folds
    if alpha is None or beta is None or abs(alpha + beta - 1) > 1e-9:
        section.report("beta is 1 - alpha in graphq; write such a pair, or neither to have them searched", "alpha")
    return "smooth-quant", (("alpha", _alpha(section, 0.5)),), folds


def _flex_awq(section: Section) -> _Read:
    section.only(("type", "alpha", "beta", "qconfig", *_SUBGRAPHS))
    for key in ("alpha", "beta"):
        if section.values.get(key) is not None:
            section.report("graphq searches it; leave it out", key)
    qconfig = section.section("qconfig", required=True)
    if qconfig is not None and read_qconfig(qconfig) is not None:
        section.unused("qconfig", "factors are judged by each layer's own plan")
    return "awq", (("duo", False), ("clip", False)), _folds(section)


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
    return "awq", tuple(options), _folds(section, SUBGRAPHS)


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


def _folds(section: Section, only: tuple[Subgraph, ...] = ()) -> Folds:
    """What factors are folded into. ``only``: the kinds of a processor that does not say."""
    kinds = only
    if not only:
        listed = section.items("enable_subgraph_type") if section.values.get("enable_subgraph_type") else SUBGRAPHS
        for index, kind in enumerate(listed):
            if kind not in SUBGRAPHS:
                near = nearest(str(kind), SUBGRAPHS)
                section.report(f"{show(kind)} is not a kind of subgraph{near}", "enable_subgraph_type", index)
        kinds = kinds_among(map(str, listed))
    include, exclude = (
        read_patterns(section, key) if section.values.get(key) is not None else () for key in ("include", "exclude")
    )
    folds = section.made(lambda: Folds(kinds or SUBGRAPHS, include or EVERYWHERE.include, exclude))
    return folds or EVERYWHERE


def write_preparation(algorithm: Algorithm, qconfig: dict[str, Plain]) -> dict[str, Plain]:
    """The processor that is read as this algorithm. Raises ``SpecError`` where there is none.

    ``qconfig``: one of the spec's, for processors that ask for one.
    """
    options, folds = dict(algorithm.options), algorithm.folds
    found: dict[str, Plain]
    if algorithm.match:
        what = "quarot is for the whole model" if algorithm.name == "rotate" else _BY_SOURCE
        raise SpecError(f"{algorithm.name}: {', '.join(map(str, algorithm.match))}: {what}")
    match algorithm.name:
        case "rotate":
            found = {"type": "quarot", "block_size": options.pop("block_size", None) or -1}
        case "smooth-quant":
            alpha = options.pop("alpha", 0.5)
            found = {"type": "flex_smooth_quant"} if alpha == "search" else {"type": "iter_smooth", "alpha": alpha}
            found["enable_subgraph_type"] = [*folds.kinds]
        case "awq":
            if options.pop("duo", None) is not False or options.pop("clip", True) is not False:
                raise SpecError("awq: msModelSlim's awq is duo false, clip false")
            grid = options.pop("n_grid", None)
            if folds.kinds == SUBGRAPHS:
                found = {"type": "awq", "weight_qconfig": qconfig.get("weight", {})}
                found |= {} if grid is None else {"n_grid": grid}
            elif grid is not None:
                raise SpecError("awq: of msModelSlim's processors with n_grid none is for some kinds of subgraphs")
            else:
                found = {"type": "flex_awq_ssz", "qconfig": qconfig, "enable_subgraph_type": [*folds.kinds]}
        case name:
            raise SpecError(f"{name}: msModelSlim has no such algorithm")
    if options:
        raise SpecError(f"{algorithm.name}: msModelSlim has no {next(iter(options))} {next(iter(options.values()))}")
    if folds.include != EVERYWHERE.include:
        found["include"] = [*folds.include]
    if folds.exclude:
        found["exclude"] = [*folds.exclude]
    return found
