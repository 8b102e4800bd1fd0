"""Activations evened out at the weights' cost: what is scaled, by what, and that nothing else changes."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn

import graphq
from graphq.capture.source import source_of
from graphq.data.batches import complete
from graphq.ir import edit
from graphq.ir.channel_groups import column_magnitudes, groups
from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.observers.statistics import ChannelObserver, statistic_on
from graphq.passes import gptq as gptq_pass
from graphq.passes.calibrate import Calibrate
from graphq.passes.gptq import GPTQ
from graphq.passes.observe import Observe
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.smooth_quant import ALPHAS, SmoothQuant, expected_error, smoothing
from graphq.passes.stop_observing import StopObserving
from graphq.pipelines import canonical_passes
from graphq.spec.folds import Folds
from graphq.state import tensor_of
from tests.graphs import annotated, assert_vals, plan, run
from tests.lifted import assert_same_answers, assert_same_function, copied, lifted
from tests.models import capture as capture_small
from tests.models import captured, random_inputs, tiny

W8A8 = plan("int8/channel", "int8/tensor")


class Norm(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Gated(nn.Module):
    """A norm, and a gated MLP beside the residual."""

    def __init__(self, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


EXAMPLE = torch.ones(2, 8)
BATCHES = [(torch.randn(5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),) for seed in (1, 2)]


def capture(model: nn.Module) -> fx.GraphModule:
    return lifted(capture_small(model, EXAMPLE))


def smoothed(
    gm: fx.GraphModule, batches: Sequence[tuple[Tensor, ...]], **options: Any
) -> tuple[fx.GraphModule, int, list[str]]:
    """A copy of ``gm``, smoothed; the number of changes, and the notes. A second run of the observers finds nothing."""
    notes: list[str] = []
    made = copied(gm)
    step = SmoothQuant(**options, note=notes.append)
    with torch.no_grad():
        counts = Pipeline([Observe((step,), ranges=False), Calibrate(), step, StopObserving()], strict=True).run(
            made, batches
        )
    return made, counts["smooth-quant"], notes


def test_golden_folded() -> None:
    gm = annotated(capture(Gated()), gate=W8A8, up=W8A8, down=W8A8)
    before = dump(gm)
    made, count, notes = smoothed(gm, BATCHES)
    assert (count, notes) == (6, [])  # the gain, gate, up; up's rows and bias, down
    assert dump(made) == before
    assert_same_function(gm, made, BATCHES[0], 1e-12)
    changed = [name for name, w in gm.state_dict().items() if not torch.equal(w, made.state_dict()[name])]
    assert changed == ["norm.weight", "gate.weight", "up.weight", "up.bias", "down.weight"]
    assert_vals(made, *BATCHES[0])


@pytest.mark.parametrize(
    ("folds", "changed"),
    [
        (Folds(("norm-linear",)), ["norm.weight", "gate.weight", "up.weight"]),
        (Folds(("up-down",)), ["up.weight", "up.bias", "down.weight"]),
        (Folds(("linear-linear", "ov")), []),
        (Folds(exclude=("norm",)), ["up.weight", "up.bias", "down.weight"]),
        (Folds(("norm-linear", "up-down"), include=("[m-o]*",)), ["norm.weight", "gate.weight", "up.weight"]),
        (Folds(include=("*.norm", "gate")), []),
    ],
)
def test_what_factors_may_be_folded_into(folds: Folds, changed: list[str]) -> None:
    gm = annotated(capture(Gated()), gate=W8A8, up=W8A8, down=W8A8)
    made, count, notes = smoothed(gm, BATCHES, folds=folds)
    assert (count, notes) == (len(changed), [])
    assert [name for name, w in gm.state_dict().items() if not torch.equal(w, made.state_dict()[name])] == changed
    assert_same_function(gm, made, BATCHES[0], 1e-12)


def test_golden_multiplied() -> None:
    gm = annotated(capture(Gated()), gate=W8A8, up=W8A8, down=W8A8)
    made, count, notes = smoothed(gm, BATCHES, where="multiply")
    assert (count, notes) == (5, [])  # two products; gate, up, down
    assert_expected_inline(
        dump(made),
        """\
%x: f64[batch, 8] = input
%1: f64[batch, 8] = aten.pow.Tensor_Scalar(%x, 2)
%2: f64[batch, 1] = aten.mean.dim(%1, [-1], True)
%3: f64[batch, 1] = aten.add.Tensor(%2, 1e-06)
%4: f64[batch, 1] = aten.rsqrt(%3)
%5: f64[batch, 8] = aten.mul.Tensor(%x, %4)
%6: f64[batch, 8] = aten.mul.Tensor(%5, @norm.weight)
%7: f64[batch, 8] = aten.mul.Tensor(%6, @gate.input_factor)
%8: f64[batch, 12] = aten.linear(%7, @gate.weight)  # gate: weight int8/channel, input int8/tensor
%9: f64[batch, 12] = aten.silu(%8)
%10: f64[batch, 12] = aten.linear(%7, @up.weight, @up.bias)  # up: weight int8/channel, input int8/tensor
%11: f64[batch, 12] = aten.mul.Tensor(%9, %10)
%12: f64[batch, 12] = aten.mul.Tensor(%11, @down.input_factor)
%13: f64[batch, 8] = aten.linear(%12, @down.weight)  # down: weight int8/channel, input int8/tensor
%14: f64[batch, 8] = aten.add.Tensor(%x, %13)
return [%14]
""",
    )
    assert_same_function(gm, made, BATCHES[0], 1e-12)
    assert_vals(made, *BATCHES[0])
    assert torch.equal(tensor_of(made, "norm.weight"), tensor_of(gm, "norm.weight"))


def test_the_paper_s_formula() -> None:
    gm = annotated(capture(Gated()), gate=W8A8, up=W8A8)
    made, count, _ = smoothed(gm, BATCHES, alpha=0.7)
    assert count == 3
    norm, x = Norm(), torch.cat([batch[0] for batch in BATCHES])
    norm.weight.data = tensor_of(gm, "norm.weight").detach()
    gate, up = (tensor_of(gm, f"{name}.weight").detach() for name in ("gate", "up"))
    with torch.no_grad():
        largest = norm(x).abs().amax(0)
    s = largest**0.7 / torch.cat([gate, up]).abs().amax(0) ** 0.3
    torch.testing.assert_close(tensor_of(made, "norm.weight").detach(), norm.weight.detach() / s, rtol=1e-5, atol=0)
    torch.testing.assert_close(tensor_of(made, "gate.weight").detach(), gate * s, rtol=1e-5, atol=0)
    torch.testing.assert_close(tensor_of(made, "up.weight").detach(), up * s, rtol=1e-5, atol=0)


def test_the_rule_of_ranges() -> None:
    gm = annotated(capture(Gated()), gate=W8A8, up=W8A8)
    made, _, _ = smoothed(gm, BATCHES, alpha=0.8, statistic="range")
    norm, x = Norm(), torch.cat([batch[0] for batch in BATCHES])
    norm.weight.data = tensor_of(gm, "norm.weight").detach()
    weights = torch.cat([tensor_of(gm, f"{name}.weight").detach() for name in ("gate", "up")])
    with torch.no_grad():
        y = norm(x)
    # llm-compressor: activations' max - min over all rows, and twice the weights' largest magnitude
    s = (y.amax(0) - y.amin(0)) ** 0.8 / (2 * weights.abs().amax(0)) ** (1 - 0.8)
    torch.testing.assert_close(tensor_of(made, "norm.weight").detach(), norm.weight.detach() / s, rtol=1e-5, atol=0)


def test_channels_without_magnitude_keep_their_scale() -> None:
    a, w = torch.tensor([0.0, 4.0, 4.0, 1e-30], dtype=torch.float64), torch.tensor([1.0, 0.0, 1.0, 1e30])
    assert smoothing(a, w.double(), 0.5).tolist() == [1.0, 1.0, 2.0, 1e-5]


FAMILIES = {
    "llama": 22, "qwen3": 22, "gemma3": 22, "mixtral": 24, "deepseek": 33, "opt": 28, "gpt2": 18, "bert": 6, "vit": 22,
    "resnet": 9,
}  # fmt: skip


def canonical(family: str, plans: str = "int8/channel") -> fx.GraphModule:
    """A family's graph in float64, with plans for all that stands in its blocks."""
    gm = captured(family)
    Pipeline(canonical_passes()).run(gm)
    return lifted(annotated(gm, blocks=plans))


def doubles(gm: fx.GraphModule) -> tuple[Tensor, ...]:
    return tuple(x.double() if x.is_floating_point() else x for x in random_inputs(gm))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["fold", "fold-or-multiply", "multiply"])
def test_the_function_stays(family: str, where: str) -> None:
    gm = canonical(family)
    made, count, notes = smoothed(gm, [doubles(gm)], where=where)
    assert_same_answers(gm, made, random_inputs(gm)[0], 1e-12)
    if where == "fold":
        assert count == FAMILIES[family]
    else:
        assert notes == []


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("qwen3", ["q_proj", "o_proj", "down_proj"]),
        ("gemma3", ["q_proj", "o_proj", "gate_proj", "down_proj"]),
        ("deepseek", ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "down_proj"]),
        ("mixtral", ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("opt", ["q_proj", "out_proj", "fc1", "fc2"]),
    ],
)
def test_what_is_reached(family: str, layers: list[str]) -> None:
    gm = canonical(family)
    made, _, notes = smoothed(gm, [doubles(gm)])
    assert notes == []
    for name in layers:
        fqns = [n for n in gm.state_dict() if n.removesuffix(".weight").endswith(f".{name}")]
        assert fqns
        assert not any(torch.equal(gm.state_dict()[fqn], made.state_dict()[fqn]) for fqn in fqns), name


# -- who decides


def test_readers_without_a_plan_are_compensated_and_have_no_say() -> None:
    gm = annotated(capture(Gated()), gate=W8A8)
    tensor_of(gm, "up.weight").data[:, 0] = 1e3
    made, count, notes = smoothed(gm, BATCHES)
    assert (count, notes) == (3, [])
    assert_same_function(gm, made, BATCHES[0], 1e-12)
    alone = copy.deepcopy(gm)
    tensor_of(alone, "up.weight").data.zero_()
    other, _, _ = smoothed(alone, BATCHES)
    assert torch.equal(tensor_of(other, "norm.weight"), tensor_of(made, "norm.weight"))
    assert torch.equal(tensor_of(other, "gate.weight"), tensor_of(made, "gate.weight"))


def test_all_chosen_readers_decide() -> None:
    gm = annotated(capture(Gated()), gate=W8A8, up=W8A8)
    made, _, _ = smoothed(gm, BATCHES)
    tensor_of(gm, "up.weight").data[:, 0] = 1e3
    other, _, _ = smoothed(gm, BATCHES)
    old, new = (tensor_of(one, "norm.weight").detach() for one in (made, other))
    assert (old == new).tolist() == [False] + [True] * 7


def test_only() -> None:
    gm = annotated(capture(Gated()), gate=W8A8, up=W8A8, down=W8A8)
    made, count, _ = smoothed(gm, BATCHES, only=frozenset({"down"}))
    assert count == 3
    assert torch.equal(tensor_of(made, "norm.weight"), tensor_of(gm, "norm.weight"))
    assert smoothed(gm, BATCHES, only=frozenset({"gate", "up"}))[1] == 3


# -- near misses


class Tapped(Gated):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return h + self.down(F.silu(self.gate(h)) * self.up(h))


class TwoNorms(nn.Module):
    """One gain, used by two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(self.norm(x))))


class Sharing(Gated):
    """``gate`` and ``up`` are one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up = self.gate


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(x)))


def gainless(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


class Gainless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(gainless(x))


KEPT = "its input's channels keep their scale"


@pytest.mark.parametrize(
    ("model", "count", "wanted"),
    [
        (Tapped, 3, [f"{name}: {KEPT}: mul_1: a sum reads it beside what has no factors" for name in ("gate", "up")]),
        (TwoNorms, 0, [f"a: {KEPT}: mul_1: norm.weight has other readers", f"b: {KEPT}: mul_3: norm.weight has other readers"]),
        (Sharing, 0, [
            f"gate: {KEPT}: mul_1: the weight of linear has other readers",
            f"up: {KEPT}: mul_1: the weight of linear has other readers",
            f"down: {KEPT}: linear_1: up.weight has other readers",
        ]),
        (Plain, 0, [f"{name}: {KEPT}: nothing that makes it has weights a factor could move to" for name in ("first", "second")]),
        (Gainless, 0, [f"w: {KEPT}: layer_norm: layer_norm has no gain"]),
    ],
)  # fmt: skip
def test_near_misses(model: type[nn.Module], count: int, wanted: list[str]) -> None:
    gm = annotated(capture(model()), blocks="int8/channel")
    made, changed, notes = smoothed(gm, BATCHES)
    assert (changed, notes) == (count, wanted)
    assert_same_function(gm, made, BATCHES[0], 1e-12)
    multiplied, changed, notes = smoothed(gm, BATCHES, where="fold-or-multiply")
    assert_same_function(gm, multiplied, BATCHES[0], 1e-12)
    if model is Sharing:  # nothing can take the factors up
        assert (changed, [note.rpartition("; ")[2] for note in notes]) == (2, ["its weight has other readers"] * 2)
    else:
        assert changed > count
        assert notes == []


# -- what it is worth


class Outliers(nn.Module):
    """A norm with two channels that are 50 times the others, and what reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm(32)
        self.w = nn.Linear(32, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(self.norm(x))


def outliers() -> tuple[fx.GraphModule, list[tuple[Tensor, ...]]]:
    gm = capture_small(Outliers(), torch.ones(2, 32))
    generator = torch.Generator().manual_seed(7)
    tensor_of(gm, "norm.weight").data = 1 + 0.1 * torch.randn(32, generator=generator)
    tensor_of(gm, "norm.weight").data[[3, 17]] *= 50
    return annotated(gm, w=W8A8), [(torch.randn(40, 32, generator=generator),) for _ in range(3)]


def rounded(gm: fx.GraphModule, batches: list[tuple[Tensor, ...]]) -> fx.GraphModule:
    made = copy.deepcopy(gm)
    with torch.no_grad():
        Pipeline([Observe(), Calibrate(), QuantizeWeights(), QuantizeActivations()]).run(made, batches)
    return made


def error(gm: fx.GraphModule, other: fx.GraphModule, batches: list[tuple[Tensor, ...]]) -> float:
    return sum(float((run(gm, *batch) - run(other, *batch)).square().mean()) for batch in batches)


def test_outliers_cost_a_fifth_at_most() -> None:
    gm, batches = outliers()
    plain = error(gm, rounded(gm, batches), batches)
    half = error(gm, rounded(smoothed(gm, batches)[0], batches), batches)
    searched = error(gm, rounded(smoothed(gm, batches, alpha="search")[0], batches), batches)
    assert half < plain / 5
    assert searched < half


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_the_search_finds_the_least_expected_error(family: str) -> None:
    gm = annotated(captured(family), blocks=W8A8)
    Pipeline(canonical_passes()).run(gm)
    annotated(gm, blocks=W8A8)
    step = SmoothQuant(alpha="search")
    batches = [random_inputs(gm, seed=seed) for seed in (0, 1)]
    Pipeline([Observe((step,), ranges=False), Calibrate()]).run(gm, batches)
    found = copy.deepcopy(gm)
    step.run(found)
    (group, *_) = groups(gm, None, "fold", None)
    assert group.flow is not None
    gain = group.flow.produced[0].fqn
    chosen = tensor_of(gm, gain).double() / tensor_of(found, gain).double()
    watch = statistic_on(gm, group.chosen[0].op, ChannelObserver)
    assert isinstance(watch, ChannelObserver)
    tried = [smoothing(watch.magnitude.double(), column_magnitudes(gm, group), alpha) for alpha in ALPHAS]
    errors = [expected_error(gm, group, factors) for factors in tried]
    assert expected_error(gm, group, chosen.detach()) <= min(errors) * 1.001
    assert max(errors) > 1.1 * min(errors)


@pytest.mark.parametrize(
    ("input", "largest"),
    [("int8/tensor", 4.0), ("int4/tensor", 4.0), ("int8/token/dynamic", 3 * 1.5), (None, 0.0)],
)
def test_the_expected_error_of_rounded_inputs_by_hand(input: str | None, largest: float) -> None:
    """Weights that are codes lose nothing; an input in steps of d loses d^2 / 12 for each weight squared."""
    gm = annotated(capture_small(nn.Sequential(nn.Linear(2, 2)), EXAMPLE[:, :2]), blocks=plan("int4/channel", input))
    tensor_of(gm, "0.weight").data = torch.tensor([[7.0, -2.0], [3.0, 7.0]])
    step = SmoothQuant(alpha="search", where="multiply")
    x = torch.tensor([[1.0, -4.0], [-1.0, 0.5], [1.0, 0.0]])  # mean magnitudes 1 and 1.5
    Pipeline([Observe((step,), ranges=False), Calibrate()]).run(gm, [(x,)])
    (group,) = groups(gm, None, "multiply", None)
    size = 2 * largest / (2 ** (4 if input == "int4/tensor" else 8) - 1)
    found = expected_error(gm, group, torch.ones(2, dtype=torch.float64))
    assert found == pytest.approx(size**2 / 12 * (49 + 4 + 9 + 49), rel=1e-6)
    if input == "int8/tensor":  # a factor of 2 halves the step of the second channel, and doubles its weights
        halved = expected_error(gm, group, torch.tensor([1.0, 2.0], dtype=torch.float64))
        weights = torch.tensor([[7.0, -4.0], [3.0, 14.0]])  # 3 becomes 4 in steps of 2: its input squared is lost
        lost = float(x[:, 0].square().mean())
        assert halved == pytest.approx((size / 2) ** 2 / 12 * float(weights.square().sum()) + lost, rel=1e-6)


# -- before GPTQ


def with_outliers() -> Any:
    model = tiny("llama")
    for block in model.model.layers:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.weight.data[[5, 40]] *= 30
    return model


TOKENS = [torch.randint(0, 128, (4, 16), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
RULES = {"graphq": 1, "rules": [{"match": "blocks", "weight": "int4/channel", "input": "int8/tensor"}]}


def hessians_seen(algorithms: list[Any]) -> tuple[graphq.Compiled, list[Tensor]]:
    seen: list[Tensor] = []
    compensate = gptq_pass.gptq.compensate

    def spy(w: Tensor, hessian: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(hessian.clone())
        return compensate(w, hessian, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq_pass.gptq, "compensate", spy)
        compiled = graphq.compile(with_outliers(), RULES | {"algorithms": algorithms}, calibration=TOKENS)
    return compiled, seen


@pytest.fixture(scope="module")
def plain() -> Tensor:
    """The Hessian of the first block's q, k and v, in front of which nothing is rounded."""
    return hessians_seen(["gptq"])[1][0][0]


@pytest.mark.parametrize("first", [{"smooth-quant": {}}, {"smooth-quant": {"alpha": "search"}}, {"awq": {}}])
def test_gptq_sees_the_scaled_activations(plain: Tensor, first: Any) -> None:
    compiled, seen = hessians_seen([first, "gptq"])
    old, new = plain, seen[0][0]
    factors = (old.diagonal() / new.diagonal()).sqrt()
    gain = with_outliers().model.layers[0].input_layernorm.weight
    scaled = compiled.graph.state_dict()["model.layers.0.input_layernorm.weight"]
    torch.testing.assert_close(factors, gain.detach() / scaled, rtol=1e-4, atol=0)
    assert factors.max() > 1.5 * factors.min()
    torch.testing.assert_close(new, old / factors / factors[:, None], rtol=1e-3, atol=1e-4 * float(new.max()))


def test_gptq_after_smoothing_beats_a_stale_hessian() -> None:
    model = with_outliers()
    ours = graphq.compile(model, RULES | {"algorithms": ["smooth-quant", "gptq"]}, calibration=TOKENS)
    stale = captured("llama")
    for name, w in model.state_dict().items():
        if edit.has_tensor(stale, name):
            tensor_of(stale, name).data.copy_(w)
    Pipeline(canonical_passes()).run(stale)
    annotated(stale, blocks=plan("int4/channel", "int8/tensor"))
    smooth, rounding = SmoothQuant(), GPTQ()
    batches = [random_tokens(stale, tokens) for tokens in TOKENS]
    together = [Observe((smooth, rounding), ranges=False), Calibrate(), smooth, rounding, StopObserving()]
    with torch.no_grad():  # as llm-compressor runs two modifiers at once
        Pipeline([*together, Observe(), Calibrate(), QuantizeActivations()]).run(stale, batches)
        wanted = [model(tokens).logits for tokens in TOKENS]
        errors = [
            sum(float((run(gm, *batch) - y).square().mean()) for batch, y in zip(batches, wanted, strict=True))
            for gm in (ours.graph, stale)
        ]
    assert errors[0] < 0.8 * errors[1]


def random_tokens(gm: fx.GraphModule, tokens: Tensor) -> tuple[Tensor, ...]:
    return complete(source_of(gm), tokens)


# -- AMCT

AMCT_W = [
    [0.10, -0.70, 0.35, 1.00, 0.22, -0.41, 0.05, 0.63], [-2.00, 0.50, 0.25, 1.50, -0.33, 0.77, -1.10, 0.08],
    [0.31, 0.29, -0.58, 0.44, 0.91, -0.12, 0.67, -0.85], [-0.15, 0.93, 0.72, -0.26, 0.38, 0.54, -0.49, 1.20],
    [0.02, 0.11, -0.07, 0.19, -0.23, 0.31, 0.27, -0.05], [1.25, -1.5, 0.75, 0.5, -0.25, 0.125, -0.625, 0.875],
    [0.4, 0.3, 0.2, 0.1, -0.1, -0.2, -0.3, -0.4], [0.9, -0.8, 0.7, -0.6, 0.5, -0.4, 0.3, -0.2],
]  # fmt: skip


@pytest.mark.parametrize(
    ("formats", "alpha", "s", "scale_d", "zero_point", "scale_w", "mse"),
    [
        (("int8/by_sign/channel", "int8/by_sign/tensor"), 0.5,
         [0.7905694, 0.9128709, 2.581989, 0.9128709, 1.172018, 1.274118, 1.0660037, 1.0206207], 0.015247965, None,
         [0.00718796, 0.01235265, 0.01169964, 0.01463805, 0.00311005, 0.01524797, 0.00406612, 0.01423144], 1.2114e-4),
        (("int8/by_sign/tensor", "int8/asym/joint/tensor"), 0.8,
         [1.0406915, 1.1023252, 3.8385196, 1.1023252, 1.2182032, 1.259592, 1.1728688, 1.152635], 0.010216357, -1,
         [0.022668421], 2.7886e-4),
    ],
)  # fmt: skip
def test_amct_s_numbers(
    formats: tuple[str, str], alpha: float, s: list[float], scale_d: float, zero_point: int | None,
    scale_w: list[float], mse: float,
) -> None:  # fmt: skip
    w = torch.tensor(AMCT_W)
    x = torch.tensor([[((7 * i + 5 * j) % 11 - 5) / 4 * (4 if j == 2 else 1) for j in range(8)] for i in range(12)])
    gm = capture_small(nn.Sequential(nn.Linear(8, 8, bias=False)), EXAMPLE)
    tensor_of(gm, "0.weight").data = w.clone()
    made, count, _ = smoothed(annotated(gm, **{"0": plan(*formats)}), [(x,)], alpha=alpha, where="multiply")
    assert count == 2
    made = rounded(made, [(x,)])
    held = made.state_dict()

    def same(name: str, wanted: list[float]) -> None:
        torch.testing.assert_close(held[name].flatten(), torch.tensor(wanted), rtol=1e-6, atol=2e-8)

    same("0.input_factor", (1 / torch.tensor(s)).tolist())
    same("0.weight_scale", scale_w)
    same("0.input_scale", [scale_d])
    assert (
        held["0.input_zero_point"].item() == zero_point if zero_point is not None else "0.input_zero_point" not in held
    )
    assert float((run(made, x) - x @ w.T).square().mean()) == pytest.approx(mse, rel=1e-4)
