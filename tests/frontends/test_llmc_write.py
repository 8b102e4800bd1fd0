"""Specs as LLMC configs: reading undoes writing, and what LLMC cannot say is refused, a line each."""

import contextlib
import copy
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from graphq.errors import SpecError
from graphq.frontends import load_spec, print_spec, write_spec
from graphq.spec.folds import NORMS
from graphq.spec.match import Blocks, Name, parse_match
from graphq.spec.plan import Decision, KeepFloat, Plan
from graphq.spec.quant import parse_quant
from graphq.spec.rules import Algorithm, Rule, Run, Spec, resolve
from tests.frontends.test_llmc import llama

SCALAR = st.fixed_dictionaries({"bit": st.integers(2, 8), "symmetric": st.booleans()})
FLOATS = st.sampled_from(
    [
        *({"bit": bit, "quant_type": "float-quant", "use_qtorch": True} for bit in ("e4m3", "e5m2", "e3m2", "e2m1")),
        *({"bit": bit, "symmetric": False} for bit in ("e3m2", "e2m1", "e2m3", "e1m2")),
    ]
)
SHARES = st.sampled_from([0.05, 0.29, 0.5, 0.8, 1, 1e-05])
RANGES = st.sampled_from([{}, {"calib_algo": "minmax"}, {"calib_algo": "mse"}, {"calib_algo": "hqq"}]) | st.one_of(
    st.fixed_dictionaries({"calib_algo": st.just("mse"), "maxshrink": SHARES, "mse_grid": st.integers(1, 200)}),
    st.fixed_dictionaries({"calib_algo": st.just("hqq"), "lp_norm": SHARES, "iters": st.integers(1, 99)}),
)
GROUP = st.fixed_dictionaries({"granularity": st.just("per_group"), "group_size": st.integers(1, 4096)})
WEIGHTS = st.one_of(
    st.builds(
        lambda format, scales, searched: format | scales | searched,
        SCALAR | FLOATS,
        GROUP | st.sampled_from([{"granularity": "per_channel"}, {"granularity": "per_tensor"}]),
        RANGES,
    ),
    st.builds(
        lambda bit, size: {"bit": bit, "symmetric": True, "granularity": "per_block", "block_size": size},
        st.integers(2, 8),
        st.just(128),
    ),
)
INT_INPUTS = st.fixed_dictionaries({"bit": st.sampled_from([4, 6, 8]), "symmetric": st.booleans()})
STATIC = st.sampled_from(["minmax", "static_minmax", "static_moving_minmax"]).map(
    lambda word: {"granularity": "per_tensor", "static": True, "calib_algo": word}
)
DYNAMIC = (GROUP | st.sampled_from([{"granularity": "per_tensor"}, {"granularity": "per_token"}])).map(
    lambda scales: scales | {"static": False}
)
SCALES = DYNAMIC | STATIC
HIST = {"bit": 8, "symmetric": True, "granularity": "per_tensor", "static": True, "calib_algo": "static_hist"}
INPUTS = st.builds(lambda format, scales: format | scales, INT_INPUTS | FLOATS, SCALES) | st.just(HIST)
SPECIALS = st.one_of(
    st.tuples(st.just("RTN"), st.just({})),
    st.tuples(
        st.just("HQQ"), st.fixed_dictionaries({}, optional={"axis": st.just(1), "lp_norm": SHARES, "kappa": SHARES})
    ),
    st.tuples(
        st.just("Awq"),
        st.fixed_dictionaries(
            {}, optional={"trans_version": st.sampled_from(["v1", "v2"]), "weight_clip": st.booleans()}
        ),
    ),
    st.tuples(
        st.just("GPTQ"),
        st.fixed_dictionaries(
            {}, optional={"actorder": st.booleans(), "percdamp": SHARES, "blocksize": st.integers(1, 256)}
        ),
    ),
    st.tuples(st.just("SmoothQuant"), st.fixed_dictionaries({}, optional={"alpha": SHARES})),
    st.tuples(
        st.just("Quarot"),
        st.fixed_dictionaries(
            {"rotate_mode": st.sampled_from(["hadamard", "random"])}, optional={"online_rotate": st.booleans()}
        ),
    ),
    st.tuples(st.just("TesseraQ"), st.just({"thresholds": [0.8, [1, 2]], "lr": 1e-05, "reduce_memory": None})),
    st.tuples(st.just("SpQR"), st.just({"scale": {"bit": 3, "int_range": [0, 1]}, "zero": {"a": {"b": "~"}}})),
    st.tuples(st.sampled_from(["OsPlus", "DGQ", "QUIK"]), st.fixed_dictionaries({}, optional={"clip_path": st.text()})),
)
PATHS = st.from_regex(r"[\w-]{1,4}(\.[\w-]{1,4})*", fullmatch=True).filter(lambda path: path != "blocks")
ITEMS = PATHS | st.builds(
    lambda path, blocks: f"{path}#{'-'.join(map(str, blocks))}",
    PATHS,
    st.lists(st.integers(0, 70), min_size=1, unique=True),
)
SETTINGS = st.lists(
    st.fixed_dictionaries(
        {"layer_name": st.lists(ITEMS, min_size=1, max_size=3), "do_quant": st.booleans(), "weight": WEIGHTS},
        optional={"act": INPUTS | st.just("none")},
    ),
    max_size=4,
).map(lambda items: {f"setting_{i}": item for i, item in enumerate(items)})
IGNORED = st.one_of(
    st.fixed_dictionaries(
        {"block_ids": st.lists(st.integers(0, 50) | st.just("3-5"), min_size=1)},
        optional={"layer_names": st.lists(PATHS), "speical_names": st.lists(PATHS)},
    ),
    st.fixed_dictionaries({"speical_names": st.lists(PATHS)}),
)
SAVES = st.sampled_from([{}, *({key: True} for key in ("save_vllm", "save_sgl", "save_fake", "save_trtllm"))])
CALIBS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["pileval", "custom_txt"]),
        "path": st.text(),
        "n_samples": st.integers(1, 2**62),
        "seq_len": st.integers(2, 9),
        "seed": st.integers(0, 9),
    },
)


def legal(method: tuple[str, dict[str, Any]], values: dict[str, Any]) -> dict[str, Any]:
    """A ``quant`` section without what LLMC's blocks, and its HQQ, do not take."""
    quant: dict[str, Any] = copy.deepcopy({"method": method[0], "special": method[1], **values})
    for plan in (quant, *quant.get("mix_bits", {}).values()):
        weight = plan["weight"]
        if method[0] == "HQQ" and weight["granularity"] == "per_block":
            weight["granularity"] = "per_channel"
        if method[0] == "HQQ" and weight.get("calib_algo") == "mse":
            del weight["calib_algo"]
        if weight["granularity"] == "per_block" and isinstance(plan.get("act"), dict):
            plan["act"] = {"bit": 8, "symmetric": True, "granularity": "per_group", "group_size": 128}
    return quant


QUANTS = st.builds(
    legal,
    SPECIALS,
    st.fixed_dictionaries(
        {"weight": WEIGHTS},
        optional={
            "act": INPUTS,
            "kvcache": st.builds(
                lambda format, scales: {"method": "Naive", **format, **scales}, INT_INPUTS | FLOATS, SCALES
            ),
            "quant_out": st.booleans(),
            "mix_bits": SETTINGS,
        },
    ),
)
CONFIGS = st.fixed_dictionaries(
    {"quant": QUANTS},
    optional={
        "base": st.just({}) | st.fixed_dictionaries({"seed": st.integers(0, 2**62)}),
        "model": st.just({}) | st.fixed_dictionaries({"path": st.text(), "type": st.just("Llama")}),
        "calib": CALIBS,
        "save": SAVES,
        "ignored_layers": IGNORED,
    },
)


@given(CONFIGS)
def test_reading_undoes_writing(config):
    spec = load_spec(config, "llmc")
    written = write_spec(spec, "llmc")
    assert load_spec(written) == spec
    assert print_spec(load_spec(written)) == print_spec(spec)
    assert write_spec(load_spec(written), "llmc") == written


@given(CONFIGS, st.data())
def test_a_config_with_one_value_replaced_is_read_or_refused(config, data):
    config = copy.deepcopy(config)
    section: Any = config
    while True:
        key = data.draw(st.sampled_from(sorted(section) if isinstance(section, dict) else range(len(section))))
        if not section[key] or not isinstance(section[key], dict | list) or data.draw(st.integers(0, 4)) == 0:
            break
        section = section[key]
    leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
    section[key] = data.draw(leaf | st.lists(leaf, max_size=2) | st.dictionaries(st.text(), leaf, max_size=2))
    with contextlib.suppress(SpecError):
        spec = load_spec(config, "llmc")
        assert load_spec(write_spec(spec, "llmc")) == spec


MATCHES = st.builds(
    Name,
    st.sampled_from(["mlp", "down_proj", "mlp.down_proj", "up_proj", "o_proj", "q_proj", "model.layers.1.mlp"]),
    st.none() | st.sampled_from([(0,), (1,), (1, 2), (0, 1, 2)]),
) | st.sampled_from([parse_match(m) for m in ("blocks#0", "blocks#1-2", "=model.layers.1.mlp.down_proj")])
W8 = Plan(parse_quant("int8/channel"))
W4A8 = Plan(parse_quant("int4/asym/g128"), parse_quant("int8/token/dynamic"))
RULES = st.builds(
    Rule,
    MATCHES,
    st.sampled_from([W8, W4A8, KeepFloat("x"), KeepFloat("y")]),
    exclusive=st.sampled_from(["", "mix_bits"]),
)
BASE = Rule(Blocks(), W4A8)


def kinds(spec: Spec) -> dict[str, Decision | None]:
    """What becomes of each layer of a model of three blocks."""
    resolved, _ = resolve(spec, llama(3))
    return {fqn: None if isinstance(one.decision, KeepFloat) else one.decision for fqn, one in resolved.items()}


@given(st.lists(RULES, max_size=4))
@example([Rule(Name("down_proj"), W8), Rule(Blocks((0,)), KeepFloat("x")), Rule(Name("o_proj", (1,)), W8)])
@example(
    [Rule(Blocks((0,)), KeepFloat("x")), Rule(Name("mlp", (1, 2)), W8), Rule(Name("o_proj", (1,)), KeepFloat("x"))]
)
def test_what_is_written_decides_the_same(rules):
    spec = Spec((BASE, *rules))
    with contextlib.suppress(SpecError):
        expected = kinds(spec)
        read = load_spec(write_spec(spec, "llmc"))
        assert kinds(read) == expected


def test_rules_that_are_in_order_are_written():
    """The property above would hold if nothing were."""
    rules = (
        Rule(Name("down_proj", (0, 3)), W8),
        Rule(Name("o_proj"), KeepFloat("by hand")),
        Rule(Name("mlp.up_proj", (1, 2)), KeepFloat("x")),
        Rule(Name("q_proj", (1, 2)), KeepFloat("x")),
        Rule(parse_match("=model.layers.0.mlp.gate_proj"), KeepFloat("x")),
    )
    assert (
        write_spec(Spec((BASE, *rules)), "llmc").partition("mix_bits:")[2]
        == """
        setting_0:
            layer_name: [down_proj#0-3]
            do_quant: true
            weight:
                bit: 8
                symmetric: true
                granularity: per_channel
        setting_1:
            layer_name: [o_proj]
            do_quant: false
ignored_layers:
    block_ids: [1, 2]
    layer_names: [mlp.up_proj, q_proj]
    speical_names: [model.layers.0.mlp.gate_proj]
"""
    )
    near = (  # each is refused where its blocks, or its name, meet those of the one before
        Rule(Blocks((0,)), KeepFloat("x")),
        Rule(Name("mlp", (1, 2)), W8),
        Rule(Name("mlp.up_proj", (3,)), W8),
        Rule(Name("up", (1,)), W8),
        Rule(parse_match("=x.mlp.up_proj"), KeepFloat("x")),
        Rule(Name("p.up_proj", (1,)), W8),
    )
    names = "layer_name: [mlp#1-2, mlp.up_proj#3, up#1, p.up_proj#1]\n"
    assert names in write_spec(Spec((BASE, *near)), "llmc")
    two = (Rule(Name("o_proj", (1,)), KeepFloat("x")), Rule(Name("up_proj", (2,)), KeepFloat("x")))
    written = write_spec(Spec((BASE, *two)), "llmc")  # there is one list of blocks to ignore
    assert "layer_name: [up_proj#2]\n" in written
    assert written.endswith("ignored_layers:\n    block_ids: [1]\n    layer_names: [o_proj]\n")
    whole = (Rule(Blocks((0, 1)), KeepFloat("x")), Rule(Blocks((3, 4, 5, 1)), KeepFloat("y")))
    assert write_spec(Spec((BASE, *whole)), "llmc").endswith("ignored_layers:\n    block_ids: [0, 1, 3-5]\n")
    kept = (*whole[:1], Rule(Name("o_proj", (4,)), KeepFloat("x")))
    assert load_spec(write_spec(Spec((BASE, *kept)), "llmc")).rules[1:] == (
        Rule(Name("o_proj", (4,)), KeepFloat("mix_bits.setting_0: do_quant False"), exclusive="mix_bits"),
        Rule(Blocks((0, 1)), KeepFloat("ignored_layers: block_ids")),
    )


@pytest.mark.parametrize(
    ("input", "cache", "static"),
    [
        *(("int8/tensor", "int8/tensor", ""), ("int8/tensor", "int8/token/dynamic", "        static: false\n")),
        *(("int8/token/dynamic", "int8/tensor", "        static: true\n"), (None, "int8/tensor/dynamic", "")),
    ],
)
def test_a_cache_says_static_where_activations_do_not(input, cache, static):
    spec = Spec((Rule(Blocks(), quants("int8/channel", input)),), cache=parse_quant(cache))
    written = write_spec(spec, "llmc")
    assert written.partition("kvcache:")[2].partition("granularity: ")[2].partition("\n")[2] == static
    assert load_spec(written) == spec


def test_many_rules_are_written_in_no_time():
    rules = [Rule(Name(f"l{i}", (i,)), KeepFloat("x"), exclusive="mix_bits") for i in range(1500)]
    assert write_spec(Spec((BASE, *rules)), "llmc").count("l1499#1499") == 1


def quants(weight: str, input: str | None = None) -> Plan:
    return Plan(parse_quant(weight), None if input is None else parse_quant(input))


@pytest.mark.parametrize(
    ("spec", "problems"),
    [
        (Spec((Rule(Name("a"), W8),)), ["a: weight int8/channel: LLMC's first word is a weight for all blocks"]),
        (Spec((Rule(Blocks((1,)), W8),)), ["blocks#1: weight int8/channel: LLMC's first word is a weight for all blocks"]),
        (Spec((Rule(Blocks(), Plan(None, parse_quant("int8/tensor"))),)), ["blocks: input int8/tensor: LLMC's first word is a weight for all blocks"]),
        (Spec((Rule(Blocks(), W8, may_match_nothing=True),)), ["blocks: may_match_nothing: a name in an LLMC config must match"]),
        (Spec((Rule(Blocks(), W8, exclusive="mix_bits"),)), ["blocks: exclusive: mix_bits: only settings of mix_bits are exclusive"]),
        (Spec((BASE, Rule(Name("a"), KeepFloat("x"), may_match_nothing=True))), ["a: may_match_nothing: a name in an LLMC config must match"]),
        (Spec((BASE, Rule(Name("a"), W8, exclusive="pair"))), ["a: exclusive: pair: only settings of mix_bits are exclusive"]),
        (Spec((BASE, Rule(Blocks((1,)), KeepFloat("x"), exclusive="mix_bits"))), ["blocks#1: exclusive: mix_bits: only settings of mix_bits are exclusive"]),
        (Spec((BASE, *(Rule(parse_match(m), W8) for m in ("*.a", "re:a", "kind:linear", "~a", "=a.b", "blocks#1", "blocks")))), [
            f"{m}: weight int8/channel: LLMC cannot name these layers for it" for m in ("*.a", "re:a", "kind:linear", "~a", "=a.b", "blocks#1", "blocks")]),
        (Spec((BASE, Rule(parse_match("*.a"), KeepFloat("x"), may_match_nothing=True), Rule(Blocks(), KeepFloat("y")))), [
            "*.a: float (x): LLMC cannot name these layers for it", "blocks: float (y): LLMC cannot name these layers for it"]),
        (Spec((BASE, Rule(Name("a"), Plan(None, parse_quant("int8/tensor"))))), ["a: input int8/tensor: LLMC quantizes no input without its weight"]),
        # order
        (Spec((BASE, Rule(Name("proj"), W8), Rule(Name("proj", (3,)), KeepFloat("x"), exclusive="mix_bits"))), ["proj#3 comes after proj: LLMC cannot say which of them decides"]),
        (Spec((BASE, Rule(Name("mlp.a", (1,)), W8), Rule(Name("mlp"), W8))), ["mlp comes after mlp.a#1: LLMC cannot say which of them decides"]),
        (Spec((BASE, Rule(Blocks((1,)), KeepFloat("x")), Rule(Name("a"), W8))), ["a comes after blocks#1: LLMC cannot say which of them decides"]),
        (Spec((BASE, Rule(Name("b", (1,)), KeepFloat("x")), Rule(Name("a", (1, 2)), W8))), ["a#1-2 comes after b#1: LLMC cannot say which of them decides"]),
        (Spec((BASE, Rule(parse_match("=x.mlp.a"), KeepFloat("x")), Rule(Name("mlp"), W8), Rule(Name("o"), W8))), ["mlp comes after =x.mlp.a: LLMC cannot say which of them decides"]),
        # formats
        *((Spec((Rule(Blocks(), quants(weight)),)), [f"quant: weight: {weight}: LLMC has no {weight.rpartition('/')[0] or weight}"])
          for weight in ("int8/half/channel", "uint8/channel", "int4/asym/joint/channel", "mxfp4", "nvfp4", "hifloat8/channel", "int4/over_int8/g32", "float8_e4m3fn/pow2/channel")),
        (Spec((Rule(Blocks(), quants("int8/128x64")),)), ["quant: weight: int8/128x64: LLMC's blocks are square and symmetric, of min-max range"]),
        (Spec((Rule(Blocks(), quants("int8/asym/64x64")),)), ["quant: weight: int8/asym/64x64: LLMC's blocks are square and symmetric, of min-max range"]),
        (Spec((Rule(Blocks(), quants("int8/64x64/hqq")), Rule(Name("a"), W8))), ["quant: weight: int8/64x64/hqq: LLMC's blocks are square and symmetric, of min-max range"]),
        (Spec((Rule(Blocks(), quants("int8/64x64", "int8/g32/dynamic")),)), [
            "quant: weight int8/64x64, input int8/g32/dynamic: LLMC's blocks take inputs in groups of their size"]),
        *((Spec((BASE, Rule(Name("a"), quants(f"int8/channel/{method}")))), [f"a: weight: int8/channel/{method}: LLMC has no range {method} for it"])
          for method in ("mse", "mse0.8:100:2:80", "mse0.8:100:2.4:81", "percentile", "ssz", "ofmr")),
        *((Spec((BASE, Rule(Name("a"), quants("int8/channel", f"int8/asym/tensor/{method}")))), [f"a: input: int8/asym/tensor/{method}: LLMC has no range {method} for it"])
          for method in ("mse", "mse0.8:100:2.4:80", "histogram", "ema0.1", "entropy", "percentile")),
        (Spec((BASE,), cache=parse_quant("int8/channel")), ["cache: int8/channel: kvcache takes per_tensor, per_token or per_group"]),
        (Spec((BASE,), cache=parse_quant("int8/g32")), ["cache: int8/g32: one scale for each group exists only at run time"]),
        (Spec((BASE,), cache=parse_quant("int16/tensor")), ["cache: int16/tensor: kvcache takes 2, 3, 4, 5, 6, 7 or 8 bits"]),
        (Spec((BASE,), cache=parse_quant("int8/tensor/hqq")), ["cache: int8/tensor/hqq: LLMC has no range hqq for it"]),
        # algorithms and the rest
        (Spec((BASE,), (Algorithm("awq"),)), ["awq: duo: an empty value: LLMC's Awq has no such setting"]),
        (Spec((BASE,), (Algorithm("awq", (("duo", True), ("n_grid", 20), ("clip", 1))),)), [
            "awq: clip: 1: LLMC's Awq has no such setting", "awq: n_grid: 20: LLMC's Awq has no such setting"]),
        (Spec((BASE,), (Algorithm("gptq"),)), ["gptq: scales: 'search': LLMC's GPTQ has no such setting"]),
        (Spec((BASE,), (Algorithm("gptq", (("scales", "plan"), ("block_size", "x"), ("dampening", True), ("act_order", "dynamic"))),)), [
            "gptq: act_order: 'dynamic': LLMC's GPTQ has no such setting", "gptq: block_size: 'x': LLMC's GPTQ has no such setting", "gptq: dampening: True: LLMC's GPTQ has no such setting"]),
        (Spec((BASE,), (Algorithm("smooth-quant", (("alpha", "search"), ("where", "fold"))),)), [
            "smooth-quant: folds: everything: LLMC's SmoothQuant folds into norm-linear",
            "smooth-quant: alpha: 'search': LLMC's SmoothQuant has no such setting", "smooth-quant: where: 'fold': LLMC's SmoothQuant has no such setting"]),
        (Spec((BASE,), (Algorithm("rotate"),)), ["rotate: r2: True: LLMC's Quarot has no such setting"]),
        (Spec((BASE,), (Algorithm("rotate", (("r1", False), ("r3", True), ("r4", True), ("kind", "hadamard"), ("block_size", None))),)), [
            "rotate: r1: False: LLMC's Quarot has no such setting", "rotate: r3: True: LLMC's Quarot has no such setting",
            "rotate: kind: 'hadamard': LLMC's Quarot has no such setting", "rotate: block_size: an empty value: LLMC's Quarot has no such setting"]),
        (Spec((BASE,), (Algorithm("auto-round"),)), ["auto-round: LLMC has no such method"]),
        (Spec((BASE,), (Algorithm("hqq"),)), ["hqq: LLMC has no such method"]),
        (Spec((BASE,), (Algorithm("rtn", (("a", 1),)),)), ["rtn: LLMC has no such method"]),
        (Spec((BASE,), (Algorithm("spqr", (("scales.bit", 3),)),)), ["spqr: LLMC's SpQR has no such options"]),
        (Spec((BASE,), (Algorithm("spqr", (("scale", 1), ("scale.bit", 3))),)), ["spqr: LLMC's SpQR has no such options"]),
        (Spec((BASE,), (Algorithm("spqr", (("scale" + 9999 * ".a", 1),)),)), ["spqr: LLMC's SpQR has no such options"]),
        (Spec((BASE,), (Algorithm("awq", (("duo", True), ("clip", False)), folds=NORMS),)), ["awq: folds: norm-linear: LLMC's Awq folds into everything"]),
        (Spec((BASE,), (Algorithm("smooth-quant", match=(Name("mlp"),), folds=NORMS),)), ["smooth-quant: match: LLMC's methods are for all layers"]),
        (Spec((BASE,), (Algorithm("rotate"), Algorithm("gptq", match=(Name("mlp"),)))), [
            "algorithms: rotate and gptq: an LLMC config has one method", "gptq: match: LLMC's methods are for all layers"]),
        (Spec((BASE,), pipeline="independent"), ["pipeline: independent: LLMC goes from block to block"]),
        (Spec((BASE,), prefix="float"), ["prefix: float: without a method, LLMC calibrates no blocks"]),
        (Spec((BASE,), run=Run(batches=3, target="onnx")), ["run: batches: 3: LLMC's calib counts samples", "run: target: onnx: LLMC has no such export"]),
    ],
)  # fmt: skip
def test_refused(spec, problems):
    with pytest.raises(SpecError) as caught:
        write_spec(spec, "llmc")
    assert list(caught.value.problems) == [f"llmc: {problem}" for problem in problems]


def test_one_method_of_graphq_is_written_with_its_defaults():
    spec = Spec((BASE,), (Algorithm("rtn"), Algorithm("gptq", (("scales", "plan"),))))
    read = load_spec(write_spec(spec, "llmc"))
    options = (("act_order", "static"), ("scales", "plan"), ("block_size", 128), ("dampening", 0.01))
    assert (read.algorithms, read.prefix) == ((Algorithm("gptq", options),), "quantized")
    assert load_spec(write_spec(Spec((BASE,), (Algorithm("rtn"),)), "llmc")).algorithms == ()
    mse = Spec((Rule(Blocks(), quants("int8/g64/mse0.8:100:2.4:80")),))
    assert write_spec(mse, "llmc").endswith("group_size: 64\n        calib_algo: mse\n")
    hqq = Rule(Name("a"), quants("int8/g64/hqq"))
    assert "calib_algo: hqq\n                lp_norm: 0.7\n" in write_spec(Spec((BASE, hqq)), "llmc")
