"""A checkpoint's ``quant_model_description.json`` as a plan: every layer is quantized as it was in that checkpoint.

A flat map from each tensor's name to a type, ``<layer>.weight: W8A8``, beside a few keys about the whole.
"""

from collections.abc import Callable, Mapping
from typing import Final

from graphq.errors import SpecError
from graphq.frontends.document import Document, Section, nearest, show
from graphq.frontends.modelslim.qconfig import PD_MIX, Side, plan_of
from graphq.spec.formats import Int, Mx, TwoLevel
from graphq.spec.match import Exact
from graphq.spec.plan import Decision, KeepFloat, Plan
from graphq.spec.quant import PerChannel, PerGroup, Quant
from graphq.spec.rules import Algorithm, Rule, Spec

FLOAT: Final = "FLOAT"
MAX_SHOWN: Final = 20
_TOKEN8, _TOKEN4 = Side("int8", "per_token"), Side("int4", "per_token")
# type -> the plan that it has with groups of this many inputs (0: none)
_PLANS: Final[Mapping[str, Callable[[int], Plan]]] = {
    "W8A8": lambda g: plan_of(Side("int8", "per_tensor", symmetric=False), Side("int8", "per_channel")),
    "W8A8_MIX": lambda g: plan_of(Side("int8", "pd_mix", symmetric=False), Side("int8", "per_channel")),
    "W8A8_DYNAMIC": lambda g: plan_of(_TOKEN8, _weight("int8", g)),
    "W8A16": lambda g: plan_of(None, _weight("int8", g)),
    "W4A16": lambda g: plan_of(None, _weight("int4", g)),
    "W4A8_DYNAMIC": lambda g: plan_of(_TOKEN8, Side("int4", "per_channel")),
    "W4A4_DYNAMIC": lambda g: plan_of(_TOKEN4, _weight("int4", g)),
    "WFP8AFP8_DYNAMIC": lambda g: plan_of(Side("fp8_e4m3", "per_token"), Side("fp8_e4m3", "per_channel")),
    "W8A8FP8_DYNAMIC": lambda g: plan_of(Side("fp8_e4m3", "per_token"), Side("fp8_e4m3", "per_channel")),
    "W8A8_MXFP8": lambda g: plan_of(Side("mxfp8", "per_block"), Side("mxfp8", "per_block")),
    "W4A8_MXFP": lambda g: plan_of(Side("mxfp8", "per_block"), Side("mxfp4", "per_block")),
    "W4A4_MXFP4": lambda g: plan_of(Side("mxfp4", "per_block"), Side("mxfp4", "per_block")),
    "W4A16_MXFP4": lambda g: Plan(Quant(Mx("float4_e2m1", "ascend"), PerGroup(32), arithmetic="source")),
}
_MX: Final = ("W8A8_MXFP8", "W4A8_MXFP", "W4A4_MXFP4", "W4A16_MXFP4")
# There is one group size for the whole file: it is that of the first of these types that the file has.
_GROUPED: Final = ("W4A8_DYNAMIC", "W4A16", "W4A4_DYNAMIC", "W8A16", "W8A8_DYNAMIC")
_LACKING: Final = {
    "W4A4_MXFP4_DUALSCALE": "mxfp4 blocks under a second scale",
    "FAQuant": "quantization of attention's own inputs",
    "NF4": "a table of sixteen values",
    "W8A8_TIMESTEP": "scales by a diffusion model's timesteps",
    **dict.fromkeys(("W8A8S", "W8A8SC", "W16A16S", "W16A16SC"), "sparsity"),
}
_OF_WEIGHTS: Final = (
    *("weight", "bias", "weight_scale", "weight_offset", "weight_scale_second", "weight_offset_second", "scale_bias"),
    *("quant_bias", "input_scale", "input_offset", "deq_scale", "weight_dual_scale"),
)
_CACHE: Final = ("kv_cache_scale", "kv_cache_offset")
_GLOBAL: Final = (
    *("version", "model_quant_type", "metadata", "group_size", "optional", "kv_cache_type", "kv_quant_type"),
    *("fa_quant_type", "reduce_quant_type", "is_rot_used", "indexer_quant_type", "max_supported_tp"),
)
_MTP: Final = (".eh_proj.weight", ".enorm.weight")  # of the block that predicts one token more


def recognises(document: Document) -> bool:
    """Whether the document is a description."""
    if "model_quant_type" in document.root:
        return True
    known = {FLOAT, *_PLANS, *_LACKING}
    return any(key.endswith(".weight") and isinstance(v, str) and v in known for key, v in document.root.items())


def parse_description(document: Document) -> Spec:
    """The spec of a rule for each layer. Raises ``SpecError`` with everything that is wrong, types counted."""
    top = Section(document, document.root)
    algorithms, cache = _read_globals(top)
    layers: dict[str, str] = {}  # layer -> type
    others: list[tuple[str, str, str]] = []  # layer, key, type
    two_level: set[str] = set()
    lacking: dict[str, list[str]] = {}
    for key, kind in document.root.items():
        if key in _GLOBAL:
            continue
        layer, dot, suffix = key.rpartition(".")
        if not isinstance(kind, str):
            top.report(f"{show(kind)} is not a type such as W8A8", key)
        elif suffix == "quant_type":
            top.report("attention's own inputs are not quantized here; take the key out", key)
        elif suffix in _CACHE and kind == "C8":
            continue
        elif kind != FLOAT and kind not in _PLANS:
            lacking.setdefault(kind, []).append(key)
        elif not dot or (suffix not in _OF_WEIGHTS and kind != FLOAT):
            top.report(f"{suffix} is not a tensor of a quantized layer{nearest(suffix, _OF_WEIGHTS)}", key)
        elif suffix == "mul_scale":
            top.report("smoothing that stands before a layer on its own is not read; quantize the model anew", key)
        elif suffix == "weight":
            layers[layer] = kind
        else:
            others.append((layer, key, kind))
            if suffix == "weight_scale_second":
                two_level.add(layer)
    if "W8A8_MIX" in layers.values():
        document.notes.append(f"{document.prefix(())}W8A8_MIX: {PD_MIX}")
    for kind, keys in lacking.items():
        _report_lacking(top, kind, keys)
    floats = _check_agreement(top, layers, others)
    rules = _rules(top, layers, two_level)
    norms = sum(kind == FLOAT and _is_norm(layer) for layer, kind in layers.items())
    if norms + floats:
        document.notes.append(
            f"{document.prefix(())}{norms + floats:,} FLOAT tensors of norms, biases and the like have no rule"
        )
    if not any(isinstance(rule.decision, Plan) for rule in rules) and not document.problems:
        document.report((), "every layer is FLOAT: the description quantizes nothing")
    _finish(document)
    return Spec(tuple(rules), algorithms, cache, dialect="modelslim", notes=tuple(document.notes))


def _finish(document: Document) -> None:
    """Raises ``SpecError`` with the problems, of which there may be one for each of very many tensors."""
    if len(document.problems) > MAX_SHOWN:
        more = len(document.problems) - MAX_SHOWN
        document.problems[MAX_SHOWN:] = [f"{document.prefix(())}{more:,} more problems of this kind"]
    document.finish()


def _read_globals(top: Section) -> tuple[tuple[Algorithm, ...], Quant | None]:
    for key in ("version", "model_quant_type", "max_supported_tp"):
        if key in top.values:
            top.unused(key, "the layers' own types hold")
    metadata, optional = top.section("metadata"), top.section("optional")
    if metadata is not None and "quarot" in metadata.values:
        metadata.report("rotation at run time is written in the native form alone, as rotate with r4", "quarot")
    for key in ("fa_quant_type", "reduce_quant_type", "indexer_quant_type"):
        if key in top.values:
            top.report("is not supported: linears are quantized, and no attention or communication", key)
    cache: Quant | None = None
    for key in ("kv_cache_type", "kv_quant_type"):
        if (kind := top.text(key)) is not None:
            if kind != "C8":
                top.report(f"{show(kind)} is not C8", key)
            cache = Quant(Int(8), PerChannel())
    for section, key in ((optional, "quarot"), (top, "is_rot_used")):
        if section is not None and section.values.get(key) not in (None, False):
            return (Algorithm("rotate", (), section.document.origin((*section.at, key), key)),), cache
    return (), cache


def _report_lacking(top: Section, kind: str, keys: list[str]) -> None:
    count = f"{len(keys):,} tensors" if len(keys) > 1 else "1 tensor"
    what = _LACKING.get(kind)
    if what is None and ("FLATQUANT" in kind or "_SVD" in kind):
        what = "a learned transform" if "FLATQUANT" in kind else "a low-rank float branch"
    if what is None:
        top.report(f"{show(kind)}, of {count}, is not a type{nearest(kind, (*_PLANS, FLOAT))}", keys[0])
    else:
        top.report(f"{kind}, of {count}: {what} is not supported", keys[0])


def _check_agreement(top: Section, layers: Mapping[str, str], others: list[tuple[str, str, str]]) -> int:
    """Reports tensors whose type is not that of their layer's weight; returns how many FLOAT ones have no weight."""
    alone = 0
    for layer, key, kind in others:
        own = layers.get(layer)
        if own is None and kind == FLOAT:
            alone += 1
        elif own is None:
            top.report(f"{kind}, but there is no {layer}.weight", key)
        elif kind != own and not (kind == FLOAT and key.endswith(".bias")):
            line = top.document.lines.get((f"{layer}.weight",))
            where = f" (line {line})" if line else ""
            top.report(f"{kind} contradicts {layer}.weight, which is {own}{where}", key)
    return alone


def _rules(top: Section, layers: Mapping[str, str], two_level: set[str]) -> list[Rule]:
    document = top.document
    size = top.integer("group_size") or 0
    if size and top.made(lambda: PerGroup(size), "group_size") is None:
        return []
    found = set(layers.values())
    grouped = [kind for kind in _GROUPED if kind in found and (kind != "W4A8_DYNAMIC" or two_level)]
    if size and not (size == 32 and found & set(_MX)):
        owner = grouped[0] if grouped else ""
        if len(grouped) > 1:
            document.notes.append(
                f"{document.prefix(('group_size',))}read as the group size of {owner}; {' and '.join(grouped[1:])} have"
                " one scale for each channel"
            )
        if not grouped and "W4A8_DYNAMIC" in found:
            top.report(f"is {size}, but no layer has weight_scale_second", "group_size")
    else:
        owner = ""
    if two_level and not size:
        top.report("is missing or 0: weight_scale_second has one scale for each group", "group_size")
        return []
    for kind in (kind for kind in ("W8A16", "W4A16") if kind in found):
        document.notes.append(f"{document.prefix(())}{kind}: weights are read as symmetric, which the types do not say")
    plans: dict[str, Decision] = {kind: make(size if kind == owner else 0) for kind, make in _PLANS.items()}
    plans[FLOAT] = KeepFloat("FLOAT in the description")
    second = None if not two_level else Plan(Quant(TwoLevel("int4"), PerGroup(size)), _plan_input(plans))
    mtp = tuple({key.partition(end)[0] + "." for key in document.root for end in _MTP if key.endswith(end)})
    if mtp:
        blocks = ", ".join(sorted(prefix.removesuffix(".") for prefix in mtp))
        document.notes.append(f"{document.prefix(())}{blocks}: predicts further tokens; the model may lack it")
    rules: list[Rule] = []
    for layer, kind in layers.items():
        decision = plans[kind]
        if kind == FLOAT and _is_norm(layer):
            continue
        if layer in two_level and kind == "W4A8_DYNAMIC" and second is not None:
            decision = second
        try:
            match = Exact(layer)
        except SpecError as error:
            top.report(str(error), f"{layer}.weight")
            continue
        at = (f"{layer}.weight",)
        may_miss = kind == FLOAT or layer.startswith(mtp)
        rules.append(Rule(match, decision, document.origin(at, kind), may_match_nothing=may_miss))
    return rules


def _plan_input(plans: Mapping[str, Decision]) -> Quant | None:
    plan = plans["W4A8_DYNAMIC"]
    return plan.input if isinstance(plan, Plan) else None


def _is_norm(layer: str) -> bool:
    """Whether a layer's name is that of a norm, which has a weight and is no layer to quantize."""
    return "norm" in layer.rpartition(".")[2].lower() or layer.endswith("norm.module")


def _weight(dtype: str, size: int) -> Side:
    return Side(dtype, "per_group", group_size=size) if size else Side(dtype, "per_channel")
