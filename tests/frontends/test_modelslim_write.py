"""Specs as msModelSlim configs: reading undoes writing, plans stay, and what the dialect cannot hold."""

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from graphq.errors import SpecError
from graphq.frontends import load_spec, print_spec, write_spec
from graphq.spec.match import Exact, Glob, Kind, Layer, Linears
from graphq.spec.plan import KeepFloat, Plan
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Rule, Spec


def side(dtype: str, scope: str, symmetric: Any = True, method: str = "minmax", **ext: Any) -> dict[str, Any]:
    return {"scope": scope, "dtype": dtype, "symmetric": symmetric, "method": method} | ({"ext": ext} if ext else {})


TOKEN8, TOKEN4 = side("int8", "per_token"), side("int4", "per_token")
INT8 = [side("int8", "per_channel", method=method) for method in ("minmax", "gptq", "ssz")]
INT4 = [
    *(side("int4", "per_channel", method="ssz", **ext) for ext in ({}, {"step": 7})),
    *(side("int4", "per_channel", method="gptq", **ext) for ext in ({}, {"percdamp": 0.1}, {"block_size": 64})),
]
GROUPS = [
    *(side("int4", "per_group", method="gptq", **ext) for ext in ({}, {"group_size": 32, "percdamp": "1e-1"})),
    side("int4", "per_group", group_size=256),
]
ASYM = [
    side("int8", "per_channel", symmetric=False),
    side("int8", "per_group", symmetric=False, method="gptq", group_size=64),
    side("int8", "per_group", group_size=16),
]
MX = {name: side(name, "per_block") for name in ("mxfp8", "mxfp4")}
STATIC = [
    side("int8", "per_tensor", symmetric, method) for symmetric in (True, False) for method in ("minmax", "histogram")
]
PAIRS = [
    *((act, weight) for act in STATIC for weight in INT8),
    *((TOKEN8, weight) for weight in (*INT8, *INT4, *GROUPS, *ASYM[1:])),
    *((TOKEN4, weight) for weight in (*INT4, *GROUPS)),
    *((None, weight) for weight in (*INT8, *INT4, *GROUPS, *ASYM)),
    (side("fp8_e4m3", "per_token"), side("fp8_e4m3", "per_channel")),
    *((MX[a], MX[w]) for a, w in (("mxfp8", "mxfp8"), ("mxfp8", "mxfp4"), ("mxfp4", "mxfp4"))),
]
QCONFIGS = st.sampled_from([{"weight": weight} | ({"act": act} if act else {}) for act, weight in PAIRS])
LAYERS = {
    layer.fqn: layer
    for layer in (
        *(
            Layer(f"m.{i}.{name}", "linear", (8, 8), i)
            for i in (0, 1)
            for name in ("attn.q", "attn.o", "mlp.up", "mlp.down")
        ),
        *(Layer(f"m.1.mlp.e.{i}.up", "expert", (8, 8), 1) for i in (0, 1)),
        Layer("m.1.mlp.gate", "linear", (8, 8), 1, named_only="router"),
        Layer("head", "linear", (8, 8), named_only="output head"),
        Layer("m.embed", "embedding", (8, 8), named_only="embedding"),
    )
}
PATTERNS = st.sampled_from(
    [
        *("*", "*attn*", "*mlp*", "*.up", "*.down", "*gate", "*.e.*", "m.0.*", "m.1.*", "*.[qo]", "m.{0,1}.mlp.*"),
        *("head", "m.0.attn.q", "m.1.mlp.down", "m.{0..1}.attn.o", "*q", "*e*", "m.?.*"),
    ]
)
LISTS = st.lists(PATTERNS, max_size=3)
SELECTED = st.fixed_dictionaries({"include": st.lists(PATTERNS, min_size=1, max_size=3)}, optional={"exclude": LISTS})
LINEAR = st.builds(lambda q, s: {"type": "linear_quant", "qconfig": q, **s}, QCONFIGS, SELECTED)
LEARNED = st.sampled_from(
    [side("int4", "per_channel", method="autoround"), side("int8", "per_channel", method="autoround")]
)
STRATEGY = st.builds(lambda w, s: {"qconfig": {"act": TOKEN8, "weight": w}, **s}, LEARNED, SELECTED)
KINDS = st.lists(st.sampled_from(["norm-linear", "linear-linear", "ov", "up-down"]), max_size=4, unique=True)
SOURCES = st.fixed_dictionaries({}, optional={"include": LISTS, "exclude": LISTS})
SMOOTH = (
    st.builds(lambda s: {"type": "smooth_quant", "alpha": 0.4, **s}, SOURCES)
    | st.builds(
        lambda a, k, s: {"type": "iter_smooth", "alpha": a, "enable_subgraph_type": k, **s},
        st.sampled_from([0, 0.5, "1e-1"]),
        KINDS,
        SOURCES,
    )
    | st.builds(lambda k, s: {"type": "flex_smooth_quant", "enable_subgraph_type": k, **s}, KINDS, SOURCES)
    | st.builds(
        lambda k, q, s: {"type": "flex_awq_ssz", "qconfig": q, "enable_subgraph_type": k, **s}, KINDS, QCONFIGS, SOURCES
    )
    | st.builds(lambda n, s: {"type": "awq", **n, **s}, st.sampled_from([{}, {"n_grid": 5}]), SOURCES)
)
QUANTIZER = (
    LINEAR
    | st.builds(lambda configs: {"type": "group", "configs": configs}, st.lists(LINEAR, min_size=1, max_size=3))
    | st.builds(
        lambda i, s: {"type": "autoround_quant", "strategies": s, **i},
        st.sampled_from([{}, {"iters": 5}]),
        st.lists(STRATEGY, min_size=1, max_size=2),
    )
)
CONFIGS = st.builds(
    lambda rotated, smooth, quantizers, cache, others: {
        "apiversion": "modelslim_v1",
        "spec": {"process": [*rotated, *smooth, *quantizers, *cache], **others},
    },
    st.sampled_from([[], [{"type": "quarot"}], [{"type": "quarot", "block_size": 32}]]),
    st.lists(SMOOTH, max_size=2),
    st.lists(QUANTIZER, min_size=1, max_size=3),
    st.sampled_from([[], [{"type": "dynamic_cache", "include": ["*"]}]]),
    st.fixed_dictionaries(
        {},
        optional={
            "runner": st.sampled_from(["auto", "model_wise", "layer_wise"]),
            "dataset": st.sampled_from(["mix_calib.jsonl", "on", "1e3"]),
            "save": st.sampled_from([[{"type": "ascendv1_saver"}], [{"type": "compressed_tensors"}]]),
        },
    ),
)


@given(CONFIGS)
def test_reading_undoes_writing(config):
    try:
        spec = load_spec(config)
    except SpecError:  # a pattern of a selection is excluded, or who is rounded cannot be said
        assume(False)
    text = write_spec(spec, "modelslim")
    again = load_spec(text)
    assert again == spec
    assert print_spec(again) == print_spec(spec)
    assert write_spec(again, "modelslim") == text


PLANS = [
    ("int8/channel/source", None),
    ("int8/asym/joint/channel", None),
    ("int4/g32", None),
    ("int8/channel/source", "int8/token/dynamic"),
    ("int4/channel/source", "int8/token/dynamic"),
    ("int4/over_int8/g64", "int8/token/dynamic"),
    ("int8/channel/source", "int8/asym/joint/tensor"),
    ("int4/channel/source", "int4/token/dynamic"),
]
DECISIONS = st.just(KeepFloat("kept")) | st.sampled_from(
    [Plan(parse_quant(weight), parse_quant(input) if input else None) for weight, input in PLANS]
)
NAMES = PATTERNS.filter(lambda pattern: "{" not in pattern)
MATCHES = (
    st.builds(Linears, NAMES, st.lists(NAMES, max_size=2).map(tuple))
    | st.sampled_from([Kind("linear"), Glob("*.up"), Glob("*.mlp.down"), Glob("m.*.gate")])
    | st.sampled_from(["m.0.attn.q", "head", "m.1.mlp.gate"]).map(Exact)
)


def decided(spec: Spec) -> dict[str, Plan | None]:
    """Each layer's plan by the last rule that matches it, whether or not every rule has a layer.

    No router: a pattern that does not spell it leaves it alone here, and excludes it in msModelSlim.
    """
    found: dict[str, Plan | None] = {fqn: None for fqn, layer in LAYERS.items() if layer.named_only != "router"}
    for one in spec.rules:
        for fqn in found:
            if one.match.matches(LAYERS[fqn]):
                found[fqn] = one.decision if isinstance(one.decision, Plan) else None
    return found


@given(st.lists(st.builds(Rule, MATCHES, DECISIONS), min_size=1, max_size=5))
def test_plans_stay(rules):
    spec = Spec(tuple(rules))
    if any(decided(spec).values()):
        try:
            text = write_spec(spec, "modelslim")
        except SpecError as error:  # an exclude has no exceptions
            text = "\n".join(error.problems)
        if any(isinstance(rule.decision, KeepFloat) and " but " in str(rule.match) for rule in rules):
            assume("msModelSlim excludes all that a pattern has" not in text)
        assert decided(load_spec(text)) == decided(spec)


def test_exceptions_of_what_stays_float():
    def kept(*but: str) -> Spec:
        float_ = {"match": " ".join(["linear:a.*", "but", *but]), "float": True}
        return native(rule(), float_)

    assert "exclude:\n        - a.*\n" in write_spec(kept("b.*"), "modelslim")  # no layer has both
    assert "exclude" not in write_spec(kept("b.*", "a*"), "modelslim")  # nothing is left of it
    with pytest.raises(SpecError) as caught:
        write_spec(kept("*.down"), "modelslim")
    assert list(caught.value.problems) == [
        "linear:a.* but *.down: msModelSlim excludes all that a pattern has; give what but leaves a plan behind"
    ]


def native(*rules: Any, **others: Any) -> Spec:
    return load_spec({"graphq": 1, "rules": list(rules), **others})


def rule(match: str = "linear:*", weight: str = "int8/channel/source", **others: Any) -> dict[str, Any]:
    return {"match": match, "weight": weight, **others}


def test_a_native_spec_as_a_config():
    spec = native(
        rule("kind:linear", "int4/g64"),
        rule("*.mlp.down_proj", input="int8/token/dynamic"),
        {"match": "*.o_proj", "float": True},
        rule("=lm_head", "int8/channel/ssz30/source", input="int8/tensor/histogram"),
        {"match": "=model.layers.0.self_attn.q_proj", "float": True},
        algorithms=[
            "rotate",
            {"smooth-quant": {"alpha": "search"}},
            {"gptq": {"act_order": "none", "scales": "plan", "match": "linear:*"}},
        ],
        cache="int8/asym/joint/channel",
        pipeline="independent",
        run={"target": "ascend", "calibration": "a.jsonl"},
    )
    with pytest.raises(SpecError) as caught:
        write_spec(spec, "modelslim")
    assert caught.value.problems == (
        "gptq: msModelSlim cannot ask for it so",
    )  # down_proj and the head are rounded, too
    spec = native(
        *map(native_rule, spec.rules),
        algorithms=["rotate", {"smooth-quant": {"alpha": "search"}}],
        cache="int8/asym/joint/channel",
        pipeline="independent",
        run={"target": "ascend", "calibration": "a.jsonl"},
    )
    assert (
        write_spec(spec, "modelslim")
        == """\
# msModelSlim's v1 has no W4A16 itself, its v0 has.
# msModelSlim's v1 has groups and asymmetric weights by gptq alone, not by minmax.
apiversion: modelslim_v1
metadata:
  config_id: graphq
spec:
  runner: model_wise
  process:
    - type: quarot
      block_size: -1
    - type: flex_smooth_quant
      enable_subgraph_type:
        - norm-linear
        - linear-linear
        - ov
        - up-down
    - type: group
      configs:
        - type: linear_quant
          qconfig:
            act:
              scope: per_tensor
              dtype: int8
              symmetric: true
              method: histogram
            weight:
              scope: per_channel
              dtype: int8
              symmetric: true
              method: ssz
              ext:
                step: 30
          include:
            - lm_head
        - type: linear_quant
          qconfig:
            act:
              scope: per_token
              dtype: int8
              symmetric: true
              method: minmax
            weight:
              scope: per_channel
              dtype: int8
              symmetric: true
              method: minmax
          include:
            - '*.mlp.down_proj'
        - type: linear_quant
          qconfig:
            weight:
              scope: per_group
              dtype: int4
              symmetric: true
              method: minmax
              ext:
                group_size: 64
          include:
            - '*'
          exclude:
            - model.layers.0.self_attn.q_proj
            - '*.o_proj'
    - type: dynamic_cache
      qconfig:
        scope: per_channel
        dtype: int8
        symmetric: false
        method: minmax
      include:
        - '*'
  dataset: a.jsonl
  save:
    - type: ascendv1_saver
"""
    )


def native_rule(one: Rule) -> dict[str, Any]:
    found: dict[str, Any] = {"match": str(one.match)}
    if isinstance(one.decision, KeepFloat):
        return found | {"float": True}
    plan = one.decision
    return found | {key: str(quant) for key, quant in (("weight", plan.weight), ("input", plan.input)) if quant}


SELECTS = "msModelSlim selects linears by their full names; write =<full name>, or a pattern such as linear:*mlp* or *.down_proj"
GPTQ = {"act_order": "none", "scales": "plan"}


@pytest.mark.parametrize(
    ("spec", "problems"),
    [
        (native(rule("blocks"), rule("down_proj#0"), {"match": "~x", "float": True}, rule("re:.*a"), rule("kind:conv2d"), rule("*.up*")), [
            f"rules[{i}]: {match}: {SELECTS}"
            for i, match in ((3, "re:.*a"), (4, "kind:conv2d"), (5, "*.up*"), (2, "~x"), (0, "blocks"), (1, "down_proj#0"))]),
        (native(rule("linear:{a,b}*")), ["rules[0]: linear:{a,b}*: msModelSlim reads braces as alternatives"]),
        (native(rule("linear:a*", exclusive="x", may_match_nothing=True)), [
            "rules[0]: linear:a*: exclusive: msModelSlim's processors may select one layer twice",
            "rules[0]: linear:a*: may_match_nothing: a pattern that quantizes has to match, as graphq reads it"]),
        (native(rule(weight="int8/tensor"), rule("linear:a", "int3/channel"), rule("linear:b", "nvfp4"), rule("linear:c", "mxfp4")), [
            "mxfp4: msModelSlim has no such weights", "nvfp4: msModelSlim has no such weights",
            "int3/channel: msModelSlim has no such weights", "int8/tensor: msModelSlim has no such weights"]),
        (native(rule(weight="int8/half/channel"), rule("linear:a", "int8/asym/channel"), rule("linear:b", "int8/channel/mse"),
                rule("linear:c", "float8_e4m3fn/128x128"), rule("linear:d", "float8_e5m2/channel")), [
            f"{text}: msModelSlim has no such weights"
            for text in ("float8_e5m2/channel", "float8_e4m3fn/128x128", "int8/channel/mse", "int8/asym/channel", "int8/half/channel")]),
        (native(rule(input="int8/tensor/dynamic"), rule("linear:a", input="int8/asym/token/dynamic"), rule("linear:b", input="mxfp4/dynamic")), [
            f"{text}: msModelSlim has no such activations" for text in ("mxfp4/dynamic", "int8/asym/token/dynamic", "int8/tensor/dynamic")]),
        (native(rule(weight="int4/channel/source", input="int8/tensor")), [
            "msModelSlim has no int4 per_channel weights with int8 per_tensor activations; with these it has int8 per_channel"]),
        (native(rule(weight="int4/g64", input="int8/token/dynamic")), [
            "weight int4/g64, input int8/token/dynamic: msModelSlim has no such pair; its int4 groups under int8 activations are over_int8"]),
        (native(rule(weight="int4/over_int8/g64")), [
            "weight int4/over_int8/g64: msModelSlim has no such pair; its int4 groups under int8 activations are over_int8"]),
        (native({"match": "linear:*", "input": "int8/token/dynamic"}), [
            "input int8/token/dynamic: msModelSlim quantizes no activations without their weights"]),
        (native(rule(), cache="int8/token/dynamic"), ["cache: int8/token/dynamic: msModelSlim's cache is int8/channel or int8/asym/joint/channel"]),
        (native(rule(), prefix="float", run={"model": "m", "samples": 3, "seed": 0, "target": "onnx"}), [
            "prefix: float: msModelSlim feeds each layer what the ones before it give by then",
            "run.model: m: msModelSlim's configs do not say it", "run.samples: 3: msModelSlim's configs do not say it",
            "run.seed: 0: msModelSlim's configs do not say it", "run.target: onnx: msModelSlim has no such saver"]),
        (native(rule(), algorithms=["equalize", "awq", {"rotate": {"r4": True}}, {"smooth-quant": {"where": "multiply"}}, "auto-round"]), [
            "equalize: msModelSlim has no such algorithm", "awq: msModelSlim's awq is duo false, clip false",
            "rotate: msModelSlim has no r4 True", "smooth-quant: msModelSlim has no where multiply",
            "auto-round: msModelSlim's has steps, which are to be written, and no other option"]),
        (native(rule(), algorithms=[{"rotate": {"match": "x"}}, {"smooth-quant": {"match": "self_attn"}}, {"awq": {"duo": False, "clip": False, "n_grid": 3, "match": "x"}}]), [
            "rotate: x: quarot is for the whole model",
            "smooth-quant: self_attn: msModelSlim chooses what factors are folded into, not the layers that are scaled; write folds instead of match",
            "awq: x: msModelSlim chooses what factors are folded into, not the layers that are scaled; write folds instead of match"]),
        (native(rule(), algorithms=[{"awq": {"duo": False, "clip": False, "n_grid": 3, "folds": {"kinds": ["ov"]}}}]), [
            "awq: of msModelSlim's processors with n_grid none is for some kinds of subgraphs"]),
        (native(rule(), algorithms=[{"smooth-quant": {"folds": {"include": ["{a,b}"]}}}]), ["smooth-quant: msModelSlim cannot ask for it so"]),
        (native(rule(), algorithms=["gptq"]), ["gptq: msModelSlim has no act_order static; its gptq is act_order none, scales plan",]),
        (native(rule(), algorithms=[{"gptq": {**GPTQ, "min_samples": 3}}]), [
            "gptq: msModelSlim has no min_samples 3; its gptq is act_order none, scales plan"]),
        (native(rule(), algorithms=[{"gptq": {**GPTQ, "match": "mlp"}}]), ["gptq: msModelSlim cannot ask for it so"]),
        (native(rule(weight="int8/channel/ssz/source"), algorithms=[{"gptq": GPTQ}]), [
            "weight int8/channel/ssz/source: msModelSlim takes ssz or gptq for a weight, not both"]),
        (native(rule(), algorithms=[{"gptq": GPTQ}, {"smooth-quant": {"alpha": 0.5}}]), [
            "algorithms: in msModelSlim they stand in another order: quarot, smoothing, rounding"]),
        (native({"match": "linear:*", "float": True}), ["every rule keeps layers float: there is nothing to select"]),
    ],
)  # fmt: skip
def test_what_the_dialect_cannot_hold(spec, problems):
    with pytest.raises(SpecError) as caught:
        write_spec(spec, "modelslim")
    assert list(caught.value.problems) == problems


def test_defaults_are_written_out():
    def algorithms(*asked: Any) -> list[str]:
        again = load_spec(write_spec(native(rule("linear:*mlp*"), algorithms=[*asked]), "modelslim"))
        return [f"{a.name} {dict(a.options)}" for a in again.algorithms]

    assert algorithms("rtn") == []
    assert algorithms("smooth-quant") == ["smooth-quant {'alpha': 0.5}"]
    assert algorithms({"gptq": {**GPTQ, "match": "linear:*mlp*"}}) == [f"gptq {GPTQ}"]
    assert algorithms({"auto-round": {"steps": 3}}) == ["auto-round {'steps': 3}"]
