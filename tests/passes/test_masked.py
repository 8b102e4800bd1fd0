"""Masked tokens in calibration: whatever stands under the mask, every statistic is the same, and so is every scale."""

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from graphq.capture.modules import capture_module
from graphq.capture.source import source_of
from graphq.data.batches import complete
from graphq.ir.pipeline import Pass, Pipeline
from graphq.observers.ranges import MinMaxObserver
from graphq.passes.auto_round import AutoRound
from graphq.passes.awq import AWQ
from graphq.passes.blockwise import Blockwise
from graphq.passes.calibrate import Calibrate
from graphq.passes.gptq import GPTQ
from graphq.passes.observe import NeedsStatistics, Observe, observers
from graphq.passes.observe_means import ObserveMeans
from graphq.passes.quantize_activations import QuantizeActivations
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.smooth_quant import SmoothQuant
from graphq.pipelines import canonical_passes
from graphq.state import tensor_of
from tests.graphs import annotated, plan
from tests.models import captured

EXPERTS = ("mixtral", "deepseek", "gpt_oss")
INNER: tuple[Pass, ...] = (Observe(), Calibrate(), QuantizeWeights(), QuantizeActivations())
OFMR = {"OfmrObserver", "OfmrWeightObserver"}
LAYOUTS = {  # by row: 0 where a token is padding
    "right": ("111111111", "111110000", "111111100"),
    "left": ("111111111", "000001111", "001111111"),
    "between": ("110111111", "011110011", "111111101"),
}
METHODS = ("", "/ema", "/percentile99", "/mse")


def prepared(family: str) -> fx.GraphModule:
    gm = captured(family)
    Pipeline(canonical_passes()).run(gm)
    return gm


def batch(
    gm: fx.GraphModule, layout: Sequence[str], past: int, under: int, leave_out: bool = True, rows: slice = slice(None)
) -> tuple[Tensor, ...]:
    """Random ids, the same each time where the layout has a 1, those of the seed ``under`` elsewhere; caches alike.

    ``leave_out``: whether the mask says so.
    """
    source = source_of(gm)
    mask = torch.tensor([[int(c) for c in row] for row in layout])
    sizes = {"batch": len(mask), "sequence": mask.shape[1] - past, "past_sequence": past}
    given = {"attention_mask": (mask if leave_out else torch.ones_like(mask))[rows]}
    for number, wanted in enumerate(source.inputs):
        shape = [sizes.get(d, 0) if isinstance(d, str) else d for d in wanted.shape]
        generators = [torch.Generator().manual_seed(1000 * number + seed) for seed in (0, under)]
        if wanted.name == "input_ids":
            a, b = (torch.randint(2, 100, shape, generator=g) for g in generators)
            given[wanted.name] = torch.where(mask[:, past:].bool(), a, b)[rows]
        elif wanted.is_cache and past:
            a, b = (torch.randn(shape, generator=g) for g in generators)
            given[wanted.name] = torch.where(mask[:, None, :past, None].bool(), a, 9 * b)[rows]
    return complete(source, given)


def seen_of(family: str, batches: Sequence[tuple[Tensor, ...]], notes: list[str]) -> dict[str, Tensor]:
    """What observers of every kind, on all layers, keep of the batches."""
    gm = prepared(family)
    for method in METHODS if family in EXPERTS else (*METHODS, "/ofmr"):
        weight = "int8/channel/ofmr" if method == "/ofmr" else "int8/channel"
        annotated(gm, blocks=plan(weight, f"int8/tensor{method}"))
        Observe().run(gm)
    with torch.no_grad():
        Pipeline([Observe((SmoothQuant(), AWQ(power=4, n_grid=2), GPTQ())), ObserveMeans()]).run(gm)
        Calibrate(notes.append).run(gm, batches)
    return {
        f"{type(seen).__name__} {seen.layers[0]} {i} {name}": buffer
        for i, (_, seen) in enumerate(observers(gm))
        for name, buffer in seen.named_buffers()
        if name != "batches"
    }


KINDS = {
    *("MinMaxObserver", "MovingAverageObserver", "HistogramObserver"),
    *("ChannelObserver", "HessianObserver", "ErrorObserver", "MeanObserver"),
}
CASES: list[Any] = [
    *(("llama", "right"), ("opt", "right"), ("bert", "right"), ("mixtral", "left"), ("deepseek", "left")),
    *(("gpt2", "left"), ("llama", "between"), ("bloom", "right"), ("gpt_oss", "left")),
    *(pytest.param(family, "left", marks=pytest.mark.slow) for family in ("llama", "opt", "bert", "bloom")),
    *(pytest.param(family, "right", marks=pytest.mark.slow) for family in ("mixtral", "deepseek")),
]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_what_stands_under_the_mask_has_no_part_in_any_statistic(family: str, layout: str) -> None:
    notes: list[str] = []
    gm = captured(family)
    pasts = (0, 3) if any(i.is_cache for i in source_of(gm).inputs) else (0,)
    first, second = (
        seen_of(family, [batch(gm, LAYOUTS[layout], past, under) for past in pasts], notes) for under in (1, 2)
    )
    assert {name.split()[0] for name in first} == KINDS | (set() if family in EXPERTS else OFMR)
    for name, one in first.items():
        if family in EXPERTS:  # other rows stand before theirs: float32 products and sums in another order
            torch.testing.assert_close(second[name].double(), one.double(), rtol=1e-4, atol=1e-6, msg=name)
        else:
            assert torch.equal(second[name], one), name
    assert notes == []


def test_a_mask_of_ones_leaves_everything_in() -> None:
    gm = captured("llama")
    masked, whole, plain = (
        seen_of("llama", [batch(gm, layout, 0, 1, leave_out)], [])
        for layout, leave_out in ((LAYOUTS["left"], True), (LAYOUTS["left"], False), (("1" * 9,) * 3, True))
    )
    differ = {name.split()[0] for name, one in masked.items() if not torch.equal(whole[name], one)}
    assert differ == KINDS | OFMR
    assert whole.keys() == plain.keys()


# -- compiled


def test_padding_changes_no_scale() -> None:
    """A batch of one sequence, without and with padding on either side."""
    made: list[dict[str, Tensor]] = []
    for layout in ("11111", "000011111", "111110000"):
        gm = annotated(prepared("llama"), blocks=plan("int8/channel", "int8/tensor"))
        ids = torch.zeros(1, len(layout), dtype=torch.int64)
        mask = torch.tensor([[int(c) for c in layout]])
        ids[mask.bool()] = torch.arange(20, 25)
        with torch.no_grad():
            Pipeline(INNER).run(gm, [complete(source_of(gm), {"input_ids": ids, "attention_mask": mask})])
        made.append({name: x for name, x in gm.state_dict().items() if name.endswith("input_scale")})
    assert len(made[0]) == 8
    for other in made[1:]:
        for name, scale in made[0].items():
            torch.testing.assert_close(other[name], scale, rtol=1e-5, atol=0)  # sums over keys in another order


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_validity_crosses_cuts(family: str) -> None:
    """Block by block, on what float blocks give, the scales are those of the whole at once."""
    whole, parts = (annotated(prepared(family), blocks=plan("int8/channel", "int8/tensor")) for _ in range(2))
    batches = [batch(whole, LAYOUTS["left"], past, 1) for past in (0, 3)]
    with torch.no_grad():
        Pipeline(INNER).run(whole, batches)
        Pipeline([Blockwise(INNER, "float")]).run(parts, batches)
    assert whole.state_dict().keys() == parts.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], tensor), name


def test_a_quantized_prefix_does_not_lose_it() -> None:
    """Through quantized weights and inputs, block by block: the second block's Hessians, too."""
    made: list[dict[str, Tensor]] = []
    for under in (1, 2):
        gm = annotated(prepared("llama"), blocks=plan("int4/g32", "int8/asym/tensor"))
        steps = (Observe((GPTQ(),)), Calibrate(), GPTQ(), QuantizeWeights(), QuantizeActivations())
        with torch.no_grad():
            Pipeline([Blockwise(steps)]).run(gm, [batch(gm, LAYOUTS["right"], past, under) for past in (0, 3)])
        made.append(gm.state_dict())
    assert all(torch.equal(made[1][name], tensor) for name, tensor in made[0].items())


# -- rounding that is learned


def test_losses_leave_masked_tokens_out() -> None:
    made: list[dict[str, Tensor]] = []
    notes: list[str] = []
    for under, leave_out in ((1, True), (2, True), (1, False)):
        gm = annotated(prepared("llama"), model__layers__0__mlp="int3/g32")
        batches = [batch(gm, LAYOUTS["right"], 0, under, leave_out), batch(gm, LAYOUTS["left"], 0, under, leave_out)]
        with torch.no_grad():
            Pipeline([Blockwise((AutoRound(steps=20, batch_size=2, note=notes.append),))]).run(gm, batches)
        made.append({name: x for name, x in gm.state_dict().items() if "layers.0.mlp" in name})
    assert all(torch.equal(made[1][name], tensor) for name, tensor in made[0].items())
    assert not all(torch.equal(made[2][name], tensor) for name, tensor in made[0].items())
    assert notes == []


# -- where it ends


class Pooled(nn.Module):
    """A linear on tokens, their mean, and a linear on that; ``gated`` tokens are multiplied by it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.token, self.pool, self.gated = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.token(self.embedding(ids))
        pooled = self.pool(x.mean(1, keepdim=True))
        return self.gated(x * pooled) * mask.unsqueeze(-1)


class Convolved(nn.Module):
    """A convolution along tokens, and a linear behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.conv, self.head = nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.conv(self.embedding(ids).mT).mT) * mask.unsqueeze(-1)


class OfBatch(nn.Module):
    """A norm by the statistics of all tokens of a batch, and a linear behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.norm, self.head = nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 8)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = torch.where(mask.unsqueeze(-1) == 0, 100 * x, x)
        return self.head(self.norm(x.flatten(0, 1)).view(x.shape)) * mask.unsqueeze(-1)


IDS = torch.arange(10).view(2, 5)
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def notes_of(
    model: nn.Module,
    mask: Tensor,
    *steps: NeedsStatistics,
    weight: str = "int8/channel",
    input: str = "int8/tensor",
    means: bool = False,
) -> tuple[fx.GraphModule, list[str]]:
    torch.manual_seed(0)
    everything = {"kind:linear|conv1d": plan(weight, input)}
    gm = annotated(capture_module(model.eval(), (IDS, MASK), mask="mask"), **everything)
    notes: list[str] = []
    with torch.no_grad():
        Pipeline([Observe(steps), *[ObserveMeans()] * means, Calibrate(notes.append)]).run(gm, [(IDS, mask)])
    return gm, notes


def test_layers_that_masked_tokens_reach_are_noted() -> None:
    assert notes_of(Pooled(), MASK)[1] == [
        "pool: masked tokens have a part in its calibration: aten.mean.dim (mean) mixes tokens"
    ]
    assert notes_of(Pooled(), torch.ones_like(MASK))[1] == []


def test_a_batch_norm_of_a_batch_mixes_its_tokens() -> None:
    assert notes_of(OfBatch(), MASK)[1] == [
        "head: masked tokens have a part in its calibration: aten.batch_norm.default (norm) mixes tokens"
    ]


def test_behind_a_mean_of_tokens_masked_rows_of_tokens_are_still_left_out() -> None:
    gm, _ = notes_of(Pooled(), MASK)
    held = functools.partial(tensor_of, gm)
    gated = next(seen for _, seen in observers(gm) if seen.layers == ("gated",))
    assert isinstance(gated, MinMaxObserver)
    with torch.no_grad():
        x = F.linear(held("embedding.weight")[IDS], held("token.weight"), held("token.bias"))
        x = x * F.linear(x.mean(1, keepdim=True), held("pool.weight"), held("pool.bias"))
    torch.testing.assert_close(gated.high, x[MASK.bool()].max(), rtol=1e-5, atol=0)


def test_convolutions() -> None:
    """The range of its input leaves masked places out; its windows read them."""
    gm, notes = notes_of(Convolved(), MASK)
    assert notes == ["head: masked tokens have a part in its calibration: aten.conv1d.default (conv) mixes tokens"]
    conv = next(seen for _, seen in observers(gm) if seen.layers == ("conv",))
    assert isinstance(conv, MinMaxObserver)
    assert torch.equal(conv.high, tensor_of(gm, "embedding.weight")[IDS][MASK.bool()].max())
    windows = "conv: masked tokens have a part in its calibration: a convolution reads many of them at once"
    assert notes == [note for note in notes_of(Convolved(), MASK, SmoothQuant())[1] if note != windows]
    for step in (GPTQ(), AWQ(power=4, clip=False, where="multiply")):
        assert windows in notes_of(Convolved(), MASK, step)[1]
    assert windows in notes_of(Convolved(), MASK, input="int8/tensor/ofmr")[1]
    assert windows in notes_of(Convolved(), MASK, weight="int8/channel/ofmr")[1]
    assert windows in notes_of(Convolved(), MASK, means=True)[1]
