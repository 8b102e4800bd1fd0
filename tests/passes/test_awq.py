"""AWQ: what is scaled and clipped, by what, and that scaling alone leaves the function."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphq.ir.pipeline import Pipeline
from graphq.ir.text import dump
from graphq.numerics import awq, fake_quantize
from graphq.numerics.scales import choose_scale
from graphq.passes.awq import AWQ, ErrorObserver
from graphq.passes.calibrate import Calibrate
from graphq.passes.observe import Observe, observers
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.stop_observing import StopObserving
from graphq.spec.folds import Folds
from graphq.state import tensor_of
from tests.graphs import annotated, assert_vals, plan, run
from tests.lifted import assert_same_answers, assert_same_function, copied, lifted
from tests.models import MoE, random_inputs
from tests.models import capture as capture_small
from tests.passes.test_smooth_quant import (
    AMCT_W,
    BATCHES,
    EXAMPLE,
    KEPT,
    Gated,
    Plain,
    Sharing,
    Tapped,
    canonical,
    capture,
    doubles,
)

W4 = plan("int4/channel")


def scaled(
    gm: fx.GraphModule, batches: Sequence[tuple[Tensor, ...]], clip: bool = False, **options: Any
) -> tuple[fx.GraphModule, int, list[str]]:
    """A copy of ``gm``, scaled; the number of changes, and the notes."""
    notes: list[str] = []
    made = copied(gm)
    step = AWQ(clip=clip, **options, note=notes.append)
    with torch.no_grad():
        passes = [Observe((step,), ranges=False), Calibrate(), step, StopObserving()]
        counts = Pipeline(passes, strict=True).run(made, batches)
    return made, counts["awq"], notes


def uneven(seed: int = 0, rows: int = 30, width: int = 8) -> tuple[Tensor]:
    """A batch whose channels differ in magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return (x * torch.logspace(-1.0, 1.0, width, dtype=torch.float64).flip(0),)


def weight_error(before: fx.GraphModule, after: fx.GraphModule, batches: Sequence[tuple[Tensor, ...]]) -> float:
    """The mean squared error of the first output with the weights of ``after`` rounded."""
    made = copied(after)
    with torch.no_grad():
        Pipeline([QuantizeWeights()]).run(made)
    return sum(float((run(made, *b) - run(before, *b)).square().mean()) for b in batches) / len(batches)


class One(nn.Module):
    """A gain, and the one linear behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.w = nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w(self.norm(x))


def one(seed: int = 3) -> fx.GraphModule:
    gm = annotated(capture(One()), w=W4)
    tensor_of(gm, "norm.weight").data = torch.logspace(-1.0, 1.0, 8, dtype=torch.float64)
    return gm


def test_golden() -> None:
    gm = annotated(capture(Gated()), gate=W4, up=W4, down=W4)
    made, count, notes = scaled(gm, BATCHES)
    assert notes == []
    assert count == 6  # the gain, gate, up; up's rows and bias, down
    assert dump(made) == dump(gm)
    assert_same_function(gm, made, BATCHES[0], 1e-12)
    assert_vals(made, *BATCHES[0])
    clipped, count, _ = scaled(gm, BATCHES, clip=True)
    assert count == 9
    assert dump(clipped) == dump(gm)


# -- the search


@pytest.mark.parametrize("duo", [None, False, True])
@pytest.mark.parametrize("n_grid", [1, 5, 20])
def test_the_factors_are_the_best_of_the_candidates(duo: bool | None, n_grid: int) -> None:
    gm = one()
    batches = [uneven(seed) for seed in (1, 2, 3)]
    made, _, _ = scaled(gm, batches, duo=duo, n_grid=n_grid)
    with torch.no_grad():
        norm = F.layer_norm(torch.cat([b[0] for b in batches]), [8]) * tensor_of(gm, "norm.weight")
        x = norm + tensor_of(gm, "norm.bias")
    w = tensor_of(gm, "w.weight").detach()
    mean, columns = x.abs().mean(0), awq.relative_columns(w, [1, -1], 1)
    tried = [torch.ones(8, dtype=torch.float64)]
    for one_duo in (False, True) if duo is None else (duo,):
        tried += [awq.factors(mean, columns if one_duo else None, i / n_grid) for i in range(n_grid + 1)]
    errors: list[float] = []
    for s in tried:
        quant = W4.weight
        assert quant is not None
        back = fake_quantize(w * s, choose_scale(w * s, quant.format, [1, -1]), quant.format, [1, -1]) / s
        errors.append(float((x @ (back - w).T).square().mean()))
    s = tried[errors.index(min(errors))]
    torch.testing.assert_close(tensor_of(made, "w.weight").detach(), w * s, rtol=1e-5, atol=1e-9)
    assert min(errors) < errors[0]
    assert weight_error(gm, made, batches) == pytest.approx(min(errors), rel=1e-4)


def test_every_batch_counts() -> None:
    gm = one()
    batches = [uneven(1), (uneven(2)[0] * 3 + 5,)]
    both, first = (scaled(gm, found)[0] for found in (batches, batches[:1]))
    assert not torch.allclose(tensor_of(both, "w.weight"), tensor_of(first, "w.weight"), rtol=1e-3)
    swapped = scaled(gm, batches[::-1])[0]
    torch.testing.assert_close(tensor_of(both, "w.weight"), tensor_of(swapped, "w.weight"), rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_never_worse_than_no_scaling(seed: int) -> None:
    gm = one()
    generator = torch.Generator().manual_seed(seed)
    tensor_of(gm, "w.weight").data = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    batches = [uneven(seed)]
    made, _, _ = scaled(gm, batches)
    assert weight_error(gm, made, batches) <= weight_error(gm, gm, batches) * (1 + 1e-5)
    clipped, _, _ = scaled(gm, batches, clip=True)
    assert weight_error(gm, clipped, batches) <= weight_error(gm, made, batches) * (1 + 1e-5)


def test_the_fourth_power_is_that_of_the_outputs() -> None:
    gm = one()
    batches = [uneven(1), (uneven(2)[0] * 3 + 5,)]
    watched, step = copied(gm), AWQ(power=4, duo=False, clip=False)
    Pipeline([Observe((step,), ranges=False), Calibrate()]).run(watched, batches)
    (seen,) = [observer for _, observer in observers(watched) if isinstance(observer, ErrorObserver)]
    with torch.no_grad():
        x = F.layer_norm(torch.cat([b[0] for b in batches]), [8]) * tensor_of(gm, "norm.weight")
        x = x + tensor_of(gm, "norm.bias")
    w, mean, quant = tensor_of(gm, "w.weight").detach(), x.abs().mean(0), W4.weight
    assert quant is not None
    tried = [torch.ones(8, dtype=torch.float64), *(awq.factors(mean, None, i / 20) for i in range(21))]
    sums: list[float] = []
    for s in tried:
        back = fake_quantize(w * s, choose_scale(w * s, quant.format, [1, -1]), quant.format, [1, -1]) / s
        sums.append(float((x @ (back - w).T).pow(4).sum()))
    torch.testing.assert_close(seen.errors, torch.tensor(sums, dtype=torch.float64), rtol=1e-3, atol=0)
    made, _, _ = scaled(gm, batches, power=4, duo=False)
    s = tried[sums.index(min(sums))]
    torch.testing.assert_close(tensor_of(made, "w.weight").detach(), w * s, rtol=1e-5, atol=1e-9)
    assert_same_function(gm, made, batches[0], 1e-12)


def test_a_copy_of_an_observed_graph_measures_its_own_data() -> None:
    """Made before data came by, or after."""
    gm = annotated(capture(Plain()), first="int4/channel", second="int4/g4")
    step = AWQ(power=4, n_grid=4, clip=False, where="multiply")
    a, b = [uneven(1)], [uneven(2)]

    def observed(gm: fx.GraphModule, batches: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
        Pipeline([Calibrate()]).run(gm, batches)
        return [o.errors for _, o in observers(gm) if isinstance(o, ErrorObserver)]

    def fresh() -> fx.GraphModule:
        made = copied(gm)
        Pipeline([Observe((step,), ranges=False)]).run(made)
        return made

    first, second = fresh(), copy.deepcopy(copy.deepcopy(fresh()))
    wanted_a, wanted_b = observed(fresh(), a), observed(fresh(), b)
    assert len(wanted_a) > 1
    assert not torch.equal(wanted_a[0], wanted_b[0])
    assert all(map(torch.equal, observed(first, a), wanted_a))
    assert all(map(torch.equal, observed(second, b), wanted_b))
    after = copy.deepcopy(first)
    assert all(map(torch.equal, (o.errors for _, o in observers(after) if isinstance(o, ErrorObserver)), wanted_a))
    step.run(after)
    step.run(first)
    assert dump(after) == dump(first)
    assert all(torch.equal(t, first.state_dict()[name]) for name, t in after.state_dict().items())


# -- clipping


def test_clipping_alone() -> None:
    gm = annotated(capture(Plain()), first="int4/channel", second="int4/g4")
    made, count, notes = scaled(gm, [uneven()], clip=True)
    assert len(notes) == 2
    assert count == 2
    for name in ("first.weight", "second.weight"):
        old, new = tensor_of(gm, name).detach(), tensor_of(made, name).detach()
        changed = old != new
        assert 0 < changed.float().mean() < 0.5
        assert (new[changed].abs() < old[changed].abs()).all()
    assert weight_error(gm, made, [uneven()]) < weight_error(gm, gm, [uneven()])


@pytest.mark.parametrize(
    ("first", "options"),
    [
        ("int4/channel", {"unclipped": frozenset({"first"})}),
        ("int4/channel", {"clip": False}),
        ("int4/channel", {"only": frozenset({"second"})}),
        ("int4/tensor", {}),
        ("int4/channel/mse", {}),
    ],
)
def test_what_is_not_clipped(first: str, options: dict[str, Any]) -> None:
    gm = annotated(capture(Plain()), first=first, second="int4/channel")
    made, count, _ = scaled(gm, [uneven()], **({"clip": True} | options))
    assert torch.equal(tensor_of(made, "first.weight"), tensor_of(gm, "first.weight"))
    assert count == (0 if options.get("clip") is False else 1)


# -- groups


FAMILIES = ("llama", "qwen3", "gemma3", "mixtral", "deepseek", "opt", "gpt2", "bert", "vit", "resnet")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays(family: str) -> None:
    gm = canonical(family, "int4/channel")
    made, count, _ = scaled(gm, [doubles(gm)], n_grid=3)
    assert count >= 3
    assert_same_answers(gm, made, random_inputs(gm)[0], 1e-12)


def test_values_of_grouped_queries_are_scaled_for_the_output() -> None:
    gm = canonical("llama", "int3/channel")  # two heads of values, four of queries
    only = frozenset({"model.layers.0.self_attn.o_proj"})
    made, count, notes = scaled(gm, [doubles(gm)], only=only)
    assert (count, notes) == (2, [])
    v, o = (f"model.layers.0.self_attn.{name}.weight" for name in ("v_proj", "o_proj"))
    rows = (tensor_of(gm, v) / tensor_of(made, v)).mean(1)
    columns = (tensor_of(made, o) / tensor_of(gm, o)).mean(0)
    torch.testing.assert_close(rows.view(2, 1, 16).expand(2, 2, 16).flatten(), columns, rtol=1e-9, atol=0)
    assert rows.max() > 1.1 * rows.min()


class FusedQKV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.qkv(self.norm(x)).view(batch, length, 3, 2, 8).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        return self.out(y.transpose(1, 2).reshape(batch, length, 16))


def test_fused_values_are_scaled_for_the_output() -> None:
    gm = lifted(capture_small(FusedQKV(), torch.ones(2, 3, 16)))
    x = (torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64),)
    made, count, notes = scaled(annotated(gm, out="int3/channel"), [x])
    assert (count, notes) == (3, [])
    assert_same_function(gm, made, x, 1e-12)
    same = (tensor_of(made, "qkv.weight") == tensor_of(gm, "qkv.weight")).all(1)
    assert same[:32].all()  # queries and keys
    assert not same[32:].any()


def test_each_reader_is_judged_by_its_own_plan() -> None:
    gm = annotated(capture(Gated()), gate="int8/channel", up="int2/g4", down=W4)
    made, count, notes = scaled(gm, BATCHES, only=frozenset({"gate", "up"}))
    assert (count, notes) == (3, [])
    only_up = annotated(capture(Gated()), up="int2/g4")
    other, _, _ = scaled(only_up, BATCHES)
    assert_same_function(gm, made, BATCHES[0], 1e-12)
    # Eight bits have next to no error: the factors are those that two bits choose.
    gains = [tensor_of(g, "norm.weight").detach() for g in (made, other)]
    assert not torch.equal(gains[0], tensor_of(gm, "norm.weight").detach())
    assert gains[0].shape == gains[1].shape


def test_a_float_reader_is_compensated_and_has_no_say() -> None:
    gm = annotated(capture(Gated()), gate=W4)
    made, count, _ = scaled(gm, BATCHES)
    assert count == 3
    assert_same_function(gm, made, BATCHES[0], 1e-12)
    changed = copied(gm)
    tensor_of(changed, "up.weight").data.mul_(100)
    other, _, _ = scaled(changed, BATCHES)
    assert torch.equal(tensor_of(other, "norm.weight"), tensor_of(made, "norm.weight"))


class NormedMoE(MoE):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


@pytest.mark.parametrize("power", [2, 4])
def test_experts_with_plans_of_their_own(power: int) -> None:
    gm = lifted(capture_small(NormedMoE(), EXAMPLE))
    from graphq.passes.split_gate_up import SplitGateUp

    SplitGateUp().run(gm)
    annotated(gm, experts="int4/channel", experts__1="int2/g2", experts__2="float")
    made, count, notes = scaled(gm, [uneven(1), uneven(2)], power=power)
    assert notes == []
    assert count >= 5
    assert_same_function(gm, made, uneven(3), 1e-12)
    assert weight_error(gm, made, [uneven(1), uneven(2)]) < weight_error(gm, gm, [uneven(1), uneven(2)])


@pytest.mark.parametrize("model", [Tapped, Sharing, Plain])
def test_near_misses(model: type[nn.Module]) -> None:
    gm = annotated(capture(model()), blocks="int4/channel")
    made, _, notes = scaled(gm, BATCHES)
    assert notes
    assert all(KEPT in note for note in notes)
    if model is not Plain:
        assert torch.equal(tensor_of(made, "norm.weight"), tensor_of(gm, "norm.weight"))
    assert_same_function(gm, made, BATCHES[0], 1e-12)


# -- AMCT


def test_amct_s_numbers() -> None:
    w = torch.tensor(AMCT_W)
    x = torch.tensor([[((7 * i + 5 * j) % 11 - 5) / 4 * (4 if j == 2 else 1) for j in range(8)] for i in range(12)])
    gm = capture_small(nn.Sequential(nn.Linear(8, 8, bias=False)), EXAMPLE)
    tensor_of(gm, "0.weight").data = w.clone()
    annotated(gm, **{"0": plan("int4/by_sign/channel")})
    made, count, _ = scaled(gm, [(x,)], power=4, duo=False, where="multiply")
    assert count == 2
    inverse = torch.tensor([1.36075, 1.469778, 0.680375, 1.445877, 1.380616, 1.423106, 1.401378, 1.401378])
    torch.testing.assert_close(tensor_of(made, "0.input_factor"), inverse, rtol=1e-5, atol=0)
    mean = x.abs().mean(0)
    torch.testing.assert_close(1 / awq.factors(mean, None, 0.5).float(), inverse, rtol=1e-5, atol=0)
    Pipeline([QuantizeWeights()]).run(made)
    scales = torch.tensor([0.0988031, 0.1837222, 0.1065589, 0.1511772, 0.0311191, 0.1574762, 0.0419937, 0.1469778])
    torch.testing.assert_close(made.state_dict()["0.weight_scale"].flatten(), scales, rtol=2e-6, atol=0)
    assert float((run(made, x) - x @ w.T).square().mean()) == pytest.approx(0.0085131, rel=1e-4)


def test_only_groups_that_may_be_folded_are_tried() -> None:
    gm = annotated(capture(Gated()), gate=W4, up=W4, down=W4)
    wanted = list(AWQ(power=4, clip=False, folds=Folds(("up-down",))).observer_requests(gm))
    assert [one.observer.layers for one in wanted if isinstance(one.observer, ErrorObserver)] == [("down",)]
