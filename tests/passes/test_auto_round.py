"""Learned rounding: less error than rounding to nearest, for the layers it is for, the same each time."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

import graphq
from graphq import numerics
from graphq.algorithms import PassContext, quantization
from graphq.capture.source import KEY, SHARED, CachePair, source_of
from graphq.errors import SpecError
from graphq.ir.layers import LAYER, PLAN, layers
from graphq.ir.pipeline import Pass, Pipeline, fingerprint
from graphq.ir.text import dump
from graphq.passes.auto_round import AutoRound
from graphq.passes.awq import AWQ
from graphq.passes.blockwise import Blockwise
from graphq.passes.calibrate import Calibrate
from graphq.passes.observe import Observe, observers
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.split_gate_up import SplitGateUp
from graphq.spec.match import parse_match
from graphq.spec.plan import Decision
from graphq.spec.rules import Algorithm
from graphq.state import tensor_of
from tests.graphs import annotated, assert_vals, plan, run, spec, targets
from tests.models import MLP, Blocks, ConvBnRelu, MoE, Tied, Twice, capture, captured, random_inputs

Data = Sequence[tuple[Tensor, ...]]


def numbers(*shape: int, count: int = 4) -> Data:
    """A few batches, whose numbers are alike in a row: what rounding one weight adds, another can take back."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator) for _ in range(count)]
    return [(2 * row + torch.randn(shape, generator=generator),) for row in rows]


X = numbers(16, 32)
SMALL = numbers(4, 8)


def wide() -> fx.GraphModule:
    return capture(MLP(32, 48), torch.ones(2, 32))


def learn(gm: fx.GraphModule, data: Data, options: AutoRound | None = None, **rules: Decision | str) -> int:
    """The number of changes, of a few steps if there are no ``options``."""
    if rules:
        annotated(gm, **rules)
    with torch.no_grad():
        return Pipeline([options or AutoRound(steps=5)], strict=True).run(gm, data)["auto-round"]


def errors(gm: fx.GraphModule, data: Data, steps: Sequence[Pass], **rules: Decision | str) -> list[float]:
    """The squared output error of rounding to nearest, and of ``steps``."""
    wanted = [run(gm, *batch) for batch in data]
    found: list[float] = []
    for passes in (steps, [QuantizeWeights()]):
        own = annotated(copy.deepcopy(gm), **rules)
        with torch.no_grad():
            Pipeline([*passes, QuantizeWeights()], strict=True).run(own, data)
        found.append(sum(float((run(own, *x) - y).square().sum()) for x, y in zip(data, wanted, strict=True)))
    return found[::-1]


def test_golden() -> None:
    gm = capture(MLP(), torch.ones(2, 8))
    assert learn(gm, SMALL, up="int8/channel", down="int4/asym/g5") == 2
    assert_expected_inline(
        dump(gm),
        """\
%x: f32[batch, 8] = input
%1: f32[12, 8] = graphq.dequantize(@up.weight, @up.weight_scale, None, None, 'int8', [1, -1], f32)
%2: f32[batch, 12] = aten.linear(%x, %1, @up.bias)  # up: weight int8/channel
%3: f32[batch, 12] = aten.relu(%2)
%4: f32[8, 12] = graphq.dequantize(@down.weight, @down.weight_scale, @down.weight_zero_point, None, 'int4/asym', [1, 5], f32)
%5: f32[batch, 8] = aten.linear(%3, %4, @down.bias)  # down: weight int4/asym/g5
return [%5]
""",
    )
    assert {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in gm.state_dict().items()} == {
        "up.bias": ("float32", [12]),
        "down.bias": ("float32", [8]),
        "up.weight": ("int8", [12, 8]),
        "up.weight_scale": ("float32", [12, 1]),
        "down.weight": ("int8", [8, 12]),
        "down.weight_scale": ("float32", [8, 3]),
        "down.weight_zero_point": ("int8", [8, 3]),
    }
    assert_vals(gm, *SMALL[0])
    assert learn(gm, SMALL) == 0  # nothing float is left


# -- less error than rounding to nearest -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quant",
    [
        *(f"int{bits}{kind}/g{size}" for bits, size in ((4, 16), (3, 16), (2, 16)) for kind in ("", "/asym")),
        *("int4/half/channel", "int4/by_sign/g16", "int4/asym/joint/g16", "int3/asym/g20", "int4/tensor"),
        *("int3/g16/mse", "int3/asym/g16/hqq", "int4/channel/ssz"),
    ],
)
def test_the_error_is_less(quant: str) -> None:
    nearest, learned = errors(wide(), X, [AutoRound(steps=40, batch_size=64)], up=quant, down=quant)
    assert learned < 0.95 * nearest


@pytest.mark.parametrize("quant", ["int4/g16", "int4/asym/g16", "int3/asym/g16", "int2/g16", "int2/asym/g16"])
def test_the_error_is_much_less_block_by_block(quant: str) -> None:
    gm = captured("llama")
    data = [random_inputs(gm, seed=seed) for seed in range(4)]
    rules = {fqn.replace(".", "__"): quant for fqn in layers(gm) if ".layers." in fqn}
    nearest, learned = errors(gm, data, [Blockwise((AutoRound(steps=20),))], **rules)
    assert learned < 0.6 * nearest


def test_it_is_never_worse() -> None:
    """A rate that throws all offsets to their bounds: what is kept is rounding to nearest, and that is said."""
    told: list[str] = []
    gm, nearest = wide(), wide()
    learn(gm, X, AutoRound(steps=1, lr=1.0, note=told.append), up="int4/g16", down="int8/channel")
    Pipeline([QuantizeWeights()]).run(annotated(nearest, up="int4/g16", down="int8/channel"))
    assert told == ["up and 1 more: rounded to nearest: auto-round found no smaller error"]
    assert {k: v.tolist() for k, v in gm.state_dict().items()} == {
        k: v.tolist() for k, v in nearest.state_dict().items()
    }


class Choice(nn.Module):
    """Gives no float."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).argmax(-1)


def test_outputs_without_an_error_to_learn_from() -> None:
    told: list[str] = []
    gm = capture(Choice(), torch.ones(2, 32))
    assert learn(gm, X, AutoRound(note=told.append), head="int4/channel") == 1
    assert told == ["head: rounded to nearest: auto-round found no smaller error"]


class Present(nn.Module):
    """Gives two outputs, of which only a declared cache is left out of the error."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 4)

    def forward(self, state: Tensor, x: Tensor) -> dict[str, Tensor]:
        y = self.head(x)
        return {"y": y * 2, "present.0": torch.cat([state, y])}


@pytest.mark.parametrize(("caches", "judged"), [((), [0, 1]), ((CachePair("state", "present.0"),), [0])])
def test_declared_caches_alone_are_left_out(caches: tuple[CachePair, ...], judged: list[int]) -> None:
    from graphq.passes import auto_round

    gm = capture(Present(), torch.ones(2, 4), torch.ones(2, 32))
    gm.meta[KEY] = dataclasses.replace(source_of(gm), caches=caches)
    found = auto_round._compared_outputs(gm, {"head.weight"})  # pyright: ignore[reportPrivateUsage]
    assert [place for place, _ in found] == judged


def test_codes_move_by_one_and_scales_shrink() -> None:
    gm, nearest = wide(), wide()
    learn(gm, X, AutoRound(steps=20, batch_size=64), up="int4/channel")
    Pipeline([QuantizeWeights()]).run(annotated(nearest, up="int4/channel"))
    new, old = gm.state_dict(), nearest.state_dict()
    assert not torch.equal(new["up.weight"], old["up.weight"])
    assert (new["up.weight_scale"] <= old["up.weight_scale"]).all()
    w = wide().state_dict()["up.weight"] / new["up.weight_scale"]
    assert (w.clamp(-8, 7) - new["up.weight"]).abs().max() <= 1 + 1e-5  # half a step to the nearest, half of an offset


# -- layers ------------------------------------------------------------------------------------------------------------


class Transposed(nn.Module):
    """GPT-2's ``Conv1D``: the weight is ``[K, N]``."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc = nn.ParameterDict({"weight": torch.empty(32, 24), "bias": torch.empty(24)})

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.c_fc["bias"], x, self.c_fc["weight"])


class CastWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(32, 24, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w.weight.float())


@pytest.mark.parametrize(
    ("model", "data", "rules"),
    [
        (Transposed(), X, {"c_fc": "int3/asym/g8"}),
        (CastWeight(), X, {"w": "int3/g8"}),
        (ConvBnRelu(), numbers(4, 4, 6, 6), {"conv": "int3/asym/g2", "depthwise": "int3/channel"}),
        (Twice(), SMALL, {"shared": "int3/asym/channel"}),
    ],
    ids=["addmm", "cast", "convolutions", "twice"],
)
def test_other_layers(model: nn.Module, data: Data, rules: dict[str, str]) -> None:
    gm = capture(model, torch.ones(2, *data[0][0].shape[1:]))
    nearest, learned = errors(gm, data, [AutoRound(steps=40, batch_size=64)], **rules)
    assert learned < 0.95 * nearest
    assert learn(gm, data, None, **rules) == len(rules)
    assert_vals(gm, *data[0])


def experts() -> fx.GraphModule:
    gm = capture(MoE(), torch.ones(2, 8))
    SplitGateUp().run(gm)
    return gm


def test_experts() -> None:
    """Of four experts one stays float, and two formats are learned side by side."""
    rules: dict[str, Decision | str] = {
        **{
            f"experts__{i}__{role}": "int3/asym/channel"
            for i in (0, 2)
            for role in ("gate_proj", "up_proj", "down_proj")
        },
        "experts__3__down_proj": "int2/channel",
    }
    data = numbers(64, 8)
    nearest, learned = errors(experts(), data, [AutoRound(steps=40, batch_size=256)], **rules)
    assert learned < 0.95 * nearest
    gm = experts()
    kept = tensor_of(gm, "experts.down_proj").detach()[1]
    assert learn(gm, data, None, **rules) == 3
    assert torch.equal(gm.state_dict()["experts.down_proj.part1.weight"][0], kept)
    assert_vals(gm, *data[0])


def test_an_expert_that_no_tokens_reach_is_rounded_to_nearest() -> None:
    gm = experts()
    with torch.no_grad():
        tensor_of(gm, "router.weight").zero_()  # all rows go to the first expert
    told: list[str] = []
    options = AutoRound(steps=20, batch_size=16, note=told.append)
    learn(gm, numbers(16, 8), options, **{f"experts__{i}__down_proj": "int2/channel" for i in range(2)})
    assert told == ["experts.1.down_proj: rounded to nearest: no tokens reached it in calibration"]


# -- what is left alone ------------------------------------------------------------------------------------------------


def test_only_the_layers_asked_for() -> None:
    gm = wide()
    before = tensor_of(gm, "up.weight").detach().clone()
    assert learn(gm, X, AutoRound(frozenset({"down"}), steps=5), up="int4/channel", down="int4/channel") == 1
    assert torch.equal(tensor_of(gm, "up.weight"), before)
    assert targets(gm) == ["aten.linear", "aten.relu", "graphq.dequantize", "aten.linear"]


@pytest.mark.parametrize("decision", ["float", plan(None, "int8/token/dynamic")], ids=["float", "input"])
def test_float_weights(decision: Decision | str) -> None:
    gm = wide()
    before = fingerprint(annotated(gm, up=decision))
    assert learn(gm, X, up=decision) == 0
    assert fingerprint(gm) == before


def test_embeddings() -> None:
    tokens = [(torch.tensor([[0, 3, 15], [7, 7, 1]]),)]
    gm = capture(Tied(), *tokens[0])
    assert learn(gm, tokens, embedding="int8/channel") == 0
    gm = capture(Tied(), *tokens[0])
    assert learn(gm, tokens, embedding="int8/channel", head="int4/channel") == 1


def test_quantized_weights() -> None:
    gm = annotated(wide(), up="int4/channel", down="int4/channel")
    Pipeline([QuantizeWeights(only=frozenset({"up"}))]).run(gm)
    codes = gm.state_dict()["up.weight"].clone()
    assert learn(gm, X) == 1
    assert torch.equal(gm.state_dict()["up.weight"], codes)


class TiedBlocks(Blocks):
    """Both blocks have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].up.weight = self.blocks[0].up.weight  # type: ignore[union-attr]


def test_a_weight_that_several_parts_share() -> None:
    gm = capture(TiedBlocks(), torch.ones(2, 8))
    annotated(gm, **{f"blocks__{i}__{name}": "int4/channel" for i in (0, 1) for name in ("up", "down")})
    with torch.no_grad():
        assert Pipeline([Blockwise((AutoRound(steps=5),))], strict=True).run(gm, SMALL) == {"blockwise": 2}
    for i in (0, 1):
        assert tensor_of(gm, f"blocks.{i}.up.weight").dtype == torch.float32
        assert tensor_of(gm, f"blocks.{i}.down.weight").dtype == torch.int8
    alone = wide()
    alone.meta[SHARED] = frozenset({"up.weight", "down.weight"})
    assert learn(alone, X, up="int4/channel", down="int4/channel") == 0


# -- formats, inputs and data ------------------------------------------------------------------------------------------


def test_every_layer_has_its_own_bits() -> None:
    gm = wide()
    assert learn(gm, X, AutoRound(steps=20), up="int2/asym/g16", down="int8/channel") == 2
    state = gm.state_dict()
    assert (state["up.weight"].min(), state["up.weight"].max()) == (-2, 1)
    assert state["down.weight"].abs().max() > 8


@pytest.mark.parametrize("quant", ["float8_e4m3fn/channel", "float4_e2m1/g16", "mxfp4", "nvfp4", "int4/over_int8/g16"])
def test_other_formats_are_refused(quant: str) -> None:
    gm = wide()
    before = fingerprint(annotated(gm, up=quant, down="int4/channel"))
    with pytest.raises(SpecError) as raised:
        AutoRound().run(gm, X)
    text = f"up: weight {plan(quant).weight}: auto-round holds integer formats; leave it out of its match"
    assert raised.value.problems == (text,)
    assert fingerprint(gm) == before
    assert learn(gm, X, AutoRound(frozenset({"down"}), steps=5)) == 1


def test_inputs_with_scales_of_run_time_are_quantized() -> None:
    """What is learned with them is better with them than what is learned without."""
    rules: dict[str, Decision | str] = {
        "up": plan("int3/g16", "int4/token/dynamic"),
        "down": plan("int3/g16", "int4/tensor/dynamic"),
    }
    gm = wide()
    wanted = [run(gm, *batch) for batch in X]
    found: list[float] = []
    for inputs in (True, False):
        own = annotated(copy.deepcopy(gm), **rules if inputs else {"up": "int3/g16", "down": "int3/g16"})
        with torch.no_grad():
            Pipeline([AutoRound(steps=60, batch_size=16)]).run(own, X)
        for node in own.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
            node.meta[PLAN] = rules[node.meta[LAYER]]
        Pipeline([QuantizeActivations()]).run(own)
        found.append(sum(float((run(own, *x) - y).square().sum()) for x, y in zip(X, wanted, strict=True)))
    assert found[0] < found[1]


def test_experts_with_inputs_of_their_own() -> None:
    rules: dict[str, Decision | str] = {
        "experts__0__gate_proj": plan("int4/channel", "int4/token/dynamic"),
        "experts__1__gate_proj": plan("int4/channel"),
        "experts__2__gate_proj": plan("int4/channel", "int8/token/dynamic"),
    }
    assert learn(experts(), numbers(32, 8), None, **rules) == 1


def test_observers_see_nothing_more() -> None:
    gm = annotated(wide(), up=plan("int4/channel", "int8/tensor"))
    with torch.no_grad():
        Pipeline([Observe(), Calibrate()]).run(gm, X)
        before = [dict(observer.state_dict()) for _, observer in observers(gm)]
        assert Pipeline([AutoRound(steps=5)], strict=True).run(gm, [(x * 100,) for (x,) in X]) == {"auto-round": 1}
    after = [dict(observer.state_dict()) for _, observer in observers(gm)]
    assert len(before) == 1
    assert str(after) == str(before)


def test_the_same_seed_gives_the_same_bytes() -> None:
    def made(**options: Any) -> str:
        gm = wide()
        learn(gm, X, AutoRound(steps=10, **options), up="int3/g16", down="int3/g16")
        return fingerprint(gm)

    first = made()
    torch.manual_seed(99)
    assert made() == first
    assert made(seed=1) != first


def test_data_given_once_and_in_inference_mode() -> None:
    with torch.inference_mode():
        seen = [(x.clone(),) for (x,) in X]
    first, second = wide(), wide()
    learn(first, X, up="int4/channel")
    annotated(second, up="int4/channel")
    with torch.inference_mode():
        Pipeline([AutoRound(steps=5)]).run(second, iter(seen))
    assert fingerprint(first) == fingerprint(second)


@pytest.mark.parametrize("batches", [None, []])
def test_without_data(batches: Data | None) -> None:
    with pytest.raises(SpecError, match="calibration: no batches; auto-round needs at least one"):
        AutoRound().run(annotated(wide(), up="int4/channel"), batches)


def test_errors_of_layers_are_recorded() -> None:
    found: dict[str, float] = {}
    gm = wide()
    w = tensor_of(gm, "up.weight").detach().clone()
    learn(gm, X, AutoRound(steps=5, record=found.__setitem__), up="int4/channel")
    state = gm.state_dict()
    assert found == {"up": numerics.sqnr_db(w, state["up.weight"] * state["up.weight_scale"])}


def test_awq_leaves_ranges_to_it() -> None:
    gm = wide()
    own = Algorithm("auto-round", match=(parse_match("up"),))
    for algorithms, clip, unclipped in (
        ((Algorithm("awq"), own), True, {"up"}),
        ((Algorithm("awq"), Algorithm("auto-round")), False, set[str]()),
    ):
        asked = dataclasses.replace(spec(up="int4/channel"), algorithms=algorithms)
        (step, *_) = quantization(asked, layers(gm), PassContext(), blocks=True)
        assert isinstance(step, Blockwise)
        (awq,) = (one for one in step.passes if isinstance(one, AWQ))
        assert (awq.clip, awq.unclipped) == (clip, unclipped)
        assert [one.name for one in step.passes][-4:] == [
            "calibrate", "auto-round", "quantize-weights", "quantize-activations",
        ]  # fmt: skip


def test_a_spec_asks_for_it() -> None:
    asked: dict[str, Any] = {
        "graphq": 1,
        "rules": [{"match": name, "weight": "int3/asym/g16"} for name in ("up", "down")],
        "algorithms": [
            {"awq": {"n_grid": 2}},
            {"auto-round": {"steps": 30, "lr": 0.05, "batch_size": 64, "match": "up"}},
        ],
    }
    model = MLP(32, 48)
    made = graphq.compile(model, asked, inputs=torch.ones(2, 32), calibration=[x for (x,) in X])
    passes = {
        n.meta["graphq.layer"]: n.meta["graphq.by"]
        for n in made.graph.graph.nodes
        if n.target is torch.ops.graphq.dequantize.default
    }
    assert passes == {"up": ("auto-round",), "down": ("quantize-weights",)}
    with pytest.raises(SpecError, match="auto-round: steps: 0 is not a whole number from 1"):
        graphq.compile(
            model, {**asked, "algorithms": [{"auto-round": {"steps": 0}}]}, inputs=torch.ones(2, 32), calibration=X
        )
    with pytest.raises(SpecError, match="calibration: none given, but the spec asks for auto-round"):
        graphq.compile(model, {**asked, "algorithms": ["auto-round"]}, inputs=torch.ones(2, 32))
