"""Statistics of a layer's input: against all data at once, merged, and refused."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from graphq.errors import PassError, SpecError
from graphq.ir.matrices import as_matrices, as_weight, input_vectors
from graphq.ir.views import Weighted, ops_of
from graphq.observers.statistics import ChannelObserver, HessianObserver, MeanObserver
from tests.models import MoE, capture


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(x: Tensor) -> list[tuple[int, Tensor]]:
    return [(0, x.flatten(0, -2))]


def channels() -> ChannelObserver:
    return ChannelObserver(("a",), 4, -1)


def second_moments() -> HessianObserver:
    return HessianObserver(("a",), (1, 4), rows)


@given(st.integers(0, 5), st.integers(0, 4), st.integers(0, 99))
def test_two_halves_make_the_whole(first: int, second: int, seed: int) -> None:
    batches = [numbers(seed + i, 1 + i, 4) for i in range(first + second)]
    for make in (channels, second_moments):
        whole, a, b = make(), make(), make()
        for i, x in enumerate(batches):
            whole(x)
            (a if i < first else b)(x)
        a.merge(b)
        for (name, x), y in zip(whole.named_buffers(), a.buffers(), strict=True):
            # sums in another order; the Hessian's are of float32, of 45 terms at most
            torch.testing.assert_close(
                y, x, rtol=1e-12 if x.dtype == torch.float64 else 1e-5, atol=1e-5 * (name == "sums")
            )
        assert whole.has_observed == bool(batches)


def test_channels_by_hand() -> None:
    seen = ChannelObserver(("a",), 2, 1)
    x = torch.tensor([[[1.0, -3], [2, 4]], [[0, 1], [5, -6]]])  # [batch, channel, place]
    assert seen(x) is x
    seen(torch.zeros(0, 2, 2))
    seen(-x / 2)
    assert seen.low.tolist() == [-3, -6]
    assert seen.high.tolist() == [1.5, 5]
    assert seen.magnitude.tolist() == [3, 6]
    assert seen.mean.tolist() == [7.5 / 8, 25.5 / 8]
    assert int(seen.count) == 8


def test_the_hessian_is_that_of_all_vectors() -> None:
    x = numbers(0, 3, 5, 4)
    seen = second_moments()
    for part in x:
        seen(part)
    flat = x.flatten(0, 1).double()
    torch.testing.assert_close(seen.mean()[0].double(), flat.T @ flat / 15, rtol=1e-5, atol=1e-6)  # float32 sums
    assert seen.counts.tolist() == [15]
    assert second_moments().mean().tolist() == torch.zeros(1, 4, 4).tolist()
    assert seen.to(torch.bfloat16).sums.dtype == torch.float32
    half = second_moments()
    half(x.bfloat16())
    assert half.sums.dtype == torch.float32


@pytest.mark.parametrize("make", [channels, second_moments])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_nan_names_layer_and_batch(make: Any, wrong: float) -> None:
    seen = make()
    seen(torch.ones(2, 4))
    x = torch.ones(2, 4)
    x[1, 2] = wrong
    with pytest.raises(SpecError, match=r"^calibration: batch 1: the input of a holds NaN or Inf$"):
        seen(x)


def test_observers_that_differ_cannot_be_merged() -> None:
    others = [ChannelObserver(("b",), 5, -1), ChannelObserver(("b",), 4, 1), second_moments()]
    for other in others:
        with pytest.raises(PassError, match="cannot be merged"):
            channels().merge(other)
    with pytest.raises(PassError, match="cannot be merged"):
        second_moments().merge(HessianObserver(("b",), (2, 4), rows))


# -- the vectors that weights multiply

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(6, 4), (3, 5, 6)),
    "conv2d": (nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 6, 8, 9)),
    "groups": (nn.Conv2d(6, 4, 3, groups=2, padding=1), (2, 6, 8, 9)),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6), (2, 6, 8, 9)),
    "same": (nn.Conv2d(6, 4, (2, 4), padding="same", dilation=(1, 2)), (2, 6, 8, 9)),
    "valid": (nn.Conv2d(6, 4, 2, padding="valid"), (2, 6, 8, 9)),
    "conv1d": (nn.Conv1d(6, 4, 3, stride=2, padding=1, groups=2), (2, 6, 9)),
    "conv1d same": (nn.Conv1d(6, 4, 4, padding="same"), (2, 6, 9)),
    "conv3d": (nn.Conv3d(6, 4, (2, 3, 1), stride=(1, 2, 1), padding=1, groups=2), (2, 6, 3, 4, 5)),
    "transposed 1d": (nn.ConvTranspose1d(6, 4, 3, stride=2, padding=1, output_padding=1), (2, 6, 5)),
    "transposed 2d": (
        nn.ConvTranspose2d(6, 4, (3, 2), stride=(2, 3), padding=(2, 0), output_padding=(1, 2), groups=2),
        (2, 6, 4, 3),
    ),
    "transposed 3d": (nn.ConvTranspose3d(6, 4, 2, dilation=(1, 2, 3), padding=1), (2, 6, 3, 3, 3)),
}


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Call(nn.Module):
    """GPT-2's linear."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(6, 4)), nn.Parameter(torch.empty(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def weighted(model: nn.Module, x: Tensor) -> Weighted:
    return next(op for op in ops_of(capture(model, x)) if isinstance(op, Weighted))


@pytest.mark.parametrize("name", LAYERS)
def test_products_with_the_samples_are_the_layers_output(name: str) -> None:
    layer, shape = LAYERS[name]
    op = weighted(One(layer), torch.ones(shape))
    samples, rest = input_vectors(op)
    assert rest == ()
    x, w = numbers(0, *shape).double(), numbers(1, *op.weight_op.val.shape).double()
    problems = as_matrices(w, op)
    assert torch.equal(as_weight(problems, op, w), w)
    found = torch.stack([part @ problems[i].T for i, part in samples(x)])  # [B, rows, N]
    layer.double().weight.data = w
    with torch.no_grad():
        layer.bias.zero_()  # pyright: ignore[reportCallIssue, reportOptionalMemberAccess]
        y = layer(x)
    wanted = y.movedim(op.output_axis, 0).flatten(1).unflatten(0, (len(problems), -1)).mT
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_an_input_without_batches_is_a_batch_of_one(name: str) -> None:
    layer, shape = LAYERS[name]
    op = weighted(One(copy.deepcopy(layer).float()), torch.ones(shape))
    samples, _ = input_vectors(op)
    x = numbers(0, 1, *shape[1:])[:, :1] if name == "linear" else numbers(0, 1, *shape[1:])
    one = x[0, 0] if name == "linear" else x[0]
    for (i, part), (j, alone) in zip(samples(x), samples(one), strict=True):
        assert i == j
        assert torch.equal(part, alone)
    count = int(x.shape[op.input_axis])
    for observer in (
        lambda: ChannelObserver(("a",), count, op.input_axis),
        lambda: MeanObserver(("a",), op.input_axis, [count]),
    ):
        seen, alike = observer(), observer()
        seen(x)
        alike(one)
        assert all(torch.equal(a, b) for a, b in zip(seen.buffers(), alike.buffers(), strict=True))
        assert seen.has_observed


def test_transposed_weights() -> None:
    op = weighted(Call(), torch.ones(2, 6))
    w = numbers(0, 6, 4)
    assert torch.equal(as_matrices(w, op), w.T[None])
    assert torch.equal(as_weight(as_matrices(w, op), op, w), w)


def test_experts() -> None:
    gm = capture(MoE(), torch.ones(2, 8))
    op = next(op for op in ops_of(gm) if isinstance(op, Weighted) and op.own_axes)
    samples, rest = input_vectors(op)
    assert rest == (next(o for o in ops_of(gm) if o.node is op.argument("offsets")),)
    x = numbers(0, 7, 8)
    seen = HessianObserver(("a",), (4, 8), samples)
    seen(x, torch.tensor([2, 2, 6, 7]))
    assert seen.counts.tolist() == [2, 0, 4, 1]
    for i, part in enumerate(x.split([2, 0, 4, 1])):
        torch.testing.assert_close(seen.sums[i], part.T @ part, rtol=1e-5, atol=1e-6)  # float32
    assert F.relu(seen.mean()[1]).sum() == 0


def test_the_mean_of_each_expert_is_over_its_own_tokens() -> None:
    """Seven tokens in all, of which two, none, four and one reached the four experts."""
    op = next(op for op in ops_of(capture(MoE(), torch.ones(2, 8))) if isinstance(op, Weighted) and op.own_axes)
    x = numbers(0, 7, 8)
    seen = HessianObserver(("a",), (4, 8), input_vectors(op)[0])
    seen(x, torch.tensor([2, 2, 6, 7]))
    for i, part in enumerate(x.split([2, 0, 4, 1])):
        wanted = part.T @ part / max(len(part), 1)
        torch.testing.assert_close(seen.mean()[i], wanted, rtol=1e-5, atol=1e-6)  # float32


# -- what masks leave out


def test_rows_that_are_not_valid_are_not_seen() -> None:
    x, valid = numbers(0, 3, 5, 4), torch.rand(3, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    full = valid.unsqueeze(-1).expand(3, 5, 4)
    for make in (channels, second_moments, lambda: MeanObserver(("a",), -1, [4])):
        seen, wanted = make(), make()
        assert seen(torch.where(full, x, torch.nan), valid=full).isnan().any()  # handed on as it is
        wanted(x[valid])
        assert all(torch.equal(a, b) for a, b in zip(seen.buffers(), wanted.buffers(), strict=True))
        assert seen.has_observed


def test_channels_along_another_axis() -> None:
    x = numbers(0, 2, 4, 3)  # [batch, channels, places]
    valid = torch.tensor([[True, True, False], [False, True, True]])
    seen, wanted = ChannelObserver(("a",), 4, -2), ChannelObserver(("a",), 4, -1)
    seen(x, valid=valid.unsqueeze(1).expand(2, 4, 3))
    wanted(x.mT[valid])
    assert all(torch.equal(a, b) for a, b in zip(seen.buffers(), wanted.buffers(), strict=True))


def test_a_batch_of_padding_alone_counts_for_nothing() -> None:
    for make in (channels, second_moments):
        seen = make()
        seen(torch.full((2, 4), torch.nan), valid=torch.zeros(2, 4, dtype=torch.bool))
        assert not seen.has_observed
        assert int(seen.batches) == 1


def test_experts_rows_are_counted_anew() -> None:
    op = next(op for op in ops_of(capture(MoE(), torch.ones(2, 8))) if isinstance(op, Weighted) and op.own_axes)
    x = numbers(0, 8, 8)
    valid = torch.tensor([True, False, False, True, True, False, True, True])
    seen, wanted = (HessianObserver(("a",), (4, 8), input_vectors(op)[0]) for _ in range(2))
    seen(x, torch.tensor([2, 3, 7, 7], dtype=torch.int32), valid=valid.unsqueeze(-1).expand(8, 8))
    wanted(x[valid], torch.tensor([1, 1, 4, 4], dtype=torch.int32))
    assert seen.counts.tolist() == [1, 0, 3, 0]  # the last row is no expert's
    assert all(torch.equal(a, b) for a, b in zip(seen.buffers(), wanted.buffers(), strict=True))


def test_what_fails_in_an_observer_is_no_fault_of_the_data() -> None:
    def broken(x: Tensor) -> list[tuple[int, Tensor]]:
        raise ValueError("no such rows")

    with pytest.raises(PassError) as error:
        HessianObserver(("a.b",), (1, 4), broken)(torch.ones(2, 4))
    assert str(error.value) == "calibrate: HessianObserver of the input of a.b: ValueError: no such rows"
    assert isinstance(error.value.__cause__, ValueError)
